"""Feature indexes as JSON of the published schema: write ours, read ours and other tools'.

`metadata` holds n_features, top_k and, in ours, the manifest under `lorascope`.
`features` maps the latent's number to its `examples` (activation_value, rollout_idx, token_idx,
token, tokens, target_position, activations and, in ours, n_alike) and its `stats` (n_examples,
max_activation and, in ours, more). The JSON holds nothing else of an index. Numbers are float32
values written in full, so reading them back gives the same bits.

When reading, what a file does not say is unknown in the index, not zero; rows and token ids are
always unknown. Token ids below zero are made up, one for each text.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lorascope.artifact import is_manifest, make_manifest, seal_file, with_seal
from lorascope.errors import ArtifactError
from lorascope.features.arrays import KIND, SCHEMA
from lorascope.features.feature import Example
from lorascope.features.index import FeatureIndex

log = logging.getLogger(__name__)

_METADATA = ("context_window", "n_tokens", "n_eligible", "n_rollouts", "fvu", "l0")
_MAX_FEATURES = 1 << 24  # above it an id is a mistake, and would ask for gigabytes of nothing
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_STATS = {  # key of `stats` -> field of the index
    "n_active": "latent_n_active",
    "n_rollouts": "latent_n_rollouts",
    "max_activation": "latent_max",
    "mean_activation": "latent_mean",
    "std_activation": "latent_std",
    "histogram": "latent_histogram",
}


def to_published(index: FeatureIndex, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Yield the JSON text piece by piece, one feature at a time; dead features are included."""
    content = index.content
    examples = index.n_examples
    metadata = {
        "lorascope": with_seal(manifest),
        "n_features": len(index),
        "top_k": content.get("top_k", int(examples.max(initial=0))),
        **{key: content[key] for key in _METADATA if key in content},
        "special_tokens": _special_texts(index),
        "histogram_edges": index.latent_histogram_edges.tolist(),
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
    seal_file(path)


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


def read_published(path: Path) -> FeatureIndex:
    """Read any JSON of the published schema, ours or another tool's.

    Examples are sorted by value. Its manifest is the one in the file, or one that says only what
    `metadata` says. Raises ArtifactError that names the first thing that is not as it should be.
    """
    metadata, features = _load(path)
    ids = {key: _feature_id(path, key) for key in features}
    stated = metadata.get("n_features")
    stated = stated if isinstance(stated, int) and not isinstance(stated, bool) else 0
    n_features = max([stated, *(latent + 1 for latent in ids.values())])
    if n_features > _MAX_FEATURES:
        _refuse(path, f"speaks of {n_features} features, expected at most {_MAX_FEATURES}")
    examples: list[list[Example]] = [[] for _ in range(n_features)]
    stats: list[Mapping[str, Any]] = [{} for _ in range(n_features)]
    vocabulary: dict[str, int] = {}  # text -> made-up id: -1, -2, ... in order of appearance
    for key, record in features.items():
        place = f"feature {key}"
        if not isinstance(record, dict) or not isinstance(record.get("examples"), list):
            _refuse(path, f"{place} has no list of examples")
        for number, example in enumerate(record["examples"]):
            read = _read_example(path, f"{place}, example {number}", example, vocabulary)
            examples[ids[key]].append(read)
        if isinstance(record.get("stats"), dict):
            stats[ids[key]] = record["stats"]
    _report_mismatch(path, examples)
    special = metadata.get("special_tokens")
    special = {str(text) for text in special} if isinstance(special, list) else set()
    return FeatureIndex.from_examples(
        _manifest(metadata),
        examples,
        {token_id: text.encode() for text, token_id in vocabulary.items()},
        special={token_id for text, token_id in vocabulary.items() if text in special},
        latents=_latents(stats, metadata.get("histogram_edges")),
    )


def well_formed(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and UTF-8 cannot, by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _refuse(path: Path, found: str) -> NoReturn:
    raise ArtifactError(f"{path} {found}; expected the features JSON that collect writes")


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is no JSON number")

    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=no_constant)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        detail = str(error).splitlines()[0]
        raise ArtifactError(f"{path} is not JSON ({detail}); give a features file") from error
    if not isinstance(data, dict) or not isinstance(data.get("features"), dict):
        _refuse(path, 'has no object "features"')
    metadata = data.get("metadata", {})
    if not isinstance(metadata, dict):
        _refuse(path, 'has a "metadata" that is no object')
    return metadata, data["features"]


def _feature_id(path: Path, key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= 12):
        _refuse(path, f"names a feature {key[:40]!r}, which is not a number")
    return int(key)


def _read_example(path: Path, place: str, data: Any, vocabulary: dict[str, int]) -> Example:
    if not isinstance(data, dict):
        _refuse(path, f"{place} is no object")
    for key in ("activation_value", "tokens", "activations", "target_position"):
        if key not in data:
            _refuse(path, f"{place} has no {key}")
    tokens, activations, target = data["tokens"], data["activations"], data["target_position"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        _refuse(path, f"{place} has tokens that are not a list of texts")
    if not isinstance(activations, list) or len(activations) != len(tokens):
        count = len(activations) if isinstance(activations, list) else "no"
        _refuse(path, f"{place} has {len(tokens)} tokens and {count} activations")
    if not _is_int(target) or not 0 <= target < len(tokens):
        _refuse(path, f"{place} has target_position {target!r} among {len(tokens)} tokens")
    texts = [token if token.isascii() else well_formed(token) for token in tokens]
    return Example(
        value=_float32(path, f"{place} has activation_value", data["activation_value"]),
        row=-1,
        rollout=_number(path, place, data, "rollout_idx"),
        position=_number(path, place, data, "token_idx"),
        target=target,
        token_ids=[vocabulary.setdefault(text, -1 - len(vocabulary)) for text in texts],
        activations=[_float32(path, f"{place} has activation", value) for value in activations],
        n_alike=_number(path, place, data, "n_alike"),
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(path: Path, place: str, data: Mapping[str, Any], key: str) -> int:
    """Return an integer, -1 where the file does not say it."""
    value = data.get(key)
    if value is None:
        return -1
    if not _is_int(value) or not -1 <= value < 1 << 31:
        _refuse(path, f"{place} has {key} {value!r}, which is no index")
    return value


def _float32(path: Path, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(path, f"{what} {str(value)[:40]!r}, which is no number")
    if not abs(value) <= _FLOAT32_MAX:
        _refuse(path, f"{what} beyond float32")
    return float(value)


def _report_mismatch(path: Path, features: list[list[Example]]) -> None:
    apart = sum(
        abs(e.value - e.activations[e.target]) > 1e-3 * abs(e.value)
        for examples in features
        for e in examples
    )
    if apart:
        log.warning(
            "%s: %d examples have an activation_value other than their token's activation; "
            "both are shown as they stand",
            path,
            apart,
        )


def _manifest(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ours = metadata.get("lorascope")
    if isinstance(ours, dict) and is_manifest(ours):
        return {**{key: ours[key] for key in ours if key != "seal"}, "files": {}}
    content = {k: v for k, v in metadata.items() if isinstance(v, (str, int, float, bool))}
    return make_manifest(KIND, SCHEMA, settings={}, parents={}, layout=None, content=content)


def _latents(stats: list[Mapping[str, Any]], edges: Any) -> dict[str, npt.NDArray[Any]]:
    """Return the statistics that the file states; a value of another type counts as unknown."""
    latents: dict[str, npt.NDArray[Any]] = {}
    for key, name in _STATS.items():
        if key == "histogram":
            continue
        values = [record.get(key) for record in stats]
        if key.startswith("n_"):
            known = [v if isinstance(v, int) and 0 <= v < 1 << 62 else -1 for v in values]
            latents[name] = np.array(known, dtype=np.int64)
        else:
            real = [float(v) if isinstance(v, (int, float)) else np.nan for v in values]
            with np.errstate(over="ignore"):
                latents[name] = np.array(real, dtype=np.float32)
    histogram = [record.get("histogram") for record in stats]
    try:
        bins = np.array(histogram, dtype=np.uint32)
        bounds = np.array(edges, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        return latents
    if bins.ndim == 2 and bins.shape[1] and bounds.shape == (bins.shape[1] + 1,):
        latents["latent_histogram"] = bins
        latents["latent_histogram_edges"] = bounds
    return latents
