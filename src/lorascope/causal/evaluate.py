"""Measure how much of an adapter's effect on its model's output an SAE explains.

1. On rollouts that the SAE never saw, the model runs with the adapter. Its rows `x` are read and
   compared with the store's.
2. It runs again with other rows written at every site: the SAE's reconstruction, those of simple
   baselines of the same sparsity, of other SAEs, zeros, and `x` itself as a control.
3. Each prediction is compared with the adapter's: `KL(adapter ‖ run)` in nats, float32.
   `recovered = 1 − ΣKL(adapter ‖ run) / ΣKL(adapter ‖ base)`: 0 is the base model, 1 the adapter.
   Sums are over tokens, intervals resample rollouts. `ce_recovered` is the same for the loss on
   the next token of the rollout.
4. Other tokens attend to special tokens and template headers. So each run is repeated with their
   rows unchanged (`special_kept`), to tell errors there from errors on text.
5. The same by role, and by layer and projection: then only the columns of that layer or projection
   are reconstructed, and 0 is the run with these columns at zero.

In: adapter, activation store, SAE. Out: a report (JSON) and its picture (.png); the table goes to
stderr.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope import runtime
from lorascope.activations.batches import read_blocks, rows_with, split_rows
from lorascope.activations.store import ActivationStore
from lorascope.causal.effect_options import EvaluateConfig
from lorascope.causal.effects import (
    TokenRollouts,
    Values,
    bootstrap_interval,
    complement,
    complement_interval,
    cross_entropy,
    kl_divergence,
    ratio_of_sums,
    select_measured,
)
from lorascope.causal.held_out import SPECIAL, Batch, HeldOut, describe_run, open_held_out
from lorascope.causal.report_records import (
    EvaluationReport,
    Faithfulness,
    Floor,
    GroupRecovered,
    Recovered,
    RoleRecovered,
    RunRecovered,
)
from lorascope.causal.study import Made, format_interval, format_number, report_at
from lorascope.errors import ArtifactError, ConfigError
from lorascope.sites import SiteLayout
from lorascope.texts.roles import ROLES

if TYPE_CHECKING:
    from lorascope.sae.model import SAE
    from lorascope.subject.intervene import Edit, RowEditor

_N_FITTED = 65_536  # training rows that baselines are fitted on
_ABOVE_FLOOR = 10.0  # times the floor: a smaller effect has no meaningful share
_GROUPS = ("layers", "projections")

Reconstruct = Callable[[Tensor], Tensor]  # rows (n, d_in of the SAE) to rows


def run(config: EvaluateConfig) -> Path:
    """Write the report unless it is finished already, and return its file."""
    from lorascope.causal.figures import draw_evaluation
    from lorascope.sae.metrics import evaluate
    from lorascope.sae.model import load_sae

    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.sae, store)
    others = {f"against {path.name}": load_sae(path, store) for path in config.against}
    if len(others) < len(config.against):
        raise ConfigError("--against names two SAEs with the same file name; rename one of them")
    out = config.output or Path(f"evaluation_{config.sae.stem}.json")

    def make() -> Made:
        for name, other in others.items():
            other.layout.require_same(sae.layout, name, config.sae.name)
        held_out = open_held_out(config, sae)
        narrow = sae.narrow(store)
        rows = rows_with(narrow, sae.manifest["settings"].get("roles", ROLES))
        rows = rows[np.isin(narrow.rollout_of(rows), held_out.rollouts)]
        reconstruction = evaluate(sae, read_blocks(narrow, rows))
        rebuilds = _reconstructions(sae, others, narrow, reconstruction["l0"], config.seed)
        faithfulness = measure(held_out, sae, rebuilds, config.seed)
        report = EvaluationReport(reconstruction=reconstruction, faithfulness=faithfulness)
        return Made(report, sae.layout, describe_run(held_out, config.sae))

    return report_at(
        out,
        EvaluationReport,
        settings=config.settings(),
        parents={
            "activations": store.digest,
            "sae": sae.digest,
            **{name: other.digest for name, other in others.items()},
        },
        overwrite=config.overwrite,
        make=make,
        table=table,
        draw=lambda report, manifest: draw_evaluation(report, manifest, out.with_suffix(".png")),
    )


def _reconstructions(
    sae: "SAE", others: Mapping[str, "SAE"], store: ActivationStore, l0: float, seed: int
) -> dict[str, Reconstruct]:
    """Return what makes the rows to write, by name; `sae` is the first."""
    from lorascope.causal.baselines import baselines

    settings = sae.manifest["settings"]
    training = np.arange(store.n_rows)
    if {"holdout", "data_seed"} <= settings.keys():
        training, _ = split_rows(
            store, settings["holdout"], settings["data_seed"], settings.get("roles", ())
        )
    training = training[:: -(-len(training) // _N_FITTED)]
    fitted = torch.cat(list(read_blocks(store, training)))
    saes = {"sae": sae, **others}
    return {
        **{name: lambda x, sae=sae: sae.decode(sae.encode(x)) for name, sae in saes.items()},
        **baselines(sae, fitted, l0, seed),
    }


@torch.inference_mode()
def measure(
    held_out: HeldOut, sae: "SAE", rebuilds: Mapping[str, Reconstruct], seed: int = 0
) -> Faithfulness:
    """Run the held-out rollouts with every reconstruction, and return the shares recovered.

    Each of `rebuilds` makes rows of the SAE's columns, in float32 on the CPU; one is `sae`.
    """
    from lorascope.subject.intervene import RowEditor

    layout, columns = held_out.subject.layout.select(sae.layout.adapter_types)
    has_all_columns = layout.d_in == held_out.subject.layout.d_in
    groups = _column_groups(layout)
    by_run: dict[Any, list[Values]] = {}
    measured: list[npt.NDArray[np.int64]] = []
    drift = 0.0
    bar = runtime.progress(held_out.n_tokens, "evaluate", "tokens")
    with RowEditor(held_out.subject, seed=seed) as editor, bar:
        for batch in held_out.batches():
            read, compare = _Comparison.of_batch(editor, batch)
            drift = max(drift, held_out.require_rows(batch, read))
            x = read[..., columns]
            rebuilt = {name: _rebuild(rebuild, x) for name, rebuild in rebuilds.items()}
            eligible = torch.from_numpy(held_out.store.eligible)[batch.rows] & batch.own
            eligible = eligible.to(x.device)[..., None]
            written: dict[Any, Tensor] = {
                "null": x,
                "rounding": x * (1 + torch.finfo(held_out.subject.dtype).eps),
                "zero": torch.zeros_like(x),
                **rebuilt,
                **{
                    (name, "kept"): torch.where(eligible, rows, x) for name, rows in rebuilt.items()
                },
            }
            results: dict[Any, Any] = {
                name: compare.edited(_hold(read, columns, rows)) for name, rows in written.items()
            }
            results["base"] = compare.base()
            results["adapter"] = compare.adapter()
            for (kind, name), group in groups.items():
                for how, rows in (("sae", rebuilt["sae"]), ("zero", written["zero"])):
                    mixed = torch.where(group.to(x.device), rows, x)
                    results[kind, name, how] = compare.edited(_hold(read, columns, mixed))
            for name, (kl, ce) in results.items():
                by_run.setdefault((name, "kl"), []).append(kl)
                by_run.setdefault((name, "ce"), []).append(ce)
            measured.append(batch.measured)
            bar.update(int(batch.own.sum()))
    rows = np.concatenate(measured)
    values = {name: np.concatenate(parts) for name, parts in by_run.items()}
    return _summarize(
        held_out, rows, values, has_all_columns=has_all_columns, seed=seed, drift=drift
    )


class _Comparison:
    """Runs one batch under edits and compares each run with the adapter's."""

    def __init__(self, editor: "RowEditor", batch: Batch, reference: Tensor) -> None:
        self.editor, self.batch, self.reference = editor, batch, reference
        self.targets = batch.targets[batch.mask].to(reference.device)

    @classmethod
    def of_batch(cls, editor: "RowEditor", batch: Batch) -> "tuple[Tensor, _Comparison]":
        """Run the batch with the adapter; return its rows, and the comparison with that run."""
        out = editor.run(batch.token_ids)
        return out.rows, cls(editor, batch, select_measured(out.logits, batch.mask))

    def edited(self, edit: "Edit") -> tuple[Values, Values]:
        """Return KL to the adapter and CE of each measured token, in nats, of an edited run."""
        return self._compare(
            select_measured(self.editor.run(self.batch.token_ids, edit).logits, self.batch.mask)
        )

    def base(self) -> tuple[Values, Values]:
        """Return the same of the base model."""
        return self._compare(
            select_measured(self.editor.base(self.batch.token_ids), self.batch.mask)
        )

    def adapter(self) -> tuple[Values, Values]:
        """Return the same of the adapter."""
        return self._compare(self.reference)

    def _compare(self, logits: Tensor) -> tuple[Values, Values]:
        kl, ce = kl_divergence(self.reference, logits), cross_entropy(logits, self.targets)
        return kl.cpu().numpy(), ce.cpu().numpy()


