"""Which firings of every latent are kept, over a stream of any length, in bounded memory.

- `TopExamples`: the strongest. (a) In each rollout, of firings whose surroundings are alike, the
  strongest one, and of these the `per_rollout` strongest. (b) Over all rollouts, again the
  strongest of those that are alike, and of these the `k` strongest.
- `FiringSample`: `n` of them drawn at random, each with the same chance: those whose row has the
  lowest hash (a bottom-k sketch, Cohen and Kaplan 2007). The hash is of the row alone, so that two
  latents' samples hold the same rows where they fire together. A latent with at most `n` firings
  has them all.

Ties go to the lower row. What is kept of a union is kept of its parts, so rollouts, shards and
processes may come in any order: the result is that of sorting everything. Firings are buffered,
those that are no match for the latent's last kept one are dropped at once, and the rest is sorted
when the buffer is full.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_BUFFER = 1 << 18
_32 = np.uint64(32)
Whole = npt.NDArray[np.int64]


class Firings(NamedTuple):
    """Firings as columns: `(n,)` each. `group` is equal for firings whose surroundings are."""

    latent: Whole
    value: npt.NDArray[np.float32]
    row: Whole
    rollout: Whole
    group: npt.NDArray[np.uint64]

    def where(self, chosen: npt.NDArray[Any]) -> "Firings":
        """Return those that an index or a mask chooses."""
        latent, value, row, rollout, group = self
        return Firings(latent[chosen], value[chosen], row[chosen], rollout[chosen], group[chosen])

    @classmethod
    def joined(cls, parts: "list[Firings]") -> "Firings":
        """Return the firings of all parts."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    @classmethod
    def none(cls) -> "Firings":
        """Return no firings."""
        whole = np.zeros(0, np.int64)
        return cls(whole, np.zeros(0, np.float32), whole, whole, np.zeros(0, np.uint64))


class _Kept:
    """What `TopExamples` and `FiringSample` share: a buffer, and a bound below which none is kept.

    `bound` is `(d_sae,)`, in keys of `_keys`, of which the lower ones are kept.
    """

    def __init__(self, d_sae: int, n: int) -> None:
        self.d_sae, self.n = d_sae, n
        self.bound = np.full(d_sae, np.iinfo(np.uint32).max, np.uint32)
        self._kept = Firings.none()
        self._waiting: list[Firings] = []
        self._n_waiting = 0
        self._room = max(_BUFFER, n * d_sae)

    def add(self, firings: Firings) -> None:
        """Take firings in any order; a (latent, row) pair comes once at most."""
        self._take(firings, self._keys(firings))
        if self._n_waiting >= self._room:
            self.settle()

    def merge(self, other: "_Kept") -> None:
        """Take what another stream has kept."""
        other.settle()
        self.add(other._kept)

    def sorted(self) -> Firings:
        """Return what is kept, by latent and then by key, best first, ties by lower row."""
        self.settle()
        return self._kept

    def settle(self) -> None:
        """Sort what waits into what is kept."""
        if self._waiting:
            firings = Firings.joined([self._kept, *self._waiting])
            self._waiting, self._n_waiting = [], 0
            self._kept = self._best(firings)

    def _take(self, firings: Firings, keys: npt.NDArray[np.uint32]) -> None:
        able = np.flatnonzero(keys <= self.bound[firings.latent])
        if len(able):
            self._waiting.append(firings.where(able))
            self._n_waiting += len(able)

    def _keys(self, firings: Firings) -> npt.NDArray[np.uint32]:
        raise NotImplementedError

    def _best(self, firings: Firings) -> Firings:
        raise NotImplementedError

    def _first_n(self, firings: Firings) -> Firings:
        """Return the `n` first of each latent, of firings in order, and raise the bound."""
        rank = rank_in_run(firings.latent)
        last = firings.where(rank == self.n - 1)
        self.bound[last.latent] = self._keys(last)
        return firings.where(rank < self.n)


