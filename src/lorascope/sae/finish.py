"""The end of a training run: fold, calibrate, measure on held-out rows, and write.

Half of the held-out rollouts calibrate the threshold, the other half is what the report is about,
so that neither has seen the rows of the other.
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
from lorascope.activations.store import ActivationStore
from lorascope.artifact import Build, make_manifest, read_manifest, write_text
from lorascope.runtime import process_rank
from lorascope.sae.metrics import ColumnMoments, evaluate, stability
from lorascope.sae.model import KIND, SAE, SCHEMA
from lorascope.sae.settings import TrainConfig
from lorascope.sae.sweep import Variant, table
from lorascope.sae.trainer import Trainer
from lorascope.sae.training_report import draw_training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingRun:
    """What every SAE of a run shares."""

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
    todo: Mapping[Path, tuple[Variant, dict[str, Any]]],
    trainers: Mapping[Path, Trainer],
) -> None:
    """Fold, calibrate, evaluate and write one SAE."""
    (variant, identity), trainer, config = todo[out], trainers[out], run.config
    store, device = run.plan.store, run.device
    folded = trainer.weights.folded(
        run.scale.to(device),
        torch.from_numpy(run.moments.mean).to(device),
        signed=config.signed,
    )
    threshold = folded.pop("threshold", None)
    kin = [
        trainers[path].weights.W_dec.detach()
        for path, (other, _) in todo.items()
        if other.kin == variant.kin and path != out
    ]
    if config.signed:  # a latent and the one of opposite direction are the same
        kin = [torch.cat([decoder, -decoder]) for decoder in kin]
    content = {
        "d_in": store.d_in,
        "d_sae": folded["W_enc"].shape[1],
        "k": variant.k,
        "architecture": config.architecture,
        "signed": config.signed,
        "normalize": config.normalize,
        "roles": list(config.roles),
        "scale": run.scale.tolist(),
        "left_out": [store.layout.column_names[i] for i in np.flatnonzero(run.scale.numpy() == 0)],
        "steps": run.n_steps,
        "log": trainer.log,
        "config": _published_config(config, variant, store, trainer),
    }
    if kin:
        agreed = stability(trainer.weights.W_dec.detach(), kin).tolist()
        content["stability"] = [round(value, 4) for value in agreed] * (1 + config.signed)
    sae = SAE(
        **{name: tensor.cpu() for name, tensor in folded.items()},
        threshold=None if threshold is None else threshold.cpu(),
        layout=store.layout,
        manifest=make_manifest(
            KIND, SCHEMA, **identity, layout=store.layout.to_json(), content=content
        ),
    )
    to_calibrate, to_report = halves(store, run.held_out)
    sae = sae.calibrated(store, to_calibrate, variant.k)
    report = evaluate(sae, read_blocks(store, to_report))
    report["train"] = trainer.means()
    report["n_calibrated"] = len(to_calibrate)
    _log_report(report, len(run.plan.rows), config, variant)
    sae = sae.sealed(report=report)
    draw_training(sae.manifest, trainer.log, beside(out, ".png"))
    sae.publish(build)


def beside(out: Path, suffix: str) -> Path:
    """Return the path of a file beside an SAE: `sae.pt` and `sae/` have `sae.jsonl`."""
    return out.with_name(out.name.removesuffix(".pt") + suffix)


def write_table(base: Path, todo: Mapping[Path, tuple[Variant, dict[str, Any]]]) -> Path:
    """Write and log one row for each SAE of a run of several."""
    path = beside(base, ".runs.json")
    if process_rank() > 0:
        return path  # rank 0 may still be publishing
    rows = []
    for out, (variant, _) in todo.items():
        content = (read_manifest(out) or {})["content"]
        report = content["report"]
        agreed = content.get("stability")
        rows.append(
            {
                "sae": out.name,
                **variant.settings(),
                "fvu": report["fvu"],
                "l0": report["l0"],
                "alive": report["alive"],
                "cosine": report["cosine"],
                "stability": float(np.median(agreed)) if agreed else None,
            }
        )
    write_text(path, json.dumps(rows, indent=1) + "\n")
    log.info("held out:\n%s", table(rows))
    return path


def _published_config(
    config: TrainConfig, variant: Variant, store: ActivationStore, trainer: Trainer
) -> dict[str, Any]:
    """Return the keys that the published scripts look for in a `.pt`, and what made this one."""
    return {
        "k": int(variant.k) if variant.k.is_integer() else variant.k,
        "batch_size": config.batch_size,
        "learning_rate": trainer.lr,
        "num_steps": trainer.n_steps,
        "expansion_factor": variant.expansion_factor,
        "adapter_types": list(store.layout.adapter_types),
        "seed": variant.seed,
        "normalize": config.normalize,
    }


def _log_report(
    report: dict[str, Any], n_train: int, config: TrainConfig, variant: Variant
) -> None:
    train = report["train"]
    log.info(
        "%sheld out (%d tokens): FVU %s in %s units, %s raw; L0 %.2f (training %.2f); %d latents "
        "alive, %.1f %% never fired; cosine %s",
        *(variant.label and f"{variant.label}: ", report["n_rows"]),
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