def _rebuild(rebuild: Reconstruct, rows: Tensor) -> Tensor:
    flat = rebuild(rows.reshape(-1, rows.shape[-1]).cpu())
    return flat.view(rows.shape).to(rows.device)


def _hold(read: Tensor, columns: npt.NDArray[np.int64], rows: Tensor) -> "Edit":
    """Return the edit that writes `rows` in some columns, and what was read in the others."""
    whole = read.clone()
    whole[..., columns] = rows
    return lambda here, _values: whole[..., here]


def _column_groups(layout: SiteLayout) -> dict[tuple[str, str], Tensor]:
    """Return a mask of the columns, `(d_in,)`, of each layer and of each projection."""
    layer = np.repeat([site.layer for site in layout.sites], [s.rank for s in layout.sites])
    kind = np.repeat([site.projection for site in layout.sites], [s.rank for s in layout.sites])
    return {
        **{("layers", str(n)): torch.from_numpy(layer == n) for n in np.unique(layer)},
        **{("projections", n): torch.from_numpy(kind == n) for n in layout.adapter_types},
    }


def _summarize(
    held_out: HeldOut,
    rows: npt.NDArray[np.int64],
    values: Mapping[Any, Values],
    *,
    has_all_columns: bool,
    seed: int,
    drift: float,
) -> Faithfulness:
    """Return the sums over tokens, as shares with intervals.

    `values[run, "kl"]` and `values[run, "ce"]` are of the measured `rows`, in nats. A run is a
    name, `(name, "kept")` with the rows of special tokens unchanged, or `(kind, group, how)`.
    """
    _, rollout = np.unique(held_out.store.rollout_of(rows), return_inverse=True)
    tokens = TokenRollouts(rollout, int(rollout.max(initial=-1)) + 1)
    role = held_out.role_of(rows)
    usual = role != SPECIAL
    if not usual.any():
        raise ArtifactError(
            f"{held_out.store.path}: all tokens to predict are special; use other rollouts"
        )
    zero = "base" if has_all_columns else "zero"

    def recovered(run: Any, reference: Any, where: npt.NDArray[np.bool_]) -> Recovered:
        kl = tokens.sums(values[run, "kl"], where)
        below = tokens.sums(values[reference, "kl"], where)
        return Recovered(
            kl=float(kl.sum()) / int(where.sum()),
            recovered=complement(ratio_of_sums(kl, below)),
            recovered_interval=complement_interval(bootstrap_interval(kl, below, seed)),
        )

    def recovered_run(run: str) -> RunRecovered:
        ce, best, worst = (
            tokens.sums(values[name, "ce"], usual) for name in (run, "adapter", zero)
        )
        kept = (run, "kept")
        return RunRecovered(
            **vars(recovered(run, zero, usual)),
            ce=float(ce.sum()) / int(usual.sum()),
            ce_recovered=ratio_of_sums(worst - ce, worst - best),
            ce_recovered_interval=bootstrap_interval(worst - ce, worst - best, seed),
            special_kept=recovered(kept, zero, usual) if (kept, "kl") in values else None,
        )

    def recovered_group(kind: str, name: str) -> GroupRecovered:
        share = recovered((kind, name, "sae"), (kind, name, "zero"), usual)
        removed = recovered((kind, name, "zero"), zero, usual).kl
        if removed <= _ABOVE_FLOOR * floor.rounding:
            share = Recovered(kl=share.kl, recovered=None, recovered_interval=None)
        return GroupRecovered(**vars(share), kl_zero=removed)

    def recovered_role(is_role: npt.NDArray[np.bool_]) -> RoleRecovered:
        return RoleRecovered(
            n_tokens=int(is_role.sum()),
            **vars(recovered("sae", zero, is_role)),
            special_kept=recovered(("sae", "kept"), zero, is_role),
            kl_zero=float(values[zero, "kl"][is_role].mean(dtype=np.float64)),
        )

    floor = Floor(
        null=recovered("null", zero, usual).kl, rounding=recovered("rounding", zero, usual).kl
    )
    runs = [run for run, unit in values if unit == "kl"]
    groups = {
        kind: {
            run[1]: recovered_group(*run[:2]) for run in runs if run[0] == kind and run[2] == "sae"
        }
        for kind in _GROUPS
    }
    return Faithfulness(
        zero_is="the base model" if has_all_columns else "the SAE's columns at zero",
        n_rollouts=tokens.n_rollouts,
        n_tokens=int(usual.sum()),
        floor=floor,
        runs={
            run: recovered_run(run)
            for run in runs
            if isinstance(run, str) and run not in ("null", "rounding")
        },
        roles={ROLES[number]: recovered_role(role == number) for number in np.unique(role)},
        **groups,
        rows_drift=drift,
    )


