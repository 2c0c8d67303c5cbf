"""Reports of effects in the page's data: the same numbers, and refusals of what does not belong."""

import json
from pathlib import Path

import numpy as np
import pytest
from builders.effect_reports import (
    HOSTILE,
    MAKERS,
    NEW_TOKEN,
    ablation,
    attribution,
    direct,
    evaluation,
    write,
    write_all,
)
from builders.indexes import small_index, synthetic
from builders.pages import block, column

from lorascope.artifact import read_manifest
from lorascope.dashboard.payload import Payload
from lorascope.dashboard.render import DashboardConfig, run
from lorascope.dashboard.reports import TARGET, Reports
from lorascope.errors import ArtifactError


@pytest.fixture(scope="module")
def index():
    return synthetic(150, 3, 4, n_texts=4, n_rollouts=20, n_layers=2)


def payload_of(index, folder, *kinds):
    paths = [write(folder / f"{k}.json", k, index, MAKERS[k](index)) for k in kinds or MAKERS]
    return Payload(index, "T", Reports.open(paths, index, Path("features.h5")))


def test_effects_of_features_are_the_reports_own_numbers(index, tmp_path):
    core = json.loads(payload_of(index, tmp_path).core())
    names = {
        "effect_kl": "kl",
        "effect_each": "kl_each",
        "effect_here": "share_here",
        "effect_ce": "ce_rise",
        "effect_control": "kl_control",
        "effect_pull": "pull",
        "effect_p": "p",
        "effect_fired": "n_fired",
    }
    for name, key in names.items():
        values = column(core, name)
        for one in ablation(index)["features"]:
            expected = np.nan if one[key] is None else np.float32(one[key])
            assert np.array_equal(np.float32(values[one["feature"]]), expected, equal_nan=True)
        assert np.isnan(values[-2:]).all()  # not in the report
    low, high = column(core, "effect_low"), column(core, "effect_high")
    assert np.isnan([low[2], high[2]]).all() and low[0] < high[0]
    low, high = column(core, "effect_excess_low"), column(core, "effect_excess_high")
    assert np.isnan([low[1], high[1]]).all() and low[3] > 0 > low[0]
    report = ablation(index)
    sums = [one["kl"] * report["n_tokens"] + (one["kl_special"] or 0) * report["n_special"]
            for one in [report["without_adapter"], *report["features"]]]  # fmt: skip
    for one, total in zip(report["features"], sums[1:], strict=True):
        share = column(core, "effect_share")[one["feature"]]
        assert np.isnan(share) if one["ce_rise"] is None else np.isclose(share, total / sums[0])
    assert core["effects"]["ablation"] == {
        "n_rollouts": 5, "n_tokens": 400, "whole": 0.3, "floor": 3e-12,
        "n_judged": len(index) - 3,
    }  # fmt: skip


def test_the_header_says_what_the_sae_recovers(index, tmp_path):
    path = write(tmp_path / "evaluation.json", "evaluation", index, evaluation())
    core = json.loads(Payload(index, "T", Reports.open([path], index, Path("f.h5"))).core())
    said = {label: value for label, value, _ in core["facts"]}
    assert said["Recovered"] == "0.900 (0.800 to 0.900)"
    assert said["Recovered, all tokens"] == "0.950 (0.850 to 0.950)"
    assert said["Constant"] == "0.500 (0.400 to 0.500)"
    older = evaluation()
    older["faithfulness"]["curve"] = {"sae": [{"l0": 1.0}]}
    path = write(tmp_path / "older.json", "evaluation", index, older, schema=3)
    Reports.open([path], index, Path("f.h5"))
    without = evaluation()
    del without["faithfulness"]["runs"]["sae"]
    path = write(tmp_path / "without.json", "evaluation", index, without)
    with pytest.raises(ArtifactError, match="lacks the run sae"):
        Reports.open([path], index, Path("f.h5"))


