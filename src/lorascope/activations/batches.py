"""Rows of a store as training batches: shuffled, repeatable, addressable by number.

1. `split_rows` parts the eligible rows into training and held-out rows, by whole rollouts.
2. A `BatchPlan` lays the training rows out epoch after epoch, each in a permutation of all of
   them that depends on the seed and the epoch's number alone.
3. Batch i is places `[i * batch_size, (i + 1) * batch_size)` of that line, so that a resumed run
   goes on exactly where it stopped and no row is left out at an epoch's end.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.activations.store import ActivationStore, Rows
from lorascope.errors import ArtifactError, NumberError

RowNumbers = npt.NDArray[np.int64]
_CHUNK = 4096  # rows read at once: they are still in the cache when they are checked
_READERS = 4  # threads that load a store
_IN_MEMORY = 4 << 30  # bytes of activations kept in RAM; a larger selection is read row by row


def split_rows(store: ActivationStore, holdout: float, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """Return the eligible rows as `(training, held out)`, each in rising order.

    Whole rollouts are held out, chosen by a permutation from `seed`, until they have the share
    `holdout` of the rows or a little less, but at least one; a store whose eligible rows are all
    of one rollout is split by row. Raises ArtifactError when there are fewer than two rows.
    """
    rows = np.flatnonzero(store.eligible)
    if len(rows) < 2:
        raise ArtifactError(
            f"{store.path} has {len(rows)} tokens to train on, expected two or more; generate more"
        )
    groups = store.rollout_of(rows)
    if groups[0] == groups[-1]:
        groups = np.arange(len(rows))
    names, sizes = np.unique(groups, return_counts=True)
    order = np.random.default_rng([seed, 0]).permutation(len(names))
    n_held = int(np.searchsorted(np.cumsum(sizes[order]), holdout * len(rows), side="right"))
    held = np.isin(groups, names[order[: min(max(n_held, 1), len(names) - 1)]])
    return rows[~held], rows[held]


def require_finite(values: Rows, rows: RowNumbers, store: ActivationStore) -> None:
    """Raise NumberError naming the row, the rollout and the column of the first NaN or infinity."""
    if _all_finite(torch.from_numpy(values)):
        return
    index, column = np.argwhere(~np.isfinite(values))[0]
    rollout = store.rollout_id[store.rollout_of(rows[index : index + 1])[0]]
    raise NumberError(
        f"{store.path}: row {rows[index]} (rollout {rollout}) is {values[index, column]} in column "
        f"{column} ({store.layout.column_names[column]}), expected a finite number; generate it "
        "again, with --dtype float32 if float16 overflowed"
    )


def _all_finite(values: Tensor) -> bool:
    """Say whether no value is NaN or infinite: such a one has all bits of the exponent set.

    Four times as fast as `isfinite` where most of the time goes into reading: float16.
    """
    if not values.numel():
        return True
    whole, exponent = {2: (torch.int16, 0x7C00), 4: (torch.int32, 0x7F800000)}[
        values.element_size()
    ]
    return int((values.view(whole) & torch.iinfo(whole).max).max()) < exponent


def read_blocks(
    store: ActivationStore, rows: RowNumbers, size: int = 8192
) -> Iterator[Float[Tensor, "_ d_in"]]:
    """Yield the given rows in the given order as float32, at most `size` at a time."""
    for start in range(0, len(rows), size):
        here = rows[start : start + size]
        values = store.take(here)
        require_finite(values, here, store)
        yield torch.from_numpy(values).float()  # torch widens float16 much faster than NumPy


@dataclass(frozen=True)
class BatchPlan:
    """The order in which training sees the rows of a store.

    `rows` are the training rows; `loaded` holds their activations in the stored dtype, or is None
    where they are too large to keep and every batch is read from the files.
    """

    store: ActivationStore
    rows: RowNumbers
    batch_size: int
    seed: int
    loaded: Rows | None = field(repr=False)
    _orders: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        store: ActivationStore,
        rows: RowNumbers,
        batch_size: int,
        seed: int,
        *,
        in_memory: int = _IN_MEMORY,
    ) -> "BatchPlan":
        """Make a plan; activations of up to `in_memory` bytes are loaded now.

        Raises ArtifactError when there are fewer rows than one batch holds, NumberError when a
        loaded activation is not finite.
        """
        if len(rows) < batch_size:
            raise ArtifactError(
                f"{store.path} has {len(rows)} training tokens, fewer than one batch of "
                f"{batch_size}; lower --batch-size, or generate more"
            )
        loaded = None
        if len(rows) * store.d_in * store.dtype.itemsize <= in_memory:
            loaded = np.empty((len(rows), store.d_in), store.dtype)
            into = loaded

            def load(start: int) -> None:
                here = rows[start : start + _CHUNK]
                into[start : start + _CHUNK] = store.take(here)
                require_finite(into[start : start + _CHUNK], here, store)

            with ThreadPoolExecutor(_READERS) as pool:  # one waits for the disk, others copy
                for _ in pool.map(load, range(0, len(rows), _CHUNK)):
                    pass  # a chunk's error is raised here, the first one's first
        return cls(store, rows, batch_size, seed, loaded)

    def n_batches(self, epochs: int) -> int:
        """Return how many whole batches `epochs` passes over the rows make."""
        return epochs * len(self.rows) // self.batch_size

    def batch(self, number: int) -> Float[Tensor, "batch d_in"]:
        """Return batch `number` as float32; raises NumberError at a value that is not finite."""
        places = self.places(number)
        if self.loaded is not None:
            return torch.from_numpy(self.loaded).index_select(0, torch.from_numpy(places)).float()
        return next(read_blocks(self.store, self.rows[places], self.batch_size))

    def places(self, number: int) -> RowNumbers:
        """Return the indices into `rows` of batch `number`, `(batch_size,)`."""
        first = number * self.batch_size
        parts: list[npt.NDArray[Any]] = []
        while (missing := self.batch_size - sum(map(len, parts))) > 0:
            epoch, begin = divmod(first + self.batch_size - missing, len(self.rows))
            parts.append(self._order(epoch)[begin : begin + missing])
        return np.concatenate(parts)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]  # a batch touches two epochs at most
            generator = np.random.default_rng([self.seed, 1, epoch])
            self._orders[epoch] = generator.permutation(len(self.rows))
        return self._orders[epoch]
