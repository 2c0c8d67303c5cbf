"""Write the first sentences of the overview: what an adapter does, in words and measured numbers.

1. What the adapter is: rank, projections, layers.
2. What it does. If it changes how likely the model opens a thought or an answer (`openings`), that
   comes first, then the tokens that rise and fall most inside, then those elsewhere. Otherwise the
   tokens that it moves most, each with the tokens that it follows.
3. How much of the effect is constant: the same at every token of a kind.
4. How much of it the features give.

Tokens are quoted, and nothing is said of an effect that is not larger than rounding.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorascope.causal.report_records import EvaluationReport, Interval, Opening, TokenShift
from lorascope.features.index import FeatureIndex
from lorascope.labels.groups import where_of
from lorascope.texts.tokens import visible

_GENERATED = ("think", "answer")
_N_NAMED = 4  # tokens of each kind of statement
_MIN_NAMED = 0.02  # share of all change from which a token is named
_MIN_ELSEWHERE = 0.05  # the same, outside of segments that the model writes
_MIN_INSIDE = 0.005  # share of all change that the tokens of a segment that are named make
_MIN_ROLE = 0.02
_MIN_OPENED = 0.1  # change of an opening's probability
_MOST_BEFORE = 3  # tokens that a moved token is said to follow
_MOSTLY = 0.8  # share of a token's shift that is made after them
_CONSTANT = 0.9  # share of the effect from which it counts as constant
_CHANGES = {"rises": "more likely", "falls": "less likely"}
_LINE_SIGNS = str.maketrans("\n\t\r", "⏎⇥␍")


@dataclass(frozen=True, kw_only=True)
class RoleShare:
    """The share of KL(adapter ‖ base) where tokens of one role are predicted, and their number."""

    role: str
    share: float
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """The share of the adapter's effect that the features recover, over tokens of one kind."""

    over: str
    recovered: float
    interval: Interval
    conditional: float | None
    baselines: Mapping[str, float]


def headline_of(
    index: FeatureIndex,
    evaluation: EvaluationReport | None,
    kl: float | None,
    roles: Sequence[RoleShare],
    gauges: Sequence[Gauge],
) -> Iterator[str]:
    """Yield the sentences. `kl` is 0 if the adapter changes nothing, None if it is not known."""
    yield _subject(index)
    if kl == 0 or (kl is None and has_no_weights(index)):
        yield _nothing(index, evaluation)
        return
    if evaluation is None and len(_adapters(index)) > 1:
        yield "How their predictions differ is in compare.html, which lorascope compare wrote."
        return
    if evaluation is None:
        yield (
            "What it does to the model's predictions was not measured; lorascope evaluate does it."
        )
        return
    yield from _effect(evaluation)
    is_constant, constant = _constant(gauges)
    if is_constant:
        yield constant
    rest = (_places(roles), "" if is_constant else constant, _features(gauges))
    yield " ".join(filter(None, rest))


def quoted(token: str) -> str:
    """Return a token in quotes, with line ends and other invisible characters shown."""
    return f"“{visible(token.translate(_LINE_SIGNS))}”"


def _named(token: str) -> str:
    """Return a token in quotes for a sentence: without the spaces around it."""
    return quoted(token.strip(" ") or token)


def percent(share: float) -> str:
    """Return a share as a percentage of two or three digits that never rounds up to all."""
    value = 100 * share
    if 99.5 <= value < 100:
        return f"{math.floor(10 * value) / 10:.1f}\u00a0%"
    return f"{value:.0f}\u00a0%" if value >= 9.95 else f"{value:.1f}\u00a0%"


def probability(p: float) -> str:
    """Return a probability as a percentage; a small one is not said to be 0."""
    return percent(p) if p >= 0.001 else "less than 0.1\u00a0%"


def has_no_weights(index: FeatureIndex) -> bool:
    """Return whether every `B` is zero, so that the adapter's rows have no effect."""
    layout = index.manifest.layout
    return layout is not None and layout.writes_nothing


def _adapters(index: FeatureIndex) -> list[str]:
    """Return the names of the adapters of a joint layout; one empty name for a single adapter."""
    layout = index.manifest.layout
    return list(dict.fromkeys(site.adapter for site in layout.sites)) if layout else []


