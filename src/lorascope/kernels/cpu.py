"""The operations of `reference.py` in those operations of torch that are fast on a CPU.

`best_places` reads the scores once where the guess is good:

1. Mark the scores above a guessed bound. The guess is that of the caller (the bound of the batch
   before, a little lower) or comes from a sample of the rows.
2. Collect the marks' places: first the words of eight marks that are not zero, then the bytes of
   those, as fewer than one in a hundred is set.
3. With fewer than `n`, lower the bound and mark again; with `n` or more the wanted ones are among
   them, and only they are ordered.

The guess decides the time and never the choice.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag

from lorascope.kernels import Best

_SAMPLE = 1 << 16  # scores from which a bound is guessed
_TRIES = 4  # bounds marked before every positive score is
_LOWER = 0.99  # of a batch's bound: the guess for the next one
_PARTS = 3  # of a row, for each latent wanted


def product(
    x: Float[Tensor, "batch d_in"], weight: Float[Tensor, "latent d_in"], out: Tensor
) -> Float[Tensor, "batch latent"]:
    """Write `x @ weight.T` into `out` and return it.

    float32 goes through oneDNN, which takes half the time of torch's default here and differs from
    it by 1e-6 of the largest value. On CPUs whose matrix unit (AMX) would then compute in bfloat16
    it stays with the default. `out` is used again and again: fresh memory of this size costs the
    operating system as long as the selection.
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


def best_places(
    scores: Float[Tensor, "batch latent"],
    n: int,
    *,
    signed: bool = False,
    bias: Float[Tensor, "latent"] | None = None,
    guess: float | None = None,
) -> Best:
    """Return the `n` largest positive `scores + bias`: their places, rising, and those sums.

    Of equal sums those at lower places are taken; fewer than `n` where fewer are positive.
    `signed` ranks by absolute value. `guess` is a bound that the `n`-th is thought to lie just
    above. The sums are never formed for the whole batch.
    """
    empty = torch.zeros(0, dtype=torch.int64)
    places, values = empty, empty.to(scores.dtype if bias is None else bias.dtype)
    bound = sampled(scores, n, signed, bias) if guess is None or not guess > 0 else guess
    for bound in [bound * 0.8**i for i in range(_TRIES)] + [0.0] if n > 0 else []:
        places, values = _candidates(scores, bound, signed, bias)
        if len(places) >= n:
            break
    if len(places) > n:
        kept, bound = best_among(values, n, signed=signed)
        places, values = places[kept], values[kept]
    return Best(places, values, _LOWER * bound)


def best_among(
    values: Float[Tensor, "candidate"], n: int, *, signed: bool = False
) -> tuple[Bool[Tensor, "candidate"], float]:
    """Say which of more than `n` candidates, in the order of their places, are the best `n`.

    The second value is the least size that is kept.
    """
    size = values.abs() if signed else values
    # topk does not say which of equal values it takes: only the smallest kept value is used
    last = torch.topk(size, n, sorted=False).values.min()
    keep = size > last
    ties = torch.nonzero(size == last)[: n - int(keep.sum()), 0]
    keep[ties] = True
    return keep, float(last)


def best_of_rows(scores: Float[Tensor, "batch latent"], k: float, *, signed: bool = False) -> Best:
    """Return the `k` largest positive scores of each row, as `best_places` does.

    A fraction of `k` is spent on the batch: of the candidates that come next in each row, the best
    `round((k - floor(k)) * batch)` are kept. Of equal scores the lower latent is taken, and then
    the lower row.

    Each row is cut into parts. As many scores as parts are at or above the `k`-th largest of the
    parts' maxima, so that those at or above it hold the row's best, and are few.
    """
    batch, width = scores.shape
    wide = min(math.ceil(k), width)
    if batch == 0 or wide == 0:
        return Best(torch.zeros(0, dtype=torch.int64), scores.new_zeros(0), 0.0)
    bound = reached(scores, wide, signed).clamp_(min=_least(scores))
    marks = scores >= bound
    if signed:
        marks |= scores <= -bound
    places = set_places(marks)
    values = scores.view(-1)[places]
    kept = best_among_rows(places, values, scores.shape, k, signed=signed)
    return Best(places[kept], values[kept], 0.0)


def best_among_rows(
    places: Int64[Tensor, "candidate"],
    values: Float[Tensor, "candidate"],
    shape: tuple[int, ...],
    k: float,
    *,
    signed: bool = False,
) -> Bool[Tensor, "candidate"]:
    """Say which candidates are the best of their rows; every row's best are among them.

    `places` rise, in scores of `shape`.
    """
    batch, width = shape
    whole, wide = math.floor(k), min(math.ceil(k), width)
    starts = torch.searchsorted(places, torch.arange(batch + 1) * width)
    counts = starts.diff()
    rows = torch.repeat_interleave(counts)
    columns = torch.arange(len(places)) - starts[rows]
    table = values.new_zeros(batch, max(int(counts.max()), wide))
    table[rows, columns] = values.abs() if signed else values
    best = torch.topk(table, wide).values
    last, allowed = best[:, -1:], torch.full((batch, 1), wide)
    if wide > whole:  # the candidates for the fraction
        extra = torch.zeros(batch, 1, dtype=torch.bool)
        extra[best[:, -1].argsort(descending=True, stable=True)[: round((k - whole) * batch)]] = 1
        before = best[:, -2:-1] if whole else torch.full_like(last, torch.inf)
        last, allowed = torch.where(extra, last, before), whole + extra.long()
    keep = table >= last
    crowded = (keep.sum(1, keepdim=True) > allowed)[:, 0]
    if crowded.any():  # by equal scores: the lower latents
        here, bar = table[crowded], last[crowded]
        free = allowed[crowded] - (here > bar).sum(1, keepdim=True)
        keep[crowded] = (here > bar) | ((here == bar) & ((here == bar).cumsum(1) <= free))
    return keep[rows, columns] & ((values != 0) if signed else (values > 0))


