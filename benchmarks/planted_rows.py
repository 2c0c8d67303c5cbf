"""Make rows with known directions in them, like those of an adapter, to see what training finds.

1. Directions are random unit vectors. Direction i is on in a share of the tokens that falls as
   1 / (i + 1), at most half of them; about 30 are on at a token (Zipf).
2. A direction starts on its own or, half of the time, with its group: the ten with neighbouring
   rates start at the same token, each with its own probability. It stays on for three tokens on
   average (geometric). Starts are Poisson, so the number that are on at once is Poisson too, and in
   expectation the share of tokens with one or more is exactly the requested one.
3. While it is on, its value is log-normal (sigma 0.4, mean 1), drawn again at each token.
4. Every column gets noise of the same size, about 0.25 % of the variance.
5. Every column is multiplied by its own scale, spread evenly in the logarithm over `10**spread`.
   `standardised` undoes this.

All draws come from one generator on the CPU: a seed gives the same rows everywhere.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

HELD_OUT = 32_768  # tokens at the end that are not trained on
ACTIVE = 30.0  # directions that are on at a token, about
STAY = 2 / 3  # chance that a direction is on at the next token as well

_MOST = 0.5  # share of the tokens of the most frequent direction
_GROUP = 10
_SHARED = 0.5  # share of the beginnings that come from the group
_SIGMA = 0.4
_NOISE = 0.05  # noise of a column, as a share of the deviation that the directions give it
_CHUNK = 65_536
_MARGIN = 64  # tokens before a chunk in which a direction can begin


class Planted(NamedTuple):
    """Rows, and the directions that they are sums of, as unit vectors in the units of the rows."""

    rows: Tensor  # (token, d_in)
    directions: Tensor  # (direction, d_in), float32


def planted(
    n_tokens: int,
    d_in: int = 448,
    n_directions: int = 2000,
    seed: int = 0,
    *,
    active: float = ACTIVE,
    spread: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Planted:
    """Return `n_tokens` consecutive rows and the true directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(n_directions, d_in, generator=generator), dim=1)
    scales = 10 ** (spread * (torch.rand(d_in, generator=generator) - 0.5))
    share = rates(n_directions, active)
    noise = _NOISE * (active / d_in) ** 0.5
    rows = torch.empty(n_tokens, d_in, dtype=dtype)
    for chunk in rows.split(_CHUNK):
        tokens, which = firing(len(chunk), share, generator)
        values = torch.randn(len(which), generator=generator) * _SIGMA - _SIGMA**2 / 2
        offsets = torch.searchsorted(tokens, torch.arange(len(chunk)))
        x = embedding_bag(which, directions, offsets, per_sample_weights=values.exp(), mode="sum")
        x += noise * torch.randn(x.shape, generator=generator)
        chunk.copy_(x * scales)
    return Planted(rows, normalize(directions * scales, dim=1))


def rates(n_directions: int, active: float = ACTIVE) -> Tensor:
    """Return the share of the tokens in which each direction is on, float64, falling.

    The shares sum to `active`, or to a little less than half of `n_directions` where that is less.
    """
    rank = torch.arange(1, n_directions + 1, dtype=torch.float64)
    total = min(active, 0.99 * _MOST * n_directions)
    low, high = 0.0, float(n_directions)
    for _ in range(60):
        middle = (low + high) / 2
        if float((middle / rank).clamp(max=_MOST).sum()) < total:
            low = middle
        else:
            high = middle
    return (high / rank).clamp(max=_MOST)


def firing(n_tokens: int, share: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return which direction is on at which token: pairs, each once, by token and direction."""
    n = len(share)
    begins = -torch.log1p(-share) * (1 - STAY)  # a token, for a Poisson number that is on
    span = n_tokens + _MARGIN

    def moments(rate: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.poisson(rate * span, generator=generator).long()
        who = torch.repeat_interleave(torch.arange(len(rate)), counts)
        return who, torch.randint(span, (len(who),), generator=generator) - _MARGIN

    alone, alone_at = moments(begins * (1 - _SHARED))
    padded = torch.nn.functional.pad(begins, (0, -n % _GROUP)).view(-1, _GROUP)
    often = padded.amax(1)
    group, group_at = moments(often)
    joins = torch.rand(len(group), _GROUP, generator=generator) < (
        _SHARED * padded / often[:, None]
    ).float().index_select(0, group)
    event, slot = joins.nonzero(as_tuple=True)
    which = torch.cat([alone, group[event] * _GROUP + slot])
    at = torch.cat([alone_at, group_at[event]])
    length = torch.empty(len(at)).geometric_(1 - STAY, generator=generator).long()
    pair = torch.repeat_interleave(torch.arange(len(at)), length)
    token = at[pair] + torch.arange(len(pair)) - (length.cumsum(0) - length)[pair]
    inside = (token >= 0) & (token < n_tokens)
    key = torch.unique(token[inside] * n + which[pair][inside])
    return key // n, key % n


def column_deviation(rows: Tensor) -> Tensor:
    """Return the standard deviation of every column, float64 `(d_in,)`, read in blocks."""
    mean, square = torch.zeros(2, rows.shape[1], dtype=torch.float64)
    for block in rows.split(_CHUNK):
        mean += block.double().sum(0) / len(rows)
    for block in rows.split(_CHUNK):
        square += (block.double() - mean).square().sum(0) / len(rows)
    return square.sqrt()


def standardised(directions: Tensor, deviation: Tensor) -> Tensor:
    """Return directions as unit vectors of the space in which every column has variance 1."""
    return normalize(directions / deviation.to(directions), dim=1)
