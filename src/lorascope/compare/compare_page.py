"""Show what `compare` found: the same sentences and tables in the terminal, Markdown and HTML.

The page also has what text cannot show: texts coloured by the difference, and how features grow
over checkpoints. It runs no script, and all text of adapters and corpora is escaped.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lorascope.causal.study import format_interval, format_number, format_table
from lorascope.compare.compare_records import (
    ComparisonReport,
    DifferentText,
    FeatureDifference,
    JointFeature,
    PairDifference,
)
from lorascope.dashboard.headline import percent, probability, quoted
from lorascope.dashboard.report import plain, table

_N_FEATURES, _N_SHIFTS, _N_GROWTH = 20, 10, 24
_BRIGHTEST = 2.0  # nats: a token of this difference has the full colour
_LONGEST = 60  # characters of a text in a table
_EXAMPLES, _TEXTS = "Examples", "Texts that they predict differently"
_NOT_FOR_THE_TERMINAL = (_EXAMPLES, _TEXTS)
_BOX = (132, 44)  # pixels of a small figure


@dataclass(frozen=True)
class _Section:
    """A title, sentences, tables with a head each, and HTML that is safe already."""

    title: str
    sentences: list[str] = field(default_factory=list)
    tables: list[tuple[Sequence[str], Sequence[Sequence[str]]]] = field(default_factory=list)
    figures: str = ""


def as_text(report: ComparisonReport) -> str:
    """Return the report for the terminal: sentences, and tables with aligned columns."""
    lines: list[str] = []
    for one in _sections(report):
        if one.title in _NOT_FOR_THE_TERMINAL:
            continue
        lines += ["", one.title, *(f"  {sentence}" for sentence in one.sentences)]
        for head, rows in one.tables:
            lines += [f"  {line}" for line in format_table(head, rows)]
    return "\n".join(lines[1:])


def as_markdown(report: ComparisonReport) -> str:
    """Return the report as Markdown, in which text of the corpus is escaped."""
    lines = ["# Comparison of adapters", ""]
    for one in _sections(report):
        lines += [f"## {one.title}", ""]
        for sentence in one.sentences:
            lines += [plain(sentence), ""]
        for head, rows in one.tables:
            lines += table(head, rows)
    return "\n".join(lines)


def as_html(report: ComparisonReport) -> str:
    """Return the report as one page without scripts, in which all text is escaped."""
    parts = []
    for one in _sections(report):
        parts.append(f"<h2>{_shown(one.title)}</h2>")
        parts += [f"<p>{_shown(sentence)}</p>" for sentence in one.sentences]
        for head, rows in one.tables:
            cells = ["".join(f"<th scope=col>{_shown(cell)}</th>" for cell in head)]
            linked = head[0] == "feature"
            cells += [_cells(row, linked=linked) for row in rows]
            body = "".join(f"<tr>{row}</tr>" for row in cells)
            parts.append(f"<div class=table tabindex=0><table>{body}</table></div>")
        parts.append(one.figures)
    return _PAGE.replace("BODY", "\n".join(parts))


def _cells(row: Sequence[str], *, linked: bool) -> str:
    """Return a row's cells; the first of them, a feature's number, may lead to its page."""
    first, *others = map(_shown, row)
    if linked:
        first = f'<a href="dashboard.html#/feature/{int(row[0])}">{first}</a>'
    return "".join(f"<td>{cell}</td>" for cell in (first, *others))


def _shown(text: str) -> str:
    """Return text as HTML, isolated from the direction of the text around it."""
    return f"<bdi>{html.escape(text)}</bdi>"


def _line(text: str) -> str:
    """Return text on one line, not too long for a cell."""
    text = text.replace("\n", "⏎")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _sections(report: ComparisonReport) -> Iterator[_Section]:
    yield _adapters(report)
    if any(one.step is not None for one in report.adapters):
        yield _growth(report)
    for number, pair in enumerate(report.pairs):
        yield _difference(report, pair)
        if not number:
            yield _texts(report)
        yield _explained(report, pair)
    yield _examples(report)
    yield _Section(
        "What this cannot say",
        [
            "A feature that is no news may differ all the same: weakly, in ways that one "
            "dictionary does not show, or on texts that are not these. That nothing is news is "
            "no proof that two adapters do the same."
        ],
    )


def _adapters(report: ComparisonReport) -> _Section:
    one = _Section("The adapters")
    one.sentences.append(
        f"Adapters of {report.base} on {report.n_rollouts} texts: {report.n_tokens:,} predictions "
        "of what a model writes; others do not count. "
        f"One dictionary for all has {report.n_features:,} features, {report.n_fired:,} of which "
        "fire here."
    )
    if report.null is not None:
        one.sentences.append(
            f"{report.null} is another seed of {report.adapters[0].name}: what differs between "
            "the two is no news."
        )
    elif report.adapters[0].step is None:
        one.sentences.append(
            "No second seed was given (--null), so what is called news below may be what any "
            "other seed of the same training would change."
        )
    rows = [
        (
            adapter.name,
            _line(adapter.folder),
            f"{adapter.n_columns}",
            f"{adapter.kl_base:.3g}",
            format_interval(adapter.kl_base_interval, ".3g"),
            f"{adapter.floor:.1e}",
            "—" if adapter.loss is None else f"{adapter.loss:.3g}",
        )
        for adapter in report.adapters
    ]
    head = ("", "folder", "columns", "KL to the base", "95 %", "noise", "loss")
    one.tables.append((head, rows))
    return one


def _difference(report: ComparisonReport, pair: PairDifference) -> _Section:
    a, b = pair.first, pair.second
    seeds = " (another seed)" if b == report.null else ""
    one = _Section(f"{a} and {b}{seeds}: predictions")
    floor = max(x.floor for x in report.adapters if x.name in (a, b))
    to_base = {x.name: x.kl_base for x in report.adapters}
    say = one.sentences.append
    say(
        f"KL({a} ‖ {b}) is {pair.kl:.3g} nats a token (95 %: "
        f"{format_interval(pair.kl_interval, '.3g')}), KL({b} ‖ {a}) {pair.kl_reverse:.3g}; "
        f"{a} is {to_base[a]:.3g} from the base, {b} {to_base[b]:.3g}."
    )
    if pair.kl <= max(10 * floor, 1e-10):
        say("That is no more than rounding: they predict the same.")
    if pair.seeds is not None and pair.kl:
        say(
            f"Another seed of {a} differs from it by {pair.seeds:.3g}: "
            f"{percent(min(pair.seeds / pair.kl, 1.0))} of this."
        )
    rows = [
        (role, f"{part.n_tokens:,}", f"{part.kl:.3g}")
        for role, part in sorted(pair.roles.items(), key=lambda item: -item[1].kl)
    ]
    one.tables.append((("where, all predictions", "number", "KL, nats a token"), rows))
    rows = [
        (
            shift.role,
            quoted(shift.token),
            f"likelier with {a if shift.side == 'rises' else b}",
            percent(shift.share),
            probability(shift.example.p_adapter),
            probability(shift.example.p_base),
            quoted(shift.example.before[-40:]),
        )
        for shift in pair.shifts[:_N_SHIFTS]
    ]
    one.tables.append((("where", "token", "", "share of KL", a, b, "example, after"), rows))
    return one


def kind_in_words(kind: str, pair: PairDifference) -> str:
    """Return the kind of a feature with the name of the adapter."""
    return kind.replace("the first", pair.first).replace("the second", pair.second)


def _explained(report: ComparisonReport, pair: PairDifference) -> _Section:
    a, b = pair.first, pair.second
    one = _Section(f"{a} and {b}: features")
    say = one.sentences.append
    counted = ", ".join(f"{n} {kind_in_words(kind, pair)}" for kind, n in pair.n_kinds.items())
    matched = sum(n for kind, n in pair.n_kinds.items() if kind in ("shared", "changed"))
    say(f"{matched} features are in both, of those that fire here: {counted}.")
    if pair.kl:
        shares = (pair.contributions, pair.unexplained, pair.bias)
        features, unexplained, bias = (f"{100 * one / pair.kl:.0f}\u00a0%" for one in shares)
        missed = abs(1 - sum(shares) / pair.kl)
        say(
            f"Contributions along the path from the base: features {features} of the difference, "
            f"what the dictionary leaves unexplained {unexplained}, its bias {bias}; they miss it "
            f"by {percent(missed)}."
        )
    if b != report.null:
        if pair.n_news:
            left = pair.without_news or 0.0
            than = "chance" if report.null is None else "any feature of the seeds"
            say(
                f"{pair.n_news} are news: each explains more than {than} (at least "
                f"{pair.level:.2g} nats a token). Without all of them KL({a} ‖ {b}) is {left:.3g}, "
                f"{percent(left / pair.kl)} of it."
            )
        else:
            say("None is news: no feature explains more than chance or seeds do.")
    if pair.steps:
        steps = ", ".join(f"{step.n_features}: {step.kl:.3g}" for step in pair.steps)
        say(
            f"KL({a} ‖ {b}) without the features of largest contribution, by their number: {steps}."
        )
    names = {one.feature: one.label for one in report.features}
    rows = [
        (
            f"{feature.feature}",
            "" if b == report.null else "news" if feature.is_news else "",
            kind_in_words(feature.kind, pair),
            _line(names.get(feature.feature, "")),
            f"{feature.contribution:.2g}",
            format_number(feature.removed, ".2g"),
            format_interval(feature.removed_interval, ".2g"),
            f"{feature.chance:.2g}" if report.null is None else format_number(feature.seeds, ".2g"),
            format_number(feature.effect_first, ".2g"),
            format_number(feature.effect_second, ".2g"),
            f"{feature.share:.2f}",
            f"{feature.cosine:.2f}",
        )
        for feature in _ranked(pair)[:_N_FEATURES]
    ]
    head = (
        "feature", "", "is", "fires at", "contributes", "explains", "95 %",
        "chance" if report.null is None else "of seeds", f"effect in {a}", f"effect in {b}",
        f"size in {b}", "cosine",
    )  # fmt: skip
    one.tables.append((head, rows))
    return one


def _ranked(pair: PairDifference) -> list[FeatureDifference]:
    """Return the features of a pair: news first, then by what their removal explains."""
    return sorted(
        pair.features,
        key=lambda one: (not one.is_news, -(one.removed or 0.0), -one.contribution),
    )


def _examples(report: ComparisonReport) -> _Section:
    """Return the examples of the first features of each pair, with what each adapter's row adds."""
    one = _Section(
        _EXAMPLES,
        ["For each example: the feature's value, and what the row of each adapter adds to it."],
    )
    found = {feature.feature: feature for feature in report.features}
    shown = [f.feature for pair in report.pairs for f in _ranked(pair)[:_N_FEATURES]]
    rows = [
        (
            f"{number}",
            _line(found[number].label),
            f"{example.value:.2g}",
            ", ".join(f"{name} {value:.2g}" for name, value in example.parts.items()),
            f"{_before(example.before)}▸{_line(example.token)}◂{_line(example.after)}",
        )
        for number in dict.fromkeys(shown)
        if number in found
        for example in found[number].examples
    ]
    one.tables.append((("feature", "fires at", "value", "adds", "example"), rows))
    return one


