"""Measure how fast a store is read: in order, shuffled, and against a plain copy.

    python benchmarks/store.py --gigabytes 1

Writes a store of random rows (448 columns, float16) into a temporary folder, then reads batches of
1,024 rows as float32 in alternating ways: `in order` (`store.rows`), `shuffled` (`store.take` with
a permutation of the whole store), and `copy`: a copy of as many bytes from one array in memory,
the most that the machine can do. The files are in the page cache.

Then, with the page cache dropped before each: `disk`, its files read in order into one buffer, the
most that the disk can do; `cold, in order`, through a map as float32; all shuffled batches of the
`first epoch` as training takes them (`BatchPlan`: read in order, checked, kept in memory, taken in
random order), and of the `second epoch`; and those of an epoch `streamed` through a buffer of a
tenth of the store, as training takes a store larger than memory. Figures are medians of five;
`CPU` is of all threads.

    python benchmarks/store.py --gigabytes 6 --larger-than-memory

is for a store that does not fit: only `disk` and `streamed`, three times, with what was read from
the disk and the largest memory of the process. Run it where memory is limited, such as in a cgroup.

    python benchmarks/store.py --gigabytes 0.2 --object-store

trains from the disk and from moto's server (packages `moto[server]` and `s3fs`), with the rows in
memory and streamed, and prints seconds on the clock and of the CPU, of lorascope and of the server.
"""

import argparse
import gc
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from lorascope.activations.batches import BatchPlan
from lorascope.activations.shards import VOCABULARY, Rows, Vocabulary
from lorascope.activations.shards import write_shard as write
from lorascope.activations.store import KIND, SCHEMA, ActivationStore
from lorascope.artifact import Manifest, digest_file, write_manifest
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
    parser.add_argument("--larger-than-memory", action="store_true")
    parser.add_argument("--object-store", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make(Path(folder), int(given.gigabytes * 1e9 / 448 / 2))
        if given.object_store:
            _from_object_store(Path(folder))
            return
        if given.larger_than_memory:
            _alternate_cold(Path(folder), {"disk": _disk, "streamed": _streamed}, 3)
            return
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
        ways_cold = {"disk": _disk, "cold, in order": _in_order, "streamed": _streamed}
        _alternate_cold(Path(folder), {**ways_cold, "first epoch": _epoch, "both": _epochs}, 5)


def _from_object_store(folder: Path) -> None:
    """Print what training costs from a folder and from a server that speaks S3."""
    import fsspec

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    os.environ |= {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    start = "import sys; from moto.server import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", start, "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            files = fsspec.filesystem("s3")
            files.mkdir("bucket")
            files.put(f"{folder}/", "bucket/store/", recursive=True)
            for buffer in ([], ["--buffer-rows", "131072"]):
                for name in (str(folder), "s3://bucket/store"):
                    _train(name, buffer, server.pid)
        finally:
            server.terminate()


def _train(name: str, buffer: list[str], server: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "sae.pt")
        options = "--k 8 --expansion-factor 2 --batch-size 1024 --epochs 1 --data-dir".split()
        words = [sys.executable, "-m", "lorascope", "--quiet", "train", *options, name, *buffer]
        before, served, begun = os.times(), _seconds_of(server), time.perf_counter()
        subprocess.run([*words, "--output", str(out)], check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - begun, os.times()
        cpu, served = sum(after[2:4]) - sum(before[2:4]), _seconds_of(server) - served
        place = name if name.startswith("s3:") else "the disk"
        way = "streamed" if buffer else "in memory"
        print(
            f"  {way} from {place}: {wall:.1f} s, CPU {cpu:.1f} s, server {served:.1f} s, "
            f"SAE {digest_file(out)[:12]}"
        )


def _seconds_of(process: int) -> float:
    """Return the CPU seconds of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _alternate_cold(
    folder: Path, ways: dict[str, Callable[[ActivationStore], int]], n_rounds: int
) -> None:
    """Print rates, CPU time and bytes read of ways to read a store that is not in memory."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(n_rounds):
        for name, way in ways.items():
            _drop(folder)
            begun, cpu, read = time.perf_counter(), time.process_time(), _bytes_read()
            n_rows = way(ActivationStore.open(folder))  # whose maps would hold pages in memory
            seconds = time.perf_counter() - begun
            cpu, read = time.process_time() - cpu, _bytes_read() - read
            found[name].append((n_rows / seconds, 1e6 * cpu / n_rows, read / n_rows / 896))
    for name, values in found.items():
        rate, cpu, read = map(statistics.median, zip(*values, strict=True))
        of_disk = statistics.median(
            mine[0] / disk[0] for mine, disk in zip(values, found["disk"], strict=True)
        )
        print(
            f"  {name:<14} {rate:>12,.0f} rows/s   {of_disk:.2f} of the disk   "
            f"CPU {cpu:.2f} us/row   read {read:.2f} of the store"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"  largest memory of the process {peak / 1024:,.0f} MiB")


def _bytes_read() -> int:
    """Return the bytes that this process has caused to be read from disks."""
    with Path("/proc/self/io").open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


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


def _disk(store: ActivationStore) -> int:
    buffer = bytearray(4 << 20)
    for shard in store.shards:
        with shard.path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return store.n_rows


def _epochs(store: ActivationStore, n_epochs: int = 2, buffer_rows: int | None = None) -> int:
    rows = np.arange(store.n_rows)
    plan = BatchPlan.from_store(store, rows, BATCH, seed=0, buffer_rows=buffer_rows)
    return sum(len(batch) for batch in plan.batches(0, plan.n_batches(n_epochs)))


def _epoch(store: ActivationStore) -> int:
    return _epochs(store, 1)


def _streamed(store: ActivationStore) -> int:
    return _epochs(store, 1, buffer_rows=-(-store.n_rows // 10))


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
