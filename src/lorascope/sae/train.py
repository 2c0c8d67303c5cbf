"""Train sparse autoencoders on an activation store.

In: an activation store. Out: an SAE with its threshold and a report on held-out rows; next to it
the training log, `NAME.jsonl`, a JSON object per logged step. It is not part of the SAE's digest,
so it may hold a clock.

1. Split the rows by rollout, measure the columns of the training part, choose their scale.
2. Train on whole batches (`trainer.py`); every SAE of a sweep sees the same ones (`settings.py`).
3. Fold the scale into the weights, so that the SAE takes raw rows.
4. Calibrate the threshold on one half of the held-out rollouts, evaluate on the other half, publish
   (`publish.py`).

A checkpoint next to the output holds everything that the next step depends on. Interrupted at any
moment, the same command resumes there and writes the same bytes (on a CPU). Under torchrun the
processes share every batch, and rank 0 writes. A sweep on a CPU uses two processes
(`side_process.py`), which share nothing but the store.
"""

import functools
import logging
import math
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from lorascope.activations.batches import BatchPlan, RowNumbers, batches_on, read_blocks, split_rows
from lorascope.activations.store import ActivationStore
from lorascope.artifact import Identity
from lorascope.errors import ConfigError, Interrupted, NumberError
from lorascope.runtime import (
    free_memory,
    pick_device,
    progress,
    stop_between_steps,
)
from lorascope.sae.metrics import ColumnMoments
from lorascope.sae.model import KIND, SCHEMA
from lorascope.sae.objective import column_scale, initial_weights
from lorascope.sae.publish import (
    Members,
    TrainingRun,
    log_report,
    publish,
    published_content,
    write_table,
)
from lorascope.sae.settings import SweepMember, TrainConfig, parse_number
from lorascope.sae.side_process import asked_for, choose_others, side_process
from lorascope.sae.team import Team, join_team
from lorascope.sae.trainer import Trainer
from lorascope.sae.training_log import TrainingLog, sibling
from lorascope.sites import parse_adapter_types
from lorascope.stage import Build, building, is_made

log = logging.getLogger(__name__)

_CHECKPOINT = "checkpoint.safetensors"
_INITIAL_ROWS = 8192  # the first weights are made from at least this many rows
_AUTO_TOKENS = 4_000_000
_AUTO_EPOCHS = 20


def run(config: TrainConfig) -> Path:
    """Train an SAE on a store, and return its path; a finished SAE is left as it is.

    For a sweep, return the path of its table, a JSON file.
    """
    output, members = _train_unfinished(config)
    return output if len(members) == 1 else write_table(output, members)


def run_as_side_process() -> None:
    """Train the SAEs that another process handed to this one (`side_process.py`)."""
    config, outs = asked_for()
    _train_unfinished(config, only=outs)


