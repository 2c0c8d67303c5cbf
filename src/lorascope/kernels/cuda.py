"""The functions of `cpu.py` for CUDA, with static shapes, so a whole step can become a CUDA graph.

Only `indices_above` waits for the device. The shapes of all other results follow from the shapes
of the inputs: `best_indices` and `best_of_rows` always return as many pairs as requested. If fewer
scores are positive, *padding* fills the end: each pad has the last flat index and value 0, so it
adds nothing to any sum. A real pair at that index comes before the pads. A `guess` is ignored, and
the returned one is 0.

`best_indices` and the operations on pairs are Triton kernels (`triton_best.py`, `triton.py`).
`best_of_rows` is torch's `topk` over integers that are unique within a row: the bits of a positive
float32 rise with its value, so `bits * 2**32 - latent` has the order of the scores, and among equal
scores the lower latent is larger. Plain `topk` does not say which of equal scores it takes.

These functions pass their tests in Triton's interpreter. They have not run on a GPU yet.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lorascope.errors import NumberError
from lorascope.kernels.reference import Best
from lorascope.kernels.triton import by_latent, gather_sum, pair_dot, row_offsets
from lorascope.kernels.triton_best import largest_indices

__all__ = [
    "best_indices",
    "best_of_rows",
    "by_latent",
    "gather_sum",
    "indices_above",
    "pair_dot",
    "product",
    "row_offsets",
]

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def product(
    x: Float[Tensor, "batch d_in"], weight: Float[Tensor, "latent d_in"], out: Tensor
) -> Float[Tensor, "batch latent"]:
    """Write `x @ weight.T` into `out` and return it. All three have one dtype."""
    return torch.mm(x, weight.T, out=out)


def best_indices(
    scores: Float[Tensor, "batch latent"],
    n: int,
    *,
    bias: Float[Tensor, "latent"] | None = None,
    guess: float | None = None,
) -> Best:
    """Return the `n` largest positive `scores + bias`: their indices, rising, and those sums.

    Ties go to the lower index. Returns `min(n, numel)` pairs, padding included. NaN is never
    chosen. Raises NumberError for sums that are not bfloat16, float16 or float32, and ConfigError
    for more than 2**30 of them.
    """
    sums = (scores if bias is None else scores + bias).contiguous()
    indices, count = largest_indices(sums, n)
    pads = torch.arange(len(indices), device=sums.device) >= count
    return Best(indices, sums.view(-1)[indices].masked_fill(pads, 0), 0.0)


def best_of_rows(scores: Float[Tensor, "batch latent"], k: float) -> Best:
    """Return the `k` largest positive scores of each row, in the form of `best_indices`.

    The fraction of `k` is spent on the whole batch: of each row's next-best score, the best
    `round((k - floor(k)) * batch)` are kept. Ties go to the lower latent, then to the lower row.
    Returns `floor(k) * batch` pairs plus those, padding included, or as many as there are scores.
    NaN is never chosen. Raises NumberError for scores that are not bfloat16, float16 or float32.
    """
    if scores.dtype not in _TYPES:
        raise NumberError(f"scores are {scores.dtype}; expected bfloat16, float16 or float32")
    batch, width = scores.shape
    whole = min(math.floor(k), width)
    n_more = round((k - whole) * batch) if whole < width else 0
    if whole * batch + n_more == 0:
        return Best(scores.new_zeros(0, dtype=torch.int64), scores.new_zeros(0), 0.0)
    latents, positive = _first_of_rows(scores, whole + (n_more > 0))
    first = torch.arange(0, batch * width, width, device=scores.device)
    indices = (first[:, None] + latents).masked_fill(~positive, batch * width)  # after all others
    kept = indices[:, :whole].flatten()
    if n_more:
        following = scores.gather(1, latents[:, whole:]).T  # (1, batch)
        rows, _ = _first_of_rows(following, n_more)
        kept = torch.cat([kept, indices[rows[0], whole]])
    kept = kept.sort().values
    indices = kept.clamp(max=batch * width - 1)
    values = scores.reshape(-1)[indices].masked_fill(kept > indices, 0)
    return Best(indices, values, 0.0)


def _first_of_rows(
    scores: Float[Tensor, "row latent"], n: int
) -> tuple[Int64[Tensor, "row n"], Bool[Tensor, "row n"]]:
    """Return the latents of each row's `n` largest scores, falling, and which are positive."""
    positive = scores.masked_fill(~(scores > 0), 0)  # also NaN and -0.0, whose bits would mislead
    keys = positive.float().view(torch.int32).long()
    keys <<= 32
    keys -= torch.arange(scores.shape[1], device=scores.device)
    best = torch.topk(keys, n, dim=1)
    return best.indices, best.values > 0


def indices_above(
    scores: Float[Tensor, "batch latent"],
    bound: Float[Tensor, "latent"],
    *,
    bias: Float[Tensor, "latent"],
) -> Best:
    """Return the indices, rising, where `scores + bias` is above each latent's own bound.

    Only the device knows how many there are: this waits for it and cannot be part of a graph.
    """
    sums = scores + bias
    indices = torch.nonzero((sums > bound).flatten())[:, 0]
    return Best(indices, sums.flatten()[indices], 0.0)
