"""How well labels predict what nobody looked at to write them: firings, and effects of removal.

How well a description tells where a feature fires:

- *Recall* is the share of the firings that the description covers, *specificity* the share of the
  other tokens that it does not cover. Balanced accuracy is their mean: 0.5 is chance, however rare
  the feature is. Precision is the share of the covered tokens that fire.
- Tokens of one rollout are not independent. The interval of a share is Wilson's, with as many
  tokens as would have the variance that the shares of the rollouts show (Kish's effective size);
  if the share is 0 or 1, with as many as there are rollouts that count. Both intervals are combined
  as in Newcombe (1998): the distances to the bounds add up in squares.
- *Hard cases*: the specificity among tokens with the text of a firing, weighted as the firings are,
  and among tokens at which the feature's neighbours fire. Each with the same recall.
- *Clarity* and *purity* look at how strongly the feature fires, 0 where it is silent (both from
  FADE, Puri et al. 2025, arXiv 2502.16994). Clarity is 2 · AUROC − 1, the Gini index: how often a
  covered token has a larger value than another one, less how often it has a smaller one. Purity is
  the average precision of the tokens in order of their values: Σ (share of the covered tokens that
  a value adds) · (share of the tokens up to it that are covered), equal values at once. A random
  order has the share of covered tokens. Both intervals are Wilson's again, the variance from draws
  of rollouts, in which values are cut into `_N_LEVELS` levels.

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

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope.labels.clues import Corpus, Ints, Mask

CLEAR = 0.7  # lower bound of the balanced accuracy of a clear label
_Z = 1.959963984540054  # of a 95 % interval
_N_DRAWS = 200
_N_LEVELS = 64
_FEWEST_CASES = 10  # tokens of a hard case; of fewer it has no score
N_REMOVALS = 5  # from which one is picked
CHANCE = 1 / N_REMOVALS  # of picking the right one
_N_SHUFFLED = 8  # other features whose promoted tokens are tried on each removal
_N_DRAWS_OF_FEATURES = 1000


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


class Score(NamedTuple):
    """The scores of one description; None where there are no tokens to measure on."""

    balanced_accuracy: float | None = None
    interval: tuple[float, float] | None = None
    precision: float | None = None
    recall: float | None = None
    n_fired: int = 0

    @property
    def is_clear(self) -> bool:
        """Whether the interval begins at `CLEAR` or above."""
        return self.interval is not None and self.interval[0] >= CLEAR


def score(corpus: Corpus, covered: Mask, firings: Ints) -> Score:
    """Return the score of a description that covers some tokens `(token,)` of held-out rollouts."""
    n_rollouts = int(corpus.rollout.max(initial=-1)) + 1
    fired = np.bincount(corpus.rollout[firings], minlength=n_rollouts)
    others = np.bincount(corpus.rollout, minlength=n_rollouts) - fired
    hit = np.bincount(corpus.rollout[firings[covered[firings]]], minlength=n_rollouts)
    wrong = np.bincount(corpus.rollout[covered], minlength=n_rollouts) - hit
    n_covered, n_fired = int(covered.sum()), len(firings)
    if not n_fired or n_fired == len(corpus):
        return Score(n_fired=n_fired)
    precision = int(hit.sum()) / n_covered if n_covered else None
    return _balanced(_share(hit, fired), _share(others - wrong, others), precision, n_fired)


Edges = tuple[float, float]
Floats = npt.NDArray[np.float64]


class Ranking(NamedTuple):
    """Clarity, from -1 to 1, and purity with their intervals; `covered` is purity's chance."""

    clarity: float | None = None
    clarity_interval: Edges | None = None
    purity: float | None = None
    purity_interval: Edges | None = None
    covered: float | None = None


