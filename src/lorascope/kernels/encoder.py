"""Which latents of a row beat their thresholds: exactly, at the price of a rough product.

Latent j fires in row x where `x @ W_enc[:, j] + b_enc[j] > threshold[j]`. All but one in a hundred
of these numbers are never looked at again, so:

1. Take the product in bfloat16 where that is faster, of rows that are extended by three columns:
   by them the product is `(x @ w_j + b_j - t_j) / |w_j| + margin`, and its sign says which pairs
   could fire. One pass over the signs finds them.
2. Compute the sums of these pairs in float32, one inner product each, and compare them.

The margin is a bound and no guess. With unit roundoff u of the rough type, the rounded product is
within `(2u + u²) Σ|x_i w_ij|` of the true one, which is at most `|x| |w_j|` (Cauchy-Schwarz); the
sums of float32 add `d 2**-24` of that for the rough and for the exact side. So no pair is missed,
and as a pair's value is an inner product of its own, it is the same to the bit in any batch, in any
slice of the latents, and alone.

Columns may differ in size by orders of magnitude, which would make `|x| |w_j|` a loose bound.
Columns of x are therefore multiplied, and rows of W_enc divided, by powers of two: no bit changes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from lorascope import kernels
from lorascope.kernels import cpu, prefilter

BLOCK = 1024  # rows of one product
_ALIGN = 16  # columns are filled up to 64 bytes: inner products then begin at the same place
_ROUNDED_UP = 1 + 2**-6  # a margin that is itself rounded to bfloat16 stays above


class Fired(NamedTuple):
    """Pairs that fire, row by row and latents rising in each: row's index, latent, value."""

    rows: Int64[Tensor, "fired"]
    latents: Int64[Tensor, "fired"]
    values: Float32[Tensor, "fired"]


class Encoder:
    """Encodes rows with fixed weights; what these alone decide is computed once."""

    def __init__(
        self,
        W_enc: Float32[Tensor, "d_in latent"],
        b_enc: Float32[Tensor, "latent"],
        threshold: Float32[Tensor, "latent"],
    ) -> None:
        d_in, self.n_latents = W_enc.shape
        device = W_enc.device
        self._ops = kernels.for_device(device)
        self._b_enc, self._threshold = b_enc, threshold
        size = W_enc.double().square().mean(1).sqrt()  # (d_in,)
        self._scale = torch.where(size > 0, torch.exp2(size.log2().round()), 0.0).float()
        weight = torch.where(size[:, None] > 0, W_enc / self._scale[:, None], 0.0)  # (d_in, latent)
        width = -(-d_in // _ALIGN) * _ALIGN
        self._weight = W_enc.new_zeros(self.n_latents, width)
        self._weight[:, :d_in] = weight.T

        rough = device.type == "cuda" or prefilter.is_faster(device, torch.float32)
        dtype = torch.bfloat16 if rough else torch.float32
        norm = weight.double().norm(dim=0)
        norm = torch.where(norm > 0, norm, 1.0)
        bias, bound = b_enc.double(), threshold.double()
        beyond = (bias - bound + 2**-22 * (bias.abs() + bound.abs())) / norm
        high = beyond.to(dtype)
        low = torch.where(high.isfinite(), beyond - high.double(), 0.0).to(dtype)
        extra = torch.stack([high, low, torch.ones_like(high)])
        wide = -(-(d_in + 3) // _ALIGN) * _ALIGN
        table = torch.zeros(self.n_latents, wide, dtype=dtype, device=device)
        table[:, :d_in] = (weight / norm).T.to(dtype)
        table[:, d_in : d_in + 3] = extra.T
        self._rough_weight = table
        unit = torch.finfo(dtype).eps / 2
        self._margin = (2 * unit + unit**2 + 4 * d_in * 2**-24 + 2**-16) * _ROUNDED_UP

    def __call__(self, rows: Float[Tensor, "batch d_in"]) -> Fired:
        """Return the pairs that fire in finite rows, float16 or float32."""
        found = [
            self._block(rows[start : start + BLOCK], start) for start in range(0, len(rows), BLOCK)
        ]
        if len(found) == 1:
            return found[0]
        if found:
            return Fired(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        empty = self._b_enc.new_zeros(0, dtype=torch.int64)
        return Fired(empty, empty, self._b_enc[:0])

    def at(
        self,
        rows: Float[Tensor, "batch d_in"],
        index: Int64[Tensor, "pair"],
        latents: Int64[Tensor, "pair"],
    ) -> Float32[Tensor, "pair"]:
        """Return the value of each pair (row's index, rising; latent), 0 where it does not fire."""
        values = self._exact(self._scaled(rows), index, latents)
        return torch.where(values > self._threshold[latents], values, 0.0)

    def _block(self, rows: Float[Tensor, "batch d_in"], first: int) -> Fired:
        x = self._scaled(rows)
        d_in = rows.shape[1]
        wide = x.new_zeros(len(x), self._rough_weight.shape[1], dtype=self._rough_weight.dtype)
        wide[:, :d_in] = x[:, :d_in]
        wide[:, d_in : d_in + 2] = 1
        wide[:, d_in + 2] = self._margin * x.norm(dim=1)
        out = wide.new_empty(len(x), self.n_latents)
        self._ops.product(wide, self._rough_weight, out)
        if out.device.type == "cpu":  # the sign is the first bit: integers compare faster
            whole = torch.int16 if out.dtype == torch.bfloat16 else torch.int32
            places = cpu.set_places(out.view(whole) >= 0)
        else:
            places = torch.nonzero((out >= 0).flatten())[:, 0]
        index = places // self.n_latents
        latents = places - index * self.n_latents
        values = self._exact(x, index, latents)
        fires = torch.nonzero(values > self._threshold[latents])[:, 0]
        return Fired(index[fires] + first, latents[fires], values[fires])

    def _scaled(self, rows: Float[Tensor, "batch d_in"]) -> Float32[Tensor, "batch width"]:
        x = self._weight.new_zeros(len(rows), self._weight.shape[1])
        torch.mul(rows, self._scale, out=x[:, : rows.shape[1]])
        return x

    def _exact(
        self,
        x: Float32[Tensor, "batch width"],
        index: Int64[Tensor, "pair"],
        latents: Int64[Tensor, "pair"],
    ) -> Float32[Tensor, "pair"]:
        return self._ops.pair_dot(x, index, self._weight, latents) + self._b_enc[latents]
