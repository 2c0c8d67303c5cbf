"""Working with the page: keys, help, colours, labels and downloads."""

import csv
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from builders.indexes import example, feature_with, full_index, index_of, small_index

from lorascope.dashboard.render import read_glossary


def saved(shown: Any, testid: str) -> Path:
    with shown.page.expect_download() as download:
        shown.part(testid).click()
    shown.complaints[:] = [text for text in shown.complaints if not text.startswith("blob:")]
    return download.value.path()


@pytest.mark.slow
def test_the_help_lists_every_key_and_closes_again(show: Any):
    shown = show(small_index())
    for opens in (lambda: shown.press("?"), lambda: shown.part("help-button").click()):
        opens()
        assert shown.part("help").is_visible()
        for word in ("search", "map", "rollouts", "star", "colours", "previous"):
            assert word in shown.text("help")
        shown.press("d", "ArrowRight")
        assert shown.page.locator("html").get_attribute("data-theme") == "light"
        assert shown.text("heading") == "Feature 0"
        shown.press("Escape")
        assert not shown.part("help").is_visible()
    shown.press("?")
    shown.part("help-close").click()
    assert not shown.part("help").is_visible()


@pytest.mark.slow
def test_the_glossary_in_the_help_is_complete(show: Any):
    shown = show(small_index())
    shown.press("?")
    entries = shown.part("glossary").locator(".glossary-entry")
    expected = [text for part in read_glossary().values() for text in part.items()]
    assert entries.locator("dt").all_text_contents() == [term for term, _ in expected]
    assert entries.locator("dd").all_text_contents() == [text for _, text in expected]
    assert entries.last.is_visible()
    assert shown.page.get_by_text("How to read this page").is_visible()


@pytest.mark.slow
def test_keys_switch_views_and_focus_fields(show: Any):
    shown = show(full_index())
    shown.press("m")
    shown.page.wait_for_selector("body[data-view=map]")
    shown.press("t")
    shown.page.wait_for_selector("body[data-view=rollout]")
    shown.press("f")
    shown.page.wait_for_selector("body[data-view=feature]")
    shown.press("g")
    shown.page.keyboard.type("2")
    shown.press("Enter")
    shown.wait_for(2)
    for key, field in (("l", "label"), ("n", "note"), ("/", "search")):
        shown.page.locator("h2#heading").focus()
        shown.press(key)
        assert shown.page.evaluate("document.activeElement.dataset.testid") == field
        shown.press("Escape")
        assert shown.page.evaluate("document.activeElement === document.body")


@pytest.mark.slow
def test_letters_typed_into_a_field_trigger_no_keys(show: Any):
    shown = show(full_index())
    shown.part("label").fill("")
    shown.part("label").focus()
    shown.page.keyboard.type("smtfd?/c")
    assert shown.part("label").input_value() == "smtfd?/c"
    assert shown.page.locator("body").get_attribute("data-view") == "feature"
    assert shown.part("star").get_attribute("aria-pressed") == "false"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_until_they_are_switched(show: Any, scheme: str):
    other = {"light": "dark", "dark": "light"}
    shown = show(small_index(), scheme=scheme)
    root = shown.page.locator("html")
    assert root.get_attribute("data-theme") == scheme
    shown.page.emulate_media(color_scheme=other[scheme])
    shown.page.wait_for_selector(f"html[data-theme={other[scheme]}]")
    shown.part("theme").click()
    assert root.get_attribute("data-theme") == scheme
    shown.page.reload()
    shown.page.wait_for_selector("html[data-ready=true]")
    assert root.get_attribute("data-theme") == scheme
    shown.press("d")
    assert root.get_attribute("data-theme") == other[scheme]


def test_labels_notes_and_stars_are_stored_and_listed(show: Any):
    shown = show(small_index())
    shown.press("l")
    shown.page.keyboard.type("Names <b>")
    shown.press("Enter", "s", "n")
    shown.page.keyboard.type("seen twice")
    shown.page.reload()
    shown.page.wait_for_selector("html[data-ready=true]")
    assert shown.part("label").input_value() == "Names <b>"
    assert shown.part("note").input_value() == "seen twice"
    assert shown.part("star").get_attribute("aria-pressed") == "true"
    row = shown.page.locator("[data-testid=row][data-feature='0']")
    assert "Names <b>" in row.text_content()
    assert "\u2605" in row.text_content()
    shown.part("more-filters").click()
    for mark, count in (("starred", 1), ("labelled", 1), ("noted", 1), ("unlabelled", 2)):
        shown.part("mark").select_option(mark)
        assert shown.text("list-count").startswith(f"{count} feature")
    shown.part("mark").select_option("")
    shown.page.evaluate("location.hash = '#/feature/2'")
    shown.wait_for(2)
    assert shown.part("label").input_value() == ""