def draw_rollouts(corpus: Corpus) -> Floats:
    """Return how often each rollout of a corpus counts in each of some draws, `(draw, rollout)`."""
    sizes = np.bincount(corpus.rollout)
    read = sizes > 0
    n = int(read.sum())
    draws = np.zeros((_N_DRAWS, len(sizes)))
    draws[:, read] = np.random.default_rng(2).multinomial(n, np.full(n, 1 / n), size=_N_DRAWS)
    return draws


def rank(
    corpus: Corpus, covered: Mask, firings: Ints, values: npt.NDArray[np.float32], draws: Floats
) -> Ranking:
    """Return how well a feature's values `(firing,)` rank the tokens that a description covers.

    It is unknown where the feature is silent, or the description covers no token or all of them.
    """
    n_covered, n = int(covered.sum()), len(corpus)
    if not len(firings) or not 0 < n_covered < n:
        return Ranking()
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # of equal values
    hits = np.cumsum(covered[firings[order]])[ends]
    clarity, purity = _ranked(
        np.append(hits, n_covered).astype(float)[None], np.append(ends + 1, n).astype(float)[None]
    )
    last = np.repeat(ends, np.diff(ends, prepend=-1))  # with the value of each firing
    level = last * _N_LEVELS // len(firings)
    n_rollouts = draws.shape[1]
    cell = corpus.rollout[firings[order]] * (_N_LEVELS + 1) + level
    is_hit = covered[firings[order]]
    sums: list[Floats] = []
    for cells, tokens in ((cell[is_hit], corpus.rollout[covered]), (cell, corpus.rollout)):
        table = np.bincount(cells, minlength=n_rollouts * (_N_LEVELS + 1)).astype(float)
        table = table.reshape(n_rollouts, -1)
        table[:, -1] = np.bincount(tokens, minlength=n_rollouts) - table.sum(1)  # silent tokens
        sums.append((draws @ table).cumsum(1))
    known = (sums[0][:, -1] > 0) & (sums[0][:, -1] < sums[1][:, -1])
    drawn = _ranked(sums[0][known], sums[1][known])
    n_with = len(np.unique(corpus.rollout[covered]))
    area = _wilson_of_draws((float(clarity[0]) + 1) / 2, (drawn[0] + 1) / 2, n_with, n_covered)
    share = _wilson_of_draws(float(purity[0]), drawn[1], n_with, n_covered)
    return Ranking(
        float(clarity[0]),
        (2 * area.low - 1, 2 * area.high - 1),
        share.value,
        (share.low, share.high),
        n_covered / n,
    )


def _ranked(hits: Floats, tokens: Floats) -> tuple[Floats, Floats]:
    """Return clarity and purity from sums of covered and all tokens up to each value."""
    added, n_covered = np.diff(hits, prepend=0), hits[:, -1]
    others = np.diff(tokens - hits, prepend=0)
    above = (others * (hits - added / 2)).sum(1) / (n_covered * (tokens[:, -1] - n_covered))
    with np.errstate(invalid="ignore"):
        precision = np.nan_to_num(hits / tokens)
    return 2 * above - 1, (added * precision).sum(1) / n_covered


def _wilson_of_draws(value: float, draws: Floats, n_rollouts: int, n: int) -> Estimate:
    variance = float(draws.var()) if len(draws) else 0.0
    value = min(max(value, 0.0), 1.0)  # sums are rounded
    size = min(value * (1 - value) / variance, n) if variance else n_rollouts
    return wilson(value, max(size, 1.0))


def score_answers(answers: Sequence[tuple[bool, bool]]) -> Score:
    """Return the score of a judge from pairs: whether the feature fires, and whether it says so.

    It is unknown unless there are both firings and others.
    """
    hits = [said for fires, said in answers if fires]
    rejections = [not said for fires, said in answers if not fires]
    if not hits or not rejections:
        return Score()
    recall, specificity = (
        wilson(sum(right) / len(right), len(right)) for right in (hits, rejections)
    )
    return _balanced(recall, specificity, None, len(hits))


