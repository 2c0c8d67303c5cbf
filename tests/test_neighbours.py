import numpy as np
import pytest
import torch
from builders.saes import dense_code, make_sae
from builders.stores import layout_of, write_store
from builders.tolerance import assert_same_up_to_rounding

from lorascope.features import neighbours
from lorascope.features.accumulators import N_BINS, Accumulator, histogram_edges, scan
from lorascope.features.neighbours import (
    cofiring,
    effect_rows,
    fingerprint,
    nearest_rows,
    ranked_tokens,
)
from lorascope.features.spans import cut_spans
from lorascope.features.topk import Firings, FiringSample
from lorascope.sites import Site, SiteLayout
from lorascope.texts.roles import ROLES


def firings(pairs):
    """Firings of (latent, row) pairs."""
    latent, row = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
    value = np.ones(len(row), np.float32)
    return Firings(latent, value, row, row, row.astype(np.uint64))


def sampled(pairs, n_latents, n):
    sample = FiringSample(n_latents, n)
    sample.add(firings(pairs))
    sample.flush()
    counts = np.bincount([latent for latent, _ in pairs], minlength=n_latents)
    return sample, counts


@pytest.mark.parametrize("at_once", [1, 1 << 22])
def test_the_jaccard_index_is_exact_if_samples_hold_every_firing(monkeypatch, at_once):
    monkeypatch.setattr(neighbours, "_PAIRS", at_once)
    rng = np.random.default_rng(0)
    fires = rng.random((200, 14)) < 0.2
    fires[:, 3] = fires[:, 5]  # the same tokens
    fires[:, 7] = False
    pairs = [(int(i), int(r)) for r, i in zip(*np.nonzero(fires), strict=True)]
    ids, scores = cofiring(*sampled(pairs, 14, 1000))
    assert (ids[3, 0], scores[3, 0]) == (5, 1.0)
    assert (ids[7] == -1).all()
    for i in range(14):
        shared = (fires[:, [i]] & fires).sum(0)
        either = (fires[:, [i]] | fires).sum(0)
        true = {j: shared[j] / either[j] for j in range(14) if j != i and shared[j]}
        best = sorted(true, key=lambda j: (-np.float32(true[j]), j))[:10]
        assert [j for j in ids[i] if j >= 0] == best
        np.testing.assert_allclose(scores[i][: len(best)], [true[j] for j in best], rtol=1e-6)


def test_the_jaccard_index_estimated_from_samples_has_no_bias():
    rng = np.random.default_rng(1)
    n_rows, errors = 40_000, []
    for seed in range(20):
        both = rng.random(n_rows) < 0.02
        first = both | (rng.random(n_rows) < 0.01)
        second = both | (rng.random(n_rows) < 0.03)
        rows = np.arange(n_rows) + seed * n_rows  # new rows have new hashes
        pairs = [(0, int(r)) for r in rows[first]] + [(1, int(r)) for r in rows[second]]
        ids, scores = cofiring(*sampled(pairs, 2, 128))
        assert ids[0, 0] == 1
        true = (first & second).sum() / (first | second).sum()
        errors.append(scores[0, 0] - true)
    assert abs(np.mean(errors)) < 0.03
    assert np.std(errors) < 0.1


def test_latents_that_never_fire_together_are_not_neighbours():
    pairs = [(i, 1000 * i + r) for i in range(3) for r in range(300)]
    ids, _ = cofiring(*sampled(pairs, 3, 64))
    assert (ids == -1).all()
    assert (cofiring(FiringSample(3, 4), np.zeros(3, np.int64))[0] == -1).all()


