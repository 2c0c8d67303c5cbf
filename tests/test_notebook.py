"""Pages, indexes and features in notebooks, and the progress of a run there."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders.effect_reports import evaluation, write
from builders.hostile import HOSTILE, hostile_index
from builders.indexes import full_index, index_of, manifest_of, small_index
from builders.labels import label_of, save_labels
from builders.pages import Parsed

import lorascope
from lorascope.dashboard.notebook import Page, frame
from lorascope.dashboard.render import DashboardConfig, run
from lorascope.errors import ArtifactError
from lorascope.features.feature import escape_html
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import Labels
from lorascope.runtime import ProgressLog, in_notebook, progress, shows_bars

OWNER = "<!doctype html><title>notebook</title><p id=secret>secret</p>"


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Make this process the kernel of a notebook, and return what it displays."""
    shown: list[dict[str, str]] = []
    shell = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None))
    display = SimpleNamespace(display=lambda data, raw: shown.append(data))
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


def page_of(index: FeatureIndex, folder: Path, **given: Any) -> Path:
    index.save(folder / "features.h5")
    return run(DashboardConfig(input=folder / "features.h5", output=folder / "page.html", **given))


def test_a_page_works_in_a_notebook_and_cannot_reach_it(tab, tmp_path, notebook):
    page = page_of(full_index(), tmp_path)
    lorascope.show(page, height=700)
    owner = tmp_path / "notebook.html"
    owner.write_text(OWNER + notebook[0]["text/html"], encoding="utf-8")
    tab.complaints.clear()  # of the test before: the tab is shared
    tab.page.goto(owner.as_uri())
    (inner,) = tab.page.frames[1:]
    inner.wait_for_selector("html[data-ready=true]")
    assert inner.url == "about:srcdoc"
    inner.get_by_test_id("tab-map").click()  # a link to "#/map"
    inner.wait_for_selector("body[data-view=map]")
    inner.locator("body").press("f")  # a key
    inner.wait_for_selector("body[data-view=feature]")
    inner.locator("body").press("j")
    inner.get_by_test_id("feature-view").locator("nth=0").wait_for()
    inner.evaluate("history.back()")
    inner.get_by_test_id("tab-overview").click()
    inner.wait_for_selector("body[data-view=overview]")
    assert inner.url.startswith("about:srcdoc#/")
    with tab.page.expect_download() as saved:
        inner.locator("button", has_text="CSV").evaluate("button => button.click()")
    assert saved.value.suggested_filename == "features.csv"
    for reach in ("parent.document", "parent.secret", "localStorage", "document.cookie"):
        with pytest.raises(Exception, match="SecurityError"):
            inner.evaluate(f"void {reach}")
    assert inner.evaluate("origin") == "null"
    assert tab.page.url == owner.as_uri()
    seen = {text.partition("#")[0] for text in tab.complaints}
    assert {address.partition(":")[0] for address in seen} <= {"file", "about", "blob"}
    assert {address for address in seen if address.startswith("file:")} == {owner.as_uri()}


def test_hostile_text_leaves_the_frame_no_more_than_other_text(tab, tmp_path):
    text = page_of(hostile_index(), tmp_path, title="\"'></iframe><script>hacked = 1</script>")
    owner = tmp_path / "notebook.html"
    inside = text.read_text(encoding="utf-8")
    owner.write_text(OWNER + frame(inside, 300), encoding="utf-8")
    tab.page.goto(owner.as_uri())
    (inner,) = tab.page.frames[1:]
    inner.wait_for_selector("html[data-ready=true]")
    assert tab.page.locator("iframe").get_attribute("srcdoc") == inside
    assert [tab.page.evaluate("typeof hacked"), inner.evaluate("typeof hacked")] == [
        "undefined"
    ] * 2


def test_features_describe_themselves_and_hostile_text_is_text():
    labels = {i: label_of(HOSTILE[i % len(HOSTILE)]) for i in range(70)}
    index = replace(hostile_index(70), labels=Labels(labels, manifest_of(70)))
    for feature in map(index.__getitem__, range(len(index))):
        html = feature._repr_html_()
        assert len(html) < 40_000
        assert html.isascii()
        parsed = Parsed(html)
        assert parsed.tags <= set("p b table thead tbody tr th td bdi mark".split())
        assert parsed.attributes <= {"class", "style"}
        assert parsed.text.isprintable()


def test_an_index_says_its_size_and_a_feature_its_numbers_label_and_examples(tmp_path):
    index = index_of([*[[one] for one in small_index()[0].examples], []], n_tokens=1234)
    index.save(tmp_path / "features.h5")
    save_labels(tmp_path / "features.h5", {0: label_of("a < b")})
    index = FeatureIndex.open(tmp_path / "features.h5")
    assert repr(index) == "FeatureIndex(4 features, 3 of them fire; 1,234 tokens)"
    assert repr(index[0]).startswith("Feature(0; a < b; balanced accuracy 0.90; fires at 1 tokens")
    html = index[0]._repr_html_()
    example = index[0].examples[0]
    assert (
        "Feature 0: a < b; balanced accuracy 0.90; fires at 1 tokens of text" in Parsed(html).text
    )
    assert f"{example.value:.3g}" in Parsed(html).text
    assert f">{escape_html(example.tokens[example.target])}</mark>" in html


def test_a_feature_of_the_template_shows_where_it_fires(tmp_path):
    feature = next(
        one for one in map(full_index().__getitem__, range(len(full_index()))) if one.at_special
    )
    assert (
        feature.strongest[0]
        == (feature.at_special if feature.stats.is_template else feature.examples)[0]
    )


def test_the_page_of_a_run_is_its_path_and_shows_its_report(tmp_path):
    from lorascope.dashboard.report import ReportConfig
    from lorascope.dashboard.report import run as report

    page = Page(tmp_path / "dashboard.html")
    assert page == tmp_path / "dashboard.html"
    assert page.parent / "x" == tmp_path / "x"
    assert page._repr_html_() is None
    index = full_index()
    index.save(tmp_path / "features.h5")
    write(tmp_path / "evaluation.json", "evaluation", index, evaluation())
    report(ReportConfig(input=tmp_path))
    headline = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["headline"]
    text = Parsed(page._repr_html_() or "").text
    assert headline
    assert all(sentence in text for sentence in headline)


def test_what_is_no_page_is_refused_and_elsewhere_a_browser_opens_it(tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    other = tmp_path / "other.html"
    other.write_text("<p>hello", encoding="utf-8")
    with pytest.raises(ArtifactError, match="is not a page; give the HTML file"):
        lorascope.show(other)
    for path in (tmp_path / "none.html", tmp_path):
        with pytest.raises(ArtifactError, match="html does not exist; check the path"):
            lorascope.show(path)
    page = page_of(small_index(), tmp_path)
    page.rename(tmp_path / "dashboard.html")
    lorascope.show(str(tmp_path))
    assert opened == [(tmp_path / "dashboard.html").as_uri()]


def test_progress_is_a_bar_in_a_notebook(request, capsys):
    assert not in_notebook()
    assert isinstance(progress(3, "train", "steps"), ProgressLog)
    request.getfixturevalue("notebook")
    assert in_notebook()
    assert shows_bars()
    with progress(3, "train", "steps") as bar:
        bar.update(2)
        assert not isinstance(bar, ProgressLog)
    out, err = capsys.readouterr()
    assert "train" in out + err
