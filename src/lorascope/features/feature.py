"""The records that a feature index returns: a feature, its statistics, its examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token on which a latent fires, and the tokens around it in the same rollout.

    `row` is the token's row in the store, `rollout` the rollout's id, and `position` the token's
    position in it. `token_ids` and `activations` are `(window,)`, and `target` is the token's index
    in them. `tokens` has the window's texts for display. `n_alike` counts the tokens of the store
    with the same context. `quantile` is the fifth of the latent's firings that a sample was drawn
    from, 4 for the strongest. Integers that are unknown or do not apply are -1.
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
    """Statistics of one latent over all eligible tokens; None for what the file does not contain.

    `density` is the share of eligible tokens on which it fires. `mean`, `std` and `histogram`
    `(n_bins,)` are over the tokens on which it fires. `by_role` has the density among the tokens
    of each role, `by_position` in each tenth of the rollouts. `stability` is the mean cosine with
    the most similar latent in SAEs of other seeds.
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

    `examples` are sorted from the strongest down. `samples` are random firings from each fifth by
    value, strongest fifth first. `fingerprint` maps a site's module name to its share of the
    effect. `similar` has the latents with the nearest decoder rows and their cosines, `cofiring`
    those that fire on the same tokens and their Jaccard indices. `tokens` has the rankings `mean`
    (mean value on the token), `lift` (how many times more often than elsewhere it fires on the
    token), `before` and `after` (share of the firings next to the token).
    """

    latent: int
    stats: FeatureStats
    examples: tuple[Example, ...]
    samples: tuple[Example, ...]
    fingerprint: Mapping[str, float]
    similar: tuple[tuple[int, float], ...]
    cofiring: tuple[tuple[int, float], ...]
    tokens: Mapping[str, tuple[tuple[str, float], ...]]
