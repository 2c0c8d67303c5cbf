"""Effects on the page: the numbers of the reports, read back in a browser."""

import csv
import json
from typing import Any

import numpy as np
import pytest
from builders.effect_reports import HOSTILE, ablation, attribution, direct, write, write_all
from builders.indexes import synthetic

from lorascope.causal.effect_options import AttributeConfig
from lorascope.config import flag_of
from lorascope.dashboard.overview import overview_of
from lorascope.dashboard.reports import Reports


@pytest.fixture(scope="module")
def index():
    return synthetic(150, 3, 4, n_texts=4, n_rollouts=20, n_layers=2)


def number(shown: Any, name: str) -> float:
    return float(shown.part(name).get_attribute("data-value"))


def scores(shown: Any, name: str) -> list[tuple[str, float]]:
    rows = shown.part(name).evaluate_all(
        """lists => lists.flatMap(list => [...list.querySelectorAll("li")].map(row =>
          [row.querySelector(".ranked-token").textContent,
           row.querySelector(".meter-value").dataset.value]))"""
    )
    return [(text, float(value)) for text, value in rows]


def test_the_effect_of_removing_a_feature_is_shown_with_its_control(show: Any, index, tmp_path):
    shown = show(index, "#/feature/3", effects=write_all(tmp_path, index))
    one = ablation(index)["features"][3]
    shown.page.wait_for_selector("[data-testid=effect]")
    for name, key in (
        ("kl", "kl"),
        ("per-firing", "kl_each"),
        ("ce", "ce_rise"),
        ("control", "kl_control"),
    ):
        assert number(shown, f"effect-{name}") == pytest.approx(one[key], rel=1e-6)
    assert number(shown, "stat-effect") == pytest.approx(one["kl"], rel=1e-6)
    assert "25" in shown.text("effect-at-firing")
    assert "tokens of text" in shown.text("effect")
    assert "held-out rollouts" in shown.text("effect")
    said = shown.text("effect-verdict")
    assert said.startswith("Specific: at each firing") and f"{len(index) - 3} features" in said
    dots = shown.part("effect").locator("circle")
    places = [float(dots.nth(i).get_attribute("cx")) for i in range(3)]
    assert places[1] < places[0] < places[2]  # the control is half as large, the adapter larger
    assert places[2] - places[1] > 100  # the axis spans the values, not the floor far below them
    assert "numerical noise level, 3.00e-12" in shown.text("effect")
    reports = Reports.open([tmp_path / "ablation.json"], index, tmp_path)
    top = overview_of(index, reports).features[0]
    shown.page.evaluate(f"location.hash = '#/feature/{top.feature}'")
    shown.wait_for(top.feature)
    assert number(shown, "effect-share") == pytest.approx(top.effect, rel=1e-6)


@pytest.mark.slow
def test_a_feature_without_a_measured_effect_says_why(show: Any, index, tmp_path):
    paths = write_all(tmp_path, index)
    shown = show(index, f"#/feature/{len(index) - 1}", effects=paths)
    shown.page.wait_for_selector("[data-testid=effect]")
    assert "Not measured" in shown.text("effect")
    shown = show(index, "#/feature/4", effects=paths)
    shown.page.wait_for_selector("[data-testid=effect]")
    assert shown.text("effect-verdict").startswith("Not distinguishable")
    assert "estimated from gradients" in shown.text("effect")
    shown = show(index, "#/feature/1", effects=paths)
    shown.page.wait_for_selector("[data-testid=direct]")
    assert "no direct effect" in shown.text("direct")
    assert "never fires" in shown.text("effect")


@pytest.mark.slow
def test_promoted_and_suppressed_tokens_are_shown_as_text(show: Any, index, tmp_path):
    shown = show(index, "#/feature/2", effects=write_all(tmp_path, index))
    shown.page.wait_for_selector("[data-testid=promoted]")
    entry = direct(index)["features"][2]
    for side in ("promoted", "suppressed"):
        expected = [(t["token"], t["z"]) for t in entry[side]]
        assert scores(shown, side) == expected
    assert HOSTILE in shown.text("promoted")
    assert shown.page.locator("img").count() == 0
    assert number(shown, "direct-share") == 0.625


