"""Rows of a store as training batches: shuffled, repeatable, addressable by number.

1. `split_rows` parts the eligible rows into training and held-out rows, by whole rollouts.
2. A `BatchPlan` lays the training rows out in a line, epoch after epoch, shuffled (shuffle.py).
3. Batch i is places `[i * batch_size, (i + 1) * batch_size)` of that line, so that a resumed run
   goes on exactly where it stopped and no row is left out at an epoch's end.

Where `buffer_rows` covers all rows there is one pool: a permutation of everything, taken from an
array in memory. A larger store is streamed by `batches`: a pool is read while the one before it
is used, in the stored dtype, so a stream has two pools in memory at most, and 16 bytes for each
row of the one that is being read. By default, both cases keep 4 GiB of activations at most.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, current_thread

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.activations.shards import Rows
from lorascope.activations.shuffle import Shuffle
from lorascope.activations.store import ActivationStore
from lorascope.errors import ArtifactError, ConfigError, NumberError
from lorascope.texts.roles import ROLES

RowNumbers = npt.NDArray[np.int64]
_AHEAD = 2  # batches prepared before they are asked for
_CHUNK = 4096  # rows read at once: they are still in the cache when they are checked
_READERS = 4  # threads that read a store
_THREADS = "lorascope"  # how the names of this module's threads begin
_IN_MEMORY = 4 << 30  # bytes of activations kept in RAM, all of them or two pools


def split_rows(
    store: ActivationStore, holdout: float, seed: int, roles: Sequence[str] = ()
) -> tuple[RowNumbers, RowNumbers]:
    """Return the eligible rows, of these roles if any, as `(training, held out)`, in rising order.

    Whole rollouts are held out, chosen by a permutation from `seed`, until they have the share
    `holdout` of the rows or a little less, but at least one; a store whose eligible rows are all
    of one rollout is split by row. Special tokens are left out unless the role `special` is named.
    Raises ConfigError at an unknown role, ArtifactError when there are fewer than two rows.
    """
    rows = np.flatnonzero(store.eligible_of(store.token_ids, store.roles, roles))
    if len(rows) < 2:
        found = ", ".join(f"{role} {n}" for role, n in count_roles(store).items())
        wanted = f" of the roles {', '.join(roles)} (it has: {found or 'none'})" if roles else ""
        advice = "name other roles, or generate more" if roles else "generate more"
        raise ArtifactError(
            f"{store.path} has {len(rows)} tokens to train on{wanted}, expected two or more; "
            f"{advice}"
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
    """Part held-out rows by every other rollout: the first half calibrates, the other is reported.

    Rows of one rollout serve both ends.
    """
    _, number = np.unique(store.rollout_of(rows), return_inverse=True)
    if not number.any():
        return rows, rows
    return rows[number % 2 == 1], rows[number % 2 == 0]


def count_roles(store: ActivationStore) -> dict[str, int]:
    """Return how many eligible rows each role has, in the order of `ROLES`; only roles with any."""
    counts = np.bincount(store.roles[store.eligible], minlength=len(ROLES))
    return {role: int(n) for role, n in zip(ROLES, counts, strict=True) if n}


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
    """The order in which training sees the rows of a store. It holds no thread and no open file.

    `rows` are the training rows; `loaded` holds their activations in the stored dtype, or is None
    where there are more than `buffer_rows` and they are read from the files.
    """

    store: ActivationStore
    rows: RowNumbers
    batch_size: int
    seed: int
    buffer_rows: int
    loaded: Rows | None = field(repr=False)
    _orders: dict[int, RowNumbers] = field(default_factory=dict, repr=False)

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
        """Make a plan; activations of up to `buffer_rows` rows are loaded now.

        `buffer_rows` is part of the order. None stands for all rows where they take 4 GiB or less,
        else for so many that two pools do. Raises ArtifactError when there are fewer rows than one
        batch holds, NumberError when a loaded activation is not finite.
        """
        if len(rows) < batch_size:
            raise ArtifactError(
                f"{store.path} has {len(rows)} training tokens, fewer than one batch of "
                f"{batch_size}; lower --batch-size, or generate more"
            )
        if buffer_rows is None:
            fitting = _IN_MEMORY // (store.d_in * store.dtype.itemsize)
            buffer_rows = len(rows) if len(rows) <= fitting else max(fitting // 2, 1)
        if buffer_rows < 1:
            raise ConfigError(f"the shuffle buffer has {buffer_rows} rows, expected 1 or more")
        loaded = None
        if len(rows) <= buffer_rows:
            loaded = into = np.empty((len(rows), store.d_in), store.dtype)

            def load(here: slice) -> None:
                into[here] = store.take(rows[here])
                require_finite(into[here], rows[here], store)

            _in_chunks(len(rows), load)
        return cls(store, rows, batch_size, seed, buffer_rows, loaded)

    def n_batches(self, epochs: int) -> int:
        """Return how many whole batches `epochs` passes over the rows make."""
        return epochs * len(self.rows) // self.batch_size

    def batch(self, number: int) -> Float[Tensor, "batch d_in"]:
        """Return batch `number` as float32; raises NumberError at a value that is not finite.

        Without `loaded` its rows are read one by one: `batches` is the fast way through a store.
        """
        return self._gather(self.places(number))

    def batches(
        self, first: int, last: int, part: tuple[int, int] = (0, 1)
    ) -> Generator[Float[Tensor, "_ d_in"]]:
        """Yield batches `first` to `last - 1` in order, each as `batch` returns it.

        A thread prepares two batches ahead, another one the next pool of a store that is not
        loaded; the files are read in order. Two pools are in memory at most, and a part's pools
        hold its own rows only. `part = (rank, world)` yields rows
        `[rank * B // world, (rank + 1) * B // world)` of each batch of B rows.

        What goes wrong at batch i is raised at batch i, not before. Close the generator, with
        `contextlib.closing` for one, to end the threads at once; its end, an error and garbage
        collection end them as well. One left open lets the process exit once its pool is read.
        """
        rank, world = part
        assert 0 <= rank < world, "a rank of the world"
        if not first < last:
            return
        here = slice(rank * self.batch_size // world, (rank + 1) * self.batch_size // world)
        stream = None if self.loaded is not None else _Stream(self, first, last, here)
        prepare = stream.batch if stream else lambda number: self._gather(self.places(number)[here])
        worker = ThreadPoolExecutor(1, f"{_THREADS}-batches")  # tasks, no queue to be stuck at
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

    def places(self, number: int) -> RowNumbers:
        """Return the indices into `rows` of batch `number`, `(batch_size,)`."""
        shuffle, at = self._shuffle, number * self.batch_size
        end, parts = at + self.batch_size, []
        while at < end:
            pool = shuffle.pool_at(at)
            begin, stop = shuffle.first(pool), min(shuffle.first(pool + 1), end)
            parts.append(self._order(pool)[at - begin : stop - begin])
            at = stop
        return np.concatenate(parts)

    @property
    def _shuffle(self) -> Shuffle:
        return Shuffle(len(self.rows), self.buffer_rows, self.seed)

    def _gather(self, places: RowNumbers) -> Float[Tensor, "_ d_in"]:
        if self.loaded is not None:
            return torch.from_numpy(self.loaded).index_select(0, torch.from_numpy(places)).float()
        values = self.store.take(self.rows[places])
        require_finite(values, self.rows[places], self.store)
        return torch.from_numpy(values).float()

    def _order(self, pool: int) -> RowNumbers:
        """Return a pool's order out of the two last used: a batch often touches two pools."""
        order = self._orders.get(pool)
        if order is None:
            for old in list(self._orders)[:-1]:
                self._orders.pop(old, None)  # another thread may have been faster
            order = self._orders[pool] = self._shuffle.places(pool)
        return order


