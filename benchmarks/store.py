"""Measure how fast a store is read: in order, shuffled, and against a plain copy.

    python benchmarks/store.py --gigabytes 1

Writes a store of random rows (448 columns, float16) into a temporary folder, then reads batches of
1,024 rows as float32 in alternating ways: `in order` (`store.rows`), `shuffled` (`store.take` with
a permutation of the whole store), and `copy`: a copy of as many bytes from one array in memory,
the most that the machine can do. The files are in the page cache.

Then, with the page cache dropped before each: `cold, in order`; all shuffled batches of the
`first epoch` as training takes them (`BatchPlan`: read in order, checked, kept in memory, taken in
random order), and of the `second epoch`; and those of an epoch `streamed` through a buffer of a
tenth of the store, as training takes a store larger than memory. Figures are medians of five.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from lorascope.activations.batches import BatchPlan
from lorascope.activations.shards import VOCABULARY, Rows, Vocabulary
from lorascope.activations.shards import write_shard as write
from lorascope.activations.store import KIND, SCHEMA, ActivationStore
from lorascope.artifact import Manifest, write_manifest
from lorascope.sites import PROJECTIONS, Site, SiteLayout

BATCH = 1024
ROWS_PER_SHARD = 64 * 1024


def make(folder: Path, n_rows: int) -> ActivationStore:
    """Write a store of random rows."""
    sites = [Site(layer=i, projection=p, module=f"{i}.{p}") for i in range(64) for p in PROJECTIONS]
    layout = SiteLayout.from_sites(sites)
    rng = np.random.default_rng(0)
    block = rng.standard_normal((ROWS_PER_SHARD, layout.d_in)).astype(np.float16)
    for number in range(-(-n_rows // ROWS_PER_SHARD)):
        n = min(ROWS_PER_SHARD, n_rows - number * ROWS_PER_SHARD)
        ids, roles = np.zeros(n, np.int32), np.zeros(n, np.uint8)
        write(folder / f"shard-{number:05d}.h5", block[:n], ids, roles, [n], [number])
    Vocabulary.from_tokens([b"x"], np.array([False])).save(folder / VOCABULARY)
    manifest = Manifest(
        kind=KIND, schema=SCHEMA, settings={}, parents={}, layout=layout, content={}
    )
    write_manifest(folder, manifest, [file.name for file in folder.glob("*.h5")])
    return ActivationStore.open(folder)


def wide(rows: Rows) -> torch.Tensor:
    """Return rows as float32, as training does."""
    return torch.from_numpy(np.ascontiguousarray(rows)).float()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make(Path(folder), int(given.gigabytes * 1e9 / 448 / 2))
        order = np.random.default_rng(1).permutation(store.n_rows)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        array = store.shards[0].read("activations")[:]
        ways: dict[str, Callable[[int], object]] = {
            "in order": lambda i: wide(store.rows(i * BATCH, (i + 1) * BATCH)),
            "shuffled": lambda i: wide(store.take(order[i * BATCH : (i + 1) * BATCH])),
            "copy": lambda i: wide(array[(i * BATCH) % (len(array) - BATCH) :][:BATCH]),
        }
        n_batches = store.n_rows // BATCH
        seconds = _alternate(ways, n_batches)
        print(f"{store.n_rows:,} rows, {given.gigabytes:g} GB, {len(store.shards)} shards")
        for name, times in seconds.items():
            ratio = statistics.median(
                b / t for t, b in zip(times, seconds["in order"], strict=True)
            )
            rate = n_batches * BATCH / sum(times)
            print(f"  {name:<14} {rate:>12,.0f} rows/s   {ratio:.2f} of in order")
        del store, array, ways  # their maps hold pages in memory
        names = ("cold, in order", "first epoch", "second epoch", "streamed")
        rates: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(5):
            _drop(Path(folder))
            begun = time.perf_counter()
            n_rows = _in_order(ActivationStore.open(Path(folder)))
            found = [n_rows / (time.perf_counter() - begun)]
            _drop(Path(folder))
            found += _epochs(ActivationStore.open(Path(folder)))
            _drop(Path(folder))
            found.append(_streamed(ActivationStore.open(Path(folder))))
            for name, rate in zip(names, found, strict=True):
                rates[name].append(rate)
        slow = statistics.median(rates["cold, in order"])
        for name, values in rates.items():
            middle = statistics.median(values)
            print(f"  {name:<14} {middle:>12,.0f} rows/s   {middle / slow:.2f} of cold, in order")


def _alternate(ways: dict[str, Callable[[int], object]], n_batches: int) -> dict[str, list[float]]:
    """Return the seconds that each way takes for 50 batches, again and again, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # once through, so that every page is in memory
        for i in range(n_batches):
            way(i)
    for first in range(0, n_batches, 50):
        for name, way in ways.items():
            begun = time.perf_counter()
            for i in range(first, min(first + 50, n_batches)):
                way(i)
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def _in_order(store: ActivationStore) -> int:
    return sum(len(wide(rows)) for _, rows in store.blocks(BATCH))


def _epochs(store: ActivationStore) -> list[float]:
    """Return the rows per second of the first epoch, loading included, and of the second."""
    begun, rates = time.perf_counter(), []
    plan = BatchPlan.from_store(store, np.arange(store.n_rows), BATCH, seed=0)
    n = plan.n_batches(1)
    for first in (0, n):
        rows = sum(len(batch) for batch in plan.batches(first, first + n))
        rates.append(rows / (time.perf_counter() - begun))
        begun = time.perf_counter()
    return rates


def _streamed(store: ActivationStore) -> float:
    """Return the rows per second of an epoch of which a tenth at a time is shuffled in memory."""
    begun, rows = time.perf_counter(), np.arange(store.n_rows)
    plan = BatchPlan.from_store(store, rows, BATCH, seed=0, buffer_rows=-(-len(rows) // 10))
    n_rows = sum(len(batch) for batch in plan.batches(0, plan.n_batches(1)))
    return n_rows / (time.perf_counter() - begun)


def _drop(folder: Path) -> None:
    """Drop a store's files from the page cache."""
    gc.collect()
    for path in folder.glob("*.h5"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    main()
