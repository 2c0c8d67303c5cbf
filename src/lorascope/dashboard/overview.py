"""Say on one screen what an adapter learned: an `Overview` of an index and its reports.

Every statement is made from measured numbers, and what was not measured is a gap with the command
that fills it:

1. *What it does*: KL(adapter ‖ base), divided among roles and among the tokens that rise and fall
   (`evaluate`).
2. *How far to believe the features*: the share of that effect which the SAE recovers, between those
   of baselines, and the share that a constant row has (`evaluate`).
3. *What it learned*: features by the effect of removing them, and groups of features (`ablate`).
   Without it, features by their share of all activation.
4. *Where it lives*: KL after each adapted module is switched off (`ablate`), and the heads whose
   attention moves (`evaluate`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope.causal.report_records import (
    AblationReport,
    Answer,
    AttentionShift,
    EvaluationReport,
    Interval,
    ReportRecord,
    TokenShift,
)
from lorascope.dashboard.facts import Fact, Gap, gaps_of, sureness
from lorascope.dashboard.headline import Gauge, RoleShare, has_no_weights, headline_of
from lorascope.dashboard.reports import Reports
from lorascope.features.index import FeatureIndex
from lorascope.labels.groups import FeatureGroup, effect_intervals, groups_of

N_FEATURES = 24
N_SHIFTS = 16
N_GROUPS = 8
_N_OF_GROUP = 4  # features that are named of a group
_MIN_EFFECT = 0.0005  # share of the effect; smaller ones are shown as 0.0 %
_CONTEXT = 8  # tokens on each side of an example
ORDERS = ("effect", "effect_text", "specificity", "activation", "density", "label")
_BASELINES = {"pca": "PCA", "columns": "columns", "constant": "constant row"}


@dataclass(frozen=True, kw_only=True)
class TopFeature:
    """A feature of the overview.

    `name` is its label, "" without one. `effect` is KL after its removal as a share of KL after
    removal of the adapter, over all predictions, `effect_text` over those of tokens of text. None:
    not measured. `before`, `token` and `after` are its strongest example.
    """

    feature: int
    name: str
    role: str
    site: str
    density: float | None
    effect: float | None
    effect_text: float | None
    verdict: str | None
    before: str
    token: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Features that fire together; `share` is their part of the sum of all effects.

    `interval` is its 95 % interval over rollouts, None where it is not known.
    """

    name: str
    share: float
    n_features: int
    features: tuple[int, ...]
    interval: Interval = None


@dataclass(frozen=True, kw_only=True)
class Place:
    """One adapted module: KL after it is switched off, and after a random direction is."""

    layer: int
    projection: str
    kl: float
    kl_random: float


@dataclass(frozen=True, kw_only=True)
class Overview(ReportRecord):
    """What an adapter learned, as far as it was measured.

    `shifts` and `roles` are empty and `kl` None without an evaluation, `places` without an
    ablation. `ranked_by` says what the order of `features` and the shares of `groups` mean.
    """

    kind = "overview"
    headline: tuple[str, ...]
    kl: float | None
    roles: tuple[RoleShare, ...]
    shifts: tuple[TokenShift, ...]
    gauges: tuple[Gauge, ...]
    ranked_by: str
    groups: tuple[Group, ...]
    features: tuple[TopFeature, ...]
    floor: float | None
    places: tuple[Place, ...]
    facts: tuple[Fact, ...]
    gaps: tuple[Gap, ...]
    answers: tuple[Answer, ...] = ()
    attention: AttentionShift | None = None


