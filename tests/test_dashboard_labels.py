"""Labels on the page: titles, scores, filters, search, and text that stays text."""

import csv
import io
import json

import numpy as np
import pytest
from builders.indexes import full_index
from builders.labels import label_of, save_labels
from builders.pages import block, column

from lorascope.artifact import read_manifest
from lorascope.dashboard.payload import Payload
from lorascope.dashboard.render import DashboardConfig, run
from lorascope.errors import ArtifactError
from lorascope.features.index import FeatureIndex

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e"
LABELS = {
    0: label_of(
        "carrots",
        category="word",
        balanced_accuracy=0.95,
        interval=(0.9, 1.0),
        clarity=0.75,
        clarity_interval=(0.5, 0.875),
        purity=0.5,
        purity_interval=(0.25, 0.625),
        covered=0.125,
        picked_effect=0.625,
        picked_effect_shuffled=0.25,
    ),
    1: label_of(HOSTILE, kind="context", category="symbol"),
    3: label_of(
        "unclear: mostly peas",
        kind="unclear",
        balanced_accuracy=0.6,
        interval=(0.5, 0.7),
        sentence="Unclear: fires mostly on turnips.",
    ),
    6: label_of("leeks", author="big", judge="small"),
    4: label_of("beans", author="person", balanced_accuracy=None, interval=None, shuffled=None),
}


@pytest.fixture
def labelled(tmp_path):
    full_index().save(tmp_path / "features.h5")
    save_labels(tmp_path / "features.h5", LABELS)
    return tmp_path / "features.h5"


def go(shown, address):
    shown.page.goto(shown.page.url.partition("#")[0] + address)


def test_the_label_is_the_title_and_the_line_in_the_list_with_its_score_beside(show, labelled):
    shown = show(labelled, "#/feature/0")
    assert shown.text("heading") == "Feature 0: carrots"
    assert shown.text("label-sentence") == "Fires on carrots."
    assert "0.95 (0.90 to 1.00)" in shown.text("label-score")
    assert "chance is 0.50, labels of other features 0.50" in shown.text("label-score")
    shown.page.locator(".label-why summary").click()
    assert shown.text("label-recall") == "90\u00a0%"
    assert shown.text("label-clarity").replace("\u00a0", " ") == "75 % (50 % to 87.5 %)"
    assert shown.text("label-purity").replace("\u00a0", " ") == "50 % (25 % to 62.5 %)"
    assert shown.text("label-picked_effect").replace("\u00a0", " ") == "62.5 %"
    why = shown.text("label-card").replace("\u00a0", " ")
    assert "in order of strength; 12.5 % is chance" in why
    assert "20 % is chance, labels of other features 25 %" in why
    row = shown.page.locator(".row[data-feature='0']")
    assert row.locator(".row-token").text_content() == "carrots"
    assert row.locator(".row-note").text_content() == "0.95"


@pytest.mark.slow
def test_unclear_unlabelled_and_hand_written_labels_say_so(show, labelled):
    shown = show(labelled, "#/feature/3")
    assert shown.text("label-score").startswith("unclear")
    row = shown.page.locator(".row[data-feature='3'] .row-token")
    assert "unclear" in (row.get_attribute("class") or "")
    go(shown, "#/feature/4")
    shown.page.wait_for_selector("[data-feature='4'][data-complete='4']")
    assert "Written by a person" in shown.text("label-score")
    go(shown, "#/feature/6")
    shown.page.wait_for_selector("[data-feature='6'][data-complete='6']")
    assert "Written by big, tested by small." in shown.text("label-score")
    go(shown, "#/feature/7")
    shown.page.wait_for_selector("[data-feature='7'][data-complete='7']")
    assert shown.text("heading") == "Feature 7"
    assert "has no label" in shown.text("label-card")


@pytest.mark.slow
def test_hostile_labels_stay_text(show, labelled):
    shown = show(labelled, "#/feature/1")
    assert shown.page.locator("#heading").text_content() == f"Feature 1: {HOSTILE}"
    assert shown.page.locator("img").count() == 0
    assert shown.text("label-sentence") == f"Fires on {HOSTILE}."


@pytest.mark.slow
def test_labels_are_searched_filtered_and_sorted(show, labelled):
    shown = show(labelled, "#/feature/0")
    shown.part("search").fill("TURNIPS")
    shown.wait_listed([3])
    for query, expected in (
        ("kind=context", [1]),
        ("kind=unclear", [3]),
        ("category=symbol", [1]),
        ("lmin=0.92", [0]),
        ("kind=token&sort=score", [0, 6, 4]),
    ):
        go(shown, f"#/feature?{query}")
        shown.wait_listed(expected)


@pytest.mark.slow
def test_the_users_own_label_comes_first(show, labelled):
    shown = show(labelled, "#/feature/0")
    shown.part("label").fill("mine")
    assert shown.text("heading") == "Feature 0: mine"
    assert shown.page.locator(".row[data-feature='0'] .row-token").text_content() == "mine"
    assert shown.text("label-sentence") == "Fires on carrots."
    with shown.page.expect_download() as download:
        shown.part("save-table").click()
    shown.complaints[:] = [text for text in shown.complaints if not text.startswith("blob:")]
    table = csv.DictReader(io.StringIO(download.value.path().read_text("utf-8")))
    lines = {int(line["feature"]): line for line in table}
    assert (lines[0]["label"], lines[0]["name"]) == ("mine", "carrots")
    assert lines[1]["name"] == HOSTILE
    assert float(lines[0]["score"]) == pytest.approx(0.95)
    assert (lines[4]["author"], lines[4]["score"]) == ("person", "")


def test_the_page_has_the_labels_as_they_are_and_without_labels_nothing_of_them(labelled):
    index = FeatureIndex.open(labelled)
    payload = Payload(index, "T")
    core = json.loads(payload.core())
    names = core["labels"]["names"]
    assert {i: name for i, name in enumerate(names) if name} == {
        i: label.name for i, label in LABELS.items()
    }
    scores = column(core, "label_balanced_accuracy")
    assert [scores[i] for i in (0, 1, 3, 6)] == [np.float32(x) for x in (0.95, 0.9, 0.6, 0.9)]
    assert np.isnan(np.delete(scores, [0, 1, 3, 6])).all()
    decoded = block(core, payload.block(0))
    sentences = bytes(decoded["sentence"]).decode()
    assert sentences == "".join(LABELS[i].sentence for i in sorted(LABELS))
    plain = json.loads(Payload(full_index(), "T").core())
    assert plain["labels"] is None
    assert not [name for name in plain["columns"] if name.startswith("label")]
    assert "sentence" not in dict(plain["block_columns"])


@pytest.mark.slow
def test_other_labels_can_be_given_and_those_of_another_index_are_refused(labelled, tmp_path):
    moved = (tmp_path / "labels.json").rename(tmp_path / "other.json")
    page = tmp_path / "page.html"
    run(DashboardConfig(input=labelled, output=page))
    assert "labels" not in read_manifest(page).parents
    config = DashboardConfig(input=labelled, output=page, labels=moved, overwrite=True)
    run(config)
    assert "labels" in read_manifest(page).parents
    save_labels(labelled, LABELS, digest="0" * 64)
    with pytest.raises(ArtifactError, match="has labels of another index"):
        run(DashboardConfig(input=labelled, output=page, labels=tmp_path / "labels.json"))
