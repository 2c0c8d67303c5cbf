"""The file of a report, and the records in it: whole, or refused in one line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import pytest

from lorascope.artifact import Manifest, sealed_json
from lorascope.causal.study import open_report
from lorascope.errors import ArtifactError
from lorascope.record_json import Range, from_json, to_json


def test_a_changed_report_and_another_file_are_refused(tmp_path):
    report = {"faithfulness": {"kl": 0.25}}
    manifest = Manifest(
        kind="evaluation", schema=1, settings={}, parents={}, layout=None, content={"sae_name": "s"}
    )
    path = tmp_path / "report.json"
    path.write_text(sealed_json(manifest, report))
    assert open_report(path)["faithfulness"] == {"kl": 0.25}
    path.write_text(path.read_text().replace("0.25", "0.26"))
    with pytest.raises(ArtifactError):
        open_report(path)
    path.write_text(json.dumps(report))
    with pytest.raises(ArtifactError):
        open_report(path)


class Pair(NamedTuple):
    index: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Part:
    kl: Annotated[float, Range(0)]
    edges: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Whole:
    kind: Literal["a", "b"]
    parts: Mapping[str, Part]
    pairs: tuple[Pair, ...]
    any: Any
    note: str | None = None


GOOD = {
    "kind": "a",
    "parts": {"x": {"kl": 0, "edges": [1.0, 2.5]}, "y": {"kl": 1e-12, "edges": None}},
    "pairs": [[1, 2.0], [3, -4.5]],
    "any": {"free": [1]},
}


def test_a_record_comes_back_from_json_and_leaves_out_defaults():
    record = from_json(Whole, GOOD, "file")
    assert record.parts["x"] == Part(kl=0, edges=(1.0, 2.5))
    assert record.pairs[1].value == -4.5 and record.note is None
    assert json.dumps(to_json(record)) == json.dumps(GOOD)
    noted = {**GOOD, "note": "n"}
    assert to_json(from_json(Whole, noted, "file")) == noted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(kind="c"), 'file: kind is "c", expected one of a, b'),
        (lambda d: d.pop("pairs"), "file: the report lacks pairs"),
        (lambda d: d["parts"]["x"].update(ü=1), "file: parts.x has the unknown key ü"),
        (lambda d: d["parts"].update({"a\nb": 1}), r"file: parts.'a\nb' is 1, expected an object"),
        (
            lambda d: d["parts"]["x"].update(kl=-1),
            "parts.x.kl is -1, expected a number of 0 or more",
        ),
        (lambda d: d["parts"]["x"].update(kl=float("nan")), "parts.x.kl is NaN, expected a number"),
        (lambda d: d["parts"]["x"].update(kl=False), "parts.x.kl is false, expected a number"),
        (lambda d: d["parts"]["x"].update(edges=[1, 1e31]), "parts.x.edges[1] is 1e+31, expected"),
        (lambda d: d["parts"]["x"].update(edges=[1]), "parts.x.edges is [1], expected a list of 2"),
        (lambda d: d["pairs"].append([1.0, 2]), "pairs[2][0] is 1.0, expected a whole number"),
        (lambda d: d.update(note=["n" * 99]), "note is"),
    ],
)
def test_a_value_that_does_not_fit_its_type_is_named_with_its_path_in_one_line(change, message):
    data = json.loads(json.dumps(GOOD))
    change(data)
    with pytest.raises(ArtifactError) as caught:
        from_json(Whole, data, "file")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
