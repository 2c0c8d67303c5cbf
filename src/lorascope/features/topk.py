"""Keep the best firings of every latent, over a stream of any length, in bounded memory.

- `TopExamples` keeps the strongest. In each rollout, only the strongest firing of each context (the
  tokens around it) counts, and of these only the `per_rollout` strongest. Over all rollouts, again
  only the strongest of each context counts, and of these the `k` strongest are kept.
- `FiringSample` keeps `n` at random, each with the same chance: those whose row has the lowest hash
  (a bottom-k sketch, Cohen and Kaplan 2007). The hash depends on the row only, so the samples of
  two latents that fire together contain the same rows. A latent with at most `n` firings keeps all.

Ties go to the lower row. The best of a union are among the best of its parts, so rollouts, shards
and processes may come in any order: the result equals sorting everything. Firings wait in a buffer.
Those that cannot beat the latent's last kept firing are dropped at once; the rest is sorted when
the buffer is full.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_BUFFER = 1 << 18
_32 = np.uint64(32)
Ints = npt.NDArray[np.int64]


class Firings(NamedTuple):
    """Firings as columns, `(n,)` each. `context` is a number that equal contexts share."""

    latent: Ints
    value: npt.NDArray[np.float32]
    row: Ints
    rollout: Ints
    context: npt.NDArray[np.uint64]

    def select(self, chosen: npt.NDArray[Any]) -> "Firings":
        """Return the firings that an index array or a mask chooses."""
        return Firings._make(column[chosen] for column in self)

    @classmethod
    def concatenate(cls, parts: "list[Firings]") -> "Firings":
        """Return the firings of all parts, in order."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    @classmethod
    def empty(cls) -> "Firings":
        """Return no firings."""
        ints = np.zeros(0, np.int64)
        return cls(ints, np.zeros(0, np.float32), ints, ints, np.zeros(0, np.uint64))


class _BestN:
    """What `TopExamples` and `FiringSample` share: a buffer, and a cut-off for each latent.

    Firings are ordered by `_keys`, lower is better. `cutoff` `(d_sae,)` is the highest key that can
    still be kept.
    """

    def __init__(self, d_sae: int, n: int) -> None:
        self.d_sae, self.n = d_sae, n
        self.cutoff = np.full(d_sae, np.iinfo(np.uint32).max, np.uint32)
        self._kept = Firings.empty()
        self._buffer: list[Firings] = []
        self._n_buffered = 0
        self._buffer_size = max(_BUFFER, n * d_sae)

    def add(self, firings: Firings) -> None:
        """Add firings in any order. A (latent, row) pair must come only once."""
        able = np.flatnonzero(self._keys(firings) <= self.cutoff[firings.latent])
        if len(able):
            self._buffer.append(firings.select(able))
            self._n_buffered += len(able)
        if self._n_buffered >= self._buffer_size:
            self.flush()

    def merge(self, other: "_BestN") -> None:
        """Add what another stream kept."""
        self.add(other.sorted())

    def sorted(self) -> Firings:
        """Return the kept firings by latent, then best first; ties by lower row."""
        self.flush()
        return self._kept

    def flush(self) -> None:
        """Sort the buffer into the kept firings."""
        if self._buffer:
            firings = Firings.concatenate([self._kept, *self._buffer])
            self._buffer, self._n_buffered = [], 0
            self._kept = self._best(firings)

    def _keys(self, firings: Firings) -> npt.NDArray[np.uint32]:
        raise NotImplementedError

    def _best(self, firings: Firings) -> Firings:
        raise NotImplementedError

    def _first_n(self, firings: Firings) -> Firings:
        """Return the first `n` of each latent from sorted firings, and lower the cut-offs."""
        rank = rank_in_run(firings.latent)
        last = firings.select(rank == self.n - 1)
        self.cutoff[last.latent] = self._keys(last)
        return firings.select(rank < self.n)


