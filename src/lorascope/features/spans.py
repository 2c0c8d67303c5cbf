"""Runs of whole rollouts of a store: the unit in which collect reads it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorascope.activations.shards import Rows
from lorascope.activations.store import ActivationStore
from lorascope.texts.roles import ROLES, SPECIAL, has_role

N_TENTHS = 10
_ROWS = 1 << 18  # rows of a span, at least
_ROWS_PER_LATENT = 64  # and for each latent, so that a span's file is much smaller than its rows
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is zero


@dataclass(frozen=True)
class Span:
    """The rollouts `[first, last)` of a store, by index. Arrays have one entry a row, `(n_rows,)`.

    Arrays are read or computed when they are asked for, and not kept. Only tokens with one of the
    roles in `only_roles` are read.
    """

    store: ActivationStore
    first: int
    last: int
    only_roles: tuple[str, ...] = ROLES

    @property
    def first_row(self) -> int:
        """First row of the span in the store."""
        return int(self.store.rollout_start[self.first])

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self.store.rollout_start[self.last]) - self.first_row

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """First row of each rollout, counted from the start of the span, `(n_rollouts,)`."""
        return self.store.rollout_start[self.first : self.last] - self.first_row

    def rows(self, start: int, stop: int) -> Rows:
        """Return the activations of rows `[start, stop)` of the span, `(stop - start, d_in)`."""
        return self.store.rows(self.first_row + start, self.first_row + stop)

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """Token ids."""
        return self.store.token_ids_of(self.first_row, self.first_row + self.n_rows)

    @property
    def roles(self) -> npt.NDArray[np.uint8]:
        """Index of each token's role in `ROLES`."""
        return self.store.roles_of(self.first_row, self.first_row + self.n_rows)

    @property
    def read(self) -> npt.NDArray[np.bool_]:
        """Mask of the tokens that are read."""
        return has_role(self.roles, self.only_roles)

    @property
    def eligible(self) -> npt.NDArray[np.bool_]:
        """Mask of the tokens of text that are read: statistics and examples are of these."""
        return self.read & (self.roles != SPECIAL)

    @property
    def _lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.store.rollout_start[self.first : self.last + 1])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens in each token's rollout."""
        return np.repeat(self._lengths, self._lengths)

    @property
    def rollout(self) -> npt.NDArray[np.int64]:
        """Index of each token's rollout in the store."""
        return np.repeat(np.arange(self.first, self.last), self._lengths)

    @property
    def position(self) -> npt.NDArray[np.int64]:
        """Position of each token in its rollout."""
        return np.arange(self.n_rows) - self.starts[self.rollout - self.first]

    @property
    def tenth(self) -> npt.NDArray[np.int64]:
        """Tenth of its rollout that each token is in, 0 to 9."""
        return self.position * N_TENTHS // self.lengths

    def context_hashes(self, before: int, after: int) -> npt.NDArray[np.uint64]:
        """Return a hash of each token's context: itself, `before` tokens before and `after` after.

        Tokens of other rollouts are not part of it.
        """
        value = self.token_ids.astype(np.uint64) + np.uint64(1)
        position, lengths = self.position, self.lengths
        out = np.zeros(self.n_rows, np.uint64)
        for offset in range(-before, after + 1):
            at = position + offset
            shifted = np.zeros_like(value)
            if offset < 0:
                shifted[-offset:] = value[:offset]
            else:
                shifted[: max(len(value) - offset, 0)] = value[offset:]
            out *= _BASE
            out += np.where((at >= 0) & (at < lengths), shifted, np.uint64(0))
        return out


def cut_spans(
    store: ActivationStore, n_rollouts: int, d_sae: int, only_roles: tuple[str, ...] = ROLES
) -> list[Span]:
    """Cut the first rollouts into spans of at least `max(2**18, 64 * d_sae)` rows each.

    A span's file takes less than 3 kB for each latent, however many rows it has, at `k` 10.
    """
    min_rows = max(_ROWS, _ROWS_PER_LATENT * d_sae)
    spans, first = [], 0
    for rollout in range(1, n_rollouts + 1):
        n_rows = store.rollout_start[rollout] - store.rollout_start[first]
        if n_rows >= min_rows or rollout == n_rollouts:
            spans.append(Span(store, first, rollout, only_roles))
            first = rollout
    return spans