def is_template(index, one) -> bool:
    return index.stats(one["feature"]).is_template


def first_rows(shown: Any, n: int) -> list[int]:
    shown.page.evaluate("document.getElementById('list').scrollTop = 0")
    shown.page.wait_for_selector("[data-testid=row][aria-posinset='1']")
    rows = shown.part("row").evaluate_all(
        "rows => rows.map(r => [Number(r.ariaPosInSet), Number(r.dataset.feature)])"
    )
    return [feature for _, feature in sorted(rows)][:n]


def test_the_list_begins_with_specific_effects_and_ranks_template_features_if_asked(
    show: Any, index, tmp_path
):
    shown = show(index, effects=write_all(tmp_path, index))
    entries = [one for one in ablation(index)["features"] if index.alive[one["feature"]]]
    order = ("specific", "not distinguishable", "too few firings")

    def ranked(entries):
        keys = [(order.index(one["verdict"]), -one["kl"], one["feature"]) for one in entries]
        return [feature for *_, feature in sorted(keys)]

    of_text = ranked([one for one in entries if not is_template(index, one)])
    assert len(of_text) < len(entries)
    assert first_rows(shown, 6) == of_text[:6]
    shown.wait_for(of_text[0])
    first = shown.page.locator(f"[data-testid=row][data-feature='{of_text[0]}']")
    assert "specific" in first.locator(".row-badge").text_content()
    assert shown.part("clear").is_hidden()
    shown.part("rank-template").check()
    assert first_rows(shown, 6) == ranked(entries)[:6]
    shown.page.wait_for_url("**ranked=1")
    shown.part("clear").click()
    assert first_rows(shown, 6) == of_text[:6]
    template = next(one["feature"] for one in entries if is_template(index, one))
    shown.part("goto").fill(str(template))
    shown.press("Enter")
    row = shown.page.locator(f"[data-testid=row][data-feature='{template}']")
    assert row.locator(".row-badge").text_content() == "template"


@pytest.mark.slow
def test_the_list_sorts_by_effect_and_the_address_keeps_it(show: Any, index, tmp_path):
    paths = write_all(tmp_path, index)
    shown = show(index, "#/feature/0?dead=1&sort=effect", effects=paths)
    entries = [one for one in ablation(index)["features"] if not is_template(index, one)]
    best = sorted(entries, key=lambda one: (-one["kl"], one["feature"]))[:5]
    assert shown.page.locator("#sort").input_value() == "effect"
    assert first_rows(shown, 5) == [one["feature"] for one in best]
    shown = show(index, "#/feature/3?sort=specific", effects=paths)
    assert int(shown.part("row").nth(0).get_attribute("data-feature")) == 3
    shown = show(index, "#/feature/0")
    assert shown.page.locator("#sort option[value=effect]").count() == 0


def test_a_rollout_is_coloured_by_kl_between_adapter_and_base(show: Any, index, tmp_path):
    rollout = int(index.text_rollout[0])
    shown = show(index, f"#/rollout/{rollout}", effects=write_all(tmp_path, index))
    shown.page.wait_for_selector("[data-testid=largest-kl]")
    text = attribution(index)["rollouts"][0]
    tokens = shown.part("rollout-text").get_by_test_id("token")
    found = tokens.evaluate_all("ts => ts.map(t => [t.dataset.kl, t.className])")
    assert len(found) == len(text["kl"])
    levels = []
    for kl, (value, name) in zip(text["kl"][1:], found[1:], strict=True):
        assert float(value) == pytest.approx(kl, rel=1 / 250)
        level = [int(word[5:]) for word in name.split() if word.startswith("heat-")]
        assert bool(level) == (float(value) >= 0.001)
        levels.append((kl, level[0] if level else 0))
    ranked = [level for _, level in sorted(levels)]
    assert ranked == sorted(ranked) and ranked[-1] == 9
    chips = shown.part("rollout-row").first.locator(".chip").all_text_contents()
    assert "explained predictions" in chips
    assert shown.part("rollout-row").locator("text=explained predictions").count() == len(
        attribution(index)["rollouts"]
    )
    roles = [index.content["roles"][role] for role in index.text_role[: len(text["kl"])]]
    for choice, is_listed in (
        ("what the model writes", lambda role: role not in ("user", "system")),
        ("all tokens", lambda role: True),
    ):
        shown.part("kl-role").select_option(choice)
        kept = [kl for kl, role in zip(text["kl"], roles, strict=True) if kl and is_listed(role)]
        values = (
            shown.part("kl-token")
            .locator(".meter-value")
            .evaluate_all("all => all.map(one => Number(one.dataset.value))")
        )
        assert values == pytest.approx(sorted(kept, reverse=True)[:10], rel=1 / 250)
    shown.page.locator("[data-testid=paint-number]").fill("0")
    shown.press("Enter")
    assert shown.part("kl-legend").count() == 0
    assert tokens.nth(1).get_attribute("data-kl") is None


