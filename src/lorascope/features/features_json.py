"""A feature index as JSON of the published schema; `foreign.py` reads it.

`metadata` holds n_features, top_k and, in ours, the manifest under `lorascope`.
`features` maps the latent's number to its `examples` (activation_value, rollout_idx, token_idx,
token, tokens, target_position, activations and, in ours, n_alike) and its `stats` (n_examples,
max_activation and, in ours, more). What else an index has is not in it. Numbers are float32 values
written in full, so that reading them back gives the same bits.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.artifact import canonical
from lorascope.features.foreign import well_formed
from lorascope.features.index import FeatureIndex

_METADATA = ("context_window", "n_tokens", "n_eligible", "n_rollouts", "fvu", "l0")


def to_published(index: FeatureIndex, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the JSON text piece by piece, one feature at a time; dead features are included."""
    content = index.content
    examples = index.n_examples
    metadata = {
        "n_features": len(index),
        "top_k": content.get("top_k", int(examples.max(initial=0))),
        **{key: content[key] for key in _METADATA if key in content},
        "special_tokens": _special_texts(index),
        "histogram_edges": index.latent_histogram_edges.tolist(),
        "lorascope": json.loads(canonical(manifest)),  # keys in one order, whoever made it
    }
    yield '{"metadata": ' + _text(metadata) + ',\n"features": {'
    for latent in range(len(index)):
        comma = ",\n" if latent else "\n"
        yield f'{comma}"{latent}": ' + _text(_published_feature(index, latent))
    yield "\n}}\n"


def write_published(index: FeatureIndex, path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the published JSON; the same index gives the same bytes. Not atomic by itself."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(to_published(index, manifest))


def _published_feature(index: FeatureIndex, latent: int) -> dict[str, Any]:
    known = index.stats(latent)
    stats = {
        "n_examples": known.n_examples,
        "max_activation": known.max,
        "mean_activation": known.mean,
        "std_activation": known.std,
        "n_active": known.n_active,
        "n_rollouts": known.n_rollouts,
        "histogram": known.histogram.tolist() or None,
    }
    return {
        "examples": [
            {
                "activation_value": example.value,
                "rollout_idx": example.rollout,
                "token_idx": example.position,
                "token": example.tokens[example.target],
                "tokens": example.tokens,
                "target_position": example.target,
                "activations": np.asarray(example.activations).tolist(),
                **({"n_alike": example.n_alike} if example.n_alike >= 0 else {}),
            }
            for example in index.examples(latent)
        ],
        "stats": {key: value for key, value in stats.items() if value is not None},
    }


def _special_texts(index: FeatureIndex) -> list[str]:
    special = index.token_id[index.token_special != 0]
    return sorted({index.token_bytes(int(i)).decode(errors="replace") for i in special})


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text if text.isascii() else well_formed(text)
