"""Train a sparse autoencoder on an activation store.

In: an activation store. Out: an SAE file with its threshold and a report of held-out rows.

1. Split the eligible rows by rollout; measure the columns of the training part, choose units.
2. Train for whole batches: Adam, linear warm-up, then linear decay to zero (objective.py).
3. Fold the units into the weights, so that the SAE takes raw rows.
4. Calibrate the threshold on training rows, evaluate on the held-out ones, publish.

A checkpoint beside the output holds everything that step i + 1 depends on. Killed at any moment,
the same command goes on from there and writes the same bytes (CPU).
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch

from lorascope.activations.batches import BatchPlan, RowNumbers, read_blocks, split_rows
from lorascope.activations.store import ActivationStore
from lorascope.artifact import Build, building, is_made, make_manifest
from lorascope.config import Config, option
from lorascope.errors import ConfigError, Interrupted
from lorascope.runtime import pick_device, progress
from lorascope.sae.evaluate import ColumnMoments, evaluate
from lorascope.sae.model import KIND, SAE, SCHEMA
from lorascope.sae.objective import Trainer, column_scale, initial_weights
from lorascope.sites import parse_adapter_types

log = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint.safetensors"
_INITIAL_ROWS = 8192  # rows whose mean b_dec starts from
_AUTO_TOKENS = 4_000_000
_AUTO_EPOCHS = 20


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Config):
    """Options that decide what is learned from a store."""

    expansion_factor: int = option(16, help="latents for each column of a row")
    k: float = option(50.0, help="latents that fire for each token, on average")
    batch_size: int = option(1024, help="tokens in a step")
    epochs: int | None = option(
        None, help="passes over the training tokens (default: 1 to 20, towards 4 million tokens)"
    )
    lr: str = option("auto", help="peak learning rate of Adam, or auto: by the number of columns")
    warmup: int = option(100, help="steps of rising learning rate, at most a tenth of all")
    seed: int = option(42, help="seed of the split, the shuffle and the first weights")
    normalize: Literal["effect", "std", "rms", "none"] = option(
        "std",
        help="unit of a column for the SAE: its standard deviation, its root mean square, what it "
        "writes (scale times norm of B), or its raw value",
    )
    holdout: float = option(0.1, help="share of the tokens kept for the report, by rollout")
    dead_after: int = option(100_000, help="tokens without firing after which a latent is dead")
    auxk_alpha: float = option(1 / 32, help="weight of the loss that revives dead latents")

    def check(self) -> None:
        """Raise ConfigError when a value is impossible whatever the store holds."""
        super().check()
        if not 0 < self.k < math.inf:
            raise ConfigError(
                f"--k is {self.k:g}, expected more than 0, at most the latents' number"
            )
        for name in ("expansion_factor", "batch_size", "epochs"):
            self.require(name, 1)
        for name in ("warmup", "dead_after", "auxk_alpha", "seed"):
            self.require(name, 0)
        if not 0 < self.holdout < 1:
            raise ConfigError(f"--holdout is {self.holdout}, expected between 0 and 1")
        if self.lr != "auto" and not 0 < _number(self.lr) < math.inf:
            raise ConfigError(f"--lr is {self.lr}, expected auto or a number above 0")

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the SAE; the learning rate in one spelling."""
        lr = self.lr if self.lr == "auto" else _number(self.lr)
        return {**super().settings(), "lr": lr}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions):
    """Options of `train`."""

    data_dir: Path = option(
        Path("activations_all_adapters"), help="activation store to train on", identity=False
    )
    output: Path | None = option(
        None,
        help="SAE to write: a file ending in .pt, else a folder that SAELens reads too "
        "(default: trained_sae_adapters_INITIALS.pt)",
        identity=False,
    )
    adapter_types: tuple[str, ...] = option(
        (), help="projections whose columns to use, such as gate_proj, g-u-d or mlp (default: all)"
    )
    device: str = option("auto", help="auto, cpu, cuda or mps", identity=False)
    checkpoint_every: float = option(60.0, help="seconds between checkpoints", identity=False)
    resume: bool = option(True, help="go on from a checkpoint, if there is one", identity=False)
    overwrite: bool = option(False, help="replace an output of other settings", identity=False)

    def check(self) -> None:
        """Raise ConfigError when a value is impossible whatever the store holds."""
        super().check()
        self.require("checkpoint_every", 0, unit=" seconds")

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the SAE; numbers and names in one spelling."""
        types = list(parse_adapter_types(self.adapter_types))
        return super().settings() | {"adapter_types": types}


def run(config: TrainConfig) -> Path:
    """Train as configured and return the SAE's path; a finished one is left as it is."""
    store = ActivationStore.open(config.data_dir)
    types = parse_adapter_types(config.adapter_types) or store.layout.adapter_types
    store = store.select(types)
    d_sae = config.expansion_factor * store.d_in
    if config.k > d_sae:
        raise ConfigError(
            f"--k is {config.k:g}, expected at most {d_sae}: the SAE has {config.expansion_factor} "
            f"x {store.d_in} latents"
        )
    out = config.output or Path(f"trained_sae_adapters_{store.layout.initials}.pt")
    identity = {
        "settings": {**config.settings(), "adapter_types": list(types)},
        "parents": {"activations": store.digest},
    }
    if is_made(out, KIND, **identity, overwrite=config.overwrite):
        log.info("%s is already there, made with these settings", out)
        return out
    train_rows, held_out = split_rows(store, config.holdout, config.seed)
    plan = BatchPlan.of(store, train_rows, config.batch_size, config.seed)
    with building(out, KIND, **identity, overwrite=config.overwrite) as build:
        return _train(config, plan, held_out, build, identity)


