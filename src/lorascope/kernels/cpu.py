"""The operations of this package, built from the torch operations that are fast on a CPU.

`best_indices` reads the scores once if the guess is good:

1. Mark the scores above a guessed bound. The guess comes from the caller (the bound of the batch
   before, a little lower) or from a sample of the rows.
2. Collect the indices of the marks: first the words of eight marks that are not zero, then the
   bytes inside them, because fewer than one score in a hundred is marked.
3. With fewer than `n` marks, lower the bound and mark again. With `n` or more, the wanted scores
   are among them, and only these are ranked.

The guess changes the time, never the choice.

`byte_product` is a rough product of two tables at a quarter of the cost, on CPUs with instructions
for bytes. Each row of both tables is rounded to 8 bits, with a scale of its own. The product of the
bytes is exact, so the only errors are those of this rounding and that of the result, which is
bfloat16. `prefilter.py` (training) and `encoder.py` find with it the few scores that they compute
in float32.
"""

import math
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import BFloat16, Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn.functional import embedding_bag

_CACHED = 1 << 18  # numbers that are read again soon
_SAMPLE = 1 << 16  # scores from which a bound is guessed
_TRIES = 4  # bounds to try before marking every positive score
_LOWER = 0.99  # the next batch's guess, as a share of this batch's bound
_PARTS = 3  # parts of a row for each wanted latent
ROUNDED = 1.1 * 2**-8  # of a bfloat16 number, and of the number with which it is compared
WIDEST = 1 << 15  # columns whose products of bytes surely fit into 32 bits
_ZERO = 128  # the unsigned byte for zero
_TINY = 1e-30  # smallest unit; zeros have it
_ISAS = ("AVX512_CORE_", "AVX10")  # beginnings of oneDNN's names of instructions for bytes


class Best(NamedTuple):
    """Chosen pairs: flat indices, rising; their scores; a guess of the bound for the next batch.

    On CUDA the last pairs may be padding with value 0: see `cuda.py`.
    """

    indices: Int64[Tensor, "pair"]
    values: Float[Tensor, "pair"]
    guess: float


def product(
    x: Float[Tensor, "batch d_in"], weight: Float[Tensor, "latent d_in"], out: Tensor
) -> Float[Tensor, "batch latent"]:
    """Write `x @ weight.T` into `out` and return it.

    float32 goes through oneDNN, which takes half the time of torch's default here and differs from
    it by 1e-6 of the largest value. On CPUs whose matrix unit (AMX) would then compute in bfloat16
    the default is used. Callers reuse `out`: getting fresh memory of this size from the operating
    system takes as long as the selection.
    """
    if x.dtype != torch.float32 or torch.cpu._is_amx_tile_supported():
        return torch.mm(x, weight.T, out=out)
    settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        return torch.mm(x, weight.T, out=out)
    finally:
        settings.fp32_precision = before


def best_indices(
    scores: Float[Tensor, "batch latent"], n: int, *, guess: float | None = None
) -> Best:
    """Return the `n` largest positive scores: their indices, rising, and the scores.

    Ties go to the lower index. Returns fewer than `n` if fewer are positive. `guess` is a bound
    slightly below the expected `n`-th largest score.
    """
    indices = torch.zeros(0, dtype=torch.int64)
    bound = sampled_bound(scores, n) if guess is None or not guess > 0 else guess
    for bound in [bound * 0.8**i for i in range(_TRIES)] + [0.0] if n > 0 else []:
        indices = nonzero_indices(scores > bound)
        if len(indices) >= n:
            break
    values = scores.view(-1)[indices]
    if len(indices) > n:
        kept, bound = keep_best(values, n)
        indices, values = indices[kept], values[kept]
    return Best(indices, values, _LOWER * bound)


def keep_best(
    values: Float[Tensor, "candidate"], n: int
) -> tuple[Bool[Tensor, "candidate"], float]:
    """Return a mask of the `n` best of more than `n` candidates, and the smallest kept value.

    Candidates are in the order of their indices.
    """
    # topk does not say which of equal values it takes, so only its smallest value is used
    last = torch.topk(values, n, sorted=False).values.min()
    keep = values > last
    ties = torch.nonzero(values == last)[: n - int(keep.sum()), 0]
    keep[ties] = True
    return keep, float(last)


def best_of_rows(scores: Float[Tensor, "batch latent"], k: int) -> Best:
    """Return the `k` largest positive scores of each row, in the form of `best_indices`.

    Ties go to the lower latent. Each row is cut into parts. At least `k` scores reach the `k`-th
    largest of the parts' maxima, so the scores that reach it contain the row's best, and are few.
    """
    k = min(k, scores.shape[1])
    if len(scores) == 0 or k == 0:
        return Best(torch.zeros(0, dtype=torch.int64), scores.new_zeros(0), 0.0)
    number = torch.finfo(scores.dtype)
    bound = row_bounds(scores, k).clamp_(min=number.tiny * number.eps)  # the smallest above 0
    indices = indices_reaching(scores, bound)
    values = scores.view(-1)[indices]
    kept = keep_best_of_rows(indices, values, scores.shape, k)[0]
    return Best(indices[kept], values[kept], 0.0)


