"""The best float32 scores at the price of a bfloat16 product, on CPUs that multiply bfloat16.

The encoder's product is most of a step, and all but one in a hundred of its numbers are thrown
away. So:

1. Take the product in bfloat16, at half the time.
2. Candidates are the scores that could be among the best: those above a bound, less a margin.
3. Compute the candidates' scores again in float32, by pairs, and choose among these.

The margin of a row is a share of its size (its norm and the largest bias). The share is measured:
twice the largest difference between the two scores of a candidate in the batch before; where a
batch has nearly as large a one as its margin, its candidates are collected anew. What could be
missed is a score whose error is twice the largest among a hundred thousand others; the tests have
found none. Where the guesses fail, the product is taken in float32 after all.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lorascope.kernels import Best, cpu

_SAFETY = 2.0  # the margin for the next batch, in largest differences
_ENOUGH = 1.25  # of a margin, in largest differences of its own batch
_FIRST = 2**-9  # margin of the first batch
_ROUNDING = 2**-15  # of float32 products, in sizes: above that of sums of 500 numbers
_LOWER = 0.98  # of a batch's bound: the guess for the next one
_STEP = 0.93  # from a bound that too few are above to the next
_TRIES = 4
_MANY = 8  # candidates for each score wanted, above which the whole product is cheaper


def is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether this CPU has instructions for bfloat16, for weights of that type."""
    able = device.type == "cpu" and dtype == torch.float32
    return able and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass
class Screen:
    """Chooses the best of `x @ weight.T + bias`, and remembers what helps with the next batch.

    `x` is `(batch, d_in)`, `weight` `(latent, d_in)`, both float32. What it remembers decides the
    time alone.
    """

    _rough: Tensor | None = field(default=None, repr=False)
    _bound: float | None = None
    _margin: float = _FIRST

    def best_places(
        self, x: Tensor, weight: Tensor, bias: Float[Tensor, "latent"], n: int, *, signed: bool
    ) -> Best:
        """Return the `n` best of a batch, as `cpu.best_places` does."""
        scores = _Scores(x, weight, bias, signed)
        rough = self._product(x, weight, bias)
        bound = self._bound or cpu.sampled(rough, n, signed, None)
        for _ in range(_TRIES):
            places = scores.candidates(rough, bound - self._margin * scores.sizes)
            if len(places) > _MANY * n:
                break
            values, is_wide = self._measured(scores, rough, places)
            above = (values.abs() if signed else values) > bound
            if is_wide and int(above.sum()) >= n:
                places, values = places[above], values[above]
                kept, last = cpu.best_among(values, n, signed=signed)
                self._bound = _LOWER * last
                return Best(places[kept], values[kept], 0.0)
            bound *= _STEP if is_wide else 1.0
        self._bound = None
        whole = scores.whole()
        best = cpu.best_places(whole, n, signed=signed)
        low = best.values.abs().min() if len(best.values) == n > 0 else torch.zeros(())
        places = scores.candidates(whole, low - 2 * _ROUNDING * scores.sizes)
        values = scores.at(places)
        some = (values.abs() if signed else values) > 0
        places, values = places[some], values[some]
        if len(places) > n:
            kept = cpu.best_among(values, n, signed=signed)[0] if n else values > torch.inf
            places, values = places[kept], values[kept]
        return Best(places, values, 0.0)

    def best_of_rows(
        self, x: Tensor, weight: Tensor, bias: Float[Tensor, "latent"], k: float, *, signed: bool
    ) -> Best:
        """Return the `k` best of each row, as `cpu.best_of_rows` does."""
        scores = _Scores(x, weight, bias, signed)
        rough = self._product(x, weight, bias)
        wide = min(-int(-k // 1), rough.shape[1])
        found = self._of_rows(scores, rough, wide)
        if found is None:
            whole = scores.whole()
            low = cpu.reached(whole, wide, signed) - 2 * _ROUNDING * scores.sizes
            places = scores.candidates(whole, low)
            found = places, scores.at(places)
        places, values = found
        kept = cpu.best_among_rows(places, values, rough.shape, k, signed=signed)
        return Best(places[kept], values[kept], 0.0)

    def _of_rows(
        self, scores: "_Scores", rough: Tensor, wide: int
    ) -> tuple[Int64[Tensor, "pair"], Float[Tensor, "pair"]] | None:
        """Return places that hold the best of each row, and their scores; None where too many."""
        reached = cpu.reached(rough, wide, scores.signed)
        for _ in range(_TRIES):
            places = scores.candidates(rough, reached - 2 * self._margin * scores.sizes)
            if len(places) > _MANY * wide * len(rough):
                break
            values, is_wide = self._measured(scores, rough, places)
            if is_wide:
                return places, values
        return None

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        shape = (len(x), len(weight))
        if self._rough is None or self._rough.shape != shape:
            self._rough = torch.empty(shape, dtype=torch.bfloat16)
        torch.mm(x.bfloat16(), weight.bfloat16().T, out=self._rough)
        return self._rough.add_(bias.bfloat16())

    def _measured(
        self, scores: "_Scores", rough: Tensor, places: Int64[Tensor, "pair"]
    ) -> tuple[Float[Tensor, "pair"], bool]:
        """Return the float32 scores of some places, and whether the margin was wide enough."""
        values = scores.at(places)
        away = (values - rough.view(-1)[places]).abs() / scores.sizes[places // rough.shape[1], 0]
        seen = float(away.nan_to_num(0.0, 0.0, 0.0).max()) if len(away) else 0.0
        is_wide = _ENOUGH * seen <= self._margin
        self._margin = max(_SAFETY * seen, _ROUNDING)
        return values, is_wide


class _Scores:
    """The scores `x @ weight.T + bias` of a batch, for the asking.

    The score of a place is the same to the bit however the place was found: a resumed run, which
    has forgotten its guesses, finds it in another way.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, signed: bool) -> None:
        self._x, self._weight, self._bias, self.signed = x, weight, bias, signed
        self.sizes = x.norm(dim=1, keepdim=True) + bias.abs().max()

    def candidates(
        self, rough: Float[Tensor, "batch latent"], low: Float[Tensor, "batch 1"]
    ) -> Int64[Tensor, "pair"]:
        """Return the places, rising, of rough scores at or above their row's bound."""
        low = low.to(rough.dtype)
        if rough.dtype != torch.bfloat16 or self.signed or not bool((low > 0).all()):
            marks = (rough.abs() if self.signed else rough) >= low
        else:  # positive bfloat16 numbers are in the order of their bits: three times as fast
            marks = rough.view(torch.int16) >= low.view(torch.int16)
        return cpu.set_places(marks)

    def at(self, places: Int64[Tensor, "pair"]) -> Float[Tensor, "pair"]:
        """Return the float32 scores of some places."""
        rows = places // len(self._weight)
        latents = places - rows * len(self._weight)
        return cpu.pair_dot(self._x, rows, self._weight, latents) + self._bias[latents]

    def whole(self) -> Float[Tensor, "batch latent"]:
        """Return all scores by a float32 product, which rounds them in another way."""
        out = self._x.new_empty(len(self._x), len(self._weight))
        return cpu.product(self._x, self._weight, out).add_(self._bias)