def test_labels_are_exported_and_imported(show: Any, tmp_path: Path):
    shown = show(small_index())
    shown.part("label").fill("Names")
    shown.part("star").click()
    data = json.loads(saved(shown, "export-labels").read_text())
    assert data["features"] == {"0": {"label": "Names", "note": "", "star": True}}
    data["features"]["2"] = {"label": "Ends", "note": 7, "star": "yes", "more": 1}
    data["features"]["99"] = {"label": "nobody"}
    file = tmp_path / "labels.json"
    file.write_text(json.dumps(data))
    shown.part("labels-file").set_input_files(file)
    shown.page.wait_for_function(
        "() => document.getElementById('files-status').textContent.includes('2 features')"
    )
    assert "Ends" in shown.page.locator("[data-testid=row][data-feature='2']").text_content()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "no labels"),
        ('{"format": "lorascope labels 1", "sae": "x", "features": {}}', "another SAE"),
    ],
)
def test_a_file_without_labels_for_this_page_is_refused(
    show: Any, tmp_path: Path, text: str, said: str
):
    shown = show(small_index())
    (tmp_path / "labels.json").write_text(text)
    shown.part("labels-file").set_input_files(tmp_path / "labels.json")
    shown.page.wait_for_function(
        "said => document.getElementById('files-status').textContent.includes(said)", arg=said
    )
    assert shown.part("label").input_value() == ""


def test_the_table_is_saved_in_list_order_without_formulas(show: Any):
    tokens = {1: b"=1+1", 2: b'a "b",\n'}
    features = [[example(v, 9, [t], 0)] for v, t in ((1.0, 1), (3.0, 2))]
    shown = show(index_of(features, tokens))
    shown.part("label").fill("@x")
    shown.part("sort").select_option("max")
    text = saved(shown, "save-table").read_bytes().decode()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["feature"] for row in rows] == ["1", "0"]
    assert [float(row["max"]) for row in rows] == [3.0, 1.0]
    assert [row["token"] for row in rows] == ['a "b",\n', "'=1+1"]
    assert rows[1]["label"] == "'@x"
    assert [row["tokens_mean"] for row in rows] == ["", ""]  # this index ranks no tokens
    assert rows[0]["stability"] == ""


@pytest.mark.slow
def test_a_figure_is_saved_as_svg_with_its_colours(show: Any):
    index = full_index()
    latent = feature_with(index, lambda feature: feature.stats.histogram.sum() > 3)
    shown = show(index, f"#/feature/{latent}")
    with shown.page.expect_download() as download:
        shown.part("fingerprint").locator("summary").click()
        shown.part("fingerprint").get_by_test_id("save-svg").click()
    shown.complaints[:] = [text for text in shown.complaints if not text.startswith("blob:")]
    assert download.value.suggested_filename == f"feature-{latent}-sites.svg"
    drawing = ElementTree.fromstring(download.value.path().read_text())
    fills = {node.get("fill") for node in drawing.iter() if node.tag.endswith("rect")}
    assert len(fills) > 2
    assert all(fill and fill.startswith(("rgb", "color")) for fill in fills)


def test_panels_are_copied_as_tables_in_which_text_is_no_markup(show: Any):
    index = full_index()
    latent = feature_with(index, lambda feature: len(feature.similar) > 1)
    shown = show(index, f"#/feature/{latent}")
    tsv = [line.split("\t") for line in shown.copied("similar", "Copy as TSV").splitlines()]
    assert tsv[0] == ["feature", "label", "score"]
    assert [int(row[0]) for row in tsv[1:]] == [i for i, _ in index[latent].similar]
    lines = shown.copied("roles", "Copy as Markdown").splitlines()
    assert lines[:2] == ["| role | firings | tokens | density |", "| --- | --- | --- | --- |"]
    assert shown.copied("histogram", "Copy as SVG").startswith("<svg")
    assert "tokens at which it fires" in shown.copied("stats-part", "Copy as TSV")


def test_the_labels_in_a_copied_table_are_no_markup_and_no_formula(show: Any):
    index = full_index()
    latent = feature_with(index, lambda feature: len(feature.similar) > 1)
    other = index[latent].similar[0][0]
    shown = show(index, f"#/feature/{other}")
    shown.part("label").fill("=1+1 | <b>`x`")
    shown.page.evaluate(f"location.hash = '#/feature/{latent}'")
    shown.wait_for(latent)
    shown.page.wait_for_selector("[data-testid=similar]")
    line = shown.copied("similar", "Copy as TSV").splitlines()[1]
    assert line.split("\t")[:2] == [str(other), "'=1+1 | <b>`x`"]
    line = shown.copied("similar", "Copy as Markdown").splitlines()[2]
    assert line.startswith(f"| {other} | =1+1 \\| \\<b\\>\\`x\\` | ")


@pytest.mark.slow
def test_the_map_is_saved_as_png(show: Any):
    shown = show(full_index(), "#/map")
    shown.page.wait_for_function("() => document.querySelector('canvas').width > 300")
    assert saved(shown, "save-map").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_print_leaves_out_controls(show: Any):
    shown = show(full_index())
    shown.page.emulate_media(media="print")
    for part in ("list", "next", "theme", "search"):
        assert not shown.part(part).is_visible()
    assert shown.part("example").first.is_visible()
    shown.page.emulate_media(media="screen")


@pytest.mark.slow
@pytest.mark.parametrize("address", ["", "#/map", "#/rollout"])
def test_every_view_fits_a_phone(show: Any, address: str):
    shown = show(full_index(), address, width=390)
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 390