def keep_best_of_rows(
    indices: Int64[Tensor, "candidate"],
    values: Float[Tensor, "candidate"],
    shape: tuple[int, ...],
    k: int,
) -> tuple[Bool[Tensor, "candidate"], Float[Tensor, "batch"]]:
    """Return a mask of the `k` best of each row among candidates that contain them.

    Also return each row's `k`-th best (0 if it has fewer). `indices` rise and point into scores of
    `shape`.
    """
    batch, width = shape
    starts = torch.searchsorted(indices, torch.arange(batch + 1) * width)
    counts = starts.diff()
    rows = torch.repeat_interleave(counts)
    columns = torch.arange(len(indices)) - starts[rows]
    table = values.new_zeros(batch, max(int(counts.max()), k))
    table[rows, columns] = values
    last = torch.topk(table, k).values[:, -1:]
    keep = table >= last
    crowded = keep.sum(1) > k
    if crowded.any():  # equal scores: keep the lower latents
        crowded_table, bar = table[crowded], last[crowded]
        free = k - (crowded_table > bar).sum(1, keepdim=True)
        tied = crowded_table == bar
        keep[crowded] = (crowded_table > bar) | (tied & (tied.cumsum(1) <= free))
    return keep[rows, columns] & (values > 0), last[:, 0]


def row_bounds(scores: Float[Tensor, "batch latent"], n: int) -> Float[Tensor, "batch 1"]:
    """Return for each row a value that at least `n` of its scores reach, and not many more."""
    return torch.topk(part_maxima(scores, n, 1), n, sorted=False).values.amin(1, True)


def part_maxima(scores: Tensor, wanted: int, dim: int) -> Tensor:
    """Return the maxima of parts of an axis: a few times `wanted` parts, or all scores."""
    width = scores.shape[dim]
    size = width // (_PARTS * wanted)
    if size < 2:
        return scores
    n = width // size
    body, rest = scores.split([size * n, width - size * n], dim)
    return torch.cat([body.unflatten(dim, (size, n)).amax(dim), rest], dim)


def indices_above(scores: Float[Tensor, "batch latent"], bound: Float[Tensor, "latent"]) -> Best:
    """Return the indices, rising, where scores are above their latent's bound."""
    indices = nonzero_indices(scores > bound)
    return Best(indices, scores.view(-1)[indices], 0.0)


def sampled_bound(scores: Float[Tensor, "batch latent"], n: int) -> float:
    """Guess from evenly spread rows a bound that slightly more than `n` scores exceed."""
    batch, width = scores.shape
    if scores.numel() == 0:
        return 0.0
    sample = scores[:: sample_step(batch, width)].flatten()
    expected = n * len(sample) / scores.numel()
    rank = int(expected + 4 * math.sqrt(expected) + 8)
    if rank >= len(sample):
        return 0.0
    return max(float(torch.topk(sample, rank, sorted=False).values.min()), 0.0)