def _before(text: str) -> str:
    return _line(text[-_LONGEST:])


def _growth(report: ComparisonReport) -> _Section:
    """Return how features grow over checkpoints, those that change most first."""
    names = [one.name for one in report.adapters]

    def change(feature: JointFeature) -> float:
        sizes = [feature.sizes[name] for name in names]
        return (max(sizes) - min(sizes)) * feature.n_fired

    changed = sorted(report.features, key=change, reverse=True)[:_N_GROWTH]
    one = _Section(
        "Birth, growth and death",
        [
            "What each feature writes at each checkpoint, at its mean value: those that change "
            "most. A feature is born at the first step with a tenth of its largest size."
        ],
    )
    rows = [
        (
            f"{feature.feature}",
            _line(feature.label),
            f"{feature.born}",
            f"{feature.peak}",
            "—" if feature.died is None else f"{feature.died}",
            " ".join(f"{feature.sizes[name]:.3g}" for name in names),
        )
        for feature in changed
    ]
    one.tables.append((("feature", "fires at", "born", "peak", "last", "sizes"), rows))
    steps = [float(one.step or 0) for one in report.adapters]
    losses = [one.loss for one in report.adapters]
    figures = []
    if all(loss is not None for loss in losses):
        figures.append(_figure("loss", steps, [loss or 0.0 for loss in losses]))
    figures.append(_figure("KL to the base", steps, [one.kl_base for one in report.adapters]))
    figures += [
        _figure(
            f"{feature.feature} {feature.label}", steps, [feature.sizes[name] for name in names]
        )
        for feature in changed
    ]
    return _Section(
        one.title, one.sentences, one.tables, f"<div class=small>{''.join(figures)}</div>"
    )