def _train(
    config: TrainConfig,
    plan: BatchPlan,
    held_out: RowNumbers,
    build: Build,
    identity: dict[str, Any],
) -> Path:
    store = plan.store
    d_sae = config.expansion_factor * store.d_in
    n_train, n_skipped = len(plan.rows), store.n_rows - len(plan.rows) - len(held_out)
    epochs = config.epochs or min(max(_AUTO_TOKENS // n_train, 1), _AUTO_EPOCHS)
    n_steps = plan.n_batches(epochs)
    lr = auto_lr(store.d_in) if config.lr == "auto" else _number(config.lr)
    log.info(
        "%s: %d tokens to train on, %d held out, %d special ones left out; %d columns (%s)",
        *(store.path, n_train, len(held_out), n_skipped, store.d_in, store.layout.initials),
    )
    log.info(
        "%d latents, k %g, %d epochs of %d tokens = %d steps of %d, learning rate %.2g, units %s",
        *(d_sae, config.k, epochs, n_train, n_steps, config.batch_size, lr, config.normalize),
    )
    moments = ColumnMoments.of(read_blocks(store, plan.rows))
    scale = column_scale(config.normalize, store.layout, moments)
    if left_out := [store.layout.column_names[i] for i in np.flatnonzero(scale == 0)]:
        log.warning(
            "%d of %d columns are constant, or write nothing, and are left out: %s",
            *(len(left_out), store.d_in, ", ".join(left_out[:20])),
        )
    device = pick_device(config.device)
    first = torch.cat(list(read_blocks(store, _spread(plan.rows, _INITIAL_ROWS))))
    generator = torch.Generator().manual_seed(config.seed)
    weights = initial_weights(first * torch.from_numpy(scale).float(), d_sae, generator)
    trainer = Trainer(
        weights,
        k=config.k,
        n_steps=n_steps,
        lr=lr,
        warmup=config.warmup,
        dead_after=config.dead_after,
        auxk_alpha=config.auxk_alpha,
        device=device,
    )
    if config.resume:
        trainer.restore(build.path / _CHECKPOINT)
    scale_here = torch.from_numpy(scale).float().to(device)
    with _stop_between_steps() as stop, progress(n_steps, "training", "steps") as bar:
        bar.update(trainer.step)
        saved = time.monotonic()
        while trainer.step < n_steps:
            trainer.take(plan.batch(trainer.step).to(device) * scale_here)
            bar.update()
            if trainer.step % trainer.log_every == 0:
                bar.set_postfix_str(trainer.summary())
            if stop or time.monotonic() - saved >= config.checkpoint_every:
                trainer.save(build.path / _CHECKPOINT)
                saved = time.monotonic()
            if stop:
                raise Interrupted(stop[0])
    trainer.save(build.path / _CHECKPOINT)
    folded = trainer.weights.folded(
        torch.from_numpy(scale).to(device), torch.from_numpy(moments.mean).to(device)
    )
    content = {
        "d_in": store.d_in,
        "d_sae": d_sae,
        "k": config.k,
        "normalize": config.normalize,
        "scale": scale.tolist(),
        "left_out": left_out,
        "steps": n_steps,
        "log": trainer.log,
        "config": _published_config(config, store, lr, n_steps),
    }
    sae = SAE(
        **{name: tensor.cpu() for name, tensor in folded.items()},
        threshold=None,
        layout=store.layout,
        manifest=make_manifest(
            KIND, SCHEMA, **identity, layout=store.layout.to_json(), content=content
        ),
    )
    sae = sae.calibrated(store, plan.rows, config.k)
    report = evaluate(sae, read_blocks(store, held_out))
    report["train"] = trainer.means()
    _log_report(report, n_train, config)
    return sae.sealed(report=report).publish(build)


def auto_lr(d_in: int) -> float:
    """Return the peak learning rate for rows of `d_in` columns: 8e-3 for 56, 2.8e-3 for 448.

    Adam moves a weight by about the learning rate, and an entry of a unit direction is about
    `1 / sqrt(d_in)`: the rule keeps their ratio. Measured on planted data of 56 columns, 1,000
    steps: FVU 0.172 at 5.6e-3, 0.158 at 1.1e-2, 0.161 at 2.2e-2; of 20 columns, 400 steps: 0.172 at
    8e-3, 0.170 at 1.6e-2 with fewer directions found.
    """
    return 0.06 / math.sqrt(d_in)


@contextmanager
def _stop_between_steps() -> Generator[list[int]]:
    """Note SIGINT and SIGTERM in the list that this yields; the second one stops at once.

    A step must not be cut in two: its half would be saved.
    """
    asked: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise Interrupted(number)
        log.warning("finishing the step, then saving; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _published_config(
    config: TrainConfig, store: ActivationStore, lr: float, n_steps: int
) -> dict[str, Any]:
    """Return the keys that the published scripts look for in a `.pt`, and what made this one."""
    return {
        "k": int(config.k) if config.k.is_integer() else config.k,
        "batch_size": config.batch_size,
        "learning_rate": lr,
        "num_steps": n_steps,
        "expansion_factor": config.expansion_factor,
        "adapter_types": list(store.layout.adapter_types),
        "seed": config.seed,
        "normalize": config.normalize,
    }


def _log_report(report: dict[str, Any], n_train: int, config: TrainConfig) -> None:
    train = report["train"]
    log.info(
        "held out (%d tokens): FVU %s in %s units, %s raw; L0 %.2f (training %.2f); %d latents "
        "alive, %.1f %% never fired; cosine %s",
        report["n_rows"],
        *(_shown(report["fvu"]), config.normalize, _shown(report["fvu_raw"])),
        *(report["l0"], train["l0"], report["alive"], 100 * report["never_fired"]),
        _shown(report["cosine"]),
    )
    if abs(report["l0"] - train["l0"]) > 0.2 * train["l0"]:
        log.warning(
            "L0 is %.2f on held-out rows but %.2f in training, more than 20 %% apart: the held-out "
            "rollouts differ from the others, or the run was too short; train on more tokens",
            *(report["l0"], train["l0"]),
        )
    if report["never_fired"] > 0.2:
        log.warning(
            "%.0f %% of the latents never fired on held-out rows: the dictionary is wider than "
            "what %d tokens show; lower --expansion-factor, or generate more",
            *(100 * report["never_fired"], n_train),
        )


def _shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _spread(rows: RowNumbers, n: int) -> RowNumbers:
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(np.int64)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