def _train_unfinished(
    config: TrainConfig, only: Collection[Path] | None = None
) -> tuple[Path, Members]:
    """Train the SAEs of a run that are not finished; return its output and all of its SAEs.

    `only` leaves the other SAEs of the run to another process.
    """
    store = ActivationStore.open(config.data_dir)
    available = store.layout.adapter_types
    types = parse_adapter_types(config.adapter_types, available) or available
    store = store.select(types)
    config = config.for_columns(store.d_in)
    output = config.output or Path(f"trained_sae_adapters_{store.layout.initials}.pt")
    members: dict[Path, tuple[SweepMember, Identity]] = {}
    sweep = config.sweep()
    for member in sweep:
        seeds = [other.seed for other in sweep if other.without_seed == member.without_seed]
        identity = Identity(
            kind=KIND,
            schema=SCHEMA,
            settings={
                **config.settings(),
                **member.settings(),
                "adapter_types": list(types),
                **({"seeds": seeds} if len(seeds) > 1 else {}),
            },
            parents={"activations": store.digest},
        )
        members[member.path(output)] = member, identity
    unfinished = [
        out
        for out, (_, identity) in members.items()
        if (only is None or out in only) and not is_made(out, identity, overwrite=config.overwrite)
    ]
    if not unfinished:
        log.info("%s already exists with these settings", " and ".join(map(str, members)))
    else:
        data_seed = config.values_of("seed")[0]
        rows, held_out = split_rows(store, config.holdout, data_seed, config.roles)
        plan = BatchPlan.from_store(
            store, rows, config.batch_size, data_seed, buffer_rows=config.buffer_rows
        )
        device = _supported(pick_device(config.device))
        config.require_memory(store.d_in, free_memory(device))
        # a finished SAE is trained again if another seed needs its decoder for the stability
        settings = {members[out][0].without_seed for out in unfinished}
        needed = {out: pair for out, pair in members.items() if pair[0].without_seed in settings}
        others: list[Path] = []
        if not only and device.type == "cpu":
            chosen = choose_others(
                config,
                [member for member, _ in needed.values()],
                plan.n_batches(config.epochs or auto_epochs(len(plan.rows))),
                d_in=store.d_in,
                n_bytes=0 if plan.loaded is None else plan.loaded.nbytes,
            )
            others = [out for out, (member, _) in needed.items() if member in chosen]
        own = {out: pair for out, pair in needed.items() if out not in others}
        with join_team(device) as ranks, ExitStack() as stack:

            def opened(outs: Iterable[Path], stack: ExitStack = stack) -> dict[Path, Build]:
                """Lock what this process writes, and raise if it cannot."""
                identities = {out: members[out][1] for out in outs if out in unfinished}
                return {
                    out: stack.enter_context(building(out, identity, overwrite=config.overwrite))
                    for out, identity in identities.items()
                    if ranks.rank == 0
                }

            builds = opened(own)
            with ExitStack() as until_started:
                opened(others, until_started)
                run = _prepare(config, plan, held_out, device)
            with side_process(config, others) as are_published:
                errors = _train(run, own, builds, ranks)
                if are_published():
                    for out in others:
                        log_report(run, members[out][0], published_content(out)["report"])
                    others.clear()
        if others:
            try:
                _train_unfinished(config, only=others)
            except NumberError as error:
                errors.append(error)
        if errors:
            raise errors[0]
    return output, members


