"""Which latents fire: how training chooses them, and the threshold that does so afterwards.

A `Rule` is one of four architectures, `k`, and whether latents are signed.

- `batchtopk` keeps the `k * batch` best scores of a batch (Bussmann et al. 2024, arXiv 2412.06410);
- `topk` keeps the `k` best of each row (Gao et al. 2024, arXiv 2406.04093);
- `matryoshka` chooses as `batchtopk` does; every prefix of the dictionary, `prefixes` long, has to
  reconstruct with what it has (Bussmann et al. 2025, arXiv 2503.17547);
- `jumprelu` keeps what is above a threshold that each latent learns (Rajamanoharan et al. 2024,
  arXiv 2407.14435).

What the first three keep of a token depends on its neighbours or its rank, so for inference
`calibrate_threshold` finds the score above which the same number fires on average:

1. Count the positive scores by the upper half of their bits. Positive float32 numbers are in the
   order of their bits, so the counts tell in which of 32,768 bins the wanted score lies.
2. Count the scores of that bin by the lower half of their bits: the wanted score, exactly.

Both passes need 256 KB whatever the number of rows.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from lorascope.errors import ConfigError
from lorascope.kernels import reference
from lorascope.sae.settings import Architecture

_HALF = 16  # bits in each half of a float32
_PREFIXES = 5  # of a matryoshka: 1/16, 1/8, 1/4, 1/2 and all of the latents


@dataclass(frozen=True)
class Rule:
    """How training chooses what fires. `signed` latents fire by absolute value, either way."""

    architecture: Architecture
    k: float
    signed: bool = False

    def prefixes(self, d_sae: int) -> tuple[int, ...]:
        """Return how many latents each reconstruction has, rising; one number but for matryoshka.

        >>> Rule("matryoshka", 4).prefixes(64)
        (4, 8, 16, 32, 64)
        """
        n = _PREFIXES if self.architecture == "matryoshka" else 1
        return tuple(sorted({max(d_sae >> i, 1) for i in range(n)}))


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
def chosen(
    scores: Float[Tensor, "batch latent"], rule: Rule, *, by_row: bool
) -> Bool[Tensor, "batch latent"]:
    """Say what fires, by the plain definition: for every rule but `jumprelu`.

    `by_row` chooses as `topk` does, whatever the rule. Only positive scores fire. Of equal scores
    the one at the lower flat index does. With a fraction of `k`, `topk` gives each row
    `floor(k)` latents and the batch's `round((k - floor(k)) * batch)` best next ones.
    """
    fires = torch.zeros_like(scores, dtype=torch.bool)
    batch, flat = len(scores), fires.view(-1)
    if not by_row and rule.architecture != "topk":
        flat[reference.best_places(scores, round(rule.k * batch), signed=rule.signed)] = True
        return fires
    size = scores.abs() if rule.signed else scores
    order = size.argsort(dim=1, descending=True, stable=True)
    whole = int(rule.k)
    fires.scatter_(1, order[:, :whole], value=True)
    if n_more := round((rule.k - whole) * batch):
        following = order[:, whole : whole + 1]
        rows = size.gather(1, following)[:, 0].argsort(descending=True, stable=True)[:n_more]
        fires[rows, following[rows, 0]] = True
    return fires & (size > 0)


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
