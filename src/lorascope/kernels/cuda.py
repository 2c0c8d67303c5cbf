"""The functions of `cpu.py` for CUDA, with static shapes, so a whole step can become a CUDA graph.

Only `indices_above` waits for the device. The shapes of all other results follow from the shapes
of the inputs: `best_indices` and `best_of_rows` always return as many pairs as requested. If fewer
scores are positive, *padding* fills the end: each pad has the last flat index and value 0, so it
adds nothing to any sum. A real pair at that index comes before the pads. A `guess` is ignored, and
the returned one is 0.

Choosing is made of torch operations. `best_indices` takes the n-th largest value from `topk`, which
does not say which of equal scores it takes, and then the lowest indices that reach it.
`best_of_rows` is a `topk` over integers that are unique within a row: the bits of a positive
float32 rise with its value, so `bits * 2**32 - latent` has the order of the scores, and among equal
scores the lower latent is larger.

The sums over pairs are Triton kernels, whose order of additions never depends on timing, so a
repetition gives the same bits. `gather_sum` gives each bag a program. A latent may fire in every
row, so a long bag is cut into pieces of 64 pairs, which other programs add up first
(`_sum_pieces`). Cuts are counted from the bag's own start: its sum does not depend on other bags.

Triton comes with the CUDA builds of torch; only `for_device` imports this module. Its functions
pass their tests in Triton's interpreter. They have not run on a GPU yet.
"""

# ruff: noqa: ANN001, ANN202 -- the arguments of a kernel are pointers and scalars of the GPU

from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int64
from torch import Tensor

from lorascope.errors import ConfigError
from lorascope.kernels.cpu import Best, row_offsets

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

_MOST = 1 << 30  # scores, whose counts are 32-bit
_PIECE = 64  # pairs of a long bag that one program adds up
_AREA = 2048  # entries of a table that a program holds


def product(
    x: Float[Tensor, "batch d_in"], weight: Float[Tensor, "latent d_in"], out: Tensor
) -> Float[Tensor, "batch latent"]:
    """Write `x @ weight.T` into `out` and return it. All three have one dtype."""
    return torch.mm(x, weight.T, out=out)


def best_indices(
    scores: Float[Tensor, "batch latent"], n: int, *, guess: float | None = None
) -> Best:
    """Return the `n` largest positive scores: their indices, rising, and the scores.

    Ties go to the lower index. Returns `min(n, numel)` pairs, padding included. NaN is never
    chosen. Raises ConfigError for more than 2**30 scores.
    """
    numel = scores.numel()
    if numel > _MOST:
        raise ConfigError(f"a batch has {numel:,} scores; expected at most 2**30: use fewer rows")
    flat = scores.reshape(-1)
    if min(n, numel) <= 0:
        return Best(flat.new_zeros(0, dtype=torch.int64), flat[:0], 0.0)
    flat = flat.masked_fill(~(flat > 0), 0)  # also NaN
    last = torch.topk(flat, min(n, numel), sorted=False).values.min()
    above, equal = flat > last, (flat == last) & (last > 0)
    kept = above | (equal & (equal.cumsum(0, dtype=torch.int32) <= n - above.sum()))
    number = torch.arange(1, min(n, numel) + 1, dtype=torch.int32, device=flat.device)
    found = torch.searchsorted(kept.cumsum(0, dtype=torch.int32), number)
    indices = found.clamp(max=numel - 1)
    return Best(indices, flat[indices].masked_fill(found > indices, 0), 0.0)


