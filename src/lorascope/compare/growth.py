"""Show when checkpoints learnt what: births and deaths of features, and their sizes at each step.

A feature is *there* at a checkpoint from a tenth of its largest size on (`PRESENT`). It is born at
the first checkpoint at which it is there; what is there at the first of all may be older.
"""

import html
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from lorascope.causal.study import format_number
from lorascope.compare.compare_records import PRESENT, ComparisonReport, JointFeature
from lorascope.dashboard.headline import percent
from lorascope.dashboard.sections import Section, as_shown, in_cell

_N_SHOWN = 24
_BOX = (132, 58)  # pixels of a small figure
_LEFT, _TOP, _BOTTOM = 4, 5, 14  # margins


def growth_of(report: ComparisonReport, page: str) -> Iterator[Section]:
    """Yield what happened at each step, with small figures, and a table of sizes.

    `page` is the page of all features, to which figures lead.
    """
    features, checkpoints = report.features, report.adapters
    first = checkpoints[0].step
    n_late = sum(one.born not in (None, first) for one in features)
    shown = _shown(report)
    losses = [one.loss for one in checkpoints if one.loss is not None]
    curves = {"loss": losses} if len(losses) == len(checkpoints) else {}
    curves["KL to the base"] = [one.kl_base for one in checkpoints]
    steps = [one.step or 0 for one in checkpoints]
    figures = [_figure(name, steps, values) for name, values in curves.items()]
    for one in shown:
        sizes = [one.sizes[each.name] for each in checkpoints]
        link = f'<a href="{html.escape(page)}#/feature/{one.feature}">{one.feature}</a> '
        name = f"{one.feature} {one.label}"
        figures.append(_figure(name, steps, sizes, link + as_shown(in_cell(one.label)), one))
    yield Section(
        "When was what learnt?",
        [
            f"Of {len(features):,} features, the strongest and those that tell checkpoints apart, "
            f"{sum(one.born == first for one in features):,} are there at the first checkpoint "
            f"(learnt by step {first}), {n_late:,} are born later, and "
            f"{sum(one.died is not None for one in features):,} are gone at the last one.",
            f"A feature is there from {percent(PRESENT)} of its largest size on; its size is the "
            "norm of what it writes at its mean value.",
            f"{len(shown)} are shown, in the order of birth: those that are born late or die, and "
            "then those that change most, up to that number. Each figure has all steps, from 0 up; "
            "points are full where the feature is there.",
        ],
        [_steps(report, has_loss=bool(losses))],
        f"<div class=small>{''.join(figures)}</div>",
    )
    names = [one.name for one in checkpoints]
    rows = [
        (
            f"{one.feature}",
            in_cell(one.label),
            _born(one, first),
            f"{one.peak}",
            "—" if one.died is None else f"{one.died}",
            f"{max(one.sizes.values()):.3g}",
            *(percent(one.sizes[name] / max(*one.sizes.values(), 1e-30)) for name in names),
        )
        for one in shown
    ]
    head = ("feature", "fires at", "born", "largest at", "gone after", "largest size", *names)
    note = "The last columns have its size at each step, as a share of the largest."
    yield Section("Features by birth", [note], [(head, rows)])


def _shown(report: ComparisonReport) -> list[JointFeature]:
    """Return the features to show, by birth: those of late birth or death, and most change."""
    first = report.adapters[0].step

    def rank(one: JointFeature) -> tuple[bool, float]:
        change = max(one.sizes.values()) - min(one.sizes.values())
        return one.born == first and one.died is None, -change * one.n_fired

    chosen = sorted(report.features, key=rank)[:_N_SHOWN]
    return sorted(chosen, key=lambda one: (one.born or 0, one.died or math.inf, rank(one)))


def _steps(
    report: ComparisonReport, *, has_loss: bool
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return the table of what happened at each step."""
    first = report.adapters[0].step
    counts = [
        Counter(getattr(one, name) for one in report.features) for name in ("born", "peak", "died")
    ]
    rows = [
        (
            f"{one.step}",
            *([format_number(one.loss, ".3g")] if has_loss else []),
            f"{one.kl_base:.3g}",
            f"{counts[0][one.step]:,}" + (" here or before" if one.step == first else ""),
            *(f"{count[one.step]:,}" for count in counts[1:]),
        )
        for one in report.adapters
    ]
    loss = ["loss"] if has_loss else []
    head = ("step", *loss, "KL to the base", "features born", "largest here", "gone after")
    return head, rows


def _born(one: JointFeature, first: int | None) -> str:
    return f"≤ {one.born}" if one.born == first else f"{one.born}"


def _figure(
    title: str,
    steps: Sequence[int],
    values: Sequence[float],
    caption: str = "",
    feature: JointFeature | None = None,
) -> str:
    """Return a small line of values over steps, as a figure with its text.

    Of a feature, points are full where it is there, and the text says its birth and death.
    """
    width, height = _BOX
    first, last, top = steps[0], steps[-1], max(*values, 1e-30)
    inner = height - _TOP - _BOTTOM
    points = [
        (
            _LEFT + (width - 2 * _LEFT) * (step - first) / max(last - first, 1),
            _TOP + inner * (1 - value / top),
        )
        for step, value in zip(steps, values, strict=True)
    ]
    floor = height - _BOTTOM
    ticks = "".join(f"M{x:.1f} {floor}v3" for x, _ in points)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    there = [feature is None or value >= PRESENT * top for value in values]
    dots = "".join(
        f"<circle cx={x:.1f} cy={y:.1f} r=2.5{'' if full else ' class=off'} />"
        for (x, y), full in zip(points, there, strict=True)
    )
    said = f"{title}: " + ", ".join(
        f"{value:.2g} at step {step}" for step, value in zip(steps, values, strict=True)
    )
    if feature is None:
        life = f"{values[0]:.3g} → {values[-1]:.3g}"
    else:
        life = f"born {_born(feature, first)}, largest {feature.peak}"
        life += "" if feature.died is None else f", gone after {feature.died}"
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role=img aria-label="{html.escape(said)}">'
        f'<path d="M{_LEFT} {floor}H{width - _LEFT}{ticks}" /><polyline points="{line}" />{dots}'
        f"<text x={_LEFT} y={height - 2}>{first}</text>"
        f"<text x={width - _LEFT} y={height - 2} text-anchor=end>{last}</text></svg>"
        f"<figcaption>{caption or as_shown(title)} <span>{life}</span></figcaption></figure>"
    )
