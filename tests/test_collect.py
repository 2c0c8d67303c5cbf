import json

import numpy as np
import pytest
import torch
from builders.saes import dense_code, make_sae
from builders.stores import layout_of, write_store
from builders.tolerance import assert_same_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.artifact import read_manifest
from lorascope.errors import ArtifactError, ConfigError, DatasetError
from lorascope.features import collect
from lorascope.features.collect import CollectConfig
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import read_published


@pytest.fixture
def made(make_store, tmp_path):
    store = make_store()
    sae = make_sae(tmp_path / "sae")

    def run(**given) -> FeatureIndex:
        out = tmp_path / given.pop("name", "features.h5")
        config = CollectConfig(sae=tmp_path / "sae", data_dir=store.path, output=out, **given)
        return FeatureIndex.open(collect.run(config))

    return store, sae, run


def test_examples_are_the_brute_force_argsort_ties_included(make_store, tmp_path):
    rows = np.random.default_rng(5).integers(-2, 3, (240, 14)).astype(np.float32)
    rows[100:140] = rows[60:100]  # equal rows give equal values
    store = make_store(rows)
    sae = make_sae(tmp_path / "sae", threshold=0.5)
    config = CollectConfig(
        sae=tmp_path / "sae",
        data_dir=store.path,
        output=tmp_path / "f.h5",
        top_k=7,
        max_per_rollout=0,
        same_context="keep",
    )
    index = FeatureIndex.open(collect.run(config))
    index.verify()
    code = dense_code(store, sae)
    code[~store.eligible] = 0
    n_ties = 0
    for latent in range(sae.d_sae):
        order = np.lexsort((np.arange(len(code)), -code[:, latent]))
        best = [row for row in order[:7] if code[row, latent] > 0]
        examples = index[latent].examples
        assert [e.row for e in examples] == best
        assert [e.value for e in examples] == code[best, latent].tolist()
        n_ties += len(best) - len({e.value for e in examples})
    assert n_ties > 20, "the test is about ties"


def test_windows_hold_the_rollouts_tokens_and_the_scanned_values(made):
    store, sae, run = made
    index = run(context_window=4)
    code = dense_code(store, sae)
    for latent in range(0, sae.d_sae, 5):
        for example in index[latent].examples:
            first = example.row - example.target
            window = slice(first, first + len(example.token_ids))
            rollout = example.row // 40
            assert first == max(example.row - 4, rollout * 40)
            assert window.stop == min(example.row + 5, rollout * 40 + 40)
            assert example.rollout == rollout
            assert example.position == example.row - rollout * 40
            np.testing.assert_array_equal(example.token_ids, store.token_ids[window])
            np.testing.assert_array_equal(example.activations, code[window, latent])
            assert example.activations[example.target] == example.value


def test_statistics_are_those_of_the_dense_code_on_eligible_tokens(made):
    store, sae, run = made
    index = run()
    code = dense_code(store, sae)[store.eligible]
    fires = code > 0
    np.testing.assert_array_equal(index.latent_n_active, fires.sum(0))
    np.testing.assert_array_equal(index.latent_max, code.max(0))
    assert_same_up_to_rounding(index.latent_mean, code.sum(0) / fires.sum(0), n_terms=len(code))
    deviation = [code[fires[:, i], i].std() for i in range(sae.d_sae)]
    assert_same_up_to_rounding(index.latent_std, deviation, n_terms=len(code))
    rollout = store.rollout_of(np.flatnonzero(store.eligible))
    in_rollouts = [len(set(rollout[fires[:, i]])) for i in range(sae.d_sae)]
    np.testing.assert_array_equal(index.latent_n_rollouts, in_rollouts)
    assert index.content["n_eligible"] == len(code)
    assert index.content["n_alive"] == (fires.sum(0) > 0).sum()


def test_special_tokens_are_apart_from_text(make_store, tmp_path):
    rows = np.random.default_rng(0).standard_normal((240, 14)).astype(np.float32)
    rows[::40] *= 100  # a beginning-of-text token that is louder than everything
    store = make_store(rows)
    sae = make_sae(tmp_path / "sae")
    out = collect.run(
        CollectConfig(sae=tmp_path / "sae", data_dir=store.path, output=tmp_path / "f.h5")
    )
    index = FeatureIndex.open(out)
    index.verify()
    for name in ("example", "sample"):
        assert store.eligible[getattr(index, f"{name}_row")].all()
    assert not store.eligible[index.special_row].any()
    fires = dense_code(store, sae)[~store.eligible] > 0
    assert index.latent_n_special.tolist() == fires.sum(0).tolist()
    assert index.content["n_special"] == len(fires) == 6
    for latent in np.flatnonzero(fires.any(0)).tolist():
        (best, *_), stats = index[latent].at_special, index.stats(latent)
        assert best.value > max([e.value for e in index[latent].examples], default=0)
        assert best.token_ids[best.target] == 0
        assert stats.n_special == fires[:, latent].sum()
        assert stats.by_role["special"] == fires[:, latent].mean()


