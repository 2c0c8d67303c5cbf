"""What rules may say of a token: streams of values, and clues that hold or not.

Everything is known from the token and what is before it, because a feature of a causal model cannot
know more.

- A *stream* has one value at every token: a text, such as that of the previous token, without
  surrounding space and letter case. A rule may ask for one of a few values of a stream.
- A *clue* holds at a token or not: that it is a digit, that it is the first of its line.

`read_clues` computes all of them for a corpus, in a few passes over arrays.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope.texts.roles import ROLES, SPECIAL

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

Topic = Literal["token", "context", "position"]


class Clue(NamedTuple):
    """A property of tokens in words: a noun ("a digit") or what follows one ("in a number").

    `topic` is what it looks at: the token itself, its context, or only where it stands.
    """

    name: str
    topic: Topic
    noun: str = ""
    after: str = ""


class Stream(NamedTuple):
    """A property of tokens that has many values; `{}` in `after` is where values go."""

    name: str
    topic: Topic
    after: str


CLUES = (
    Clue("digit", "token", noun="a digit"),
    Clue("operator", "token", noun="an operator"),
    Clue("punctuation", "token", noun="a punctuation mark"),
    Clue("sentence end", "token", noun="the end of a sentence"),
    Clue("line break", "token", noun="a line break"),
    Clue("symbol", "token", noun="a symbol"),
    Clue("word", "token", noun="a word or part of one"),
    Clue("capitalised", "token", noun="a capitalised word"),
    Clue("upper case", "token", noun="a word in capitals"),
    Clue("one letter", "token", noun="a single letter"),
    Clue("not ASCII", "token", noun="a token with characters that are not ASCII"),
    Clue("template", "token", noun="a token of the template"),
    Clue("spaced", "token", after="with a space before it"),
    Clue("glued", "token", after="without a space before it"),
    Clue("word begins", "context", noun="the first token of a word"),
    Clue("word goes on", "context", noun="a later token of a word"),
    Clue("in a name", "context", noun="a capitalised word inside a sentence"),
    Clue("number begins", "context", noun="the first digit of a number"),
    Clue("number goes on", "context", noun="a later digit of a number"),
    Clue("after a digit", "context", after="right after a digit"),
    Clue("after an operator", "context", after="right after an operator"),
    Clue("after punctuation", "context", after="right after a punctuation mark"),
    Clue("after a word", "context", after="right after a word"),
    Clue("after a capital", "context", after="right after a capitalised word"),
    Clue("after the template", "position", after="right after the template"),
    Clue("in brackets", "context", after="inside brackets"),
    Clue("repeated", "context", after="seen before in the text"),
    Clue("new", "context", after="not seen before in the text"),
    Clue("repeated pair", "context", after="seen before after the same token"),
    Clue("new pair", "context", after="not seen before after the same token"),
    Clue("in the question", "context", after="that is in the question"),
    Clue("not in the question", "context", after="that is not in the question"),
    Clue("first in the text", "position", noun="the first token of a text"),
    Clue("first in the segment", "position", after="at the start of its segment"),
    Clue("first 5 tokens", "position", after="among the first 5 tokens of its segment"),
    Clue("first 20 tokens", "position", after="among the first 20 tokens of its segment"),
    Clue("after 40 tokens", "position", after="after more than 40 tokens of its segment"),
    Clue("after 100 tokens", "position", after="after more than 100 tokens of its segment"),
    Clue("first in the line", "position", after="at the start of a line"),
    Clue("early in the line", "position", after="among the first 3 tokens of a line"),
    Clue("first in the sentence", "position", after="at the start of a sentence"),
    Clue("early in the sentence", "position", after="among the first 3 tokens of a sentence"),
    Clue("first equation", "context", after='before the second "=" of its segment'),
    Clue('after a "="', "context", after='after a "=" in the same sentence'),
    Clue('before any "="', "context", after='before any "=" in the same sentence'),
    Clue("model's turn", "position", after="in the model's turn"),
    *(Clue(role, "position", after=f"in the {role} segment") for role in ROLES[:4]),
)
STREAMS = (
    Stream("token", "token", ""),
    Stream("previous", "context", "right after {}"),
    Stream("one before", "context", "two tokens after {}"),
    Stream("anchor", "context", "in the word or number right after {}"),
    Stream("last operator", "context", "where the last operator of the sentence is {}"),
    Stream("sentence", "context", "in a sentence that begins with {}"),
    Stream("line", "context", "in a line that begins with {}"),
)
NOTHING = 0  # the value of a stream where there is none

_OPERATOR = re.compile(r"[-+−–×÷*/^%<>≤≥≈±·]+")
_ENDS = (".", "!", "?")
_LONGEST = 32  # tokens of a word or number that are compared with earlier ones


@dataclass(frozen=True)
class Corpus:
    """Tokens of whole rollouts, one after another, and what rules may say of them.

    `holds` `(token, clue)` has the clues as 0 and 1, `values` `(stream, token)` indices into
    `texts`. `rollout` `(token,)` has the index of each token's rollout.
    """

    holds: npt.NDArray[np.uint8]
    values: npt.NDArray[np.int32]
    texts: Sequence[str]
    rollout: Ints

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.rollout)

    @cached_property
    def by_clue(self) -> Mask:
        """The clues again, `(clue, token)`: faster to read for all tokens."""
        return np.ascontiguousarray(self.holds.T).view(bool)

    def take(self, rows: Ints) -> "Corpus":
        """Return the corpus of some of its tokens."""
        return Corpus(self.holds[rows], self.values[:, rows], self.texts, self.rollout[rows])


def read_clues(
    token_ids: npt.NDArray[np.int32],
    roles: npt.NDArray[np.uint8],
    rollout: Ints,
    spelling: Mapping[int, bytes],
) -> Corpus:
    """Return the corpus of tokens `(token,)`; `spelling` has the bytes of each token id."""
    used, local = np.unique(token_ids, return_inverse=True)
    tokens = [spelling[i].decode(errors="replace") for i in used.tolist()]
    folded = [text.strip().casefold() or text.replace(" ", "␣") or "␣" for text in tokens]
    texts = ["", *sorted(set(folded))]
    number_of = {text: i for i, text in enumerate(texts)}
    fold = np.array([number_of[text] for text in folded], np.int32)[local]

    kinds = np.array([_kinds(text) for text in tokens], bool).reshape(-1, 13)[local].T
    (digit, operator, equals, punctuation, ends, newline, symbol, word, capital, upper, letter) = (
        kinds[:11]
    )
    foreign, spaced = kinds[11:]
    template = roles == SPECIAL

    n = len(token_ids)
    at = np.arange(n)
    begins = _changes(rollout)
    segment = _last(begins | _changes(roles))  # first token of the segment
    before = _shift(begins, 1)
    line = _last(begins | _changes(roles) | before(newline, False))
    ended = before(ends, False) & (spaced | newline)
    sentence = _last((at == line) | ended)
    in_segment, in_line, in_sentence = at - segment, at - line, at - sentence

    goes_on = ~spaced & before(word, False) & word & ~begins
    number_goes_on = ~spaced & before(digit, False) & digit & ~begins
    start = _last(~(goes_on | number_goes_on))  # first token of the word or number
    blank = np.array([not text.strip() for text in tokens], bool)[local] & ~newline
    solid = np.maximum.accumulate(np.where(blank, -1, at))  # last token that is no blank
    anchor = np.where((start > 0) & (word | digit), solid[start - 1], -1)
    anchor = np.where((anchor >= 0) & (rollout[anchor] == rollout), anchor, -1)
    n_equals = np.cumsum(equals)
    equals_before = n_equals - equals - (n_equals - equals)[sentence]
    equals_of_segment = n_equals - equals - (n_equals - equals)[segment]
    last_operator = np.maximum.accumulate(np.where(operator, at, -1))
    last_operator = np.where(last_operator >= sentence, last_operator, -1)
    opens = np.array([t.count("(") + t.count("[") for t in tokens])[local]
    closes = np.array([t.count(")") + t.count("]") for t in tokens])[local]
    depth = np.cumsum(opens) - np.cumsum(closes)
    depth = depth - opens - (depth - opens + closes)[line]

    so_far = _so_far(fold, start)
    repeated, in_question = _seen(rollout, so_far, roles == ROLES.index("user"))
    previous_fold = before(fold, NOTHING)
    pair = fold.astype(np.int64) * len(texts) + previous_fold
    repeated_pair, _ = _seen(rollout, pair, template)
    named = capital[start] & word & (in_sentence - (at - start) > 0)
    generated = np.isin(roles, [ROLES.index("think"), ROLES.index("answer")])

    columns = {
        "digit": digit,
        "operator": operator | equals,
        "punctuation": punctuation,
        "sentence end": ends,
        "line break": newline,
        "symbol": symbol,
        "word": word,
        "capitalised": capital & ~goes_on,
        "upper case": upper,
        "one letter": letter,
        "not ASCII": foreign,
        "template": template,
        "spaced": spaced,
        "glued": ~spaced,
        "word begins": word & ~goes_on,
        "word goes on": goes_on,
        "in a name": named,
        "number begins": digit & ~number_goes_on,
        "number goes on": number_goes_on,
        "after a digit": before(digit, False),
        "after an operator": before(operator | equals, False),
        "after punctuation": before(punctuation, False),
        "after a word": before(word, False),
        "after a capital": before(capital[start] & word, False),
        "after the template": before(template, False) & ~template,
        "in brackets": depth > 0,
        "repeated": repeated,
        "new": ~repeated,
        "repeated pair": repeated_pair,
        "new pair": ~repeated_pair,
        "in the question": in_question & generated,
        "not in the question": ~in_question & generated,
        "first in the text": begins,
        "first in the segment": in_segment == 0,
        "first 5 tokens": in_segment < 5,
        "first 20 tokens": in_segment < 20,
        "after 40 tokens": in_segment >= 40,
        "after 100 tokens": in_segment >= 100,
        "first in the line": in_line == 0,
        "early in the line": in_line < 3,
        "first in the sentence": in_sentence == 0,
        "early in the sentence": in_sentence < 3,
        "first equation": equals_of_segment < 2,
        'after a "="': equals_before > 0,
        'before any "="': equals_before == 0,
        "model's turn": generated,
        **{role: roles == i for i, role in enumerate(ROLES[:4])},
    }
    values = (
        fold,
        previous_fold,
        _shift(begins, 2)(fold, NOTHING),
        np.where(anchor >= 0, fold[anchor], NOTHING),
        np.where(last_operator >= 0, fold[last_operator], NOTHING),
        np.where(in_sentence > 0, fold[sentence], NOTHING),
        np.where(in_line > 0, fold[line], NOTHING),
    )
    return Corpus(
        holds=np.stack([columns[clue.name] for clue in CLUES], axis=1).astype(np.uint8),
        values=np.stack(values).astype(np.int32),
        texts=texts,
        rollout=rollout,
    )


def _kinds(text: str) -> tuple[bool, ...]:
    """Return what a token is by its text alone, in the order that `read_clues` takes."""
    bare = text.strip()
    letters = bare.replace("'", "").replace("’", "").replace("-", "")
    is_word, is_operator = letters.isalpha(), _OPERATOR.fullmatch(bare) is not None
    categories = {unicodedata.category(sign)[0] for sign in bare}
    return (
        bare.isdigit(),
        is_operator,
        bare in ("=", "=="),
        categories == {"P"} and not is_operator,
        bare.endswith(_ENDS) and categories == {"P"},
        "\n" in text,
        bool(categories & {"S"}) and not is_operator and bare not in ("=", "=="),
        is_word,
        is_word and bare[0].isupper(),
        is_word and len(letters) > 1 and letters.isupper(),
        is_word and len(letters) == 1,
        not bare.isascii() and bool(categories & {"L"} or "\ufffd" in bare),
        text[:1].isspace(),
    )


def _changes(values: npt.NDArray[np.generic]) -> Mask:
    """Return where a value differs from the one before; the first one does."""
    return np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]


def _last(where: Mask) -> Ints:
    """Return for each token the last one up to it at which a mask holds, or else the first."""
    return np.maximum.accumulate(np.where(where, np.arange(len(where)), 0))


def _shift(begins: Mask, n: int) -> Callable[[npt.NDArray[Any], int], npt.NDArray[Any]]:
    """Return a function that moves values on by `n` tokens inside each rollout."""
    inside = np.arange(len(begins)) - _last(begins) >= n

    def shifted(values: npt.NDArray[Any], outside: int) -> npt.NDArray[Any]:
        moved = np.concatenate([values[:n], values])[: len(values)]
        return np.where(inside, moved, np.array(outside, values.dtype))

    return shifted


def _so_far(fold: npt.NDArray[np.int32], start: Ints) -> Ints:
    """Return a number that equal beginnings of words and numbers share, up to each token."""
    value = fold.astype(np.uint64)
    length = np.arange(len(fold)) - start
    for i in range(1, min(int(length.max(initial=0)), _LONGEST) + 1):
        here = np.flatnonzero(length == i)
        value[here] += value[here - 1] * np.uint64(0x9E3779B97F4A7C15)
    return value.view(np.int64)


def _seen(rollout: Ints, value: Ints, among: Mask) -> tuple[Mask, Mask]:
    """Return which values were in the rollout before, and which at a token of `among`."""
    order = np.lexsort((np.arange(len(value)), value, rollout))
    fresh = _changes(rollout[order]) | _changes(value[order])
    group = np.cumsum(fresh) - 1
    earlier = np.empty(len(value), bool)
    earlier[order] = ~fresh
    counts = np.cumsum(among[order]) - among[order]
    first = np.flatnonzero(fresh)
    inside = np.empty(len(value), bool)
    inside[order] = counts - counts[first][group] > 0 if len(first) else fresh
    return earlier, inside
