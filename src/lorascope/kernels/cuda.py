"""The functions of `cpu.py` for CUDA, with static shapes: a whole step can become a CUDA graph.

None but `above` waits for the device, and the shapes of what they return follow from the shapes of
what they are given. `best_places` and `best_of_rows` therefore return as many pairs as were asked
for, whatever the scores. Where fewer are positive, *pads* at the end fill up: each has the last
place of the scores and the value 0, by which it adds nothing to any sum. A true pair of that place
stands before them. No `guess` is used, and the one returned is 0.

`best_places` and the operations on pairs are Triton's (`triton_best.py`, `triton.py`).
`best_of_rows` is torch's `topk` of integers that no two scores of a row share: the bits of a
positive float32 rise with it, so `bits * 2**32 - latent` has the order of the scores, and of equal
ones the lower latent is the larger. `topk` alone leaves open which of equal scores it takes.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lorascope.errors import NumberError
from lorascope.kernels import Best, triton_best
from lorascope.kernels.triton import by_latent, gather_sum, pair_dot, row_offsets

__all__ = [
    "above",
    "best_of_rows",
    "best_places",
    "by_latent",
    "gather_sum",
    "pair_dot",
    "product",
    "row_offsets",
]

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def product(
    x: Float[Tensor, "batch d_in"], weight: Float[Tensor, "latent d_in"], out: Tensor
) -> Float[Tensor, "batch latent"]:
    """Write `x @ weight.T` into `out` and return it. The three share a type."""
    return torch.mm(x, weight.T, out=out)


def best_places(
    scores: Float[Tensor, "batch latent"],
    n: int,
    *,
    signed: bool = False,
    bias: Float[Tensor, "latent"] | None = None,
    guess: float | None = None,
) -> Best:
    """Return the `n` largest positive `scores + bias`: their places, rising, and those sums.

    Of equal sums those at lower places are taken. `signed` ranks by absolute value. There are
    `min(n, numel)` pairs, pads included. A NaN is never chosen. Raises NumberError for sums that
    are not bfloat16, float16 or float32, and ConfigError for more than 2**30 of them.
    """
    sums = (scores if bias is None else scores + bias).contiguous()
    places, count = triton_best.best_places(sums, n, signed=signed)
    pads = torch.arange(len(places), device=sums.device) >= count
    return Best(places, sums.view(-1)[places].masked_fill(pads, 0), 0.0)


def best_of_rows(scores: Float[Tensor, "batch latent"], k: float, *, signed: bool = False) -> Best:
    """Return the `k` largest positive scores of each row, as `best_places` does.

    A fraction of `k` is spent on the batch: of the candidates that come next in each row, the best
    `round((k - floor(k)) * batch)` are kept. Of equal scores the lower latent is taken, and then
    the lower row. There are `floor(k) * batch` pairs and those, pads included, or as many as there
    are scores. A NaN is never chosen. Raises NumberError for scores that are not bfloat16, float16
    or float32.
    """
    if scores.dtype not in _TYPES:
        raise NumberError(f"scores are {scores.dtype}; expected bfloat16, float16 or float32")
    batch, width = scores.shape
    whole = min(math.floor(k), width)
    n_more = round((k - whole) * batch) if whole < width else 0
    if whole * batch + n_more == 0:
        return Best(scores.new_zeros(0, dtype=torch.int64), scores.new_zeros(0), 0.0)
    latents, positive = _first_of_rows(scores, whole + (n_more > 0), signed)
    first = torch.arange(0, batch * width, width, device=scores.device)
    places = (first[:, None] + latents).masked_fill(~positive, batch * width)  # behind all others
    kept = places[:, :whole].flatten()
    if n_more:
        following = scores.gather(1, latents[:, whole:]).T  # (1, batch)
        rows, _ = _first_of_rows(following, n_more, signed)
        kept = torch.cat([kept, places[rows[0], whole]])
    kept = kept.sort().values
    places = kept.clamp(max=batch * width - 1)
    values = scores.reshape(-1)[places].masked_fill(kept > places, 0)
    return Best(places, values, 0.0)


def _first_of_rows(
    scores: Float[Tensor, "row latent"], n: int, signed: bool
) -> tuple[Int64[Tensor, "row n"], Bool[Tensor, "row n"]]:
    """Return the latents of the `n` largest scores of each row, falling, and which are positive."""
    size = scores.abs() if signed else scores
    size = size.masked_fill(~(size > 0), 0)  # a NaN and -0.0 too, whose bits would mislead
    keys = size.float().view(torch.int32).long()
    keys <<= 32
    keys -= torch.arange(scores.shape[1], device=scores.device)
    best = torch.topk(keys, n, dim=1)
    return best.indices, best.values > 0


def above(
    scores: Float[Tensor, "batch latent"],
    bound: Float[Tensor, "latent"],
    *,
    bias: Float[Tensor, "latent"],
) -> Best:
    """Return the places, rising, where `scores + bias` is above each latent's own bound.

    How many there are is known to the device alone: this waits for it, and no graph can hold it.
    """
    sums = scores + bias
    places = torch.nonzero((sums > bound).flatten())[:, 0]
    return Best(places, sums.flatten()[places], 0.0)