def _supported(device: torch.device) -> torch.device:
    """Return the device if there are kernels for it, else the CPU.

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


def _prepare(
    config: TrainConfig, plan: BatchPlan, held_out: RowNumbers, device: torch.device
) -> TrainingRun:
    """Measure the columns and choose their scale."""
    store, n_train = plan.store, len(plan.rows)
    epochs = config.epochs or auto_epochs(n_train)
    log.info(
        "%s: %d tokens to train on, %d held out, %d of other roles left out; %d columns (%s)",
        store.path,
        n_train,
        len(held_out),
        store.n_rows - n_train - len(held_out),
        store.d_in,
        store.layout.initials,
    )
    is_first = np.isin(plan.rows, store.rollout_start)
    first, later = (
        [ColumnMoments.from_blocks(read_blocks(store, rows))] if len(rows) else []
        for rows in (plan.rows[is_first], plan.rows[~is_first])
    )
    moments = functools.reduce(ColumnMoments.merge, later + first)
    for _ in read_blocks(store, held_out):
        pass  # raises now, not after training, if a value is not finite
    scale = column_scale(config.normalize, moments, *later)
    if left_out := [store.layout.column_names[i] for i in np.flatnonzero(scale == 0)]:
        log.warning(
            "%d of %d columns are constant and are left out: %s",
            len(left_out),
            store.d_in,
            ", ".join(left_out[:20]),
        )
    n_steps = plan.n_batches(epochs)
    log.info(
        "%d epochs of %d tokens = %d steps of %d, normalize %s, %s",
        epochs,
        n_train,
        n_steps,
        config.batch_size,
        config.normalize,
        config.architecture,
    )
    return TrainingRun(config, plan, held_out, torch.from_numpy(scale), moments, device, n_steps)


def _trainer(run: TrainingRun, member: SweepMember, ranks: Team) -> Trainer:
    """Return the state in which the training of one SAE begins."""
    config, store = run.config, run.plan.store
    d_sae = member.expansion_factor * store.d_in
    lr = auto_lr(store.d_in, run.n_steps) if member.lr == "auto" else parse_number(member.lr)
    log.info(
        "%s%d latents, k %g, learning rate %.2g, seed %d",
        member.label and f"{member.label}: ",
        d_sae,
        member.k,
        lr,
        member.seed,
    )
    n_train = len(run.plan.rows)
    spread = np.linspace(0, n_train - 1, min(max(_INITIAL_ROWS, d_sae), n_train)).astype(np.int64)
    rows = torch.cat(list(read_blocks(store, run.plan.rows[spread]))) * run.scale.float()
    return Trainer(
        initial_weights(
            rows,
            d_sae,
            torch.Generator().manual_seed(member.seed),
            learns_threshold=config.architecture == "jumprelu",
        ),
        k=member.k,
        n_steps=run.n_steps,
        lr=lr,
        architecture=config.architecture,
        dead_after=config.dead_after,
        auxk_alpha=config.auxk_alpha,
        device=run.device,
        team=ranks,
    )


def _train(
    run: TrainingRun,
    members: Members,
    builds: Mapping[Path, Build],
    ranks: Team,
) -> list[NumberError]:
    """Train SAEs over one pass of the data; rank 0 saves and publishes them.

    Returns the errors of those that are not published; the others of a sweep are.
    """
    config, scale = run.config, run.scale.float().to(run.device)
    trainers = {out: _trainer(run, member, ranks) for out, (member, _) in members.items()}
    if config.resume:
        for out, build in builds.items():
            trainers[out].restore(build.path / _CHECKPOINT)
    for trainer in trainers.values():
        trainer.agree()

    def save() -> None:
        for out, build in builds.items():
            trainers[out].save(build.path / _CHECKPOINT)

    step = min(trainer.step for trainer in trainers.values())
    logs = {out: TrainingLog(sibling(out, ".jsonl"), step=trainers[out].step) for out in builds}
    with stop_between_steps() as stop, progress(run.n_steps, "training", "steps") as bar:
        bar.update(step)
        saved = time.monotonic()
        part = (ranks.rank, ranks.world)
        shown = next(iter(trainers.values()))
        for batch in batches_on(run.device, run.plan, step, run.n_steps, part):
            x = batch * scale
            for out, trainer in trainers.items():
                if trainer.step == step:
                    trainer.take(x)
                    if out in logs and trainer.log and trainer.log[-1]["step"] == trainer.step:
                        logs[out].write(trainer.step * config.batch_size, trainer.log[-1])
            step += 1
            bar.update()
            if step % shown.log_every == 0:
                bar.set_postfix_str(shown.summary())
            stopping = ranks.any(bool(stop))
            if stopping or time.monotonic() - saved >= config.checkpoint_every:
                save()
                saved = time.monotonic()
            if stopping:
                raise Interrupted(stop[0] if stop else 15)
    save()
    for trainer in trainers.values():
        trainer.release()
    errors: list[NumberError] = []
    for out, build in builds.items():
        try:
            publish(run, out, build, members, trainers)
        except NumberError as error:
            errors.append(error)
    return errors


def auto_epochs(n_tokens: int) -> int:
    """Return how many passes over the tokens reach four million tokens, at most 20."""
    return min(max(_AUTO_TOKENS // n_tokens, 1), _AUTO_EPOCHS)


def auto_lr(d_in: int, n_steps: int) -> float:
    """Return the peak learning rate for rows of `d_in` columns and a run of `n_steps`.

    The best rates on rows of 20 to 448 columns fell with the square root of the columns, and with
    that of the steps up to a thousand; in longer runs they did not fall (`docs/training.md`).
    """
    return min(0.08 / math.sqrt(d_in) * math.sqrt(1000 / min(max(n_steps, 60), 1000)), 0.03)
