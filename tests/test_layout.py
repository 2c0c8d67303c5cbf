"""The map keeps similar latents together and leaves out unknown ones."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from builders.indexes import example, index_of, synthetic

from lorascope.dashboard.layout import layout
from lorascope.features.index import FeatureIndex


def index_with_decoder(
    rows: npt.NDArray[Any], dead: npt.NDArray[Any], n_near: int = 10
) -> FeatureIndex:
    """An index with the given decoder rows, `(latent, d_in)`."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :n_near]
    features = [[] if is_dead else [example(1.0, 9, [1, 2], 0)] for is_dead in dead]
    latents = {"near_decoder": near, "near_cosine": np.take_along_axis(cosine, near, axis=1)}
    return index_of(features, latents=latents)


def nearest(positions: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    """The `k` nearest neighbours of each point, `(point, k)`."""
    square = ((positions[:, None] - positions[None]) ** 2).sum(axis=2)
    np.fill_diagonal(square, np.inf)
    return np.argsort(square, axis=1)[:, :k]


def share_kept(positions: npt.NDArray[Any], near: npt.NDArray[Any]) -> float:
    """The share of neighbours in the decoder that are neighbours on the map."""
    found = nearest(positions, near.shape[1])
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(near, found, strict=True)]))


def test_planted_clusters_are_separate_on_the_map():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(25), 24)
    rows = rng.standard_normal((25, 32))[cluster] + 0.5 * rng.standard_normal((600, 32))
    positions = layout(index_with_decoder(rows, np.zeros(600, dtype=bool)))
    assert np.mean(cluster[nearest(positions, 5)] == cluster[:, None]) > 0.99
    centres = np.stack([positions[cluster == c].mean(axis=0) for c in range(25)])
    width = np.array([positions[cluster == c].std(axis=0).max() for c in range(25)])
    apart = np.sqrt(((centres[:, None] - centres[None]) ** 2).sum(axis=2))
    np.fill_diagonal(apart, np.inf)
    assert np.mean(apart.min(axis=1) > 2 * width) > 0.9


def test_latents_that_fire_together_are_close_wherever_they_are_written():
    rng = np.random.default_rng(0)
    group = np.arange(300) % 10
    near = np.array([rng.choice(np.flatnonzero(group == g), 6, replace=False) for g in group])
    jaccard = rng.uniform(0.2, 0.6, near.shape)
    index = index_with_decoder(rng.standard_normal((300, 16)), np.zeros(300, dtype=bool))
    latents = {"near_decoder": index.near_decoder, "near_cosine": index.near_cosine}
    latents |= {"near_cofiring": near, "near_jaccard": jaccard}
    positions = layout(index_of([[example(1.0, 9, [1, 2], 0)]] * 300, latents=latents))
    assert np.mean(group[nearest(positions, 5)] == group[:, None]) > 0.95


def test_neighbours_on_a_sheet_stay_neighbours():
    rng = np.random.default_rng(0)
    sheet = rng.random((800, 2))
    rows = np.cos(sheet @ rng.standard_normal((2, 32)) * 3 + rng.random(32) * 6)
    index = index_with_decoder(rows, np.zeros(800, dtype=bool))
    positions = layout(index)
    share = share_kept(positions, index.near_decoder)
    by_chance = share_kept(rng.random((800, 2)), index.near_decoder)
    assert share > 0.6
    assert by_chance < 0.05
    # Far things too: distances on the map go with those on the sheet.
    one, other = rng.integers(800, size=(2, 3000))
    truth = np.linalg.norm(sheet[one] - sheet[other], axis=1)
    shown = np.linalg.norm(positions[one] - positions[other], axis=1)
    assert np.corrcoef(truth, shown)[0, 1] > 0.7


def test_the_map_is_deterministic_and_within_the_unit_square():
    index = synthetic(400, 3, 2, n_rollouts=20, n_layers=2)
    positions = layout(index)
    assert positions.dtype == np.float32
    assert positions.shape == (400, 2)
    assert np.array_equal(positions, layout(index), equal_nan=True)
    alive = index.n_examples > 0
    assert np.all((positions[alive] >= 0) & (positions[alive] <= 1))
    assert np.ptp(positions[alive], axis=0).max() > 0.9


def test_dead_latents_are_not_on_the_map_and_do_not_change_it():
    rng = np.random.default_rng(0)
    dead = rng.random(200) < 0.3
    positions = layout(index_with_decoder(rng.standard_normal((200, 16)), dead))
    assert np.array_equal(np.isnan(positions).all(axis=1), dead)
    assert not np.isnan(positions[~dead]).any()


def test_a_latent_with_only_dead_neighbours_is_on_the_map():
    rng = np.random.default_rng(0)
    dead = np.zeros(50, dtype=bool)
    index = index_with_decoder(rng.standard_normal((50, 16)), dead)
    dead[index.near_decoder[7]] = True
    positions = layout(index_with_decoder(rng.standard_normal((50, 16)), dead))
    assert not np.isnan(positions[7]).any()


@pytest.mark.parametrize("n", [2, 3, 4, 12])
def test_a_few_latents_are_laid_out_too(n: int):
    rows = np.random.default_rng(0).standard_normal((n, 16))
    positions = layout(index_with_decoder(rows, np.zeros(n, dtype=bool), n_near=min(10, n - 1)))
    assert np.all((positions >= 0) & (positions <= 1))
    assert len(np.unique(positions, axis=0)) == n


@pytest.mark.parametrize("n", [0, 1, 3])
def test_without_neighbours_there_is_no_map(n: int):
    index = index_of([[example(1.0, 9, [1, 2], 0)]] * n)
    assert np.isnan(layout(index)).all()
    assert layout(index).shape == (n, 2)


def test_equal_and_missing_cosines_are_laid_out():
    rows = np.repeat(np.eye(4), 10, axis=0)
    index = index_with_decoder(rows, np.zeros(40, dtype=bool))
    index.near_cosine[3] = np.nan
    positions = layout(index)
    assert not np.isnan(positions).any()


@pytest.mark.slow
def test_a_hundred_thousand_latents_are_laid_out():
    index = synthetic(100_000, 1, 1, per_fifth=0, n_texts=1, n_layers=1)
    positions = layout(index)
    assert np.isnan(positions).any(axis=1).sum() == (~index.alive).sum()
