"""Remove parts of an adapter, or features of an SAE, and measure the effect on the model's output.

1. Parts are sites, projections, layers, the MLP and the attention. Each is removed alone (its rows
   become zero and later sites respond), and each is kept alone.
2. Controls: nothing removed; rows changed by one rounding step; and for each part, a random
   direction of the same norm added to what each of its sites writes. Parts take most of the time;
   `--part-rollouts` removes them on fewer rollouts than features.
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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorascope.activations.store import ActivationStore
from lorascope.causal.effect_options import AblateConfig, require_features
from lorascope.causal.effects import (
    bootstrap_interval,
    rank_correlation,
    ratio_of_sums,
    recovered,
    spread,
)
from lorascope.causal.figures import draw_ablation
from lorascope.causal.held_out import HeldOut, describe_run, open_held_out
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
    PartRollouts,
    Removal,
    TokenFall,
)
from lorascope.causal.specificity import Judgement, Specificity
from lorascope.causal.study import Made, format_interval, format_number, format_table, report_at
from lorascope.errors import ArtifactError
from lorascope.sae.model import SAE, load_sae
from lorascope.subject.intervene import RowEditor
from lorascope.texts.roles import SPECIAL

_N_SHOWN = 10  # features in the table
_N_FALLS = 10  # tokens of a removed feature that lose most
_FEWEST_RANKED = 5  # removed features, for a rank correlation
_KINDS = {"site": "sites", "projection": "projections", "layer": "layers", "block": "blocks"}


def run(config: AblateConfig) -> Path:
    """Measure what removing parts or features changes, and return the report's file (JSON).

    Effects are KL(adapter ‖ without) in nats a token, on held-out rollouts, beside those of
    controls of the same size. A finished report of the same settings is kept. Raises ArtifactError
    if inputs do not belong together.
    """
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
        draw=draw_ablation,
    )


@torch.no_grad()
def measure(held_out: HeldOut, config: AblateConfig, sae: SAE | None = None) -> AblationReport:
    """Return the report; without `sae` it has no features."""
    parts = adapter_parts(held_out.subject.layout)
    with RowEditor(held_out.subject, seed=config.seed, fast=True) as editor:
        study = _Study(editor, held_out, config.seed)
        some = replace(held_out, rollouts=held_out.rollouts[: config.part_rollouts])
        on_parts = _Study(editor, some, config.seed)
        report = study.report(on_parts.remove_parts(parts))
        if config.greedy != "none":
            of_kind = [part for part in parts if part.kind == config.greedy]
            report = replace(report, greedy=on_parts.remove_greedily(of_kind))
        if sae is not None:
            features = study.remove_features(sae, config.features, config.verify)
            rank = _rank_of_estimates(features)
            report = replace(report, estimate_rank=rank, features=features)
    return report


def _rank_of_estimates(features: Sequence[FeatureRemoval]) -> float | None:
    """Return Spearman's correlation of estimated and real KL over the features removed."""
    removed = [one for one in features if one.is_removed]
    if len(removed) < _FEWEST_RANKED:
        return None
    estimates = np.array([one.kl_estimate for one in removed])
    return rank_correlation(estimates, np.array([one.kl for one in removed]))


