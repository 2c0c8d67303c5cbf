"""Measure how fast SAEs are trained, and how good they are, next to the peers on the same rows.

    python benchmarks/train.py speed                            # CPU, 1024 x 448 x 7168, k 50
    python benchmarks/train.py speed --batch 4096 --bf16         # for peers that have it
    python benchmarks/train.py quality --tokens 400000 --lr 1e-3,2e-3,4e-3 --output runs.jsonl
    python benchmarks/train.py quality --only lorascope,sparsify --spread 4 --raw
    python benchmarks/train.py memory --tokens 100000

The rows come from `planted_rows.py`, in one shuffled order for everybody. `contenders.py` says how
each contender runs and what differs from its defaults. Columns are divided by their standard
deviation beforehand, for all, so that the choice of scale cannot decide. With `--raw` all rows are
divided by one number, and each contender scales by itself. Products have torch's `medium`
precision (oneDNN instead of MKL on a CPU, still float32) unless `--defaults` leaves it.

`speed`: the contenders take turns in blocks of `--steps`, in a shuffled order each round, with the
limits of the machine (`step_limits.py`) between them. Ratios compare blocks of one round;
`lorascope again` is the noise. `--settle 120` first trains past 100,000 tokens, so that aux-k
takes part.

`quality`: the fraction of variance unexplained on held-out rows with the inference code (float64,
about the mean of the held-out rows); L0 in training and afterwards; the share of latents that were
silent for the last 100,000 training tokens (where the contender counts them); the share that never
fires on the held-out rows; and how many true directions are found (best absolute cosine with a
decoder row > 0.9, and its mean). All with columns at variance 1. Each run is one line of JSON; a
run that the output already has is skipped.

`memory`: the peak of resident memory (on CUDA: allocated memory) that training adds, one process
per contender.

`make bench` installs the peers in an environment of their own and runs `speed`. By hand: `pip
install lorascope[bench]`, then `pip uninstall torchvision`: one peer brings it, nothing here needs
it, and it breaks transformers beside a CPU build of torch.
"""

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from contenders import BF16, CONTENDERS, Coder, Run, Setting, package
from planted_rows import column_deviation, planted, standardised
from step_limits import KINDS, limits, reference_step
from torch import Tensor
from torch.nn.functional import normalize

from lorascope.errors import NumberError

MIB = 1 << 20
_MEASURES = ("fvu", "l0_train", "l0", "dead", "never_fired", "found", "cosine")


class Data(NamedTuple):
    """What every contender is given and measured by."""

    train: Tensor
    held_out: Tensor
    order: Tensor  # of the training rows
    deviation: Tensor  # of the columns as given
    truth: Tensor  # unit vectors, where columns have variance 1


def prepare(given: argparse.Namespace, n_train: int) -> Data:
    """Make the rows and choose their units."""
    rows, directions = planted(
        n_train + given.held_out,
        given.d_in,
        given.directions,
        given.seed,
        active=given.active,
        spread=given.spread,
    )
    deviation = column_deviation(rows[:n_train])
    divisor = deviation.square().mean().sqrt() if given.raw else deviation
    rows /= divisor.float()
    return Data(
        rows[:n_train],
        rows[n_train:],
        torch.randperm(n_train, generator=torch.Generator().manual_seed(given.seed)),
        (deviation / divisor).to(given.device),
        standardised(directions, deviation).to(given.device),
    )


def setting(given: argparse.Namespace, name: str, lr: float | None, n_steps: int) -> Setting:
    """Return what a contender is given."""
    return Setting(
        d_sae=given.latents,
        k=given.k,
        batch=given.batch,
        n_steps=n_steps,
        lr=lr,
        device=given.device,
        dead_after=given.dead_after,
        bf16=given.bf16 and name in BF16,
        decay=given.decay,
        seed=given.seed,
    )


def start(name: str, rows: Tensor, s: Setting) -> Run:
    """Return a run with first weights by the seed."""
    torch.manual_seed(s.seed)
    return CONTENDERS[name](rows, s)