def best_of_rows(scores: Float[Tensor, "batch latent"], k: int) -> Best:
    """Return the `k` largest positive scores of each row, in the form of `best_indices`.

    Ties go to the lower latent. Returns `k * batch` pairs, padding included, or as many as there
    are scores. NaN is never chosen. Scores are float32.
    """
    batch, width = scores.shape
    k = min(k, width)
    if batch * k == 0:
        return Best(scores.new_zeros(0, dtype=torch.int64), scores.new_zeros(0), 0.0)
    positive = scores.masked_fill(~(scores > 0), 0)  # also NaN and -0.0, whose bits would mislead
    keys = positive.view(torch.int32).long()
    keys <<= 32
    keys -= torch.arange(width, device=scores.device)
    best = torch.topk(keys, k, dim=1)
    first = torch.arange(0, batch * width, width, device=scores.device)[:, None]
    kept = (first + best.indices).masked_fill(best.values <= 0, batch * width)  # after all others
    kept = kept.flatten().sort().values
    indices = kept.clamp(max=batch * width - 1)
    values = scores.reshape(-1)[indices].masked_fill(kept > indices, 0)
    return Best(indices, values, 0.0)


def indices_above(scores: Float[Tensor, "batch latent"], bound: Float[Tensor, "latent"]) -> Best:
    """Return the indices, rising, where scores are above their latent's bound.

    Only the device knows how many there are: this waits for it and cannot be part of a graph.
    """
    indices = torch.nonzero((scores > bound).flatten())[:, 0]
    return Best(indices, scores.flatten()[indices], 0.0)


def by_latent(
    latents: Int64[Tensor, "pair"], n_latents: int
) -> tuple[Int64[Tensor, "pair"], Int64[Tensor, "latent_plus_1"]]:
    """Return the stable order of pairs by latent, and where each latent's pairs begin in it.

    Uses torch's radix sort and binary search, which have static shapes and wait for nothing.
    """
    ordered, order = latents.to(torch.int32).sort(stable=True)
    return order, row_offsets(ordered.long(), n_latents)


