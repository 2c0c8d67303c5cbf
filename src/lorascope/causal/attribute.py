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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope.activations.shards import Vocabulary
from lorascope.activations.store import ActivationStore
from lorascope.causal.effect_options import AttributeConfig
from lorascope.causal.effects import (
    MOST_LIKELY,
    correlation,
    cross_entropy,
    kl_divergence,
    likeliest,
    rank_correlation,
    select_measured,
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
_OTHERS = ("bias", "unexplained", "special", "other_columns")

Floats = npt.NDArray[np.float32]
_Pair = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


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
    return summarize(
        list(study.rollouts.values()),
        study.attributions,
        held_out.store.vocabulary,
        sae.d_sae,
        config,
    )


@dataclass(frozen=True, kw_only=True)
class ComparedRollout:
    """How adapter and base predict each token of a rollout, filled in by position.

    `numbers` has KL and rise, NaN where nothing is predicted; `usual` marks the tokens that count;
    `likely_id` and `likely_p` are what `effects.likeliest` returns, -1 for no further token.
    """

    rollout: int
    numbers: npt.NDArray[np.float64]  # (2, tokens)
    usual: npt.NDArray[np.bool_]
    likely_id: npt.NDArray[np.int32]  # (tokens, n)
    likely_p: Floats  # (2, tokens, n): base, adapter

    @classmethod
    def of_length(cls, rollout: int, n: int) -> "ComparedRollout":
        """Return a rollout of `n` tokens of which nothing is known yet."""
        return cls(
            rollout=rollout,
            numbers=np.full((2, n), np.nan),
            usual=np.zeros(n, bool),
            likely_id=np.full((n, MOST_LIKELY), -1, np.int32),
            likely_p=np.zeros((2, n, MOST_LIKELY), np.float32),
        )

    @property
    def likely(self) -> Likely:
        """What both models predict; probabilities have four digits."""
        known = self.likely_id >= 0
        base, adapter = np.clip(self.likely_p, 0, 1)[:, known].astype(np.float64).round(4).tolist()
        return Likely(
            count=tuple(known.sum(1).tolist()),
            token_id=tuple(self.likely_id[known].tolist()),
            base=tuple(base),
            adapter=tuple(adapter),
        )


@dataclass(frozen=True, kw_only=True)
class TokenAttribution:
    """The contributions to one prediction, whose number is `adapter` with rows, `base` without.

    `others` are the contributions of parts that are no features; `row_contributions` are those of
    whole rows, from position `first` on. Firing i is of latent `latents[i]` at position
    `sources[i]`; `contributions` are its shares of `adapter - base` and `removals` the first-order
    effect of removing it. Both have an entry for each firing of the rollout, 0 after the token.
    `removed` is the effect of really removing each latent, by number, if that was run.
    """

    rollout: int
    token: int
    text: str
    adapter: float
    base: float
    others: Mapping[str, float]
    row_contributions: Floats
    first: int
    latents: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    contributions: Floats
    removals: Floats
    removed: Floats | None = None

    @property
    def effect(self) -> float:
        """Effect of the whole adapter on the number."""
        return self.adapter - self.base

    def by_latent(self, values: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the latents that fire in the rollout, and the sum of each one's values."""
        latents, inverse = np.unique(self.latents, return_inverse=True)
        return latents, np.bincount(inverse, values, minlength=len(latents)).astype(np.float64)

    def strongest_rows(self, top: int) -> tuple[Source, ...]:
        """Return the tokens whose rows contribute most."""
        order = np.argsort(-np.abs(self.row_contributions), kind="stable")[:top]
        return tuple(
            Source(int(i) + self.first, float(self.row_contributions[i]))
            for i in order
            if self.row_contributions[i]
        )

    def strongest_features(self, top: int) -> tuple[Cause, ...]:
        """Return the features that contribute most, over all tokens."""
        latents, sums = self.by_latent(self.contributions)
        _, removals = self.by_latent(self.removals)
        order = np.argsort(-np.abs(sums), kind="stable")[:top]
        causes = []
        for i in order[sums[order] != 0].tolist():
            firings = np.flatnonzero(self.latents == latents[i])
            source = self.sources[firings[np.abs(self.contributions[firings]).argmax()]]
            causes.append(Cause(int(latents[i]), float(sums[i]), int(source), float(removals[i])))
        return tuple(causes)

    def to_record(self, top: int) -> ExplainedToken:
        """Return the report's entry, with at most `top` rows and features."""
        return ExplainedToken(
            token=self.token,
            text=self.text,
            adapter=self.adapter,
            base=self.base,
            features=float(self.contributions.sum(dtype=np.float64)),
            **self.others,
            sources=self.strongest_rows(top),
            behind=self.strongest_features(top),
        )


class _Study:
    """The numbers of each rollout: first of all its tokens, then of those to explain."""

    def __init__(
        self, editor: RowEditor, held_out: HeldOut, sae: SAE, config: AttributeConfig
    ) -> None:
        self.editor, self.held_out, self.sae, self.config = editor, held_out, sae, config
        start = held_out.store.rollout_start
        self.start = {int(i): int(start[i]) for i in held_out.rollouts}
        self.rollouts = {
            i: ComparedRollout.of_length(
                int(held_out.store.rollout_id[i]), int(start[i + 1]) - first
            )
            for i, first in self.start.items()
        }
        self.attributions: list[TokenAttribution] = []

    @torch.no_grad()
    def compare(self) -> None:
        """Do step 1: compare adapter and base at every token."""
        for rollout, batch in self.held_out.alone("compare"):
            out, base_logits = self.editor.run(batch.token_ids), self.editor.base(batch.token_ids)
            self.held_out.require_rows(batch, out.rows)
            adapter = select_measured(out.logits, batch.mask)
            base = select_measured(base_logits, batch.mask)
            targets = batch.targets[batch.mask].to(adapter.device)
            position = batch.measured - self.start[rollout] + 1
            kl = kl_divergence(adapter, base)
            rise = cross_entropy(base, targets) - cross_entropy(adapter, targets)
            compared, (ids, p) = self.rollouts[rollout], likeliest(adapter, base)
            compared.numbers[:, position] = torch.stack([kl, rise]).cpu().numpy()
            compared.usual[position] = self.held_out.is_usual(batch.measured).numpy()
            n = ids.shape[1]
            compared.likely_id[position, :n] = ids.cpu().numpy()
            compared.likely_p[:, position, :n] = p.cpu().numpy()

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
        kl, usual = self.rollouts[rollout].numbers[0], self.rollouts[rollout].usual
        if self.config.positions:
            beyond = [position for position in self.config.positions if position >= len(kl)]
            if beyond:
                raise ConfigError(f"--positions has {beyond[0]}, the rollout has {len(kl)} tokens")
            return np.array(self.config.positions)
        kl = np.where(usual, kl, -1)
        order = np.argsort(-kl, kind="stable")[: self.config.tokens]
        return order[kl[order] >= 0]

    def _explain(self, rollout: int, batch: Batch, positions: Tensor, is_checked: bool) -> None:
        """Add the attributions of the tokens at `positions` of the batch's rollout or window."""
        ids, store = batch.token_ids, self.held_out.store
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
        kept_tokens = fitting_graph(self.held_out.subject)
        for group in targets.groups():
            along, at_end = path_gradients(
                self.editor, ids, rows, group, self.config.steps, kept_tokens
            )
            contributions = parts.firing_contributions(along)
            removals = parts.firing_contributions(at_end)
            others, by_row = parts.other_contributions(along), parts.row_contributions(along)
            for i, position in enumerate(group.positions.tolist()):
                number = int((positions == position).nonzero())
                self.attributions.append(
                    TokenAttribution(
                        rollout=int(store.rollout_id[rollout]),
                        token=first + position,
                        text=store.vocabulary.text([group.tokens[i]]),
                        adapter=float(y[number]),
                        base=float(y_base[number]),
                        others={name: float(values[i]) for name, values in others.items()},
                        row_contributions=by_row[i].numpy(),
                        first=first,
                        latents=parts.latent.numpy(),
                        sources=parts.position.numpy() + first,
                        contributions=contributions[i].numpy(),
                        removals=removals[i].numpy(),
                        removed=None if removed is None else removed[:, number].numpy(),
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


def summarize(
    rollouts: Sequence[ComparedRollout],
    attributions: Sequence[TokenAttribution],
    vocabulary: Vocabulary,
    d_sae: int,
    config: AttributeConfig,
) -> AttributionReport:
    """Return the report; `vocabulary` has the bytes of each token id."""
    kl = np.concatenate([one.numbers[0][one.usual] for one in rollouts])
    by_rollout: dict[int, list[TokenAttribution]] = {one.rollout: [] for one in rollouts}
    for one in sorted(attributions, key=lambda one: one.token):
        by_rollout[one.rollout].append(one)
    return AttributionReport(
        target=config.target,
        unit=_UNITS[config.target],
        steps=config.steps,
        n_rollouts=len(rollouts),
        n_tokens=len(kl),
        n_targets=len(attributions),
        kl=float(kl.mean()) if len(kl) else None,
        completeness=measure_completeness(attributions),
        agreement=measure_agreement(attributions),
        features=sum_by_feature(attributions, d_sae),
        rollouts=tuple(
            AttributedRollout(
                rollout=one.rollout,
                kl=_shortest(one.numbers[0]),
                rise=_shortest(one.numbers[1]),
                targets=tuple(target.to_record(config.top) for target in by_rollout[one.rollout]),
                likely=one.likely,
            )
            for one in rollouts
        ),
        vocabulary={
            # logits of a padded vocabulary have more tokens than the tokenizer
            str(i): vocabulary[i].hex() if i < len(vocabulary) else ""
            for i in sorted({int(i) for one in rollouts for i in np.unique(one.likely_id)} - {-1})
        },
    )


def measure_completeness(attributions: Sequence[TokenAttribution]) -> Completeness:
    """Return each kind of contribution as a share of the summed effect, and what they miss.

    `gap` is `Σ|sum of contributions − effect| / Σ|effect|` over targets.
    """
    effects = np.array([one.effect for one in attributions])
    features = np.array([float(one.contributions.sum(dtype=np.float64)) for one in attributions])
    others = {name: np.array([one.others[name] for one in attributions]) for name in _OTHERS}
    whole = features + sum(others.values(), np.zeros(len(attributions)))
    size, total = float(np.abs(effects).sum()), float(effects.sum())

    def share(values: npt.NDArray[np.float64]) -> float | None:
        return float(values.sum()) / total if total else None

    return Completeness(
        gap=float(np.abs(whole - effects).sum()) / size if size else None,
        features=share(features),
        **{name: share(values) for name, values in others.items()},
    )


def measure_agreement(attributions: Sequence[TokenAttribution]) -> Agreement | None:
    """Compare contributions and first-order removals with real removals; None if none was run.

    `rank` is Spearman's correlation over the features that fire before a target, averaged over
    targets with at least five; `pearson` is the correlation over all pairs of feature and target;
    `top` is the share of the five largest real effects that are among the five largest estimates.
    """
    pairs: dict[str, list[_Pair]] = {"contribution": [], "removal": []}
    for one in attributions:
        if one.removed is None:
            continue
        latents, contributions = one.by_latent(one.contributions)
        _, removals = one.by_latent(one.removals)
        before = np.isin(latents, one.latents[one.sources < one.token])
        real = one.removed.astype(np.float64)[before]
        if len(real) >= _N_TOP and real.any():
            pairs["contribution"].append((contributions[before], real))
            pairs["removal"].append((removals[before], real))
    if not pairs["removal"]:
        return None
    return Agreement(
        n_targets=len(pairs["removal"]),
        n_pairs=sum(len(real) for _, real in pairs["removal"]),
        **{name: _agreement(of_targets) for name, of_targets in pairs.items()},
    )


def _agreement(pairs: Sequence[_Pair]) -> RemovalAgreement:
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


def sum_by_feature(
    attributions: Sequence[TokenAttribution], d_sae: int
) -> tuple[FeatureContributions, ...]:
    """Return the sums over all targets of each latent that contributed, by number."""
    sums, sizes, counts = np.zeros(d_sae), np.zeros(d_sae), np.zeros(d_sae, np.int64)
    for one in attributions:
        latents, values = one.by_latent(one.contributions)
        sums[latents] += values
        sizes[latents] += np.abs(values)
        counts[latents] += values != 0
    return tuple(
        FeatureContributions(
            feature=int(latent),
            n_targets=int(counts[latent]),
            sum=float(sums[latent]),
            size=float(sizes[latent]),
        )
        for latent in np.flatnonzero(counts)
    )


def table(report: AttributionReport) -> str:
    """Return the report's main numbers as a table for the terminal."""
    whole, agreement = report.completeness, report.agreement
    shares = [f"{name} {_number(getattr(whole, name))}" for name in ("features", *_OTHERS)]
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
