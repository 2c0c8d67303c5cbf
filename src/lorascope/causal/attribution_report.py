"""Summarize attributions: sums, agreement with real removals, and the strongest features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorascope.activations.shards import Vocabulary
from lorascope.causal.effect_options import AttributeConfig
from lorascope.causal.effects import MOST_LIKELY, correlation, rank_correlation
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
from lorascope.causal.study import format_number, format_table

_N_SHOWN = 12  # tokens in the table
_N_NAMED = 3  # features behind each of them
_N_TOP = 5  # features that `top` compares, and the fewest that a rank correlation needs
_UNITS = {"kl": "nats", "logprob": "nats", "logit-difference": "logits"}
_OTHERS = ("bias", "unexplained", "special", "other_columns")

Floats = npt.NDArray[np.float32]
_Pair = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


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
