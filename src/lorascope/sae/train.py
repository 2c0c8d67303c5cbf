"""Train sparse autoencoders on an activation store.

In: an activation store. Out: an SAE file with its threshold and a report of held-out rows; beside
it the training log (`NAME.jsonl`) and a picture of it (`NAME.png`).

1. Split the eligible rows by rollout; measure the columns of the training part, choose units.
2. Train for whole batches (trainer.py), every SAE of the run on the same ones (variants.py).
3. Fold the units into the weights, so that the SAE takes raw rows.
4. Calibrate the threshold on one half of the held-out rollouts, evaluate on the other, publish.

A checkpoint beside the output holds everything that step i + 1 depends on. Killed at any moment,
the same command goes on from there and writes the same bytes (CPU). Under torchrun the processes
share every batch, and rank 0 writes.
"""

import logging
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorascope.activations.batches import BatchPlan, RowNumbers, batches_on, read_blocks, split_rows
from lorascope.activations.store import ActivationStore
from lorascope.artifact import (
    Build,
    building,
    is_made,
)
from lorascope.errors import ConfigError, Interrupted
from lorascope.runtime import Team, join_team, pick_device, progress, stop_between_steps
from lorascope.sae.finish import TrainingRun, beside, publish, write_table
from lorascope.sae.journal import Journal, journals
from lorascope.sae.metrics import ColumnMoments
from lorascope.sae.model import KIND
from lorascope.sae.objective import column_scale, initial_weights
from lorascope.sae.settings import TrainConfig, number
from lorascope.sae.sweep import Variant, output_of
from lorascope.sae.trainer import Trainer
from lorascope.sites import parse_adapter_types

log = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint.safetensors"
_INITIAL_ROWS = 8192  # rows at least from which the first weights are made
_AUTO_TOKENS = 4_000_000
_AUTO_EPOCHS = 20


def run(config: TrainConfig) -> Path:
    """Train as configured and return the SAE's path; a finished one is left as it is.

    With several SAEs the path is that of a table of them, as JSON.
    """
    store = ActivationStore.open(config.data_dir)
    types = parse_adapter_types(config.adapter_types) or store.layout.adapter_types
    store = store.select(types)
    config.room(store.d_in)
    base = config.output or Path(f"trained_sae_adapters_{store.layout.initials}.pt")
    todo: dict[Path, tuple[Variant, dict[str, Any]]] = {}
    every = config.variants()
    for variant in every:
        out = output_of(base, variant)
        kin = [other.seed for other in every if other.kin == variant.kin]
        identity = {
            "settings": {
                **config.settings(),
                **variant.settings(),
                "adapter_types": list(types),
                **({"seeds": kin} if len(kin) > 1 else {}),
            },
            "parents": {"activations": store.digest},
        }
        todo[out] = variant, identity
    unfinished = [
        out
        for out, (_, identity) in todo.items()
        if not is_made(out, KIND, **identity, overwrite=config.overwrite)
    ]
    if not unfinished:
        log.info("%s is already there, made with these settings", " and ".join(map(str, todo)))
    else:
        rows, held_out = split_rows(store, config.holdout, config.each("seed")[0], config.roles)
        plan = BatchPlan.from_store(
            store, rows, config.batch_size, config.each("seed")[0], buffer_rows=config.buffer_rows
        )
        device = _able(pick_device(config.device))
        families = {todo[out][0].kin for out in unfinished}  # whose decoders a stability needs
        needed = {out: made for out, made in todo.items() if made[0].kin in families}
        with join_team(device) as together, ExitStack() as stack:
            builds = {
                out: stack.enter_context(
                    building(out, KIND, **identity, overwrite=config.overwrite)
                )
                for out, (_, identity) in todo.items()
                if together.rank == 0 and out in unfinished
            }
            _train(_prepared(config, plan, held_out, device), needed, builds, together)
    return base if len(todo) == 1 else write_table(base, todo)


def _able(device: torch.device) -> torch.device:
    """Return a device that the kernels are for: CUDA, else the CPU.

    Raises ConfigError for CUDA without Triton, which some platforms' torch does not bring.
    """
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError(
            f"training on {device} needs triton, which is not installed; pip install triton, or "
            "give --device cpu"
        )
    if device.type in ("cpu", "cuda"):
        return device
    log.warning("training has no kernels for %s: using the CPU", device.type)
    return torch.device("cpu")


