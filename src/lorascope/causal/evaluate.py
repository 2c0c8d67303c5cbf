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
6. With `--by-site`, the same by layer and projection: then only the columns of that layer or
   projection are reconstructed, and 0 is the run with these columns at zero.

In: adapter, activation store, SAE. Out: a report (JSON) and its picture (.png); the table goes to
stderr.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope import runtime
from lorascope.activations.batches import read_blocks
from lorascope.activations.store import ActivationStore
from lorascope.causal.effect_options import EvaluateConfig
from lorascope.causal.effects import (
    TokenRollouts,
    bootstrap_interval,
    complement,
    complement_interval,
    ratio_of_sums,
)
from lorascope.causal.held_out import HeldOut, describe_run, open_held_out
from lorascope.causal.report_records import (
    EvaluationReport,
    Faithfulness,
    Floor,
    GroupRecovered,
    Recovered,
    RoleRecovered,
    RunRecovered,
    TokensRecovered,
)
from lorascope.causal.study import Made, format_interval, format_number, report_at
from lorascope.errors import ConfigError
from lorascope.sites import SiteLayout
from lorascope.texts.roles import ROLES

if TYPE_CHECKING:
    from lorascope.causal.baselines import ConstantRows, Rebuild
    from lorascope.causal.splice import Compared
    from lorascope.sae.model import SAE

_N_FITTED = 65_536  # training rows that baselines are fitted on
_ABOVE_FLOOR = 10.0  # times the floor: a smaller effect has no meaningful share
_GROUPS = ("layers", "projections")
_GENERATED = tuple(ROLES.index(role) for role in ("think", "answer"))


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
        reconstruction = evaluate(sae, read_blocks(narrow, _rows_of(narrow, held_out.rollouts)))
        m = round(reconstruction["l0"])
        rebuilds, constant = _fitted(sae, others, narrow, held_out.rollouts, m, config.seed)
        faithfulness = measure(
            held_out, sae, rebuilds, constant, by_site=config.by_site, seed=config.seed
        )
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


