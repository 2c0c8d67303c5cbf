"""How well a description tells where a feature fires, on tokens that nobody looked at to write it.

- *Recall* is the share of the firings that the description covers, *specificity* the share of the
  other tokens that it does not cover. Balanced accuracy is their mean: 0.5 is chance, however rare
  the feature is. Precision is the share of the covered tokens that fire.
- Tokens of one rollout are not independent. The interval of a share is Wilson's, with as many
  tokens as would have the variance that the shares of the rollouts show (Kish's effective size);
  if the share is 0 or 1, with as many as there are rollouts that count. Both intervals are combined
  as in Newcombe (1998): the distances to the bounds add up in squares.
- *Hard cases*: the specificity among tokens with the text of a firing, weighted as the firings are,
  and among tokens at which the feature's neighbours fire. Each with the same recall.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope.labels.clues import Corpus, Ints, Mask

_Z = 1.959963984540054  # of a 95 % interval
_FEWEST_CASES = 10  # tokens of a hard case; of fewer it has no score


class Score(NamedTuple):
    """The scores of one description; None where there are no tokens to measure on."""

    balanced_accuracy: float | None
    interval: tuple[float, float] | None
    precision: float | None
    recall: float | None
    n_fired: int


def score(corpus: Corpus, covered: Mask, firings: Ints) -> Score:
    """Return the score of a description that covers some tokens `(token,)` of held-out rollouts."""
    n_rollouts = int(corpus.rollout.max(initial=-1)) + 1
    fired = np.bincount(corpus.rollout[firings], minlength=n_rollouts)
    others = np.bincount(corpus.rollout, minlength=n_rollouts) - fired
    hit = np.bincount(corpus.rollout[firings[covered[firings]]], minlength=n_rollouts)
    wrong = np.bincount(corpus.rollout[covered], minlength=n_rollouts) - hit
    n_hit, n_covered, n_fired = int(hit.sum()), int(covered.sum()), len(firings)
    if not n_fired or n_fired == len(corpus):
        return Score(None, None, None, None, n_fired)
    recall, specificity = _share(hit, fired), _share(others - wrong, others)
    mean = (recall.value + specificity.value) / 2
    below = np.hypot(recall.value - recall.low, specificity.value - specificity.low) / 2
    above = np.hypot(recall.high - recall.value, specificity.high - specificity.value) / 2
    return Score(
        balanced_accuracy=mean,
        interval=(max(float(mean - below), 0.0), min(float(mean + above), 1.0)),
        precision=n_hit / n_covered if n_covered else None,
        recall=recall.value,
        n_fired=n_fired,
    )


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


class _Share(NamedTuple):
    value: float
    low: float
    high: float


def _share(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> _Share:
    """Return the share of sums over rollouts, with its interval."""
    some = whole > 0
    part, whole = part[some], whole[some]
    total, n = float(whole.sum()), int(some.sum())
    value = float(part.sum()) / total
    size = float(n)
    if 0 < value < 1 and n > 1:
        variance = float(((part - value * whole) ** 2).sum()) / total**2 * n / (n - 1)
        size = min(value * (1 - value) / variance, total) if variance else total
    centre = (value + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z / (1 + _Z**2 / size)
    half *= np.sqrt(value * (1 - value) / size + _Z**2 / (4 * size**2))
    return _Share(value, min(float(centre - half), value), max(float(centre + half), value))