def gather_sum(
    values: Float[Tensor, "pair"],
    index: Int64[Tensor, "pair"],
    offsets: Int64[Tensor, "bag_plus_1"],
    table: Float[Tensor, "entry d"],
) -> Float[Tensor, "bag d"]:
    """Return for each bag the sum of `values[p] * table[index[p]]` over its pairs.

    Bag i holds the pairs `[offsets[i], offsets[i + 1])`; together the bags hold every pair. Sums
    are float32, or float64 if `values` are, and returned in the dtype of `values`.
    """
    n_pairs, n_bags, d = len(index), len(offsets) - 1, table.shape[1]
    out = values.new_empty(n_bags, d)
    if out.numel() == 0 or n_pairs == 0:
        return out.zero_()
    shape = _area(d, values.dtype) | {"PIECE": _PIECE}
    columns = triton.cdiv(d, shape["WIDTH"])
    source = (values.contiguous(), index.contiguous(), offsets.contiguous(), table.contiguous())
    starts = torch.arange(1, -(-n_pairs // _PIECE), device=index.device) * _PIECE
    wide = torch.promote_types(values.dtype, torch.float32)
    pieces = torch.empty(len(starts), d, dtype=wide, device=out.device)
    with torch.cuda.device_of(values):
        if len(starts):
            cut_bags = torch.searchsorted(offsets, starts, right=True) - 1
            _sum_pieces[(len(starts), columns)](*source, cut_bags, pieces, n_bags, d, **shape)
        _sum_bags[(n_bags, columns)](*source, pieces, out, d, **shape)
    return out


@triton.jit
@no_type_check
def _sum_run(
    values,
    index,
    table,
    first,
    last,
    column,
    d,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the sum over the pairs `[first, last)`."""
    total = tl.zeros((PAIRS, WIDTH), WIDE)
    for start in range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        live = pair < last
        value = tl.load(values + pair, mask=live, other=0.0).to(WIDE)
        entry = tl.load(index + pair, mask=live, other=0)
        area = live[:, None] & (column < d)[None, :]
        rows = tl.load(table + entry[:, None] * d + column[None, :], mask=area, other=0.0)
        total += value[:, None] * rows.to(WIDE)
    return tl.sum(total, axis=0)


@triton.jit
@no_type_check
def _sum_pieces(
    values,
    index,
    offsets,
    table,
    cut_bags,
    pieces,
    n_bags,
    d,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Sum the piece of a bag that starts in this program's PIECE pairs, except a bag's first piece.

    At most one piece starts there, because the pieces of a bag are PIECE apart. It belongs to the
    bag that holds the first of these pairs. Without one, nothing is written or read later.
    """
    slot = tl.program_id(0)
    bag = tl.load(cut_bags + slot)
    held = (bag >= 0) & (bag < n_bags)
    begin = tl.load(offsets + bag, mask=held, other=0).to(tl.int32)
    end = tl.load(offsets + bag + 1, mask=held, other=0).to(tl.int32)
    first = begin + tl.cdiv((slot + 1) * PIECE - begin, PIECE) * PIECE
    if (first > begin) & (first < end):
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        last = tl.minimum(first + PIECE, end)
        total = _sum_run(values, index, table, first, last, column, d, PAIRS, WIDTH, WIDE)
        tl.store(pieces + slot * d + column, total, mask=column < d)


@triton.jit
@no_type_check
def _sum_bags(
    values,
    index,
    offsets,
    table,
    pieces,
    out,
    d,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Sum the first piece of a bag and add its other pieces in order."""
    bag = tl.program_id(0)
    begin = tl.load(offsets + bag).to(tl.int32)
    end = tl.load(offsets + bag + 1).to(tl.int32)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    last = tl.minimum(begin + PIECE, end)
    total = _sum_run(values, index, table, begin, last, column, d, PAIRS, WIDTH, WIDE)
    slot = begin // PIECE  # of the piece that starts at `begin + PIECE`
    for _ in range(begin + PIECE, end, PIECE):
        total += tl.load(pieces + slot * d + column, mask=column < d, other=0.0)
        slot += 1
    tl.store(out + bag.to(tl.int64) * d + column, total, mask=column < d)


def pair_dot(
    left: Float[Tensor, "left d"],
    left_index: Int64[Tensor, "pair"],
    right: Float[Tensor, "right d"],
    right_index: Int64[Tensor, "pair"],
) -> Float[Tensor, "pair"]:
    """Return the inner product of `left[left_index[p]]` and `right[right_index[p]]` of each pair.

    Sums are float32, or float64 if an input is, and returned in the wider dtype of the two.
    """
    n_pairs, d = len(left_index), left.shape[1]
    dtype = torch.promote_types(left.dtype, right.dtype)
    out = torch.empty(n_pairs, dtype=dtype, device=left.device)
    if n_pairs == 0 or d == 0:
        return out.zero_()
    shape = _area(d, dtype)
    with torch.cuda.device_of(left):
        _dot_pairs[(triton.cdiv(n_pairs, shape["PAIRS"]),)](
            left.contiguous(),
            left_index.contiguous(),
            right.contiguous(),
            right_index.contiguous(),
            out,
            n_pairs,
            d,
            **shape,
        )
    return out


@triton.jit
@no_type_check
def _dot_pairs(
    left,
    left_index,
    right,
    right_index,
    out,
    n_pairs,
    d,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the inner products of PAIRS pairs."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    live = pair < n_pairs
    from_left = tl.load(left_index + pair, mask=live, other=0) * d
    from_right = tl.load(right_index + pair, mask=live, other=0) * d
    total = tl.zeros((PAIRS, WIDTH), WIDE)
    for start in range(0, d, WIDTH):
        column = start + tl.arange(0, WIDTH)
        area = live[:, None] & (column < d)[None, :]
        one = tl.load(left + from_left[:, None] + column[None, :], mask=area, other=0.0)
        other = tl.load(right + from_right[:, None] + column[None, :], mask=area, other=0.0)
        total += one.to(WIDE) * other.to(WIDE)
    tl.store(out + pair, tl.sum(total, axis=1), mask=live)


def _area(d: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return how many pairs and columns a program holds, and the dtype of its sums."""
    width = min(triton.next_power_of_2(d), 512)
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    return {"PAIRS": max(_AREA // width, 1), "WIDTH": width, "WIDE": wide}