def _rows_of(store: ActivationStore, rollouts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the numbers of all rows of some rollouts."""
    row = np.arange(store.n_rows)
    return row[np.isin(store.rollout_of(row), rollouts)]


def _fitted(
    sae: "SAE",
    others: Mapping[str, "SAE"],
    store: ActivationStore,
    measured: npt.NDArray[np.int64],
    m: int,
    seed: int,
) -> "tuple[dict[str, Rebuild], ConstantRows]":
    """Return what makes the rows to write, by name, and the constant rows.

    The baselines have `m` values a token. They are fitted on the rows of the rollouts that are not
    measured, or on all rows if all are.
    """
    from lorascope.causal.baselines import ConstantRows, baselines

    others_left = np.setdiff1d(np.arange(store.n_rollouts), measured)
    training = _rows_of(store, others_left if len(others_left) else measured)
    training = training[:: -(-len(training) // _N_FITTED)]
    rows = torch.cat(list(read_blocks(store, training)))
    constant = ConstantRows(store, training, rows)
    simple = baselines(sae, rows, constant.at(training), m, seed)
    saes = {"sae": sae, **others}
    rebuilds = {name: lambda x, _, sae=sae: sae.decode(sae.encode(x)) for name, sae in saes.items()}
    return {**rebuilds, **simple}, constant


@torch.inference_mode()
def measure(
    held_out: HeldOut,
    sae: "SAE",
    rebuilds: "Mapping[str, Rebuild]",
    constant: "ConstantRows",
    *,
    by_site: bool = False,
    seed: int = 0,
) -> Faithfulness:
    """Run the held-out rollouts with every reconstruction, and return the shares recovered.

    Each of `rebuilds` makes rows of the SAE's columns, on the CPU; two are `sae` and `constant`.
    """
    from lorascope.causal.splice import PASSES, Compared, SplicedBatch
    from lorascope.subject.intervene import RowEditor

    subject = held_out.subject
    layout, columns = subject.layout.select(sae.layout.adapter_types)
    has_all_columns = layout.d_in == subject.layout.d_in
    zero_is_base = (
        has_all_columns
        and not (subject.unseen or subject.unhooked)
        and all(site.lora_kind == "lora" for site in layout.sites)
    )
    groups = _column_groups(layout) if by_site else {}
    found: dict[Any, list[Compared]] = {}
    measured: list[npt.NDArray[np.int64]] = []
    floor: Floor | None = None
    drift, step, size = 0.0, 0.0, 0.0
    bar = runtime.progress(held_out.n_tokens, "evaluate", "tokens")
    with RowEditor(subject, seed=seed) as editor, bar:
        for batch in held_out.batches():
            spliced = SplicedBatch(editor, batch, columns)
            drift = max(drift, held_out.require_rows(batch, spliced.read))
            x, zeros = spliced.x, torch.zeros_like(spliced.x)
            usual = constant.at(batch.rows.numpy().ravel())

            def rebuilt(name: str, rows: Tensor, usual: Tensor = usual) -> Tensor:
                flat = rows.reshape(-1, rows.shape[-1]).cpu()
                return rebuilds[name](flat, usual).view(rows.shape).to(rows.device)

            written: dict[Any, Tensor] = {name: rebuilt(name, x) for name in rebuilds}
            for (kind, name), group in groups.items():
                inside = group.to(x.device)
                written[kind, name, "sae"] = torch.where(inside, written["sae"], x)
                written[kind, name, "zero"] = torch.where(inside, zeros, x)
            if not zero_is_base:
                written["zero"] = zeros
            opened, closed, change = spliced.closed_loop(
                lambda rows: rebuilt("sae", rows), written.pop("sae"), sae.scale.to(x.device)
            )
            step, size = step + change[0], size + change[1]
            results: dict[Any, Compared] = {
                "sae": opened,
                "sae closed": closed,
                **{name: spliced.written(rows) for name, rows in written.items()},
                "base": spliced.base(),
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
    assert floor is not None
    shares = _Shares(
        held_out,
        np.concatenate(measured),
        {
            name: Compared(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            for name, parts in found.items()
        },
        "base" if has_all_columns else "zero",
        floor.rounding,
        seed,
    )
    return Faithfulness(
        zero_is="the base model" if has_all_columns else "the SAE's columns at zero",
        n_rollouts=shares.tokens.n_rollouts,
        n_tokens=len(shares.role),
        n_generated=int(shares.generated.sum()),
        floor=floor,
        closed_passes=PASSES,
        closed_change=(step / size) ** 0.5 if size else 0.0,
        runs={name: shares.of_run(name) for name in found if isinstance(name, str)},
        roles={ROLES[number]: shares.of_role(number) for number in np.unique(shares.role).tolist()},
        **{
            kind: {name: shares.of_group(kind, name) for k, name in groups if k == kind}
            for kind in _GROUPS
        },
        rows_drift=drift,
    )


def _column_groups(layout: SiteLayout) -> dict[tuple[str, str], Tensor]:
    """Return a mask of the columns, `(d_in,)`, of each layer and of each projection."""
    layer = np.repeat([site.layer for site in layout.sites], [s.rank for s in layout.sites])
    kind = np.repeat([site.projection for site in layout.sites], [s.rank for s in layout.sites])
    return {
        **{("layers", str(n)): torch.from_numpy(layer == n) for n in np.unique(layer)},
        **{("projections", n): torch.from_numpy(kind == n) for n in layout.adapter_types},
    }


class _Shares:
    """Sums over tokens, as shares with intervals.

    `values` has KL and CE of the measured `rows` for each run, in nats. A run is a name, or `(kind,
    group, how)`; `zero` is the run of share 0.
    """

    def __init__(
        self,
        held_out: HeldOut,
        rows: npt.NDArray[np.int64],
        values: "Mapping[Any, Compared]",
        zero: str,
        rounding: float,
        seed: int,
    ) -> None:
        _, rollout = np.unique(held_out.store.rollout_of(rows), return_inverse=True)
        self.tokens = TokenRollouts(rollout, int(rollout.max(initial=-1)) + 1)
        self.role = held_out.role_of(rows)
        self.generated = np.isin(self.role, _GENERATED)
        self.values, self.zero, self.rounding, self.seed = values, zero, rounding, seed

    def of_run(self, run: str) -> RunRecovered:
        """Return what a run recovers over all tokens, and over the generated ones."""
        everything = np.ones(len(self.role), bool)
        generated = self._over(run, self.generated) if self.generated.any() else None
        return RunRecovered(**vars(self._over(run, everything)), generated=generated)

    def of_role(self, number: int) -> RoleRecovered:
        """Return what the SAE's run recovers over the tokens of one role."""
        where = self.role == number
        return RoleRecovered(
            **vars(self._recovered("sae", self.zero, where)),
            n_tokens=int(where.sum()),
            kl_zero=float(self.values[self.zero].kl[where].mean(dtype=np.float64)),
        )

    def of_group(self, kind: str, name: str) -> GroupRecovered:
        """Return what the SAE recovers of the columns of one group: of generated tokens, if any."""
        where = self.generated if self.generated.any() else ~self.generated
        share = self._recovered((kind, name, "sae"), (kind, name, "zero"), where)
        removed = self._recovered((kind, name, "zero"), self.zero, where).kl
        if removed <= _ABOVE_FLOOR * self.rounding:
            share = Recovered(kl=share.kl, recovered=None, recovered_interval=None)
        return GroupRecovered(**vars(share), kl_zero=removed)

    def _over(self, run: str, where: npt.NDArray[np.bool_]) -> TokensRecovered:
        ce, best, worst = (
            self.tokens.sums(self.values[name].ce, where) for name in (run, "adapter", self.zero)
        )
        conditional = self._recovered(run, "constant", where)
        return TokensRecovered(
            **vars(self._recovered(run, self.zero, where)),
            conditional=conditional.recovered,
            conditional_interval=conditional.recovered_interval,
            ce=float(ce.sum()) / int(where.sum()),
            ce_recovered=ratio_of_sums(worst - ce, worst - best),
            ce_recovered_interval=bootstrap_interval(worst - ce, worst - best, self.seed),
        )

    def _recovered(self, run: Any, reference: Any, where: npt.NDArray[np.bool_]) -> Recovered:
        kl, below = (self.tokens.sums(self.values[name].kl, where) for name in (run, reference))
        return Recovered(
            kl=float(kl.sum()) / int(where.sum()),
            recovered=complement(ratio_of_sums(kl, below)),
            recovered_interval=complement_interval(bootstrap_interval(kl, below, self.seed)),
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
        f"{'':<20}|{'generated tokens':^56}|{'all predicted tokens':^56}",
        f"{'rows written':<20}" + 2 * f"|{_HEAD}{'conditional':>12}{'CE':>8} ",
    ]
    for name, run in found.runs.items():
        cells = [
            "—".rjust(56)
            if part is None
            else f"{_recovered(part)}{_number(part.conditional):>12}{part.ce:>8.4f} "
            for part in (run.generated, run)
        ]
        lines.append(f"{name:<20}|{'|'.join(cells)}")
    lines.append(
        f"closed loop: {found.closed_passes} passes, rows changed by {found.closed_change:.1%} in "
        "the last one"
    )
    titles = {
        "roles": "sae, by role",
        "layers": "sae, in one layer",
        "projections": "sae, in one projection",
    }
    for kind, title in titles.items():
        if parts := getattr(found, kind):
            lines.append(f"{title:<24}{_HEAD}{'KL at 0':>10}")
            lines += [
                f"  {name:<22}{_recovered(part)}{part.kl_zero:>10.4f}"
                for name, part in parts.items()
            ]
    return "\n".join(line.rstrip() for line in lines)


def headline(found: Faithfulness) -> str:
    """Return in one sentence how much is constant, and how much of the rest the SAE recovers."""
    over = "generated tokens" if found.n_generated else "all predicted tokens"
    sae, constant = (run.generated or run for run in (found.runs["sae"], found.runs["constant"]))
    if constant.recovered is None or sae.recovered is None:
        return f"the adapter has no effect on {over}"
    return (
        f"of the adapter's effect on {over}, {constant.recovered:.2f} is constant (the mean row of "
        f"each role and template position) and {1 - constant.recovered:.2f} conditional; the SAE "
        f"recovers {sae.recovered:.3f} ({format_interval(sae.recovered_interval, '.3f')}) of the "
        f"effect, {_number(sae.conditional)} of its conditional part"
    )


_HEAD = f"{'KL':>8}{'recovered':>10} {'95 % interval':<16}"


def _recovered(share: Recovered) -> str:
    interval = format_interval(share.recovered_interval, ".3f")
    return f"{_number(share.kl):>8}{_number(share.recovered):>10} {interval:<16}"


def _number(value: float | None) -> str:
    return format_number(value, ".4f")