def against_same_token(corpus: Corpus, covered: Mask, firings: Ints) -> float | None:
    """Return the balanced accuracy if the other tokens are those with the text of a firing.

    None if fewer than ten of them are left.
    """
    token = corpus.values[0]
    weight = np.bincount(token[firings], minlength=len(corpus.texts)).astype(float)
    others = np.bincount(token, minlength=len(corpus.texts)) - weight
    hit = np.bincount(token[firings[covered[firings]]], minlength=len(corpus.texts))
    wrong = np.bincount(token[covered], minlength=len(corpus.texts)) - hit
    known = (weight > 0) & (others > 0)
    if others[known].sum() < _FEWEST_CASES:
        return None
    right = 1 - wrong[known] / others[known]
    specificity = float((weight[known] * right).sum() / weight[known].sum())
    return (float(hit.sum()) / len(firings) + specificity) / 2


def against(covered: Mask, firings: Ints, others: Ints) -> float | None:
    """Return the balanced accuracy if the other tokens are these; None if they are under ten."""
    others = np.setdiff1d(others, firings)
    if len(others) < _FEWEST_CASES or not len(firings):
        return None
    return float(covered[firings].mean() + 1 - covered[others].mean()) / 2


def wilson(value: float, n: float) -> Estimate:
    """Return a share of `n` cases with Wilson's interval."""
    centre = (value + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(value * (1 - value) / n + _Z**2 / (4 * n**2))
    return Estimate(value, min(centre - half, value), max(centre + half, value))


def _balanced(
    recall: Estimate, specificity: Estimate, precision: float | None, n_fired: int
) -> Score:
    """Return the scores of a recall and a specificity."""
    mean = (recall.value + specificity.value) / 2
    below = math.hypot(recall.value - recall.low, specificity.value - specificity.low) / 2
    above = math.hypot(recall.high - recall.value, specificity.high - specificity.value) / 2
    interval = (max(mean - below, 0.0), min(mean + above, 1.0))
    return Score(mean, interval, precision, recall.value, n_fired)


def _share(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> Estimate:
    """Return the share of sums over rollouts."""
    some = whole > 0
    part, whole = part[some], whole[some]
    total, n = float(whole.sum()), int(some.sum())
    value = float(part.sum()) / total
    size = float(n)
    if 0 < value < 1 and n > 1:
        variance = float(((part - value * whole) ** 2).sum()) / total**2 * n / (n - 1)
        size = min(value * (1 - value) / variance, total) if variance else total
    return wilson(value, size)


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
        pool = alike if len(alike) >= N_REMOVALS else list(falls)
        found[latent] = [i for i in pool if i != latent] if len(pool) >= N_REMOVALS else []
    return found


def _share_picked(
    tokens: Sequence[int], latent: int, rivals: Sequence[int], falls: Mapping[int, Falls]
) -> float:
    own = _match(tokens, falls[latent])
    matches = [_match(tokens, falls[rival]) for rival in rivals]
    better, equal = sum(one > own for one in matches), sum(one == own for one in matches)
    n = N_REMOVALS - 1
    worse = len(rivals) - better - equal
    picks = (math.comb(equal, k) * math.comb(worse, n - k) / (1 + k) for k in range(n + 1))
    return sum(picks) / math.comb(len(rivals), n)


def _match(tokens: Sequence[int], falls: Falls) -> float:
    return sum(falls.get(token, 0.0) for token in dict.fromkeys(tokens))


def mean_over_features(values: Sequence[float]) -> Estimate:
    """Return a mean with its interval over draws of features."""
    some: npt.NDArray[np.float64] = np.asarray(values, float)
    draws = np.random.default_rng([0, len(some)]).integers(
        0, len(some), (_N_DRAWS_OF_FEATURES, len(some))
    )
    mean = float(some.mean())
    low, high = np.percentile(some[draws].mean(1), (2.5, 97.5)).tolist()
    return Estimate(mean, min(low, mean), max(high, mean))
