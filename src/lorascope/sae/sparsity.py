"""Which latents fire: how training chooses them, and the threshold that replaces the choice.

A `Rule` is one of four architectures and its `k`:

- `batchtopk`: the `k * batch` best scores of a batch fire (Bussmann et al. 2024, arXiv 2412.06410);
- `topk`: the `k` best scores of each row fire (Gao et al. 2024, arXiv 2406.04093); if k is not a
  whole number, the `k * batch` best among the `ceil(k)` best of each row;
- `matryoshka`: chooses like `batchtopk`, and nested prefixes of the dictionary must reconstruct on
  their own (Bussmann et al. 2025, arXiv 2503.17547);
- `jumprelu`: scores above a learned threshold of their latent fire (Rajamanoharan et al. 2024,
  arXiv 2407.14435).

The first three choose by a row's neighbours or by rank. At inference a code must depend on its own
row only, so `calibrate_threshold` finds the score above which the same number fires on average:

1. Count the positive scores by the upper half of their bits. The bits of positive float32 numbers
   rise with the number, so the counts say which of 32,768 bins holds the wanted score.
2. Count the scores of that bin by the lower half of their bits. This gives the exact score.

Both passes need 256 KB, whatever the number of rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from lorascope.errors import ConfigError

_HALF = 16  # bits in each half of a float32
_PREFIXES = 5  # of a matryoshka: 1/16, 1/8, 1/4, 1/2 and all of the latents


@dataclass(frozen=True)
class Rule:
    """How training chooses which latents fire: one of the four architectures, and its `k`."""

    architecture: str
    k: float

    def prefixes(self, d_sae: int) -> tuple[int, ...]:
        """Return the sizes of the prefixes that must reconstruct, rising; the last is `d_sae`.

        >>> Rule("matryoshka", 4).prefixes(64)
        (4, 8, 16, 32, 64)
        >>> Rule("topk", 4).prefixes(64)
        (64,)
        """
        n = _PREFIXES if self.architecture == "matryoshka" else 1
        return tuple(sorted({max(d_sae >> i, 1) for i in range(n)}))


@dataclass(frozen=True)
class SparseCode:
    """The latents that fire in each row: row i has `[offsets[i], offsets[i + 1])`, rising.

    `shape` is the dense shape: the axes of the rows, then the latents.
    """

    offsets: Int64[Tensor, "batch_plus_1"]
    latents: Int64[Tensor, "fired"]
    values: Float32[Tensor, "fired"]
    shape: tuple[int, ...]

    @property
    def l0(self) -> Int64[Tensor, "batch"]:
        """Number of latents that fire in each row."""
        return self.offsets.diff()

    def to_dense(self) -> Float32[Tensor, "*batch latent"]:
        """Return the dense code, of shape `shape`."""
        n_rows = len(self.offsets) - 1
        dense = self.values.new_zeros(n_rows, self.shape[-1])
        rows = torch.repeat_interleave(torch.arange(n_rows, device=dense.device), self.l0)
        dense[rows, self.latents] = self.values
        return dense.view(self.shape)


@torch.no_grad()
def calibrate_threshold(
    scores: Callable[[], Iterable[Float32[Tensor, "_ latent"]]], k: float
) -> float:
    """Return the float32 score above which `k` latents per row fire on average.

    `scores()` yields the scores of all rows in blocks and is called twice. For n rows the result is
    the `(round(k * n) + 1)`-th largest positive score, so exactly `round(k * n)` lie above it. A
    group of equal scores at the limit is in or out as a whole, whichever is closer. Returns 0 if
    there are not more positive scores than wanted. Raises ConfigError if there are no rows.
    """
    upper = torch.zeros(1 << (_HALF - 1), dtype=torch.int64)
    n_rows = 0
    for block in scores():
        n_rows += len(block)
        upper += torch.bincount(_positive_bits(block) >> _HALF, minlength=len(upper)).cpu()
    if n_rows == 0:
        raise ConfigError("cannot calibrate a threshold: the store has no rows to calibrate on")
    wanted = round(k * n_rows)
    if int(upper.sum()) <= wanted:
        return 0.0
    bin_, above = _locate(upper, wanted)
    lower = torch.zeros(1 << _HALF, dtype=torch.int64)
    for block in scores():
        bits = _positive_bits(block)
        bits = bits[(bits >> _HALF) == bin_] & 0xFFFF
        lower += torch.bincount(bits, minlength=len(lower)).cpu()
    low, above_in_bin = _locate(lower, wanted - above)
    bits = (bin_ << _HALF) | low
    n_above, n_equal = above + above_in_bin, int(lower[low])
    if abs(n_above + n_equal - wanted) < abs(n_above - wanted):
        bits -= 1  # the next smaller float32, so that the group of equal scores fires too
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def _positive_bits(block: Float32[Tensor, "batch latent"]) -> Tensor:
    flat = block.detach().flatten()
    return flat[flat > 0].view(torch.int32)


def _locate(counts: Tensor, wanted: int) -> tuple[int, int]:
    """Return the bin of the `(wanted + 1)`-th largest value, and how many lie in higher bins."""
    at_least = counts.flip(0).cumsum(0).flip(0)  # in this bin or a higher one
    bin_ = int((at_least > wanted).sum()) - 1
    return bin_, int(at_least[bin_] - counts[bin_])