def overview_of(
    index: FeatureIndex, reports: Reports, groups: Sequence[FeatureGroup] | None = None
) -> Overview:
    """Return the overview of an index and the reports about it; `groups` if they are known."""
    evaluation, ablation = reports.evaluation, reports.ablation
    roles, kl = _roles(evaluation)
    gauges = _gauges(evaluation)
    effects = effects_of(ablation, len(index))
    weights = effects.total if effects else _activation_shares(index)
    has_effect = kl != 0 and not (kl is None and has_no_weights(index))
    return Overview(
        headline=tuple(headline_of(index, evaluation, kl, roles, gauges)),
        kl=kl,
        roles=roles,
        shifts=_shifts(evaluation) if has_effect else (),
        gauges=gauges if has_effect else (),
        ranked_by="effect of removal" if effects else "share of all activation",
        groups=_groups(groups or groups_of(index), weights, ablation) if has_effect else (),
        features=_features(index, effects, weights) if has_effect else (),
        floor=None if ablation is None else ablation.floor.rounding,
        places=_places(index, ablation) if has_effect else (),
        answers=evaluation.answers if evaluation is not None and has_effect else (),
        attention=evaluation.attention if evaluation is not None and has_effect else None,
        facts=tuple(sureness(index, evaluation, ablation)) if has_effect else (),
        gaps=gaps_of(index, reports) if has_effect else (),
    )


def _shifts(evaluation: EvaluationReport | None) -> tuple[TokenShift, ...]:
    """Return the tokens that the adapter moves, largest share first; almost none is left out."""
    shifts = () if evaluation is None else evaluation.shifts
    return tuple(one for one in shifts if one.share >= _MIN_EFFECT)[:N_SHIFTS]


def _roles(evaluation: EvaluationReport | None) -> tuple[tuple[RoleShare, ...], float | None]:
    """Return the shares of the roles, largest first, and KL(adapter ‖ base) in nats a token."""
    if evaluation is None:
        return (), None
    found = evaluation.faithfulness
    sums = {name: role.kl_zero * role.n_tokens for name, role in found.roles.items()}
    total = sum(sums.values())
    kl = found.runs["base"].kl if "base" in found.runs else total / max(found.n_tokens, 1)
    if kl <= 10 * found.floor.rounding:
        return (), 0.0
    shares = [
        RoleShare(role=name, share=sums[name] / total, n_tokens=role.n_tokens)
        for name, role in found.roles.items()
        if total > 0
    ]
    return tuple(sorted(shares, key=lambda one: -one.share)), kl


def _gauges(evaluation: EvaluationReport | None) -> tuple[Gauge, ...]:
    """Return how much of the effect is recovered: on text that the model writes, and in all."""
    if evaluation is None:
        return ()
    found = evaluation.faithfulness
    gauges = []
    for over, of_generated in (("text that the model writes", True), ("all predictions", False)):
        runs = {name: run.generated if of_generated else run for name, run in found.runs.items()}
        sae = runs.get("sae")
        if sae is None or sae.recovered is None:
            continue
        gauges.append(
            Gauge(
                over=over,
                recovered=sae.recovered,
                interval=sae.recovered_interval,
                conditional=sae.conditional,
                baselines={
                    text: run.recovered
                    for name, text in _BASELINES.items()
                    if (run := runs.get(name)) is not None and run.recovered is not None
                },
            )
        )
    return tuple(gauges)


class Effects(NamedTuple):
    """Effects of removal as shares of the adapter's, `(latent,)`; NaN: not measured.

    `excess` is the lower edge of the interval of the pull's excess over the controls', in nats.
    """

    total: npt.NDArray[np.float64]
    text: npt.NDArray[np.float64]
    excess: npt.NDArray[np.float64]
    verdict: Mapping[int, str]


def effects_of(ablation: AblationReport | None, n: int) -> Effects | None:
    """Return the effects of `n` features, None if none was measured."""
    if ablation is None or not ablation.features:
        return None
    shares, excess = np.full((n, 2), np.nan), np.full(n, np.nan)
    whole = np.array(ablation.nats(ablation.without_adapter))
    for one in ablation.features:
        shares[one.feature] = ablation.nats(one) / np.where(whole, whole, np.nan)
        if one.pull_excess is not None:
            excess[one.feature] = one.pull_excess[0]
    verdicts = {one.feature: one.verdict for one in ablation.features}
    return Effects(shares[:, 0], shares[:, 1], excess, verdicts)


