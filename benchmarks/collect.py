"""Measure how fast features are collected, and how many of the true examples are found.

    python benchmarks/collect.py                                # everything, on 99,135 tokens
    python benchmarks/collect.py speed --rounds 7
    python benchmarks/collect.py kept memory linear --longest 5000000

The shape is 448 columns, 7,168 latents, k 50, top 10, windows of 21 tokens. `collection_data.py`
makes the store and trains the SAE. All contenders read the same store with the same weights on the
CPU.

`speed`: contenders alternate; medians over the rounds. lorascope runs as a function that writes
`features.h5`, and as a command, from the start of Python to a finished JSON; the command is what is
compared. The published collector (`published_collector.py`, its product in torch's `medium`
precision) is timed for its whole scan but only 1,000 contexts per round and their JSON; its total
is projected to all contexts. `product` is the encoder's product alone (`kernels.cpu.product`), in
blocks of 1,024 rows. Contexts per second are windows over the seconds of the bar `contexts`.

`kept`: the share of the true top examples that is found. The truth is found by sorting the codes of
all tokens. Each collector has its own truth, by the codes it ranks with: lorascope's are computed
here in float64, the published ones in its own batches.

`memory`: what a collection adds to the resident memory after store and SAE are loaded, each in its
own process: the peak, and the part that is not backed by a file (the store is memory-mapped).

`linear`: tokens per second of the function for the first rollouts of a long store.

`wide`: tokens per second of the encoder, and of its product alone, with 131,072 latents, for
`docs/scale.md`. Directions are rows of the data; one threshold lets k of them fire.
"""

import argparse
import contextlib
import gc
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collection_data import TRAINED, TRAINING, Setup, make, make_long, texts
from published_collector import CONTEXTS, PublishedCollector
from torch import Tensor

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.features import collect
from lorascope.features.collect import CollectConfig
from lorascope.features.index import FeatureIndex
from lorascope.kernels import cpu
from lorascope.kernels.encoder import Encoder

MIB = 1 << 20
BLOCK = 1024  # rows of a product
PARTS = ("speed", "kept", "memory", "linear", "wide")
WIDE = 131_072  # latents


class Bars:
    """Notes how long each progress bar of a collection was open, by its label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note the bars that are made meanwhile."""
        before, runtime.progress = runtime.progress, self._bar
        try:
            yield
        finally:
            runtime.progress = before

    def _bar(self, total: int, label: str, unit: str) -> Any:
        return _Bar(self.seconds, label)


class _Bar:
    def __init__(self, seconds: dict[str, float], label: str) -> None:
        self._seconds, self._label, self._begun = seconds, label, time.perf_counter()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Note the time."""
        took = time.perf_counter() - self._begun
        self._seconds[self._label] = self._seconds.get(self._label, 0.0) + took


def main() -> None:
    """Make the data, measure what is asked for, and print."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as temporary:
        given.folder = Path(given.folder or temporary)
        setup = make(given.folder, given.tokens, given.latents, given.k)
        print(
            f"{setup.store.n_rows:,} tokens in {setup.store.n_rollouts} rollouts, "
            f"{setup.sae.d_in} columns, {setup.sae.d_sae:,} latents, k {setup.k}, "
            f"torch {torch.__version__}, {torch.get_num_threads()} threads\n",
            flush=True,
        )
        for part in given.parts or PARTS:
            measure = {
                "speed": speed,
                "kept": kept,
                "memory": memory,
                "linear": linear,
                "wide": wide,
            }
            measure[part](given, setup)
            print(flush=True)


