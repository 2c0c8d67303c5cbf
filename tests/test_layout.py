"""The map keeps together what is near, and says nothing of what it does not know."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from builders.indexes import example, index_of, synthetic

from lorascope.dashboard.layout import layout
from lorascope.features.index import FeatureIndex


def indexed(rows: npt.NDArray[Any], dead: npt.NDArray[Any], n_near: int = 10) -> FeatureIndex:
    """An index whose decoder has the given rows, `(latent, d_in)`."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -2)
    near = np.argsort(-cosine, axis=1, kind="stable")[:, :n_near]
    features = [[] if is_dead else [example(1.0, 9, [1, 2], 0)] for is_dead in dead]
    latents = {"near_decoder": near, "near_cosine": np.take_along_axis(cosine, near, axis=1)}
    return index_of(features, latents=latents)


def nearest(places: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    """The `k` nearest points of each, `(point, k)`."""
    square = ((places[:, None] - places[None]) ** 2).sum(axis=2)
    np.fill_diagonal(square, np.inf)
    return np.argsort(square, axis=1)[:, :k]


def kept(places: npt.NDArray[Any], near: npt.NDArray[Any]) -> float:
    """The share of the neighbours that are still among the nearest on the map."""
    found = nearest(places, near.shape[1])
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(near, found, strict=True)]))


def test_planted_clusters_are_places_of_their_own():
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(25), 24)
    rows = rng.standard_normal((25, 32))[cluster] + 0.5 * rng.standard_normal((600, 32))
    places = layout(indexed(rows, np.zeros(600, dtype=bool)))
    assert np.mean(cluster[nearest(places, 5)] == cluster[:, None]) > 0.99
    centres = np.stack([places[cluster == c].mean(axis=0) for c in range(25)])
    width = np.array([places[cluster == c].std(axis=0).max() for c in range(25)])
    apart = np.sqrt(((centres[:, None] - centres[None]) ** 2).sum(axis=2))
    np.fill_diagonal(apart, np.inf)
    assert np.mean(apart.min(axis=1) > 2 * width) > 0.9


def test_a_sheet_is_laid_out_flat_and_neighbours_stay_neighbours():
    rng = np.random.default_rng(0)
    sheet = rng.random((800, 2))
    rows = np.cos(sheet @ rng.standard_normal((2, 32)) * 3 + rng.random(32) * 6)
    index = indexed(rows, np.zeros(800, dtype=bool))
    places = layout(index)
    share = kept(places, index.near_decoder)
    by_chance = kept(rng.random((800, 2)), index.near_decoder)
    assert share > 0.6
    assert by_chance < 0.05
    # Far things too: distances on the map go with those on the sheet.
    one, other = rng.integers(800, size=(2, 3000))
    truth = np.linalg.norm(sheet[one] - sheet[other], axis=1)
    shown = np.linalg.norm(places[one] - places[other], axis=1)
    assert np.corrcoef(truth, shown)[0, 1] > 0.7


def test_an_index_has_one_map_within_the_unit_square():
    index = synthetic(400, 3, 2, n_rollouts=20, n_layers=2)
    places = layout(index)
    assert places.dtype == np.float32
    assert places.shape == (400, 2)
    assert np.array_equal(places, layout(index), equal_nan=True)
    alive = index.n_examples > 0
    assert np.all((places[alive] >= 0) & (places[alive] <= 1))
    assert np.ptp(places[alive], axis=0).max() > 0.9


def test_dead_latents_have_no_place_and_move_nobody():
    rng = np.random.default_rng(0)
    dead = rng.random(200) < 0.3
    places = layout(indexed(rng.standard_normal((200, 16)), dead))
    assert np.array_equal(np.isnan(places).all(axis=1), dead)
    assert not np.isnan(places[~dead]).any()


def test_a_latent_whose_neighbours_are_dead_has_a_place():
    rng = np.random.default_rng(0)
    dead = np.zeros(50, dtype=bool)
    index = indexed(rng.standard_normal((50, 16)), dead)
    dead[index.near_decoder[7]] = True
    places = layout(indexed(rng.standard_normal((50, 16)), dead))
    assert not np.isnan(places[7]).any()


@pytest.mark.parametrize("n", [2, 3, 4, 12])
def test_few_latents_are_laid_out_as_well(n: int):
    rows = np.random.default_rng(0).standard_normal((n, 16))
    places = layout(indexed(rows, np.zeros(n, dtype=bool), n_near=min(10, n - 1)))
    assert np.all((places >= 0) & (places <= 1))
    assert len(np.unique(places, axis=0)) == n


@pytest.mark.parametrize("n", [0, 1, 3])
def test_without_neighbours_there_is_no_map(n: int):
    index = index_of([[example(1.0, 9, [1, 2], 0)]] * n)
    assert np.isnan(layout(index)).all()
    assert layout(index).shape == (n, 2)


def test_neighbours_of_equal_cosine_and_of_none_are_no_trouble():
    rows = np.repeat(np.eye(4), 10, axis=0)
    index = indexed(rows, np.zeros(40, dtype=bool))
    index.near_cosine[3] = np.nan
    places = layout(index)
    assert not np.isnan(places).any()


@pytest.mark.slow
def test_a_hundred_thousand_latents_take_less_than_a_minute():
    index = synthetic(100_000, 1, 1, per_fifth=0, n_texts=1, n_layers=1)
    begun = time.process_time()
    places = layout(index)
    assert time.process_time() - begun < 60
    assert np.isnan(places).any(axis=1).sum() == (index.n_examples == 0).sum()
