"""features.h5: what goes in comes out, is mapped, and is checked."""

import mmap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from builders.indexes import TOKENS, example, index_of, manifest_of, small_index

from lorascope.artifact import read_manifest
from lorascope.errors import ArtifactError
from lorascope.features.arrays import FIELDS
from lorascope.features.index import FeatureIndex
from lorascope.sites import Site, SiteLayout

ARRAYS = list(FIELDS)


def test_what_is_saved_is_what_is_opened(tmp_path: Path):
    index = small_index()
    index.save(tmp_path / "features.h5")
    opened = FeatureIndex.open(tmp_path / "features.h5")
    for name in ARRAYS:
        before, after = getattr(index, name), getattr(opened, name)
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, before)
    assert opened.manifest.content == index.manifest.content
    assert read_manifest(tmp_path / "features.h5") == opened.manifest
    opened.verify()


def test_an_opened_index_is_a_read_only_map_of_the_file(tmp_path: Path):
    small_index().save(tmp_path / "features.h5")
    opened = FeatureIndex.open(tmp_path / "features.h5")
    base: Any = opened.window_activation
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    with pytest.raises(ValueError, match="read-only"):
        opened.window_activation[0] = 1


@pytest.mark.slow
def test_the_same_content_gives_the_same_bytes(tmp_path: Path):
    small_index().save(tmp_path / "a.h5")
    time.sleep(1.1)  # HDF5 may store times, in seconds
    small_index().save(tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_a_manifest_longer_than_an_hdf5_attribute_may_be_is_kept(tmp_path: Path):
    layout = SiteLayout(
        tuple(Site(layer=i, projection="up_proj", rank=1, module="x" * 100) for i in range(2000))
    )
    manifest = replace(manifest_of(4), layout=layout)
    replace(small_index(), manifest=manifest).save(tmp_path / "features.h5")
    assert FeatureIndex.open(tmp_path / "features.h5").manifest.layout == manifest.layout


def test_an_index_without_a_single_latent_or_example_is_kept(tmp_path: Path):
    for features in ([], [[], []]):
        index_of(features, {}).save(tmp_path / "features.h5")
        opened = FeatureIndex.open(tmp_path / "features.h5")
        opened.verify()
        assert [len(feature.examples) for feature in opened] == [0] * len(features)


def test_a_feature_has_its_statistics_and_its_examples_from_the_strongest_down():
    feature = small_index()[0]
    assert feature.latent == 0
    assert [e.value for e in feature.examples] == [2.5, 1.25, 0.30000001192092896]
    assert feature.stats.n_active == 3
    assert feature.stats.density == 3 / 1000
    assert feature.stats.max == 2.5
    best = feature.examples[0]
    assert (best.row, best.rollout, best.position, best.target) == (90, 7, 90, 1)
    assert list(best.token_ids) == [1, 3, 4, 5]
    assert list(best.activations) == [0.0, 2.5, 0.0, 0.0]
    assert best.tokens == (" the", "😀", "", "\n")


def test_equal_values_come_in_the_order_of_their_rows():
    assert [e.row for e in small_index()[3].examples] == [30, 31]


def test_there_is_no_latent_outside_the_index():
    index = small_index()
    assert len(index) == 4
    for latent in (-1, 4):
        with pytest.raises(IndexError, match="0 to 3"):
            index[latent]


def test_unknown_statistics_are_none_and_not_zero():
    index = FeatureIndex.from_examples(manifest_of(1), [[example(1.0, 5, [1], 0)]], TOKENS)
    index.verify()
    stats = index[0].stats
    assert (stats.n_active, stats.density, stats.max, stats.mean, stats.n_rollouts) == (None,) * 5
    assert stats.n_examples == 1


def changed(name: str, at: Any, value: Any) -> Callable[[FeatureIndex], FeatureIndex]:
    def change(index: FeatureIndex) -> FeatureIndex:
        array = getattr(index, name).copy()
        array[at] = value
        return replace(index, arrays={**index.arrays, name: array})

    return change


def shortened(name: str) -> Callable[[FeatureIndex], FeatureIndex]:
    return lambda index: replace(index, arrays={**index.arrays, name: getattr(index, name)[:-1]})


DECIDING = {
    "latent_n_active": "latent/n_special",
    "example_value": "example/row",
    "sample_value": "sample/row",
    "special_value": "special/row",
    "window_offset": "window/target",
    "window_token_id": "window/activation",
    "text_rollout": "text/why",
    "text_token_id": "text/role",
    "text_latent": "text/value",
    "token_id": "token/offset",
}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        *[
            (shortened(name), "expected")
            for name in ARRAYS
            # These decide what size the others must have.
            if name not in (*DECIDING, "token_data", "latent_histogram_edges")
        ],
        (shortened("token_data"), "token/offset does not rise"),
        (shortened("latent_histogram_edges"), "latent/histogram_edges has 3 entries"),
        *[(shortened(name), f"{follower} has shape") for name, follower in DECIDING.items()],
        (changed("example_offset", 0, 1), "example/offset does not rise"),
        (changed("example_offset", 1, 5), "example/offset does not rise"),
        (changed("window_offset", 1, 99), "window/offset does not rise"),
        (changed("example_value", 0, np.nan), "example/value is not finite"),
        (changed("example_value", 1, 2.75), "example/value is not in descending order"),
        (changed("example_row", 4, 31), "example/row is not ascending"),
        (changed("latent_max", 0, 1.0), "latent/max is below"),
        (changed("latent_n_active", 0, 2), "more examples than firings"),
        (changed("latent_histogram", (0, 0), 9), "latent/histogram does not add up"),
        (changed("latent_histogram_edges", 1, 5.0), "latent/histogram_edges do not rise"),
        (changed("window_target", 0, -1), "window/target is outside"),
        (changed("window_target", 0, 4), "window/target is outside"),
        (changed("example_position", 1, 0), "window begins before its rollout"),
        (changed("window_activation", 1, 2.25), "not the example's value"),
        (changed("window_activation", 0, np.inf), "window/activation is not finite"),
        (changed("token_id", 0, 2), "token/id is not in ascending order"),
        (changed("window_token_id", 0, 77), "window/token_id is missing"),
        (changed("sample_offset", 0, 1), "sample/offset does not rise"),
        (changed("special_offset", 0, 1), "special/offset does not rise"),
        (changed("special_value", 1, 1.0), "special/value is not in descending order"),
        (changed("special_value", 0, 0.5), "not the example's value"),
        (changed("latent_n_special", 3, 1), "more specials than firings"),
        (changed("latent_n_special", 3, 4), "latent/by_role does not add up"),
        (changed("sample_quantile", 0, 5), "sample/quantile is not between"),
        (changed("sample_quantile", slice(None), [0, 4]), "sample/quantile is not in descending"),
        (changed("sample_value", 0, 99), "latent/max is below a sample's value"),
        (changed("sample_value", 0, 2), "not the example's value"),
        (changed("latent_by_role", (0, 0), 9), "latent/by_role does not add up"),
        (changed("latent_by_position", (0, 0), 9), "latent/by_position does not add up"),
        (changed("latent_fingerprint", (0, 0), 0.5), "latent/fingerprint does not add up"),
        (changed("near_decoder", (0, 0), 4), "near names a latent that does not exist"),
        (changed("near_cofiring", (0, 0), 0), "near names the latent itself"),
        (changed("near_cosine", (0, 0), 0.125), "near is not in descending order"),
        (changed("ranked_lift_id", (0, 0), 77), "ranked/lift_id is missing"),
        (changed("text_token_id", 0, 77), "text/token_id is missing"),
        (changed("text_latent", 0, 4), "text/latent names a latent that"),
        (changed("text_latent", 0, 3), "text/latent does not rise"),
        (changed("text_value", 0, 0), "text/value is not positive"),
        (changed("text_code_offset", 1, 4), "text/code_offset does not rise"),
        (
            lambda index: replace(index, manifest=manifest_of(4, top_k=2)),
            "more than top_k = 2 examples",
        ),
    ],
)
def test_verify_names_the_broken_promise(
    change: Callable[[FeatureIndex], FeatureIndex], broken: str
):
    small_index().verify()
    with pytest.raises(ArtifactError, match=broken):
        change(small_index()).verify()


