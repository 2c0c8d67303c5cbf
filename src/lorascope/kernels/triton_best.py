"""The choice of the best scores for CUDA, in Triton: exact, in order, the scores read once.

Positive floats are in the order of their bits, so `best_places` works with integers:

1. Cut the flat scores into blocks and keep the largest of each (`_maxima`).
2. Choose the n best blocks, of equal ones the lower. The n best scores lie in them, as n others
   come before a score of any other block. Read these blocks again (`_gather_bits`).
3. Choose the n best scores in them.

`_choose` finds the n-th largest value from counts of its bits, eight at a time (`_count_digits`),
then how many above it and equal to it each program has (`_count_kept`), and writes the places in
order (`_write_kept`).
"""

# ruff: noqa: ANN001, ANN202 -- the arguments of a kernel are pointers and scalars of the GPU

from typing import no_type_check

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float, Int64
from torch import Tensor

from lorascope.errors import ConfigError, NumberError

_TILE = 2048  # scores that a program looks at together
_PROGRAMS = 1024  # that choose; each reads the counts of all before it
_DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}  # bytes with bits that are set
_MOST = 1 << 30  # scores: 32-bit places, with room for the last tile
_RADIX = tl.constexpr(256)
_INFINITY = tl.constexpr(0x7F800000)  # bits of +inf in float32; those of a NaN are above


