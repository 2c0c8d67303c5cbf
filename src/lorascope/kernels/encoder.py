"""Find the latents that fire in each row: exactly, at the cost of a rough product.

Latent j fires in row x if `x @ W_enc[:, j] + b_enc[j] > threshold[j]`. Only one in a hundred of
these numbers is needed afterwards, so:

1. Take the product in bfloat16 where that is faster, with rows extended by three columns. They turn
   it into `(x @ w_j + b_j - t_j) / |w_j| + margin`, whose sign says which pairs could fire. One
   pass over the signs finds them.
2. Compute the scores of these pairs in float32, one inner product each, and compare them with the
   thresholds.

The margin is a proven bound. With unit roundoff u of the rough dtype, the rounded product is within
`(2u + u²) Σ|x_i w_ij|` of the true one, which is at most `|x| |w_j|` (Cauchy-Schwarz); float32 sums
add `d 2**-24` of that for the rough and for the exact side. So no pair is missed. A pair's value is
an inner product of its own: it has the same bits in any batch, in any slice of the latents, and
alone.

Columns may differ in size by orders of magnitude, which would make `|x| |w_j|` a loose bound. So
columns of x are multiplied, and rows of W_enc divided, by powers of two, which changes no bit.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from lorascope import kernels
from lorascope.kernels import cpu

BLOCK = 1024  # rows in one product
_ALIGN = 16  # columns are padded to 64 bytes, so that inner products start aligned
_ROUNDED_UP = 1 + 2**-6  # keeps the margin an upper bound after rounding to bfloat16


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for products of bfloat16."""
    on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cuda" or (device.type == "cpu" and on_cpu)


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
        self._scale = torch.where(size > 0, torch.exp2(size.log2().round()), 0.0).float()
        weight = torch.where(size[:, None] > 0, W_enc / self._scale[:, None], 0.0)  # (d_in, latent)
        width = -(-d_in // _ALIGN) * _ALIGN
        self._weight = W_enc.new_zeros(self.n_latents, width)
        self._weight[:, :d_in] = weight.T

        dtype = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
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
        d_in = rows.shape[1]
        wide = x.new_zeros(len(x), self._rough_weight.shape[1], dtype=self._rough_weight.dtype)
        wide[:, :d_in] = x[:, :d_in]
        wide[:, d_in : d_in + 2] = 1
        wide[:, d_in + 2] = self._margin * x.norm(dim=1)
        out = wide.new_empty(len(x), self.n_latents)
        kernels.for_device(out.device).product(wide, self._rough_weight, out)
        if out.device.type == "cpu":  # the sign is the first bit, and integers compare faster
            integer = torch.int16 if out.dtype == torch.bfloat16 else torch.int32
            indices = cpu.nonzero_indices(out.view(integer) >= 0)
        else:
            indices = torch.nonzero((out >= 0).flatten())[:, 0]
        row_indices = indices // self.n_latents
        latents = indices - row_indices * self.n_latents
        values = self._exact(x, row_indices, latents)
        fires = torch.nonzero(values > self._threshold[latents])[:, 0]
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