def _prepared(
    config: TrainConfig, plan: BatchPlan, held_out: RowNumbers, device: torch.device
) -> TrainingRun:
    """Measure the columns and choose their units."""
    store, n_train = plan.store, len(plan.rows)
    epochs = config.epochs or min(max(_AUTO_TOKENS // n_train, 1), _AUTO_EPOCHS)
    log.info(
        "%s: %d tokens to train on, %d held out, %d others left out; %d columns (%s)",
        *(store.path, n_train, len(held_out), store.n_rows - n_train - len(held_out)),
        *(store.d_in, store.layout.initials),
    )
    moments = ColumnMoments.from_blocks(read_blocks(store, plan.rows))
    for _ in read_blocks(store, held_out):
        pass  # a value that is not finite is an error now, not after training
    scale = column_scale(config.normalize, store.layout, moments)
    if left_out := [store.layout.column_names[i] for i in np.flatnonzero(scale == 0)]:
        log.warning(
            "%d of %d columns are constant, or write nothing, and are left out: %s",
            *(len(left_out), store.d_in, ", ".join(left_out[:20])),
        )
    n_steps = plan.n_batches(epochs)
    log.info(
        "%d epochs of %d tokens = %d steps of %d, units %s, %s",
        *(epochs, n_train, n_steps, config.batch_size, config.normalize, config.architecture),
    )
    return TrainingRun(config, plan, held_out, torch.from_numpy(scale), moments, device, n_steps)


def _trainer(run: TrainingRun, variant: Variant, together: Team) -> Trainer:
    """Return the state in which a run begins."""
    config, store = run.config, run.plan.store
    d_sae = variant.expansion_factor * store.d_in
    lr = auto_lr(store.d_in, run.n_steps) if variant.lr == "auto" else number(variant.lr)
    log.info(
        "%s%d latents, k %g, learning rate %.2g, seed %d",
        *(variant.label and f"{variant.label}: ", d_sae, variant.k, lr, variant.seed),
    )
    first = _spread(run.plan.rows, max(_INITIAL_ROWS, d_sae))
    rows = torch.cat(list(read_blocks(store, first))) * run.scale.float()
    return Trainer(
        initial_weights(
            rows,
            d_sae,
            torch.Generator().manual_seed(variant.seed),
            learns_threshold=config.architecture == "jumprelu",
        ),
        k=variant.k,
        n_steps=run.n_steps,
        lr=lr,
        architecture=config.architecture,
        signed=config.signed,
        warmup=config.warmup,
        dead_after=config.dead_after,
        auxk_alpha=config.auxk_alpha,
        bfloat16=config.precision == "bfloat16",
        device=run.device,
        team=together,
    )


def _train(
    run: TrainingRun,
    todo: Mapping[Path, tuple[Variant, dict[str, Any]]],
    builds: Mapping[Path, Build],
    together: Team,
) -> None:
    """Train all SAEs of a run over one pass of the data; rank 0 saves and publishes them."""
    config, scale = run.config, run.scale.float().to(run.device)
    trainers = {out: _trainer(run, variant, together) for out, (variant, _) in todo.items()}
    if config.resume:
        for out, build in builds.items():
            trainers[out].restore(build.path / _CHECKPOINT)
    for trainer in trainers.values():
        trainer.agree()

    def save() -> None:
        for out, build in builds.items():
            trainers[out].save(build.path / _CHECKPOINT)

    step = min(trainer.step for trainer in trainers.values())
    with (
        journals(
            {todo[out][0].label: beside(out, ".jsonl") for out in builds},
            config=config.to_json(),
            folder=beside(next(iter(todo)), ".tensorboard"),
            track=config.track if builds else (),
            step={todo[out][0].label: trainers[out].step for out in builds},
        ) as logs,
        stop_between_steps() as stop,
        progress(run.n_steps, "training", "steps") as bar,
    ):
        bar.update(step)
        saved = time.monotonic()
        part = (together.rank, together.world)
        for x in batches_on(run.device, run.plan, step, run.n_steps, part):
            here = x * scale
            for out, trainer in trainers.items():
                if trainer.step == step:
                    trainer.take(here)
                    if journal := logs.get(todo[out][0].label):
                        _log(trainer, journal, config.batch_size)
            step += 1
            bar.update()
            one = next(iter(trainers.values()))
            if step % one.log_every == 0:
                bar.set_postfix_str(one.summary())
            stopping = together.any(bool(stop))
            if stopping or time.monotonic() - saved >= config.checkpoint_every:
                save()
                saved = time.monotonic()
            if stopping:
                raise Interrupted(stop[0] if stop else 15)
    save()
    for out, build in builds.items():
        publish(run, out, build, todo, trainers)


def _log(trainer: Trainer, journal: Journal, batch_size: int) -> None:
    if trainer.log and trainer.log[-1]["step"] == trainer.step:
        values = {name: value for name, value in trainer.log[-1].items() if name != "step"}
        journal.log(trainer.step, trainer.step * batch_size, values)


def auto_lr(d_in: int, n_steps: int) -> float:
    """Return the peak learning rate for rows of `d_in` columns and a run of `n_steps`.

    Best rates on planted rows of 20, 56 and 448 columns fell with the root of both
    (`docs/training.md`).
    """
    return min(0.08 / math.sqrt(d_in) * math.sqrt(1000 / max(n_steps, 60)), 0.03)


def _spread(rows: RowNumbers, n: int) -> RowNumbers:
    return rows[np.linspace(0, len(rows) - 1, min(n, len(rows))).astype(np.int64)]