class _Stream:
    """Some rows of each of a plan's batches, in order, out of pools that are read one ahead.

    A pool is in memory in the order in which it is emitted: a batch is a slice of it, or of two.
    """

    def __init__(self, plan: BatchPlan, first: int, last: int, part: slice) -> None:
        self._plan, self._part = plan, part
        self._line = range(first * plan.batch_size, last * plan.batch_size)
        shuffle = plan._shuffle
        pools = range(shuffle.pool_at(self._line[0]), shuffle.pool_at(self._line[-1]) + 1)
        self._stop = Event()
        self._reader = ThreadPoolExecutor(1, f"{_THREADS}-pools")
        self._pools = iter(pools)
        self._ahead: Future[Rows] | None = None
        self._values, self._used = np.empty((0, plan.store.d_in), plan.store.dtype), 0
        self._read_ahead()

    def batch(self, number: int) -> Float[Tensor, "_ d_in"]:
        """Return the part of batch `number`, which is the next one, as float32."""
        plan, done = self._plan, 0
        out = torch.empty(self._part.stop - self._part.start, plan.store.d_in)
        while done < len(out):
            if self._used == len(self._values):
                assert self._ahead is not None, "the line has rows for every batch"
                self._values, self._used = self._ahead.result(), 0  # frees the pool before it
                self._read_ahead()
            n = min(len(out) - done, len(self._values) - self._used)
            out[done : done + n] = torch.from_numpy(self._values[self._used : self._used + n])
            done, self._used = done + n, self._used + n
        if not _all_finite(out):
            here = plan.rows[plan.places(number)[self._part]]
            require_finite(out.numpy(), here, plan.store)
        return out

    def close(self) -> None:
        """End the reading, finished or not, and its threads."""
        self._stop.set()
        self._reader.shutdown(wait=_may_wait(), cancel_futures=True)

    def _read_ahead(self) -> None:
        pool = next(self._pools, None)
        self._ahead = None if pool is None else self._reader.submit(self._read, pool)

    def _read(self, pool: int) -> Rows:
        """Return those rows of a pool that this stream emits, in that order, read in file order."""
        store, rows = self._plan.store, self._rows(pool)
        to = np.argsort(rows)
        rows = rows[to]
        values = np.empty((len(rows), store.d_in), store.dtype)

        def read(here: slice) -> None:
            if not self._stop.is_set():
                values[to[here]] = store.take(rows[here])

        _in_chunks(len(rows), read)
        return values

    def _rows(self, pool: int) -> RowNumbers:
        plan = self._plan
        places, begin = plan._shuffle.places(pool), plan._shuffle.first(pool)
        line = np.arange(begin, begin + len(places))
        in_batch = line % plan.batch_size
        mine = (self._part.start <= in_batch) & (in_batch < self._part.stop)
        mine &= (self._line.start <= line) & (line < self._line.stop)
        return plan.rows[places[mine]]


def _in_chunks(n: int, work: Callable[[slice], None]) -> None:
    """Call `work` on slices of `n` rows in several threads: one waits for the disk, others copy."""
    with ThreadPoolExecutor(_READERS, f"{_THREADS}-rows") as pool:
        for _ in pool.map(work, (slice(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK))):
            pass  # a chunk's error is raised here, the first one's first


def _may_wait() -> bool:
    """Say whether this thread may wait for the others: garbage is collected in any of them."""
    return not current_thread().name.startswith(_THREADS)
