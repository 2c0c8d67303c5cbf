"""Find the features behind a prediction: contributions of features, by gradients of the rows.

1. For every token of some rollouts: how far the adapter's prediction is from the base model's, as
   KL and as the rise of the log-probability of the token that follows, and the likeliest tokens of
   both.
2. For the tokens with the highest KL in each rollout, or those that you name: what each feature at
   each earlier token contributed to the prediction (`gradients`). The contributions of features,
   of the SAE's bias, of what it leaves unexplained and of rows that it does not read add up to the
   effect of the whole adapter; `completeness` says how far they miss it.
3. `removal` is the first-order effect of removing a feature: the gradient at the adapter's rows.
4. In some rollouts every feature is really removed, and `agreement` compares both numbers with the
   real effect.

In: adapter, activation store, SAE. Out: a report (JSON); the table goes to stderr.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope.activations.store import ActivationStore
from lorascope.causal.effect_options import AttributeConfig
from lorascope.causal.effects import (
    MOST_LIKELY,
    Sums,
    correlation,
    cross_entropy,
    kl_divergence,
    likeliest,
    rank_correlation,
    select_measured,
    sum_by,
)
from lorascope.causal.gradients import (
    RowDecomposition,
    Targets,
    fitting_graph,
    path_gradients,
)
from lorascope.causal.held_out import Batch, HeldOut, describe_run, open_held_out
from lorascope.causal.removals import HeldChange, held_runs
from lorascope.causal.report_records import (
    Agreement,
    AttributedRollout,
    AttributionReport,
    Cause,
    Completeness,
    ExplainedToken,
    FeatureContributions,
    Likely,
    RemovalAgreement,
    Source,
)
from lorascope.causal.study import Made, format_number, format_table, report_at
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.index import FeatureIndex
from lorascope.sae.model import SAE, load_sae
from lorascope.subject.intervene import RowEditor

_N_SHOWN = 12  # tokens in the table
_N_NAMED = 3  # features behind each of them
_N_TOP = 5  # features that `top` compares, and the fewest that a rank correlation needs
_UNITS = {"kl": "nats", "logprob": "nats", "logit-difference": "logits"}
_PARTS = ("features", "bias", "unexplained", "special", "other_columns")

Estimates = tuple[Sums, Sums, Sums]


def run(config: AttributeConfig) -> Path:
    """Explain single predictions by features, and return the report's file (JSON).

    Contributions are in the units of the target: nats for a KL or a log-probability, logits for a
    difference of logits. A finished report of the same settings is kept. Raises ArtifactError if
    inputs do not belong together.
    """
    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.sae, store)
    chosen = _chosen_rollouts(config, store)

    def make() -> Made:
        held_out = open_held_out(config, sae)
        if chosen:
            # Of an index, all rollouts are compared, which is fast, and only the first explained.
            n = config.max_rollouts if config.rollouts_of is None else None
            held_out = replace(held_out, rollouts=np.array(chosen)[:n])
        report = measure(held_out, sae, config)
        return Made(report, held_out.subject.layout, describe_run(held_out, config.sae))

    return report_at(
        config.output,
        AttributionReport,
        settings={**config.settings(), "rollouts": [int(store.rollout_id[i]) for i in chosen]},
        parents={"activations": store.digest, "sae": sae.digest},
        overwrite=config.overwrite,
        make=make,
        table=table,
    )


def _chosen_rollouts(config: AttributeConfig, store: ActivationStore) -> list[int]:
    """Return the indices of the rollouts that the config names; empty for the held-out ones."""
    ids = config.rollouts
    if config.rollouts_of is not None:
        index = FeatureIndex.open(config.rollouts_of)
        if index.manifest.parents.get("activations") != store.digest:
            raise ArtifactError(
                f"{config.rollouts_of} was made from another store than {config.data_dir}; give "
                "its store with --data-dir"
            )
        ids = tuple(int(rollout) for rollout in index.text_rollout)
    index_of = {int(rollout): i for i, rollout in enumerate(store.rollout_id)}
    missing = [rollout for rollout in ids if rollout not in index_of]
    if missing:
        raise ConfigError(
            f"{config.data_dir} has no rollout {missing[0]}; it has {store.n_rollouts}, with ids "
            f"from {int(store.rollout_id.min())} to {int(store.rollout_id.max())}"
        )
    return [index_of[rollout] for rollout in ids]


def measure(held_out: HeldOut, sae: SAE, config: AttributeConfig) -> AttributionReport:
    """Run the rollouts, explain tokens of each, and return the report."""
    with RowEditor(held_out.subject, fast=True) as editor:
        study = _Study(editor, held_out, sae, config)
        study.compare()
        study.explain()
    return study.report()


class _Study:
    """The numbers of each rollout: first of all its tokens, then of those to explain.

    The tokens of all rollouts are numbered on, from `begin[rollout]`. `numbers`, `(2, token)`, has
    KL and rise, NaN where nothing is predicted; `usual` marks the tokens that count; `likely_id`,
    `(token, n)`, and `likely_p`, `(2, token, n)`, are what `effects.likeliest` returns, -1 for no
    further token. `sums`, `(2, latent)`, has the sums of each latent's contributions and of their
    sizes, `n_targets` to how many targets it contributes. `compared` has for each target in a
    checked rollout the contributions, first-order removals and real removals of its latents.
    """

    def __init__(
        self, editor: RowEditor, held_out: HeldOut, sae: SAE, config: AttributeConfig
    ) -> None:
        self.editor, self.held_out, self.sae, self.config = editor, held_out, sae, config
        start = held_out.store.rollout_start
        indices = held_out.rollouts.tolist()
        ends = np.cumsum(np.diff(start)[indices]).tolist()
        self.start = {i: int(start[i]) for i in indices}
        self.begin = dict(zip(indices, [0, *ends], strict=False))
        self.at = {i: slice(self.begin[i], end) for i, end in zip(indices, ends, strict=True)}
        n = held_out.n_tokens
        self.numbers, self.usual = np.full((2, n), np.nan), np.zeros(n, bool)
        self.likely_id = np.full((n, MOST_LIKELY), -1, np.int32)
        self.likely_p = np.zeros((2, n, MOST_LIKELY), np.float32)
        self.explained: dict[int, list[ExplainedToken]] = {i: [] for i in indices}
        self.sums, self.n_targets = np.zeros((2, sae.d_sae)), np.zeros(sae.d_sae, np.int64)
        self.compared: list[Estimates] = []

    @torch.no_grad()
    def compare(self) -> None:
        """Do step 1: compare adapter and base at every token."""
        for rollout, batch in self.held_out.alone("compare"):
            out, base_logits = self.editor.run(batch.token_ids), self.editor.base(batch.token_ids)
            self.held_out.require_rows(batch, out.rows)
            adapter = select_measured(out.logits, batch.mask)
            base = select_measured(base_logits, batch.mask)
            targets = batch.targets[batch.mask].to(adapter.device)
            at = batch.measured - self.start[rollout] + 1 + self.begin[rollout]
            kl = kl_divergence(adapter, base)
            rise = cross_entropy(base, targets) - cross_entropy(adapter, targets)
            ids, p = likeliest(adapter, base)
            self.numbers[:, at] = torch.stack([kl, rise]).cpu().numpy()
            self.usual[at] = self.held_out.is_usual(batch.measured).numpy()
            n = ids.shape[1]
            self.likely_id[at, :n] = ids.cpu().numpy()
            self.likely_p[:, at, :n] = p.cpu().numpy()

    def explain(self) -> None:
        """Do steps 2 to 4 at the tokens to explain."""
        explained = list(self.start)[: self.config.max_rollouts]
        positions = {i: self._positions_to_explain(i) for i in explained}
        checked = set(list(self.start)[: self.config.check_rollouts])
        for rollout, batch in self.held_out.alone("attribute"):
            position = batch.measured - self.start[rollout] + 1
            is_target = np.isin(position, positions.get(rollout, ()))
            here = np.flatnonzero(batch.mask[0].numpy())[is_target]
            if len(here):
                self._explain(rollout, batch, torch.from_numpy(here) + 1, rollout in checked)

    def _positions_to_explain(self, rollout: int) -> npt.NDArray[np.int64]:
        """Return the positions that the config names, or those of highest KL."""
        kl, usual = self.numbers[0, self.at[rollout]], self.usual[self.at[rollout]]
        if self.config.positions:
            beyond = [position for position in self.config.positions if position >= len(kl)]
            if beyond:
                raise ConfigError(f"--positions has {beyond[0]}, the rollout has {len(kl)} tokens")
            return np.array(self.config.positions)
        kl = np.where(usual, kl, -1)
        order = np.argsort(-kl, kind="stable")[: self.config.tokens]
        return order[kl[order] >= 0]

    def _explain(self, rollout: int, batch: Batch, positions: Tensor, is_checked: bool) -> None:
        """Explain the tokens at `positions` of the batch's rollout or window."""
        ids, top = batch.token_ids, self.config.top
        with torch.no_grad():
            out, base = self.editor.run(ids), self.editor.base(ids)
            zeroed = self.editor.run(ids, held=torch.zeros_like(out.rows)).logits
            targets = Targets.at(self.config.target, positions, ids, base)
            y, y_base = (
                targets.values(logits[0, targets.positions - 1]).cpu()
                for logits in (out.logits, zeroed)
            )
            rows = out.rows[0]
            _, columns = self.held_out.subject.layout.select(self.sae.layout.adapter_types)
            read = self.held_out.is_read(self.sae, batch.rows[0].numpy())
            parts = RowDecomposition(self.sae, rows, columns, read)
            removed = self._remove_each(ids, rows, parts, targets, y) if is_checked else None
        first = int(batch.rows[0, 0]) - self.start[rollout]  # position of the window
        source = parts.position.numpy()
        latents, firing = np.unique(parts.latent.numpy(), return_inverse=True)
        kept_tokens = fitting_graph(self.held_out.subject)
        for group in targets.groups():
            gradients = path_gradients(
                self.editor, ids, rows, group, self.config.steps, kept_tokens
            )
            of_firings = [parts.firing_contributions(one).numpy() for one in gradients]
            others = parts.other_contributions(gradients[0])
            of_rows = parts.row_contributions(gradients[0]).numpy()
            for i, position in enumerate(group.positions.tolist()):
                number = int((positions == position).nonzero())
                own = of_firings[0][i]
                sums, removals = (sum_by(firing, values[i], len(latents)) for values in of_firings)
                self.sums[:, latents] += sums, np.abs(sums)
                self.n_targets[latents] += sums != 0
                if removed is not None:
                    before = np.isin(latents, latents[firing[source < position]])
                    real = removed[:, number].double().numpy()
                    self.compared.append((sums[before], removals[before], real[before]))
                causes = []
                for j in _largest(sums, top):
                    firings = np.flatnonzero(firing == j)
                    strongest = source[firings[np.abs(own[firings]).argmax()]] + first
                    causes.append(
                        Cause(int(latents[j]), float(sums[j]), int(strongest), float(removals[j]))
                    )
                self.explained[rollout].append(
                    ExplainedToken(
                        token=first + position,
                        text=self.held_out.store.vocabulary.text([group.tokens[i]]),
                        adapter=float(y[number]),
                        base=float(y_base[number]),
                        features=float(own.sum(dtype=np.float64)),
                        **{name: float(values[i]) for name, values in others.items()},
                        sources=tuple(
                            Source(j + first, float(of_rows[i, j]))
                            for j in _largest(of_rows[i], top)
                        ),
                        behind=tuple(causes),
                    )
                )

    def _remove_each(
        self, ids: Tensor, rows: Tensor, parts: RowDecomposition, targets: Targets, y: Tensor
    ) -> Tensor:
        """Return how much of `y` is lost when each latent is removed, `(fired, target)`."""
        n, order = int(targets.positions.max()), targets.positions.argsort()
        sorted_targets, changes, numbers = targets.take(order), [], []
        layout = self.held_out.subject.layout
        for number, latent in enumerate(parts.fired.tolist()):
            firings = (parts.latent == latent) & (parts.position < n)
            if firings.any():  # else nothing before a target changes
                positions, values = parts.position[firings], parts.value[firings]
                changes.append(HeldChange.removal(self.sae, layout, latent, positions, values))
                numbers.append(number)
        lost = torch.zeros(len(parts.fired), len(targets))
        at = sorted_targets.positions - 1
        runs = held_runs(self.editor, self.held_out, ids[:, :n], rows[:n], changes, logits_at=at)
        for chunk, start, logits in runs:
            after = (at >= start).nonzero()[:, 0]
            values = sorted_targets.take(after).values(logits).cpu()
            here = order[after].cpu()
            lost[torch.tensor(numbers)[chunk][:, None], here] = y[here] - values
        return lost

    def report(self) -> AttributionReport:
        """Return what was found."""
        kl, vocabulary = self.numbers[0, self.usual], self.held_out.store.vocabulary
        targets = [one for some in self.explained.values() for one in some]
        return AttributionReport(
            target=self.config.target,
            unit=_UNITS[self.config.target],
            steps=self.config.steps,
            n_rollouts=len(self.start),
            n_tokens=len(kl),
            n_targets=len(targets),
            kl=float(kl.mean()) if len(kl) else None,
            completeness=measure_completeness(targets),
            agreement=measure_agreement(self.compared),
            features=tuple(
                FeatureContributions(
                    feature=latent,
                    n_targets=int(self.n_targets[latent]),
                    sum=float(self.sums[0, latent]),
                    size=float(self.sums[1, latent]),
                )
                for latent in np.flatnonzero(self.n_targets).tolist()
            ),
            rollouts=tuple(
                AttributedRollout(
                    rollout=int(self.held_out.store.rollout_id[rollout]),
                    kl=_shortest(self.numbers[0, at]),
                    rise=_shortest(self.numbers[1, at]),
                    targets=tuple(sorted(self.explained[rollout], key=lambda one: one.token)),
                    likely=self._likely(at),
                )
                for rollout, at in self.at.items()
            ),
            vocabulary={
                # logits of a padded vocabulary have more tokens than the tokenizer
                str(i): vocabulary[i].hex() if i < len(vocabulary) else ""
                for i in np.unique(self.likely_id).tolist()
                if i >= 0
            },
        )

    def _likely(self, at: slice) -> Likely:
        """Return what both models predict in one rollout; probabilities have four digits."""
        known = self.likely_id[at] >= 0
        p = np.clip(self.likely_p[:, at], 0, 1)[:, known].astype(np.float64).round(4)
        base, adapter = p.tolist()
        return Likely(
            count=tuple(known.sum(1).tolist()),
            token_id=tuple(self.likely_id[at][known].tolist()),
            base=tuple(base),
            adapter=tuple(adapter),
        )


