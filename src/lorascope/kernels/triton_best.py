"""Choose the largest scores on CUDA, in Triton: exactly, in order, reading the scores once.

The bits of positive floats, read as integers, have the order of the floats, so `largest_indices`
works with integers:

1. Cut the flat scores into blocks and keep the largest of each (`_maxima`).
2. Choose the n best blocks; ties go to the lower block. They contain the n best scores, because n
   scores come before any score of another block. Read these blocks again (`_gather_bits`).
3. Choose the n best scores in them.

`_choose` finds the n-th largest value by counting eight bits at a time (`_count_digits`), counts
how many values of each program are above it or equal to it (`_count_kept`), and writes the indices
in order (`_write_kept`).
"""

# ruff: noqa: ANN001, ANN202 -- the arguments of a kernel are pointers and scalars of the GPU

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int64
from torch import Tensor

from lorascope.errors import ConfigError, NumberError

_TILE = 2048  # scores that a program reads at once
_PROGRAMS = 1024  # at most, because each reads the counts of all before it
_DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}  # bytes that can be non-zero
_MOST = 1 << 30  # scores: 32-bit indices, with room for the last tile
_RADIX = tl.constexpr(256)
_INFINITY = tl.constexpr(0x7F800000)  # bits of +inf in float32; those of a NaN are above