def _subject(index: FeatureIndex) -> str:
    """Return what kind of adapter it is, of which model."""
    layout, content = index.manifest.layout, index.content
    model = content.get("base_model")
    of_model = f" of {model}" if isinstance(model, str) and model else ""
    if layout is None or not layout.sites:
        return f"A LoRA{of_model}, {len(index)} features."
    size = f"{_count(layout.d_in, 'number')} a token, {_count(int(index.alive.sum()), 'feature')}."
    if len(adapters := _adapters(index)) > 1:
        return f"{len(adapters)} LoRAs{of_model} together ({', '.join(adapters)}): {size}"
    ranks = sorted({site.rank for site in layout.sites})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    layers = {site.layer for site in layout.sites}
    kinds = {site.projection for site in layout.sites}
    return (
        f"A LoRA of {rank} on {_count(len(kinds), 'projection')} of "
        f"{_count(len(layers), 'layer')}{of_model}: {size}"
    )


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _nothing(index: FeatureIndex, evaluation: EvaluationReport | None) -> str:
    """Return that the adapter does nothing, and how that is known."""
    known = "Every B matrix of it is zero. " if has_no_weights(index) else ""
    if evaluation is None:
        return f"It learned nothing. {known}".strip()
    found = evaluation.faithfulness
    return (
        f"It learned nothing that changes the model. {known}On "
        f"{_count(found.n_rollouts, 'held-out text')} ({_count(found.n_tokens, 'prediction')}), "
        "the model predicts the same with and without it."
    )


def _effect(evaluation: EvaluationReport) -> Iterator[str]:
    """Yield what the adapter does."""
    shifts = evaluation.shifts
    openings = [
        one for one in evaluation.openings if abs(one.p_adapter - one.p_base) >= _MIN_OPENED
    ]
    if openings:
        yield _opened(openings)
        rest = " ".join([*_inside(shifts), *_elsewhere(shifts, openings)])
        if rest:
            yield rest
    else:
        moved = " ".join(_moved(_merged(shifts)))
        yield moved or "It changes many tokens a little: none makes 2\u00a0% of its effect."


def _places(roles: Sequence[RoleShare]) -> str:
    """Return where the effect on predictions is."""
    if not roles:
        return "Where it changes predictions was not measured."
    main, *others = roles
    some = [main, *(one for one in others if one.share >= _MIN_ROLE)]
    parts = [
        f"{percent(one.share)} {'is ' if one is main else ''}{where_of(one.role)}" for one in some
    ]
    return f"Of its effect on predictions, {_listed(parts)}."


def _opened(openings: Sequence[Opening]) -> str:
    """Return how the adapter changes the openings of segments."""
    sentences = []
    for some, often, verb in (
        ([one for one in openings if one.p_adapter > one.p_base], "", "rises"),
        ([one for one in openings if one.p_adapter <= one.p_base], " less often", "falls"),
    ):
        if some:
            parts = [
                f"of {quoted(one.text)} {'' if i else verb + ' '}from {probability(one.p_base)} to "
                f"{probability(one.p_adapter)}"
                for i, one in enumerate(some)
            ]
            sentences.append(
                f"It makes the model open {_listed([one.role for one in some])} segments{often}: "
                f"where the texts begin one, the probability {_listed(parts)}."
            )
    return " ".join(sentences)


def _inside(shifts: Sequence[TokenShift]) -> Iterator[str]:
    """Yield the tokens that rise most inside the segments that the model writes."""
    parts = []
    for role in _GENERATED:
        own = [one for one in shifts if one.role == role and one.side == "rises"][:_N_NAMED]
        if own and sum(one.share for one in own) >= _MIN_INSIDE:
            tokens = _listed(list(dict.fromkeys(_named(one.token) for one in own)))
            begin, end = ("", "") if parts else ("it makes ", " more likely")
            parts.append(f"{where_of(role)} {begin}{tokens}{end}")
    if parts:
        text = "; ".join(parts)
        yield f"{text[0].upper()}{text[1:]}."