def sample_step(batch: int, width: int) -> int:
    """Return how many rows apart the rows lie from which a bound is guessed."""
    return max(batch * width // _SAMPLE, 1)


def indices_reaching(
    scores: Shaped[Tensor, "row column"], low: Shaped[Tensor, "..."]
) -> Int64[Tensor, "pair"]:
    """Return the flat indices, rising, of the scores that reach a bound of the same dtype.

    A comparison whose result has the type of its arguments is vectorised, and 16-bit integers
    compare fastest: bits of bfloat16 rise with the value, and those of negative numbers are below.
    """
    if scores.dtype == torch.bfloat16 and bool((low > 0).all()):
        scores, low = scores.view(torch.int16), low.view(torch.int16)
    marks = torch.empty(scores.shape, dtype=torch.bool)
    size = max(_CACHED // max(scores.shape[1], 1), 1)
    parts = (tensor.split(size) for tensor in (scores, low.expand(scores.shape), marks))
    for part, bound, mark in zip(*parts, strict=True):
        mark.view(torch.int8).copy_(torch.ge(part, bound, out=torch.empty_like(part)))
    return nonzero_indices(marks)


def nonzero_indices(marks: Bool[Tensor, "batch latent"]) -> Int64[Tensor, "pair"]:
    """Return the flat indices of the marks, rising, three times as fast as plain `nonzero`."""
    flat = marks.view(-1)
    if len(flat) % 8:
        return torch.nonzero(flat)[:, 0]
    words = torch.nonzero(flat.view(torch.int64))[:, 0]
    inside = torch.from_numpy(np.flatnonzero(flat.view(-1, 8).index_select(0, words).numpy()))
    return words[inside >> 3] * 8 + (inside & 7)


def by_latent(
    latents: Int64[Tensor, "pair"], n_latents: int
) -> tuple[Int64[Tensor, "pair"], Int64[Tensor, "latent_plus_1"]]:
    """Return the stable order of pairs by latent, and where each latent's pairs begin in it."""
    order = stable_order(latents, n_latents)
    starts = latents.new_zeros(n_latents + 1)
    torch.cumsum(torch.bincount(latents, minlength=n_latents), 0, out=starts[1:])
    return order, starts


def stable_order(numbers: Int64[Tensor, "pair"], n: int) -> Int64[Tensor, "pair"]:
    """Return the order of non-negative numbers below `n`; equal ones stay in theirs.

    numpy sorts a few thousand ten times as fast as torch, and more as fast.
    """
    small = numbers.to(torch.int16 if n < 2**15 else torch.int32).numpy()
    return torch.from_numpy(np.argsort(small, kind="stable"))


def row_offsets(rows: Int64[Tensor, "pair"], n_rows: int) -> Int64[Tensor, "row_plus_1"]:
    """Return where each row's pairs begin; `rows` rise."""
    return torch.searchsorted(rows, torch.arange(n_rows + 1, device=rows.device))


def gather_sum(
    values: Float[Tensor, "pair"],
    index: Int64[Tensor, "pair"],
    offsets: Int64[Tensor, "bag_plus_1"],
    table: Float[Tensor, "entry d"],
) -> Float[Tensor, "bag d"]:
    """Return for each bag the sum of `values[p] * table[index[p]]` over its pairs."""
    if len(index) == 0:
        return table.new_zeros(len(offsets) - 1, table.shape[1])
    return embedding_bag(
        index, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def pair_dot(
    left: Float[Tensor, "left d"],
    left_index: Int64[Tensor, "pair"],
    right: Float[Tensor, "right d"],
    right_index: Int64[Tensor, "pair"],
) -> Float[Tensor, "pair"]:
    """Return the inner product of `left[left_index[p]]` and `right[right_index[p]]` of each pair.

    This is torch's gradient of an embedding bag with respect to its weights, which reads each row
    once without copying it; `(left[i] * right[j]).sum(1)` takes 50 times as long.
    """
    if len(left_index) == 0:
        return left.new_zeros(0)
    offsets = left_index[:0]  # not read, as it would only tell what `left_index` says
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_index, offsets, left_index, 0
    )


def multiplies_bytes(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this CPU has instructions for bytes (VNNI or AMX) and the rows are float32.

    oneDNN must be allowed to use them: without, its product of bytes takes seconds.
    """
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    limits = [os.environ.get(f"{name}_MAX_CPU_ISA", "") for name in ("ONEDNN", "DNNL")]
    if not all(
        limit.upper() in ("", "ALL", "DEFAULT") or limit.upper().startswith(_ISAS)
        for limit in limits
    ):
        return False
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


class Bytes(NamedTuple):
    """A table whose row i is about `unit[i] * numbers[i]`, and the norms of the exact rows.

    The bytes are signed, or unsigned with `_ZERO` added.
    """

    numbers: Tensor
    unit: Float[Tensor, "row"]
    norm: Float[Tensor, "row"]

    @classmethod
    def rounded(cls, table: Float[Tensor, "row d_in"], *, signed: bool) -> "Bytes":
        """Round a table; the largest number of each row becomes 127 or -127."""
        numbers = torch.empty(table.shape, dtype=torch.int8 if signed else torch.uint8)
        result = cls(numbers, table.new_empty(len(table)), table.new_empty(len(table)))
        size = max(_CACHED // max(table.shape[1], 1), 1)
        parts = (tensor.split(size) for tensor in (table, *result))
        for part, out, unit, norm in zip(*parts, strict=True):
            torch.amax(part.abs(), 1, out=unit)
            unit.div_(127).clamp_(min=_TINY)
            scaled = part * (1 / unit)[:, None]
            # squares of tiny numbers would be lost
            torch.linalg.vector_norm(scaled, dim=1, out=norm).mul_(unit)
            # conversion cuts off what follows the dot
            out.copy_(scaled.round_() if signed else scaled.add_(_ZERO + 0.5))
        return result

    def select(self, rows: slice) -> "Bytes":
        """Return some of the rows."""
        return Bytes(*(tensor[rows] for tensor in self))

    def error_norms(self, table: Float[Tensor, "row d_in"]) -> Float[Tensor, "row"]:
        """Return an upper bound of the norm of what rounding changed in each row, in its unit."""
        zero = _ZERO if self.numbers.dtype == torch.uint8 else 0
        apart = table * (1 / self.unit)[:, None] - (self.numbers.float() - zero)
        return apart.norm(dim=1) * (1 + 2**-10) + 2**-14 * table.shape[1] ** 0.5


def byte_product(
    weight: Bytes, x: Bytes, added: Float[Tensor, "row"]
) -> BFloat16[Tensor, "latent row"]:
    """Return `weight @ x.T` in units of the latents, plus a number for each row of `x`.

    `weight` is unsigned, `x` signed. Neither may be empty.
    """
    onednn = torch.ops.onednn
    return onednn.qlinear_pointwise(
        weight.numbers,
        1.0,
        _ZERO,
        onednn.qlinear_prepack(x.numbers, None),
        x.unit,
        torch.zeros(len(x.unit), dtype=torch.int64),
        added,
        1.0,
        0,
        torch.bfloat16,
        "none",
        [],
        "",
    )
