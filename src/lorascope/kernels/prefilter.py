"""The best float32 scores at the cost of a bfloat16 product, on CPUs that multiply bfloat16.

The encoder's product is most of a training step, and only one in a hundred of its numbers is used.
So:

1. Take the product in bfloat16, in half the time.
2. Collect candidates: scores that could be among the best, above a bound minus a margin.
3. Compute the candidates' scores again in float32, pair by pair, and choose among these.

A row's margin is a share of its size (its norm plus the largest bias). The share is measured: twice
the largest difference between the two scores of a candidate in the previous batch. If a batch
shows a difference close to its margin, its candidates are collected again with a wider margin.
Only a score whose error is twice the largest of a hundred thousand others could be missed; the
tests found none. If the guesses fail, the product is taken in float32.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lorascope.kernels import cpu
from lorascope.kernels.cpu import Best

_SAFETY = 2.0  # margin for the next batch, as a multiple of the largest difference
_ENOUGH = 1.25  # margin that suffices for a batch, as a multiple of its largest difference
_FIRST = 2**-9  # margin of the first batch
_ROUNDING = 2**-15  # of float32 products, as a share of the size: more than sums of 500 need
_LOWER = 0.98  # the next batch's bound, as a share of this batch's
_STEP = 0.93  # factor from a bound that is too high to the next one
_TRIES = 4
_MANY = 8  # candidates per wanted score above which a float32 product is cheaper


def is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this CPU has bfloat16 instructions and the weights are float32."""
    usable = device.type == "cpu" and dtype == torch.float32
    return usable and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass
class Prefilter:
    """Chooses the best of `x @ weight.T + bias` and remembers what speeds up the next batch.

    `x` is `(batch, d_in)`, `weight` `(latent, d_in)`, both float32. What is remembered changes the
    time, not the choice.
    """

    _rough: Tensor | None = field(default=None, repr=False)
    _bound: float | None = None
    _margin: float = _FIRST

    def best_indices(
        self, x: Tensor, weight: Tensor, bias: Float[Tensor, "latent"], n: int
    ) -> Best:
        """Return the `n` best of a batch, like `cpu.best_indices`."""
        scores = _Scores(x, weight, bias)
        rough = self._product(x, weight, bias)
        bound = self._bound or cpu.sampled_bound(rough, n, None)
        for _ in range(_TRIES):
            indices = scores.candidates(rough, bound - self._margin * scores.sizes)
            if len(indices) > _MANY * n:
                break
            values, is_wide = self._measured(scores, rough, indices)
            above = values > bound
            if is_wide and int(above.sum()) >= n:
                indices, values = indices[above], values[above]
                kept, last = cpu.keep_best(values, n)
                self._bound = _LOWER * last
                return Best(indices[kept], values[kept], 0.0)
            bound *= _STEP if is_wide else 1.0
        self._bound = None
        dense = scores.dense()
        best = cpu.best_indices(dense, n)
        low = best.values.min() if len(best.values) == n > 0 else torch.zeros(())
        indices = scores.candidates(dense, low - 2 * _ROUNDING * scores.sizes)
        values = scores.of_pairs(indices)
        positive = values > 0
        indices, values = indices[positive], values[positive]
        if len(indices) > n:
            kept = cpu.keep_best(values, n)[0] if n else values > torch.inf
            indices, values = indices[kept], values[kept]
        return Best(indices, values, 0.0)

    def best_of_rows(
        self, x: Tensor, weight: Tensor, bias: Float[Tensor, "latent"], k: float
    ) -> Best:
        """Return the `k` best of each row, like `cpu.best_of_rows`."""
        scores = _Scores(x, weight, bias)
        rough = self._product(x, weight, bias)
        k_ceil = min(-int(-k // 1), rough.shape[1])
        candidates = self._row_candidates(scores, rough, k_ceil)
        if candidates is None:
            dense = scores.dense()
            low = cpu.row_bounds(dense, k_ceil) - 2 * _ROUNDING * scores.sizes
            indices = scores.candidates(dense, low)
            candidates = indices, scores.of_pairs(indices)
        indices, values = candidates
        kept = cpu.keep_best_of_rows(indices, values, rough.shape, k)
        return Best(indices[kept], values[kept], 0.0)

    def _row_candidates(
        self, scores: "_Scores", rough: Tensor, k: int
    ) -> tuple[Int64[Tensor, "pair"], Float[Tensor, "pair"]] | None:
        """Return indices that contain each row's `k` best, and their scores; None if too many."""
        bounds = cpu.row_bounds(rough, k)
        for _ in range(_TRIES):
            indices = scores.candidates(rough, bounds - 2 * self._margin * scores.sizes)
            if len(indices) > _MANY * k * len(rough):
                break
            values, is_wide = self._measured(scores, rough, indices)
            if is_wide:
                return indices, values
        return None

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shape = (len(x), len(weight))
        if self._rough is None or self._rough.shape != shape:
            self._rough = torch.empty(shape, dtype=torch.bfloat16)
        torch.mm(x.bfloat16(), weight.bfloat16().T, out=self._rough)
        return self._rough.add_(bias.bfloat16())

    def _measured(
        self, scores: "_Scores", rough: Tensor, indices: Int64[Tensor, "pair"]
    ) -> tuple[Float[Tensor, "pair"], bool]:
        """Return the float32 scores of pairs, and whether the margin was wide enough."""
        values = scores.of_pairs(indices)
        error = (values - rough.view(-1)[indices]).abs() / scores.sizes[
            indices // rough.shape[1], 0
        ]
        largest = float(error.nan_to_num(0.0, 0.0, 0.0).max()) if len(error) else 0.0
        is_wide = _ENOUGH * largest <= self._margin
        self._margin = max(_SAFETY * largest, _ROUNDING)
        return values, is_wide


class _Scores:
    """The scores `x @ weight.T + bias` of a batch, computed on demand.

    A pair's score has the same bits however the pair was found: a resumed run, which has lost its
    guesses, finds it in another way.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self._x, self._weight, self._bias = x, weight, bias
        self.sizes = x.norm(dim=1, keepdim=True) + bias.abs().max()

    def candidates(
        self, rough: Float[Tensor, "batch latent"], low: Float[Tensor, "batch 1"]
    ) -> Int64[Tensor, "pair"]:
        """Return the indices, rising, of rough scores that reach their row's bound."""
        low = low.to(rough.dtype)
        if rough.dtype != torch.bfloat16 or not bool((low > 0).all()):
            marks = rough >= low
        else:  # the bits of positive bfloat16 rise with the value: three times as fast
            marks = rough.view(torch.int16) >= low.view(torch.int16)
        return cpu.nonzero_indices(marks)

    def of_pairs(self, indices: Int64[Tensor, "pair"]) -> Float[Tensor, "pair"]:
        """Return the float32 scores at flat indices."""
        rows = indices // len(self._weight)
        latents = indices - rows * len(self._weight)
        return cpu.pair_dot(self._x, rows, self._weight, latents) + self._bias[latents]

    def dense(self) -> Float[Tensor, "batch latent"]:
        """Return all scores from one float32 product, whose rounding differs from `of_pairs`."""
        out = self._x.new_empty(len(self._x), len(self._weight))
        return cpu.product(self._x, self._weight, out).add_(self._bias)
