"""Features that fire together are one group, named from their labels."""

from dataclasses import replace

import numpy as np
import pytest
from builders.indexes import full_index
from builders.labels import label_of

from lorascope.artifact import Identity
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import KIND, SCHEMA, Labels, RulePart
from lorascope.labels.groups import communities, groups_of

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
