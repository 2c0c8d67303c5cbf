"""Rows of a store as training batches: shuffled, repeatable, addressable by number.

1. `split_rows` divides the rows into training and held-out rows, by whole rollouts.
2. A `BatchPlan` puts the training rows into a sequence, epoch after epoch, in the order that
   `Shuffle` gives. Batch i is `[i * batch_size, (i + 1) * batch_size)` of this sequence, so a
   resumed run continues exactly where it stopped, and no row is skipped at the end of an epoch.
3. If `buffer_rows` covers all rows, they are loaded into memory once. A larger store is streamed:
   the next pool of rows is read while the current one is used.
4. `batches_on` brings the batches to the device. All ways give the same batches.

**The shuffle** has two levels, so that files are read in runs of consecutive rows. The runs are
permuted, their sequence is cut into pools of equal size, at most `buffer_rows` rows each, and the
rows of each pool are permuted. The order depends on the seed, the epoch and `buffer_rows` only.

How well it mixes: a run has 256 rows, or a 1,024th of `buffer_rows` if that is less, and a pool
more than half of `buffer_rows`. Two rows in succession come from one run with a probability of run
/ pool, less than 1 in 512. Several pools of 1,024 rows or more have over 1,024 runs, so the rank
correlation between this order and the store's has a mean absolute value of at most 0.8 / sqrt(1024)
= 0.025.

**Memory**: a stream keeps two pools, in the stored dtype, and 16 bytes for each of their rows. By
default, activations take at most 4 GiB, streamed or not. Files are read, not mapped: a map would
read up to megabytes around each run (18 times the store, measured in 2 GB with a read-ahead of
8 MiB), and the whole store would count as memory of the process.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Event, current_thread

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.activations.shards import Rows
from lorascope.activations.store import ActivationStore
from lorascope.errors import ArtifactError, NumberError
from lorascope.texts.roles import ROLES, has_role

RowNumbers = npt.NDArray[np.int64]
_AHEAD = 2  # batches prepared before they are asked for
_CHUNK = 4096  # rows read at once: they are still in the cache when they are checked
_READERS = 4  # threads that read a store
_THREADS = "lorascope"  # prefix of this module's thread names
_IN_MEMORY = 4 << 30  # bytes of activations kept in RAM, all of them or two pools
_RUN = 256  # most rows in a run: 224 KiB at 448 columns, a long read
_RUNS_PER_BUFFER = 1024  # at least: a smaller buffer has shorter runs
_SENT_TOGETHER = 64  # batches whose row indices go to the GPU in one copy


def split_rows(
    store: ActivationStore, holdout: float, seed: int, roles: Sequence[str] = ROLES
) -> tuple[RowNumbers, RowNumbers]:
    """Return the rows with one of some roles as `(training, held out)`, each in rising order.

    Whole rollouts are held out, at least one, chosen by a permutation from `seed`: as many as fit
    into the share `holdout` of the rows. If all rows are of one rollout, rows are split. Raises
    ConfigError for an unknown role, ArtifactError for fewer than two rows.
    """
    rows = np.flatnonzero(has_role(store.roles, roles))
    if len(rows) < 2:
        counts = np.bincount(store.roles, minlength=len(ROLES))
        counted = ", ".join(f"{role} {n}" for role, n in zip(ROLES, counts, strict=True) if n)
        raise ArtifactError(
            f"{store.path} has {len(rows)} tokens to train on of the roles {', '.join(roles)} (it "
            f"has: {counted or 'none'}), expected two or more; name other roles, or generate more"
        )
    groups = store.rollout_of(rows)
    if groups[0] == groups[-1]:
        groups = np.arange(len(rows))
    names, sizes = np.unique(groups, return_counts=True)
    order = np.random.default_rng([seed, 0]).permutation(len(names))
    n_held = int(np.searchsorted(np.cumsum(sizes[order]), holdout * len(rows), side="right"))
    held = np.isin(groups, names[order[: min(max(n_held, 1), len(names) - 1)]])
    return rows[~held], rows[held]


def halves(store: ActivationStore, rows: RowNumbers) -> tuple[RowNumbers, RowNumbers]:
    """Split held-out rows by alternating rollouts, into rows to calibrate on and rows to report on.

    If all rows are of one rollout, both halves are all rows.
    """
    _, number = np.unique(store.rollout_of(rows), return_inverse=True)
    if not number.any():
        return rows, rows
    return rows[number % 2 == 1], rows[number % 2 == 0]


def require_finite(values: Rows, rows: RowNumbers, store: ActivationStore) -> None:
    """Raise NumberError with row, rollout and column of the first NaN or infinity, if any."""
    if _all_finite(torch.from_numpy(values)):
        return
    index, column = np.argwhere(~np.isfinite(values))[0]
    rollout = store.rollout_id[store.rollout_of(rows[index : index + 1])[0]]
    raise NumberError(
        f"{store.path}: row {rows[index]} (rollout {rollout}) is {values[index, column]} in column "
        f"{column} ({store.layout.column_names[column]}), expected a finite number; generate "
        "again, with --dtype float32 if float16 overflowed"
    )


def _all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite: those have all bits of the exponent set.

    For float16, where reading dominates, this is ten times as fast as `isfinite`. The sum of
    float32 values is faster still, and finite only if all of them are.
    """
    if not values.numel() or (values.dtype == torch.float32 and bool(values.sum().isfinite())):
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
        if (here[1:] > here[:-1]).all():
            values = np.empty((len(here), store.d_in), store.dtype)
            store.read_into(values, here)
        else:
            values = store.take(here)
        require_finite(values, here, store)
        yield torch.from_numpy(values).float()  # torch widens float16 much faster than NumPy