class TopExamples(_BestN):
    """The strongest firings of each latent; `per_rollout` None sets no limit."""

    def __init__(self, d_sae: int, k: int, per_rollout: int | None = None) -> None:
        super().__init__(d_sae, k)
        self.per_rollout = per_rollout
        self._open = Firings.empty()  # of the rollout that is not complete yet

    def add(self, firings: Firings, *, open_from: int | None = None) -> None:
        """Add firings. Rows from `open_from` on belong to a rollout that is not complete yet.

        They wait until it is, because `per_rollout` needs all firings of a rollout.
        """
        if self.per_rollout is None or (open_from is None and not len(self._open.row)):
            super().add(firings)
            return
        firings = Firings.concatenate([self._open, firings])
        firings = firings.select(self._keys(firings) <= self.cutoff[firings.latent])
        is_open = firings.row >= (np.iinfo(np.int64).max if open_from is None else open_from)
        self._open = firings.select(is_open)
        super().add(firings.select(~is_open))

    def _keys(self, firings: Firings) -> npt.NDArray[np.uint32]:
        return _descending_keys(firings.value)

    def _best(self, firings: Firings) -> Firings:
        firings = firings.select(_order(firings.latent, self._keys(firings), firings.row))
        if self.per_rollout is not None:
            in_rollout = _pair_hash(firings.latent, firings.rollout)
            firings = firings.select(_rank(_pair_hash(in_rollout, firings.context)) < 1)
            in_rollout = _pair_hash(firings.latent, firings.rollout)
            firings = firings.select(_rank(in_rollout) < self.per_rollout)
        firings = firings.select(_rank(_pair_hash(firings.latent, firings.context)) < 1)
        return self._first_n(firings)


class FiringSample(_BestN):
    """A random sample of each latent's firings."""

    def _keys(self, firings: Firings) -> npt.NDArray[np.uint32]:
        return row_hash(firings.row)

    def _best(self, firings: Firings) -> Firings:
        order = _order(firings.latent, self._keys(firings), firings.row)
        return self._first_n(firings.select(order))


def row_hash(rows: Ints) -> npt.NDArray[np.uint32]:
    """Return the hash that decides which rows are sampled (the finaliser of splitmix64)."""
    return (_splitmix64(rows.astype(np.uint64)) >> _32).astype(np.uint32)


def _descending_keys(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Return keys that fall as values rise: positive floats have the order of their bits."""
    return ~np.ascontiguousarray(values).view(np.uint32)


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _pair_hash(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each pair of numbers.

    Two pairs collide with a chance below 1 in 2**63. A collision would drop one example.
    """
    return _splitmix64(_splitmix64(first.astype(np.uint64)) ^ second.astype(np.uint64))


def _order(latent: Ints, key: npt.NDArray[np.uint32], row: npt.NDArray[np.integer[Any]]) -> Ints:
    """Return the order by latent, then key, then row.

    One unstable sort of packed (latent, key) numbers, after which ties are put in order.
    """
    packed = (latent.astype(np.uint64) << _32) | key
    order = np.argsort(packed)
    packed = packed[order]
    equals_next = packed[1:] == packed[:-1]
    if equals_next.any():
        is_tied = np.zeros(len(order), bool)
        is_tied[1:] |= equals_next
        is_tied[:-1] |= equals_next
        at = np.flatnonzero(is_tied)
        tied = order[at]
        order[at] = tied[np.lexsort((row[tied], packed[at]))]
    return order


def rank_in_run(values: npt.NDArray[Any]) -> Ints:
    """Return how many equal values stand directly before each value."""
    starts = np.flatnonzero(np.concatenate([[len(values) > 0], values[1:] != values[:-1]]))
    lengths = np.diff(np.append(starts, len(values)))
    return np.arange(len(values)) - np.repeat(starts, lengths)


def _rank(values: npt.NDArray[np.uint64]) -> Ints:
    """Return how many equal values stand anywhere before each value."""
    order = np.argsort(values, kind="stable")
    rank = np.empty(len(values), np.int64)
    rank[order] = rank_in_run(values[order])
    return rank


def best_per_latent(
    latent: Ints,
    item: npt.NDArray[np.integer[Any]],
    score: npt.NDArray[np.floating[Any]],
    n_latents: int,
    n_best: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return each latent's best items and their scores, `(n_latents, n_best)`, best first.

    `latent`, `item` and `score` are columns, `(n,)` each; scores are positive. If scores are equal
    in float32, the lower item comes first. -1 and NaN fill the rest.
    """
    ids = np.full((n_latents, n_best), -1, np.int32)
    scores = np.full((n_latents, n_best), np.nan, np.float32)
    order = _order(latent, _descending_keys(score.astype(np.float32)), item)
    rank = rank_in_run(latent[order])
    order, rank = order[rank < n_best], rank[rank < n_best]
    ids[latent[order], rank] = item[order]
    scores[latent[order], rank] = score[order]
    return ids, scores
