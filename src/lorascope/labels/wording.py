"""Say a rule as a person would: a short name, a sentence, and what kind of rule it is.

A term is a noun with what follows it: *the token "####"*, *a digit, right after "="*. Its noun is
its set of tokens, or else the clue that is one; the other nouns follow as "that is …".
"""

from collections.abc import Iterable, Sequence

from lorascope.features.label_file import Kind, RulePart
from lorascope.labels.clues import CLUES, STREAMS
from lorascope.labels.rules import Condition, Rule, Term
from lorascope.texts.tokens import visible

LONGEST_NAME = 40
_N_QUOTED = 6  # values that a sentence names
_N_NAMED = 3  # and a name
SHORT = {  # what a name says for a stream
    "previous": "after {}",
    "one before": "{} two before",
    "anchor": "from {}",
    "last operator": "operator {}",
    "sentence": "{} sentence",
    "line": "{} line",
}
_RESULTS = {"+": "sum", "-": "difference", "−": "difference", "×": "product", "*": "product"}
_RESULTS |= {"÷": "quotient", "/": "quotient"}


def name_of(rule: Rule, texts: Sequence[str]) -> str:
    """Return what a rule says in at most `LONGEST_NAME` characters."""
    return shortened(" or ".join(_term_name(term, texts) for term in rule) or "no rule")


def sentence_of(rule: Rule, texts: Sequence[str]) -> str:
    """Return what a rule says, all of it that fits into a sentence."""
    return "; or ".join(_term_phrase(term, texts) for term in rule) or "no short rule"


def kind_of(rule: Rule) -> Kind:
    """Return what a rule looks at: a token, its context, or only where it stands."""
    topics = {
        (CLUES[c.clue] if c.stream < 0 else STREAMS[c.stream]).topic for term in rule for c in term
    }
    for topic in ("context", "token", "position"):
        if topic in topics:
            return topic
    return "unclear"


def parts_of(rule: Rule, texts: Sequence[str]) -> tuple[tuple[RulePart, ...], ...]:
    """Return a rule in the words of its conditions, for `labels.json`."""
    return tuple(
        tuple(
            RulePart(
                of=CLUES[c.clue].name if c.stream < 0 else STREAMS[c.stream].name,
                values=tuple(visible(texts[value]) for value in c.values),
            )
            for c in term
        )
        for term in rule
    )


def quoted(values: Iterable[str], most: int, last: str = "or") -> str:
    """Return values in quotes, the first `most` of them."""
    shown = [f'"{visible(value)}"' for value in values]
    if len(shown) > most + 1:
        return ", ".join(shown[:most]) + f" or {len(shown) - most} others"
    return f" {last} ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def shortened(text: str) -> str:
    """Return a text of at most `LONGEST_NAME` characters."""
    return text if len(text) <= LONGEST_NAME else text[: LONGEST_NAME - 1].rstrip(' ,"') + "…"


def _term_phrase(term: Term, texts: Sequence[str]) -> str:
    result, rest = _result(term, texts)
    sets = [texts[value] for c in rest if _is_token(c) for value in c.values]
    nouns = [CLUES[c.clue].noun for c in rest if c.stream < 0 and CLUES[c.clue].noun]
    if sets:
        noun = f"the token {quoted(sets, 1)}" if len(sets) == 1 else ""
        nouns.insert(0, noun or f"one of the tokens {quoted(sets, _N_QUOTED)}")
    if result:
        nouns.insert(0, result)
    first, *others = nouns or ["a token"]
    after = [f"that is {noun}" for noun in others]
    for condition in rest:
        if condition.stream < 0:
            after += [CLUES[condition.clue].after] if CLUES[condition.clue].after else []
        elif not _is_token(condition):
            values = quoted([texts[value] for value in condition.values], _N_QUOTED)
            after.append(STREAMS[condition.stream].after.format(values))
    return f"{first} {', '.join(after)}".rstrip()


def _term_name(term: Term, texts: Sequence[str]) -> str:
    """Return the parts of a term that fit into a name, the nouns first, and "…" for the others."""
    result, rest = _result(term, texts)
    heads = [result.removeprefix("the ")] if result else []
    tails = []
    for condition in rest:
        values = [f'"{visible(texts[value])}"' for value in condition.values]
        shown = ", ".join(values[:_N_NAMED]) + "…" * (len(values) > _N_NAMED)
        if _is_token(condition):
            heads.insert(0, shown)
        elif condition.stream >= 0:
            tails.append(SHORT[STREAMS[condition.stream].name].format(shown))
        elif CLUES[condition.clue].noun:
            heads.append(CLUES[condition.clue].name)
        else:
            tails.append(CLUES[condition.clue].name)
    first, *others = heads + sorted(tails, key=len)
    fits = [first]
    for part in others:
        if len(", ".join([*fits, part])) < LONGEST_NAME:
            fits.append(part)
    name = ", ".join(fits)
    return name + "…" * (len(fits) <= len(others) and not name.endswith("…"))


def _is_token(condition: Condition) -> bool:
    return condition.stream == 0


def _result(term: Term, texts: Sequence[str]) -> tuple[str, Term]:
    """Return the words for what stands after "=", and the conditions that they do not say."""
    names = {STREAMS[c.stream].name: c for c in term if c.stream >= 0}
    clues = {CLUES[c.clue].name for c in term if c.stream < 0}
    equals = next(
        (
            c
            for name in ("previous", "anchor")
            if (c := names.get(name)) and [texts[value] for value in c.values] == ["="]
        ),
        None,
    )
    if equals is None:
        return "", term
    said = {equals}
    whole = "the result"
    operator = names.get("last operator")
    if operator and all(texts[value] in _RESULTS for value in operator.values):
        results = dict.fromkeys(_RESULTS[texts[value]] for value in operator.values)
        whole += " of " + " or ".join(f"a {result}" for result in results)
        said.add(operator)
    if equals is names.get("previous") and "token" not in names:
        whole = f"the first token of {whole}"
    elif "number goes on" in clues:
        whole = f"a later digit of {whole}"
    for c in term:
        if c.stream < 0 and CLUES[c.clue].name in ("digit", "number begins", "number goes on"):
            said.add(c)
    return f'{whole} after "="', tuple(c for c in term if c not in said)