@torch.no_grad()
def best_places(
    scores: Float[Tensor, "batch latent"], n: int, *, signed: bool = False
) -> tuple[Int64[Tensor, "n"], Int64[Tensor, ""]]:
    """Return the flat places, rising, of the `n` largest positive scores, and how many there are.

    Of equal scores those at lower places are taken. `signed` ranks by absolute value. Where fewer
    are positive, the rest of the places repeats the last one of the scores, which `cuda.py` gives
    the value 0. There are never more places than scores. A NaN is never chosen. Raises NumberError
    for scores that are not bfloat16, float16 or float32, and ConfigError for more than 2**30.
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
        _maxima[grid](flat, maxima, numel, SIGNED=signed, ROWS=rows, WIDTH=width)
        blocks, n_blocks = _choose(maxima, n, n_digits, numel - 1)
        if width == 1:
            return blocks, n_blocks
        bits = torch.empty(n * width, dtype=torch.int32, device=flat.device)
        _gather_bits[(triton.cdiv(n, rows),)](
            flat, blocks, n_blocks, bits, numel, n, SIGNED=signed, ROWS=rows, WIDTH=width
        )
        return _choose(bits, n, n_digits, numel - 1, blocks, width)


def block_width(numel: int, n: int) -> int:
    """Return how many scores a block has: a power of two that makes the work after it least.

    `numel / width` maxima and then `n * width` scores are searched. 1 where blocks save nothing.
    """
    width = 1
    while width < 128 and width * width * 2 * n < numel:
        width *= 2
    return width if width >= 4 else 1


def _choose(
    bits: Tensor, n: int, n_digits: int, fill: int, blocks: Tensor | None = None, width: int = 1
) -> tuple[Tensor, Tensor]:
    """Choose as `best_places` does among bits, which are those of `blocks` or of all scores."""
    numel = len(bits)
    n_tiles = -(-numel // _TILE)
    grid = (min(n_tiles, _PROGRAMS),)
    n_tiles = -(-n_tiles // grid[0])
    digits = torch.zeros(n_digits, _RADIX.value, dtype=torch.int32, device=bits.device)
    kept = torch.empty(2, grid[0], dtype=torch.int32, device=bits.device)
    places = torch.full((n,), fill, dtype=torch.int64, device=bits.device)
    count = torch.empty((), dtype=torch.int64, device=bits.device)
    for i in range(n_digits):
        _count_digits[grid](bits, numel, n_tiles, digits, n, DIGIT=i, TILE=_TILE)
    _count_kept[grid](bits, numel, n_tiles, digits, n, kept, N_DIGITS=n_digits, TILE=_TILE)
    _write_kept[grid](
        *(bits, numel, n_tiles, digits, n, kept),
        places if blocks is None else blocks,  # not read where the width is 1
        *(places, count),
        N_DIGITS=n_digits,
        BEFORE=triton.next_power_of_2(grid[0]),
        TILE=_TILE,
        WIDTH=width,
    )
    return places, count


@triton.jit
@no_type_check
def _bits(scores, place, live, SIGNED: tl.constexpr):
    """Return the bits of positive scores as float32, and 0 for all others."""
    score = tl.load(scores + place, mask=live, other=0.0)
    if scores.dtype.element_ty == tl.bfloat16:  # its bits, as a conversion may flush denormals
        bits = score.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = score.to(tl.float32).to(tl.int32, bitcast=True)
    if SIGNED:
        bits = bits & 0x7FFFFFFF
    return tl.where((bits > 0) & (bits <= _INFINITY), bits, 0)


@triton.jit
@no_type_check
def _maxima(scores, maxima, numel, SIGNED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Write the bits of the largest score of each block of WIDTH."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    bits = _bits(scores, place, place < numel, SIGNED)
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
    SIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the bits of the scores of the chosen blocks, and 0 where a block is missing."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < tl.load(n_blocks)
    block = tl.load(blocks + row, mask=live, other=0).to(tl.int32)
    column = tl.arange(0, WIDTH)[None, :]
    place = block[:, None] * WIDTH + column
    bits = _bits(scores, place, live[:, None] & (place < numel), SIGNED)
    tl.store(out + row[:, None] * WIDTH + column, bits, mask=row[:, None] < n)


@triton.jit
@no_type_check
def _cut(digits, n, N_DIGITS: tl.constexpr):
    """Return the upper bytes of the n-th largest bits, and how many equal to them to take."""
    digit = tl.arange(0, _RADIX)
    bits = tl.full((), 0, tl.int32)
    wanted = tl.full((), 0, tl.int32) + n
    for i in tl.static_range(N_DIGITS):
        here = tl.load(digits + i * _RADIX + digit)
        above = tl.sum(here) - tl.cumsum(here)
        hit = (above < wanted) & (above + here >= wanted)
        bits = bits | (tl.sum(tl.where(hit, digit, 0)) << (24 - 8 * i))
        wanted -= tl.sum(tl.where(hit, above, 0))
    return bits, tl.where(bits > 0, wanted, 0)


@triton.jit
@no_type_check
def _count_digits(bits, numel, n_tiles, digits, n, DIGIT: tl.constexpr, TILE: tl.constexpr):
    """Count the values of one byte among the bits whose upper bytes are those of the n-th."""
    upper, _ = _cut(digits, n, DIGIT)
    counts = tl.zeros((_RADIX,), tl.int32)
    for i in range(n_tiles):
        at = (tl.program_id(0) * n_tiles + i) * TILE + tl.arange(0, TILE)
        here = tl.load(bits + at, mask=at < numel, other=0)
        same = here > 0
        if DIGIT > 0:
            same = same & ((here >> (32 - 8 * DIGIT)) == (upper >> (32 - 8 * DIGIT)))
        counts += tl.histogram((here >> (24 - 8 * DIGIT)) & 0xFF, _RADIX, mask=same)
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
        at = (tl.program_id(0) * n_tiles + i) * TILE + tl.arange(0, TILE)
        here = tl.load(bits + at, mask=at < numel, other=0)
        above += tl.sum((here > last).to(tl.int32))
        equal += tl.sum(((here == last) & (here > 0)).to(tl.int32))
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
    places,
    count,
    N_DIGITS: tl.constexpr,
    BEFORE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the places that are kept, behind those of the programs before this one."""
    last, n_ties = _cut(digits, n, N_DIGITS)
    program = tl.arange(0, BEFORE)
    earlier = program < tl.program_id(0)
    above = tl.sum(tl.load(kept + program, mask=earlier, other=0))
    equal = tl.sum(tl.load(kept + tl.num_programs(0) + program, mask=earlier, other=0))
    done = above + tl.minimum(equal, n_ties)
    for i in range(n_tiles):
        at = (tl.program_id(0) * n_tiles + i) * TILE + tl.arange(0, TILE)
        here = tl.load(bits + at, mask=at < numel, other=0)
        tie = ((here == last) & (here > 0)).to(tl.int32)
        taken = (tie > 0) & (equal + tl.cumsum(tie) <= n_ties)
        keep = (here > last) | taken
        place = at.to(tl.int64)
        if WIDTH > 1:
            place = tl.load(blocks + at // WIDTH, mask=keep, other=0) * WIDTH + at % WIDTH
        tl.store(places + done + tl.cumsum(keep.to(tl.int32)) - 1, place, mask=keep)
        equal += tl.sum(tie)
        done += tl.sum(keep.to(tl.int32))
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(count, done.to(tl.int64))
