"""How well a label's output half tells what removing the feature changes.

The output half of a label by rule is the tokens that the feature promotes, which `direct` reads
from weights. `ablate` really removes features and names the tokens that then lose most, each with
its share of the KL. Nothing of the one enters the other, so the first can be tested on the second:

1. The *match* of promoted tokens with a removal is the sum of the shares of those among the falls.
2. Four other removals are drawn from features of the same category, which are the hard ones, or
   from all, if fewer than four are of it. The removal of best match is picked; equal matches share.
3. `picked_effect` is how often the feature's own removal is picked, over all draws: exactly, by
   counting. With b rivals of better match, e of equal one and m in all it is
   Σ_k C(e, k) · C(m − b − e, 4 − k) / C(m, 4) / (1 + k). Chance is 1/5, and a label whose promoted
   tokens are among no falls has it too.
4. *Shuffled* is the same with the promoted tokens of other features.
"""

from collections.abc import Collection, Mapping, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

N_OPTIONS = 5
CHANCE = 1 / N_OPTIONS
_N_SHUFFLED = 8  # other features whose promoted tokens are tried on each removal
_N_DRAWS = 1000

Falls = Mapping[int, float]  # share of a removal's KL by token id


class Picked(NamedTuple):
    """How often each feature's own removal is picked, and with tokens of other features."""

    own: Mapping[int, float]
    shuffled: Mapping[int, float]


def pick_removals(
    promoted: Mapping[int, Sequence[int]], falls: Mapping[int, Falls], category: Mapping[int, str]
) -> Picked:
    """Return the scores of the features with `promoted` tokens whose removal has `falls`.

    Without four rivals nobody is scored.
    """
    rivals = rivals_of(falls, category)
    scored = [latent for latent in promoted if rivals.get(latent)]
    order = np.random.default_rng(1).permutation(scored).tolist()
    own: dict[int, float] = {}
    shuffled: dict[int, float] = {}
    for i, latent in enumerate(order):
        own[latent] = _share_picked(promoted[latent], latent, rivals[latent], falls)
        others = [order[(i + step) % len(order)] for step in range(1, _N_SHUFFLED + 1)]
        wrong = [
            _share_picked(promoted[other], latent, rivals[latent], falls)
            for other in dict.fromkeys(others)
            if other != latent
        ]
        if wrong:
            shuffled[latent] = float(np.mean(wrong))
    return Picked(own, shuffled)


def rivals_of(falls: Collection[int], category: Mapping[int, str]) -> dict[int, list[int]]:
    """Return the removals that compete with each; none where there are fewer than four."""
    by_category: dict[str, list[int]] = {}
    for latent in falls:
        by_category.setdefault(category[latent], []).append(latent)
    found: dict[int, list[int]] = {}
    for latent in falls:
        alike = by_category[category[latent]]
        pool = alike if len(alike) >= N_OPTIONS else list(falls)
        found[latent] = [i for i in pool if i != latent] if len(pool) >= N_OPTIONS else []
    return found


def _share_picked(
    tokens: Sequence[int], latent: int, rivals: Sequence[int], falls: Mapping[int, Falls]
) -> float:
    own = _match(tokens, falls[latent])
    matches = [_match(tokens, falls[rival]) for rival in rivals]
    better, equal = sum(one > own for one in matches), sum(one == own for one in matches)
    n = N_OPTIONS - 1
    worse = len(rivals) - better - equal
    picks = (comb(equal, k) * comb(worse, n - k) / (1 + k) for k in range(n + 1))
    return sum(picks) / comb(len(rivals), n)


def _match(tokens: Sequence[int], falls: Falls) -> float:
    return sum(falls.get(token, 0.0) for token in dict.fromkeys(tokens))


def mean_over_features(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return a mean with its 95 % interval over draws of features."""
    some: npt.NDArray[np.float64] = np.asarray(values, float)
    draws = np.random.default_rng([0, len(some)]).integers(0, len(some), (_N_DRAWS, len(some)))
    mean = float(some.mean())
    low, high = np.percentile(some[draws].mean(1), (2.5, 97.5)).tolist()
    return mean, (min(low, mean), max(high, mean))