def speed(given: argparse.Namespace, names: list[str]) -> None:
    """Time the contenders and the limits in turns, and print."""
    n_steps = given.settle + 2 * given.rounds * given.steps
    data = prepare(given, min(n_steps, 64) * given.batch)
    batches = [
        data.train[rows].to(given.device) for rows in data.order.split(given.batch)
    ]  # made ready: reading rows is measured by store.py
    runs = {
        name: start(name, data.train, setting(given, name, None, n_steps)).step for name in names
    }
    turn = dict.fromkeys(runs, 0)

    def steps(name: str) -> Callable[[], None]:
        def one() -> None:
            runs[name](batches[turn[name] % len(batches)])
            turn[name] += 1

        return one

    tasks = {name: steps(name) for name in runs}
    if "lorascope" in tasks:
        tasks["lorascope again"] = tasks["lorascope"]
    tasks |= limits(batches[0], given.latents, given.k)
    for name, task in tasks.items():
        for _ in range(given.settle if name in runs else 3):
            task()
    times: dict[str, list[list[float]]] = {name: [] for name in tasks}
    order = random.Random(0)
    for _ in range(given.rounds):
        turns = list(tasks)
        order.shuffle(turns)
        for name in turns:
            times[name].append([_timed(tasks[name], given.device) for _ in range(given.steps)])
    _print_speed(given, names, times)


def _print_speed(
    given: argparse.Namespace, names: list[str], times: dict[str, list[list[float]]]
) -> None:
    every = {name: [t for block in blocks for t in block] for name, blocks in times.items()}
    base = times.get("lorascope") or times[names[0]]
    print(f"  {'':<28} {'ms a step':>9} {'quartiles':>15} {'tokens/s':>9}  time / {names[0]}")
    for name, seconds in every.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(seconds, n=4))
        line = f"  {name:<28} {middle:>9.2f} {f'{low:.2f} to {high:.2f}':>15}"
        if name[0] != "-":
            ratios = [
                statistics.median(block) / statistics.median(other)
                for block, other in zip(times[name], base, strict=True)
            ]
            line += f" {given.batch / middle * 1e3:>9,.0f}  {statistics.median(ratios):.2f}"
            line += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line)
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in every.items()}
    for kind in KINDS:
        step, chosen = reference_step(ms, kind)
        shares = ", ".join(f"{name} {step / ms[name]:.0%}" for name in names)
        print(
            f"reference step, {kind}: {step:.1f} ms, {given.batch / step * 1e3:,.0f} tokens/s; "
            f"with torch's selection {chosen:.1f} ms, {given.batch / chosen * 1e3:,.0f}\n"
            f"  reached: {shares}"
        )


