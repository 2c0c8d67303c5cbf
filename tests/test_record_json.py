"""The JSON schemas of files: what a validator accepts is what lorascope writes and reads."""

import json
from dataclasses import dataclass
from typing import Literal

import pytest
from builders.effect_reports import MAKERS, evaluation, write
from builders.indexes import full_index
from builders.labels import label_of
from builders.schemas import faults, require_schema
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from test_study import GOOD, Whole

from lorascope.artifact import Identity
from lorascope.causal.report_records import AblationReport
from lorascope.causal.study import read_report
from lorascope.dashboard.report import ReportConfig, run
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.label_file import write_labels
from lorascope.features.published_json import write_published
from lorascope.inspection import KINDS, report_schema
from lorascope.record_json import from_json, json_schema

WHOLE = Draft202012Validator(json_schema(Whole))


def is_read(data: object) -> bool:
    try:
        from_json(Whole, data, "file")
    except ArtifactError:
        return False
    return True


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.just(0.5), st.just(1e31), st.text(max_size=2)
)
VALUES |= st.lists(VALUES, max_size=3) | st.dictionaries(
    st.sampled_from("kl edges".split()), VALUES
)


@given(st.sampled_from(["kind", "parts", "pairs", "any", "note", "other"]), VALUES, st.booleans())
def test_a_schema_accepts_what_is_read_and_nothing_else(key, value, is_dropped):
    data = json.loads(json.dumps(GOOD))
    data[key] = value
    if is_dropped:
        del data[key]
    assert WHOLE.is_valid(data) == is_read(data)


@given(st.sampled_from(["kl", "edges", "more"]), VALUES)
def test_a_schema_accepts_in_a_record_inside_what_is_read_there(key, value):
    data = json.loads(json.dumps(GOOD))
    data["parts"]["x"][key] = value
    assert WHOLE.is_valid(data) == is_read(data)


def test_a_schema_names_every_field_and_explains_the_record():
    schema = report_schema("ablation")
    assert schema["required"][0] == "metadata"
    assert "greedy" in schema["properties"] and "greedy" not in schema["required"]
    removal = schema["$defs"]["FeatureRemoval"]
    assert removal["properties"]["kl"] == {"type": "number", "minimum": 0, "maximum": 1e30}
    assert "A feature that was not removed has the estimate" in removal["description"]
    cause = report_schema("attribution")["$defs"]["Cause"]
    titles = [one["title"] for one in cause["prefixItems"]]
    assert titles == ["feature", "contribution", "source", "removal"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_schema_that_is_one(kind):
    Draft202012Validator.check_schema(report_schema(kind))
    assert faults(kind, {}) != []


def test_no_other_kind_has_one():
    with pytest.raises(ConfigError, match="no file has the kind ablate; did you mean ablation"):
        report_schema("ablate")


def test_a_value_of_several_types_is_read_as_the_first_that_it_fits():
    row = {"lr": "auto"}

    @dataclass(frozen=True)
    class Row:
        lr: Literal["auto"] | float | None

    assert from_json(Row, row, "file").lr == "auto"
    assert from_json(Row, {"lr": 0.5}, "file").lr == 0.5
    assert from_json(Row, {"lr": None}, "file").lr is None
    with pytest.raises(ArtifactError, match='lr is "own", expected a number'):
        from_json(Row, {"lr": "own"}, "file")
    schema = Draft202012Validator(json_schema(Row))
    assert [schema.is_valid({"lr": lr}) for lr in ("auto", 1, None, "own")] == [True] * 3 + [False]


def test_a_list_of_records_has_a_schema_too():
    schema = Draft202012Validator(json_schema(tuple[Whole, ...]))
    assert schema.is_valid([GOOD, GOOD]) and schema.is_valid([])
    assert not schema.is_valid(GOOD) and not schema.is_valid([{}])


def test_labels_and_features_as_they_are_written_fit_and_changed_ones_do_not(tmp_path):
    index = full_index()
    write_published(index, tmp_path / "features.json", index.manifest)
    require_schema(tmp_path / "features.json", "features")
    data = json.loads((tmp_path / "features.json").read_text(encoding="utf-8"))
    assert any(one["special_examples"] for one in data["features"].values() if len(one) > 2)
    fired = next(one for one in data["features"].values() if one["examples"])
    fired["examples"][0]["tokens"] = "text"
    assert faults("features", data) == ["'text' is not of type 'array'"]
    manifest = Identity(kind="labels", schema=2, settings={}, parents={}).manifest(None, {})
    write_labels(tmp_path / "labels.json", {3: label_of("a token")}, manifest)
    require_schema(tmp_path / "labels.json", "labels")
    data = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))
    data["features"]["3"]["kind"] = "guess"
    assert len(faults("labels", data)) == 1
    data["metadata"]["lorascope"]["kind"] = "features"
    assert len(faults("labels", data)) == 2


def test_every_manifest_fits_and_a_damaged_one_does_not(make_store):
    file = make_store().path / "manifest.json"
    require_schema(file, "manifest")
    data = json.loads(file.read_text(encoding="utf-8"))
    assert faults("manifest", {**data, "seal": "none"}) != []
    del data["parents"]
    assert faults("manifest", data) == ["'parents' is a required property"]


@pytest.mark.slow
def test_reports_of_the_page_fit_and_a_changed_one_does_not(tmp_path):
    index = full_index()
    made = {kind: make(index) for kind, make in MAKERS.items()} | {"evaluation": evaluation()}
    for kind, report in made.items():
        path = write(tmp_path / f"{kind}.json", kind, index, report)
        require_schema(path, kind)
        data = json.loads(path.read_text(encoding="utf-8"))
        assert faults(kind, {**data, "other": 1}) != []
        data["metadata"]["lorascope"]["schema"] = 99
        assert faults(kind, data) == [f"99 is greater than the maximum of {schema_of(kind)}"]


def schema_of(kind: str) -> int:
    return report_schema(kind)["properties"]["metadata"]["properties"]["lorascope"]["properties"][
        "schema"
    ]["maximum"]


def test_an_older_report_that_is_read_fits_too(tmp_path):
    index = full_index()
    report = MAKERS["ablation"](index)
    for removal in report["features"]:
        removal.pop("spread", None)
    path = write(tmp_path / "ablation.json", "ablation", index, report, schema=3)
    read_report(path, (AblationReport,))
    require_schema(path, "ablation")


def test_the_overview_fits(tmp_path):
    index = full_index()
    index.save(tmp_path / "features.h5")
    write(tmp_path / "evaluation.json", "evaluation", index, evaluation())
    require_schema(run(ReportConfig(input=tmp_path)), "overview")
