"""The order in which training sees rows: shuffled on two levels, so that files are read in runs.

An epoch has every row once. The rows are cut into runs of consecutive rows, the runs are permuted,
the line of runs is cut into pools of equal size, at most `buffer_rows` rows each, and each pool is
emitted in a permutation of its rows. The order depends on the seed, the epoch's number and
`buffer_rows` alone: not on batches, threads or processes.

How well that mixes: a run has 256 rows, or a 1,024th of `buffer_rows` if that is less, and a pool
more than half of `buffer_rows`. Two rows emitted one after the other are any two of a pool, so
they come from one run with a chance of run / pool: less than 1 in 512. Rows of one rollout meet at
most that much more often than in a permutation of the whole store. Several pools of 1,024 rows or
more have over 1,024 runs, so the rank correlation of the order emitted with the store's has a mean
absolute value of 0.8 / sqrt(1024) = 0.025 at most.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]
_RUN = 256  # rows of a run at most: 224 KiB where a row has 448 columns, a long read
_RUNS_OF_A_BUFFER = 1024  # at least: runs are shorter in a smaller buffer


@dataclass(frozen=True)
class Shuffle:
    """The order of `n_rows` places, epoch after epoch; pools are numbered on through all epochs."""

    n_rows: int
    buffer_rows: int
    seed: int

    @property
    def n_pools(self) -> int:
        """Number of pools in an epoch."""
        return -(-self.n_rows // self.buffer_rows)

    def first(self, pool: int) -> int:
        """Return the position in the line of a pool's first row."""
        epoch, number = divmod(pool, self.n_pools)
        return epoch * self.n_rows + number * self.n_rows // self.n_pools

    def pool_at(self, position: int) -> int:
        """Return the pool that holds a position: the last one that begins there or before."""
        epoch, at = divmod(position, self.n_rows)
        return epoch * self.n_pools + ((at + 1) * self.n_pools - 1) // self.n_rows

    def places(self, pool: int) -> Places:
        """Return the places of a pool's rows in the order in which they are emitted."""
        epoch, number = divmod(pool, self.n_pools)
        begin, end = (self.first(p) - epoch * self.n_rows for p in (pool, pool + 1))
        places, ends = self.runs(epoch)
        here = slice(
            int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end)) + 1
        )
        lengths = np.diff(ends[: here.stop], prepend=0)[here]
        skipped = np.maximum(begin - (ends[here] - lengths), 0)  # a pool's end may cut a run
        lower = places[here] + skipped
        upper = places[here] + lengths - np.maximum(ends[here] - end, 0)
        spans = zip(np.sort(lower).tolist(), np.sort(upper).tolist(), strict=True)
        rising = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in spans])
        return np.random.default_rng([self.seed, 1, epoch, number]).permutation(rising)

    @lru_cache(maxsize=2)  # noqa: B019 - keyed by value; a batch touches two epochs
    def runs(self, epoch: int) -> tuple[Places, Places]:
        """Return each run's first place, and where it ends in the epoch's line of runs."""
        length = min(max(self.buffer_rows // _RUNS_OF_A_BUFFER, 1), _RUN)
        starts = np.arange(0, self.n_rows, length, dtype=np.int64)
        starts = np.random.default_rng([self.seed, 2, epoch]).permutation(starts)
        return starts, np.cumsum(np.minimum(length, self.n_rows - starts))