@torch.no_grad()
def largest_indices(
    scores: Float[Tensor, "batch latent"], n: int
) -> tuple[Int64[Tensor, "n"], Int64[Tensor, ""]]:
    """Return the flat indices, rising, of the `n` largest positive scores, and how many there are.

    Ties go to the lower index. If fewer than `n` scores are positive, the last flat index fills the
    rest; `cuda.py` gives it the value 0. Never returns more indices than scores. NaN is never
    chosen. Raises NumberError for scores that are not bfloat16, float16 or float32, and ConfigError
    for more than 2**30 of them.
    """
    flat, numel, n_digits = scores.contiguous().view(-1), scores.numel(), _DIGITS.get(scores.dtype)
    if n_digits is None:
        raise NumberError(f"scores are {scores.dtype}; expected bfloat16, float16 or float32")
    if numel > _MOST:
        raise ConfigError(f"a batch has {numel:,} scores; expected at most 2**30: use fewer rows")
    n = min(n, numel)
    if n <= 0:
        return flat.new_zeros(0, dtype=torch.int64), flat.new_zeros((), dtype=torch.int64)
    width = block_width(numel, n)
    grid, rows = (triton.cdiv(numel, _TILE),), _TILE // width
    maxima = torch.empty(-(-numel // width), dtype=torch.int32, device=flat.device)
    with torch.cuda.device_of(scores):
        _maxima[grid](flat, maxima, numel, ROWS=rows, WIDTH=width)
        blocks, n_blocks = _choose(maxima, n, n_digits, numel - 1)
        if width == 1:
            return blocks, n_blocks
        bits = torch.empty(n * width, dtype=torch.int32, device=flat.device)
        _gather_bits[(triton.cdiv(n, rows),)](
            flat, blocks, n_blocks, bits, numel, n, ROWS=rows, WIDTH=width
        )
        return _choose(bits, n, n_digits, numel - 1, blocks, width)


def block_width(numel: int, n: int) -> int:
    """Return how many scores a block has: the power of two that minimises the work that follows.

    `numel / width` maxima and then `n * width` scores are searched. 1 if blocks save nothing.
    """
    width = 1
    while width < 128 and width * width * 2 * n < numel:
        width *= 2
    return width if width >= 4 else 1


def _choose(
    bits: Tensor, n: int, n_digits: int, fill: int, blocks: Tensor | None = None, width: int = 1
) -> tuple[Tensor, Tensor]:
    """Choose like `largest_indices` among bits: those of `blocks`, or of all scores if None."""
    numel = len(bits)
    n_tiles = -(-numel // _TILE)
    grid = (min(n_tiles, _PROGRAMS),)
    n_tiles = -(-n_tiles // grid[0])
    digits = torch.zeros(n_digits, _RADIX.value, dtype=torch.int32, device=bits.device)
    kept = torch.empty(2, grid[0], dtype=torch.int32, device=bits.device)
    indices = torch.full((n,), fill, dtype=torch.int64, device=bits.device)
    count = torch.empty((), dtype=torch.int64, device=bits.device)
    for i in range(n_digits):
        _count_digits[grid](bits, numel, n_tiles, digits, n, DIGIT=i, TILE=_TILE)
    _count_kept[grid](bits, numel, n_tiles, digits, n, kept, N_DIGITS=n_digits, TILE=_TILE)
    _write_kept[grid](
        bits,
        numel,
        n_tiles,
        digits,
        n,
        kept,
        indices if blocks is None else blocks,  # not read if the width is 1
        indices,
        count,
        N_DIGITS=n_digits,
        BEFORE=triton.next_power_of_2(grid[0]),
        TILE=_TILE,
        WIDTH=width,
    )
    return indices, count


@triton.jit
@no_type_check
def _bits(scores, index, live):
    """Return the float32 bits of positive scores, and 0 for all others."""
    score = tl.load(scores + index, mask=live, other=0.0)
    if scores.dtype.element_ty == tl.bfloat16:  # use the bits: a conversion may flush denormals
        bits = score.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where((bits > 0) & (bits <= _INFINITY), bits, 0)


@triton.jit
@no_type_check
def _maxima(scores, maxima, numel, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write the bits of the largest score of each block of WIDTH."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    bits = _bits(scores, index, index < numel)
    tl.store(maxima + row, tl.max(bits, axis=1), mask=row * WIDTH < numel)


@triton.jit
@no_type_check
def _gather_bits(
    scores,
    blocks,
    n_blocks,
    out,
    numel,
    n,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the bits of the scores in the chosen blocks, and 0 for a missing block."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tl.load(n_blocks)
    block = tl.load(blocks + row, mask=live, other=0).to(tl.int32)
    column = tl.arange(0, WIDTH)[None, :]
    index = block[:, None] * WIDTH + column
    bits = _bits(scores, index, live[:, None] & (index < numel))
    tl.store(out + row[:, None] * WIDTH + column, bits, mask=row[:, None] < n)


@triton.jit
@no_type_check
def _cut(digits, n, N_DIGITS: tl.constexpr):
    """Return the upper bytes of the n-th largest bits, and how many equal ones to keep."""
    digit = tl.arange(0, _RADIX)
    bits = tl.full((), 0, tl.int32)
    wanted = tl.full((), 0, tl.int32) + n
    for i in tl.static_range(N_DIGITS):
        loaded = tl.load(digits + i * _RADIX + digit)
        above = tl.sum(loaded) - tl.cumsum(loaded)
        hit = (above < wanted) & (above + loaded >= wanted)
        bits = bits | (tl.sum(tl.where(hit, digit, 0)) << (24 - 8 * i))
        wanted -= tl.sum(tl.where(hit, above, 0))
    return bits, tl.where(bits > 0, wanted, 0)


@triton.jit
@no_type_check
def _count_digits(bits, numel, n_tiles, digits, n, DIGIT: tl.constexpr, TILE: tl.constexpr):
    """Count the values of one byte among the bits that share the upper bytes of the n-th."""
    upper, _ = _cut(digits, n, DIGIT)
    counts = tl.zeros((_RADIX,), tl.int32)
    for i in range(n_tiles):
        offset = (tl.program_id(0) * n_tiles + i) * TILE + tl.arange(0, TILE)
        loaded = tl.load(bits + offset, mask=offset < numel, other=0)
        same = loaded > 0
        if DIGIT > 0:
            same = same & ((loaded >> (32 - 8 * DIGIT)) == (upper >> (32 - 8 * DIGIT)))
        counts += tl.histogram((loaded >> (24 - 8 * DIGIT)) & 0xFF, _RADIX, mask=same)
    digit = tl.arange(0, _RADIX)
    tl.atomic_add(digits + DIGIT * _RADIX + digit, counts, mask=counts > 0, sem="relaxed")


@triton.jit
@no_type_check
def _count_kept(bits, numel, n_tiles, digits, n, kept, N_DIGITS: tl.constexpr, TILE: tl.constexpr):
    """Write how many bits of this program are above the n-th, and how many are equal to it."""
    last, _ = _cut(digits, n, N_DIGITS)
    above = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for i in range(n_tiles):
        offset = (tl.program_id(0) * n_tiles + i) * TILE + tl.arange(0, TILE)
        loaded = tl.load(bits + offset, mask=offset < numel, other=0)
        above += tl.sum((loaded > last).to(tl.int32))
        equal += tl.sum(((loaded == last) & (loaded > 0)).to(tl.int32))
    tl.store(kept + tl.program_id(0), above)
    tl.store(kept + tl.num_programs(0) + tl.program_id(0), equal)


@triton.jit
@no_type_check
def _write_kept(
    bits,
    numel,
    n_tiles,
    digits,
    n,
    kept,
    blocks,
    indices,
    count,
    N_DIGITS: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the kept indices after those of the earlier programs."""
    last, n_ties = _cut(digits, n, N_DIGITS)
    program = tl.arange(0, BEFORE)
    earlier = program < tl.program_id(0)
    above = tl.sum(tl.load(kept + program, mask=earlier, other=0))
    equal = tl.sum(tl.load(kept + tl.num_programs(0) + program, mask=earlier, other=0))
    done = above + tl.minimum(equal, n_ties)
    for i in range(n_tiles):
        offset = (tl.program_id(0) * n_tiles + i) * TILE + tl.arange(0, TILE)
        loaded = tl.load(bits + offset, mask=offset < numel, other=0)
        tie = ((loaded == last) & (loaded > 0)).to(tl.int32)
        taken = (tie > 0) & (equal + tl.cumsum(tie) <= n_ties)
        keep = (loaded > last) | taken
        index = offset.to(tl.int64)
        if WIDTH > 1:
            index = tl.load(blocks + offset // WIDTH, mask=keep, other=0) * WIDTH + offset % WIDTH
        tl.store(indices + done + tl.cumsum(keep.to(tl.int32)) - 1, index, mask=keep)
        equal += tl.sum(tie)
        done += tl.sum(keep.to(tl.int32))
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(count, done.to(tl.int64))