def table(report: EvaluationReport) -> str:
    """Return the report's main numbers as a table for the terminal."""
    metrics, faithfulness = report.reconstruction, report.faithfulness
    floor = faithfulness.floor
    head = f"{'KL':>9}{'recovered':>11}  {'95 % interval':<17}"
    lines = [
        f"held out: {faithfulness.n_rollouts} rollouts, {faithfulness.n_tokens:,} predicted "
        f"tokens; FVU {_number(metrics['fvu'])}, cosine {_number(metrics['cosine'])}, "
        f"L0 {metrics['l0']:.2f}, {metrics['alive']:,} latents alive",
        f"recovered: 0 is {faithfulness.zero_is}, 1 the adapter. KL(adapter ‖ run) in nats a "
        f"token; floor: {floor.null:.1e} (rows unchanged), {floor.rounding:.1e} (rows changed by "
        "one rounding step)",
        f"{'rows written':<24}{head}{'special kept':>13}{'CE':>9}{'recovered':>11}",
    ]
    for name, run in faithfulness.runs.items():
        kept = None if run.special_kept is None else run.special_kept.recovered
        lines.append(
            f"{name:<24}{_recovered(run)}{'' if kept is None else _number(kept):>13}"
            f"{run.ce:>9.4f}{_number(run.ce_recovered):>11}"
        )
    titles = {
        "roles": "sae, by predicted role",
        "layers": "sae, in one layer",
        "projections": "sae, in one projection",
    }
    for kind, title in titles.items():
        lines.append(f"{title:<24}{head}{'KL at 0':>13}")
        lines += [
            f"  {name:<22}{_recovered(part)}{part.kl_zero:>13.4f}"
            for name, part in getattr(faithfulness, kind).items()
        ]
    return "\n".join(line.rstrip() for line in lines)


def _recovered(share: RunRecovered | RoleRecovered | GroupRecovered) -> str:
    interval = format_interval(share.recovered_interval, ".3f")
    return f"{_number(share.kl):>9}{_number(share.recovered):>11}  {interval:<17}"


def _number(value: float | None) -> str:
    return format_number(value, ".4f")