def _timed(task: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    begun = time.perf_counter()
    task()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def quality(given: argparse.Namespace, names: list[str]) -> None:
    """Train each contender at each rate, measure, print and keep."""
    n_steps = given.tokens // given.batch
    done = {}
    if given.output and given.output.exists():
        for line in given.output.read_text().splitlines():
            entry = json.loads(line)
            done[json.dumps(entry["of"], sort_keys=True)] = entry
    data = prepare(given, given.tokens)
    print(
        f"  {'':<22} {'rate':>7} {'FVU':>7} {'L0 train / held out':>19} {'dead':>6} "
        f"{'never fired':>11} "
        f"{'> 0.9':>6} {'mean':>6} {'seconds':>8}"
    )
    grid = [(name, lr) for name in names for lr in given.lr]
    if given.runs:
        grid = [(name, float(lr)) for name, lr in (run.split(":") for run in given.runs)]
    for name, lr in grid:
        s = setting(given, name, lr, n_steps)
        of = {
            "contender": name,
            **asdict(s),
            **{key: getattr(given, key) for key in ("tokens", "d_in", "directions", "active")},
            **{key: getattr(given, key) for key in ("spread", "raw", "held_out", "defaults")},
        }
        key = json.dumps(of, sort_keys=True)
        if key not in done:
            begun = time.perf_counter()
            measured: dict[str, float]
            try:
                measured = train_one(name, data, s, given)
            except NumberError:
                measured = dict.fromkeys(_MEASURES, math.nan)
            seconds = time.perf_counter() - begun
            done[key] = {"of": of, **measured, "seconds": seconds}
            if given.output:
                with given.output.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
        r = done[key]
        print(
            f"  {name + ' bf16' * s.bf16:<22} {lr or 'auto':>7} {r['fvu']:>7.4f} "
            f"{r['l0_train']:>9.1f} / {r['l0']:>7.1f} {r.get('dead', math.nan):>6.3f} "
            f"{r['never_fired']:>11.3f} "
            f"{r['found']:>6.3f} {r['cosine']:>6.3f} {r['seconds']:>8.0f}",
            flush=True,
        )


def train_one(name: str, data: Data, s: Setting, given: argparse.Namespace) -> dict[str, float]:
    """Train one SAE over the rows once, and measure it."""
    run = start(name, data.train, s)
    for i in range(s.n_steps):
        run.step(data.train[data.order[i * s.batch : (i + 1) * s.batch]].to(s.device))
    return measure(run.finish(), data, given)


@torch.no_grad()
def measure(coder: Coder, data: Data, given: argparse.Namespace) -> dict[str, float]:
    """Return what the inference code makes of the held-out rows, and the directions found."""
    deviation = data.deviation
    blocks = [block.to(given.device) for block in data.held_out.split(given.batch)]
    mean = torch.stack([b.double().sum(0) for b in blocks]).sum(0) / len(data.held_out)
    error = total = l0 = 0.0
    fired = torch.zeros(given.latents, dtype=torch.bool, device=given.device)
    for x in blocks:
        code = coder.code(x)
        apart = (x.double() - coder.decode(code).double()) / deviation
        error += float(apart.square().sum())
        total += float(((x.double() - mean) / deviation).square().sum())
        l0 += float((code != 0).sum())
        fired |= (code != 0).any(0)
    learned = normalize(coder.W_dec / deviation.float(), dim=1)
    best = (data.truth @ learned.T).abs().amax(1)
    values = (
        *(error / total, coder.l0, l0 / len(data.held_out), coder.dead),
        float((~fired).float().mean()),
        *(float((best > 0.9).float().mean()), float(best.mean())),
    )
    return dict(zip(_MEASURES, values, strict=True))


def memory(given: argparse.Namespace, names: list[str]) -> None:
    """Print what training adds, each contender in its own process."""
    context = multiprocessing.get_context("spawn")
    for name in names:
        process = context.Process(target=_print_memory, args=(given, name))
        process.start()
        process.join()


def _print_memory(given: argparse.Namespace, name: str) -> None:
    _apply(given)
    n_steps = given.tokens // given.batch
    data = prepare(given, n_steps * given.batch)
    s = setting(given, name, None, n_steps)
    tiny = Setting(d_sae=64, k=4, batch=64, n_steps=20, lr=None, device=given.device)
    start(name, data.train[:256], tiny).step(data.train[:64].to(given.device))  # what is imported
    gc.collect()
    if given.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; Linux only
    before = _memory(given.device)[0]
    run = start(name, data.train, s)
    for rows in data.order.split(given.batch):
        run.step(data.train[rows].to(given.device))
    print(f"  {name:<22} {(_memory(given.device)[1] - before) / MIB:>7,.0f} MiB", flush=True)


def _memory(device: str) -> tuple[int, int]:
    """Return the bytes in use now and at most."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
        return int(kib["VmRSS"]) * 1024, int(kib["VmHWM"]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak


def _apply(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    if not given.defaults:
        torch.set_float32_matmul_precision("medium")


def main() -> None:
    """Read the options and run a mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["speed", "quality", "memory"])
    parser.add_argument("--only", help="contenders, by commas (default: all)")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--d-in", type=int, default=448)
    parser.add_argument("--latents", type=int, default=7168)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--held-out", type=int, default=32_768)
    parser.add_argument("--directions", type=int, default=2000)
    parser.add_argument("--active", type=float, default=30.0, help="directions on at a token")
    parser.add_argument("--spread", type=float, default=0.5, help="column scales, in powers of 10")
    parser.add_argument("--raw", action="store_true", help="leave the columns their scales")
    parser.add_argument("--lr", type=_rates, default=[2e-3], help="by commas; auto: the library's")
    parser.add_argument("--runs", type=lambda s: s.split(","), help="name:rate, in this order")
    parser.add_argument("--decay", action="store_true", help="let constant rates fall at the end")
    parser.add_argument("--dead-after", type=int, default=100_000, help="tokens without firing")
    parser.add_argument("--output", type=Path, help="lines of JSON, gone on from")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    parser.add_argument("--settle", type=int, default=5, help="steps before the first block")
    parser.add_argument("--bf16", action="store_true", help="where the contender has it")
    parser.add_argument("--defaults", action="store_true", help="leave torch's matmul precision")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(CONTENDERS)
    if given.runs:
        names = [run.split(":")[0] for run in given.runs]
    for name in dict.fromkeys(names):
        if name not in CONTENDERS:
            parser.error(f"{name} is not a contender; there are {', '.join(CONTENDERS)}")
        if missing := package(name):
            print(f"{name} is left out: {missing} is not installed (make bench installs it)")
            names = [other for other in names if other != name]
            given.runs = given.runs and [r for r in given.runs if r.split(":")[0] != name]
    _apply(given)
    print(
        f"{given.mode}: {given.batch} x {given.d_in} x {given.latents}, k {given.k}, on "
        f"{given.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, products "
        f"{torch.get_float32_matmul_precision()}{', bfloat16' * given.bf16}; columns over "
        f"10^{given.spread:g}, {'as they are' if given.raw else 'standardised'}"
    )
    {"speed": speed, "quality": quality, "memory": memory}[given.mode](given, names)


def _rates(text: str) -> list[float | None]:
    return [None if part == "auto" else float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
