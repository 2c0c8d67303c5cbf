"""Faithfulness of SAEs of the shipped subject against sparsity and size, beside the baselines.

    python benchmarks/faithfulness.py --problems 400

Trains an SAE of each setting on the demo's problems, evaluates it on rollouts that it never saw,
and prints a row of a Markdown table for each. Baselines: all rows rebuilt, then special ones kept.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from lorascope.activations.generate import GenerateConfig
from lorascope.activations.generate import run as generate
from lorascope.causal.effects import open_report
from lorascope.causal.faithfulness import EvaluateConfig
from lorascope.causal.faithfulness import run as evaluate
from lorascope.demo.demo import SUBJECT
from lorascope.demo.problems import write_jsonl
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run as train

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
                model_path=sae,
                output=folder / f"report-{expansion}-{k:g}.json",
                **SUBJECT_OF,
            )
        )
    )
    made, runs = report["reconstruction"], report["faithfulness"]["runs"]
    low, high = runs["sae"]["recovered_interval"]
    cells = [
        f"{expansion}",
        f"{k:g}",
        f"{made['l0']:.2f}",
        f"{made['fvu']:.3f}",
        f"{runs['sae']['recovered']:.3f} ({low:.2f} to {high:.2f})",
        f"{runs['sae']['special_kept']['recovered']:.3f}",
    ]
    for name in ("pca", "columns", "random"):
        kept = runs[name]["special_kept"]["recovered"]
        cells.append(f"{runs[name]['recovered']:.3f}, {kept:.3f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=400)
    n = parser.parse_args().problems
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(folder / "problems.jsonl", n, "demo")
        store = generate(
            GenerateConfig(
                dataset=str(folder / "problems.jsonl"),
                num_examples=n,
                output_dir=folder / "rows",
                **SUBJECT_OF,
            )
        )
        names = "latents a column,k,L0,FVU,recovered (95 %),special kept,pca,columns,random"
        print("| " + names.replace(",", " | ") + " |")
        print("|---|---|---|---|---|---|---|---|---|")
        for expansion, k in SETTINGS:
            print(row(store, folder, expansion, k), flush=True)


if __name__ == "__main__":
    main()
