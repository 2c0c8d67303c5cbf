"""Exports, and the published JSON: what ours holds, and what others may hold."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.effect_reports import direct
from builders.effect_reports import write as write_report
from builders.indexes import example, index_of, manifest_of, small_index, synthetic

from lorascope.artifact import read_manifest
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.export import ExportConfig, csv_of, run
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import read_published, to_published, write_published


def foreign(**changes: Any) -> dict[str, Any]:
    """A file as other tools write it, with the only example changed."""
    one = {
        "activation_value": 2.0,
        "rollout_idx": 4,
        "token_idx": 10,
        "token": "b",
        "tokens": ["a", "b"],
        "target_position": 1,
        "activations": [0, 2],
    }
    return {"metadata": {"top_k": 1}, "features": {"0": {"examples": [{**one, **changes}]}}}


def without(key: str) -> dict[str, Any]:
    data = foreign()
    del data["features"]["0"]["examples"][0][key]
    return data


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def read(tmp_path: Path, data: Any) -> FeatureIndex:
    return read_published(write(tmp_path / "features.json", data))


def test_the_table_has_the_tokens_of_a_direct_report(tmp_path: Path):
    index = synthetic(150, 3, 4, n_texts=4, n_rollouts=20, n_layers=2)
    index.save(tmp_path / "features.h5")
    report = write_report(tmp_path / "direct.json", "direct", index, direct(index))
    given = {"input": tmp_path / "features.h5", "output": tmp_path / "out.csv"}
    with run(ExportConfig(**given, effects=report)).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, one in zip(rows, direct(index)["features"], strict=True):
        assert row["promoted"] == " | ".join(token["token"] for token in one["promoted"])
        assert row["suppressed"] == " | ".join(token["token"] for token in one["suppressed"])
    write_report(report, "direct", small_index(), direct(index))
    with pytest.raises(ArtifactError, match="another SAE"):
        run(ExportConfig(**given, effects=report))
    report.write_text(report.read_text().replace("0.625", "0.626"))
    with pytest.raises(ArtifactError, match="damaged"):
        run(ExportConfig(**given, effects=report))
    with pytest.raises(ConfigError, match="adds columns"):
        ExportConfig(input=report, output=tmp_path / "out.json", effects=report)


def test_the_json_has_the_published_fields(tmp_path: Path):
    index = small_index()
    write_published(index, tmp_path / "features.json", index.manifest)
    data = json.loads((tmp_path / "features.json").read_text(encoding="utf-8"))
    assert data["metadata"]["n_features"] == 4
    assert data["metadata"]["top_k"] == 3
    assert read_manifest(tmp_path / "features.json") == index.manifest
    assert list(data["features"]) == ["0", "1", "2", "3"]
    assert data["features"]["1"]["examples"] == []
    best = data["features"]["0"]["examples"][0]
    assert best == {
        "activation_value": 2.5,
        "rollout_idx": 7,
        "token_idx": 90,
        "token": "😀",
        "tokens": [" the", "😀", "", "\n"],
        "target_position": 1,
        "activations": [0.0, 2.5, 0.0, 0.0],
        "n_alike": 3,
    }
    stats = data["features"]["0"]["stats"]
    assert (stats["n_examples"], stats["max_activation"], stats["n_active"]) == (3, 2.5, 3)


def test_the_json_carries_its_manifest_where_artifacts_look_for_it(tmp_path: Path):
    index = small_index()
    write_published(index, tmp_path / "features.json", index.manifest)
    assert read_manifest(tmp_path / "features.json") == index.manifest


def test_the_json_comes_in_pieces_and_is_the_same_each_time():
    index = small_index()
    pieces = list(to_published(index, index.manifest))
    assert len(pieces) > len(index)
    assert "".join(pieces) == "".join(to_published(small_index(), small_index().manifest))


def test_what_is_written_is_read_back_to_the_last_bit(tmp_path: Path):
    index = small_index()
    write_published(index, tmp_path / "features.json", index.manifest)
    again = read_published(tmp_path / "features.json")
    again.verify()
    assert again.manifest.content == index.manifest.content
    for name in (
        *("latent_n_active", "latent_max", "latent_mean", "latent_std", "latent_n_rollouts"),
        *("latent_histogram", "latent_histogram_edges", "example_offset", "example_value"),
        *("example_rollout", "example_position", "example_n_alike", "latent_n_special"),
        *("special_offset", "special_value", "special_rollout", "special_position"),
    ):
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name), err_msg=name)
    for before, after in zip(index, again, strict=True):
        for of in ("examples", "at_special"):
            for one, other in zip(getattr(before, of), getattr(after, of), strict=True):
                assert (one.tokens, one.target) == (other.tokens, other.target)
                assert list(one.activations) == list(other.activations)
    specials = [again.token_bytes(int(i)) for i in again.token_id[again.token_special != 0]]
    assert specials == [b"<|im_end|>"]


def test_rows_and_token_ids_of_a_json_are_unknown(tmp_path: Path):
    index = read(tmp_path, foreign())
    assert index.example_row.tolist() == [-1]
    assert (index.token_id < 0).all()


def test_hostile_text_survives_the_round_trip(tmp_path: Path):
    tokens = {1: b"</script>", 2: b"\x00", 3: " \u202e".encode(), 4: b"\xed\xa0\x80"}
    index = index_of([[example(1.0, 9, [1, 2, 3, 4], 0)]], tokens)
    write_published(index, tmp_path / "features.json", index.manifest)
    texts = read_published(tmp_path / "features.json")[0].examples[0].tokens
    assert texts == ("</script>", "\x00", " \u202e", "\ufffd" * 3)


def test_a_manifest_with_a_number_that_json_lacks_is_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        list(to_published(small_index(), manifest_of(4, fvu=float("nan"))))


def test_a_file_of_another_tool_is_read_without_our_additions(tmp_path: Path):
    data = foreign(extra="field")
    data["features"]["5"] = {"examples": [], "more": 1}
    data["metadata"]["model_path"] = "sae.pt"
    index = read(tmp_path, data)
    assert len(index) == 6
    assert index[0].examples[0].tokens == ("a", "b")
    assert index[0].examples[0].activations.tolist() == [0.0, 2.0]
    assert index[0].stats.n_active is None
    assert index.content["top_k"] == 1
    assert index.content["sae_name"] == "sae.pt"
    assert index.manifest.kind == "features"


def test_a_file_without_metadata_and_with_a_byte_order_mark_is_read(tmp_path: Path):
    text = "\ufeff" + json.dumps({"features": foreign()["features"]})
    assert len(read(tmp_path, text)) == 1


def test_examples_of_another_tool_are_sorted_and_keep_their_order_among_equals(tmp_path: Path):
    data = foreign()
    one = data["features"]["0"]["examples"][0]
    values = [(1.0, 1), (3.0, 2), (1.0, 3)]
    data["features"]["0"]["examples"] = [
        {**one, "activation_value": v, "activations": [0, v], "rollout_idx": r} for v, r in values
    ]
    examples = read(tmp_path, data)[0].examples
    assert [(e.value, e.rollout) for e in examples] == [(3.0, 2), (1.0, 1), (1.0, 3)]


def test_half_characters_and_lone_surrogates_of_other_tools_are_shown_as_broken(tmp_path: Path):
    index = read(tmp_path, json.dumps(foreign(tokens=["\ufffd", "\ud83d"])))
    assert index[0].examples[0].tokens == ("\ufffd", "\ufffd")


def test_a_value_that_is_not_its_tokens_activation_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    index = read(tmp_path, foreign(activation_value=3.0))
    assert "in 1 examples activation_value differs" in caplog.text
    assert index[0].examples[0].value == 3.0


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"features": {"0": {"examples": [NaN]}}}', "is not JSON .NaN is not a JSON number"),
        ([], 'no object "features"'),
        ({"metadata": {}}, 'no object "features"'),
        ({"features": []}, 'no object "features"'),
        ({"features": {}, "metadata": 3}, '"metadata" that is not an object'),
        ({"features": {"x": {"examples": []}}}, "names a feature 'x'"),
        ({"features": {"-1": {"examples": []}}}, "names a feature '-1'"),
        ({"features": {"99999999": {"examples": []}}}, "100000000 features"),
        ({"features": {}, "metadata": {"n_features": 10**9}}, "1000000000 features"),
        ({"features": {"0": []}}, "feature 0 has no list of examples"),
        ({"features": {"0": {}}}, "feature 0 has no list of examples"),
        ({"features": {"0": {"examples": {}}}}, "feature 0 has no list of examples"),
        ({"features": {"0": {"examples": [1]}}}, "feature 0, example 0 is not an object"),
        (
            {"features": {"0": {"examples": [], "special_examples": 1}}},
            "feature 0 has special_examples that are not a list",
        ),
        (without("activation_value"), "example 0 has no activation_value"),
        (without("tokens"), "example 0 has no tokens"),
        (without("activations"), "example 0 has no activations"),
        (without("target_position"), "example 0 has no target_position"),
        (foreign(tokens="ab"), "tokens that are not a list of texts"),
        (foreign(tokens=[1, 2]), "tokens that are not a list of texts"),
        (foreign(activations=[1]), "2 tokens and 1 activations"),
        (foreign(activations=None), "2 tokens and no activations"),
        (foreign(activations=[0, "2"]), "activation '2', which is not a number"),
        (foreign(activations=[0, True]), "which is not a number"),
        (foreign(target_position=2), "target_position 2 among 2 tokens"),
        (foreign(target_position=-1), "target_position -1"),
        (foreign(target_position=1.0), "target_position 1.0"),
        (foreign(activation_value=None), "which is not a number"),
        (foreign(activation_value=1e60), "beyond float32"),
        (foreign(activation_value=10**400), "beyond float32"),
        (foreign(rollout_idx="x"), "rollout_idx 'x', which is not an index"),
    ],
)
def test_a_json_that_is_no_features_file_is_refused_in_one_line(
    tmp_path: Path, data: Any, complaint: str
):
    with pytest.raises(ArtifactError, match=complaint) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)
    assert "features.json" in str(caught.value)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="cannot read"):
        read_published(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="is not JSON"):
        read_published(tmp_path / "binary.json")


def exported(source: Path, out: Path, **given: Any) -> Path:
    return run(ExportConfig(input=source, output=out, **given))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A features.h5."""
    small_index().save(tmp_path / "features.h5")
    return tmp_path / "features.h5"