def _figure(title: str, steps: Sequence[float], values: Sequence[float]) -> str:
    """Return a small line of values over steps, as a figure with its text."""
    width, height = _BOX
    first, last, top = steps[0], steps[-1], max(*values, 1e-30)
    points = [
        (
            3 + (width - 6) * (step - first) / max(last - first, 1e-30),
            height - 3 - (height - 8) * value / top,
        )
        for step, value in zip(steps, values, strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f"<circle cx={x:.1f} cy={y:.1f} r=2 />" for x, y in points)
    said = f"{title}: " + ", ".join(
        f"{value:.2g} at step {step:.0f}" for step, value in zip(steps, values, strict=True)
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role=img aria-label="{html.escape(said)}">'
        f'<polyline points="{line}" />{dots}</svg>'
        f"<figcaption>{_shown(_line(title))} <span>{top:.3g}</span></figcaption></figure>"
    )


def _texts(report: ComparisonReport) -> _Section:
    pair = report.pairs[0]
    return _Section(
        _TEXTS,
        [
            f"The texts of largest KL({pair.first} ‖ {pair.second}) a token. Colour: KL at the "
            f"prediction of the token, full at {_BRIGHTEST:g} nats."
        ],
        [],
        "".join(map(_coloured, report.texts)),
    )


def _coloured(text: DifferentText) -> str:
    tokens = "".join(
        html.escape(token)
        if kl is None
        else f'<span style="--d:{min(kl / _BRIGHTEST, 1):.2f}" title="{kl:.2g} nats">'
        f"{html.escape(token)}</span>"
        for token, kl in zip(text.tokens, text.kl, strict=True)
    )
    return f"<h3>Text {text.rollout}</h3><p class=text><bdi>{tokens}</bdi></p>"


_PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<title>Comparison of adapters</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem }
h2 { margin: 2rem 0 .5rem; font-size: 1.2rem }
h3 { margin: 1rem 0 .3rem; font-size: 1rem }
p { margin: .4rem 0; max-width: 45rem }
.table { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: none;
  font: .9rem/1.7 ui-monospace, monospace }
.text span { background: rgb(230 110 20 / calc(var(--d) * 70%)) }
.small { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 9rem; font-size: .8rem; line-height: 1.3 }
figure span { opacity: .7 }
polyline { fill: none; stroke: #c2600a; stroke-width: 1.5 }
circle { fill: #c2600a }
</style>
<main><h1>Comparison of adapters</h1>
<p><a href="dashboard.html">All features of the joint dictionary</a></p>
BODY
</main></html>
"""