def _largest(values: npt.NDArray[Any], n: int) -> list[int]:
    """Return the indices of the `n` largest values by size, without those of 0."""
    order = np.argsort(-np.abs(values), kind="stable")[:n]
    return order[values[order] != 0].tolist()


def measure_completeness(targets: Sequence[ExplainedToken]) -> Completeness:
    """Return each kind of contribution as a share of the summed effect, and what they miss.

    `gap` is `Σ|sum of contributions − effect| / Σ|effect|` over targets.
    """
    effects = np.array([one.adapter - one.base for one in targets])
    parts = {name: np.array([getattr(one, name) for one in targets]) for name in _PARTS}
    missed = np.sum(list(parts.values()), axis=0) - effects
    size, total = float(np.abs(effects).sum()), float(effects.sum())
    return Completeness(
        gap=float(np.abs(missed).sum()) / size if size else None,
        **{name: float(values.sum()) / total if total else None for name, values in parts.items()},
    )


def measure_agreement(compared: Sequence[Estimates]) -> Agreement | None:
    """Compare contributions and first-order removals with real removals; None if none was run.

    Each target has all three of the features that fire before it, those with at least five of which
    one has a real effect count. `rank` is Spearman's correlation, averaged over targets; `pearson`
    is the correlation over all pairs of feature and target; `top` is the share of the five largest
    real effects that are among the five largest estimates.
    """
    compared = [one for one in compared if len(one[2]) >= _N_TOP and one[2].any()]
    if not compared:
        return None
    return Agreement(
        n_targets=len(compared),
        n_pairs=sum(len(real) for _, _, real in compared),
        contribution=_agreement([(own, real) for own, _, real in compared]),
        removal=_agreement([(removal, real) for _, removal, real in compared]),
    )


