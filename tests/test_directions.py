"""Planted directions get their class: one meaning, a broad one, several, or none."""

import numpy as np
import pytest

from lorascope.labels.by_rule import Half, Halves
from lorascope.labels.clues import read_clues
from lorascope.labels.directions import (
    CLUES,
    FEWEST,
    Directions,
    Drawn,
    count,
    draw,
    of_values,
    shares,
)
from lorascope.labels.rules import Miner
from lorascope.texts.roles import ROLES

N, LENGTH = 20_000, 100
WORDS = [" 4", " 8", "2", " =", " +", " −", " so", " Wait", ".", "\n", "na", " Ann", " €", " the"]
OFTEN = np.array([3, 3, 3, 3, 3, 3, 1, 3, 3, 3, 1, 0.6, 3, 3])


@pytest.fixture(scope="module")
def halves():
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(2):
        ids = rng.choice(len(WORDS), N, p=OFTEN / OFTEN.sum()).astype(np.int32)
        roles = np.full(N, ROLES.index("think"), np.uint8)
        words = {i: word.encode() for i, word in enumerate(WORDS)}
        corpus = read_clues(ids, roles, np.arange(N) // LENGTH, words)
        empty = np.zeros(0, np.int64)
        parts.append(Half(corpus, empty, empty, ids, np.arange(N), np.zeros(0, np.float32)))
    return Halves(*parts)


@pytest.fixture(scope="module")
def miner(halves):
    return Miner(halves.choosing.corpus)


def at(half, *texts, stream=0):
    texts = [half.corpus.texts.index(text) for text in texts]
    return np.isin(half.corpus.values[stream], texts)


def clue(half, name):
    return half.corpus.by_clue[[one.name for one in CLUES].index(name)]


PLANTED = {
    "one token": (lambda half: at(half, "wait"), "monosemantic"),
    "a list of words": (lambda half: at(half, "so", "na"), "monosemantic"),
    "a context": (lambda half: at(half, "=", stream=1) & clue(half, "digit"), "monosemantic"),
    "half of all tokens": (lambda half: clue(half, "after 40 tokens"), "broad"),
    "words": (lambda half: clue(half, "word"), "broad"),
    "two rules": (
        lambda half: at(half, "ann") | (at(half, "=", stream=1) & clue(half, "digit")),
        "polysemantic",
    ),
    "tokens of two kinds": (lambda half: at(half, "wait", "8"), "polysemantic"),
}


def class_of(halves, miner, fires):
    """The class of one direction, whether it is unclear, and its balanced accuracy."""
    firings = tuple(np.flatnonzero(fires(half)) for half in halves)
    counts, _ = count(Directions(1, (firings,)), halves, miner, "test")
    found = shares(counts, np.ones((1, len(counts.tokens))))
    (name,) = [name for name in found._fields[:3] if getattr(found, name)[0] == 1]
    return name, bool(found.unclear[0]), float(found.balanced_accuracy[0])


@pytest.mark.parametrize("name", PLANTED)
def test_planted_directions_get_their_class(halves, miner, name):
    fires, expected = PLANTED[name]
    found, is_unclear, balanced = class_of(halves, miner, fires)
    assert (found, is_unclear) == (expected, False)
    assert balanced > 0.95


def test_a_direction_that_no_rule_describes_is_polysemantic_and_unclear(halves, miner):
    rng = np.random.default_rng(3)
    found = class_of(halves, miner, lambda half: rng.random(N) < 0.02)
    assert found[:2] == ("polysemantic", True)
    assert found[2] == pytest.approx(0.5, abs=0.05)


def test_rules_of_other_directions_describe_nothing_and_rare_ones_are_not_scored(halves, miner):
    pairs = [tuple(np.flatnonzero(at(half, word)) for half in halves) for word in ("wait", "ann")]
    rare = (pairs[0][0][: FEWEST - 1], pairs[0][1])
    directions = Directions(3, (*pairs, rare))
    own, wrong = count(directions, halves, miner, "test")
    once = np.ones((1, N // LENGTH))
    assert len(own.fired) == 2
    assert shares(own, once).monosemantic[0] == 1
    assert shares(wrong, once).monosemantic[0] == 0
    assert shares(wrong, once).balanced_accuracy[0] < 0.5


def test_a_weight_of_two_counts_a_rollout_twice(halves, miner):
    firings = tuple(np.flatnonzero(at(half, "wait"))[::2] for half in halves)
    counts, _ = count(Directions(1, (firings,)), halves, miner, "test")
    weights = np.random.default_rng(0).integers(0, 3, (1, N // LENGTH)).astype(float)
    fires, covered = np.zeros(N, bool), at(halves.scoring, "wait")
    fires[firings[1]] = True
    times = np.repeat(weights[0], LENGTH)
    recall = times[covered & fires].sum() / times[fires].sum()
    specificity = times[~covered & ~fires].sum() / times[~fires].sum()
    found = shares(counts, weights).balanced_accuracy[0]
    assert found == pytest.approx((recall + specificity) / 2, rel=1e-9)


def test_values_fire_as_often_as_features_at_their_largest_on_their_own_side():
    rng = np.random.default_rng(0)
    values = tuple(rng.standard_normal((1000, 3)).astype(np.float16) for _ in range(2))
    like = Directions(1, ((np.arange(50), np.arange(50)),))
    drawn = Drawn(6, np.array([0, 1, 2]), np.array([1, -1, 1]))
    values[0][:, 2] = values[1][:, 2] = -1  # never above 0
    found = of_values(drawn, values, like, rng)
    (up, _), (down, scoring), (never, _) = found.firings
    assert set(up) == set(np.argsort(-values[0][:, 0].astype(float))[:50])
    assert set(down) <= set(np.argsort(values[0][:, 1].astype(float))[:50])
    assert values[1][scoring, 1].max() < values[0][down, 1].max() + 0.01
    assert len(never) == 0


def test_directions_are_drawn_from_all_units_and_both_signs_once_each():
    drawn = draw(40, 1000, np.random.default_rng(0))
    assert drawn.n_all == len(set(zip(drawn.units.tolist(), drawn.signs.tolist(), strict=True)))
    some = draw(6000, 200, np.random.default_rng(0))
    assert len(some.units) == 200
    assert 0.3 < (some.signs > 0).mean() < 0.7
    assert some.units.min() < 500
    assert some.units.max() > 5500