def reached(
    scores: Float[Tensor, "batch latent"], n: int, signed: bool
) -> Float[Tensor, "batch 1"]:
    """Return of each row a size that `n` scores or more reach, and not many more."""
    return torch.topk(_part_maxima(scores, n, signed), n, sorted=False).values.amin(1, True)


def _part_maxima(
    scores: Float[Tensor, "batch latent"], wanted: int, signed: bool
) -> Float[Tensor, "batch part"]:
    """Return the largest score of each of several parts of a row: a few times `wanted`, or all."""
    width = scores.shape[1]
    size = width // (_PARTS * wanted)
    if size < 2:
        return scores.abs() if signed else scores
    n = width // size
    body, rest = scores[:, : size * n].unflatten(1, (size, n)), scores[:, size * n :]
    if not signed:
        return torch.cat([body.amax(1), rest], 1)
    return torch.cat([torch.maximum(body.amax(1), -body.amin(1)), rest.abs()], 1)


def _least(scores: Tensor) -> float:
    """Return the smallest positive number of a type."""
    info = torch.finfo(scores.dtype)
    return info.tiny * info.eps


def above(
    scores: Float[Tensor, "batch latent"],
    bound: Float[Tensor, "latent"],
    *,
    bias: Float[Tensor, "latent"],
) -> Best:
    """Return the places, rising, where `scores + bias` is above each latent's own bound."""
    places = set_places(scores > _rounded_down(bound - bias, scores.dtype))
    latents = places % scores.shape[1]
    values = scores.view(-1)[places] + bias[latents]
    true = values > bound[latents]
    return Best(places[true], values[true], 0.0)


def _candidates(
    scores: Float[Tensor, "batch latent"], bound: float, signed: bool, bias: Tensor | None
) -> tuple[Int64[Tensor, "pair"], Float[Tensor, "pair"]]:
    """Return the flat places, rising, and the sums that are above a bound of zero or more."""
    marks = scores > (bound if bias is None else _rounded_down(bound - bias, scores.dtype))
    if signed:
        marks |= scores < (-bound if bias is None else -_rounded_down(bound + bias, scores.dtype))
    places = set_places(marks)
    values = scores.view(-1)[places]
    if bias is None:
        return places, values
    values = values + bias[places % scores.shape[1]]
    true = (values.abs() if signed else values) > bound
    return places[true], values[true]


def _rounded_down(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bound that every score passes whose sum, rounded, is above the wanted one."""
    return (bound - bound.abs() * 2 ** (-6 if dtype == torch.bfloat16 else -20)).to(dtype)


def sampled(
    scores: Float[Tensor, "batch latent"], n: int, signed: bool, bias: Tensor | None
) -> float:
    """Guess a bound that a few more than `n` scores exceed, from evenly spread rows."""
    batch, width = scores.shape
    if scores.numel() == 0:
        return 0.0
    sample = scores[:: max(batch * width // _SAMPLE, 1)]
    sample = (sample if bias is None else sample + bias).flatten()
    if signed:
        sample = sample.abs()
    expected = n * len(sample) / scores.numel()
    rank = int(expected + 4 * math.sqrt(expected) + 8)
    if rank >= len(sample):
        return 0.0
    return max(float(torch.topk(sample, rank, sorted=False).values.min()), 0.0)


def set_places(marks: Bool[Tensor, "batch latent"]) -> Int64[Tensor, "pair"]:
    """Return the flat places of the marks, rising; three times as fast as `nonzero` alone."""
    flat = marks.view(-1)
    if len(flat) % 8:
        return torch.nonzero(flat)[:, 0]
    words = torch.nonzero(flat.view(torch.int64))[:, 0]
    inside = torch.nonzero(flat.view(-1, 8).index_select(0, words))
    return words[inside[:, 0]] * 8 + inside[:, 1]


def by_latent(
    latents: Int64[Tensor, "pair"], n_latents: int
) -> tuple[Int64[Tensor, "pair"], Int64[Tensor, "latent_plus_1"]]:
    """Return the stable order of pairs by latent, and where each latent's pairs begin in it."""
    small = torch.int16 if n_latents < 2**15 else torch.int32
    order = latents.to(small).argsort(stable=True)
    counts = torch.bincount(latents, minlength=n_latents)
    return order, _bounds(counts)


def row_offsets(rows: Int64[Tensor, "pair"], n_rows: int) -> Int64[Tensor, "row_plus_1"]:
    """Return where each row's pairs begin; `rows` rise."""
    return torch.searchsorted(rows, torch.arange(n_rows + 1, device=rows.device))


def _bounds(counts: Int64[Tensor, "bag"]) -> Int64[Tensor, "bag_plus_1"]:
    offsets = counts.new_zeros(len(counts) + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


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

    The operation is the gradient of an embedding bag for its weights, which reads each row once
    and holds no copy of it; `(left[i] * right[j]).sum(1)` takes 50 times as long.
    """
    offsets = row_offsets(left_index, len(left))[:-1]
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_index, offsets, left_index, 0
    )
