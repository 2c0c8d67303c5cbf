"""Time the rules of `lorascope label` on planted features, and count how many rules are found.

    python benchmarks/labels.py --features 7168

The corpus is that of `synthetic_features.py`. A planted feature fires on one to five tokens of the
vocabulary; half of them only in one role or right after one of some tokens. It misses one token of
ten, and fires at one of 10,000 others, so the balanced accuracy of the planted rule is 0.95. Those
above 0.9 on the held-out half are `found`.
"""

import argparse
import json
import time

import numpy as np
from synthetic_features import _corpus, _vocabulary

from lorascope.artifact import Identity
from lorascope.features.arrays import KIND, SCHEMA
from lorascope.features.index import FeatureIndex
from lorascope.labels.by_rule import Half, Halves, label_features
from lorascope.labels.clues import read_clues
from lorascope.labels.label import summarize
from lorascope.texts.roles import ROLES

_MISSED, _ELSEWHERE = 0.1, 1e-4


def plant(
    rng: np.random.Generator, token: np.ndarray, role: np.ndarray, previous: np.ndarray
) -> np.ndarray:
    """Return where a planted feature acts, `(token,)` bool."""
    acts = np.isin(token, rng.choice(token, rng.integers(1, 6)))
    how = rng.random()
    if how < 0.25:
        acts &= role == ROLES.index(rng.choice(["user", "think", "answer"]))
    elif how < 0.5:
        acts &= np.isin(previous, rng.choice(previous[acts], 5))
    return acts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--features", type=int, default=7168)
    parser.add_argument("--rollouts", type=int, default=600)
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    tokens, special = _vocabulary(rng)
    corpus = _corpus(rng, given.rollouts, special)
    rollout = np.repeat(np.arange(given.rollouts), np.diff(corpus.start))
    previous = np.concatenate([[0], corpus.token[:-1]])
    chooses = rollout % 2 == 0
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for _ in range(given.features):
        acts = plant(rng, corpus.token, corpus.role, previous)
        luck = rng.random(len(acts))
        fires = np.where(acts, luck >= _MISSED, luck < _ELSEWHERE)
        for part, half in zip(parts, (chooses, ~chooses), strict=True):
            part.append(np.flatnonzero(fires[half]))

    begun = time.perf_counter(), time.process_time()
    clues = read_clues(corpus.token.astype(np.int32), corpus.role, rollout, dict(enumerate(tokens)))
    halves = Halves(
        *(
            Half(
                clues.take(np.flatnonzero(half)),
                np.concatenate([[0], np.cumsum([len(rows) for rows in part])]),
                np.concatenate(part),
                np.zeros(int(half.sum()), np.int32),
                np.flatnonzero(half),
                rng.exponential(size=sum(map(len, part))).astype(np.float32),
            )
            for part, half in zip(parts, (chooses, ~chooses), strict=True)
        )
    )
    manifest = Identity(kind=KIND, schema=SCHEMA, settings={}, parents={}).manifest(None, {})
    n = given.features
    index = FeatureIndex.from_arrays(
        manifest,
        {
            "latent_n_active": np.ones(n),
            "example_offset": np.arange(n + 1),
            "example_value": np.ones(n),
            "near_decoder": rng.integers(0, n, (n, 10)),
            "near_cofiring": rng.integers(0, n, (n, 10)),
        },
    )
    labels = label_features(halves, index)
    seconds, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
    found = np.array([label.balanced_accuracy or 0.5 for label in labels.values()])
    result = {
        "features": n,
        "tokens": len(corpus.token),
        "firings": int(sum(map(len, parts[0])) + sum(map(len, parts[1]))),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "found": round(float((found >= 0.9).mean()), 4),
        **summarize(labels),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