def test_promoted_tokens_are_in_the_table_of_texts_though_no_text_has_them(index, tmp_path):
    payload = payload_of(index, tmp_path)
    core = json.loads(payload.core())
    assert column(core, "direct_share")[:2] == [0.625, 0]
    ids = column(core, "token_id")
    at = ids.index(NEW_TOKEN)
    assert core["token_texts"][at] == HOSTILE
    found = block(core, payload.block(0))
    n = core["effects"]["direct"]["n"]
    assert found["promoted"][:n][0] == at + 1
    assert found["promoted_score"][:n] == [4, 1.5]
    assert found["suppressed_score"][2 * n : 3 * n] == [-6, -1.5]
    assert found["promoted"][n : 2 * n] == [0, 0]  # feature 1 writes nothing
    plain = json.loads(Payload(index, "T").core())
    known = [i for i in ids if i != NEW_TOKEN]
    assert column(plain, "token_id") == known


def test_attributions_of_whole_texts_are_the_reports_up_to_rounding(index, tmp_path):
    payload = payload_of(index, tmp_path)
    core = json.loads(payload.core())
    assert core["effects"]["attribution"]["parts"] == list(TARGET)
    for number, text in enumerate(attribution(index)["rollouts"]):
        data = payload.rollout(number)
        raw = block({"block_columns": core["rollout_columns"]}, data)
        for name in ("kl", "rise"):
            assert np.isnan(raw[name][0])
            np.testing.assert_allclose(raw[name][1:], text[name][1:], rtol=1 / 256)
        assert raw["target_token"] == [one["token"] for one in text["targets"]]
        parts = np.array(raw["target_parts"]).reshape(-1, len(TARGET))
        for row, one in zip(parts, text["targets"], strict=True):
            np.testing.assert_allclose(row, [one[name] for name in TARGET], rtol=1e-6)
        behind = [pair for one in text["targets"] for pair in one["behind"]]
        assert raw["behind_count"] == [2] * len(text["targets"])
        assert raw["behind_latent"] == [pair[0] for pair in behind]
        assert raw["behind_source"] == [pair[2] for pair in behind]
        np.testing.assert_allclose(raw["behind_value"], [p[1] for p in behind], rtol=1 / 256)


def test_the_page_says_what_both_models_predict_where_they_differ(index, tmp_path):
    payload = payload_of(index, tmp_path, "attribution")
    core = json.loads(payload.core())
    for number in range(payload.n_rollouts):
        raw = block({"block_columns": core["rollout_columns"]}, payload.rollout(number))
        assert raw["likely_count"] == [2 if t == 2 else 0 for t in range(len(raw["token"]))]
        hostile, itself = raw["likely_token"]
        assert (core["token_texts"][hostile - 1], itself) == (HOSTILE, 0)
        assert raw["likely_base"] == [0, 90]
        assert raw["likely_change"] == [75, 25 - 90]


def test_a_rollout_without_an_explained_token_takes_less_room(index, tmp_path):
    report = attribution(index)
    report["rollouts"][1]["targets"] = []
    path = write(tmp_path / "attribution.json", "attribution", index, report)
    payload = Payload(index, "T", Reports.open([path], index, Path("features.h5")))
    core = json.loads(payload.core())
    assert report["rollouts"][1]["rollout"] not in core["effects"]["attribution"]["rollouts"]
    raw = block({"block_columns": core["rollout_columns"]}, payload.rollout(1))
    assert raw["rise"] == []
    for found, kl in zip(raw["kl"][1:], report["rollouts"][1]["kl"][1:], strict=True):
        assert found == (0 if kl < 0.001 else pytest.approx(kl, rel=1 / 15))


def test_attributions_of_one_page_are_joined(index, tmp_path):
    first, second = attribution(index), attribution(index)
    rollout = first["rollouts"][0]["rollout"]
    own = first["rollouts"][0]["targets"]
    added = {**own[0], "token": 2, "features": 0.125}
    second["rollouts"] = [{**first["rollouts"][0], "targets": [added]}]
    paths = [
        write(tmp_path / f"{i}.json", "attribution", index, one)
        for i, one in enumerate((first, second))
    ]
    reports = Reports.open(paths, index, Path("features.h5"))
    raw = reports.text(rollout)
    assert raw["target_token"].tolist() == sorted({2, *(one["token"] for one in own)})
    assert 0.125 in raw["target_parts"]
    assert len(reports.about()["attribution"]["rollouts"]) == len(first["rollouts"])
    assert {"effects attribution", "effects attribution 2"} <= reports.parents.keys()
    second["target"] = "logprob"
    write(paths[1], "attribution", index, second)
    with pytest.raises(ArtifactError, match="attributions of the same --target"):
        Reports.open(paths, index, Path("features.h5"))


