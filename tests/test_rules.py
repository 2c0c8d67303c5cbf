"""Rules: planted ones are found, noise gets none, and each is as long as its evidence pays for."""

import numpy as np
import pytest

from lorascope.labels.clues import read_clues
from lorascope.labels.rules import Miner, covers
from lorascope.labels.wording import (
    LONGEST_NAME,
    kind_of,
    name_of,
    parts_of,
    quoted,
    sentence_of,
)
from lorascope.texts.roles import ROLES
from lorascope.texts.tokens import visible

WORDS = [" 4", " 8", "2", " =", " +", " −", " so", " Wait", ".", "\n", "na", " Ann", " €", " the"]


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, len(WORDS), 30_000).astype(np.int32)
    roles = np.full(len(ids), ROLES.index("think"), np.uint8)
    roles[rng.random(len(ids)) < 0.001] = ROLES.index("special")
    rollout = np.arange(len(ids)) // 100
    return read_clues(ids, roles, rollout, {i: word.encode() for i, word in enumerate(WORDS)})


@pytest.fixture(scope="module")
def miner(corpus):
    return Miner(corpus)


def at(corpus, *texts, stream=0):
    return np.isin(corpus.values[stream], [corpus.texts.index(text) for text in texts])


def some(where, share=1.0, noise=0.0, seed=1):
    """Rows where a mask holds, of which a share fires, and some elsewhere."""
    rng = np.random.default_rng(seed)
    fires = where & (rng.random(len(where)) < share)
    return np.flatnonzero(fires | (rng.random(len(where)) < noise))


@pytest.mark.parametrize(("share", "noise"), [(1.0, 0.0), (0.5, 0.0), (0.8, 0.002)])
def test_planted_sets_of_tokens_are_found(corpus, miner, share, noise):
    rule = miner.rule_of(some(at(corpus, "so", "wait", "€"), share, noise))
    ((part,),) = parts_of(rule, corpus.texts)
    assert part.of == "token"
    assert set(part.values) == {"so", "wait", "€"}
    assert kind_of(rule) == "token"


def test_a_planted_context_is_found(corpus, miner):
    digits = corpus.by_clue[0]
    where = digits & at(corpus, "=", stream=3) & at(corpus, "+", stream=4)
    rule = miner.rule_of(some(where))
    assert (covers(corpus, rule) == where).mean() > 0.999
    assert kind_of(rule) == "context"
    assert sentence_of(rule, corpus.texts).startswith('the result of a sum after "="')


def test_two_planted_terms_are_found(corpus, miner):
    where = at(corpus, "ann") | (at(corpus, "=") & corpus.by_clue[19])
    rule = miner.rule_of(some(where))
    assert len(rule) == 2
    np.testing.assert_array_equal(covers(corpus, rule), where)


def test_random_firings_and_features_that_never_or_always_fire_get_no_rule(corpus, miner):
    nowhere = np.zeros(len(corpus), bool)
    for seed in range(20):
        assert miner.rule_of(some(nowhere, noise=0.01, seed=seed)) == ()
    assert miner.rule_of(np.arange(0)) == ()
    assert miner.rule_of(np.arange(len(corpus))) == ()
    assert not covers(corpus, ()).any()


def test_few_firings_pay_for_a_short_rule_only(corpus, miner):
    where = np.flatnonzero(at(corpus, "so", "wait", "€") & at(corpus, "=", stream=1))
    lengths = [
        sum(1 + len(condition.values) for term in miner.rule_of(where[:n]) for condition in term)
        for n in (1, 4, len(where))
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] <= 1 < lengths[-1]


def test_the_same_corpus_gives_the_same_rules(corpus):
    firings = [some(at(corpus, word), 0.6, 0.01) for word in ("4", "so", "wait")]
    first, second = ([Miner(corpus).rule_of(rows) for rows in firings] for _ in range(2))
    assert first == second


def test_words_of_rules_are_one_line_and_hostile_tokens_stay_quoted_text():
    tokens = [b"</script>", b"\x1b[31m", "\u202egnp.exe".encode(), b" \n\n", b"\xff", b" ok"]
    ids = np.tile(np.arange(len(tokens)), 400).astype(np.int32)
    roles = np.full(len(ids), ROLES.index("text"), np.uint8)
    corpus = read_clues(ids, roles, np.arange(len(ids)) // 60, dict(enumerate(tokens)))
    miner = Miner(corpus)
    for token in range(len(tokens) - 1):
        rule = miner.rule_of(np.flatnonzero(ids == token))
        for text in (name_of(rule, corpus.texts), sentence_of(rule, corpus.texts)):
            assert text.isprintable()
        assert 0 < len(name_of(rule, corpus.texts)) <= LONGEST_NAME
    assert visible("a\u202eb\n\x00") == "a\\u202eb\\n\\x00"
    assert quoted(["a", "b", "c", "d"], 2) == '"a", "b" or 2 others'
    assert quoted(["a", "b", "c"], 2) == '"a", "b" or "c"'
