"""The operations on pairs for CUDA, in Triton, with static shapes and no host synchronisation.

The order of additions never depends on timing, so a repetition gives the same bits. Triton comes
with the CUDA builds of torch; only `cuda.py` imports this module, for tensors on such a device.

`gather_sum` gives each bag a program. A latent may fire in every row, so a long bag is cut into
pieces of 64 pairs, which other programs add up first (`_sum_pieces`). Cuts are counted from the
bag's own start: its sum does not depend on other bags.
"""

# ruff: noqa: ANN001, ANN202 -- the arguments of a kernel are pointers and scalars of the GPU

from typing import Any, no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int64
from torch import Tensor

_PIECE = 64  # pairs of a long bag that one program adds up
_AREA = 2048  # entries of a table that a program holds


def by_latent(
    latents: Int64[Tensor, "pair"], n_latents: int
) -> tuple[Int64[Tensor, "pair"], Int64[Tensor, "latent_plus_1"]]:
    """Return the stable order of pairs by latent, and where each latent's pairs begin in it.

    Uses torch's radix sort and binary search, which have static shapes and wait for nothing.
    """
    ordered, order = latents.to(torch.int32).sort(stable=True)
    return order, row_offsets(ordered.long(), n_latents)


def row_offsets(rows: Int64[Tensor, "pair"], n_rows: int) -> Int64[Tensor, "row_plus_1"]:
    """Return where each row's pairs begin; `rows` rise."""
    return torch.searchsorted(rows, torch.arange(n_rows + 1, device=rows.device))


def gather_sum(
    values: Float[Tensor, "pair"],
    index: Int64[Tensor, "pair"],
    offsets: Int64[Tensor, "bag_plus_1"],
    table: Float[Tensor, "entry d"],
) -> Float[Tensor, "bag d"]:
    """Return for each bag the sum of `values[p] * table[index[p]]` over its pairs.

    Bag i holds the pairs `[offsets[i], offsets[i + 1])`; together the bags hold every pair. Sums
    are float32, or float64 if `values` are, and returned in the dtype of `values`.
    Differentiable in `values` and `table`.
    """
    return _GatherSum.apply(values, index, offsets, table)  # pyright: ignore[reportReturnType]


class _GatherSum(torch.autograd.Function):
    """`gather_sum` with gradients: a `pair_dot` for the values, sums by entry for the table."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(values, index, offsets, table)
        return _sums(values, index, offsets, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None]:
        values, index, offsets, table = ctx.saved_tensors
        pairs = torch.arange(len(index), device=index.device)
        bags = torch.searchsorted(offsets, pairs, right=True) - 1
        of_values = of_table = None
        if ctx.needs_input_grad[0]:
            of_values = pair_dot(gradient, bags, table, index).to(values.dtype)
        if ctx.needs_input_grad[3]:
            order, bounds = by_latent(index, len(table))
            of_table = _sums(values[order], bags[order], bounds, gradient).to(table.dtype)
        return of_values, None, None, of_table


def _sums(values: Tensor, index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    n_pairs, n_bags, d = len(index), len(offsets) - 1, table.shape[1]
    out = values.new_empty(n_bags, d)
    if out.numel() == 0 or n_pairs == 0:
        return out.zero_()
    shape = _area(d, values.dtype) | {"PIECE": _PIECE}
    columns = triton.cdiv(d, shape["WIDTH"])
    source = (values.contiguous(), index.contiguous(), offsets.contiguous(), table.contiguous())
    starts = torch.arange(1, -(-n_pairs // _PIECE), device=index.device) * _PIECE
    pieces = torch.empty(len(starts), d, dtype=_wide(values.dtype), device=out.device)
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

    Sums are float32, or float64 if an input is, and returned in the wider dtype of the two. Not
    differentiable: it is itself the gradient of the values in `gather_sum`.
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
