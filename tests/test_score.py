"""Scores of labels: known values, and intervals that hold what they promise."""

import itertools

import numpy as np
import pytest

from lorascope.labels.clues import Corpus
from lorascope.labels.score import (
    Ranking,
    Score,
    against,
    against_same_token,
    draw_rollouts,
    mean_over_features,
    pick_removals,
    rank,
    rivals_of,
    score,
    score_answers,
    wilson,
)


def corpus_of(rollout, token=None):
    token = np.zeros(len(rollout), np.int32) if token is None else token
    return Corpus(np.zeros((len(rollout), 0), np.uint8), token[None], ["", "a", "b"], rollout)


def by_formula(p, n):
    z = 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n**2))
    return centre - half, centre + half


def test_scores_are_those_of_counting():
    rollout = np.repeat(np.arange(10), 10)
    covered = np.zeros(100, bool)
    covered[:8] = covered[50:55] = True  # 8 hits of 10 firings, 5 wrong of 90 others
    found = score(corpus_of(rollout), covered, np.arange(10))
    assert found.recall == 0.8
    assert found.precision == 8 / 13
    assert found.balanced_accuracy == pytest.approx((0.8 + 85 / 90) / 2)
    assert found.n_fired == 10


def test_intervals_are_wilsons_and_combine_in_squares():
    """With one token a rollout nothing is clustered: n - 1 tokens count, as in a variance."""
    n = 200
    fires = np.arange(n) < 100
    covered = np.zeros(n, bool)
    covered[:80] = covered[100:110] = True
    found = score(corpus_of(np.arange(n)), covered, np.flatnonzero(fires))
    low, high = by_formula(0.8, 99)
    low_other, high_other = by_formula(0.9, 99)
    middle = (0.8 + 0.9) / 2
    expected = (
        middle - np.hypot(0.8 - low, 0.9 - low_other) / 2,
        middle + np.hypot(high - 0.8, high_other - 0.9) / 2,
    )
    assert found.interval == pytest.approx(expected)


def test_tokens_that_always_agree_within_a_rollout_count_once():
    rng = np.random.default_rng(0)
    fires, covered = rng.random(300) < 0.5, rng.random(300) < 0.5
    once = score(corpus_of(np.arange(300)), covered, np.flatnonzero(fires))
    each = np.repeat(np.arange(300), 7)
    again = score(corpus_of(each), covered[each], np.flatnonzero(fires[each]))
    assert once.interval == pytest.approx(again.interval)


def test_the_interval_contains_the_truth_as_often_as_it_says():
    """Rollouts have their own recall and specificity, so tokens of one are alike."""
    rng = np.random.default_rng(3)
    n_rollouts, length, n_hits, n_draws = 40, 30, 0, 400
    rollout = np.repeat(np.arange(n_rollouts), length)
    fires = np.tile(np.arange(length) < 5, n_rollouts)
    for _ in range(n_draws):
        recall = rng.beta(6, 2, n_rollouts)[rollout]  # mean 3/4
        wrong = rng.beta(2, 6, n_rollouts)[rollout]  # mean 1/4
        covered = rng.random(len(rollout)) < np.where(fires, recall, wrong)
        interval = score(corpus_of(rollout), covered, np.flatnonzero(fires)).interval
        assert interval is not None
        n_hits += interval[0] <= 0.75 <= interval[1]
    assert 0.92 <= n_hits / n_draws <= 0.98  # 95 %, within three standard errors


def test_no_share_is_certain_and_what_cannot_be_measured_is_none():
    corpus = corpus_of(np.arange(20))
    perfect = score(corpus, np.arange(20) < 4, np.arange(4))
    assert perfect.balanced_accuracy == 1
    assert perfect.interval is not None
    assert perfect.interval[0] < 0.9  # four rollouts say little
    for firings in (np.arange(0), np.arange(20)):
        assert score(corpus, np.ones(20, bool), firings).balanced_accuracy is None
    assert score(corpus, np.zeros(20, bool), np.arange(4)).precision is None


def test_a_rule_that_names_the_token_alone_is_at_chance_among_its_occurrences():
    token = np.tile(np.array([1, 2], np.int32), 100)
    corpus = corpus_of(np.arange(200) // 10, token)
    firings = np.flatnonzero(token == 1)[::2]  # every second "a"
    assert against_same_token(corpus, token == 1, firings) == 0.5
    exact = np.zeros(200, bool)
    exact[firings] = True
    assert against_same_token(corpus, exact, firings) == 1
    assert against_same_token(corpus, exact, np.flatnonzero(token == 1)) is None


def test_neighbours_count_only_where_the_feature_itself_is_silent():
    covered = np.arange(100) < 20
    assert against(covered, np.arange(10), np.arange(0, 30)) == (1 + 0.5) / 2
    assert against(covered, np.arange(10), np.arange(12)) is None  # two are left


def test_wilson_is_the_published_interval() -> None:
    _, low, high = wilson(0.8, 10)  # Newcombe 1998, table I
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0, 10).low == pytest.approx(0, abs=1e-12)