def _agreement(pairs: Sequence[tuple[Sums, Sums]]) -> RemovalAgreement:
    """Compare estimates and real effects of the features, a pair of arrays for each target."""
    tops = []
    for pair in pairs:
        best = [set(np.argsort(-np.abs(v), kind="stable")[:_N_TOP]) for v in pair]
        tops.append(len(best[0] & best[1]) / _N_TOP)
    estimate, real = (np.concatenate(values) for values in zip(*pairs, strict=True))
    return RemovalAgreement(
        rank=float(np.mean([rank_correlation(*pair) for pair in pairs])),
        pearson=correlation(estimate, real),
        top=float(np.mean(tops)),
    )


def table(report: AttributionReport) -> str:
    """Return the report's main numbers as a table for the terminal."""
    whole, agreement = report.completeness, report.agreement
    shares = [f"{name} {_number(getattr(whole, name))}" for name in _PARTS]
    lines = [
        f"{report.n_rollouts} rollouts, {report.n_tokens:,} predicted tokens, KL(adapter ‖ base) "
        f"{_number(report.kl)} nats a token; {report.n_targets} explained",
        f"shares of the adapter's effect on {report.target}: {', '.join(shares)}; with "
        f"{report.steps} steps they miss {_number(whole.gap)} of its size",
    ]
    if agreement is not None:
        estimates = {"contribution": agreement.contribution, "removal": agreement.removal}
        lines.append(
            f"against {agreement.n_pairs:,} real removals: "
            + "; ".join(
                f"{name} rank {one.rank:.2f}, Pearson {one.pearson:.2f}, top five {one.top:.2f}"
                for name, one in estimates.items()
            )
        )
    targets = [(rollout.rollout, one) for rollout in report.rollouts for one in rollout.targets]
    targets.sort(key=lambda pair: -abs(pair[1].adapter - pair[1].base))
    lines += format_table(
        ("rollout", "position", "token", report.unit, "features behind it"),
        (
            (
                str(rollout),
                str(one.token),
                repr(one.text)[:15],
                f"{one.adapter - one.base:.3g}",
                ", ".join(f"{c.feature} {c.contribution:+.3g}" for c in one.behind[:_N_NAMED]),
            )
            for rollout, one in targets[:_N_SHOWN]
        ),
        left=(2, 4),
    )
    return "\n".join(lines)


def _shortest(values: npt.NDArray[np.float64]) -> tuple[float | None, ...]:
    """Return float32 numbers in their shortest form; None for tokens that are not predicted."""
    return tuple(None if np.isnan(x) else float(str(np.float32(x))) for x in values)


def _number(value: float | None) -> str:
    return format_number(value, ".4g")
