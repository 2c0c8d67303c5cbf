"""A run of whole rollouts of a store: where each token stands, and what stands around it."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lorascope.activations.shards import Rows
from lorascope.activations.store import ActivationStore

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it vanishes


@dataclass(frozen=True)
class Span:
    """The rollouts `[first, last)` of a store, by index. Arrays are `(n_rows,)`.

    They are read when they are asked for and then kept: use `anew` where a span lives on.
    `only` are the roles of the tokens that count, all but `special` where it is empty.
    """

    store: ActivationStore
    first: int
    last: int
    only: tuple[str, ...] = ()

    def reopened(self) -> "Span":
        """Return the span without the arrays that it has read."""
        return replace(self)

    @property
    def first_row(self) -> int:
        """Row of the store with which the span begins."""
        return int(self.store.rollout_start[self.first])

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self.store.rollout_start[self.last]) - self.first_row

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """Row of the span with which each rollout begins, `(n_rollouts,)`."""
        return self.store.rollout_start[self.first : self.last] - self.first_row

    def rows(self, start: int, stop: int) -> Rows:
        """Return activations, `(stop - start, d_in)`."""
        return self.store.rows(self.first_row + start, self.first_row + stop)

    @cached_property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """Token ids."""
        return self.store.token_ids_of(self.first_row, self.first_row + self.n_rows)

    @cached_property
    def roles(self) -> npt.NDArray[np.uint8]:
        """Index into `ROLES` of each token."""
        return self.store.roles_of(self.first_row, self.first_row + self.n_rows)

    @cached_property
    def eligible(self) -> npt.NDArray[np.bool_]:
        """Rows that count."""
        return self.store.eligible_of(self.token_ids, self.roles, self.only)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each token's rollout."""
        lengths = np.diff(self.store.rollout_start[self.first : self.last + 1])
        return np.repeat(lengths, lengths)

    @cached_property
    def rollout(self) -> npt.NDArray[np.int64]:
        """Index of each token's rollout in the store."""
        lengths = np.diff(self.store.rollout_start[self.first : self.last + 1])
        return np.repeat(np.arange(self.first, self.last), lengths)

    @cached_property
    def position(self) -> npt.NDArray[np.int64]:
        """Place of each token in its rollout."""
        return np.arange(self.n_rows) - self.starts[self.rollout - self.first]

    @property
    def tenths(self) -> npt.NDArray[np.int64]:
        """Tenth of its rollout in which each token stands, 0 to 9."""
        return self.position * 10 // self.lengths

    def neighbourhoods(self, reach: int) -> npt.NDArray[np.uint64]:
        """Return a hash of the tokens within `reach` places of each token, of its rollout only."""
        value = self.token_ids.astype(np.uint64) + np.uint64(1)
        out = np.zeros(self.n_rows, np.uint64)
        for by in range(-reach, reach + 1):
            at = self.position + by
            shifted = np.zeros_like(value)
            if by < 0:
                shifted[-by:] = value[:by]
            else:
                shifted[: max(len(value) - by, 0)] = value[by:]
            out *= _BASE
            out += np.where((at >= 0) & (at < self.lengths), shifted, np.uint64(0))
        return out
