"""What rules may say of a token: on a text read by hand, and never by looking ahead."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.labels.clues import CLUES, STREAMS, Corpus, read_clues
from lorascope.texts.roles import ROLES

THINK, USER, SPECIAL = (ROLES.index(name) for name in ("think", "user", "special"))


def read(tokens, roles=None, rollout=None) -> Corpus:
    spelling = sorted({token.encode() for token in tokens})
    ids = np.array([spelling.index(token.encode()) for token in tokens], np.int32)
    roles = np.full(len(tokens), THINK, np.uint8) if roles is None else np.array(roles, np.uint8)
    rollout = np.zeros(len(tokens), np.int64) if rollout is None else np.array(rollout)
    return read_clues(ids, roles, rollout, dict(enumerate(spelling)))


def clues_at(corpus, i):
    return {clue.name for clue, holds in zip(CLUES, corpus.holds[i], strict=True) if holds}


def streams_at(corpus, i):
    names = (stream.name for stream in STREAMS)
    return {name: corpus.texts[v] for name, v in zip(names, corpus.values[:, i], strict=True)}


@pytest.fixture
def sums():
    text = "<s>|An|na| buys| 4|8|.|\n|Wait|,| 4|8| +| 4|2| =| 9|0|.".split("|")
    return read(text, [SPECIAL, *[USER] * 6, SPECIAL, *[THINK] * 11])


def test_the_result_of_a_sum_is_known_by_what_is_before_it(sums):
    last_digit = 17
    assert {"digit", "number goes on", "after a digit", "think", "new"} <= clues_at(
        sums, last_digit
    )
    assert {"glued", 'after a "="', "model's turn"} <= clues_at(sums, last_digit)
    assert not clues_at(sums, last_digit) & {"number begins", "in the question", "word", "spaced"}
    assert streams_at(sums, last_digit) == {
        "token": "0",
        "previous": "9",
        "one before": "=",
        "anchor": "=",
        "last operator": "+",
        "sentence": "wait",
        "line": "wait",
    }


def test_names_numbers_of_the_question_and_new_segments_are_known(sums):
    assert {"word begins", "capitalised", "user", "after the template"} <= clues_at(sums, 1)
    assert {"word goes on", "word"} <= clues_at(sums, 2)
    assert "after a capital" in clues_at(sums, 3)  # " buys" follows "Anna"
    assert {"repeated", "in the question"} <= clues_at(sums, 11)  # 48 again
    assert "not in the question" in clues_at(sums, 14)  # 42 is new
    assert {"first in the segment", "first in the sentence"} <= clues_at(sums, 8)
    assert "in a name" not in clues_at(sums, 8)  # a capital because the sentence begins


def test_every_token_has_every_clue_that_has_an_opposite(sums):
    for one, other in (("repeated", "new"), ("spaced", "glued")):
        i, j = ([clue.name for clue in CLUES].index(name) for name in (one, other))
        assert (sums.holds[:, i] + sums.holds[:, j] == 1).all()


TOKENS = st.sampled_from(
    ["An", "na", " a", " =", " 4", "2", ".", "\n", " ", "(", ")", " +", "é", ""]
)
ROLLOUTS = st.lists(
    st.lists(st.tuples(TOKENS, st.sampled_from([THINK, USER, SPECIAL])), min_size=1)
)


@settings(max_examples=60, deadline=None)
@given(rollouts=ROLLOUTS.filter(bool), data=st.data())
def test_nothing_looks_ahead_or_into_another_rollout(rollouts, data):
    tokens, roles = (list(part) for part in zip(*(t for r in rollouts for t in r), strict=True))
    number = np.repeat(np.arange(len(rollouts)), [len(rollout) for rollout in rollouts])
    whole = read(tokens, roles, number)
    chosen = data.draw(st.integers(0, len(rollouts) - 1))
    first = sum(map(len, rollouts[:chosen]))
    last = first + data.draw(st.integers(1, len(rollouts[chosen])))
    part = read(tokens[first:last], roles[first:last])
    for i in range(last - first):
        assert clues_at(part, i) == clues_at(whole, first + i)
        assert streams_at(part, i) == streams_at(whole, first + i)