def test_the_exported_json_is_the_one_that_collect_would_write(tmp_path: Path, source: Path):
    index = small_index()
    write_published(index, tmp_path / "collected.json", index.manifest)
    out = exported(source, tmp_path / "exported.json")
    assert out.read_bytes() == (tmp_path / "collected.json").read_bytes()
    before = out.stat().st_mtime_ns
    assert exported(source, out).stat().st_mtime_ns == before, "made once"


def test_the_published_names_are_in_the_exported_json_and_dashboard_takes_it(
    tmp_path: Path, source: Path
):
    from lorascope.dashboard import render

    out = exported(source, tmp_path / "features.json")
    data = json.loads(out.read_text(encoding="utf-8"))
    assert {"metadata", "features"} <= data.keys()
    assert {"n_features", "top_k"} <= data["metadata"].keys()
    for record in data["features"].values():
        assert {"examples", "stats"} <= record.keys()
        assert {"n_examples", "max_activation"} <= record["stats"].keys()
        for one in record["examples"]:
            assert one["token"] == one["tokens"][one["target_position"]]
            assert one["activation_value"] == one["activations"][one["target_position"]]
            assert {"rollout_idx", "token_idx"} <= one.keys()
    page = render.run(render.DashboardConfig(input=out, output=tmp_path / "page.html"))
    assert page.stat().st_size > 10_000


