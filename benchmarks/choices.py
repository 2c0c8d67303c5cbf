"""Measure what each choice of training gives on planted rows: the tables of `docs/training.md`.

    python benchmarks/choices.py auxk=0.03125,lr=6e-3 auxk=0.03125,lr=6e-3,by_row=0
    python benchmarks/choices.py --tokens 1000000 lr=3.8e-3,auxk=0.25
    python benchmarks/choices.py lr=1.2e-2,d_in=56,expansion=8,k=8,directions=120,active=5

Each argument is one run: `name=value` pairs, separated by commas. Choices without an option of
`train` are set in the module that has them: `by_row` (share of the steps), `encoder` (initial size,
in decoder norms), `beta1`, `beta2`, `first` (`data` or `random` weights) and `rate` (`falls` or
`stays`). Rows, measures and columns are those of `train.py quality`.
"""

import argparse
from argparse import Namespace
from typing import Any

import torch
from contenders import Coder
from planted_rows import column_deviation
from torch import Tensor
from train import Data, measure, prepare

from lorascope.sae import objective, trainer
from lorascope.sae.objective import initial_weights
from lorascope.sae.sparsity import calibrate_threshold
from lorascope.sae.trainer import Trainer

BASE: dict[str, Any] = {
    "lr": 6e-3,
    "auxk": 1 / 8,
    "by_row": 0.5,
    "encoder": 0.3,
    "beta1": 0.9,
    "beta2": 0.99,
    "first": "data",
    "rate": "falls",
    "architecture": "batchtopk",
    "seed": 0,
    "d_in": 448,
    "expansion": 16,
    "k": 50,
    "directions": 2000,
    "active": 30.0,
}


def parse(text: str) -> dict[str, Any]:
    """Return a run's choices."""
    run = dict(BASE)
    for part in text.split(","):
        name, _, value = part.partition("=")
        kind = type(BASE[name])
        run[name] = value == "1" if kind is bool else kind(value)
    return run


def train(run: dict[str, Any], data: Data, n_steps: int) -> tuple[Coder, int]:
    """Train one SAE, and return what reads it and how many latents it has."""
    scale = 1 / column_deviation(data.train)
    sample = data.train[:: max(len(data.train) // 32_768, 1)]
    rows = sample * scale.float()
    trainer._BY_ROW, trainer._BETAS = run["by_row"], (run["beta1"], run["beta2"])
    objective._INITIAL_ENCODER = run["encoder"]
    falling = trainer.schedule
    if run["rate"] == "stays":
        trainer.schedule = lambda step, _n, warmup: min((step + 1) / (warmup + 1), 1.0)
    weights = initial_weights(
        rows[:1] if run["first"] == "random" else rows,
        run["d_in"] * run["expansion"],
        torch.Generator().manual_seed(run["seed"]),
        learns_threshold=run["architecture"] == "jumprelu",
    )
    one = Trainer(
        weights,
        k=run["k"],
        n_steps=n_steps,
        lr=run["lr"],
        architecture=run["architecture"],
        auxk_alpha=run["auxk"],
    )
    batch = 1024
    for i in range(n_steps):
        one.take(data.train[data.order[i * batch : (i + 1) * batch]] * scale.float())
    trainer.schedule = falling
    raw = one.weights.folded(scale, torch.zeros_like(scale))
    ratios = raw.get("threshold", torch.ones_like(raw["b_enc"]))

    def scores(x: Tensor) -> Tensor:
        return (x @ raw["W_enc"] + raw["b_enc"]).relu()

    bound = calibrate_threshold(lambda: (scores(x) / ratios for x in sample.split(batch)), run["k"])

    def code(x: Tensor) -> Tensor:
        pre = scores(x)
        return torch.where(pre > bound * ratios, pre, 0.0)

    now = one.means()
    coder = Coder(
        raw["W_dec"],
        code,
        lambda code: code @ raw["W_dec"] + raw["b_dec"],
        now["l0"],
        now["dead"],
    )
    return coder, len(ratios)


def main() -> None:
    """Train, measure and print each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_float32_matmul_precision("medium")
    for text in given.run:
        run = parse(text)
        shape = Namespace(
            **{name: run[name] for name in ("d_in", "directions", "active")},
            **{"held_out": 32_768, "seed": 0, "spread": 0.5, "raw": False},
            **{"device": "cpu", "batch": 1024},
        )
        data = prepare(shape, given.tokens)
        coder, shape.latents = train(run, data, given.tokens // 1024)
        found = measure(coder, data, shape)
        print(text, " ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
