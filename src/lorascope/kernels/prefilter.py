"""The best float32 scores at the cost of a product of bytes, on CPUs with instructions for it.

The encoder's product is most of a training step, and only one in a hundred of its numbers is used.
So:

1. Round the rows of both matrices to 8 bits, each with its own scale, and multiply these. This
   takes a quarter of the time of a float32 product.
2. Collect candidates: pairs whose score could be among the best if the rounding went against them.
3. Compute the candidates' scores in float32, pair by pair, and choose among these.

Each score is a sum of many rounding errors, so it errs like a normal distribution whose standard
deviation is at most `_Scores._spread`. Step 2 allows for `_SIGMAS` of them. Then the errors of one
candidate in `_MEASURED` are measured. If one comes near what was allowed, the candidates are
collected again with a wider margin, which stays. Only a score that errs by far more than the
largest of ten thousand others could be missed; the tests found none. If the guesses fail, the
product is taken in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Int64
from torch import Tensor

from lorascope.kernels import cpu
from lorascope.kernels.cpu import ROUNDED, WIDEST, Best, Bytes

_SIGMAS = 6.0  # the first margin, in standard deviations of the rounding
_SLACK = 2.0  # how far the first bounds of rows lie below their best limits, in margins
_SAFETY = 2.0  # a wider margin, as a multiple of the largest error of a candidate
_ENOUGH = 1.25  # margin that suffices for a batch, as a multiple of its largest error
_MEASURED = 4  # the error of one candidate in so many is measured
_ROUNDED_TWICE = 2 * ROUNDED  # of one that is multiplied and added to by such numbers
_ROUNDING = 2**-15  # of float32 products, as a share of the size: more than sums of 500 need
_LOWER = 0.93  # the next batch's bound, as a share of this batch's: they differ by some 3 %
_STEP = 0.93  # factor from a bound that is too high to the next one
_TRIES = 4
_MANY = 8  # candidates per wanted score above which a float32 product is cheaper
_BLOCK = 1 << 23  # scores of one product
_SMALLEST = torch.finfo(torch.bfloat16).tiny


class _Candidates(NamedTuple):
    """Pairs, their float32 scores, and the largest error of a rough score."""

    indices: Int64[Tensor, "pair"]  # rising, of the flat scores
    values: Float[Tensor, "pair"]
    error: float = 0.0  # in standard deviations


@dataclass
class Prefilter:
    """Chooses the best of `x @ weight.T + bias` and remembers what speeds up the next batch.

    `x` is `(batch, d_in)`, `weight` `(latent, d_in)`, both float32. What is remembered changes the
    time, not the choice.
    """

    _bound: float | None = None
    _margin: float = _SIGMAS
    _slack: float = _SLACK

    def best_indices(
        self, x: Tensor, weight: Tensor, bias: Float[Tensor, "latent"], n: int
    ) -> Best:
        """Return the `n` best of a batch, like `cpu.best_indices`."""
        scores = _Scores(x, weight, bias)
        bound = self._bound or scores.sampled_bound(n)
        for _ in range(_TRIES):
            found = scores.above(bound, self._margin, _MANY * n)
            if found is None:
                break
            is_wide = self._is_wide(found.error)
            if is_wide and len(found.values) >= n:
                kept, last = cpu.keep_best(found.values, n)
                self._bound = _LOWER * last
                return Best(found.indices[kept], found.values[kept], 0.0)
            bound *= _STEP if is_wide else 1.0
        self._bound, self._margin = None, _SIGMAS
        dense = scores.dense()
        best = cpu.best_indices(dense, n)
        low = best.values.min() if len(best.values) == n > 0 else torch.zeros(())
        found = scores.near(dense, low)
        kept = found.values > (0 if n else torch.inf)
        if n and len(found.values) > n:
            kept &= cpu.keep_best(found.values, n)[0]
        return Best(found.indices[kept], found.values[kept], 0.0)

    def best_of_rows(
        self, x: Tensor, weight: Tensor, bias: Float[Tensor, "latent"], k: int
    ) -> Best:
        """Return the `k` best of each row, like `cpu.best_of_rows`.

        Scores below 2**-126, the smallest normal number, may be left out.
        """
        scores, shape = _Scores(x, weight, bias), (len(x), len(weight))
        k = min(k, len(weight))
        for _ in range(_TRIES):
            at_most = _MANY * k * len(x)
            found = scores.best_per_row(k, self._margin, self._slack, at_most)
            if found is None:
                break
            (indices, values, error), low = found
            kept, last = cpu.keep_best_of_rows(indices, values, shape, k)
            if self._is_wide(error):
                if bool((low <= last.clamp(min=_SMALLEST)).all()):
                    return Best(indices[kept], values[kept], 0.0)
                self._slack *= 1.5
        self._margin, self._slack = _SIGMAS, _SLACK
        dense = scores.dense()
        found = scores.near(dense, cpu.row_bounds(dense, k))
        kept = cpu.keep_best_of_rows(found.indices, found.values, shape, k)[0]
        return Best(found.indices[kept], found.values[kept], 0.0)

    def _is_wide(self, error: float) -> bool:
        """Return whether the margin was wide enough, and widen it if not."""
        if _ENOUGH * error <= self._margin:
            return True
        if math.isfinite(error):
            self._margin = _SAFETY * error
        return False


class _Scores:
    """The scores `x @ weight.T + bias` of a batch: roughly all of them, and exactly some.

    A pair's score has the same bits however the pair was found: a resumed run, which has lost its
    guesses, finds it in another way.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self._x, self._weight, self._bias = x, weight, bias
        self._bytes = Bytes.rounded(weight, signed=False)
        self._x_bytes = Bytes.rounded(x, signed=True)
        self._unit = self._bytes.unit
        # rounding to multiples of `unit` has a variance of `unit ** 2 / 12`
        ratio = (self._bytes.norm / self._unit).max()
        x_error = ratio * self._x_bytes.unit
        spread = torch.hypot(self._x_bytes.norm, x_error) / math.sqrt(12)
        # of a rough score, in units of its latent; the scores of a row of zeros are exact
        self._spread = torch.where(self._x_bytes.norm == 0, 0.0, spread)
        finite = bool((spread.square().sum() + bias.sum()).isfinite())
        self._is_usable = finite and len(x) > 0 and x.shape[1] <= WIDEST

    def above(self, bound: float, margin: float, at_most: int) -> _Candidates | None:
        """Return all pairs with a score above `bound`; None if too many have to be computed."""
        low = (bound - self._bias) / self._unit
        low = (low - ROUNDED * low.abs())[:, None]
        found = []
        for rows, upper in self._blocks(margin):
            indices = cpu.indices_reaching(upper, low.to(upper.dtype))
            at_most -= len(indices)
            if at_most < 0:
                return None
            found.append(self._measured(rows, indices, upper, None, margin, bound))
        return _joined(found)

    def best_per_row(
        self, k: int, margin: float, slack: float, at_most: int
    ) -> tuple[_Candidates, Float[Tensor, "batch"]] | None:
        """Return pairs that should contain the `k` best of each row, and the rows' bounds.

        No score is missing that is above its row's bound. Returns None if they are too many.
        """
        unit, slack = self._unit[:, None].bfloat16(), slack * margin * float(self._unit.mean())
        # raised so that rounding cannot make the limit of a positive score negative
        bias = (self._bias + 2 * _ROUNDED_TWICE * self._bias.abs())[:, None].bfloat16()
        found, lows = [], []
        for rows, upper in self._blocks(margin):
            upper.mul_(unit).add_(bias)  # now limits of the scores themselves
            # as integers positive numbers keep their order, and negative ones are below them
            best = cpu.part_maxima(upper.view(torch.int16), k, 0).view(upper.dtype).T.float()
            low = best.topk(k, sorted=False).values.amin(1)
            low -= torch.maximum(slack * self._spread[rows], 6 * _ROUNDED_TWICE * low)
            low = low.clamp_(min=_SMALLEST)  # only positive scores fire
            indices = cpu.indices_reaching(upper, low.to(upper.dtype))
            at_most -= len(indices)
            if at_most < 0:
                return None
            found.append(self._measured(rows, indices, upper, bias[:, 0], margin, -torch.inf))
            lows.append(torch.where(low > _SMALLEST, low * (1 + 2 * _ROUNDED_TWICE), low))
        pairs = _joined(found)
        return pairs and (pairs, torch.cat(lows))

    def dense(self) -> Float[Tensor, "batch latent"]:
        """Return all scores from one float32 product, whose rounding differs from `of_pairs`."""
        out = self._x.new_empty(len(self._x), len(self._weight))
        return cpu.product(self._x, self._weight, out).add_(self._bias)

    def near(self, dense: Float[Tensor, "batch latent"], low: Tensor) -> _Candidates:
        """Return the pairs with dense scores from `low` on, or below it by what rounding may do."""
        sizes = self._x.norm(dim=1, keepdim=True) + self._bias.abs().max()
        indices = cpu.indices_reaching(dense, low - 2 * _ROUNDING * sizes)
        rows = indices // len(self._weight)
        latents = indices - rows * len(self._weight)
        values = cpu.pair_dot(self._x, rows, self._weight, latents) + self._bias[latents]
        return _Candidates(indices, values)

    def sampled_bound(self, n: int) -> float:
        """Guess from evenly spread rows a bound that slightly more than `n` scores exceed."""
        sample = self._x[:: cpu.sample_step(len(self._x), len(self._weight))]
        n = n * len(sample) // max(len(self._x), 1)
        return cpu.sampled_bound(sample @ self._weight.T + self._bias, n)

    def _blocks(self, margin: float) -> Iterator[tuple[slice, BFloat16[Tensor, "latent row"]]]:
        """Yield blocks of rows, and an upper limit of `x @ weight.T / unit` for each pair."""
        if not self._is_usable:
            return
        size = max(_BLOCK // len(self._weight), 1)
        for first in range(0, len(self._x), size):
            rows = slice(first, first + size)
            x, limit = self._x_bytes.select(rows), margin * self._spread[rows]
            yield rows, cpu.byte_product(self._bytes, x, limit)

    def _measured(
        self,
        block: slice,
        indices: Int64[Tensor, "pair"],
        upper: BFloat16[Tensor, "latent row"],
        added: BFloat16[Tensor, "latent"] | None,
        margin: float,
        bound: float,
    ) -> _Candidates:
        """Return the pairs with float32 scores above `bound`, and the largest error.

        `added` is the bias that is in `upper` already, which is then in units of the scores.
        """
        x = self._x[block]
        latents = indices // len(x)
        rows = indices - latents * len(x)
        values = cpu.pair_dot(self._weight, latents, x, rows)
        some = slice(None, None, _MEASURED)
        spread, unit = self._spread[block][rows[some]], self._unit[latents[some]]
        rough = upper.view(-1)[indices[some]].float()
        rounded = ROUNDED * rough.abs()
        if added is not None:
            own = added[latents[some]].float()
            rounded = _ROUNDED_TWICE * (rough.abs() + own.abs()) / unit
            rough = (rough - own) / unit
        error = (values[some] / unit - rough + margin * spread).abs() - rounded
        largest = float((error / spread.clamp(min=_SMALLEST)).max()) if len(error) else 0.0
        values += self._bias[latents]
        if bound > -torch.inf:
            above = torch.nonzero(values > bound)[:, 0]
            rows, latents, values = rows[above], latents[above], values[above]
        order = cpu.stable_order(rows, len(x))
        indices = (rows + block.start)[order] * len(self._weight) + latents[order]
        return _Candidates(indices, values[order], largest)


def _joined(found: list[_Candidates]) -> _Candidates | None:
    """Return the candidates of all blocks, or None without blocks."""
    if len(found) < 2:
        return found[0] if found else None
    indices, values, errors = zip(*found, strict=True)
    return _Candidates(torch.cat(indices), torch.cat(values), max(errors))
