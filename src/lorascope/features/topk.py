"""The k strongest firings of every latent, over a stream of any length.

A `TopExamples` holds at most k firings a latent, the best by (value descending, row ascending).
Keeping the best k of a union is associative and commutative, so batches, shards and processes may
come in any order: the result is that of sorting everything. Firings come in batches; they are
buffered, those below the latent's k-th value are dropped at once, and the rest is sorted when the
buffer is full.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

_BUFFER = 1 << 20


class TopExamples:
    """The best firings so far. `add` takes a batch, `merge` another one, `sorted` gives them."""

    def __init__(self, d_sae: int, k: int) -> None:
        self.d_sae = d_sae
        self.k = k
        self._latent = np.zeros(0, np.int64)
        self._value = np.zeros(0, np.float32)
        self._row = np.zeros(0, np.int64)
        self._floor = np.full(d_sae, -np.inf, np.float32)  # k-th value where there are k
        self._waiting: list[tuple[npt.NDArray[Any], ...]] = []
        self._n_waiting = 0

    def add(
        self,
        latents: npt.NDArray[np.int64],
        values: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int64],
    ) -> None:
        """Take firings, `(n,)` each, in any order; a (latent, row) pair comes once at most."""
        kept = values >= self._floor[latents]
        self._waiting.append((latents[kept], values[kept], rows[kept]))
        self._n_waiting += int(kept.sum())
        if self._n_waiting >= _BUFFER:
            self._settle()

    def merge(self, other: "TopExamples") -> None:
        """Take the firings of another stream."""
        other._settle()
        self.add(other._latent, other._value, other._row)

    def sorted(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return `offset (d_sae + 1,)`, and `value` and `row` of the firings of each latent.

        Latent i has those from `offset[i]` to `offset[i + 1]`, strongest first, ties by lower row.
        """
        self._settle()
        counts = np.bincount(self._latent, minlength=self.d_sae)
        offset = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return offset, self._value, self._row

    def _settle(self) -> None:
        """Sort what waits into what is kept, and cut each latent to its k best."""
        if not self._waiting:
            return
        parts = [(self._latent, self._value, self._row), *self._waiting]
        latent, value, row = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        self._waiting, self._n_waiting = [], 0
        order = np.lexsort((row, -value, latent))
        latent, value, row = latent[order], value[order], row[order]
        first = np.searchsorted(latent, np.arange(self.d_sae))
        rank = np.arange(len(latent)) - first[latent]
        self._floor[latent[rank == self.k - 1]] = value[rank == self.k - 1]
        kept = rank < self.k
        self._latent, self._value, self._row = latent[kept], value[kept], row[kept]