def test_the_nearest_rows_are_those_of_a_full_table(monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    rows = torch.randn(40, 9, generator=torch.Generator().manual_seed(0))
    alive = np.ones(40, bool)
    alive[[2, 30]] = False
    ids, scores = nearest_rows(rows, alive)
    unit = torch.nn.functional.normalize(rows, dim=1)
    table = (unit @ unit.T).numpy()
    table[:, ~alive] = -2
    np.fill_diagonal(table, -2)
    for i in np.flatnonzero(alive):
        assert ids[i].tolist() == np.argsort(-table[i])[:10].tolist()
        assert_same_up_to_rounding(scores[i], np.sort(table[i])[::-1][:10], n_terms=9)
    assert (ids[[2, 30]] == -1).all()
    few, _ = nearest_rows(rows[:3], np.array([True, True, False]))
    assert few[:, 0].tolist() == [1, 0, -1]
    assert (few[:, 1:] == -1).all()


def test_a_fingerprint_adds_up_the_ranks_of_a_site_in_effect_units(tmp_path):
    sites = [
        Site(layer=0, projection="gate_proj", rank=2, scale=2.0, b_norms=(1.0, 3.0), module="a"),
        Site(layer=1, projection="up_proj", rank=1, scale=1.0, b_norms=(2.0,), module="b"),
    ]
    layout = SiteLayout.from_sites(sites, "a" * 64)
    sae = make_sae(tmp_path / "sae", layout, d_sae=5)
    rows, units = effect_rows(sae)
    share = fingerprint(rows, layout)
    W = sae.W_dec.numpy()
    wrote = np.stack([(2 * W[:, 0]) ** 2 + (6 * W[:, 1]) ** 2, (2 * W[:, 2]) ** 2], axis=1)
    np.testing.assert_allclose(share, wrote / wrote.sum(1, keepdims=True), atol=1e-3)
    assert units == "effect"
    unknown = SiteLayout.from_sites([Site(layer=i, projection="gate_proj") for i in range(2)])
    assert effect_rows(make_sae(tmp_path / "other", unknown, d_sae=2))[1] == "sae"
    assert (fingerprint(torch.zeros(2, 3), layout) == 0).all()


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scanned")
    roles = np.full(240, ROLES.index("think"), np.uint8)
    roles[5:20] = ROLES.index("user")
    store = write_store(folder / "store", n_rollouts=6, length=40, roles=roles)
    sae = make_sae(folder / "sae", layout_of())
    accumulator = Accumulator.empty(sae.d_sae, len(store.vocabulary), 10, None)
    (span,) = cut_spans(store, 6, sae.d_sae)
    for _ in scan(span, sae, accumulator, 33, collapse=False, reach=5):
        pass
    return store, sae, accumulator


def test_firings_are_counted_by_role_position_and_value(scanned):
    store, sae, accumulator = scanned
    code = dense_code(store, sae)
    fires = code * store.eligible[:, None]
    tenth = np.tile(np.arange(40) // 4, 6)
    for role in range(len(ROLES)):
        np.testing.assert_array_equal(
            accumulator.statistics.by_role[:, role], (code[store.roles == role] > 0).sum(0)
        )
        assert accumulator.n_by_role[role] == (store.roles == role).sum()
    for i in range(10):
        np.testing.assert_array_equal(
            accumulator.statistics.by_position[:, i], (fires[tenth == i] > 0).sum(0)
        )
    edges = histogram_edges(1.0)
    assert edges[:5].tolist() == [1.0, 1.25, 1.5, 1.75, 2.0]
    for latent in range(sae.d_sae):
        values = fires[:, latent][fires[:, latent] > 0]
        bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, N_BINS - 1)
        expected = np.bincount(bins, minlength=N_BINS)
        np.testing.assert_array_equal(accumulator.statistics.histogram[latent], expected)


def test_tokens_are_ranked_by_the_firings_on_them(scanned):
    store, sae, accumulator = scanned
    code = dense_code(store, sae)
    arrays = ranked_tokens(store, accumulator.sample, accumulator.n_by_token)
    first = np.repeat(store.rollout_start[:-1], 40)
    n_checked = 0
    for latent in range(sae.d_sae):
        fired = np.flatnonzero((code[:, latent] > 0) & store.eligible)
        assert 16 <= len(fired) <= accumulator.sample.n, "the sample holds every firing"
        tokens = store.token_ids[fired]
        usual = np.bincount(store.token_ids[store.eligible], minlength=8) / store.eligible.sum()
        here = {t: tokens == t for t in set(tokens.tolist())}
        true = {
            "mean": {t: code[fired[m], latent].mean() for t, m in here.items() if m.sum() > 1},
            "lift": {t: m.mean() / usual[t] for t, m in here.items() if m.sum() > 2},
        }
        for name, by in (("before", -1), ("after", 1)):
            at = fired + by
            inside = (at >= first[fired]) & (at < first[fired] + 40)
            near = store.token_ids[at[inside]]
            true[name] = {t: (near == t).sum() / len(fired) for t in set(near.tolist())}
        for name, scores in true.items():
            best = sorted(scores, key=lambda t: (-np.float32(scores[t]), t))[:8]
            ids = arrays[f"ranked_{name}_id"][latent]
            got = arrays[f"ranked_{name}_score"][latent][: len(best)]
            np.testing.assert_allclose(got, [scores[t] for t in best], rtol=1e-5)
            assert set(ids[ids >= 0].tolist()) == set(best)
            n_checked += len(best)
    assert n_checked > 300
