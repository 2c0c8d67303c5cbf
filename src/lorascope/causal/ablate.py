"""Remove parts of an adapter, or features of an SAE, and measure the effect on the model's output.

1. Parts are sites, projections, layers, the MLP and the attention. Each is removed alone (its rows
   become zero and later sites respond), and each is kept alone.
2. Controls: nothing removed; rows changed by one rounding step; and for each part, a random
   direction of the same norm added to what each of its sites writes.
3. `--greedy` removes the parts of one kind step by step, each time the one that costs least.
4. With an SAE, the effect of removing each feature is estimated from gradients, and compared with
   that of controls: is it *specific* (`specificity`)? The features of largest effect are really
   removed: `value · decoder row` is subtracted from the rows of the tokens on which it fires, all
   other rows are held. Rollouts where it never fires are not run.
5. Each run is compared with the whole adapter in the same batch: KL(adapter ‖ without) in nats a
   token, float32, and the rise of the loss on the next token.

In: adapter, activation store, optionally an SAE. Out: a report (JSON) with its picture as .png and
.svg; the table goes to stderr.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.causal.effect_options import AblateConfig, require_features
from lorascope.causal.effects import (
    bootstrap_interval,
    complement,
    complement_interval,
    kl_divergence,
    rank_correlation,
    ratio_of_sums,
    select_measured,
)
from lorascope.causal.held_out import SPECIAL, HeldOut, describe_run, open_held_out
from lorascope.causal.removals import (
    LiveChange,
    Part,
    TokenSums,
    adapter_parts,
    run_held,
    run_live,
)
from lorascope.causal.report_records import (
    AblationReport,
    FeatureRemoval,
    Floor,
    GreedyStep,
    PartRemoval,
    Recovered,
    Removal,
)
from lorascope.causal.study import Made, format_interval, format_number, report_at
from lorascope.errors import ArtifactError

if TYPE_CHECKING:
    from lorascope.causal.specificity import Judgement
    from lorascope.sae.model import SAE
    from lorascope.subject.intervene import RowEditor

_N_SHOWN = 10  # features in the table
_FEWEST_RANKED = 5  # removed features, for a rank correlation
_KINDS = {"site": "sites", "projection": "projections", "layer": "layers", "block": "blocks"}


def run(config: AblateConfig) -> Path:
    """Write the report unless it is finished already, and return its file."""
    from lorascope.causal.figures import draw_ablation
    from lorascope.sae.model import load_sae

    store = ActivationStore.open(config.data_dir)
    sae = None if config.sae is None else load_sae(config.sae, store)
    require_features(config.features, sae)

    def make() -> Made:
        held_out = open_held_out(config, sae)
        report = measure(held_out, config, sae)
        return Made(report, held_out.subject.layout, describe_run(held_out, config.sae))

    return report_at(
        config.output,
        AblationReport,
        settings=config.settings(),
        parents={"activations": store.digest, **({} if sae is None else {"sae": sae.digest})},
        overwrite=config.overwrite,
        make=make,
        table=table,
        draw=lambda report, manifest: [
            draw_ablation(report, manifest, config.output.with_suffix(end))
            for end in (".png", ".svg")
        ],
    )


@torch.no_grad()
def measure(held_out: HeldOut, config: AblateConfig, sae: "SAE | None" = None) -> AblationReport:
    """Return the report; without `sae` it has no features."""
    from lorascope.causal.gradients import no_weight_gradients
    from lorascope.subject.intervene import RowEditor

    parts = adapter_parts(held_out.subject.layout)
    with (
        RowEditor(held_out.subject, seed=config.seed, fast=True) as editor,
        no_weight_gradients(held_out.subject),
    ):
        study = _Study(editor, held_out, config.seed)
        report = study.remove_parts(parts)
        if config.greedy != "none":
            of_kind = [part for part in parts if part.kind == config.greedy]
            report = replace(report, greedy=study.remove_greedily(of_kind))
        if sae is not None:
            features = study.remove_features(sae, config.features, config.verify)
            removed = [one for one in features if one.is_removed]
            rank = None
            if len(removed) >= _FEWEST_RANKED:
                rank = rank_correlation(
                    np.array([one.kl_estimate for one in removed]),
                    np.array([one.kl for one in removed]),
                )
            report = replace(report, estimate_rank=rank, features=features)
    return report


class _Study:
    """Held-out rollouts, each alone in its batch, and the sums over them."""

    def __init__(self, editor: "RowEditor", held_out: HeldOut, seed: int) -> None:
        self.editor, self.held_out, self.seed = editor, held_out, seed
        self.batches = list(held_out.batches(copies=held_out.batch_tokens))
        usual = [held_out.role_of(batch.measured) != SPECIAL for batch in self.batches]
        self.n_tokens = int(sum(mask.sum() for mask in usual))
        self.n_special = int(sum((~mask).sum() for mask in usual))
        if not self.n_tokens:
            raise ArtifactError(
                f"{held_out.store.path}: all tokens to predict are special; use other rollouts"
            )
        first = np.array([int(batch.rows[0, 0]) for batch in self.batches])
        _, self.rollout = np.unique(held_out.store.rollout_of(first), return_inverse=True)
        sizes = np.array([mask.sum() for mask in usual])
        self.counts = np.bincount(self.rollout, weights=sizes).astype(np.float64)  # tokens of each
        layout = held_out.subject.layout
        self.keep_all, self.push_none = torch.ones(layout.d_in), torch.zeros(len(layout.sites))

    def remove_parts(self, parts: Sequence[Part]) -> AblationReport:
        """Return a report with the removal of every part, and the floors."""
        eps = torch.finfo(self.held_out.subject.dtype).eps
        changes = [
            LiveChange(self.keep_all * (1 + eps), self.push_none),
            LiveChange(0 * self.keep_all, self.push_none),
            *(LiveChange((~part.columns).float(), self.push_none) for part in parts),
            *(LiveChange(part.columns.float(), self.push_none) for part in parts),
            *(LiveChange(self.keep_all, part.sites.float()) for part in parts),
        ]
        sums, null = self._live(changes, "parts")
        n, n_tokens = len(parts), self.n_tokens
        whole = sums.kl[1]
        by_kind: dict[str, dict[str, PartRemoval]] = {}
        for i, part in enumerate(parts):
            removed = self._removal(sums, 2 + i)
            alone, random = sums.kl[2 + n + i], sums.kl[2 + 2 * n + i]
            by_kind.setdefault(_KINDS[part.kind], {})[part.name] = PartRemoval(
                **vars(removed),
                kl_random=float(random.sum()) / n_tokens,
                alone=Recovered(
                    kl=float(alone.sum()) / n_tokens,
                    recovered=complement(ratio_of_sums(alone, whole)),
                    recovered_interval=complement_interval(
                        bootstrap_interval(alone, whole, self.seed)
                    ),
                ),
            )
        return AblationReport(
            n_rollouts=len(self.counts),
            n_tokens=n_tokens,
            n_special=self.n_special,
            floor=Floor(null=null, rounding=float(sums.kl[0].sum()) / n_tokens),
            without_adapter=self._removal(sums, 1),
            sites=by_kind["sites"],
            projections=by_kind["projections"],
            layers=by_kind["layers"],
            blocks=by_kind.get("blocks"),
        )

    def _removal(self, sums: TokenSums, change: int) -> Removal:
        kl, special = sums.kl[change], float(sums.special[change].sum())
        return Removal(
            kl=float(kl.sum()) / self.n_tokens,
            kl_interval=bootstrap_interval(kl, self.counts, self.seed),
            ce_rise=float(sums.ce[change].sum()) / self.n_tokens,
            kl_special=special / self.n_special if self.n_special else None,
        )

    def remove_greedily(self, parts: Sequence[Part]) -> tuple[GreedyStep, ...]:
        """Return the parts in the order of removal, with KL and loss after each step."""
        left, keep, steps = list(parts), self.keep_all.bool(), []
        while left:
            changes = [LiveChange((keep & ~part.columns).float(), self.push_none) for part in left]
            sums, _ = self._live(changes, f"greedy, {len(left)} left")
            best = int(np.argmin(sums.kl.sum(1)))
            keep = keep & ~left[best].columns
            kl, ce = float(sums.kl[best].sum()), float(sums.ce[best].sum())
            steps.append(
                GreedyStep(
                    part=left.pop(best).name, kl=kl / self.n_tokens, ce_rise=ce / self.n_tokens
                )
            )
        return tuple(steps)

    def _live(self, changes: Sequence[LiveChange], label: str) -> tuple[TokenSums, float]:
        """Return sums `(n_changes, n_rollouts)`, and the KL a token that the batch alone causes."""
        totals = np.zeros((4, len(changes), len(self.counts)))
        null = 0.0
        n_runs = len(self.batches) * len(changes)
        with runtime.progress(n_runs, label, "runs") as bar:
            for rollout, batch in zip(self.rollout, self.batches, strict=True):
                sums, reference = run_live(
                    self.editor, self.held_out, batch, changes, on_done=bar.update
                )
                for total, values in zip(totals, vars(sums).values(), strict=True):
                    total[:, rollout] += values
                alone = select_measured(self.editor.run(batch.token_ids).logits, batch.mask)
                usual = torch.from_numpy(self.held_out.role_of(batch.measured) != SPECIAL)
                null += float(kl_divergence(alone, reference).double().cpu()[usual].sum())
        return TokenSums(*totals), null / self.n_tokens

    def remove_features(
        self, sae: "SAE", chosen: Sequence[int], verify: int
    ) -> tuple[FeatureRemoval, ...]:
        """Return the chosen features, by number; default: all that fire, removed up to `verify`."""
        from lorascope.causal.specificity import Specificity

        found = Specificity(self.editor, self.held_out, sae, self.seed, len(self.counts))
        n_fired = np.zeros(sae.d_sae, np.int64)
        with runtime.progress(len(self.batches), "estimates", "rollouts") as bar:
            for rollout, batch in zip(self.rollout, self.batches, strict=True):
                code = found.add(int(rollout), batch)
                n_fired += (code[batch.mask[0]] > 0).sum(0).numpy()
                bar.update(1)
        numbers = np.array(sorted(chosen) or np.flatnonzero(n_fired), np.int64)
        estimates = found.kl[numbers].sum(1)
        order = np.argsort(-estimates, kind="stable")
        removed = numbers if chosen else np.sort(numbers[order[:verify]])
        totals = np.zeros((4, sae.d_sae, len(self.counts)))
        with runtime.progress(len(self.batches), "features", "rollouts") as bar:
            for rollout, batch in zip(self.rollout, self.batches, strict=True):
                rows = self.editor.run(batch.token_ids).rows
                self.held_out.require_rows(batch, rows)
                code = found.code(batch, rows[0])
                fired = removed[(code[:, removed] > 0).any(0).numpy()]
                changes = [found.removal(code, latent) for latent in fired.tolist()]
                sums = run_held(self.editor, self.held_out, batch, rows[0], changes)
                totals[:, fired, rollout] += sums.stacked()
                bar.update(1)
        return tuple(
            self._feature_removal(
                latent,
                int(n_fired[latent]),
                totals[:, latent] if latent in removed else None,
                found.kl[latent],
                float(np.median(found.kl_controls[latent])) / self.n_tokens,
                judgement,
            )
            for latent, judgement in zip(numbers.tolist(), found.judge(numbers), strict=True)
        )

    def _feature_removal(
        self,
        latent: int,
        n_fired: int,
        sums: npt.NDArray[np.float64] | None,
        estimates: npt.NDArray[np.float64],
        control: float,
        judgement: "Judgement",
    ) -> FeatureRemoval:
        """Return the entry of a feature; a feature that never fires was not run, its sums are zero.

        `sums` are (kl ce special here, rollout), None for a feature that was not removed.
        """
        kl = estimates if sums is None else sums[0]
        special = None if sums is None or not self.n_special else float(sums[2].sum())
        return FeatureRemoval(
            feature=latent,
            n_fired=n_fired,
            kl=float(kl.sum()) / self.n_tokens,
            kl_interval=bootstrap_interval(kl, self.counts, self.seed),
            kl_each=float(kl.sum()) / n_fired if n_fired else None,
            share_here=None if sums is None else ratio_of_sums(sums[3], kl),
            ce_rise=None if sums is None else float(sums[1].sum()) / self.n_tokens,
            kl_special=None if special is None else special / self.n_special,
            kl_estimate=float(estimates.sum()) / self.n_tokens,
            kl_control=control,
            verdict=judgement.verdict,
            pull=judgement.pull,
            pull_excess=judgement.interval,
            p=judgement.p,
        )


def table(report: AblationReport) -> str:
    """Return the report's main numbers as a table for the terminal."""
    floor = report.floor
    numbers = f"{'KL':>11}  {'95 % interval':<21}{'random':>11}"
    lines = [
        f"{report.n_rollouts} rollouts, {report.n_tokens:,} predicted tokens; KL(adapter ‖ "
        f"without) in nats a token; without the whole adapter {report.without_adapter.kl:.4g}; "
        f"floor {floor.null:.1e} (nothing removed), {floor.rounding:.1e} (rows changed by one "
        "rounding step)",
    ]
    for kind in ("blocks", "projections", "layers"):
        parts = getattr(report, kind) or {}
        if parts:
            lines.append(f"{'without, ' + kind:<20}{numbers}{'CE rise':>10}{'alone recovers':>16}")
        lines += [
            f"  {name:<18}{_numbers(part)}{part.ce_rise:>10.4f}"
            f"{format_number(part.alone.recovered, '.3f'):>16}"
            for name, part in parts.items()
        ]
    if report.greedy:
        steps = [f"{step.part} {step.kl:.3g}" for step in report.greedy]
        lines.append("removed one after the other: " + ", ".join(steps))
    features = sorted(report.features or (), key=lambda feature: -feature.kl)
    if features:
        lines.append(_summary_of(features, report.estimate_rank))
        lines.append(
            f"{'without, features':<20}{'KL':>11}  {'95 % interval':<21}{'control':>11}"
            f"{'here':>8}{'tokens':>8}{'pull':>9}  verdict"
        )
        lines += [
            f"  {one.feature:<18}{one.kl:>11.3g}  {format_interval(one.kl_interval, '.3g'):<21}"
            f"{one.kl_control:>11.3g}{format_number(one.share_here, '.3f'):>8}{one.n_fired:>8,}"
            f"{format_number(one.pull, '.3f'):>9}  {one.verdict}"
            for one in features[:_N_SHOWN]
        ]
        lines.append(f"  (the strongest of {len(features):,})")
    return "\n".join(line.rstrip() for line in lines)


def _summary_of(features: Sequence[FeatureRemoval], rank: float | None) -> str:
    """Return how many features have each verdict, and how well removals were estimated."""
    verdicts = Counter(one.verdict for one in features)
    removed = sum(one.is_removed for one in features)
    estimated = "" if rank is None else f", which estimates rank with {rank:.2f} (Spearman)"
    return (
        f"features: {', '.join(f'{n:,} {verdict}' for verdict, n in verdicts.most_common())}; "
        f"{removed:,} removed{estimated}"
    )


def _numbers(removal: PartRemoval) -> str:
    interval = format_interval(removal.kl_interval, ".3g")
    return f"{removal.kl:>11.3g}  {interval:<21}{removal.kl_random:>11.3g}"