class TopExamples(_Kept):
    """The strongest firings of each latent.

    `per_rollout` None sets no limit. Alike are firings of one `group`.
    """

    def __init__(self, d_sae: int, k: int, per_rollout: int | None = None) -> None:
        super().__init__(d_sae, k)
        self.per_rollout = per_rollout
        self._open = Firings.none()  # of the rollout that is not complete yet

    def add(self, firings: Firings, *, open_from: int | None = None) -> None:
        """Take firings. Rows from `open_from` on are of a rollout of which more will come.

        What of a rollout is kept can be said when it is complete.
        """
        if self.per_rollout is None or (open_from is None and not len(self._open.row)):
            super().add(firings)
            return
        firings = Firings.joined([self._open, firings])
        firings = firings.where(self._keys(firings) <= self.bound[firings.latent])
        is_open = firings.row >= (np.iinfo(np.int64).max if open_from is None else open_from)
        self._open = firings.where(is_open)
        super().add(firings.where(~is_open))

    def _keys(self, firings: Firings) -> npt.NDArray[np.uint32]:
        return _falling(firings.value)

    def _best(self, firings: Firings) -> Firings:
        firings = firings.where(_order(firings.latent, self._keys(firings), firings.row))
        if self.per_rollout is not None:
            place = _mixed(firings.latent, firings.rollout)
            firings = firings.where(_is_first(_mixed(place, firings.group)))
            place = _mixed(firings.latent, firings.rollout)
            firings = firings.where(_rank_among(place) < self.per_rollout)
        firings = firings.where(_is_first(_mixed(firings.latent, firings.group)))
        return self._first_n(firings)


class FiringSample(_Kept):
    """A random sample of each latent's firings."""

    def _keys(self, firings: Firings) -> npt.NDArray[np.uint32]:
        return row_hash(firings.row)

    def _best(self, firings: Firings) -> Firings:
        return self._first_n(
            firings.where(_order(firings.latent, self._keys(firings), firings.row))
        )


def row_hash(rows: Whole) -> npt.NDArray[np.uint32]:
    """Return the hash that decides which rows are sampled (the finaliser of splitmix64)."""
    return (_finalised(rows.astype(np.uint64)) >> _32).astype(np.uint32)


def _falling(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Return keys that fall as the values rise: positive floats are in the order of their bits."""
    return ~np.ascontiguousarray(values).view(np.uint32)


def _finalised(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mixed(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return a number for each pair of numbers; that two pairs share one is less than 1 in 2**63.

    A clash would drop one example.
    """
    return _finalised(_finalised(first.astype(np.uint64)) ^ second.astype(np.uint64))


def _order(latent: Whole, key: npt.NDArray[np.uint32], row: npt.NDArray[np.integer[Any]]) -> Whole:
    """Return the order by latent, key and row.

    One sort of packed numbers, which need not be stable; equal ones are then put in order.
    """
    packed = (latent.astype(np.uint64) << _32) | key
    order = np.argsort(packed)
    packed = packed[order]
    level = packed[1:] == packed[:-1]
    if level.any():
        among = np.zeros(len(order), bool)
        among[1:] |= level
        among[:-1] |= level
        at = np.flatnonzero(among)
        tied = order[at]
        order[at] = tied[np.lexsort((row[tied], packed[at]))]
    return order


def rank_in_run(values: npt.NDArray[Any]) -> Whole:
    """Return each place's number in its run of equal values."""
    starts = np.flatnonzero(np.concatenate([[len(values) > 0], values[1:] != values[:-1]]))
    lengths = np.diff(np.append(starts, len(values)))
    return np.arange(len(values)) - np.repeat(starts, lengths)


def _rank_among(values: npt.NDArray[np.uint64]) -> Whole:
    """Return for each place how many equal values stand before it."""
    order = np.argsort(values, kind="stable")
    rank = np.empty(len(values), np.int64)
    rank[order] = rank_in_run(values[order])
    return rank


def _is_first(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Say which places are the first of their value."""
    _, first = np.unique(values, return_index=True)
    found = np.zeros(len(values), bool)
    found[first] = True
    return found


def ranked(
    owner: Whole,
    item: npt.NDArray[np.integer[Any]],
    score: npt.NDArray[np.floating[Any]],
    n_latents: int,
    width: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return each latent's best items and their scores, `(n_latents, width)`, best first.

    `owner` says whose each item is; scores are positive. Of scores that are equal in float32 the
    lower item comes first; -1 and NaN fill up.
    """
    ids = np.full((n_latents, width), -1, np.int32)
    scores = np.full((n_latents, width), np.nan, np.float32)
    order = _order(owner, _falling(score.astype(np.float32)), item)
    rank = rank_in_run(owner[order])
    order, rank = order[rank < width], rank[rank < width]
    ids[owner[order], rank] = item[order]
    scores[owner[order], rank] = score[order]
    return ids, scores
