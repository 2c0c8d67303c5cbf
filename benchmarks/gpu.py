"""Check and measure everything on a GPU within nine minutes, and keep what is done when cut off.

    make gpu-wheels       # on a machine with a package index: fills build/gpu-wheels
    make gpu              # on the GPU machine: Python, torch and this repository, no network
    python benchmarks/gpu.py --device cpu --tiny       # the rehearsal: every part, small

Each part runs in a process of its own, with a limit. After each, `OUTPUT.json` (figures, seconds,
exit status, the end of the output) and `OUTPUT.md` (a table) are written anew, so that a machine
that is taken away leaves all parts but the last. Parts that do not fit into `--minutes` any more
are named as left out. Exit status 1: a part failed.

1. `environment`: the GPU, versions, and the rates of large products, which shares are of.
2. `tests`: all tests with the marker `gpu`: each kernel against its definition, forward and
   backward, and captured graphs.
3. `stages`: generate, train, collect, evaluate and attribute on the GPU and on the CPU, in float32,
   of the demo's subject; how far their numbers are apart.
4. `train`, `train wide`: `train.py speed` against the peers, 448 columns, 7,168 and 57,344 latents.
5. `capture`: `generate.py` with a Qwen2.5-7B of random weights against the bare forward pass;
   `capture 32b` with a Qwen2.5-32B.
6. `collect`: collection of 10 M tokens; rows, SAE and index as in `collect.py`.
7. `kernels`, `kernels wide`: `kernels.py` beside plain torch.
8. `page`: the page of 100,000 features is built (on the CPU).

Nothing has been measured on a GPU so far.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_SHOWN = 6000  # characters of a part's output that are kept
_LEAST = 10.0  # seconds; with less left, a part is not begun
_OF_TORCH = r"(torch|torchvision|triton|lorascope|pip|setuptools)$|(nvidia|cuda)-"
_FIGURE = re.compile(r"^FIGURE (.+?) = (.+)$", re.M)  # lines of the parts that are functions here
_NUMBER = r"[\d.,]+"


@dataclass(frozen=True)
class Part:
    """A part: its command on the GPU, its command in the rehearsal, and its limit in seconds.

    A command names a file of `benchmarks`, or begins with `-m`. `figures` are patterns of its
    output: the first group is the figure's name, the second the figure.
    """

    name: str
    limit: float
    command: Sequence[str]
    tiny: Sequence[str]
    figures: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)  # of the rehearsal


def _own(name: str) -> dict[str, Any]:
    """Return the commands of a part that is a function of this file."""
    return {"command": ("gpu.py", "--part", name), "tiny": ("gpu.py", "--part", name, "--tiny")}


_SPEED = rf"^  (\S[^\n]*?) +{_NUMBER} +{_NUMBER} to {_NUMBER} +({_NUMBER})  {_NUMBER} \("
_REACHED = r"^  (reached): (.+)$"
_RATE = rf"^  (\S[^\n]*?) +({_NUMBER} tokens/s   time / bare: all {_NUMBER})"
_SHARE = r"^  \d+ of (\d+ TFLOP/s measured for a product of 8192) \((\d+%)\)"
_KERNEL = rf"^(\S+ +lorascope[^\n]*?) +({_NUMBER} +{_NUMBER})$"
_TRAIN = (
    "train.py speed --batch 4096 --bf16 --device cuda --threads 8 --rounds 3 --steps 10".split()
)
_SMALL = "train.py speed --only lorascope,published --batch 64 --latents 896 --k 8".split()
_SMALL += "--rounds 2 --steps 2 --settle 1".split()
_CAPTURE = "generate.py --dtype bfloat16 --device cuda --long".split()
_TINY_MODEL = "generate.py --model tiny --documents 4".split()
_KERNELS = "kernels.py --device cuda --rows 4096".split()
_TINY_KERNELS = "kernels.py --device cpu --rows 32 --latents 448 --k 4 --repeats 2".split()
_PYTEST = ("-p", "no:cacheprovider", "--tb=short")
GPU_TESTS = ("tests/test_kernels_triton.py", "tests/test_kernels_cuda.py")
PARTS = (
    Part("environment", 60, **_own("environment")),
    Part(
        "tests",
        150,
        ["-m", "pytest", *_PYTEST, "-m", "gpu", *GPU_TESTS],
        ["-m", "pytest", *_PYTEST, "-k", "same_bits", GPU_TESTS[0]],
        [r"^(\d+ (?:passed|failed)[^\n]*)", r"^(FAILED) (\S+)"],
        {"TRITON_INTERPRET": "1"},
    ),
    Part("stages", 120, **_own("stages")),
    Part("train", 75, [*_TRAIN, "--latents", "7168"], _SMALL, [_SPEED, _REACHED]),
    Part("capture", 60, [*_CAPTURE, *"--model qwen2.5-7b --documents 24".split()],
         _TINY_MODEL, [_RATE, _SHARE]),
    Part("collect", 120, **_own("collect")),
    Part("train wide", 90, [*_TRAIN, "--latents", "57344"], _SMALL, [_SPEED, _REACHED]),
    Part("capture 32b", 120, [*_CAPTURE, *"--model qwen2.5-32b --documents 8".split()],
         _TINY_MODEL, [_RATE, _SHARE]),
    Part("kernels", 45, [*_KERNELS, "--latents", "7168"], _TINY_KERNELS, [_KERNEL]),
    Part("kernels wide", 45, [*_KERNELS, "--latents", "57344"], _TINY_KERNELS, [_KERNEL]),
    Part("page", 90, **_own("page")),
)  # fmt: skip


def run_part(part: Part, tiny: bool, limit: float) -> dict[str, Any]:
    """Run a part for at most `limit` seconds, and return what is kept of it."""
    words = list(part.tiny if tiny else part.command)
    program = words if words[0] == "-m" else [str(ROOT / "benchmarks" / words[0]), *words[1:]]
    environment = {**os.environ, **(part.environment if tiny else {})}
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *program],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, status = process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it started
        output, status = process.communicate()[0], None
    return {
        "command": " ".join(words),
        "status": "cut off" if status is None else "done" if status == 0 else f"failed ({status})",
        "seconds": round(time.perf_counter() - begun, 1),
        "figures": figures_of(part, output),
        "output": output[-_SHOWN:],
    }


def figures_of(part: Part, output: str) -> dict[str, str]:
    """Return the figures in the output of a part, by name."""
    found = dict(_FIGURE.findall(output))
    for pattern in part.figures:
        for match in re.finditer(pattern, output, re.M):
            groups = [text for text in match.groups() if text]
            found[groups[0] if len(groups) > 1 else "tests"] = groups[-1]
    return found


def table(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = ["| part | status | seconds | figure | |", "|---|---|---|---|---|"]
    for name, part in report["parts"].items():
        rows = list(part["figures"].items()) or [("", "")]
        for i, (figure, value) in enumerate(rows):
            head = (name, part["status"], f"{part['seconds']:g}") if i == 0 else ("", "", "")
            cells = (*head, figure, value)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write(output: Path, report: Mapping[str, Any]) -> None:
    """Write the report as JSON and as a table, each under another name first."""
    output.parent.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(report, indent=1) + "\n", ".md": table(report)}
    for suffix, text in texts.items():
        partial = output.with_suffix(f"{suffix}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(output.with_suffix(suffix))


def run_all(given: argparse.Namespace, run: Callable[..., dict[str, Any]] = run_part) -> int:
    """Run the parts in their order while there is time, and return the exit status."""
    begun, parts = time.monotonic(), {}
    report = {"device": given.device, "tiny": given.tiny, "parts": parts}
    chosen = [part for part in PARTS if not given.only or part.name in given.only.split(",")]
    for part in chosen:
        left = 60 * given.minutes - (time.monotonic() - begun)
        if left < _LEAST:
            parts[part.name] = {"status": "left out", "seconds": 0.0, "figures": {}}
        else:
            limit = left if given.tiny else min(part.limit, left)
            parts[part.name] = run(part, given.tiny, limit)
        write(given.output, report)
        print(f"{part.name}: {parts[part.name]['status']}", file=sys.stderr, flush=True)
    print(table(report))
    return int(any(part["status"].startswith("failed") for part in parts.values()))


def wheels(folder: Path) -> None:
    """Download what the parts need, and torch does not bring, for this Python and platform.

    The resolver says what that is. torch, and what belongs to its build, comes with the machine.
    """
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wanted = ["-c", "constraints.txt", ".[test,bench]"]
    words = [*pip, "install", "--dry-run", "--ignore-installed", "--report", "-", *wanted]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    names = needed(json.loads(done.stdout)["install"])
    folder.mkdir(parents=True, exist_ok=True)
    target = ["--wheel-dir", str(folder), "--no-deps", *names]
    subprocess.run([*pip, "wheel", *target], cwd=ROOT, check=True)
    print(folder)


def needed(install: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the packages of pip's report to bring along, as `name==version`."""
    found = {one["metadata"]["name"]: one["metadata"]["version"] for one in install}
    return [
        f"{name}=={version}"
        for name, version in sorted(found.items())
        if not re.match(_OF_TORCH, name.lower().replace("_", "-"))
    ]