def test_one_flipped_byte_in_the_file_is_found(tmp_path: Path):
    path = tmp_path / "features.h5"
    small_index().save(path)
    with h5py.File(path) as file:
        place = file["latent/mean"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="latent/mean has other bytes"):
        FeatureIndex.open(path).verify()


def test_a_file_that_is_no_feature_index_is_refused(tmp_path: Path):
    path = tmp_path / "features.h5"
    with pytest.raises(ArtifactError, match="does not exist"):
        FeatureIndex.open(path)
    path.write_text("no HDF5")
    with pytest.raises(ArtifactError, match="expected features"):
        FeatureIndex.open(path)
    small_index().save(path)
    path.write_bytes(path.read_bytes().replace(b"window/token_id", b"window/token_no", 1))
    with pytest.raises(ArtifactError, match="no array window/token_id"):
        FeatureIndex.open(path)


def test_a_feature_has_what_the_arrays_say_of_it():
    feature = small_index()[0]
    assert [s.quantile for s in feature.samples] == [4, 0]
    assert feature.samples[0].tokens == (" the", "é")
    assert feature.samples[0].activations[feature.samples[0].target] == 2.25
    assert [e.n_alike for e in feature.examples] == [3, -1, -1]
    assert feature.similar == ((3, 0.5), (2, 0.25))
    assert feature.cofiring == ((3, 0.5),)
    assert feature.tokens["lift"] == (("é", 0.5),)
    assert feature.stats.by_role == {"think": 0.1, "answer": 0.0, "special": 0.2}
    assert [e.tokens for e in feature.at_special] == [("\ufffd" * 2, "<|im_end|>")]
    assert [e.value for e in small_index()[3].at_special] == [1.75, 1.5]
    assert [f.stats.n_special for f in small_index()] == [1, 0, 0, 5]
    assert [f.stats.is_template for f in small_index()] == [False, False, False, True]
    assert feature.stats.by_position == (0.5, 0.0)
    assert feature.stats.stability == 0.5
    dead = small_index()[1]
    assert (dead.similar, dead.cofiring, dead.tokens["mean"], dead.samples) == ((), (), (), ())