def ranked_features(index: FeatureIndex, effects: Effects | None, by: str) -> list[int] | None:
    """Return the features that fire in one of `ORDERS`, largest first, ties by lower number.

    Features for which the number is unknown are left out. None: it is known of no feature.
    """
    if by == "activation":
        values = _activation_shares(index)
    elif by == "density":
        values = np.where(index.latent_n_active < 0, np.nan, index.latent_n_active)
    elif by == "label":
        labels = [index.label(latent) for latent in range(len(index))]
        scores = [None if label is None else label.balanced_accuracy for label in labels]
        values = np.array(scores, np.float64)
    elif effects is None:
        return None
    else:
        values = {
            "effect": effects.total,
            "effect_text": effects.text,
            "specificity": effects.excess,
        }[by]
    known = np.flatnonzero(index.alive & ~np.isnan(values))
    order = known[np.argsort(-values[known], kind="stable")].tolist()
    return order or None


def _activation_shares(index: FeatureIndex) -> npt.NDArray[np.float64]:
    """Return each latent's part of all activation at tokens of text, `(latent,)`."""
    sums = np.where(index.latent_n_active > 0, index.latent_n_active, 0) * np.nan_to_num(
        index.latent_mean.astype(np.float64)
    )
    return sums / max(float(sums.sum()), 1e-30)


def _features(
    index: FeatureIndex, effects: Effects | None, weights: npt.NDArray[np.float64]
) -> tuple[TopFeature, ...]:
    """Return the features of largest weight, largest first, without effects of almost 0."""
    known = np.nan_to_num(weights)
    alive = np.flatnonzero(index.alive & (known > (_MIN_EFFECT if effects else 0))).tolist()
    largest = sorted(alive, key=lambda latent: -float(known[latent]))[:N_FEATURES]
    return tuple(top_feature(index, latent, effects) for latent in largest)


def top_feature(index: FeatureIndex, latent: int, effects: Effects | None) -> TopFeature:
    """Return a feature as the overview lists it; its example is empty if it never fires."""
    stats = index.stats(latent)
    examples = () if stats.is_template else index.examples(latent)
    found = examples or index.examples(latent, "special") or index.examples(latent)
    tokens, target = (found[0].tokens, found[0].target) if found else (("",), 0)
    first = max(0, target - _CONTEXT)
    total, text = (effects.total[latent], effects.text[latent]) if effects else (math.nan, math.nan)
    label, layout, site = index.label(latent), index.manifest.layout, index.main_site[latent]
    return TopFeature(
        feature=latent,
        name="" if label is None else label.name,
        role=index.main_role[latent],
        site="" if layout is None or site < 0 else layout.sites[site].name,
        density=stats.density,
        effect=None if math.isnan(total) else float(total),
        effect_text=None if math.isnan(text) else float(text),
        verdict=effects.verdict.get(latent) if effects else None,
        before="".join(tokens[first:target]),
        token=tokens[target],
        after="".join(tokens[target + 1 : target + 1 + _CONTEXT]),
    )


def _groups(
    found: Sequence[FeatureGroup],
    weights: npt.NDArray[np.float64],
    ablation: AblationReport | None,
) -> tuple[Group, ...]:
    """Return groups of features that fire together, largest share first."""
    known = np.nan_to_num(weights)
    total = max(float(known.sum()), 1e-30)
    intervals = [None] * len(found) if ablation is None else effect_intervals(found, ablation)
    groups = [
        Group(
            name=name,
            share=float(known[list(latents)].sum()) / total,
            n_features=len(latents),
            features=tuple(sorted(latents, key=lambda i: -float(known[i]))[:_N_OF_GROUP]),
            interval=interval,
        )
        for (name, latents), interval in zip(found, intervals, strict=True)
    ]
    return tuple(sorted(groups, key=lambda group: -group.share)[:N_GROUPS])


def _places(index: FeatureIndex, ablation: AblationReport | None) -> tuple[Place, ...]:
    if ablation is None or index.manifest.layout is None:
        return ()
    return tuple(
        Place(
            layer=site.layer,
            projection=site.projection,
            kl=ablation.sites[site.name].kl,
            kl_random=ablation.sites[site.name].kl_random,
        )
        for site in index.manifest.layout.sites
        if site.name in ablation.sites
    )
