"""Show what `compare` found: the same sentences and tables in the terminal, Markdown and HTML.

The page also has what text cannot show: texts coloured by the difference, and how features grow
over checkpoints. It runs no script, and all text of adapters and corpora is escaped.
"""

import html
from collections.abc import Iterator

from lorascope.causal.study import format_interval, format_number
from lorascope.compare.compare_records import (
    ComparisonReport,
    DifferentText,
    FeatureDifference,
    PairDifference,
)
from lorascope.compare.growth import growth_of
from lorascope.dashboard.headline import percent, probability, quoted
from lorascope.dashboard.sections import Document, Section, in_cell

_N_FEATURES, _N_SHIFTS = 20, 10
_FEATURES = "dashboard.html"
_BRIGHTEST = 2.0  # nats: tokens of this difference have the full colour, if any reaches it
_MOST_MISSED = 0.5  # of the difference, by contributions that are to rank features
_NOT_SURE = "Not sure: it explains more than that, but part of the interval does not."


def document_of(report: ComparisonReport) -> Document:
    """Return the report as sentences and tables."""
    return Document("Comparison of adapters", [*_sections(report)], _FEATURES)


def _sections(report: ComparisonReport) -> Iterator[Section]:
    yield _adapters(report)
    if any(one.step is not None for one in report.adapters):
        yield from growth_of(report, _FEATURES)
    for number, pair in enumerate(report.pairs):
        yield _difference(report, pair)
        if not number:
            yield _texts(report)
        yield _explained(report, pair)
    yield _examples(report)
    yield Section(
        "What this cannot say",
        [
            "A feature that is no news may differ all the same: weakly, in ways that one "
            "dictionary does not show, or on texts that are not these. That nothing is news is "
            "no proof that two adapters do the same."
        ],
    )


def _adapters(report: ComparisonReport) -> Section:
    one = Section("The adapters")
    one.sentences.append(
        f"Adapters of {report.base} on {report.n_rollouts} texts: {report.n_tokens:,} predictions "
        "of what a model writes; others do not count. "
        f"One dictionary for all has {report.n_features:,} features, {report.n_fired:,} of which "
        "fire here."
    )
    if report.nulls:
        are = "is another seed" if len(report.nulls) == 1 else "are other seeds"
        one.sentences.append(
            f"{' and '.join(report.nulls)} {are} of {report.adapters[0].name}: what differs "
            "between them is no news."
        )
        if len(report.nulls) == 1:
            one.sentences.append(
                "One seed says little of how far seeds differ: two or more leave less false news."
            )
    elif report.adapters[0].step is None:
        one.sentences.append(
            "No second seed was given (--null), so what is called news below may be what any "
            "other seed of the same training would change."
        )
    rows = [
        (
            adapter.name,
            in_cell(adapter.folder),
            f"{adapter.n_columns}",
            f"{adapter.kl_base:.3g}",
            format_interval(adapter.kl_base_interval, ".3g"),
            f"{adapter.floor:.1e}",
        )
        for adapter in report.adapters
    ]
    head = ("", "folder", "columns", "KL to the base", "95 %", "noise")
    one.tables.append((head, rows))
    return one


