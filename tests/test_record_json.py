"""The JSON schemas of reports: what a validator accepts is what lorascope reads."""

import json

import pytest
from builders.effect_reports import MAKERS, evaluation, write
from builders.indexes import full_index
from builders.schemas import faults, require_schema
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from test_study import GOOD, Whole

from lorascope.causal.report_records import AblationReport
from lorascope.causal.study import read_report
from lorascope.dashboard.report import ReportConfig, run
from lorascope.errors import ArtifactError, ConfigError
from lorascope.inspection import REPORT_KINDS, report_schema
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


@pytest.mark.parametrize("kind", REPORT_KINDS)
def test_every_kind_has_a_schema_that_is_one(kind):
    Draft202012Validator.check_schema(report_schema(kind))
    assert faults(kind, {}) != []


def test_no_other_kind_has_one():
    with pytest.raises(ConfigError, match="no report has the kind ablate; did you mean ablation"):
        report_schema("ablate")


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