def _elsewhere(shifts: Sequence[TokenShift], openings: Sequence[Opening]) -> Iterator[str]:
    """Yield the tokens that it moves most outside of these segments and their openings."""
    opened = [one.text for one in openings]
    others = [
        one
        for one in shifts
        if one.role not in _GENERATED
        and not (one.side == "rises" and any(one.token in text for text in opened))
    ]
    moved = [one._replace(where="") for one in _merged(others) if one.share >= _MIN_ELSEWHERE]
    yield from _moved(moved, "Elsewhere it makes")


class _Moved(NamedTuple):
    """A token that rises or falls, over all roles; `after` and `where` are "" or words."""

    token: str
    side: str
    share: float
    after: str
    where: str


def _merged(shifts: Iterable[TokenShift]) -> list[_Moved]:
    """Return the shifts of each token over all roles, largest share first."""
    groups: dict[tuple[int, str], list[TokenShift]] = {}
    for one in shifts:
        groups.setdefault((one.token_id, one.side), []).append(one)
    found = []
    for some in groups.values():
        share = sum(one.share for one in some)
        main = max(some, key=lambda one: one.share)
        where = where_of(main.role) if main.share >= _CONSTANT * share else ""
        found.append(_Moved(main.token, main.side, share, _after(some), where))
    return sorted(found, key=lambda one: -one.share)


def _after(some: Sequence[TokenShift]) -> str:
    """Return the tokens that a moved token follows, if they are few or all digits."""
    weights: dict[str, float] = {}
    for one in some:
        for before in one.after:
            weight = before.share * one.share
            weights[before.token] = weights.get(before.token, 0.0) + weight
    whole = sum(one.share for one in some)
    digits = {token: w for token, w in weights.items() if token.strip().isdigit()}
    if len(digits) > 1 and sum(digits.values()) >= _MOSTLY * whole:
        return " after digits"
    tokens, reached = [], 0.0
    for token, weight in sorted(weights.items(), key=lambda item: -item[1])[:_MOST_BEFORE]:
        tokens.append(_named(token))
        reached += weight
        if reached >= _MOSTLY * whole:
            return f" after {_listed(tokens, 'or')}"
    return ""


def _moved(moved: Sequence[_Moved], begin: str = "It makes") -> Iterator[str]:
    """Yield what rises and what falls, with the share of the effect."""
    unit = " of its effect"
    for side, change in _CHANGES.items():
        parts = []
        for one in [one for one in moved if one.side == side and one.share >= _MIN_NAMED]:
            where = f" {one.where}" if one.where else ""
            words = "" if parts else f" {change}"
            parts.append(
                f"{_named(one.token)}{words}{one.after}{where} ({percent(one.share)}{unit})"
            )
            unit = ""
        if parts:
            yield f"{begin} {_listed(parts[:_N_NAMED])}."
            begin = "It makes"


def _listed(parts: Sequence[str], last: str = "and") -> str:
    """Return parts with commas and a word before the last."""
    *first, final = parts
    return f"{', '.join(first)} {last} {final}" if first else final


def _constant(gauges: Sequence[Gauge]) -> tuple[bool, str]:
    """Return whether nearly all of the effect is constant, and how much is; "" if not known."""
    shares = [one.baselines.get("constant row") for one in gauges]
    if not shares or shares[-1] is None:
        return False, ""
    main, rest = _shares(gauges, shares)
    how = "stays when the row of each token is replaced by the mean of its role and place in the "
    if shares[-1] >= _CONSTANT:
        return True, f"Its effect is constant: {main} of it {how}template{rest}."
    return False, f"{main} of its effect is constant: it {how}template{rest}."


def _features(gauges: Sequence[Gauge]) -> str:
    """Return how much of the effect the features give."""
    if not gauges:
        return ""
    main, rest = _shares(gauges, [one.recovered for one in gauges])
    return f"With the rows that the features give, {main} of its effect stays{rest}."


def _shares(gauges: Sequence[Gauge], shares: Sequence[float | None]) -> tuple[str, str]:
    """Return the share of the whole effect, which the last gauge is of, and those of its parts."""
    *parts, (_, whole) = [
        (one.over, percent(min(max(0.0, share), 1.0)))
        for one, share in zip(gauges, shares, strict=True)
        if share is not None
    ]
    rest = ", ".join(f"{share} on {over}" for over, share in parts)
    return whole, f" ({rest})" if rest else ""