def _difference(report: ComparisonReport, pair: PairDifference) -> Section:
    a, b = pair.first, pair.second
    seeds = " (another seed)" if b in report.nulls else ""
    one = Section(f"{a} and {b}{seeds}: predictions")
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
            f"Other seeds of {a} differ from it by {pair.seeds:.3g} at most: "
            f"{percent(min(pair.seeds / pair.kl, 1.0))} of this."
        )
    if pair.text_level is not None:
        say(
            f"{pair.n_different} of the {report.n_rollouts} texts are different: KL there is above "
            f"{pair.text_level:.3g} nats a token, a quarter more than in any text between seeds."
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


def _explained(report: ComparisonReport, pair: PairDifference) -> Section:
    a, b = pair.first, pair.second
    one = Section(f"{a} and {b}: features")
    say = one.sentences.append
    counted = ", ".join(f"{n} {kind_in_words(kind, pair)}" for kind, n in pair.n_kinds.items())
    matched = sum(n for kind, n in pair.n_kinds.items() if kind in ("shared", "changed"))
    say(f"{matched} features are in both, of those that fire here: {counted}.")
    if pair.kl:
        shares = (pair.contributions, pair.unexplained, pair.bias)
        features, unexplained, bias = (f"{100 * one / pair.kl:.0f}\u00a0%" for one in shares)
        missed = abs(1 - sum(shares) / pair.kl)
        say(
            f"Contributions along the path from {a} to {b}: features {features} of the difference, "
            f"what the dictionary leaves unexplained {unexplained}, its bias {bias}; they miss it "
            f"by {percent(missed)}."
        )
        if missed > _MOST_MISSED:
            say(
                "That is too much to rely on: the ranking may leave out the features of the "
                "difference, and none being news says little. Either the path is far from linear "
                "(try more --steps), or the adapters differ in more than LoRA."
            )
    if b not in report.nulls:
        say(_news(pair, bool(report.nulls)))
    if pair.steps:
        steps = ", ".join(f"{step.n_features}: {step.kl:.3g}" for step in pair.steps)
        say(
            f"KL({a} ‖ {b}) with {a}'s part of the features of largest contribution in {b}, by "
            f"their number: {steps}."
        )
    names = {one.feature: one.label for one in report.features}
    rows = [
        (
            f"{feature.feature}",
            "" if b in report.nulls else _verdict(feature, pair),
            kind_in_words(feature.kind, pair),
            in_cell(names.get(feature.feature, "")),
            f"{feature.contribution:.2g}",
            format_number(feature.explained, ".2g"),
            format_interval(feature.explained_interval, ".2g"),
            *_beside(feature, bool(report.nulls)),
            format_number(feature.effect_first, ".2g"),
            format_number(feature.effect_second, ".2g"),
            f"{feature.share:.2f}",
            f"{feature.cosine:.2f}",
        )
        for feature in _ranked(pair)[:_N_FEATURES]
    ]
    head = (
        "feature", "", "is", "fires at", "contributes", "explains", "95 %",
        *(("of seeds", "at different texts", "95 %") if report.nulls else ("chance",)),
        f"effect in {a}", f"effect in {b}", f"size in {b}", "cosine",
    )  # fmt: skip
    one.tables.append((head, rows))
    return one


def _news(pair: PairDifference, has_seeds: bool) -> str:
    """Say how many features are news, and what they explain together."""
    a, b = pair.first, pair.second
    if not pair.n_news:
        than = "the seeds do" if has_seeds else "chance"
        return f"None is news: no feature surely explains more than {than}. {_NOT_SURE}"
    why = f"each explains more than chance (at least {pair.level:.2g} nats a token)"
    if has_seeds:
        why = (
            "each surely explains the different texts, more of them than in other seeds; or, of "
            f"all texts, more than any feature of the seeds (over {pair.level:.2g} nats a token)"
        )
    left = pair.without_news or 0.0
    return (
        f"{pair.n_news} {'is' if pair.n_news == 1 else 'are'} news: {why}. With {a}'s part of all "
        f"of them in {b}, KL({a} ‖ {b}) is {left:.3g}, {percent(left / pair.kl)} of it. {_NOT_SURE}"
    )


def _verdict(feature: FeatureDifference, pair: PairDifference) -> str:
    """Say whether a feature is news, or may be: its value is above, but not all of its interval."""
    if feature.is_news:
        return "news"
    least = max(pair.level, feature.chance if feature.seeds is None else feature.seeds)
    return "not sure" if (feature.explained or 0.0) > least else ""


def _beside(feature: FeatureDifference, has_seeds: bool) -> tuple[str, ...]:
    """Return the cells of what a feature is judged by."""
    if not has_seeds:
        return (f"{feature.chance:.2g}",)
    return (
        format_number(feature.seeds, ".2g"),
        format_number(feature.at_different, ".2g"),
        format_interval(feature.at_different_interval, ".2g"),
    )


def _ranked(pair: PairDifference) -> list[FeatureDifference]:
    """Return the features of a pair: news first, then by what they explain."""
    return sorted(
        pair.features,
        key=lambda one: (not one.is_news, -(one.explained or 0.0), -one.contribution),
    )


def _examples(report: ComparisonReport) -> Section:
    """Return the examples of the first features of each pair, with what each adapter's row adds."""
    one = Section(
        "Examples",
        ["For each example: the feature's value, and what the row of each adapter adds to it."],
        long=True,
    )
    found = {feature.feature: feature for feature in report.features}
    shown = [f.feature for pair in report.pairs for f in _ranked(pair)[:_N_FEATURES]]
    rows = [
        (
            f"{number}",
            in_cell(found[number].label),
            f"{example.value:.2g}",
            ", ".join(f"{name} {value:.2g}" for name, value in example.parts.items()),
            f"{in_cell(example.before[-60:])}▸{in_cell(example.token)}◂{in_cell(example.after)}",
        )
        for number in dict.fromkeys(shown)
        if number in found
        for example in found[number].examples
    ]
    one.tables.append((("feature", "fires at", "value", "adds", "example"), rows))
    return one


def _texts(report: ComparisonReport) -> Section:
    pair = report.pairs[0]
    largest = max((kl or 0.0 for text in report.texts for kl in text.kl), default=0.0)
    full = min(largest, _BRIGHTEST) or _BRIGHTEST
    return Section(
        "Texts that they predict differently",
        [
            f"The texts of largest KL({pair.first} ‖ {pair.second}) a token. Colour: KL at the "
            f"prediction of the token, full at {full:.2g} nats."
        ],
        [],
        "".join(_coloured(text, full) for text in report.texts),
        long=True,
    )


def _coloured(text: DifferentText, full: float) -> str:
    tokens = "".join(
        html.escape(token)
        if kl is None
        else f'<span style="--d:{min(kl / full, 1):.2f}" title="{kl:.2g} nats">'
        f"{html.escape(token)}</span>"
        for token, kl in zip(text.tokens, text.kl, strict=True)
    )
    return f"<h3>Text {text.rollout}</h3><p class=text><bdi>{tokens}</bdi></p>"