class _Study:
    """Held-out rollouts, and sums over the tokens of each."""

    def __init__(self, editor: RowEditor, held_out: HeldOut, seed: int) -> None:
        self.editor, self.held_out, self.seed = editor, held_out, seed
        self.number = {int(index): i for i, index in enumerate(held_out.rollouts)}
        start, roles = held_out.store.rollout_start, held_out.store.roles
        usual = [roles[start[i] + 1 : start[i + 1]] != SPECIAL for i in self.number]
        self.counts = np.array([mask.sum() for mask in usual], np.float64)  # tokens of each
        self.n_tokens = int(self.counts.sum())
        self.n_special = sum(map(len, usual)) - self.n_tokens
        if not self.n_tokens:
            raise ArtifactError(
                f"{held_out.store.path}: all tokens to predict are special; use other rollouts"
            )
        layout = held_out.subject.layout
        self.keep_all, self.push_none = torch.ones(layout.d_in), torch.zeros(len(layout.sites))
        self.without = LiveChange(0 * self.keep_all, self.push_none)

    def report(self, parts: Mapping[str, Any]) -> AblationReport:
        """Return a report with the floors, the whole adapter, and `parts`."""
        eps = torch.finfo(self.held_out.subject.dtype).eps
        rounded = LiveChange(self.keep_all * (1 + eps), self.push_none)
        sums, null = self._live([rounded, self.without], "adapter")
        return AblationReport(
            n_rollouts=len(self.counts),
            n_tokens=self.n_tokens,
            n_special=self.n_special,
            floor=Floor(null=null, rounding=float(sums.kl[0].sum()) / self.n_tokens),
            without_adapter=self._removal(sums, 1),
            **parts,
        )

    def remove_parts(self, parts: Sequence[Part]) -> Mapping[str, Any]:
        """Return the removal of every part, as fields of the report."""
        changes = [
            self.without,
            *(LiveChange((~part.columns).float(), self.push_none) for part in parts),
            *(LiveChange(part.columns.float(), self.push_none) for part in parts),
            *(LiveChange(self.keep_all, part.sites.float()) for part in parts),
        ]
        sums, _ = self._live(changes, "parts")
        whole, n = sums.kl[0], len(parts)
        by_kind: dict[str, dict[str, PartRemoval]] = {}
        for i, part in enumerate(parts, 1):
            alone, random = sums.kl[i + n], sums.kl[i + 2 * n]
            by_kind.setdefault(_KINDS[part.kind], {})[part.name] = PartRemoval(
                **vars(self._removal(sums, i)),
                kl_random=float(random.sum()) / self.n_tokens,
                alone=recovered(alone, whole, self.n_tokens, self.seed),
            )
        on = PartRollouts(
            n_rollouts=len(self.counts),
            n_tokens=self.n_tokens,
            kl=float(whole.sum()) / self.n_tokens,
        )
        return {"parts_on": on, **by_kind}

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
            removal = self._removal(sums, best)
            steps.append(
                GreedyStep(part=left.pop(best).name, kl=removal.kl, ce_rise=removal.ce_rise)
            )
        return tuple(steps)

    def _live(self, changes: Sequence[LiveChange], label: str) -> tuple[TokenSums, float]:
        """Return sums `(n_changes, n_rollouts)`, and the KL a token that the batch alone causes."""
        totals = np.zeros((4, len(changes), len(self.counts)))
        null = 0.0
        for rollout, batch in self.held_out.alone(label):
            sums, here = run_live(self.editor, self.held_out, batch, changes)
            totals[:, :, self.number[rollout]] += sums
            null += here
        return TokenSums(*totals), null / self.n_tokens

    def remove_features(
        self, sae: SAE, chosen: Sequence[int], verify: int
    ) -> tuple[FeatureRemoval, ...]:
        """Return the chosen features, by number; default: all that fire, removed up to `verify`."""
        found = Specificity(self.editor, self.held_out, sae, self.seed)
        found.run()
        numbers = np.array(sorted(chosen) or np.flatnonzero(found.n_fired), np.int64)
        order = np.argsort(-found.kl[numbers].sum(1), kind="stable")
        removed = numbers if chosen else np.sort(numbers[order[:verify]])
        totals = np.zeros((4, sae.d_sae, len(self.counts)))
        falls: dict[int, dict[int, float]] = {latent: {} for latent in removed.tolist()}
        for rollout, batch in self.held_out.alone("features"):
            rows = self.editor.run(batch.token_ids).rows
            self.held_out.require_rows(batch, rows)
            code = found.code(batch.rows[0].numpy(), rows[0])
            fired = removed[(code[:, removed] > 0).any(0).numpy()]
            changes = [found.removal(code, latent) for latent in fired.tolist()]
            counters = [falls[latent] for latent in fired.tolist()]
            sums = run_held(self.editor, self.held_out, batch, rows[0], changes, counters)
            totals[:, fired, self.number[rollout]] += sums
        return tuple(
            self._feature_removal(
                latent,
                found,
                judgement,
                TokenSums(*totals[:, latent]) if latent in removed else None,
                falls.get(latent, {}),
            )
            for latent, judgement in zip(numbers.tolist(), found.judge(numbers), strict=True)
        )

    def _feature_removal(
        self,
        latent: int,
        found: Specificity,
        judgement: Judgement,
        sums: TokenSums | None,
        falls: Mapping[int, float],
    ) -> FeatureRemoval:
        """Return the entry of a feature; `sums` by rollout are None if it was not removed."""
        estimates, n_fired = found.kl[latent], int(found.n_fired[latent])
        kl = estimates if sums is None else sums.kl
        special = None if sums is None or not self.n_special else float(sums.special.sum())
        return FeatureRemoval(
            feature=latent,
            n_fired=n_fired,
            kl=float(kl.sum()) / self.n_tokens,
            kl_interval=bootstrap_interval(kl, self.counts, self.seed),
            kl_each=float(kl.sum()) / n_fired if n_fired else None,
            share_here=None if sums is None else ratio_of_sums(sums.here, kl),
            ce_rise=None if sums is None else float(sums.ce.sum()) / self.n_tokens,
            kl_special=None if special is None else special / self.n_special,
            kl_estimate=float(estimates.sum()) / self.n_tokens,
            kl_control=float(np.median(found.kl_controls[latent])) / self.n_tokens,
            verdict=judgement.verdict,
            pull=judgement.pull,
            pull_excess=judgement.interval,
            p=judgement.p,
            falls=tuple(
                TokenFall(
                    token_id=i,
                    token=self.held_out.store.vocabulary.text([i]),
                    share=term / float(kl.sum()),
                )
                for i, term in sorted(falls.items(), key=lambda one: (-one[1], one[0]))[:_N_FALLS]
                if term > 0 and i < len(self.held_out.store.vocabulary)
            ),
            spread=spread(kl if sums is None else kl + sums.special),
        )