def test_a_latent_that_fires_at_special_tokens_alone_is_a_template_feature(make_store, tmp_path):
    rows = np.full((240, 14), -1e3, np.float32)
    rows[::40] = 1e3
    store = make_store(rows)
    make_sae(tmp_path / "sae")
    index = FeatureIndex.open(
        collect.run(
            CollectConfig(sae=tmp_path / "sae", data_dir=store.path, output=tmp_path / "f.h5")
        )
    )
    index.verify()
    (at_both,) = np.unique(index.latent_n_active[index.latent_n_special > 0])
    here = np.flatnonzero(index.latent_n_special).tolist()
    assert at_both == 0
    assert len(here) == index.content["n_template"] > 3
    assert index.content["n_alive"] == len(here) + (index.latent_n_active > 0).sum()
    assert all(index.stats(latent).is_template for latent in here)
    assert (index.near_decoder[here] >= 0).any(axis=1).all()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    make_sae(folder / "sae")
    return write_store(folder / "store").path, folder / "sae"


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(batch_size=st.integers(1, 300))
def test_the_batch_size_changes_no_byte(shared, tmp_path_factory, batch_size):
    folder = tmp_path_factory.mktemp("out")

    def made(size):
        out = folder / f"{size}.h5"
        config = CollectConfig(data_dir=shared[0], sae=shared[1], output=out, batch_size=size)
        return collect.run(config).read_bytes()

    assert made(batch_size) == made(2048)


def test_the_json_says_what_the_arrays_say(made, tmp_path):
    store, _, run = made
    index = run()
    out = tmp_path / "features.json"
    collect.run(CollectConfig(sae=tmp_path / "sae", data_dir=store.path, output=out))
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["metadata"]["n_features"] == 24
    assert data["metadata"]["top_k"] == 10
    example = data["features"]["3"]["examples"][0]
    first = index[3].examples[0]
    assert set(example) >= {
        "activation_value", "rollout_idx", "token_idx", "token", "tokens", "target_position",
        "activations",
    }  # fmt: skip
    assert example["activation_value"] == first.value
    assert (example["rollout_idx"], example["token_idx"]) == (first.rollout, first.position)
    assert example["tokens"] == list(first.tokens)
    assert example["token"] == first.tokens[first.target]
    assert np.float32(example["activations"]).tolist() == list(first.activations)
    assert len(read_published(out)) == 24
    assert read_manifest(out).kind == "features"


def test_max_rollouts_reads_from_the_start(made):
    _, _, run = made
    index = run(max_rollouts=2)
    assert index.content["n_tokens"] == 80
    assert index.example_row.max() < 80


def test_a_store_and_an_sae_of_different_adapters_are_refused(make_store, tmp_path):
    store = make_store()
    make_sae(tmp_path / "other", layout_of(adapter="b" * 64))
    make_sae(tmp_path / "wide", layout_of(3))
    for name, message in (("other", "aaaa"), ("wide", "d_in 21")):
        config = CollectConfig(sae=tmp_path / name, data_dir=store.path, output=tmp_path / "f.h5")
        with pytest.raises(ArtifactError, match=f"{message}.*different adapters"):
            collect.run(config)
    assert not (tmp_path / "f.h5").exists()
    assert not (tmp_path / "f.h5.partial").exists()


def test_an_sae_of_some_projections_reads_a_store_of_all(make_store, tmp_path):
    store = make_store()
    layout, columns = store.layout.select(["gate_proj", "up_proj"])
    sae = make_sae(tmp_path / "sae", layout)
    out = collect.run(
        CollectConfig(sae=tmp_path / "sae", data_dir=store.path, output=tmp_path / "f.h5")
    )
    index = FeatureIndex.open(out)
    assert index.content["adapter_types"] == ["gate_proj", "up_proj"]
    code = sae.encode_dense(torch.from_numpy(np.array(store.rows(0, store.n_rows))[:, columns]))
    assert index.latent_max.tolist() == code[store.eligible].amax(0).tolist()


def test_a_store_without_the_wanted_roles_is_refused(make_store, tmp_path):
    store = make_store(n_special=40)
    make_sae(tmp_path / "sae")
    config = CollectConfig(
        sae=tmp_path / "sae", data_dir=store.path, output=tmp_path / "f.h5", roles=("think", "user")
    )
    with pytest.raises(DatasetError, match="none of its 240 tokens has the role think or user"):
        collect.run(config)


def test_an_output_of_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a .h5 or .json file"):
        CollectConfig(output=tmp_path / "features.csv")


def test_a_dead_sae_gives_an_empty_index(make_store, tmp_path):
    store = make_store()
    make_sae(tmp_path / "sae", threshold=1e9)
    out = collect.run(
        CollectConfig(sae=tmp_path / "sae", data_dir=store.path, output=tmp_path / "f.h5")
    )
    index = FeatureIndex.open(out)
    index.verify()
    assert index.content["n_alive"] == 0
    assert index[0].examples == ()
