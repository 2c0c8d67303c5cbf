"""`labels.json`: what is in it is what was written, and the index next to it reads it."""

import json
import logging

import pytest
from builders.indexes import full_index
from builders.labels import label_of, save_labels

from lorascope.artifact import sealed
from lorascope.errors import ArtifactError
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import Output, RulePart, read_labels
from lorascope.inspection import describe, verify


@pytest.fixture
def index(tmp_path):
    full_index().save(tmp_path / "features.h5")
    return tmp_path / "features.h5"


PROMOTED = Output(tokens=("a",), share=0.5, balanced_accuracy=0.75, interval=(0.7, 0.8))
LABELS = {
    0: label_of(
        "</script>",
        clarity=-0.5,
        clarity_interval=(-0.75, 0.0),
        purity=0.5,
        purity_interval=(0.25, 0.75),
        covered=0.125,
        picked_effect=0.2,
        picked_effect_shuffled=0.25,
        rule=((RulePart(of="token", values=("</script>",)),),),
    ),
    2: label_of("second", output=PROMOTED),
    3: label_of("", name="by a person", author="person", balanced_accuracy=None, interval=None),
}


def test_labels_come_back_as_they_were_written(index):
    path = save_labels(index, LABELS)
    assert read_labels(path).features == LABELS
    assert verify(path) == []
    assert describe(str(path)).startswith("labels, schema 2")


def test_the_index_reads_the_labels_next_to_it(index):
    assert FeatureIndex.open(index)[0].label is None
    save_labels(index, LABELS)
    found = FeatureIndex.open(index)
    assert found[0].label == LABELS[0]
    assert found[1].label is None
    assert 2 in found.search("SECOND")
    table = found.table()
    assert table.label.tolist()[:4] == ["</script>", "", "second", "by a person"]
    assert table.label_score.notna().tolist()[:4] == [True, False, True, False]


def test_labels_without_the_scores_of_schema_2_are_read(index):
    path = save_labels(index, LABELS)
    data = json.loads(path.read_text())
    new = "clarity clarity_interval purity purity_interval covered picked_effect".split()
    for label in data["features"].values():
        for name in (*new, "picked_effect_shuffled"):
            label.pop(name, None)
    data["metadata"]["lorascope"] |= {"schema": 1, "seal": "lorascope-sha256:" + "0" * 64}
    path.write_text(sealed(json.dumps(data)))
    assert read_labels(path).features[0].clarity is None
    assert FeatureIndex.open(index)[0].label.name == "</script>"


def test_labels_of_another_index_are_left_alone_with_a_warning(index, caplog):
    save_labels(index, LABELS, digest="0" * 64)
    with caplog.at_level(logging.WARNING):
        assert FeatureIndex.open(index).labels is None
    assert "has labels of another index" in caplog.text


def test_a_file_that_only_has_the_same_name_is_left_alone(index):
    index.with_name("labels.json").write_text('{"format": "lorascope labels 1"}')
    assert FeatureIndex.open(index).labels is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda f: f["0"].update(kind="other"), "features.0.kind is"),
        (
            lambda f: f["0"].update(precision=1.5),
            "features.0.precision is 1.5, expected a number from 0",
        ),
        (lambda f: f["0"].pop("name"), "features.0 lacks name"),
        (lambda f: f["0"].update(extra=1), "features.0 has the unknown key extra"),
        (lambda f: f["0"].update(interval=None), "lacks its interval"),
        (lambda f: f["0"].update(interval=[0.1, 0.2]), "outside its interval"),
        (lambda f: f["0"].update(clarity=-2), "features.0.clarity is -2"),
        (lambda f: f["0"].update(clarity_interval=[0.1, 0.2]), "outside its interval"),
        (lambda f: f["0"].update(purity=None), "an interval without a score"),
        (lambda f: f["2"]["output"].update(interval=[0.1, 0.2]), "outside its interval"),
        (lambda f: f["0"].update(name="two\nlines"), "name is not one line"),
        (lambda f: f.update({"x": f["0"]}), "'x', which is not a number"),
        (lambda f: f.update({"1" * 5000: f["0"]}), "1111', which is not a number"),
        (lambda f: f.update({"01": f["0"]}), "feature 01"),
        (lambda f: f.update({"9999": f["0"]}), "feature 9999"),
    ],
)
def test_what_no_label_may_hold_is_named_in_one_line(index, change, fault):
    path = save_labels(index, LABELS)
    data = json.loads(path.read_text())
    change(data["features"])
    data["metadata"]["lorascope"]["seal"] = "lorascope-sha256:" + "0" * 64
    path.write_text(sealed(json.dumps(data)))
    with pytest.raises(ArtifactError) as error:
        read_labels(path)
    assert fault in str(error.value)
    assert "\n" not in str(error.value)
    assert verify(path) == [str(error.value)]


def test_a_changed_byte_is_found_and_the_index_says_so(index):
    path = save_labels(index, LABELS)
    path.write_text(path.read_text().replace("second", "secind"))
    with pytest.raises(ArtifactError, match=r"is damaged .* run lorascope label again"):
        FeatureIndex.open(index)
