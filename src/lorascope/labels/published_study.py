"""Repeat the published study's tables: how many directions have one meaning, and what features do.

1. *Classes*: features of the SAE, columns of the adapter's rows and neurons of the model, each
   described by a rule that one half of the rollouts chooses and the other half tests
   (`directions`). Nobody judges. The published study had a language model grade its own
   descriptions.
2. *Groups* of features that fire together, with their share of all firings and, with a report of
   `ablate`, of the sum of all effects (`groups`).

In: feature index, activation store, SAE; labels and a report of `ablate` if they are beside the
index; for neurons, the adapter. Out: a report (JSON) and its picture (.png and .svg); the table
goes to stderr. [Labels](labels.md) has the definitions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.artifact import Manifest, digest_file
from lorascope.causal.effect_options import ReportOptions
from lorascope.causal.figures import INK, LINE, SOFT, drawing, plain
from lorascope.causal.report_records import (
    AblationReport,
    Amount,
    Count,
    Interval,
    ReportRecord,
    Share,
)
from lorascope.causal.study import Made, format_number, format_table, report_at, reports_beside
from lorascope.config import option
from lorascope.errors import ConfigError, DatasetError
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import FILE
from lorascope.features.published_json import digest_of_index
from lorascope.labels import directions
from lorascope.labels.by_rule import Halves, read_halves
from lorascope.labels.groups import effect_intervals, groups_of
from lorascope.labels.label import IndexOptions, read_effects
from lorascope.labels.rules import Miner
from lorascope.labels.score import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_N_DRAWS = 1000
_CLASSES = ("monosemantic", "broad", "polysemantic")
_COLORS = ("#2f6f9f", "#a9c7dd", "#b35a10")
_RING = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")  # Okabe, Ito


@dataclass(frozen=True, kw_only=True)
class KindShares:
    """The classes of one kind of direction, as shares of those that were scored.

    `unclear` are the polysemantic ones that no rule describes. `below_features` is by how much the
    monosemantic share is below that of the features. `shuffled` and `shuffled_accuracy` are the
    monosemantic share and the balanced accuracy with rules of other directions.
    """

    n_all: Count
    n_drawn: Count
    n_scored: Count
    density: Share
    monosemantic: Estimate
    broad: Estimate
    polysemantic: Estimate
    unclear: Estimate
    balanced_accuracy: Estimate
    below_features: Estimate
    shuffled: Share
    shuffled_accuracy: Share


@dataclass(frozen=True, kw_only=True)
class GroupShare:
    """A group, the features in it, and its parts of all firings and of the sum of all effects.

    `effect` is None without a report of `ablate`, its interval also if that is too old to have one.
    """

    name: str
    features: tuple[Count, ...]
    firings: Estimate
    effect: Amount | None
    effect_interval: Interval = None


@dataclass(frozen=True, kw_only=True)
class StudyReport(ReportRecord):
    """What `study` measures; `neurons` are missing if no adapter was given.

    Older reports may have `by_model`, which nothing reads.
    """

    kind = "study"
    n_rollouts_scoring: Count
    n_tokens_scoring: Count
    features: KindShares
    columns: KindShares
    groups: tuple[GroupShare, ...]
    neurons: KindShares | None = None
    by_model: Any = None

    def kinds(self) -> dict[str, KindShares]:
        """Return the kinds of directions that were measured."""
        kinds = {"features": self.features, "columns": self.columns}
        return kinds if self.neurons is None else {**kinds, "neurons": self.neurons}


@dataclass(frozen=True, kw_only=True)
class StudyConfig(ReportOptions, IndexOptions):
    """Options of `study`."""

    lora_path: str | None = option(
        None,
        help="adapter: a folder or a hub id; default: none, and no neurons",
        identity=False,
        path=True,
    )
    effects: tuple[Path, ...] = option(
        (), help="report of ablate; default: effects/ablation.json beside the index", identity=False
    )
    directions: int = option(
        500, help="directions of each kind to score, drawn at random", at_least=1
    )
    seed: int = option(0, help="seed of what is drawn, and of the bootstrap", at_least=0)
    output: Path | None = option(
        None,
        help="JSON file to write; default: study.json beside the index",
        identity=False,
        suffix=".json",
    )

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        if len(self.effects) > 1:
            raise ConfigError(f"--effects has {len(self.effects)} reports, expected one of ablate")


def run(config: StudyConfig) -> Path:
    """Write the report unless it is finished already, and return its file."""
    index, store, sae = config.open_index()
    source = config.input.expanduser()
    beside = reports_beside(source, index.manifest, ("ablation",))
    path = config.effects[0] if config.effects else beside.get("ablation")
    ablation = None if path is None else read_effects(path, sae, AblationReport)
    parents = {"features": digest_of_index(source)}
    parents |= {} if index.labels is None else {"labels": digest_file(source.with_name(FILE))}
    parents |= {} if path is None else {"ablation": digest_file(path)}
    out = config.output or source.with_name("study.json")

    def make() -> Made:
        on_device = sae.to(runtime.pick_device(config.device))
        halves = read_halves(sae.narrow(store), on_device, index, config.label_tokens)
        if len(np.unique(halves.scoring.corpus.rollout)) < 2 or not index.alive.any():
            raise DatasetError(
                f"{source} has too few rollouts or no feature that fires, expected four rollouts "
                "or more; collect more, or raise --label-tokens"
            )
        kinds = _kinds(config, store, sae.narrow(store), halves, index)
        scoring = halves.scoring.corpus
        report = StudyReport(
            n_rollouts_scoring=len(np.unique(scoring.rollout)),
            n_tokens_scoring=len(scoring),
            groups=_shares(index, halves, ablation, config),
            **measure(kinds, halves, config.seed),
        )
        names = {key: index.content.get(key) for key in ("adapter_name", "sae_name")}
        return Made(report, sae.layout, {**names, **halves.sizes()})

    return report_at(
        out,
        StudyReport,
        settings={**config.settings(), "neurons": config.lora_path is not None},
        parents=parents,
        overwrite=config.overwrite,
        make=make,
        table=table,
        draw=draw_study,
    )


def _kinds(
    config: StudyConfig,
    whole: ActivationStore,
    store: ActivationStore,
    halves: Halves,
    index: FeatureIndex,
) -> dict[str, directions.Directions]:
    """Draw directions of each kind, and find where they fire."""
    rng = np.random.default_rng(config.seed)
    features = directions.features(halves, index, config.directions, rng)
    drawn = directions.draw(store.d_in, config.directions, rng)
    values = [directions.column_values(store, half.row, drawn) for half in halves]
    columns = directions.of_values(drawn, values, features, rng)
    kinds = {"features": features, "columns": columns}
    if config.lora_path is not None:
        from lorascope.causal.held_out import HeldOut, fitting_tokens, load_subject_of

        subject = load_subject_of(whole, config, device=config.device, dtype=config.dtype)
        readers = directions.mlp_readers(subject.causal)
        drawn = directions.draw(sum(width for _, width in readers), config.directions, rng)
        values = []
        for half in halves:
            rollouts = np.unique(whole.rollout_of(half.row))
            replay = HeldOut(subject, whole, rollouts, fitting_tokens(subject))
            values.append(directions.neuron_values(replay, readers, half.row, drawn))
        kinds["neurons"] = directions.of_values(drawn, values, features, rng)
    return kinds


def measure(
    kinds: dict[str, directions.Directions], halves: Halves, seed: int
) -> dict[str, KindShares]:
    """Return the classes of each kind; all are compared on the same draws of rollouts."""
    miner, found = Miner(halves.choosing.corpus), dict[str, KindShares]()
    weights = _draws(len(np.unique(halves.scoring.corpus.rollout)), seed)
    best: directions.Floats | None = None
    for name, some in kinds.items():
        counts, of_others = directions.count(some, halves, miner, name)
        own = directions.shares(counts, weights)
        best = own.monosemantic if best is None else best  # features come first
        shuffled = directions.shares(of_others, weights[:1])
        n_tokens = len(halves.scoring.corpus)
        found[name] = KindShares(
            n_all=some.n_all,
            n_drawn=len(some.firings),
            n_scored=len(counts.fired),
            density=float(np.mean([len(scoring) for _, scoring in some.firings])) / n_tokens,
            **{what: estimate(draws) for what, draws in own._asdict().items()},
            below_features=estimate(best - own.monosemantic),
            shuffled=float(shuffled.monosemantic[0]),
            shuffled_accuracy=float(shuffled.balanced_accuracy[0]),
        )
    return found


def _draws(n: int, seed: int) -> directions.Floats:
    """Return how often each rollout counts, `(1 + draw, rollout)`; once each in the first row."""
    times = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=_N_DRAWS)
    return np.concatenate([np.ones((1, n)), times.astype(np.float64)])


def estimate(draws: directions.Floats) -> Estimate:
    """Return the first value, and an interval from the percentiles of the others around it."""
    value = float(draws[0])
    low, high = np.percentile(draws[1:], (2.5, 97.5)).tolist()
    return Estimate(value, min(low, value), max(high, value))


def _shares(
    index: FeatureIndex, halves: Halves, ablation: AblationReport | None, config: StudyConfig
) -> tuple[GroupShare, ...]:
    """Return the groups, those of most firings first."""
    found = groups_of(index)
    group = np.zeros(len(index), np.int64)
    for i, one in enumerate(found):
        group[list(one.latents)] = i
    n_rollouts = 1 + max(int(half.corpus.rollout.max()) for half in halves)
    fired = np.zeros((len(found), n_rollouts))
    for half in halves:
        latent = np.repeat(np.arange(len(index)), np.diff(half.offset))
        np.add.at(fired, (group[latent], half.corpus.rollout[half.rows]), 1)
    totals = fired @ _draws(n_rollouts, config.seed).T
    parts = totals / totals.sum(0).clip(min=1)
    nats = np.zeros(len(index))
    if ablation is not None:
        for removal in ablation.features or ():
            nats[removal.feature] = ablation.nats(removal)[0]
    whole = nats.sum()
    intervals = [None] * len(found) if ablation is None else effect_intervals(found, ablation)
    shares = [
        GroupShare(
            name=one.name,
            features=one.latents,
            firings=estimate(parts[i]),
            effect=float(nats[list(one.latents)].sum() / whole) if whole else None,
            effect_interval=intervals[i],
        )
        for i, one in enumerate(found)
    ]
    return tuple(sorted(shares, key=lambda one: -one.firings.value))


def table(report: StudyReport) -> str:
    """Return the report as tables for the terminal."""
    lines = [
        f"tested on {report.n_rollouts_scoring:,} rollouts, {report.n_tokens_scoring:,} tokens; in "
        "brackets: 95 % intervals over rollouts; accuracy: mean balanced one; features more by: "
        "difference of monosemantic shares; shuffled: share and accuracy with rules of others",
        *format_table(
            ("", "scored", "of", *_CLASSES, "unclear", "accuracy", "features more by", "shuffled"),
            (
                (
                    name,
                    f"{one.n_scored:,}",
                    f"{one.n_all:,}",
                    *(_percent(getattr(one, part)) for part in (*_CLASSES, "unclear")),
                    f"{one.balanced_accuracy.value:.3f}",
                    "" if name == "features" else _percent(one.below_features),
                    f"{one.shuffled:.1%}, {one.shuffled_accuracy:.3f}",
                )
                for name, one in report.kinds().items()
            ),
        ),
    ]
    lines += format_table(
        ("group of features", "features", "firings", "effect"),
        (
            (
                one.name,
                f"{len(one.features):,}",
                _percent(one.firings),
                _percent(Estimate(one.effect, *one.effect_interval))
                if one.effect is not None and one.effect_interval
                else format_number(one.effect, ".1%"),
            )
            for one in report.groups
        ),
    )
    return "\n".join(lines)


def _percent(one: Estimate) -> str:
    return f"{one.value:.1%} ({one.low:.1%} to {one.high:.1%})"


def draw_study(report: StudyReport, manifest: Manifest, out: Path) -> None:
    """Draw the classes of each kind as bars, and the groups as rings: firings and effects."""
    with drawing(
        out,
        (11, 4.6),
        f"{plain(manifest.content['adapter_name'])}: what features, columns and neurons mean",
        f"rules tested on {report.n_rollouts_scoring:,} rollouts that did not choose them; "
        "lines: 95 % intervals of the monosemantic share",
        (".png", ".svg"),
    ) as figure:
        bars, rings = figure.subplots(1, 2, width_ratios=(1, 1.6))
        kinds = report.kinds()
        bars.set_title("share of the directions")
        bars.set_yticks(range(len(kinds)), list(kinds))
        bars.set_ylim(len(kinds) - 0.4, -0.6)
        bars.set_xlim(0, 1)
        for i, one in enumerate(kinds.values()):
            start = 0.0
            for part, color in zip(_CLASSES, _COLORS, strict=True):
                share = getattr(one, part).value
                label = part if i == 0 else None
                bars.barh(i, share, left=start, height=0.5, color=color, label=label)
                start += share
            bars.plot(one.monosemantic[1:], [i, i], color=INK, linewidth=1)
        bars.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
        _draw_rings(rings, report.groups)


def _draw_rings(axes: "Axes", found: Sequence[GroupShare]) -> None:
    """Draw groups as rings: firings outside, effects inside; small ones share a colour."""
    ranked = sorted(found, key=lambda one: -(one.firings.value + (one.effect or 0)))
    named, rest = ranked[: len(_RING)], ranked[len(_RING) :]
    colors = (*_RING[: len(named)], LINE)
    has_effects = any(one.effect for one in found)
    inside = " (outside) and of effect (inside)" if has_effects else ""
    axes.set_title(f"groups of features: share of firings{inside}")

    def ring(shares: Sequence[float], radius: float) -> list[Any]:
        parts = [*shares[: len(named)], sum(shares[len(named) :])]
        edge = {"width": 0.3, "edgecolor": "white"}
        return axes.pie(
            parts, radius=radius, colors=colors, startangle=90, counterclock=False, wedgeprops=edge
        )[0]

    wedges = ring([one.firings.value for one in ranked], 1)
    if has_effects:
        ring([one.effect or 0.0 for one in ranked], 0.65)
    names = [f"{one.firings.value:.0%}  {plain(one.name)}" for one in named]
    names += [f"{sum(one.firings.value for one in rest):.0%}  {len(rest)} others"] * bool(rest)
    axes.legend(
        wedges[: len(names)],
        names,
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        labelcolor=SOFT,
    )
