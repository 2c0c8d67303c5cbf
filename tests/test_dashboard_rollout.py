"""Whole rollouts: the list, the tokens, and what fires at each token."""

import re
from typing import Any

import numpy as np
import pytest
from builders.indexes import example, full_index, index_of, small_index


def wait_for_rollout(shown: Any, rollout: int) -> None:
    shown.page.wait_for_selector(f"[data-testid=rollout-view][data-rollout='{rollout}']")
    assert shown.text("heading") == f"Rollout {rollout:,}"


def fired(shown: Any) -> list[tuple[int, float]]:
    """Features and values in the panel."""
    return [
        (int(row[0]), float(row[1]))
        for row in shown.part("fired").evaluate_all(
            """rows => rows.map(row => [row.querySelector("a").dataset.feature,
              row.querySelector(".meter-value").dataset.value])"""
        )
    ]


def test_a_rollout_is_shown_with_its_roles_and_statistics(show: Any):
    shown = show(small_index(), "#/rollout/7")
    wait_for_rollout(shown, 7)
    tokens = shown.part("rollout-text").get_by_test_id("token")
    assert tokens.all_text_contents() == [" the", "é", "<|im_end|>"]
    for name, value in (("length", 3), ("l0", 1), ("fvu", 0.25), ("rarity", 0.5)):
        assert float(shown.part(f"rollout-{name}").get_attribute("data-value")) == value
    index = full_index()
    shown = show(index, "#/rollout")
    wait_for_rollout(shown, int(index.text_rollout[0]))
    shown.page.wait_for_selector("[data-testid=rollout-text] .role")
    roles = shown.part("rollout-text").locator(".role").all_text_contents()
    first = slice(*index.text_offset[:2])
    names = [index.content["roles"][role] for role in index.text_role[first]]
    assert next(role for role in names if role != "special") == roles[0]
    assert set(roles) == set(names) - {"special"}


def test_a_token_shows_what_fires_there_on_hover_click_and_enter(show: Any):
    shown = show(small_index(), "#/rollout/7")
    wait_for_rollout(shown, 7)
    tokens = shown.part("rollout-text").get_by_test_id("token")
    tokens.nth(0).hover()
    assert "feature 0: 0.5" in shown.text("tooltip")
    assert "feature 3: 0.25" in shown.text("tooltip")
    tokens.nth(1).click()
    assert fired(shown) == [(0, 1.0)]
    tokens.nth(0).focus()
    shown.press("Enter")
    assert fired(shown) == [(0, 0.5), (3, 0.25)]
    shown.press("ArrowRight", "ArrowRight", " ")
    assert fired(shown) == []
    assert "0 features fire here" in shown.text("firing-panel")


def test_a_map_shows_at_which_layers_and_tokens_features_fire(show: Any):
    index = full_index()
    shown = show(index, "#/rollout")
    wait_for_rollout(shown, int(index.text_rollout[0]))
    layout, first = index.manifest.layout, slice(*index.text_offset[:2])
    expected = {
        (layout.sites[index.main_site[latent]].layer, t)
        for t, row in enumerate(range(first.start, first.stop))
        for latent in index.text_latent[slice(*index.text_code_offset[row : row + 2])].tolist()
    }
    cells = shown.part("layer-map").locator("[data-at]")
    drawn = {
        tuple(map(int, re.findall(r"\d+", tip)))
        for tip in cells.evaluate_all("cells => cells.map(cell => cell.dataset.tip)")
    }
    assert drawn == expected
    at = cells.nth(1).get_attribute("data-at")
    cells.nth(1).click()
    assert shown.page.locator(".token.selected").get_attribute("data-at") == at


def test_the_codes_of_every_token_match_the_index(show: Any):
    index = full_index()
    rollout = int(index.text_rollout[1])
    shown = show(index, f"#/rollout/{rollout}")
    wait_for_rollout(shown, rollout)
    first = int(index.text_offset[1])
    counts = np.diff(index.text_code_offset[first : int(index.text_offset[2]) + 1])
    for t in np.argsort(-counts)[:3].tolist():
        shown.part("rollout-text").get_by_test_id("token").nth(t).click()
        codes = slice(*index.text_code_offset[first + t : first + t + 2].tolist())
        found = dict(fired(shown))
        assert sorted(found) == sorted(index.text_latent[codes].tolist())
        expected = [index.text_value[codes][index.text_latent[codes] == i][0] for i in found]
        np.testing.assert_allclose(list(found.values()), expected, rtol=1 / 256)