def test_without_reports_the_page_has_nothing_of_them(index):
    core = json.loads(Payload(index, "T").core())
    assert core["effects"] == {}
    names = {name for name, _ in core["block_columns"] + core["rollout_columns"]} | set(
        core["columns"]
    )
    assert not {n for n in names if n.startswith(("effect", "promoted", "kl", "behind", "direct"))}


def test_a_page_names_its_reports_and_is_made_again_with_others(index, tmp_path):
    index.save(tmp_path / "features.h5")
    paths = write_all(tmp_path, index)
    given = {"input": tmp_path / "features.h5", "output": tmp_path / "page.html"}
    page = run(DashboardConfig(**given, effects=paths))
    first = page.read_bytes()
    manifest = read_manifest(page)
    assert manifest is not None
    parents = manifest.parents
    assert {"effects ablation", "effects direct", "effects attribution"} < set(parents)
    assert run(DashboardConfig(**given, effects=paths)).read_bytes() == first
    with pytest.raises(ArtifactError, match="another"):
        run(DashboardConfig(**given, effects=paths[:1]))
    assert b"onerror" in first and HOSTILE.encode() not in first


def broken(report, change):
    change(report)
    return report


def first_of(report, *path):
    for key in path:
        report = report[key]
    return report


TOKEN = ("features", 0, "promoted", 0)
TOKENS = [{"token_id": NEW_TOKEN, "token": "x", "z": 1.0}] * 9
TARGET_ONE = ("rollouts", 0, "targets", 0)
CAUSES = (*TARGET_ONE, "behind")
LIKELY = ("rollouts", 0, "likely")


@pytest.mark.parametrize(
    ("make", "change", "words"),
    [
        (ablation, lambda r: r["features"][0].update(feature=10**6), "names feature 1000000"),
        (
            ablation,
            lambda r: r["features"][3].update(kl="x"),
            r'features\[3\].kl is "x", expected a',
        ),
        (ablation, lambda r: r["features"][0].pop("kl_each"), r"features\[0\] lacks kl_each"),
        (ablation, lambda r: r["features"][0].update(color=1), "unknown key color"),
        (ablation, lambda r: r["features"].append(r["features"][0]), "twice"),
        (ablation, lambda r: r["features"][0].update(kl=-3.0), "kl is -3.0"),
        (ablation, lambda r: r["features"][0].update(kl=True), "kl is true"),
        (ablation, lambda r: r["features"][0].update(n_fired=1.5), "n_fired is 1.5"),
        (ablation, lambda r: r["features"][0].update(kl_interval=[1, 2, 3]), "a list of 2"),
        (ablation, lambda r: r.pop("floor"), "lacks floor"),
        (ablation, lambda r: r["floor"].update(rounding=None), "floor.rounding is null"),
        (direct, lambda r: first_of(r, *TOKEN).update(token_id=5_000_000), "vocabulary"),
        (direct, lambda r: r["features"][0]["promoted"].extend(TOKENS), "names 11 tokens"),
        (direct, lambda r: r["vocabulary"].update({"7": "zz"}), "vocabulary"),
        (direct, lambda r: r["vocabulary"].update({"-7": "00"}), "vocabulary"),
        (direct, lambda r: r["features"].pop(), "has 149 features"),
        (direct, lambda r: r["features"][0].update(share=7), "share is 7, expected"),
        (direct, lambda r: r.update(n_tokens=10**11), "n_tokens is 100000000000"),
        (direct, lambda r: first_of(r, *TOKEN).update(z=1e300), r"promoted\[0\].z is 1e\+300"),
        (attribution, lambda r: first_of(r, *TARGET_ONE).update(token=10**6), "a position"),
        (attribution, lambda r: first_of(r, *CAUSES).append([-1, 1, 0, 0]), r"\[2\]\[0\] is -1"),
        (attribution, lambda r: first_of(r, *CAUSES).append([999, 1, 0, 0]), "names feature 999"),
        (attribution, lambda r: first_of(r, *TARGET_ONE).pop("bias"), "lacks bias"),
        (attribution, lambda r: r.update(target="<b>"), "target is"),
        (attribution, lambda r: r["completeness"].update(gap="much"), "completeness.gap"),
        (attribution, lambda r: r["rollouts"].append(r["rollouts"][0]), "twice"),
        (attribution, lambda r: r["rollouts"][0]["kl"].append(0.1), "tokens of rollout"),
        (attribution, lambda r: first_of(r, *LIKELY)["count"].append(1), "likely tokens of roll"),
        (attribution, lambda r: first_of(r, *LIKELY)["base"].pop(), "likely tokens of rollout"),
        (attribution, lambda r: first_of(r, *LIKELY)["token_id"].__setitem__(0, 8), "a likely tok"),
        (attribution, lambda r: r["vocabulary"].update({"7": "zz"}), "vocabulary"),
    ],
)
def test_a_report_that_is_not_what_it_says_is_one_line(index, tmp_path, make, change, words):
    report = broken(make(index), change)
    path = write(tmp_path / "report.json", make.__name__, index, report)
    with pytest.raises(ArtifactError, match=words) as caught:
        Reports.open([path], index, Path("features.h5"))
    assert "\n" not in str(caught.value)


