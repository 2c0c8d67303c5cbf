"""The overview: its statements are those of the reports, in the page, the text and the JSON."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders.effect_reports import HOSTILE, ablation, evaluation, write, write_all
from builders.indexes import full_index, index_of
from builders.labels import label_of, save_labels

from lorascope.artifact import check_seal
from lorascope.causal.study import read_report
from lorascope.dashboard.headline import percent
from lorascope.dashboard.overview import Overview, overview_of
from lorascope.dashboard.report import ReportConfig, markdown, plain, run
from lorascope.dashboard.reports import Reports
from lorascope.errors import ArtifactError, ConfigError
from lorascope.inspection import verify

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


def test_the_headline_says_what_the_adapter_does_and_how_far_the_features_give_it(
    tmp_path: Path,
) -> None:
    found = overview(tmp_path)
    subject, effect, trust = found.headline
    assert re.fullmatch(r"A LoRA of rank 1 on .* projections of 4 layers.*features\.", subject)
    assert "“<think>” more likely" in effect
    assert "(20\u00a0%)" in effect
    assert "75\u00a0% is at special tokens" in trust
    assert "25\u00a0% in think segments" in trust
    assert "95\u00a0% of its effect stays (90\u00a0% on text" in trust
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
    assert "learned nothing" in found.headline[1]
    assert len(found.headline) == 2
    assert found.roles == found.shifts == found.gauges == ()


def test_rounding_alone_is_no_effect(tmp_path: Path) -> None:
    def tiny(report: dict[str, Any]) -> None:
        found = report["faithfulness"]
        found["runs"]["base"]["kl"] = 2 * found["floor"]["rounding"]

    assert "learned nothing" in overview(tmp_path, tiny).headline[1]


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


def test_the_share_of_a_group_has_an_interval_where_its_rollouts_are_known(tmp_path: Path) -> None:
    found = overview(tmp_path)
    assert len(found.groups) > 1
    for group in found.groups:
        assert group.interval is not None
        assert group.interval[0] <= group.share <= group.interval[1]
    low, high = found.groups[0].interval or (0, 0)
    assert f"| {percent(low)} to {percent(high)} |" in markdown(found)
    assert overview_of(full_index(), Reports(len(full_index()))).groups[0].interval is None


def test_larger_effects_come_first(tmp_path: Path) -> None:
    features = overview(tmp_path).features
    effects = [one.effect or 0.0 for one in features]
    assert effects == sorted(effects, reverse=True)
    assert len(set(effects)) > 10


def test_an_empty_index_has_an_overview() -> None:
    index = index_of([])
    assert overview_of(index, Reports(0)).features == ()


def test_markdown_shows_hostile_text_and_obeys_none(tmp_path: Path) -> None:
    text = markdown(overview(tmp_path))
    assert "script" in text
    assert "▸ “short”" in text
    assert "| 0.1\u00a0% → 99.9\u00a0% |" in text
    assert "Share: part of the sum of all features (effect of removal)." in text
    assert "→ 80\u00a0%" in text, "what a head looks at"
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
    assert "<think>" in found.headline[1]
    assert found == overview_of(
        index, Reports.open([tmp_path / "evaluation.json"], index, tmp_path / "features.h5")
    )
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert verify(tmp_path / "report.md") == []
    old = re.sub(r'"lorascope-sha256:\w+"', "null", text)  # as before reports had a checksum
    (tmp_path / "old.md").write_text(old, encoding="utf-8")
    assert re.fullmatch(
        "old.md has no seal: it is damaged, or an older lorascope made it; make it again",
        *verify(tmp_path / "old.md"),
    )
    assert text.startswith("# What the adapter learned")
    before = out.read_bytes()
    run(ReportConfig(input=tmp_path / "features.h5"))
    assert out.read_bytes() == before
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(ArtifactError, match="--overwrite"):
        run(ReportConfig(input=tmp_path))


def test_reports_of_an_earlier_run_are_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = full_index()
    index.save(tmp_path / "features.h5")
    (tmp_path / "effects").mkdir()
    parents = {"sae": "0" * 64, "activations": "1" * 64}
    manifest = replace(index.manifest, parents={**index.manifest.parents, **parents})
    other = replace(index, manifest=manifest)
    write(tmp_path / "effects" / "ablation.json", "ablation", other, ablation(index))
    write(tmp_path / "evaluation.json", "evaluation", index, evaluation())
    out = run(ReportConfig(input=tmp_path))
    assert read_report(out, (Overview,))[0].kl is not None
    assert read_report(out, (Overview,))[1].parents.keys() & {"effects ablation"} == set()
    assert [text for text in caplog.messages if "left out" in text] == [
        f"{tmp_path / 'effects' / 'ablation.json'} is left out: it is not of the index's SAE; "
        "make it again"
    ]


def test_input_that_gives_no_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no features\.h5"):
        run(ReportConfig(input=tmp_path))
    index_of([]).save(tmp_path / "features.h5")
    with pytest.raises(ArtifactError, match="does not name the sites"):
        run(ReportConfig(input=tmp_path))
    with pytest.raises(ConfigError, match=r"ends in \.json"):
        ReportConfig(input=tmp_path, output=tmp_path / "report.md")


def test_an_effect_without_roles_is_said(tmp_path: Path) -> None:
    found = overview(tmp_path, lambda report: report["faithfulness"].update(roles={}))
    assert "Where it changes predictions was not measured." in found.headline[2]


def test_the_page_opens_on_the_overview(show: Any, tmp_path: Path) -> None:
    visit: Shown = show(full_index(), "", effects=reports(tmp_path))
    assert visit.text("heading") == "What the adapter learned"
    found = overview(tmp_path)
    assert visit.part("headline").locator("p").all_text_contents() == list(found.headline)
    tokens = visit.part("shifts").locator(".token-chip").all_text_contents()
    assert tokens == ["<think>", HOSTILE, "\n"]
    heads = visit.part("shifts").locator("h4").all_text_contents()
    assert [head.split("\u00a0")[0] for head in heads] == [
        "At special tokens and template headers75",
        "In think segments25",
    ]
    changes = visit.part("shifts").locator(".shift-p").all_text_contents()
    assert changes[0] == "0.1\u00a0% \u2192 99.9\u00a0%", "no probability is rounded to all"
    (answer,) = found.answers
    sides = visit.part("answers").locator(".answer p").all_text_contents()
    assert sides == [answer.prompt, answer.same + answer.base, answer.same + answer.adapter]
    edges = " to ".join(map(percent, found.groups[0].interval or ()))
    assert f"95 % interval {edges}; " in visit.text("groups")
    heads = visit.part("attention").locator(".top-feature")
    assert heads.count() == 1
    assert "layer 1, head 1" in heads.text_content()
    assert "60\u00a0%" in heads.text_content()
    assert f"more at {HOSTILE} 0\u00a0% \u2192 80\u00a0%" in heads.text_content()
    marked = visit.part("answers").locator("mark").all_text_contents()
    assert marked == ["", answer.base, answer.adapter]
    columns = visit.page.locator(".overview-columns.small")
    # of more, one stays empty beside a tall panel
    assert columns.evaluate("node => getComputedStyle(node).columnCount") == "3"
    (said,) = (one.value for one in found.facts if one.name == "Predictions")
    assert re.fullmatch(r"[\d,]+ in \d+ held-out rollouts", said)
    lines = visit.copied("sureness", "Copy as TSV").splitlines()
    assert lines[1:] == [f"{one.name}\t{one.value}\t{one.meaning}" for one in found.facts]
    first = visit.part("top-features").get_by_role("link").first
    assert first.get_attribute("href") == f"#/feature/{found.features[0].feature}"
    first.click()
    visit.wait_for(found.features[0].feature)
    visit.press("o")
    visit.page.wait_for_selector("[data-testid=headline]")
    assert visit.page.evaluate("window.hacked") is None


@pytest.mark.slow
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