def test_text_is_found_in_any_case_and_where_it_fires_strongest_comes_first():
    index = small_index()
    assert index.search("THE") == [0, 3]
    assert index.search(" the😀") == [0]  # over tokens that each hold half a character
    assert index.search("<|im_end|>") == [3, 0]  # at special tokens as well
    assert index.search("no such text") == []
    assert index.search("") == [0, 1, 2, 3]
    assert index.search("\n the") == []  # from one window to the next


def test_the_table_has_a_line_for_every_latent():
    table = small_index().table()
    assert table.index.tolist() == [0, 1, 2, 3]
    assert table["n_active"].tolist() == [3, 0, 1, 2]
    assert table["n_special"].tolist() == [1, 0, 0, 5]
    assert table["density"][0] == 0.003
    assert table["density_think"].tolist() == [0.1, 0.0, 0.1, 0.2]
    assert "density_answer" not in table  # no token has this role
    assert table["tokens_mean"].tolist() == ["é", "", "é", "é"]


def test_an_index_of_an_older_schema_is_answered_with_what_to_do(tmp_path: Path):
    old = replace(manifest_of(4), schema=3)
    replace(small_index(), manifest=old).save(tmp_path / "features.h5")
    with pytest.raises(
        ArtifactError, match="schema 3 of features, this version reads 4: .*make it again"
    ):
        FeatureIndex.open(tmp_path / "features.h5")
