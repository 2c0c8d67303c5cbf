"""Features that fire together are one group, named from their labels."""

from dataclasses import replace

import numpy as np
import pytest
from builders import effect_reports
from builders.indexes import full_index
from builders.labels import label_of

from lorascope.artifact import Identity
from lorascope.causal.report_records import N_SLICES, AblationReport
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import KIND, SCHEMA, Labels, RulePart
from lorascope.labels.groups import FeatureGroup, communities, effect_intervals, groups_of
from lorascope.record_json import from_json

N, FIRST = 14, 6  # features, and those of the first planted group; the last one fires alone


def planted(**given) -> FeatureIndex:
    """Two groups of features that fire together, with one weak link between them."""
    near = np.full((N, 10), -1)
    share = np.full((N, 10), np.nan)
    for latent in range(N - 1):
        group = range(FIRST) if latent < FIRST else range(FIRST, N - 1)
        others = [other for other in group if other != latent]
        near[latent, : len(others)], share[latent, : len(others)] = others, 0.5
    near[0, 4], share[0, 4] = FIRST, 0.01
    manifest = Identity(kind="features", schema=4, settings={}, parents={}).manifest(
        None, {"roles": ["think", "answer", "special"], "n_by_role": [10, 10, 10]}
    )
    arrays = {
        "latent_n_active": np.ones(N),
        "latent_by_role": np.array([[9, 1, 0]] * FIRST + [[1, 9, 0]] * (N - FIRST)),
        "example_offset": np.arange(N + 1),
        "example_value": np.ones(N),
        "near_cofiring": near,
        "near_jaccard": share,
        **given,
    }
    return FeatureIndex.from_arrays(manifest, arrays)


def labelled(index: FeatureIndex) -> FeatureIndex:
    def rule(*values: str):
        return ((RulePart(of="token", values=values), RulePart(of="think")),)

    found = {i: label_of("digits", category="number", rule=rule("7", "8")) for i in range(FIRST)}
    found |= {i: label_of("wait", rule=rule("wait")) for i in range(FIRST, N)}
    manifest = Identity(kind=KIND, schema=SCHEMA, settings={}, parents={}).manifest(None, {})
    return replace(index, labels=Labels(found, manifest))


def test_planted_groups_are_found_and_named_by_kind_segment_and_rules():
    first, second, alone = sorted(groups_of(labelled(planted())), key=lambda one: one.latents)
    assert first.latents == tuple(range(FIRST))
    assert second.latents == tuple(range(FIRST, N - 1))
    assert alone.latents == (N - 1,)
    assert first.name == 'numbers in think segments: "7", "8"'
    assert second.name == 'words in answers: "wait"'
    assert alone.name == "words in answers", "too few for conditions"


def test_without_labels_a_group_is_named_by_its_segment_and_equal_names_are_one():
    first, second = groups_of(planted())
    assert (first.name, second.name) == ("in answers", "in think segments")
    assert first.latents == tuple(range(FIRST, N))
    assert second.latents == tuple(range(FIRST))


@pytest.mark.parametrize("index", [planted(), labelled(planted()), full_index()])
def test_every_feature_that_fires_is_in_one_group_and_it_is_always_the_same(index):
    found = groups_of(index)
    latents = sorted(latent for one in found for latent in one.latents)
    assert latents == np.flatnonzero(index.alive).tolist()
    assert groups_of(index) == found
    assert len({one.name for one in found}) == len(found)


def test_features_of_special_tokens_are_one_group_whatever_they_fire_with():
    by_role = np.array([[9, 1, 0]] * FIRST + [[1, 9, 0]] * (N - FIRST))
    by_role[[1, 8]] = 0, 0, 9
    at_special = {"latent_by_role": by_role, "latent_n_special": by_role[:, 2]}
    index = planted(**at_special)
    assert [index.main_role[latent] for latent in (0, 1, 8)] == ["think", "special", "special"]
    names = {latent: one.name for one in groups_of(index) for latent in one.latents}
    assert names[1] == names[8] == "at special tokens and template headers"
    assert names[0] == "in think segments"


def noisy_groups(n_groups, size, rng):
    """Edges of planted groups: four of a node's five go to its own group, one goes anywhere."""
    n = n_groups * size
    one = np.repeat(np.arange(n), 5)
    inside = one // size * size + rng.integers(0, size, 5 * n)
    other = np.where(np.arange(5 * n) % 5 < 4, inside, rng.integers(0, n, 5 * n))
    is_edge = one != other
    return n, one[is_edge], other[is_edge], rng.uniform(0.1, 0.5, is_edge.sum())