@dataclass(frozen=True)
class Shuffle:
    """The order of `n_rows` row indices, epoch after epoch; pool numbers run through all epochs."""

    n_rows: int
    buffer_rows: int
    seed: int

    @property
    def n_pools(self) -> int:
        """Number of pools in an epoch."""
        return -(-self.n_rows // self.buffer_rows)

    def start_of(self, pool: int) -> int:
        """Return the position in the sequence at which a pool starts."""
        epoch, number = divmod(pool, self.n_pools)
        return epoch * self.n_rows + number * self.n_rows // self.n_pools

    def pool_at(self, position: int) -> int:
        """Return the pool that holds a position of the sequence."""
        epoch, offset = divmod(position, self.n_rows)
        return epoch * self.n_pools + ((offset + 1) * self.n_pools - 1) // self.n_rows

    @lru_cache(maxsize=2)  # noqa: B019 - keyed by value; a batch may touch two pools
    def indices(self, pool: int) -> RowNumbers:
        """Return the indices of a pool's rows, in their order in the sequence."""
        epoch, number = divmod(pool, self.n_pools)
        begin, end = (self.start_of(p) - epoch * self.n_rows for p in (pool, pool + 1))
        starts, ends = self.runs(epoch)
        here = slice(
            int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(ends, end)) + 1
        )
        lengths = np.diff(ends[: here.stop], prepend=0)[here]
        skipped = np.maximum(begin - (ends[here] - lengths), 0)  # a pool's end may cut a run
        lower = starts[here] + skipped
        upper = starts[here] + lengths - np.maximum(ends[here] - end, 0)
        spans = zip(np.sort(lower).tolist(), np.sort(upper).tolist(), strict=True)
        rising = np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in spans])
        return np.random.default_rng([self.seed, 1, epoch, number]).permutation(rising)

    @lru_cache(maxsize=2)  # noqa: B019 - keyed by value; a batch may touch two epochs
    def runs(self, epoch: int) -> tuple[RowNumbers, RowNumbers]:
        """Return the first index of each run, and where it ends in the epoch's sequence."""
        length = min(max(self.buffer_rows // _RUNS_PER_BUFFER, 1), _RUN)
        starts = np.arange(0, self.n_rows, length, dtype=np.int64)
        starts = np.random.default_rng([self.seed, 2, epoch]).permutation(starts)
        return starts, np.cumsum(np.minimum(length, self.n_rows - starts))


@dataclass(frozen=True)
class BatchPlan:
    """The order in which training sees the rows of a store. It holds no thread and no open file.

    `rows` are the training rows. `loaded` holds their activations in the stored dtype, or is None
    if there are more than `buffer_rows`, which are then streamed from the files.
    """

    store: ActivationStore
    rows: RowNumbers
    batch_size: int
    seed: int
    buffer_rows: int
    loaded: Rows | None = field(repr=False)

    @classmethod
    def from_store(
        cls,
        store: ActivationStore,
        rows: RowNumbers,
        batch_size: int,
        seed: int,
        *,
        buffer_rows: int | None = None,
    ) -> "BatchPlan":
        """Make a plan, and load the activations now if there are at most `buffer_rows` rows.

        `buffer_rows` changes the order. None means all rows if they take at most 4 GiB, else as
        many as let two pools take 4 GiB. Raises ArtifactError if there are fewer rows than one
        batch has, NumberError if a loaded activation is not finite.
        """
        if len(rows) < batch_size:
            raise ArtifactError(
                f"{store.path} has {len(rows)} training tokens, fewer than one batch of "
                f"{batch_size}; lower --batch-size, or generate more"
            )
        if buffer_rows is None:
            fitting = _IN_MEMORY // (store.d_in * store.dtype.itemsize)
            buffer_rows = len(rows) if len(rows) <= fitting else max(fitting // 2, 1)
        loaded = None
        if len(rows) <= buffer_rows:
            loaded = into = np.empty((len(rows), store.d_in), store.dtype)

            def load(here: slice) -> None:
                store.read_into(into[here], rows[here])
                require_finite(into[here], rows[here], store)

            _in_chunks(len(rows), load)
        return cls(store, rows, batch_size, seed, buffer_rows, loaded)

    def n_batches(self, epochs: int) -> int:
        """Return the number of whole batches in `epochs` passes over the rows."""
        return epochs * len(self.rows) // self.batch_size

    def batches(
        self, first: int, last: int, part: tuple[int, int] = (0, 1)
    ) -> Generator[Float[Tensor, "_ d_in"]]:
        """Yield batches `first` to `last - 1` in order, as float32.

        One thread prepares two batches ahead. If rows are streamed, another reads the next pool,
        in file order. `part = (rank, world)` yields only rows
        `[rank * B // world, (rank + 1) * B // world)` of each batch of B rows, and reads only them.

        An error of batch i, such as NumberError for a value that is not finite, is raised at batch
        i, not earlier. The threads end when the generator is exhausted, raises, is closed or is
        collected. If it is left open, the process can still exit once the pool being read is
        complete.
        """
        if not first < last:
            return
        here = self.slice_of(part)
        stream = _Stream(self, first, last, here) if self.loaded is None else None

        def prepare(number: int) -> Tensor:
            if stream:
                return stream.batch(number)
            indices = torch.from_numpy(self.indices(number)[here])
            return torch.from_numpy(self.loaded).index_select(0, indices).float()

        # Tasks, not a queue, which could block.
        worker = ThreadPoolExecutor(1, f"{_THREADS}-batches")
        ahead: deque[Future[Tensor]] = deque()
        submitted = iter(range(first, last))
        try:
            for _ in range(first, last):
                while len(ahead) <= _AHEAD and (number := next(submitted, None)) is not None:
                    ahead.append(worker.submit(prepare, number))
                yield ahead.popleft().result()
        finally:
            if stream:
                stream.close()
            worker.shutdown(wait=_may_wait(), cancel_futures=True)

    def indices(self, number: int) -> RowNumbers:
        """Return the indices into `rows` of batch `number`, `(batch_size,)`."""
        shuffle, position = self._shuffle, number * self.batch_size
        end, parts = position + self.batch_size, []
        while position < end:
            pool = shuffle.pool_at(position)
            begin, stop = shuffle.start_of(pool), min(shuffle.start_of(pool + 1), end)
            parts.append(shuffle.indices(pool)[position - begin : stop - begin])
            position = stop
        return np.concatenate(parts)

    def slice_of(self, part: tuple[int, int]) -> slice:
        """Return the rows of a batch that belong to `(rank, world)`."""
        rank, world = part
        return slice(rank * self.batch_size // world, (rank + 1) * self.batch_size // world)

    @property
    def _shuffle(self) -> Shuffle:
        return Shuffle(len(self.rows), self.buffer_rows, self.seed)


def batches_on(
    device: torch.device, plan: BatchPlan, first: int, last: int, part: tuple[int, int] = (0, 1)
) -> Iterator[Float[Tensor, "_ d_in"]]:
    """Yield batches `first` to `last - 1` of a plan on a device, as `BatchPlan.batches` does.

    On CUDA, loaded rows stay on the GPU in the stored dtype if they take less than half of its free
    memory; then only row indices are copied. Otherwise batches are pinned, so that copies wait for
    no computation.
    """
    if device.type != "cuda":
        return (x.to(device) for x in plan.batches(first, last, part))
    if plan.loaded is not None and plan.loaded.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return _from_device_memory(device, plan, first, last, part)
    batches = plan.batches(first, last, part)
    return (x.pin_memory().to(device, non_blocking=True) for x in batches)


def _from_device_memory(
    device: torch.device, plan: BatchPlan, first: int, last: int, part: tuple[int, int] = (0, 1)
) -> Generator[Float[Tensor, "_ d_in"]]:
    """Yield a plan's batches from a copy of its loaded rows on the device."""
    rows = torch.from_numpy(plan.loaded).to(device)
    here = plan.slice_of(part)
    for start in range(first, last, _SENT_TOGETHER):
        numbers = range(start, min(start + _SENT_TOGETHER, last))
        indices = torch.from_numpy(np.stack([plan.indices(number)[here] for number in numbers]))
        if device.type == "cuda":
            indices = indices.pin_memory()
        for of_batch in indices.to(device, non_blocking=True):
            yield rows.index_select(0, of_batch).float()


class _Stream:
    """The rows of one part of a plan's batches, in order, from pools that are read one ahead.

    A pool is in memory in the order of the files. A batch takes its rows from one pool, or more.
    """

    def __init__(self, plan: BatchPlan, first: int, last: int, part: slice) -> None:
        self._plan, self._part = plan, part
        self._positions = range(first * plan.batch_size, last * plan.batch_size)
        shuffle = plan._shuffle
        pools = range(shuffle.pool_at(self._positions[0]), shuffle.pool_at(self._positions[-1]) + 1)
        self._stop = Event()
        self._reader = ThreadPoolExecutor(1, f"{_THREADS}-pools")
        self._pools = iter(pools)
        self._ahead: Future[tuple[Rows, RowNumbers]] | None = None
        largest = -(-shuffle.n_rows // shuffle.n_pools)
        n_batches = min(largest // plan.batch_size + 2, last - first)  # that a pool has rows of
        n_rows = min(n_batches * (part.stop - part.start), largest)
        self._buffers = [np.empty((n_rows, plan.store.d_in), plan.store.dtype) for _ in range(2)]
        self._values, self._order = self._buffers[0], np.empty(0, np.int64)  # of the pool in use
        self._used = 0  # rows of the pool that were in batches
        self._read_ahead()

    def batch(self, number: int) -> Float[Tensor, "_ d_in"]:
        """Return the part of batch `number`, which must be the next one, as float32."""
        plan, done = self._plan, 0
        out = torch.empty(self._part.stop - self._part.start, plan.store.d_in)
        while done < len(out):
            if self._used == len(self._order):
                assert self._ahead is not None, "the sequence has rows for every batch"
                (self._values, self._order), self._used = self._ahead.result(), 0
                self._read_ahead()
            here = torch.from_numpy(self._order[self._used : self._used + len(out) - done])
            into = out[done : done + len(here)]
            into.copy_(torch.from_numpy(self._values).index_select(0, here))
            done, self._used = done + len(here), self._used + len(here)
        if not _all_finite(out):
            here = plan.rows[plan.indices(number)[self._part]]
            require_finite(out.numpy(), here, plan.store)
        return out

    def close(self) -> None:
        """Stop reading, finished or not, and end the thread."""
        self._stop.set()
        self._reader.shutdown(wait=_may_wait(), cancel_futures=True)

    def _read_ahead(self) -> None:
        pool = next(self._pools, None)
        self._buffers.reverse()  # the one that is not in use
        self._ahead = None
        if pool is not None:
            self._ahead = self._reader.submit(self._read, pool, self._buffers[0])

    def _read(self, pool: int, values: Rows) -> tuple[Rows, RowNumbers]:
        """Read the part's rows of a pool, in file order; return where the sequence has them."""
        rows = self._rows(pool)
        rising = np.argsort(rows)
        order = np.empty_like(rising)
        order[rising] = np.arange(len(rows))
        rows = rows[rising]

        def read(here: slice) -> None:
            if not self._stop.is_set():
                self._plan.store.read_into(values[here], rows[here])

        _in_chunks(len(rows), read)
        return values, order

    def _rows(self, pool: int) -> RowNumbers:
        plan = self._plan
        indices, begin = plan._shuffle.indices(pool), plan._shuffle.start_of(pool)
        positions = np.arange(begin, begin + len(indices))
        in_batch = positions % plan.batch_size
        mine = (self._part.start <= in_batch) & (in_batch < self._part.stop)
        mine &= (self._positions.start <= positions) & (positions < self._positions.stop)
        return plan.rows[indices[mine]]


def _in_chunks(n: int, work: Callable[[slice], None]) -> None:
    """Call `work` on slices of `n` rows in several threads: some wait for the disk, others copy."""
    with ThreadPoolExecutor(_READERS, f"{_THREADS}-rows") as pool:
        for _ in pool.map(work, (slice(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK))):
            pass  # raises the error of the first chunk that has one


def _may_wait() -> bool:
    """Return whether this thread may wait for the others: any of them may collect garbage."""
    return not current_thread().name.startswith(_THREADS)