def test_json_of_another_tool_is_exported_with_its_digest_as_parent(tmp_path: Path):
    first = write(tmp_path / "a.json", foreign())
    second = write(tmp_path / "b.json", foreign(activation_value=3.0, activations=[0, 3]))
    out = exported(first, tmp_path / "out.json")
    with pytest.raises(ArtifactError, match="another features"):
        exported(second, out)
    assert read_published(exported(second, out, overwrite=True))[0].stats.n_examples == 1


def test_the_csv_has_a_line_for_each_feature_and_empty_cells_for_the_unknown(
    tmp_path: Path, source: Path
):
    out = exported(source, tmp_path / "features.csv")
    with out.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["feature"] for line in lines] == ["0", "1", "2", "3"]
    assert [float(line["n_active"]) for line in lines] == [3, 0, 1, 2]
    assert [float(line["max"]) for line in lines] == [2.5, 0, 0.5, 1]
    assert [line["stability"] for line in lines] == ["0.5", "", "1.0", "0.0"]
    assert float(lines[0]["density_think"]) == 0.1
    assert lines[0]["tokens_mean"] == "é"


def test_the_same_index_gives_the_same_csv_and_another_file_is_not_replaced(
    tmp_path: Path, source: Path
):
    out = exported(source, tmp_path / "features.csv")
    before = out.read_bytes()
    assert exported(source, out).read_bytes() == before
    out.write_text("mine\n")
    with pytest.raises(ArtifactError, match="other contents"):
        exported(source, out)
    assert out.read_text() == "mine\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.csv", "features.h5"]
    assert exported(source, out, overwrite=True).read_bytes() == before


def test_hostile_tokens_stay_in_their_cells_and_are_no_formulas(tmp_path: Path):
    hostile = [b'=HYPERLINK("x")', b"\n@SUM(1)", b'a",\r\n9', "\u202e,é".encode()]
    index = index_of(
        [[example(1.0, 9, [at], 0)] for at in range(1, 5)],
        dict(enumerate(hostile, 1)),
        latents={"ranked_mean_id": [[1], [2], [3], [4]], "ranked_mean_score": [[1.0]] * 4},
    )
    lines = list(csv.DictReader(io.StringIO(csv_of(index).decode(), newline="")))
    found = [line["tokens_mean"] for line in lines]
    assert found == ['\'=HYPERLINK("x")', "'\n@SUM(1)", 'a",\r\n9', "\u202e,é"]
    assert not any(None in line for line in lines)


def test_an_output_of_no_known_format_is_refused(tmp_path: Path, source: Path):
    with pytest.raises(ConfigError, match=r"expected a \.json or \.csv file"):
        exported(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_what_is_no_index_is_refused_and_nothing_is_left_behind(tmp_path: Path, kind: str):
    (tmp_path / "features.h5").write_bytes(b"no HDF5")
    out = tmp_path / f"out.{kind}"
    with pytest.raises(ArtifactError, match="features"):
        exported(tmp_path / "features.h5", out)
    with pytest.raises(ArtifactError, match="is a folder"):
        exported(tmp_path, out)
    assert [p.name for p in tmp_path.iterdir()] == ["features.h5"]