def test_a_report_of_another_sae_a_second_one_and_other_kinds_are_refused(index, tmp_path):
    source = Path("features.h5")
    other = small_index()
    strange = write(tmp_path / "other.json", "ablation", other, ablation(index))
    data = json.loads(strange.read_text())
    assert data["metadata"]["lorascope"]["parents"] != index.manifest.parents
    with pytest.raises(ArtifactError, match="another SAE"):
        Reports.open([strange], index, source)
    one = write(tmp_path / "one.json", "direct", index, direct(index))
    two = write(tmp_path / "two.json", "direct", index, direct(index))
    with pytest.raises(ArtifactError, match="second report"):
        Reports.open([one, two], index, source)
    steering = write(tmp_path / "steering.json", "steering", index, {})
    with pytest.raises(ArtifactError, match="kind steering, expected evaluation, ablation"):
        Reports.open([steering], index, source)
    one.write_text(one.read_text().replace("0.625", "0.626"))
    with pytest.raises(ArtifactError, match="one.json"):
        Reports.open([one], index, source)


def test_damaged_files_are_one_line(index, tmp_path):
    path = write(tmp_path / "report.json", "ablation", index, ablation(index))
    good = json.loads(path.read_text())
    for change in (
        lambda d: d["metadata"]["lorascope"].pop("content"),
        lambda d: d["metadata"]["lorascope"].update(parents=[]),
        lambda d: d["metadata"]["lorascope"].update(schema=99),
        lambda d: d["floor"].update(rounding=float("nan")),
    ):
        data = json.loads(json.dumps(good))
        change(data)
        path.write_text(json.dumps(data))
        with pytest.raises(ArtifactError) as caught:
            Reports.open([path], index, Path("features.h5"))
        assert "\n" not in str(caught.value)


def test_tokens_of_another_tokenizer_are_refused(index, tmp_path):
    report = direct(index)
    known = min(int(i) for i in report["vocabulary"])
    report["vocabulary"][str(known)] = b"another".hex()
    path = write(tmp_path / "direct.json", "direct", index, report)
    with pytest.raises(ArtifactError, match="another one in the index"):
        Reports.open([path], index, Path("features.h5"))


def test_an_index_that_names_no_store_takes_an_attribution(tmp_path):
    index = small_index()
    assert "activations" not in index.manifest.parents
    path = write(tmp_path / "attribution.json", "attribution", index, attribution(index))
    assert Reports.open([path], index, Path("features.h5")).about()


@pytest.mark.slow
def test_a_page_with_a_changed_report_of_the_same_name_is_another_page(index, tmp_path):
    index.save(tmp_path / "features.h5")
    given = {"input": tmp_path / "features.h5", "output": tmp_path / "page.html"}
    pages = []
    for n in (5, 6):
        (tmp_path / str(n)).mkdir()
        report = {**ablation(index), "n_rollouts": n}
        path = write(tmp_path / str(n) / "r.json", "ablation", index, report)
        pages.append(DashboardConfig(**given, effects=(path,)))
    run(pages[0])
    with pytest.raises(ArtifactError, match="another"):
        run(pages[1])
