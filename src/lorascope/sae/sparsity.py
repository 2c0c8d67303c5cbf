"""Which latents fire: the best of a batch in training, those above a threshold afterwards.

In training `batch_topk` keeps the `k * batch` best scores of a batch (BatchTopK, Bussmann et al.
2024, arXiv 2412.06410). What it keeps of a token depends on the token's neighbours, so for
inference `calibrate_threshold` finds the score above which the same number fires on average:

1. Count the positive scores by the upper half of their bits. Positive float32 numbers are in the
   order of their bits, so the counts tell in which of 32,768 bins the wanted score lies.
2. Count the scores of that bin by the lower half of their bits: the wanted score, exactly.

Both passes need 256 KB whatever the number of rows.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from lorascope.errors import ConfigError

_HALF = 16  # bits in each half of a float32
_SAMPLE = 1 << 16  # scores from which the bound of the best ones is guessed


@dataclass(frozen=True)
class SparseCode:
    """The latents that fire: those of row i are `[offsets[i], offsets[i + 1])`, rising.

    `shape` is the shape of the same code when dense: the rows' axes, then the latents.
    """

    offsets: Int64[Tensor, "batch_plus_1"]
    latents: Int64[Tensor, "fired"]
    values: Float32[Tensor, "fired"]
    shape: tuple[int, ...]

    @property
    def l0(self) -> Int64[Tensor, "batch"]:
        """How many latents fire in each row."""
        return self.offsets.diff()

    def to_dense(self) -> Float32[Tensor, "*batch latent"]:
        """Return the code with its zeros, of shape `shape`."""
        n_rows = len(self.offsets) - 1
        dense = self.values.new_zeros(n_rows, self.shape[-1])
        rows = torch.repeat_interleave(torch.arange(n_rows, device=dense.device), self.l0)
        dense[rows, self.latents] = self.values
        return dense.view(self.shape)


@torch.no_grad()
def batch_topk(scores: Float[Tensor, "batch latent"], k: float) -> Float[Tensor, "batch latent"]:
    """Return `scores` with all but its `round(k * batch)` largest positive entries set to zero.

    Exact: of equal scores those of lower flat index are kept. `k` may be a fraction. When fewer
    scores are positive, all positive ones are kept. Only the few scores above a guessed bound are
    ordered; the bound is checked, so that the guess decides the time and not the choice.
    """
    flat = scores.flatten()
    n = min(round(k * len(scores)), flat.numel())
    kept = torch.zeros_like(flat)
    if n <= 0:
        return kept.view_as(scores)
    places = _candidates(flat, n, scores.shape[-1])
    values = flat[places]
    n = min(n, len(places))
    if n:
        # topk does not say which of equal values it takes: only the smallest kept value is used
        last = torch.topk(values, n, sorted=False).values.min()
        above = values > last
        kept[places[above]] = values[above]
        ties = torch.nonzero(values == last)[: n - int(above.sum()), 0]
        kept[places[ties]] = last
    return kept.view_as(scores)


def _candidates(flat: Float[Tensor, "score"], n: int, width: int) -> Int64[Tensor, "candidate"]:
    """Return the places, rising, of the positive scores above a bound that at least `n` exceed.

    The bound is guessed from a sample, so that few more than `n` do, and lowered until it is right.
    Where fewer than `n` scores are positive, all positive ones are returned.
    """
    stride = max(len(flat) // _SAMPLE, 1)
    while math.gcd(stride, width) > 1 and stride > 1:
        stride += 1  # else the sample would see some latents only
    sample = flat[::stride]
    expected = n * len(sample) / len(flat)
    rank = int(expected + 4 * math.sqrt(expected) + 8)
    while rank < len(sample):
        bound = torch.topk(sample, rank, sorted=False).values.min().clamp(min=0)
        places = torch.nonzero(flat > bound)[:, 0]
        if len(places) >= n:
            return places
        rank *= 2
    return torch.nonzero(flat > 0)[:, 0]


@torch.no_grad()
def calibrate_threshold(
    scores: Callable[[], Iterable[Float32[Tensor, "_ latent"]]], k: float
) -> float:
    """Return the score, a float32, above which `k` latents a row fire on average.

    `scores()` gives the scores of all rows in blocks and is called twice. With n rows the result
    is the `(round(k * n) + 1)`-th largest positive score, so that exactly `round(k * n)` lie
    above it; where equal scores stand at that place, the whole group is in or out, whichever
    comes nearer. It is 0 when no more than that many are positive. Raises ConfigError when there
    is no row.
    """
    upper = torch.zeros(1 << (_HALF - 1), dtype=torch.int64)
    n_rows = 0
    for block in scores():
        n_rows += len(block)
        upper += _count(_positive_bits(block) >> _HALF, len(upper))
    if n_rows == 0:
        raise ConfigError("a threshold needs rows to be calibrated on; the store has none")
    wanted = round(k * n_rows)
    if int(upper.sum()) <= wanted:
        return 0.0
    bin_, above = _locate(upper, wanted)
    lower = torch.zeros(1 << _HALF, dtype=torch.int64)
    for block in scores():
        bits = _positive_bits(block)
        lower += _count(bits[(bits >> _HALF) == bin_] & 0xFFFF, len(lower))
    low, above_in_bin = _locate(lower, wanted - above)
    bits = (bin_ << _HALF) | low
    n_above, n_equal = above + above_in_bin, int(lower[low])
    if abs(n_above + n_equal - wanted) < abs(n_above - wanted):
        bits -= 1  # the next smaller float32: the group of equal scores fires as well
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _positive_bits(block: Float32[Tensor, "batch latent"]) -> Tensor:
    flat = block.detach().flatten()
    return flat[flat > 0].view(torch.int32)


def _count(bins: Tensor, n_bins: int) -> Tensor:
    return torch.bincount(bins, minlength=n_bins).cpu()


def _locate(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin that holds the `(wanted + 1)`-th largest, and how many lie in bins above."""
    at_least = counts.flip(0).cumsum(0).flip(0)  # of this bin and those above it
    bin_ = int((at_least > wanted).sum()) - 1
    return bin_, int(at_least[bin_] - counts[bin_])
