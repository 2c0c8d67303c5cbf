"""What `study` measures: the records of its report, the tables and the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.artifact import Manifest
from lorascope.causal.figures import INK, LINE, SOFT, draw_header, drawing, plain
from lorascope.causal.report_records import Amount, Count, Interval, ReportRecord, Share
from lorascope.causal.study import format_number, format_table
from lorascope.labels.score import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
class Judged:
    """The labels that a language model wrote, and another or the same one tested."""

    n_labels: Count
    described: Share
    balanced_accuracy: Share
    shuffled: Share | None


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
    """What `study` measures; `neurons` are missing if no adapter was given."""

    kind = "study"
    n_rollouts_scoring: Count
    n_tokens_scoring: Count
    features: KindShares
    columns: KindShares
    groups: tuple[GroupShare, ...]
    neurons: KindShares | None = None
    by_model: Judged | None = None

    def kinds(self) -> dict[str, KindShares]:
        """Return the kinds of directions that were measured."""
        kinds = {"features": self.features, "columns": self.columns}
        return kinds if self.neurons is None else {**kinds, "neurons": self.neurons}


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
    if (judged := report.by_model) is not None:
        lines.append(
            f"labels of a language model: {judged.n_labels:,} features, {judged.described:.1%} "
            "with a balanced accuracy of 0.85 or more, by a judge on hard cases"
        )
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


def draw_study(report: StudyReport, manifest: Manifest, path: Path) -> Path:
    """Draw the classes of each kind as bars, and the groups as rings: firings and effects."""
    with drawing(path, (11, 4.6)) as figure:
        draw_header(
            figure,
            f"{plain(manifest.content['adapter_name'])}: what features, columns and neurons mean",
            f"rules tested on {report.n_rollouts_scoring:,} rollouts that did not choose them; "
            "lines: 95 % intervals of the monosemantic share",
        )
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
    return path


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
