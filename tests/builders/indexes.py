"""Small feature indexes, written by hand or synthetic."""

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.artifact import Manifest
from lorascope.features.arrays import KIND, RANKINGS, SCHEMA
from lorascope.features.feature import Example
from lorascope.features.index import FeatureIndex

_FILE = Path(__file__).parents[2] / "benchmarks" / "synthetic_features.py"
synthetic = runpy.run_path(str(_FILE))["synthetic"]
TOKENS = {
    1: b" the",
    2: "é".encode(),
    3: "😀".encode()[:2],
    4: "😀".encode()[2:],
    5: b"\n",
    6: b"<|im_end|>",
}


def manifest_of(n_features: int, **content: Any) -> Manifest:
    """A features manifest as collect makes it."""
    content = {"n_features": n_features, "n_eligible": 1000, "top_k": 3, **content}
    return Manifest(
        kind=KIND,
        schema=SCHEMA,
        settings={"top_k": 3},
        parents={"sae": "c0ffee" * 8},
        layout=None,
        content=content,
    )


def example(value: float, row: int, token_ids: list[int], target: int, **given: Any) -> Example:
    """An example that fires at its target, and at 0.1 where `given` says so."""
    activations = [0.0] * len(token_ids)
    for at in given.pop("also", []):
        activations[at] = 0.1
    activations[target] = value
    return Example(
        value=value,
        row=row,
        rollout=given.pop("rollout", 7),
        position=given.pop("position", row),
        target=target,
        token_ids=token_ids,
        activations=activations,
        quantile=given.pop("quantile", -1),
        n_alike=given.pop("n_alike", -1),
    )


def statistics(features: list[list[Example]]) -> dict[str, Any]:
    """Statistics that fit the examples: as many firings as examples, all in the second bin."""
    counts = np.array([len(examples) for examples in features])
    best = [max((e.value for e in examples), default=0.0) for examples in features]
    return {
        "latent_n_active": counts,
        "latent_max": best,
        "latent_mean": np.array(best) / 2,
        "latent_std": np.array(best) / 3,
        "latent_n_rollouts": np.minimum(counts, 1),
        "latent_histogram": np.stack([0 * counts, counts, 0 * counts], axis=1),
        "latent_histogram_edges": [0.01, 0.1, 1.0, 10.0],
    }


def index_of(
    features: list[list[Example]],
    tokens: dict[int, bytes] | None = None,
    samples: list[list[Example]] | None = None,
    at_special: list[list[Example]] | None = None,
    latents: dict[str, Any] | None = None,
    **content: Any,
) -> FeatureIndex:
    """An index with fitting statistics; token 6 is special."""
    return FeatureIndex.from_examples(
        manifest_of(len(features), **content),
        features,
        TOKENS if tokens is None else tokens,
        samples=samples or (),
        at_special=at_special or (),
        special={6},
        latents={**statistics(features), **(latents or {})},
    )


def small_index() -> FeatureIndex:
    """Four latents: full, dead, one example, two of equal value given in the wrong order.

    The first has two samples, the first and the last have examples at special tokens; a text of
    three tokens is kept whole.
    """
    return index_of(
        [
            [
                example(0.30000001192092896, 40, [1, 2, 5], 1, also=[0]),
                example(2.5, 90, [1, 3, 4, 5], 1, n_alike=3),
                example(1.25, 3, [6, 1], 1, position=1),
            ],
            [],
            [example(0.5, 12, [5], 0, rollout=0, position=0)],
            [example(1.0, 31, [1, 1], 0), example(1.0, 30, [2, 1, 1], 1)],
        ],
        samples=[
            [example(0.25, 44, [2], 0, quantile=0), example(2.25, 80, [1, 2], 1, quantile=4)],
            *([], [], []),
        ],
        at_special=[
            [example(0.75, 92, [4, 6], 1)],
            *([], []),
            [example(1.5, 60, [6, 1], 0), example(1.75, 61, [6], 0)],
        ],
        latents={
            "latent_n_special": [1, 0, 0, 5],
            "latent_by_role": [[1, 2, 1], [0, 0, 0], [1, 0, 0], [2, 0, 5]],
            "latent_by_position": [[3, 0], [0, 0], [0, 1], [1, 1]],
            "latent_fingerprint": [[0.25, 0.75], [0, 0], [1, 0], [0.5, 0.5]],
            "latent_stability": [0.5, np.nan, 1, 0],
            "near_decoder": [[3, 2], [-1, -1], [0, 3], [0, 2]],
            "near_cosine": [[0.5, 0.25], [np.nan, np.nan], [0.25, 0.125], [0.5, 0.125]],
            "near_cofiring": [[3], [-1], [-1], [0]],
            "near_jaccard": [[0.5], [np.nan], [np.nan], [0.5]],
            **{
                f"ranked_{name}_{part}": [[values[0]], [values[1]], [values[0]], [values[0]]]
                for name in RANKINGS
                for part, values in (("id", (2, -1)), ("score", (0.5, np.nan)))
            },
            "text_rollout": [7],
            "text_why": [1],
            "text_l0": [1.0],
            "text_fvu": [0.25],
            "text_rarity": [0.5],
            "text_offset": [0, 3],
            "text_token_id": [1, 2, 6],
            "text_role": [3, 3, 5],
            "text_code_offset": [0, 2, 3, 3],
            "text_latent": [0, 3, 0],
            "text_value": [0.5, 0.25, 1.0],
        },
        roles=["think", "answer", "special"],
        n_by_role=[10, 0, 5],
        n_by_position=[6, 4],
    )


@cache
def full_index() -> FeatureIndex:
    """60 features with everything that an index may know."""
    return synthetic(60, 5, 6, n_texts=4, n_rollouts=20, n_layers=4, dead=0.1)


def feature_with(index: FeatureIndex, has: Any) -> int:
    return next(i for i in range(len(index)) if index.n_examples[i] and has(index[i]))
