"""Remove, weaken or strengthen features of an adapter, and measure what that changes.

The edit adds `d = (factor − 1) · value · decoder row` of its features to the row of a token. A
feature's value is not linear in the row and depends on sites that come later in the network; the
weights of a site can express only a linear function of its own columns. So, for each site:

1. `D` is the best linear approximation of the edit `d` of a site's columns `x`, by least squares
   over the tokens of the store: `min Σ ‖d − D·x‖²`, `D = (Σ d·xᵀ) (Σ x·xᵀ)⁺`. It is the same for
   every B of full column rank.
2. `B' = B · (1 + D)` in the gauge of the rows. Sites that the edit does not touch keep their bytes.
3. The error is `Σ ‖d − D·x‖² / Σ ‖d‖²` in effect units, on rows that were not fitted. It is 0 when
   the features are whole columns or directions of a site that they read linearly. A sparse feature
   that reads many sites has an error near 1.
4. If the error is at most `--tolerance`, the output is a PEFT adapter with changed `lora_B`.
   Otherwise it is a runtime patch (`patch`).
5. On held-out rollouts: KL(adapter ‖ patched), KL(adapter ‖ folded), KL(patched ‖ folded), and for
   scale KL(adapter ‖ base). KL(patched ‖ folded) is 0 when the fold is exact and no edited site
   reads what another one changes: the patch subtracts what the features are in the unchanged run,
   the fold a share of what the site reads.

In: adapter, activation store, SAE, features. Out: a folder with the adapter or the patch, and
`report.json`.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from safetensors.torch import save_file
from torch import Tensor

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.artifact import MANIFEST, Identity, replacing, write_text
from lorascope.causal.effect_options import EditConfig, require_features
from lorascope.causal.effects import (
    bootstrap_interval,
    kl_divergence,
    ratio_of_sums,
    select_measured,
    sum_by,
)
from lorascope.causal.held_out import HeldOut, describe_run, open_held_out
from lorascope.causal.patch import PATCH, Patch
from lorascope.causal.report_records import EditedRun, EditReport
from lorascope.causal.study import format_interval
from lorascope.record_json import to_json
from lorascope.sae.model import SAE, load_sae
from lorascope.sites import SiteLayout
from lorascope.stage import Build, built
from lorascope.subject.adapter import CONFIG, WEIGHTS, lora_tensors
from lorascope.subject.bottlenecks import unmix
from lorascope.subject.intervene import Edit, RowEditor
from lorascope.subject.load import Subject

log = logging.getLogger(__name__)

REPORT = "report.json"
_COPIED = (".json", ".jinja", ".txt", ".model")  # config and tokenizer
_BLOCK = 8192  # rows at a time
_RUNS = ("base", "patched", "folded")


def run(config: EditConfig) -> Path:
    """Remove, weaken or strengthen features of an adapter, and return the folder of the result.

    The folder has an adapter with changed weights, or a `Patch`. Its `report.json` says which, how
    much of the edit weights miss, and KL in nats a token. A finished result of the same settings is
    kept. Raises ArtifactError if inputs do not belong together.
    """
    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.sae, store)
    require_features(config.features, sae)
    identity = Identity(
        kind=EditReport.kind,
        schema=EditReport.schema,
        settings=config.settings(),
        parents={"activations": store.digest, "sae": sae.digest},
    )

    def make(build: Build) -> None:
        held_out = open_held_out(config, sae)
        patch = Patch.from_features(sae, config.features, config.factor)
        fitted = np.ones(store.n_rollouts, bool)
        fitted[held_out.rollouts] = False
        is_edited = store.eligible if config.tokens == "text" else np.ones(store.n_rows, bool)
        fold = _fit_fold(patch, sae.narrow(store), is_edited, fitted if fitted.any() else ~fitted)
        as_weights = fold.error is not None and fold.error <= config.tolerance
        output = "adapter" if as_weights else "patch"
        report = measure(held_out, config, output, is_edited, patch, fold, sae.d_sae)
        names = _write_adapter(build, held_out.subject, sae, fold) if as_weights else [PATCH]
        if not as_weights:
            patch.save(build.path / PATCH)
        write_text(
            build.path / REPORT, json.dumps(to_json(report), indent=1, allow_nan=False) + "\n"
        )
        manifest = identity.manifest(held_out.subject.layout, describe_run(held_out, config.sae))
        build.publish_directory(manifest, [*names, REPORT])
        log.info("%s", table(report, config.output))

    return built(config.output, identity, make, overwrite=config.overwrite)


@dataclass(frozen=True)
class _Fold:
    """The change `D` of each site that an edit touches, by the site's index in the layout.

    `error` is the share of the whole edit that is missed, from 0 to about 1, and `errors` is that
    of each site. None if no feature fires on the rows that were not fitted.
    """

    changes: Mapping[int, Float64[Tensor, "rank rank"]]
    error: float | None
    errors: Mapping[str, float]


def _fit_fold(
    patch: Patch,
    store: ActivationStore,
    is_edited: npt.NDArray[np.bool_],
    fitted: npt.NDArray[np.bool_],
) -> _Fold:
    """Fit the changes on the rollouts that `fitted` marks, and measure the error on the others.

    If all rollouts are fitted, the error is measured on them. `store` has the patch's columns.
    `is_edited` marks the rows to edit; the fit keeps the other rows unchanged.
    """
    layout = store.layout
    is_fitted = fitted[store.rollout_of(np.arange(store.n_rows))]
    writes = (patch.sae.W_dec != 0).any(0) & (patch.factor != 1)
    touched = {i: columns for i, columns in enumerate(layout.slices) if writes[columns].any()}
    ranks = {i: layout.sites[i].rank for i in touched}
    sums = {i: torch.zeros(2, rank, rank, dtype=torch.float64) for i, rank in ranks.items()}
    for x, d, rows in _blocks(patch, store, is_edited):
        here = torch.from_numpy(is_fitted[rows])
        for i, columns in touched.items():
            x_site = x[here][:, columns]
            sums[i][0] += d[here][:, columns].T @ x_site
            sums[i][1] += x_site.T @ x_site
    changes: dict[int, Tensor] = {}
    for i, (dx, xx) in sums.items():
        change = dx @ torch.linalg.pinv(xx, hermitian=True)
        changes[i] = torch.where(change.abs() < 1e-12, 0.0, change)  # those are rounding errors
    effect = torch.from_numpy(layout.effect_scale)
    left, whole = torch.zeros(2, len(layout.sites), dtype=torch.float64)
    measured = ~is_fitted if (~is_fitted).any() else is_fitted
    for x, d, rows in _blocks(patch, store, is_edited):
        here = torch.from_numpy(measured[rows])
        for i, columns in touched.items():
            edit = d[here][:, columns]
            rest = (edit - x[here][:, columns] @ changes[i].T) * effect[columns]
            left[i] += rest.square().sum()
            whole[i] += (edit * effect[columns]).square().sum()
    names = {i: layout.sites[i].name for i in changes}
    return _Fold(
        changes,
        float(left.sum() / whole.sum()) if whole.sum() else None,
        {names[i]: float(left[i] / whole[i]) for i in changes if whole[i]},
    )


def _blocks(
    patch: Patch, store: ActivationStore, is_edited: npt.NDArray[np.bool_]
) -> Iterator[tuple[Tensor, Tensor, npt.NDArray[np.int64]]]:
    """Yield rows and their edits in float64, and the row numbers."""
    for first, block in store.blocks(_BLOCK):
        x = torch.from_numpy(np.array(block, np.float32))
        rows = np.arange(first, first + len(x))
        d = patch.change(x, torch.from_numpy(is_edited[rows]))
        yield x.double(), d.double(), rows


@torch.inference_mode()
def measure(
    held_out: HeldOut,
    config: EditConfig,
    output: Literal["adapter", "patch"],
    is_edited: npt.NDArray[np.bool_],
    patch: Patch,
    fold: _Fold,
    d_sae: int,
) -> EditReport:
    """Run the held-out rollouts patched and folded, and return the report.

    `is_edited` marks the rows of the store that the patch edits.
    """
    found: dict[str, list[Tensor]] = {}
    owners: list[npt.NDArray[np.int64]] = []
    edited_rows = torch.from_numpy(is_edited)
    batches = list(held_out.batches(copies=4))
    subject = held_out.subject
    with RowEditor(subject) as editor, runtime.progress(len(batches), "edit", "batches") as bar:
        folded = _folded_edit(subject, patch, fold)
        _, columns = subject.layout.select(patch.layout.adapter_types)
        for batch in batches:
            edited = edited_rows[batch.rows] & batch.own
            out = editor.run(batch.token_ids)
            held_out.require_rows(batch, out.rows)
            runs = {
                "base": editor.base(batch.token_ids),
                "patched": editor.run(batch.token_ids, patch.edit(editor, out.rows, edited)).logits,
                "folded": editor.run(batch.token_ids, folded).logits,
            }
            logits = {name: select_measured(values, batch.mask) for name, values in runs.items()}
            reference = select_measured(out.logits, batch.mask)
            kl = {name: kl_divergence(reference, values) for name, values in logits.items()}
            kl["between"] = kl_divergence(logits["patched"], logits["folded"])
            fires = patch.change(out.rows[..., columns], edited).abs().sum(-1) > 0
            kl["patched_here"] = kl["patched"] * fires[batch.mask].to(reference.device)
            usual = held_out.is_usual(batch.measured)
            for name, values in {"tokens": torch.ones(len(usual)), **kl}.items():
                found.setdefault(name, []).append(torch.where(usual, values.cpu(), 0.0))
            owners.append(held_out.store.rollout_of(batch.measured))
            bar.update(1)
    _, rollout = np.unique(np.concatenate(owners), return_inverse=True)
    totals = {
        name: sum_by(rollout, torch.cat(values).numpy(), int(rollout.max()) + 1)
        for name, values in found.items()
    }
    tokens = totals["tokens"]
    n = float(tokens.sum())
    return EditReport(
        features=config.features,
        factor=config.factor,
        tokens=config.tokens,
        output=output,
        fold_error=fold.error,
        fold_error_by_site=dict(fold.errors),
        n_sites=len(fold.changes),
        d_sae=d_sae,
        n_rollouts=len(tokens),
        n_tokens=int(n),
        kl={
            name: EditedRun(
                kl=float(totals[name].sum()) / n,
                interval=bootstrap_interval(totals[name], tokens, config.seed),
            )
            for name in _RUNS
        },
        kl_patched_folded=float(totals["between"].sum()) / n,
        share_here=ratio_of_sums(totals["patched_here"], totals["patched"]),
    )


def _folded_edit(subject: Subject, patch: Patch, fold: _Fold) -> Edit:
    """Return the edit that changes rows in the way that the folded weights do."""
    by_module = {patch.layout.sites[i].module: change for i, change in fold.changes.items()}
    by_column = {
        columns.start: by_module[site.module].float()
        for site, columns in zip(subject.layout.sites, subject.layout.slices, strict=True)
        if site.module in by_module
    }

    def edit(columns: slice, values: Tensor) -> Tensor | None:
        change = by_column.get(columns.start)
        return None if change is None else values + values @ change.T.to(values.device)

    return edit


def _write_adapter(build: Build, subject: Subject, sae: SAE, fold: _Fold) -> list[str]:
    """Write the folded adapter as PEFT saves one, and return the names of its files.

    If its config names the base model by a relative path, the path is changed to start from the
    new folder.
    """
    source, out = subject.adapter.path, build.path
    copied = [
        file.name
        for file in sorted(source.iterdir())
        if file.suffix in _COPIED and file.name not in (CONFIG, MANIFEST, REPORT) and file.is_file()
    ]
    for name in copied:
        shutil.copyfile(source / name, out / name)
    named = subject.adapter.config.get("base_model_name_or_path")
    relative = source / str(named)
    if named and not Path(str(named)).is_absolute() and relative.exists():
        named = Path(os.path.relpath(relative.resolve(), build.out.resolve())).as_posix()
    settings = {**subject.adapter.config, "base_model_name_or_path": named}
    write_text(out / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    _write_folded(subject, sae.layout, fold, out / WEIGHTS)
    return [*copied, CONFIG, WEIGHTS]


def _write_folded(subject: Subject, layout: SiteLayout, fold: _Fold, out: Path) -> None:
    """Write the adapter's tensors with `B` of each changed site folded, in their own dtypes."""
    mixes = {
        site.module: mix for site, mix in zip(subject.layout.sites, subject.mixes, strict=True)
    }
    tensors = subject.adapter.tensors()
    names = lora_tensors(tensors)
    for i, change in fold.changes.items():
        module = layout.sites[i].module
        name = names[module]["lora_B"]
        whole = torch.eye(len(change), dtype=torch.float64) + change
        if (mix := mixes[module]) is not None:
            exact = mix.cpu().double()
            whole = unmix(exact) @ whole @ exact
        b = tensors[name]
        tensors[name] = (b.double() @ whole).to(b.dtype).contiguous()
    with replacing(out) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def table(report: EditReport, out: Path) -> str:
    """Return the report's main numbers as a table for the terminal."""
    error = report.fold_error
    missed = "no feature fires on held-out rows" if error is None else f"weights miss {error:.1%}"
    outputs = {
        "adapter": f"{out} is a PEFT adapter with changed weights",
        "patch": f"{out} is a runtime patch; the adapter's weights are unchanged",
    }
    lines = [
        f"features {', '.join(map(str, report.features))} times {report.factor:g}; {missed}; "
        + outputs[report.output],
        f"{report.n_rollouts} held-out rollouts, {report.n_tokens:,} predicted tokens; "
        "KL(adapter ‖ run) in nats a token",
        *(
            f"  {name:<10}{run.kl:>11.4g}  {format_interval(run.interval, '.3g')}"
            for name, run in report.kl.items()
        ),
        f"KL(patched ‖ folded): {report.kl_patched_folded:.4g}",
    ]
    return "\n".join(lines)
