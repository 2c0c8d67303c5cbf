"""The records that a feature index gives: a feature, its statistics, its examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token on which a latent fires, and the tokens around it in the same rollout.

    `row` is the token's row in the store, `rollout` the rollout's id, `position` the token's
    index in it; each -1 where unknown. `token_ids` and `activations` are `(window,)`, `target`
    the token's index in them, `tokens` the window's texts as people may read them. `n_alike` is at
    how many places of the store the same tokens stand around such a token (-1 where unknown), and
    `quantile` the fifth of the latent's firings that a sample stands for, 4 for the strongest; -1
    for one of the strongest examples.
    """

    value: float
    row: int
    rollout: int
    position: int
    target: int
    token_ids: Sequence[int] | npt.NDArray[np.int32]
    activations: Sequence[float] | npt.NDArray[np.float32]
    tokens: tuple[str, ...] = ()
    n_alike: int = -1
    quantile: int = -1


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """Numbers of one latent over all eligible tokens; None where the file does not say them.

    `density` is the share of eligible tokens on which it fires, `mean` and `std` are over those
    tokens, `histogram` is `(n_bins,)`, the number of those tokens between two edges. `by_role` is
    the density among the tokens of each role, `by_position` that in each tenth of a rollout.
    `stability` is the latent's cosine with its like in SAEs of other seeds.
    """

    n_examples: int
    n_active: int | None
    n_rollouts: int | None
    density: float | None
    max: float | None
    mean: float | None
    std: float | None
    histogram: npt.NDArray[np.uint32]
    by_role: Mapping[str, float]
    by_position: tuple[float, ...]
    stability: float | None


@dataclass(frozen=True, kw_only=True)
class Feature:
    """The record of one latent.

    `examples` go from the strongest down; `samples` were drawn evenly from each fifth of its
    firings, strongest fifth first. `fingerprint` is the share of its effect at each site, by module
    name. `similar` are the latents of the nearest decoder rows with their cosine, `beside` those
    that fire on the same tokens with the Jaccard index. `tokens` has the rankings `mean` (tokens
    on which it is strongest), `lift` (how many times as often as elsewhere it fires there),
    `before` and `after` (share of the tokens that precede and follow).
    """

    latent: int
    stats: FeatureStats
    examples: tuple[Example, ...]
    samples: tuple[Example, ...]
    fingerprint: Mapping[str, float]
    similar: tuple[tuple[int, float], ...]
    beside: tuple[tuple[int, float], ...]
    tokens: Mapping[str, tuple[tuple[str, float], ...]]