def test_scores_of_a_judge_are_what_theory_says() -> None:
    assert score_answers([]) == score_answers([(True, True)]) == Score()
    perfect = score_answers([(True, True), (False, False)] * 10)
    always = score_answers([(True, True), (False, True)] * 10)
    assert perfect.interval is not None and always.interval is not None
    assert perfect.balanced_accuracy == 1
    assert perfect.interval[0] < 1 == pytest.approx(perfect.interval[1])
    assert (always.recall, always.balanced_accuracy) == (1, 0.5)
    assert always.interval[0] < 0.5 < always.interval[1]


def test_the_interval_of_a_judge_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        hits, rejections = rng.random(10) < 0.8, rng.random(10) < 0.7
        found = score_answers(
            [(True, bool(h)) for h in hits] + [(False, not r) for r in rejections]
        )
        assert found.interval is not None
        covered += found.interval[0] <= 0.75 <= found.interval[1]
    assert covered / 400 >= 0.93  # nominal 0.95; 0.93 is two standard errors below


def edges(interval):
    assert interval is not None
    return interval


def ranked(rollout, covered, values):
    corpus, firings = corpus_of(rollout), np.flatnonzero(values)
    return rank(corpus, covered, firings, values[firings], draw_rollouts(corpus))


def test_clarity_and_purity_are_those_of_all_pairs_and_of_the_sorted_list():
    rng = np.random.default_rng(0)
    values = np.round(rng.exponential(size=300) * (rng.random(300) < 0.4), 1).astype(np.float32)
    covered = rng.random(300) < 0.1 + 0.5 * (values > 1)
    found = ranked(np.arange(300) // 10, covered, values)
    pairs = np.sign(values[covered][:, None] - values[~covered][None])
    assert found.clarity == pytest.approx(pairs.mean())
    purity, before = 0.0, 0.0
    for level in np.unique(values)[::-1]:
        recall = (covered & (values >= level)).sum() / covered.sum()
        purity += (recall - before) * covered[values >= level].mean()
        before = recall
    assert found.purity == pytest.approx(purity)
    assert found.covered == covered.mean()
    for value, interval in (
        (found.clarity, found.clarity_interval),
        (found.purity, found.purity_interval),
    ):
        low, high = edges(interval)
        assert value is not None and low < value < high


def test_perfect_and_random_rankings_score_what_theory_says():
    rng = np.random.default_rng(1)
    rollout, values = np.arange(4000) // 20, rng.exponential(size=4000).astype(np.float32)
    perfect = ranked(rollout, values > 2, values)
    assert (perfect.clarity, perfect.purity) == (1, 1)
    low, high = edges(perfect.clarity_interval)
    assert low < 1 == pytest.approx(high)
    by_chance = ranked(rollout, rng.random(4000) < 0.3, values)
    low, high = edges(by_chance.clarity_interval)
    assert low < 0 < high
    low, high = edges(by_chance.purity_interval)
    assert by_chance.covered is not None and low < by_chance.covered < high
    against_it = ranked(rollout, values < 0.1, values)
    assert against_it.clarity == -1


@pytest.mark.parametrize("covered", [np.zeros(20, bool), np.ones(20, bool)])
def test_without_covered_or_other_tokens_there_is_no_ranking(covered):
    assert ranked(np.arange(20), covered, np.ones(20, np.float32)) == Ranking()
    assert ranked(np.arange(20), np.arange(20) < 3, np.zeros(20, np.float32)) == Ranking()


def test_the_intervals_of_rankings_contain_the_truth_as_often_as_they_say():
    """Rollouts differ in how far covered tokens stand out, so tokens of one are alike."""
    rng = np.random.default_rng(5)
    n_rollouts, length, n_draws = 50, 30, 300

    def drawn(n):
        rollout = np.repeat(np.arange(n), length)
        covered = np.tile(np.arange(length) < 6, n)
        shift = rng.normal(1, 0.5, n)[rollout] * covered
        return rollout, covered, np.exp(rng.normal(size=len(rollout)) + shift).astype(np.float32)

    truth = ranked(*drawn(5_000))
    n_in = np.zeros(2)
    for _ in range(n_draws):
        found = ranked(*drawn(n_rollouts))
        for i, name in enumerate(("clarity", "purity")):
            low, high = getattr(found, f"{name}_interval")
            n_in[i] += low <= getattr(truth, name) <= high
    slack = 3 * (0.95 * 0.05 / n_draws) ** 0.5
    assert np.all(n_in / n_draws >= 0.95 - slack - 0.01), n_in / n_draws


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
        _, low, high = mean_over_features(rng.beta(2, 3, 40).tolist())
        n_in += low <= 0.4 <= high
    assert n_in / 300 >= 0.95 - 3 * (0.95 * 0.05 / 300) ** 0.5
