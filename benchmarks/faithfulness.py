"""Measure how faithful SAEs of the shipped model are, by sparsity and size, next to baselines.

    python benchmarks/faithfulness.py --problems 400
    python benchmarks/faithfulness.py --solve 150 --run demo-output

The first command trains an SAE for each setting on the demo's problems, evaluates it on held-out
rollouts, and prints one row of a Markdown table for each: shares recovered over generated tokens,
then over all predicted ones. The second command lets the model solve new
problems with its rows rebuilt by the SAE of a finished demo and by the baselines, and counts right
answers.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy import solved, spliced, without_adapter

from lorascope.activations.generate import GenerateConfig
from lorascope.activations.generate import run as generate
from lorascope.activations.store import ActivationStore
from lorascope.causal.baselines import baselines
from lorascope.causal.continuation import Change
from lorascope.causal.evaluate import EvaluateConfig
from lorascope.causal.evaluate import run as evaluate
from lorascope.causal.study import open_report
from lorascope.demo.demo import SUBJECT
from lorascope.sae.model import load_sae
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run as train
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.base import find_base
from lorascope.subject.load import load_subject, load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_problems import make_problem, write_jsonl
from intervals import wilson

SETTINGS = ((4, 1.0), (4, 2.0), (4, 4.0), (4, 8.0), (4, 16.0), (1, 4.0), (16, 4.0))
SUBJECT_OF: dict[str, Any] = {
    "lora_path": str(SUBJECT / "adapter"),
    "base_model": str(SUBJECT / "base"),
    "device": "cpu",
}


def row(store: Path, folder: Path, expansion: int, k: float) -> str:
    sae = train(
        TrainConfig(
            data_dir=store,
            output=folder / f"sae-{expansion}-{k:g}",
            expansion_factor=expansion,
            k=k,
            epochs=12,
            device="cpu",
        )
    )
    report = open_report(
        evaluate(
            EvaluateConfig(
                data_dir=store,
                sae=sae,
                output=folder / f"report-{expansion}-{k:g}.json",
                **SUBJECT_OF,
            )
        )
    )
    made, runs = report["reconstruction"], report["faithfulness"]["runs"]
    low, high = runs["sae"]["generated"]["recovered_interval"]
    cells = [
        f"{expansion}",
        f"{k:g}",
        f"{made['l0']:.2f}",
        f"{made['fvu']:.3f}",
        f"{runs['sae']['generated']['recovered']:.3f} ({low:.2f} to {high:.2f})",
        f"{runs['sae']['recovered']:.3f}",
    ]
    for name in ("constant", "pca", "columns", "random"):
        generated = runs[name]["generated"]["recovered"]
        cells.append(f"{generated:.3f}, {runs[name]['recovered']:.3f}")
    return "| " + " | ".join(cells) + " |"


def accuracies(run: Path, n: int) -> None:
    """Print what share of `n` problems each arm solves, with Wilson's interval."""
    store = ActivationStore.open(run / "activations")
    sae = load_sae(run / "sae", store)
    adapter = inspect_adapter(SUBJECT_OF["lora_path"])
    base = find_base(adapter, SUBJECT_OF["base_model"])
    subject = load_subject(
        adapter, base, load_tokenizer(adapter, base), torch.device("cpu"), "float32"
    )
    fitted = torch.from_numpy(store.take(np.arange(0, store.n_rows, 4)).astype(np.float32))
    mean = fitted.mean(0)  # the place of a token that is being written is not known
    m = round(sae.manifest.content["report"]["l0"])
    simple = baselines(sae, fitted, mean.expand_as(fitted), m, seed=0)
    arms: dict[str, Change | None] = {
        "base": without_adapter(),
        "adapter": None,
        "sae": spliced(lambda x: sae.decode(sae.encode(x))),
    }
    for name in ("columns", "pca", "constant"):
        arms[name] = spliced(lambda x, how=simple[name].rows: how(x, mean.expand_as(x)))
    problems = [make_problem("eval", i) for i in range(n)]
    found = solved(subject, problems, arms)
    print("| rows written | solved | 95 % |\n|---|---|---|")
    for name, right in found.items():
        low, high = wilson(sum(right), len(right))
        print(f"| {name} | {sum(right) / len(right):.1%} | {low:.1%} to {high:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--solve", type=int, help="problems to solve, instead")
    parser.add_argument("--run", type=Path, default=Path("demo-output"))
    flags = parser.parse_args()
    if flags.solve:
        accuracies(flags.run, flags.solve)
        return
    n = flags.problems
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "problems.jsonl", n, "demo")
        store = generate(
            GenerateConfig(
                dataset=str(folder / "problems.jsonl"),
                num_examples=n,
                output=folder / "rows",
                **SUBJECT_OF,
            )
        )
        names = "latents a column,k,L0,FVU,generated (95 %),all,constant,pca,columns,random"
        print("| " + names.replace(",", " | ") + " |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for expansion, k in SETTINGS:
            print(row(store, folder, expansion, k), flush=True)


if __name__ == "__main__":
    main()