def modularity(one, other, weight, community):
    degree = np.bincount(one, weight, len(community)) + np.bincount(other, weight, len(community))
    inside = weight[community[one] == community[other]].sum() / weight.sum()
    return inside - (np.bincount(community, degree) ** 2).sum() / degree.sum() ** 2


def test_planted_communities_are_found_between_random_edges():
    n, one, other, weight = noisy_groups(40, 50, np.random.default_rng(0))
    found, planted = communities(n, one, other, weight), np.arange(n) // 50
    assert modularity(one, other, weight, found) >= modularity(one, other, weight, planted) * 0.99
    pairs = np.unique(planted * n + found, return_counts=True)[1]
    assert np.sort(pairs)[-40:].sum() >= 0.95 * n, "each group is one community, nearly"


def test_communities_do_not_depend_on_the_order_or_the_direction_of_edges():
    rng = np.random.default_rng(1)
    n, one, other, _ = noisy_groups(10, 20, rng)
    weight = (one + other) % 7 / 10  # of both directions
    order, turned = rng.permutation(len(one)), rng.random(len(one)) < 0.5
    again = np.where(turned, other, one)[order], np.where(turned, one, other)[order]
    expected = communities(n, one, other, weight)
    assert communities(n, *again, weight[order]).tolist() == expected.tolist()


def test_nodes_without_edges_are_communities_of_their_own():
    nothing = np.zeros(0, np.int64)
    assert communities(0, nothing, nothing, []).tolist() == []
    assert communities(3, nothing, nothing, []).tolist() == [0, 1, 2]
    assert communities(4, np.array([0]), np.array([3]), [0.5]).tolist() == [0, 1, 2, 0]
    assert communities(2, np.array([0]), np.array([1]), [0]).tolist() == [0, 0]


def removals(
    index: FeatureIndex, kl: dict[int, float], spread: dict[int, list[int]]
) -> AblationReport:
    """A report of 40 rollouts with these effects, in nats a token, and their spread."""
    report: dict = effect_reports.ablation(index) | {"n_rollouts": 40}
    entry = report["features"][0] | {"kl_special": None}
    report["features"] = [
        entry | {"feature": i, "kl": one, "spread": spread[i]} for i, one in kl.items()
    ]
    return from_json(AblationReport, report, "here")


def test_the_interval_of_a_groups_share_is_that_of_slices_drawn_with_repetition():
    """The first group has all of a slice's effect or none: its share is binomial, of 16 draws."""
    in_even, in_odd = ([125 * ((i + shift) % 2) for i in range(N_SLICES)] for shift in (1, 0))
    groups = [FeatureGroup("even", (0, 1)), FeatureGroup("odd", (2,)), FeatureGroup("none", (3,))]
    spreads = {0: in_even, 1: in_even, 2: in_odd, 3: []}
    report = removals(planted(), {0: 0.1, 1: 0.3, 2: 0.4, 3: 0.0}, spreads)
    even, odd, none = effect_intervals(groups, report)
    assert even is not None and odd is not None
    assert even == pytest.approx((0.25, 0.75)), "P(X <= 3) = 0.011 < 0.025 < P(X <= 4) = 0.038"
    assert odd == pytest.approx((1 - even[1], 1 - even[0]))
    assert none == (0, 0)
    assert effect_intervals([FeatureGroup("all", (0, 1, 2, 3))], report) == ((1, 1),)


def test_effects_that_are_spread_alike_have_a_share_without_doubt_and_old_reports_no_interval():
    rng = np.random.default_rng(0)
    spread = rng.multinomial(1000, [1 / N_SLICES] * N_SLICES).tolist()
    groups = [FeatureGroup("one", (0,)), FeatureGroup("two", (1,))]
    kl = {0: 0.1, 1: 0.3}
    found = effect_intervals(groups, removals(planted(), kl, {0: spread, 1: spread}))
    assert found == (pytest.approx((0.25, 0.25)), pytest.approx((0.75, 0.75)))
    for missing in ([], spread[:-1]):
        old = removals(planted(), kl, {0: spread, 1: missing})
        assert effect_intervals(groups, old) == (None, None)
