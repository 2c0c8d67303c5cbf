"""The end of a training run: fold the scale, calibrate the threshold, evaluate, and write.

Half of the held-out rollouts calibrate the threshold, the other half is reported on, so neither has
seen the rows of the other.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorascope.activations.batches import BatchPlan, RowNumbers, halves, read_blocks
from lorascope.artifact import Identity, read_manifest, write_text
from lorascope.errors import NumberError
from lorascope.record_json import to_json
from lorascope.runtime import process_rank
from lorascope.sae.metrics import ColumnMoments, evaluate, stability
from lorascope.sae.model import SAE
from lorascope.sae.settings import SweepMember, TrainConfig
from lorascope.sae.trainer import Trainer
from lorascope.sae.training_log import SweepRow, sibling
from lorascope.stage import Build

log = logging.getLogger(__name__)


Members = Mapping[Path, tuple[SweepMember, Identity]]


@dataclass(frozen=True)
class TrainingRun:
    """What the SAEs of a run share."""

    config: TrainConfig
    plan: BatchPlan
    held_out: RowNumbers
    scale: Tensor
    moments: ColumnMoments
    device: torch.device
    n_steps: int


def publish(
    run: TrainingRun,
    out: Path,
    build: Build,
    members: Members,
    trainers: Mapping[Path, Trainer],
) -> None:
    """Fold, calibrate, evaluate and write one SAE of the run.

    Raises NumberError instead of writing it if its FVU is above `max_fvu`: so is that of an SAE
    without a latent that fires, which reconstructs a constant.
    """
    (member, identity), trainer, config = members[out], trainers[out], run.config
    store, device = run.plan.store, run.device
    folded = trainer.weights.folded(
        run.scale.to(device), torch.from_numpy(run.moments.mean).to(device)
    )
    threshold = folded.pop("threshold", None)
    other_seeds = [
        trainers[path].weights.W_dec.detach()
        for path, (other, _) in members.items()
        if other.without_seed == member.without_seed and path != out
    ]
    store_manifest = read_manifest(store.path)
    content = {
        "d_in": store.d_in,
        "d_sae": folded["W_enc"].shape[1],
        "k": member.k,
        "architecture": config.architecture,
        "normalize": config.normalize,
        "roles": list(config.roles),
        "scale": run.scale.tolist(),
        "left_out": [store.layout.column_names[i] for i in np.flatnonzero(run.scale.numpy() == 0)],
        "steps": run.n_steps,
        "log": trainer.log,
        "base_weights": store_manifest.parents.get("base_weights") if store_manifest else None,
        "config": {  # the published scripts read these keys from a `.pt`
            "k": int(member.k) if member.k.is_integer() else member.k,
            "batch_size": config.batch_size,
            "learning_rate": trainer.lr,
            "num_steps": trainer.n_steps,
            "expansion_factor": member.expansion_factor,
            "adapter_types": list(store.layout.adapter_types),
            "seed": member.seed,
            "normalize": config.normalize,
        },
    }
    if other_seeds:
        cosines = stability(trainer.weights.W_dec.detach(), other_seeds).tolist()
        content["stability"] = [round(value, 4) for value in cosines]
    sae = SAE(
        **{name: tensor.cpu() for name, tensor in folded.items()},
        threshold=None if threshold is None else threshold.cpu(),
        layout=store.layout,
        manifest=identity.manifest(store.layout, content),
    )
    to_calibrate, to_report = halves(store, run.held_out)
    sae = sae.calibrated(store, to_calibrate, member.k)
    report = evaluate(sae, read_blocks(store, to_report))
    text = to_report[store.eligible[to_report]]
    of_text = evaluate(sae, read_blocks(store, text)) if len(text) else {}
    report["text"] = {name: of_text.get(name) for name in ("n_rows", "fvu", "l0")}
    report["train"] = trainer.means()
    report["n_calibrated"] = len(to_calibrate)
    log_report(run, member, report)
    if report["fvu"] is not None and not report["fvu"] <= config.max_fvu:
        raise NumberError(
            f"{out} is not published: its FVU is {report['fvu']:.3g} on held-out rows, more than "
            f"--max-fvu {config.max_fvu:g}, and {report['alive']} of {sae.d_sae} latents fire; "
            "lower --lr or train on more tokens, with --overwrite, or publish it as it is with "
            "--max-fvu inf"
        )
    sae = sae.sealed(report=report)
    sae.publish(build)


def write_table(output: Path, members: Members) -> Path:
    """Write and log one row for each SAE of a sweep, and return the table's path."""
    import pandas as pd

    path = sibling(output, ".runs.json")
    if process_rank() > 0:
        return path  # rank 0 may still be publishing
    rows = []
    for out, (member, _) in members.items():
        content = published_content(out)
        cosines = content.get("stability")
        row = SweepRow(
            sae=out.name,
            **member.settings(),
            **{name: content["report"][name] for name in ("fvu", "l0", "alive", "cosine")},
            stability=float(np.median(cosines)) if cosines else None,
        )
        rows.append(to_json(row))
    write_text(path, json.dumps(rows, indent=1) + "\n")
    table = pd.DataFrame(rows).dropna(axis="columns", how="all")
    shown = table.to_string(index=False, na_rep="-", float_format="{:.4g}".format)
    log.info("held out:\n%s", shown)
    return path


def published_content(out: Path) -> Mapping[str, Any]:
    """Return the content of a published SAE's manifest."""
    manifest = read_manifest(out)
    assert manifest is not None, "it was just published"
    return manifest.content


def log_report(run: TrainingRun, member: SweepMember, report: Mapping[str, Any]) -> None:
    """Log what held-out rows say of an SAE of a run, and warn of what looks wrong."""
    train_l0 = report["train"]["l0"]
    log.info(
        "%sheld out (%d tokens): FVU %s with scale %s, %s raw, %s of text; L0 %.2f (training "
        "%.2f); %d latents alive, %.1f %% never fired; cosine %s",
        member.label and f"{member.label}: ",
        report["n_rows"],
        _ratio(report["fvu"]),
        run.config.normalize,
        _ratio(report["fvu_raw"]),
        _ratio(report["text"]["fvu"]),
        report["l0"],
        train_l0,
        report["alive"],
        100 * report["never_fired"],
        _ratio(report["cosine"]),
    )
    if abs(report["l0"] - train_l0) > 0.2 * train_l0:
        log.warning(
            "L0 is %.2f on held-out rows and %.2f in training, more than 20 %% apart: the held-out "
            "rollouts differ from the others, or the run was too short; train on more tokens",
            report["l0"],
            train_l0,
        )
    if report["never_fired"] > 0.2:
        log.warning(
            "%.0f %% of the latents never fired on held-out rows: the dictionary is wider than "
            "%d training tokens support; lower --expansion-factor, or generate more",
            100 * report["never_fired"],
            len(run.plan.rows),
        )


def _ratio(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