def table(report: AblationReport) -> str:
    """Return the report's main numbers as a table for the terminal."""
    floor = report.floor
    lines = [
        f"{report.n_rollouts} rollouts, {report.n_tokens:,} predicted tokens; KL(adapter ‖ "
        f"without) in nats a token; without the whole adapter {report.without_adapter.kl:.4g}; "
        f"floor {floor.null:.1e} (nothing removed), {floor.rounding:.1e} (rows changed by one "
        "rounding step)",
    ]
    on = report.parts_on
    if on.n_rollouts < report.n_rollouts:
        lines.append(
            f"parts: on {on.n_rollouts} of the rollouts; without the whole adapter {on.kl:.4g}"
        )
    for kind in ("blocks", "projections", "layers"):
        if parts := getattr(report, kind):
            lines += format_table(
                (f"without, {kind}", *_HEAD, "random", "CE rise", "alone recovers"),
                (
                    (
                        name,
                        *_cells(part),
                        f"{part.kl_random:.3g}",
                        f"{part.ce_rise:.4f}",
                        format_number(part.alone.recovered, ".3f"),
                    )
                    for name, part in parts.items()
                ),
            )
    if report.greedy:
        steps = [f"{step.part} {step.kl:.3g}" for step in report.greedy]
        lines.append("removed one after the other: " + ", ".join(steps))
    features = sorted(report.features or (), key=lambda feature: -feature.kl)
    if features:
        lines.append(_summary_of(features, report.estimate_rank))
        lines += format_table(
            ("without, features", *_HEAD, "control", "here", "tokens", "pull", "verdict"),
            (
                (
                    str(one.feature),
                    *_cells(one),
                    f"{one.kl_control:.3g}",
                    format_number(one.share_here, ".3f"),
                    f"{one.n_fired:,}",
                    format_number(one.pull, ".3f"),
                    one.verdict,
                )
                for one in features[:_N_SHOWN]
            ),
        )
    return "\n".join(lines)


def _summary_of(features: Sequence[FeatureRemoval], rank: float | None) -> str:
    """Return how many features have each verdict, and how well removals were estimated."""
    verdicts = Counter(one.verdict for one in features)
    removed = sum(one.is_removed for one in features)
    estimated = "" if rank is None else f", which estimates rank with {rank:.2f} (Spearman)"
    return (
        f"features: {', '.join(f'{n:,} {verdict}' for verdict, n in verdicts.most_common())}; "
        f"{removed:,} removed{estimated}; the strongest:"
    )


_HEAD = ("KL", "95 % interval")


def _cells(removal: PartRemoval | FeatureRemoval) -> tuple[str, str]:
    return f"{removal.kl:.3g}", format_interval(removal.kl_interval, ".3g")
