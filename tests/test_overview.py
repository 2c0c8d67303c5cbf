"""The overview: its statements are those of the reports, in the page, the text and the JSON."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders.effect_reports import HOSTILE, evaluation, write, write_all
from builders.indexes import full_index, index_of
from builders.labels import label_of, save_labels

from lorascope.artifact import check_seal
from lorascope.causal.study import read_report
from lorascope.dashboard.overview import Overview, overview_of, percent, quoted
from lorascope.dashboard.report import ReportConfig, markdown, plain, run
from lorascope.dashboard.reports import Reports
from lorascope.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from builders.browser import Shown


def reports(folder: Path, change: Any = None) -> tuple[Path, ...]:
    """All reports of a full index; `change` edits the evaluation first."""
    report = evaluation()
    if change is not None:
        change(report)
    index = full_index()
    others = [path for path in write_all(folder, index) if path.stem != "evaluation"]
    return (*others, write(folder / "evaluation.json", "evaluation", index, report))


def overview(folder: Path, change: Any = None) -> Overview:
    """Their overview."""
    index = full_index()
    return overview_of(index, Reports.open(reports(folder, change), index, folder))


def test_the_headline_says_where_the_effect_is_and_what_it_consists_of(tmp_path: Path) -> None:
    found = overview(tmp_path)
    subject, effect, trust = found.headline
    assert re.fullmatch(r"A LoRA of rank 1 on .* projections of 4 layers.*features\.", subject)
    assert "75\u00a0% of its effect on predictions is at special tokens" in effect
    assert "“<think>” (50\u00a0%) more likely" in effect
    assert "(20\u00a0%) less likely" in effect
    assert "25\u00a0% is in think segments" in effect
    assert "90\u00a0% (80\u00a0% to 90\u00a0%)" in trust
    assert "95\u00a0% of its effect on all predictions" in trust
    assert "50\u00a0% and 70\u00a0%" in trust
    assert [gap.command.split()[1] for gap in found.gaps] == ["label"]


def test_roles_share_the_effect(tmp_path: Path) -> None:
    found = overview(tmp_path)
    assert [(one.role, one.share) for one in found.roles] == [
        ("special", pytest.approx(0.75)),
        ("think", pytest.approx(0.25)),
    ]


def test_an_adapter_without_effect_is_said_to_change_nothing(tmp_path: Path) -> None:
    def nothing(report: dict[str, Any]) -> None:
        report["shifts"] = []
        found = report["faithfulness"]
        for part in (*found["runs"].values(), *found["roles"].values()):
            part |= {"kl": 0.0, "recovered": None, "recovered_interval": None}
        for part in found["runs"].values():
            part["generated"] = None
        for part in found["roles"].values():
            part["kl_zero"] = 0.0

    found = overview(tmp_path, nothing)
    assert "changes nothing" in found.headline[1]
    assert len(found.headline) == 2
    assert found.roles == found.shifts == found.gauges == ()


def test_rounding_alone_is_no_effect(tmp_path: Path) -> None:
    def tiny(report: dict[str, Any]) -> None:
        found = report["faithfulness"]
        found["runs"]["base"]["kl"] = 2 * found["floor"]["rounding"]

    assert "changes nothing" in overview(tmp_path, tiny).headline[1]


def test_what_was_not_measured_is_a_gap_with_its_command(tmp_path: Path) -> None:
    index = full_index()
    found = overview_of(index, Reports(len(index)))
    assert "was not measured" in found.headline[1]
    assert {gap.command.split()[1] for gap in found.gaps} == {
        "evaluate",
        "ablate",
        "direct",
        "attribute",
        "label",
    }
    assert found.features, "features are ranked by activation"
    assert {one.effect for one in found.features} == {None}
    assert sum(group.share for group in found.groups) == pytest.approx(1)


def test_larger_effects_that_are_specific_come_first(tmp_path: Path) -> None:
    features = overview(tmp_path).features
    found = [(one.verdict, one.effect or 0.0) for one in features]
    assert found == sorted(found, key=lambda one: (one[0] != "specific" or one[1] < 0.001, -one[1]))
    assert len({effect for _, effect in found}) > 10


def test_an_empty_index_has_an_overview() -> None:
    index = index_of([])
    assert overview_of(index, Reports(0)).features == ()


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100"), (0.9996, "99.9"), (0.995, "99.5"), (0.984, "98"), (0.0996, "10"), (0.034, "3.4")],
)
def test_percentages_round_but_never_to_all(share: float, text: str) -> None:
    assert percent(share) == f"{text}\u00a0%"


def test_invisible_characters_are_shown() -> None:
    assert quoted("\n a\u202eb") == "“⏎ a\\u202eb”"


def test_markdown_shows_hostile_text_and_obeys_none(tmp_path: Path) -> None:
    text = markdown(overview(tmp_path))
    assert "script" in text
    assert not re.search(r"(?<!\\)<", text), "every tag is escaped"
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert line.startswith("|") or cells == 0
    link = plain("[a](http://b) ![c](d) www.e.f g@h `i` *j* _k_ | l")
    assert link == r"\[a\](http\://b) \!\[c\](d) www\.e.f g\@h \`i\` \*j\* \_k\_ \| l"


def test_the_report_of_a_folder_is_made_once_and_read_back(tmp_path: Path) -> None:
    index = full_index()
    index.save(tmp_path / "features.h5")
    write(tmp_path / "evaluation.json", "evaluation", index, evaluation())
    out = run(ReportConfig(input=tmp_path))
    assert out == tmp_path / "report.json"
    assert check_seal(out) is None
    found, _ = read_report(out, (Overview,))
    assert found.headline[1].startswith("75")
    assert found == overview_of(
        index, Reports.open([tmp_path / "evaluation.json"], index, tmp_path / "features.h5")
    )
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# What the adapter learned")
    before = out.read_bytes()
    run(ReportConfig(input=tmp_path / "features.h5"))
    assert out.read_bytes() == before
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(ArtifactError, match="--overwrite"):
        run(ReportConfig(input=tmp_path))


def test_input_that_gives_no_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no features\.h5"):
        run(ReportConfig(input=tmp_path))
    index_of([]).save(tmp_path / "features.h5")
    with pytest.raises(ArtifactError, match="does not name the sites"):
        run(ReportConfig(input=tmp_path))
    with pytest.raises(ConfigError, match=r"expected a \.json file"):
        ReportConfig(input=tmp_path, output=tmp_path / "report.md")


def test_an_effect_without_roles_is_said(tmp_path: Path) -> None:
    found = overview(tmp_path, lambda report: report["faithfulness"].update(roles={}))
    assert "where was not measured" in found.headline[1]


def test_the_page_opens_on_the_overview(show: Any, tmp_path: Path) -> None:
    visit: Shown = show(full_index(), "", effects=reports(tmp_path))
    assert visit.text("heading") == "What the adapter learned"
    found = overview(tmp_path)
    assert visit.part("headline").locator("p").all_text_contents() == list(found.headline)
    tokens = visit.part("shifts").locator(".token-chip").all_text_contents()
    assert tokens == ["<think>", HOSTILE, "\n"]
    first = visit.part("top-features").get_by_role("link").first
    assert first.get_attribute("href") == f"#/feature/{found.features[0].feature}"
    first.click()
    visit.wait_for(found.features[0].feature)
    visit.press("o")
    visit.page.wait_for_selector("[data-testid=headline]")
    assert visit.page.evaluate("window.hacked") is None


def test_the_page_says_what_was_not_measured(show: Any) -> None:
    visit: Shown = show(full_index(), "#/overview")
    assert "was not measured" in visit.text("headline")
    assert visit.part("gaps").locator("code").count() == 5
    assert visit.part("shifts").count() == 0


def test_the_overview_of_the_page_is_that_of_the_report(tmp_path: Path) -> None:
    from lorascope.dashboard.payload import Payload
    from lorascope.record_json import to_json

    index = full_index()
    given = Reports.open(reports(tmp_path), index, tmp_path)
    core = json.loads(Payload(index, "T", given).core())
    expected = json.loads(json.dumps(to_json(overview_of(index, given))))
    assert core["overview"] == expected


def test_labels_name_features_and_groups(tmp_path: Path) -> None:
    index = full_index()
    index.save(tmp_path / "features.h5")
    latents = [i for i in range(len(index)) if index.alive[i]]
    named = {i: label_of(f"name {i}", category="number") for i in latents[:-1]}
    save_labels(tmp_path / "features.h5", named | {latents[-1]: label_of("other")})
    out = run(ReportConfig(input=tmp_path))
    found, manifest = read_report(out, (Overview,))
    assert all(one.name == f"name {one.feature}" for one in found.features if one.feature in named)
    kinds = {"numbers", "words", "at"}
    assert {group.name.split()[0] for group in found.groups} <= kinds
    assert "label" not in {gap.command.split()[1] for gap in found.gaps}
    assert "labels" in manifest.parents
    assert f"name {found.features[0].feature}" in (tmp_path / "report.md").read_text("utf-8")
