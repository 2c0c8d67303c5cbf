"""Batches for Neuronpedia: the names that its importers read, and values that are ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.indexes import example, index_of, small_index

from lorascope.artifact import read_manifest
from lorascope.cli import verify
from lorascope.errors import ArtifactError
from lorascope.features.export import ExportConfig, run
from lorascope.features.index import FeatureIndex

# What the importers read of every feature and of every window, by name.
LISTS = {
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
    *("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "decoder_weights_dist", "vector"),
    *("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "activations"),
}
OTHERS = {"feature_index", "frac_nonzero", "n_prompts_total", "n_tokens_in_prompt", "dataset"}
WINDOW = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


def exported(tmp_path: Path, index: FeatureIndex, **given: Any) -> Path:
    index.save(tmp_path / "features.h5")
    config = ExportConfig(
        input=tmp_path / "features.h5", format="neuronpedia", output=tmp_path / "np", **given
    )
    return run(config)


def batch(folder: Path, number: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"batch-{number}.json").read_text(encoding="utf-8"))


def test_a_batch_has_every_name_that_importers_read(tmp_path: Path):
    data = batch(exported(tmp_path, small_index()))
    assert data.keys() == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    for feature in data["features"]:
        assert feature.keys() == LISTS | OTHERS
        assert all(isinstance(feature[name], list) for name in LISTS)
        bars = ("freq_hist_data_bar_values", "freq_hist_data_bar_heights")
        assert len({len(feature[name]) for name in bars}) == 1
        for window in feature["activations"]:
            assert window.keys() == WINDOW
            assert len(window["tokens"]) == len(window["values"])
            assert 0 <= window["qualifying_token_index"] < len(window["tokens"])


def test_examples_come_first_and_samples_in_the_bins_of_their_fifth(tmp_path: Path):
    feature = batch(exported(tmp_path, small_index()))["features"][0]
    assert feature["feature_index"] == 0
    assert feature["frac_nonzero"] == 3 / 1000
    first = feature["activations"][0]
    assert first["tokens"] == [" the", "😀", "", "\n"]
    assert (first["values"], first["qualifying_token_index"]) == ([0, 2.5, 0, 0], 1)
    bins = [(a["bin_min"], a["bin_max"], a["bin_contains"]) for a in feature["activations"]]
    assert bins == [(-1, 2.5, -1)] * 3 + [(2.25, 2.25, 0.0006), (0.25, 0.25, 0.0006)]
    at_target = [a["values"][a["qualifying_token_index"]] for a in feature["activations"]]
    assert at_target == [2.5, 1.25, 0.3, 2.25, 0.25]


def test_features_without_examples_are_named_as_skipped(tmp_path: Path):
    folder = exported(tmp_path, small_index())
    assert [feature["feature_index"] for feature in batch(folder)["features"]] == [0, 2, 3]
    skipped = json.loads((folder / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == [1]
    assert skipped.keys() == {"model_id", "layer", "sae_set", "skipped_indexes"}


def test_batches_hold_128_features_and_no_more(tmp_path: Path):
    features = [[example(1.0 + i, i, [1, 2], 1)] for i in range(300)]
    folder = exported(tmp_path, index_of(features))
    ids = [[f["feature_index"] for f in batch(folder, n)["features"]] for n in range(3)]
    assert [len(part) for part in ids] == [128, 128, 44]
    assert [i for part in ids for i in part] == list(range(300))


def test_an_index_without_anything_gives_no_batch(tmp_path: Path):
    folder = exported(tmp_path, index_of([[], []]))
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["manifest.json", "skipped_indexes.json"]


def test_models_and_data_are_named_without_their_paths(tmp_path: Path):
    index = index_of(
        [[example(1.0, 1, [1], 0)]],
        base_model="/home/me/models/Qwen2.5-7B/",
        dataset="owner/texts",
        sae_name="sae_all.pt",
        n_rollouts=4,
        n_tokens=1002,
    )
    data = batch(exported(tmp_path, index))
    assert (data["model_id"], data["sae_set"], data["layer"]) == ("Qwen2.5-7B", "sae_all", 0)
    feature = data["features"][0]
    assert (feature["dataset"], feature["n_prompts_total"]) == ("texts", 4)
    assert feature["n_tokens_in_prompt"] == 250


def test_hostile_tokens_arrive_as_text(tmp_path: Path):
    tokens = {1: b"</script>", 2: b"\x00", 3: " \u202e".encode(), 4: b"\xed\xa0\x80"}
    folder = exported(tmp_path, index_of([[example(1.0, 9, [1, 2, 3, 4], 0)]], tokens))
    window = batch(folder)["features"][0]["activations"][0]
    assert window["tokens"] == ["</script>", "\x00", " \u202e", "\ufffd" * 3]


def test_the_same_index_gives_the_same_bytes_and_is_made_once(tmp_path: Path):
    folder = exported(tmp_path, small_index())
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    made_at = (folder / "batch-0.json").stat().st_mtime_ns
    assert exported(tmp_path, small_index()) == folder
    assert (folder / "batch-0.json").stat().st_mtime_ns == made_at
    exported(tmp_path, small_index(), overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_of_other_files_or_of_another_index_is_kept(tmp_path: Path):
    (tmp_path / "np").mkdir()
    (tmp_path / "np" / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="never replaced"):
        exported(tmp_path, small_index(), overwrite=True)
    assert (tmp_path / "np" / "mine.txt").read_text() == "mine"
    (tmp_path / "np" / "mine.txt").unlink()
    exported(tmp_path, small_index())
    with pytest.raises(ArtifactError, match="another features"):
        exported(tmp_path, index_of([[]]))


def test_verify_names_a_changed_a_missing_and_a_strange_batch(tmp_path: Path):
    folder = exported(tmp_path, index_of([[example(1.0, i, [1], 0)] for i in range(200)]))
    manifest = read_manifest(folder)
    assert manifest is not None and manifest["kind"] == "neuronpedia"
    assert verify(folder) == []
    (folder / "batch-0.json").write_text("{}")
    (folder / "batch-1.json").rename(folder / "batch-7.json")
    assert [line.split()[0] for line in verify(folder)] == [
        "batch-0.json",
        "batch-1.json",
        "batch-7.json",
    ]


def test_what_json_of_another_tool_does_not_say_is_zero_or_empty(tmp_path: Path):
    one = {"activation_value": 2.0, "tokens": ["a", "b"], "activations": [0, 2]}
    data = {"features": {"3": {"examples": [{**one, "target_position": 1}]}}}
    (tmp_path / "features.json").write_text(json.dumps(data))
    folder = run(
        ExportConfig(input=tmp_path / "features.json", format="neuronpedia", output=tmp_path / "np")
    )
    feature = batch(folder)["features"][0]
    assert feature["feature_index"] == 3
    assert feature["frac_nonzero"] == 0
    assert feature["freq_hist_data_bar_heights"] == []
    assert np.isclose(feature["activations"][0]["bin_max"], 2)
