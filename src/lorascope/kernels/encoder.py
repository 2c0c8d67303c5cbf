"""Find the latents that fire in each row: exactly, at the cost of a rough product.

Latent j fires in row x if `x @ W_enc[:, j] + b_enc[j] > threshold[j]`. Only one in a hundred of
these numbers is needed afterwards, so:

1. Find the pairs that could fire with a rough product (`_ByteScreen`, or `_FloatScreen` where the
   CPU has no instructions for bytes or too many pairs could fire).
2. Compute the scores of these pairs in float32, one inner product each, and compare them with the
   thresholds.

The margin of a rough product is a proven bound, so no pair is missed. A pair's value is an inner
product of its own: it has the same bits in any batch, in any slice of the latents, alone, and
however the pair was found.

Columns may differ in size by orders of magnitude, which would make the bounds loose. So columns of
x are multiplied, and rows of W_enc divided, by powers of two, which changes no bit. This is left
out where a weight is so small beside others of its column that float32 could not hold the quotient.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from lorascope import kernels
from lorascope.kernels import cpu
from lorascope.kernels.cpu import ROUNDED, WIDEST, Bytes

BLOCK = 1024  # rows in one product
_ALIGN = 16  # columns are padded to 64 bytes, so that inner products start aligned
_ROUNDED_UP = 1 + 2**-6  # keeps a margin an upper bound after rounding to bfloat16
_FEWEST = 512  # latents from which on a product of bytes is faster
_SMALL = 2.0**-56  # squares of numbers below this norm could be lost in float32
_HUGE = 2.0**120  # a product of this size may be infinite in a rough one, or not a number
_MANY = 8  # if more than one pair in so many could fire, a float32 product is cheaper

Pairs = tuple[Int64[Tensor, "pair"], Int64[Tensor, "pair"]]  # rows and latents


class Fired(NamedTuple):
    """Pairs that fire, ordered by row and then by latent."""

    rows: Int64[Tensor, "fired"]
    latents: Int64[Tensor, "fired"]
    values: Float32[Tensor, "fired"]


class Encoder:
    """Encodes rows with fixed weights. Whatever depends on the weights alone is computed once."""

    def __init__(
        self,
        W_enc: Float32[Tensor, "d_in latent"],
        b_enc: Float32[Tensor, "latent"],
        threshold: Float32[Tensor, "latent"],
    ) -> None:
        d_in, self.n_latents = W_enc.shape
        device = W_enc.device
        self._b_enc, self._threshold = b_enc, threshold
        size = W_enc.double().square().mean(1).sqrt()  # (d_in,)
        scale = torch.exp2(size.log2().round().clamp(-126, 127)).float()
        weight = W_enc / scale[:, None]  # (d_in, latent)
        if not torch.equal(weight * scale[:, None], W_enc):
            scale, weight = torch.ones_like(scale), W_enc
        self._scale = torch.where(size > 0, scale, 0.0)
        width = -(-d_in // _ALIGN) * _ALIGN
        self._weight = W_enc.new_zeros(self.n_latents, width)
        self._weight[:, :d_in] = weight.T

        self._d_in = d_in
        self._bytes = None
        is_large = self.n_latents >= _FEWEST
        if is_large and width <= WIDEST and cpu.multiplies_bytes(device, torch.float32):
            self._bytes = _ByteScreen(self._weight, b_enc, threshold)

    @cached_property
    def _floats(self) -> "_FloatScreen":
        return _FloatScreen(self._weight, self._b_enc, self._threshold, self._d_in)

    def __call__(self, rows: Float[Tensor, "batch d_in"]) -> Fired:
        """Return the pairs that fire in finite rows, float16 or float32."""
        blocks = [
            self._block(rows[start : start + BLOCK], start) for start in range(0, len(rows), BLOCK)
        ]
        if len(blocks) == 1:
            return blocks[0]
        if blocks:
            return Fired(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
        empty = self._b_enc.new_zeros(0, dtype=torch.int64)
        return Fired(empty, empty, self._b_enc[:0])

    def values_of(
        self,
        rows: Float[Tensor, "batch d_in"],
        row_indices: Int64[Tensor, "pair"],
        latents: Int64[Tensor, "pair"],
    ) -> Float32[Tensor, "pair"]:
        """Return the value of each pair (row index, rising; latent), 0 if it does not fire."""
        values = self._exact(self._scaled(rows), row_indices, latents)
        return torch.where(values > self._threshold[latents], values, 0.0)

    def _block(self, rows: Float[Tensor, "batch d_in"], first: int) -> Fired:
        x = self._scaled(rows)
        by_latent = self._bytes(x) if self._bytes else None
        row_indices, latents = by_latent or self._floats(x)
        values = self._exact(x, row_indices, latents)
        fires = torch.nonzero(values > self._threshold[latents])[:, 0]
        if by_latent:
            fires = fires[cpu.stable_order(row_indices[fires], len(x))]
        return Fired(row_indices[fires] + first, latents[fires], values[fires])

    def _scaled(self, rows: Float[Tensor, "batch d_in"]) -> Float32[Tensor, "batch width"]:
        x = self._weight.new_zeros(len(rows), self._weight.shape[1])
        torch.mul(rows, self._scale, out=x[:, : rows.shape[1]])
        return x

    def _exact(
        self,
        x: Float32[Tensor, "batch width"],
        row_indices: Int64[Tensor, "pair"],
        latents: Int64[Tensor, "pair"],
    ) -> Float32[Tensor, "pair"]:
        ops = kernels.for_device(x.device)  # no attribute: a module cannot be pickled
        return ops.pair_dot(x, row_indices, self._weight, latents) + self._b_enc[latents]


class _FloatScreen:
    """Finds the pairs that could fire by a float32 product.

    Latents are divided by their norm. A column is added to the rows that turns the product into
    `x @ w_j / |w_j| + margin`. With unit roundoff u, the rounded product is within
    `(2u + u²) Σ|x_i w_ij|` of the true one, which is at most `|x| |w_j|` (Cauchy-Schwarz); the sums
    add `d 2**-24` of that for the rough and for the exact side.
    """

    def __init__(
        self,
        weight: Float32[Tensor, "latent width"],
        bias: Float32[Tensor, "latent"],
        threshold: Float32[Tensor, "latent"],
        d_in: int,
    ) -> None:
        self._d_in = d_in
        norm = weight.double().norm(dim=1)
        norm = torch.where(norm > 0, norm, 1.0)
        self._table = weight.new_zeros(len(weight), -(-(d_in + 1) // _ALIGN) * _ALIGN)
        self._table[:, :d_in] = weight[:, :d_in] / norm[:, None]
        self._table[:, d_in] = 1
        float32 = torch.finfo(torch.float32)
        least = (_least(bias, threshold) / norm).clamp(float32.min, float32.max).float()
        self._least = torch.nextafter(least, least.new_tensor(-torch.inf))
        unit = float32.eps / 2
        self._margin = (2 * unit + unit**2 + _summing(d_in)) * _ROUNDED_UP

    def __call__(self, x: Float32[Tensor, "batch width"]) -> Pairs:
        """Return the pairs, ordered by row."""
        d_in, n_latents = self._d_in, len(self._table)
        wide = self._table.new_zeros(len(x), self._table.shape[1])
        norm = x.norm(dim=1)
        is_small = norm < _HUGE  # of other rows every pair could fire
        wide[:, :d_in] = torch.where(is_small[:, None], x[:, :d_in], 0.0)
        wide[:, d_in] = torch.where(is_small, self._margin * norm.clamp(min=_SMALL), torch.inf)
        out = wide.new_empty(len(x), n_latents)
        kernels.for_device(out.device).product(wide, self._table, out)
        if out.device.type == "cpu":
            indices = cpu.indices_reaching(out, self._least)
        else:
            indices = torch.nonzero((out >= self._least).flatten())[:, 0]
        rows = indices // n_latents
        return rows, indices - rows * n_latents


class _ByteScreen:
    """Finds the pairs that could fire by a product of bytes (`cpu.py`).

    With x' and w' the rounded rows, the product is within `|x - x'| |w_j| + |x'| |w_j - w'_j|` of
    the true one (Cauchy-Schwarz), where both differences are known.
    """

    def __init__(
        self,
        weight: Float32[Tensor, "latent width"],
        bias: Float32[Tensor, "latent"],
        threshold: Float32[Tensor, "latent"],
    ) -> None:
        self._table = Bytes.rounded(weight, signed=False)
        # in units of the latents
        self._norm = (self._table.norm / self._table.unit).max()
        self._error = self._table.error_norms(weight).max()
        least = _least(bias, threshold) / self._table.unit.double()
        least = torch.where(least.isfinite(), least - ROUNDED * least.abs(), least)
        self._least = least[:, None].bfloat16()

    def __call__(self, x: Float32[Tensor, "batch width"]) -> Pairs | None:
        """Return the pairs, ordered by latent; None if they are too many, or x is too large."""
        rough = Bytes.rounded(x, signed=True)
        if not bool((rough.norm * self._norm < _HUGE).all()):
            return None
        error = rough.unit * rough.error_norms(x)
        summing = _summing(x.shape[1]) * rough.norm
        limit = (error + summing) * self._norm + (rough.norm + error) * self._error
        upper = cpu.byte_product(self._table, rough, limit * _ROUNDED_UP)
        indices = cpu.indices_reaching(upper, self._least)
        if _MANY * len(indices) > upper.numel():
            return None
        latents = indices // len(x)
        return indices - latents * len(x), latents


def _least(bias: Tensor, threshold: Tensor) -> Float64[Tensor, "latent"]:
    """Return what `x @ w` must reach to fire, less what the float32 sum with the bias rounds.

    Products below the smallest normal number, 2**-126, err by more than a share of their size.
    """
    bias, bound = bias.double(), threshold.double()
    return bound - bias - 2**-22 * (bias.abs() + bound.abs()) - 2**-126


def _summing(d_in: int) -> float:
    """Return by how much float32 sums err on both sides, as a share of the norms' product."""
    return 4 * d_in * 2**-24 + 2**-16
