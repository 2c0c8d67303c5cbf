"""Promoted tokens that should find the removal of their feature among others."""

import itertools

import numpy as np
import pytest

from lorascope.labels.output_score import mean_over_features, pick_removals, rivals_of


def by_enumeration(tokens, latent, rivals, falls):
    """The mean credit over all sets of four rivals."""
    match = {i: sum(falls[i].get(t, 0.0) for t in tokens) for i in (latent, *rivals)}
    credits = []
    for some in itertools.combinations(rivals, 4):
        best = max(match[i] for i in (latent, *some))
        winners = [i for i in (latent, *some) if match[i] == best]
        credits.append((latent in winners) / len(winners))
    return float(np.mean(credits))


def test_true_tokens_always_find_their_removal_and_those_of_others_never():
    falls = {i: {i: 0.5, 100 + i: 0.2} for i in range(12)}
    found = pick_removals({i: [i] for i in range(12)}, falls, dict.fromkeys(falls, "word"))
    assert set(found.own.values()) == {1}
    assert max(found.shuffled.values()) < 0.2, "another feature's token finds its own removal"


def test_tokens_that_fall_nowhere_score_exactly_chance():
    falls = {i: {i: 0.5} for i in range(9)}
    found = pick_removals({i: [1000] for i in range(9)}, falls, dict.fromkeys(falls, "word"))
    assert list(found.own.values()) == pytest.approx([0.2] * 9)
    assert list(found.shuffled.values()) == pytest.approx([0.2] * 9)


def test_the_score_is_the_mean_over_all_draws_of_rivals_equal_matches_too():
    rng = np.random.default_rng(0)
    falls = {i: dict.fromkeys(rng.permutation(8)[:3].tolist(), 0.25) for i in range(9)}
    promoted = {i: rng.permutation(8)[:2].tolist() for i in range(9)}
    category = dict.fromkeys(falls, "word")
    found = pick_removals(promoted, falls, category)
    assert len(set(found.own.values())) > 2
    for latent, share in found.own.items():
        rivals = rivals_of(falls, category)[latent]
        expected = by_enumeration(promoted[latent], latent, rivals, falls)
        assert share == pytest.approx(expected)


def test_rivals_are_of_the_same_category_if_there_are_four_and_else_all():
    category = {i: "number" if i < 5 else "word" for i in range(8)}
    found = rivals_of(category, category)
    assert found[0] == [1, 2, 3, 4]
    assert found[7] == [0, 1, 2, 3, 4, 5, 6]
    assert rivals_of(range(4), category) == {i: [] for i in range(4)}
    assert pick_removals({0: [1]}, {0: {1: 1.0}}, category) == ({}, {})


def test_features_that_were_not_removed_have_no_score():
    falls = {i: {i: 0.5} for i in range(6)}
    found = pick_removals({2: [2], 9: [9]}, falls, dict.fromkeys(range(10), "word"))
    assert found.own == {2: 1.0}


def test_the_interval_over_features_covers_the_truth():
    rng = np.random.default_rng(0)
    n_in = 0
    for _ in range(300):
        _, (low, high) = mean_over_features(rng.beta(2, 3, 40).tolist())
        n_in += low <= 0.4 <= high
    assert n_in / 300 >= 0.95 - 3 * (0.95 * 0.05 / 300) ** 0.5