@pytest.mark.slow
def test_features_are_highlighted_by_mouse_keyboard_and_address(show: Any):
    shown = show(small_index(), "#/rollout/7")
    wait_for_rollout(shown, 7)

    def classes() -> list[str]:
        nodes = shown.part("rollout-text").get_by_test_id("token")
        return nodes.evaluate_all(
            "nodes => nodes.map(n => /(heat|paint)-\\d/.exec(n.className)?.[0] ?? '')"
        )

    assert classes() == ["heat-2", "heat-4", ""]  # by the strongest of what fires
    shown.page.get_by_role("button", name="Highlight feature 0").click()
    assert classes() == ["heat-2", "heat-4", ""]
    shown.page.wait_for_url("**paint=0")
    shown.part("paint-number").fill("3")
    shown.press("Enter")
    assert classes() == ["paint-1", "paint-1", ""]  # 0.5 of 2 is more than 0.25 of 1.75
    assert shown.part("painted").count() == 2
    shown.page.get_by_role("button", name="Stop highlighting feature 0").focus()
    shown.press("Enter")
    assert classes() == ["heat-2", "", ""]
    shown = show(small_index(), "#/rollout/7?token=1&paint=0,3,99999,x")
    shown.page.wait_for_selector(".selected")
    assert classes() == ["paint-1", "paint-1", ""]
    assert fired(shown) == [(0, 1.0)]


@pytest.mark.slow
def test_rollouts_are_listed_by_reason_and_found_by_search(show: Any):
    index = full_index()
    shown = show(index, "#/rollout")
    rows = shown.part("rollout-row")
    assert rows.count() == len(index.text_rollout)
    for why, measure in ((1, index.text_l0), (2, index.text_rarity), (4, index.text_fvu)):
        kept = np.flatnonzero(index.text_why & why)
        order = kept[np.argsort(-measure[kept], kind="stable")]
        shown.part("rollout-reason").select_option(str(why))
        expected = [str(i) for i in order]
        shown.page.wait_for_function(
            """wanted => JSON.stringify([...document.querySelectorAll("[data-testid=rollout-row]")]
              .map(row => row.dataset.rollout)) === JSON.stringify(wanted)""",
            arg=expected,
        )
    shown.part("rollout-reason").select_option("0")
    ids = index.text_token_id[slice(*index.text_offset[2:4])]
    words = b"".join(index.token_bytes(int(i)) for i in ids[5:12]).decode(errors="replace")
    shown.press("/")
    shown.page.keyboard.type("no such words")
    shown.page.wait_for_function(
        "() => document.querySelectorAll('[data-testid=rollout-row]').length === 0"
    )
    shown.part("rollout-search").fill(words.splitlines()[0])
    shown.page.wait_for_selector("[data-testid=rollout-row][data-rollout='2']")
    marked = shown.page.locator("[data-testid=rollout-row][data-rollout='2'] mark")
    assert marked.text_content() == re.sub(r"\s+", " ", words.splitlines()[0])
    shown.page.locator("[data-testid=rollout-row][data-rollout='2']").click()
    wait_for_rollout(shown, int(index.text_rollout[2]))
    shown.page.wait_for_selector(".selected")


@pytest.mark.slow
def test_arrow_keys_go_to_the_next_rollout_and_links_to_features(show: Any):
    index = full_index()
    shown = show(index, "#/rollout")
    wait_for_rollout(shown, int(index.text_rollout[0]))
    shown.press("ArrowRight")
    wait_for_rollout(shown, int(index.text_rollout[1]))
    shown.page.go_back()
    wait_for_rollout(shown, int(index.text_rollout[0]))
    link = shown.part("firing-panel").locator("a").first
    latent = int(link.get_attribute("data-feature"))
    link.click()
    shown.wait_for(latent)
    assert not shown.part("rollout-view").is_visible()


@pytest.mark.slow
def test_the_buttons_lead_to_the_rollouts_beside_the_one_that_is_shown(show: Any):
    index = full_index()
    first, second, *_, last = index.text_rollout.tolist()
    shown = show(index, "#/feature")  # the first one: no feature is before it
    shown.page.wait_for_selector("[data-testid=feature-view][data-feature]")
    assert shown.part("previous").is_disabled()
    shown.page.evaluate(f"location.hash = '#/rollout/{second}'")
    wait_for_rollout(shown, second)
    assert shown.part("previous").get_attribute("aria-label") == "previous rollout"
    shown.part("previous").click()
    wait_for_rollout(shown, first)
    assert shown.part("previous").is_disabled() and shown.part("next").is_enabled()
    shown.page.evaluate(f"location.hash = '#/rollout/{last}'")
    wait_for_rollout(shown, last)
    assert shown.part("next").is_disabled()
    shown.part("rollout-search").fill("no such words")
    shown.page.wait_for_selector("[data-testid=previous]:disabled")
    shown.part("rollout-search").fill("")
    shown.page.wait_for_selector("[data-testid=previous]:enabled")
    shown.page.evaluate("location.hash = '#/rollout/99999'")
    shown.part("message").wait_for()
    shown.part("previous").click()  # from a message, to an end of the list
    wait_for_rollout(shown, last)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["99", "-1", "x", "%3Cb%3E", "%"])
def test_a_link_to_a_missing_rollout_shows_a_message(show: Any, word: str):
    shown = show(small_index(), f"#/rollout/{word}")
    assert "is not in this page" in shown.text("message")
    shown.part("tab-feature").click()
    shown.wait_for(0)


def test_a_link_to_a_rollout_shows_features_in_a_page_without_rollouts(show: Any):
    shown = show(index_of([[example(1.0, 9, [1], 0)]]), "#/rollout/7")
    assert not shown.part("tab-rollout").is_visible()
    assert "There is no feature 7" in shown.text("message")