@pytest.mark.slow
def test_contributions_to_a_prediction_are_listed_when_its_token_is_selected(
    show: Any, index, tmp_path
):
    rollout = int(index.text_rollout[0])
    text = attribution(index)["rollouts"][0]
    one = max(text["targets"], key=lambda target: target["adapter"])
    address = f"#/rollout/{rollout}?token={one['token']}"
    shown = show(index, address, effects=write_all(tmp_path, index))
    shown.page.wait_for_selector("[data-testid=contribution]")
    rows = shown.part("contribution").evaluate_all(
        """rows => rows.map(row => [Number(row.querySelector("a").dataset.feature),
          Number(row.querySelector(".meter-value").dataset.value)])"""
    )
    assert [feature for feature, _ in rows] == [pair[0] for pair in one["behind"]]
    np.testing.assert_allclose([v for _, v in rows], [p[1] for p in one["behind"]], rtol=1 / 250)
    for name in ("features", "bias", "unexplained", "special"):
        assert number(shown, f"contribution-{name}") == pytest.approx(one[name], rel=1e-5)
    assert number(shown, "token-kl") == pytest.approx(one["adapter"], rel=1 / 250)
    shown.part("contribution").nth(0).locator("a").focus()  # by keyboard as by pointer
    marked = shown.page.locator(".token.source")
    assert int(marked.get_attribute("data-at")) == one["behind"][0][2]
    shown.part("contribution").nth(1).locator("a").focus()
    assert int(marked.get_attribute("data-at")) == one["behind"][1][2]


@pytest.mark.slow
def test_a_switch_says_what_colours_a_rollout(show: Any, index, tmp_path):
    rollout = int(index.text_rollout[0])
    shown = show(index, f"#/rollout/{rollout}?token=2", effects=write_all(tmp_path, index))
    shown.page.wait_for_selector(".token.selected")
    tokens = shown.part("rollout-text").get_by_test_id("token")
    pressed = shown.page.locator(".color-choice [aria-pressed=true]")
    assert pressed.text_content() == "where adapter and base differ"
    shown.part("color-fires").click()
    codes = slice(*index.text_code_offset[2:4].tolist())
    largest = np.nan_to_num(index.latent_max)
    fires = np.flatnonzero(np.diff(index.special_offset))
    first = index.special_value[index.special_offset[fires]]
    largest[fires] = np.maximum(largest[fires], first)
    shares = index.text_value[codes] / largest[index.text_latent[codes]]
    share = float(tokens.nth(2).get_attribute("data-share"))
    assert share == pytest.approx(min(1, shares.max(initial=0)), rel=1 / 250)
    assert shown.part("kl-legend").count() == 0 and shown.part("share-legend").count() == 1
    shown.page.wait_for_url("**token=2&color=fires")
    shown.page.reload()
    shown.page.wait_for_selector(".token.selected")
    assert pressed.text_content() == "what fires"
    shown.part("color-paint").focus()
    shown.press("Enter")  # begins with the strongest at the selected token
    best = int(index.text_latent[codes][shares.argmax()]) if len(shares) else None
    if best is not None:
        assert shown.part("painted").locator("a").get_attribute("data-feature") == str(best)
    assert shown.page.evaluate("document.activeElement.dataset.testid") == "color-paint"
    shown.part("color-kl").click()
    assert shown.part("painted").count() == 0 and shown.part("kl-legend").count() == 1