def speed(given: argparse.Namespace, setup: Setup) -> None:
    """Time the contenders in turns, and print."""
    took: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    n_windows = n_contexts = 0

    def note(name: str, task: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        answer = task(*arguments)
        took.setdefault(name, []).append(time.perf_counter() - begun)
        return answer

    rows, words = _rows(setup), texts(setup.store)
    products = _products(setup)
    for round_ in range(given.rounds):
        for name, product in products.items():
            note(name, product)
        bars = Bars()
        with bars.noted():
            index = FeatureIndex.open(note("function", _collect, given, setup))
        n_windows = len(index.window_target)
        for label, seconds in bars.seconds.items():
            parts.setdefault(label, []).append(seconds)
        note("command", _command, given, setup)
        if given.only_ours:
            continue
        with _medium():
            published = _published(setup)
            note("published scan", published.scan, rows)
            held = published.kept()
            n_contexts = len(held)
            first = (round_ * n_contexts // given.rounds) % max(n_contexts - CONTEXTS, 1)
            batch = held[first : first + CONTEXTS]
            records = note("contexts", published.contexts, rows, words, batch)
            note("JSON", published.write, records, given.folder / "published.json")
    n = setup.store.n_rows
    median = {name: statistics.median(seconds) for name, seconds in took.items()}
    print(f"speed, medians of {given.rounds} rounds (quartiles)")
    for name in (*products, "function", "command", "published scan"):
        if name in took:
            low, high = _quartiles(took[name])
            print(
                f"  {name:<24} {n / median[name]:>10,.0f} tokens/s "
                f"({n / high:,.0f} to {n / low:,.0f})   {median[name]:.3g} s"
            )
    for label, seconds in parts.items():
        print(f"    of the function, {label:<12} {statistics.median(seconds):.3g} s")
    if "contexts" in parts:
        rate = n_windows / statistics.median(parts["contexts"])
        print(f"  contexts: {n_windows:,} at {rate:,.0f} a second (aim: 100,000)")
    share = median["product, float32"] / median["function"]
    low = median["product, bfloat16"] / median["function"]
    print(f"  of the rate of the product alone: {share:.0%} (aim: 50 %), of bfloat16's {low:.0%}")
    if n_contexts:
        per_batch = median["contexts"] + median["JSON"]
        total = median["published scan"] + per_batch * n_contexts / CONTEXTS
        print(
            f"  published: {CONTEXTS / median['contexts']:,.0f} contexts a second; with all "
            f"{n_contexts:,} and their JSON {total:,.0f} s, {n / total:,.0f} tokens/s (projected)"
        )
        print(f"  the command is {total / median['command']:,.0f} times as fast (aim: 150)")
        print(f"  the function is {total / median['function']:,.0f} times as fast")


def kept(given: argparse.Namespace, setup: Setup) -> None:
    """Print the share of the true top examples that each collector finds."""
    out = _collect(given, setup, max_per_rollout=0, same_context="keep")
    index = FeatureIndex.open(out)
    latent = np.repeat(np.arange(len(index)), np.diff(index.example_offset))
    found = _share(_true_codes(setup), latent, index.example_row, given.top_k, setup)
    print("true top examples kept\n  lorascope   " + found)
    if given.only_ours:
        return
    with _medium():
        published, rows = _published(setup), _rows(setup)
        codes = []
        for number, rollout in enumerate(rows):
            for first, dense in published.codes(rollout):
                at, latents = np.nonzero(dense > 0)
                row = at + first + setup.store.rollout_start[number]
                codes.append((row, latents, dense[at, latents].astype(np.float64)))
                published.tracker.add(dense, number, first)
    pairs = np.array(published.kept())
    rollout = published.tracker.rollouts[pairs[:, 0], pairs[:, 1]]
    row = published.tracker.tokens[pairs[:, 0], pairs[:, 1]] + setup.store.rollout_start[rollout]
    print("  published   " + _share(codes, pairs[:, 0], row, given.top_k, setup))


def memory(given: argparse.Namespace, setup: Setup) -> None:
    """Print what a collection adds to the memory, each in its own process."""
    print("peak of the memory that it adds (of what is no page of a file); aim: less than 2,000 MB")
    names = ["lorascope"] if given.only_ours else ["lorascope", "published"]
    context = multiprocessing.get_context("spawn")
    for name in names:
        process = context.Process(target=_print_memory, args=(given, name))
        process.start()
        process.join()


def linear(given: argparse.Namespace, setup: Setup) -> None:
    """Print the rate for stores of several lengths."""
    store = make_long(given.folder, given.longest)
    lengths = [n for n in (100_000, 500_000, 1_000_000, 2_000_000) if n < given.longest]
    rates: dict[int, list[float]] = {}
    for _ in range(max(given.rounds // 2, 1)):
        for wanted in [*lengths, given.longest]:
            n = int(np.searchsorted(store.rollout_start, wanted))
            begun = time.perf_counter()
            _collect(given, setup._replace(store=store), max_rollouts=n)
            seconds = time.perf_counter() - begun
            rates.setdefault(int(store.rollout_start[n]), []).append(seconds)
    print("linearity: tokens/s of the function, medians")
    first = 0.0
    for n, seconds in rates.items():
        rate = n / statistics.median(seconds)
        first = first or rate
        print(f"  {n:>10,} tokens {rate:>10,.0f} tokens/s   {rate / first:.2f} of the first")


def wide(given: argparse.Namespace, setup: Setup) -> None:
    """Print the rates of the encoder and of its product for many latents."""
    some = np.random.default_rng(0).integers(0, TRAINING, WIDE)
    training = ActivationStore.open(given.folder / TRAINED)
    weight = torch.from_numpy(training.take(np.sort(some))).float()
    weight = torch.nn.functional.normalize(weight - weight.mean(0), dim=1)
    blocks = [
        torch.from_numpy(np.array(setup.store.rows(i * BLOCK, (i + 1) * BLOCK))) for i in range(4)
    ]
    scores = blocks[0][::16].float() @ weight.T
    threshold = torch.topk(scores.flatten(), setup.k * len(scores)).values.min()
    encoder = Encoder(weight.T.contiguous(), torch.zeros(WIDE), threshold.expand(WIDE).contiguous())
    n_fired = sum(len(encoder(block).rows) for block in blocks) / BLOCK / len(blocks)
    ways: dict[str, Callable[[Tensor], Any]] = {"encoder": encoder}
    for dtype in (torch.float32, torch.bfloat16):
        ways[f"product, {str(dtype)[6:]}"] = _product(weight.to(dtype))
    took: dict[str, list[float]] = {name: [] for name in ways}
    for block in blocks * max(given.rounds // 2, 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way(block)
            took[name].append(time.perf_counter() - begun)
    print(f"{WIDE:,} latents, of which {n_fired:.0f} fire: medians")
    for name, seconds in took.items():
        rate = BLOCK / statistics.median(seconds)
        flops = 2 * setup.store.d_in * WIDE * rate
        print(f"  {name:<18} {rate:>8,.0f} tokens/s   {flops / 1e9:,.0f} GFLOP/s in the product")


def _product(weight: Tensor) -> Callable[[Tensor], None]:
    out = weight.new_empty(BLOCK, len(weight))

    def product(rows: Tensor) -> None:
        cpu.product(rows.to(weight.dtype), weight, out[: len(rows)])

    return product


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--tokens", type=int, default=99_135)
    parser.add_argument("--latents", type=int, default=7168, help="a multiple of 448")
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=2_000_000, help="tokens for linear")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", help="keep store and SAE here for the next run")
    parser.add_argument("--only-ours", action="store_true", help="leave the published one out")
    given = parser.parse_args()
    if wrong := set(given.parts) - set(PARTS):
        parser.error(f"no part {' '.join(sorted(wrong))}, there are {', '.join(PARTS)}")
    return given


def _collect(given: argparse.Namespace, setup: Setup, **options: Any) -> Path:
    """Run the collection into a fresh file."""
    out = given.folder / "features.h5"
    out.unlink(missing_ok=True)
    config = CollectConfig(
        sae=setup.sae_path,
        data_dir=setup.store.path,
        output=out,
        top_k=given.top_k,
        device="cpu",
        overwrite=True,  # what a stopped run left
        **options,
    )
    return collect.run(config)


def _command(given: argparse.Namespace, setup: Setup) -> None:
    out = given.folder / "features.json"
    out.unlink(missing_ok=True)
    flags = {
        "--sae": setup.sae_path,
        "--data-dir": setup.store.path,
        "--output": out,
        "--top-k": given.top_k,
        "--device": "cpu",
    }
    words = [str(word) for pair in flags.items() for word in pair]
    command = [sys.executable, "-m", "lorascope", "collect", *words, "--overwrite"]
    subprocess.run(command, check=True, capture_output=True)


def _published(setup: Setup) -> PublishedCollector:
    sae = setup.sae
    return PublishedCollector(sae.W_enc, sae.b_enc, sae.W_dec, k=setup.k)


def _rows(setup: Setup) -> list[np.ndarray]:
    bounds = setup.store.rollout_start.tolist()
    return [setup.store.rows(a, b) for a, b in itertools.pairwise(bounds)]


def _products(setup: Setup) -> dict[str, Callable[[], None]]:
    """Return the encoder's product of all rows, in both types; the rows are made ready."""
    rows = torch.from_numpy(np.array(setup.store.rows(0, setup.store.n_rows)))

    def way(dtype: torch.dtype) -> Callable[[], None]:
        x, product = rows.to(dtype), _product(setup.sae.W_enc.T.contiguous().to(dtype))

        def every_block() -> None:
            for block in x.split(BLOCK):
                product(block)

        return every_block

    return {"product, float32": way(torch.float32), "product, bfloat16": way(torch.bfloat16)}


def _true_codes(setup: Setup) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return rows, latents and values of all codes of lorascope, in float64 by plain torch."""
    sae, found = setup.sae, []
    assert sae.threshold is not None, "load_sae calibrates it"
    W_enc, b_enc, threshold = sae.W_enc.double(), sae.b_enc.double(), sae.threshold.double()
    for start, rows in setup.store.blocks(BLOCK):
        values = (torch.from_numpy(np.array(rows)).double() @ W_enc + b_enc).numpy()
        at, latents = np.nonzero(values > threshold.numpy())
        found.append((at + start, latents, values[at, latents]))
    return found


def _share(
    codes: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
    latents: np.ndarray,
    rows: np.ndarray,
    top_k: int,
    setup: Setup,
) -> str:
    """Say how many of the largest codes are among the examples, equal ones being exchangeable."""
    row, latent, value = (np.concatenate(parts) for parts in zip(*codes, strict=True))
    order = np.lexsort((row, -value, latent))
    row, latent, value = row[order], latent[order], value[order]
    starts = np.searchsorted(latent, np.arange(setup.sae.d_sae + 1))
    is_top = np.arange(len(latent)) - starts[latent] < top_k
    last = np.minimum(starts[:-1] + top_k, starts[1:]) - 1
    bar = np.where(np.diff(starts) > 0, value[last], np.inf)
    is_level = value >= bar[latent] * (1 - 1e-6)  # rounding decides among these
    n = setup.store.n_rows
    examples = np.unique(latents * n + rows)
    is_found = np.isin(latent * n + row, examples)
    n_true = np.bincount(latent[is_top], minlength=len(bar))
    n_found = np.minimum(np.bincount(latent[is_level & is_found], minlength=len(bar)), n_true)
    lists = (n_true > 0).sum()
    whole = (n_found == n_true)[n_true > 0].sum()
    return (
        f"{n_found.sum() / n_true.sum():8.3%}   {n_found.sum():,} of {n_true.sum():,}; "
        f"{whole:,} of {lists:,} lists are whole"
    )


def _print_memory(given: argparse.Namespace, name: str) -> None:
    torch.set_num_threads(given.threads)
    setup = make(given.folder, given.tokens, given.latents, given.k)
    rows, words = _rows(setup), texts(setup.store)
    setup.sae.encode(torch.from_numpy(np.array(rows[0][:64])))  # what is imported and prepared
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, most = _resident(), [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _resident()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    if name == "lorascope":
        _collect(given, setup)
    else:
        published = _published(setup)
        published.scan(rows)
        records = published.contexts(rows, words, published.kept()[:CONTEXTS])
        published.write(records, given.folder / "published.json")
    done.set()
    watcher.join()
    peak = (_resident()["VmHWM"] - before["VmRSS"]) / 1e6
    own = (most[0] - before["RssAnon"]) / 1e6
    print(f"  {name:<11} {peak:>7,.0f} MB ({own:,.0f} MB)", flush=True)


def _resident() -> dict[str, int]:
    """Return the sizes in bytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = (line.split(":") for line in lines if line.endswith(" kB"))
    return {key: int(size.split()[0]) * 1024 for key, size in sizes}


@contextlib.contextmanager
def _medium() -> Iterator[None]:
    """Let float32 products of torch go through oneDNN."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else [*values, 0, *values]
    )
    return low, high


if __name__ == "__main__":
    main()