def environment(tiny: bool) -> None:
    """Print what the machine is, and the rates of a large product."""
    import torch

    device = torch.device("cpu" if tiny else "cuda")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    _figure("device", name)
    _figure("torch", torch.__version__)
    size = 256 if tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(size, size, device=device, dtype=dtype)
        for _ in range(3):
            torch.mm(a, a)
        _wait(device)
        begun = time.perf_counter()
        for _ in range(10):
            torch.mm(a, a)
        _wait(device)
        rate = 10 * 2 * size**3 / (time.perf_counter() - begun)
        _figure(f"product of {size}, {dtype}", f"{rate / 1e12:.3g} TFLOP/s")


def stages(tiny: bool) -> None:
    """Run the stages on both devices, and print how far their numbers are apart."""
    import numpy as np
    import torch

    from lorascope import AttributeConfig, EvaluateConfig, RunConfig, attribute, evaluate
    from lorascope.activations.store import ActivationStore
    from lorascope.causal.report_records import AttributionReport, EvaluationReport
    from lorascope.causal.study import read_report
    from lorascope.demo.demo import PROBLEMS, SUBJECT
    from lorascope.features.index import FeatureIndex
    from lorascope.pipeline import run

    subject: dict[str, Any] = {
        "lora_path": str(SUBJECT / "adapter"),
        "base_model": str(SUBJECT / "base"),
    }
    devices = ("cpu", "cpu" if tiny else "cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, device in enumerate(devices):
            out = Path(folder, str(number))
            run(
                RunConfig(
                    **subject,
                    dataset=str(PROBLEMS),
                    num_examples=40 if tiny else 200,
                    expansion_factor=4,
                    k=3,
                    batch_size=512,
                    epochs=2 if tiny else 10,
                    evaluate_texts=2 if tiny else 20,
                    depth="quick",
                    dtype="float32",
                    device=device,
                    output=out,
                )
            )
            # The causal stages on one SAE: that of the CPU.
            first = Path(folder, "0")
            files: dict[str, Any] = {"sae": first / "sae", "data_dir": first / "activations"}
            files |= {**subject, "dtype": "float32", "device": device, "max_rollouts": 2}
            texts = evaluate(EvaluateConfig(**files, output=out / "of-cpu.json"))
            causes = attribute(
                AttributeConfig(**files, tokens=3, check_rollouts=0, output=out / "causes.json")
            )
            store = ActivationStore.open(out / "activations")
            found.append(
                {
                    "rows": np.array(store.rows(0, store.n_rows), np.float32),
                    "index": FeatureIndex.open(out / "features.h5"),
                    "evaluation": read_report(texts, (EvaluationReport,))[0],
                    "attribution": read_report(causes, (AttributionReport,))[0],
                }
            )
    one, other = found
    _figure("generate: rows apart, of their norm", _apart(one["rows"], other["rows"]))
    _figure(
        "train: FVU, CPU and GPU",
        " and ".join(f"{each['index'].content['fvu']:.4f}" for each in found),
    )
    counts = [np.maximum(each["index"].latent_n_active, 0).sum() for each in found]
    _figure("collect: firings, CPU and GPU", f"{counts[0]:,} and {counts[1]:,}")
    shares = [each["evaluation"].faithfulness.runs["sae"].recovered for each in found]
    _figure("evaluate: recovered, CPU and GPU", f"{shares[0]:.6f} and {shares[1]:.6f}")
    sums = [np.array([(f.feature, f.sum) for f in each["attribution"].features]) for each in found]
    size = int(max(pairs[:, 0].max() for pairs in sums)) + 1
    dense = [np.bincount(p[:, 0].astype(int), p[:, 1], size) for p in sums]
    _figure("attribute: contributions apart, of their norm", _apart(*dense))
    if _apart_share(one["rows"], other["rows"]) > 1e-2 or abs(shares[0] - shares[1]) > 0.01:
        sys.exit("the devices disagree")


def collect(tiny: bool) -> None:
    """Collect features from a long store."""
    from collection_data import make, make_long

    from lorascope.features import collect as stage
    from lorascope.features.collect import CollectConfig

    n_tokens, d_sae = (20_000, 896) if tiny else (10_000_000, 7168)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_training, k = (4000, 8) if tiny else (400_000, 50)
        device = "cpu" if tiny else "cuda"
        setup = make(folder, 2000, d_sae, k, training=n_training, device=device)
        store = make_long(folder, n_tokens)
        begun = time.perf_counter()
        stage.run(
            CollectConfig(
                sae=setup.sae_path,
                data_dir=store.path,
                output=folder / "features.h5",
                device=device,
            )
        )
        seconds = time.perf_counter() - begun
    _figure(f"{n_tokens:,} tokens, {d_sae:,} latents", f"{n_tokens / seconds:,.0f} tokens/s")


def page(tiny: bool) -> None:
    """Build the page of many features."""
    from synthetic_features import synthetic

    from lorascope.dashboard.render import DashboardConfig, run

    n_features = 200 if tiny else 100_000
    with tempfile.TemporaryDirectory() as folder:
        index = synthetic(n_features, 10, 10, per_fifth=0, n_rollouts=4000, dead=0)
        index.save(Path(folder, "features.h5"))
        begun = time.perf_counter()
        made = run(
            DashboardConfig(input=Path(folder, "features.h5"), output=Path(folder, "page.html"))
        )
        seconds, size = time.perf_counter() - begun, made.stat().st_size
    _figure(f"page of {n_features:,} features", f"{seconds:.1f} s, {size / 1e6:.1f} MB")


def _apart_share(one: Any, other: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(one - other) / max(np.linalg.norm(one), 1e-30))


def _apart(one: Any, other: Any) -> str:
    return f"{_apart_share(one, other):.2g}"


def _figure(name: str, value: str) -> None:
    print(f"FIGURE {name} = {value}", flush=True)


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


FUNCTIONS = {"environment": environment, "stages": stages, "collect": collect, "page": page}


def main() -> None:
    """Run all parts, or one that is a function of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the rehearsal; with --device cpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    parser.add_argument("--only", help="parts, by commas (default: all)")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "build" / "gpu", help="without suffix"
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="fill it with packages, only")
    parser.add_argument("--part", choices=FUNCTIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.wheels:
        wheels(given.wheels)
        return
    if given.part:
        FUNCTIONS[given.part](given.tiny)
        return
    if wrong := set((given.only or "").split(",")) - {"", *(part.name for part in PARTS)}:
        parser.error(f"no part {min(wrong)}; there are {', '.join(part.name for part in PARTS)}")
    if given.tiny != (given.device == "cpu"):
        parser.error("--tiny and --device cpu go together: the rehearsal needs no GPU")
    sys.exit(run_all(given))


if __name__ == "__main__":
    main()