def test_a_token_shows_what_both_models_predict_and_the_command_that_explains_it(
    show: Any, index, tmp_path
):
    rollout = int(index.text_rollout[0])
    shown = show(index, f"#/rollout/{rollout}", effects=write_all(tmp_path, index))
    shown.page.wait_for_selector("[data-testid=largest-kl]")
    tokens = shown.part("rollout-text").get_by_test_id("token")
    own = tokens.nth(2).text_content()
    assert shown.part("kl-top").count() <= 1
    tokens.nth(2).hover()
    tip = shown.part("tooltip")
    said = {
        who: tip.get_by_test_id(f"predicted-{who}").text_content() for who in ("base", "adapter")
    }
    assert said == {
        "base": f"base{own}90\u00a0%",
        "adapter": f"adapter{HOSTILE}75\u00a0%{own}25\u00a0%",
    }
    assert shown.page.locator("img").count() == 0
    explained = [one["token"] for one in attribution(index)["rollouts"][0]["targets"]]
    for token in (2, next(t for t in range(3, 9) if t not in explained)):
        tokens.nth(token).click()
        if token in explained:
            assert shown.part("attribute-command").count() == 0
            continue
        words = shown.text("attribute-command").split()
        assert words[:2] == ["lorascope", "attribute"]
        given = dict(zip(words[2::2], words[3::2], strict=True))
        assert (given["--rollouts"], given["--positions"]) == (str(rollout), str(token))
        assert {flag_of(name) for name in AttributeConfig.names()} >= given.keys()
    tokens.nth(0).click()
    assert "Nothing predicts the first token" in shown.text("contributions")


@pytest.mark.slow
def test_tokens_with_the_largest_kl_are_listed_and_lead_to_their_place(show: Any, index, tmp_path):
    rollout = int(index.text_rollout[0])
    shown = show(index, f"#/rollout/{rollout}", effects=write_all(tmp_path, index))
    shown.page.wait_for_selector("[data-testid=kl-token]")
    text = attribution(index)["rollouts"][0]
    special = index.content["roles"].index("special")
    roles = index.text_role[slice(*index.text_offset[:2])]
    order = [t for t in range(1, len(text["kl"])) if roles[t] != special]
    order.sort(key=lambda t: -text["kl"][t])
    places = shown.part("kl-token").evaluate_all("bs => bs.map(b => Number(b.dataset.at))")
    assert places[:3] == order[:3]
    shown.part("kl-token").nth(0).focus()
    shown.press("Enter")
    pinned = shown.page.locator(".token.selected")
    assert int(pinned.get_attribute("data-at")) == places[0]
    assert shown.part("contributions").count() == 1
    address = f"#/rollout/{rollout}?token={places[0]}"
    shown.page.wait_for_function("hash => location.hash === hash", arg=address)


@pytest.mark.slow
def test_a_rollout_without_an_attribution_shows_no_kl(show: Any, index, tmp_path):
    report = attribution(index)
    gone = report["rollouts"].pop(1)["rollout"]
    path = write(tmp_path / "attribution.json", "attribution", index, report)
    shown = show(index, f"#/rollout/{gone}", effects=(path,))
    shown.page.wait_for_selector("[data-testid=firing-panel]")
    assert shown.part("largest-kl").count() == 0
    assert shown.part("kl-legend").count() == 0


@pytest.mark.slow
def test_the_saved_table_has_the_effects(show: Any, index, tmp_path):
    shown = show(index, "#/feature/0?dead=1&sort=id", effects=write_all(tmp_path, index))
    with shown.page.expect_download() as download:
        shown.part("save-table").click()
    with download.value.path().open(newline="") as file:
        cells = list(csv.DictReader(file))[3]
    one = ablation(index)["features"][3]
    assert float(cells["kl"]) == pytest.approx(one["kl"], rel=1e-6)
    assert float(cells["kl_control"]) == pytest.approx(one["kl_control"], rel=1e-6)
    assert float(cells["pull"]) == pytest.approx(one["pull"], rel=1e-6)
    assert json.loads(cells["direct_share"]) == 0.625
    told = direct(index)["features"][3]
    for side in ("promoted", "suppressed"):
        assert cells[side] == " | ".join(token["token"] for token in told[side])
