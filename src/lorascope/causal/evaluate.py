"""Measure how much of an adapter's effect on its model's output an SAE explains.

1. On rollouts that the SAE never saw, the model runs with the adapter. Its rows `x` are read and
   compared with the store's.
2. It runs again with other rows written at every site: the SAE's reconstruction, those of simple
   baselines of the same sparsity, of other SAEs, and `x` itself as a control.
3. Each prediction is compared with the adapter's: `KL(adapter ‖ run)` in nats, float32.
   `recovered = 1 − ΣKL(adapter ‖ run) / ΣKL(adapter ‖ base)`: 0 is the base model, 1 the adapter.
   Sums are over all predicted tokens, and over the generated ones: those of the roles think and
   answer. Intervals resample rollouts. `ce_recovered` is the same for the loss on the next token
   of the rollout.
4. `conditional` is the same with the constant row of each token as 0: what the SAE recovers of all
   that a constant does not.
5. In the closed loop, the SAE reads the rows of the run that it is part of (`splice`).
6. With `--by-site` and `--subsets`, only the columns of a layer, a projection or a subset of the
   sites are reconstructed, and 0 is the run with these columns at zero (`splice`).
7. The tokens whose probability the adapter moves most are named, and where (`shifts`), and how
   likely it makes the headers that open a thought or an answer (`openings`).
8. The attention heads that look elsewhere than the base's are named (`attention`).
9. With `--answers`, base and adapter answer some prompts with the same noise (`continuation`).

In: adapter, activation store, SAE. Out: a report (JSON) and its picture (.png); the table goes to
stderr.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope import runtime
from lorascope.activations.batches import read_blocks
from lorascope.activations.store import ActivationStore
from lorascope.causal.attention import attention_of
from lorascope.causal.baselines import fit_rebuilds, rows_of
from lorascope.causal.continuation import answers_of, zero_is_base
from lorascope.causal.effect_options import EvaluateConfig
from lorascope.causal.effects import log_probabilities
from lorascope.causal.figures import draw_evaluation
from lorascope.causal.held_out import HeldOut, describe_run, held_out_rollouts, open_held_out
from lorascope.causal.openings import openings_of
from lorascope.causal.report_records import EvaluationReport, Faithfulness, Floor, Recovered
from lorascope.causal.shifts import ShiftAccumulator
from lorascope.causal.splice import (
    PASSES,
    Compared,
    Shares,
    SplicedBatch,
    column_groups,
    of_all_batches,
    sites_in,
    subsets,
)
from lorascope.causal.study import Made, format_interval, format_number, format_table, report_at
from lorascope.errors import ConfigError
from lorascope.sae.metrics import evaluate
from lorascope.sae.model import SAE, load_sae
from lorascope.subject.intervene import RowEditor
from lorascope.texts.roles import ROLES

log = logging.getLogger(__name__)


def run(config: EvaluateConfig) -> Path:
    """Measure how far an SAE stands for the adapter, and return the report's file (JSON).

    Shares recovered are 1 − KL(adapter ‖ run) / KL(adapter ‖ base), in nats a token, on held-out
    rollouts. A finished report of the same settings is kept. Raises ArtifactError if inputs do not
    belong together.
    """
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
        _warn_of_seen_rollouts(others, held_out)
        groups = column_groups(sae.layout) if config.by_site else {}
        groups |= subsets(held_out, sae, config.subsets, config.seed)
        report = measure(held_out, sae, others, groups, config)
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
        draw=draw_evaluation,
    )


def _warn_of_seen_rollouts(others: Mapping[str, SAE], held_out: HeldOut) -> None:
    """Warn of SAEs to compare with that were trained on rollouts that are measured."""
    for name, other in others.items():
        seen = np.setdiff1d(held_out.rollouts, held_out_rollouts(other, held_out.store))
        if len(seen):
            log.warning(
                "%s did not hold out %d of the %d rollouts, so its shares may be too high; one "
                "lorascope train with several --seed trains all on the same rollouts",
                name,
                len(seen),
                len(held_out.rollouts),
            )


def _of_other_seeds(sae: SAE, others: Mapping[str, SAE]) -> tuple[str, ...]:
    """Return the runs of SAEs that differ from the first in their seed only, with that one."""

    def but_seed(one: SAE) -> list[Any]:
        settings = {key: value for key, value in one.manifest.settings.items() if key != "seed"}
        return [settings, one.manifest.parents]

    alike = [
        name
        for name, other in others.items()
        if "seed" in other.manifest.settings and but_seed(other) == but_seed(sae)
    ]
    return ("sae", *alike) if alike else ()


@torch.inference_mode()
def measure(
    held_out: HeldOut,
    sae: SAE,
    others: Mapping[str, SAE],
    groups: Mapping[tuple[str, str], npt.NDArray[np.bool_]],
    config: EvaluateConfig,
) -> EvaluationReport:
    """Run the held-out rollouts with every reconstruction of `fit_rebuilds`, and return the report.

    `others` are SAEs to compare with, by the names of their runs. `groups` are masks of columns,
    `(d_in,)`, to rebuild alone.
    """
    subject, narrow = held_out.subject, sae.narrow(held_out.store)
    rebuilds, constant = fit_rebuilds(
        {"sae": sae, **others}, narrow, held_out.rollouts, config.seed
    )
    layout, columns = subject.layout.select(sae.layout.adapter_types)
    has_all_columns = layout.d_in == subject.layout.d_in
    is_plain = has_all_columns and zero_is_base(subject)
    found: dict[Any, list[Compared]] = {}
    measured: list[npt.NDArray[np.int64]] = []
    shifts = ShiftAccumulator()
    floor: Floor | None = None
    drift, step, size = 0.0, 0.0, 0.0
    bar = runtime.progress(held_out.n_tokens, "evaluate", "tokens")
    with RowEditor(subject) as editor, bar:
        for batch in held_out.batches():
            spliced = SplicedBatch(editor, batch, columns)
            drift = max(drift, held_out.require_rows(batch, spliced.read))
            x, zeros = spliced.x, torch.zeros_like(spliced.x)
            usual = constant.at(batch.rows.numpy().ravel())

            def rebuilt(name: Any, rows: Tensor, usual: Tensor = usual) -> Tensor:
                flat = rows.reshape(-1, rows.shape[-1]).cpu()
                return rebuilds[name].rows(flat, usual).view(rows.shape).to(rows.device)

            written: dict[Any, Tensor] = {key: rebuilt(key, x) for key in rebuilds}
            for (kind, name), group in groups.items():
                inside = torch.from_numpy(group).to(x.device)
                written[kind, name, "sae"] = torch.where(inside, written["sae"], x)
                written[kind, name, "zero"] = torch.where(inside, zeros, x)
            if not is_plain:
                written["zero"] = zeros
            opened, closed, change = spliced.closed_loop(
                lambda rows: rebuilt("sae", rows), written.pop("sae"), sae.scale.to(x.device)
            )
            step, size = step + change[0], size + change[1]
            base, predicted = spliced.base(), held_out.role_of(batch.measured)
            shifts.add(spliced.log_p, log_probabilities(base), batch.measured, predicted)
            results: dict[Any, Compared] = {
                "sae": opened,
                "sae closed": closed,
                **{name: spliced.written(rows) for name, rows in written.items()},
                "base": spliced.compared(base),
                "adapter": spliced.adapter(),
            }
            for name, values in results.items():
                found.setdefault(name, []).append(values)
            if floor is None:  # of the first batch only: it is a property of the arithmetic
                rounded = x * (1 + torch.finfo(subject.dtype).eps)
                floor = Floor(
                    null=float(spliced.written(x).kl.mean()),
                    rounding=float(spliced.written(rounded).kl.mean()),
                )
            measured.append(batch.measured)
            bar.update(int(batch.own.sum()))
        answers = answers_of(editor, held_out, config.answers, config.seed) if is_plain else ()
        attention = attention_of(editor, held_out) if is_plain else None
    assert floor is not None
    rows = np.concatenate(measured)
    values = of_all_batches(found)
    shares = Shares(
        held_out,
        rows,
        values,
        zero="base" if has_all_columns else "zero",
        rounding=floor.rounding,
        seed=config.seed,
    )
    faithfulness = Faithfulness(
        zero_is="the base model" if has_all_columns else "the SAE's columns at zero",
        n_rollouts=shares.n_rollouts,
        n_tokens=len(shares.role),
        n_generated=int(shares.generated.sum()),
        floor=floor,
        closed_passes=PASSES,
        closed_change=(step / size) ** 0.5 if size else 0.0,
        runs={
            name: shares.of_run(name, rebuilds[name].l0 if name in rebuilds else None)
            for name in found
            if isinstance(name, str)
        },
        roles={ROLES[number]: shares.of_role(number) for number in np.unique(shares.role).tolist()},
        **{
            which: {name: shares.of_group(which, name) for kind, name in groups if kind == which}
            for which in ("layers", "projections")
        },
        subsets=tuple(
            shares.of_subset(name, sites_in(layout, mask))
            for (kind, name), mask in groups.items()
            if kind == "subsets"
        ),
        seeds=_of_other_seeds(sae, others),
        rows_drift=drift,
    )
    return EvaluationReport(
        reconstruction=evaluate(sae, read_blocks(narrow, rows_of(narrow, held_out.rollouts))),
        faithfulness=faithfulness,
        shifts=shifts.strongest(held_out),
        openings=openings_of(held_out.store, rows, (values["base"].ce, values["adapter"].ce)),
        answers=answers,
        attention=attention,
    )


def table(report: EvaluationReport) -> str:
    """Return the report's main numbers as a table for the terminal."""
    metrics, found = report.reconstruction, report.faithfulness
    lines = [
        f"held out: {found.n_rollouts} rollouts, {found.n_tokens:,} predicted tokens, "
        f"{found.n_generated:,} of them generated (think, answer); FVU {_number(metrics['fvu'])}, "
        f"cosine {_number(metrics['cosine'])}, L0 {metrics['l0']:.2f}, {metrics['alive']:,} "
        "latents alive",
        headline(found),
        f"recovered: 0 is {found.zero_is}, 1 the adapter; conditional: 0 is the constant row of "
        "each token. KL(adapter ‖ run) and CE in nats a token; floor: "
        f"{found.floor.null:.1e} (rows unchanged), {found.floor.rounding:.1e} (one rounding step)",
    ]
    generated = {name: run.generated for name, run in found.runs.items() if run.generated}
    for over, runs in {"generated tokens": generated, "all predicted tokens": found.runs}.items():
        lines += format_table(
            (over, "values", *_HEAD, "conditional", "CE"),
            (
                (
                    name,
                    format_number(found.runs[name].l0, ".2f"),
                    *_cells(run),
                    _number(run.conditional),
                    _number(run.ce),
                )
                for name, run in runs.items()
            ),
        )
    groups: dict[str, Mapping[str, Any]] = {
        "sae, by role": found.roles,
        "sae, in one layer": found.layers,
        "sae, in one projection": found.projections,
        "sae, in some sites": {
            f"{one.how}, {len(one.sites)} sites ({i})": one
            for i, one in enumerate(sorted(found.subsets, key=lambda one: -one.kl), 1)
        },
    }
    for title, parts in groups.items():
        if parts:
            lines += format_table(
                (title, *_HEAD, "KL at 0"),
                ((name, *_cells(part), _number(part.kl_zero)) for name, part in parts.items()),
            )
    lines.append(
        f"closed loop: {found.closed_passes} passes, rows changed by {found.closed_change:.1%} in "
        "the last one"
    )
    runs = [found.runs[name].generated or found.runs[name] for name in found.seeds]
    values = [run.recovered for run in runs if run.recovered is not None]
    if len(values) > 1:
        lines.append(
            f"{len(values)} seeds: recovered {min(values):.4f} to {max(values):.4f} of the effect "
            f"on {_over(found)}, standard deviation {np.std(values, ddof=1):.4f}"
        )
    return "\n".join(lines)


def _over(found: Faithfulness) -> str:
    return "generated tokens" if found.n_generated else "all predicted tokens"


def headline(found: Faithfulness) -> str:
    """Return in one sentence how much is constant, and how much of the rest the SAE recovers."""
    over = _over(found)
    sae, constant = (run.generated or run for run in (found.runs["sae"], found.runs["constant"]))
    if constant.recovered is None or sae.recovered is None:
        return f"the adapter has no effect on {over}"
    return (
        f"of the adapter's effect on {over}, {constant.recovered:.2f} is constant (the mean row of "
        f"each role and template position) and {1 - constant.recovered:.2f} conditional; the SAE "
        f"recovers {sae.recovered:.3f} ({format_interval(sae.recovered_interval, '.3f')}) of the "
        f"effect, {_number(sae.conditional)} of its conditional part"
    )


_HEAD = ("KL", "recovered", "95 % interval")


def _cells(share: Recovered) -> tuple[str, str, str]:
    interval = format_interval(share.recovered_interval, ".3f")
    return _number(share.kl), _number(share.recovered), interval


def _number(value: float | None) -> str:
    return format_number(value, ".4f")
