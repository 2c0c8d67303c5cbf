"""The page in a browser: what it shows, and how users move."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from builders.indexes import TOKENS, example, full_index, index_of, small_index

from lorascope.features.index import FeatureIndex


def numbered(n: int) -> FeatureIndex:
    """`n` features of one example; numbers ending in 3 are dead, those ending in 5 have three."""
    features = []
    for i in range(n):
        count = {3: 0, 5: 3}.get(i % 10, 1)
        features.append([example(float(3 - j), 9 + j, [1, 2], 0) for j in range(count)])
    return index_of(features)


def test_the_first_feature_with_an_example_is_shown_with_exact_values(show: Any):
    index = small_index()
    shown = show(index)
    shown.wait_for(0)
    assert shown.text("title") == "T"
    assert shown.text("count") == "feature 1 of 3"
    assert shown.part("example").count() == 3
    for i, expected in enumerate(index[0].examples):
        assert shown.tokens(i) == list(expected.tokens)
        values = (
            shown.part("window")
            .nth(i)
            .get_by_test_id("token")
            .evaluate_all("nodes => nodes.map(node => parseFloat(node.dataset.value))")
        )
        assert values[expected.target] == expected.value
        largest = 2.5  # in the windows of this feature
        np.testing.assert_allclose(values, expected.activations, rtol=0, atol=largest / 32767)
        card = shown.part("example").nth(i)
        value = card.get_by_test_id("example-value").get_attribute("data-value")
        assert float(value) == expected.value
        for name, number in (("rollout", 7), ("token", expected.position), ("row", expected.row)):
            found = card.get_by_test_id(f"example-{name}").get_attribute("data-value")
            assert int(found) == number
        assert card.locator("[data-target=true]").count() == 1
    for name, number in (("n_active", 3), ("density", 0.003), ("max", 2.5), ("n_examples", 3)):
        found = shown.part(f"stat-{name}").get_attribute("data-value")
        assert float(found) == number


def test_a_tooltip_shows_a_tokens_value_on_hover_and_focus(show: Any):
    shown = show(small_index())
    target = shown.page.locator("[data-target=true]").nth(2)
    assert not shown.part("tooltip").is_visible()
    target.hover()
    assert shown.part("tooltip").is_visible()
    assert float(shown.part("tip-value").get_attribute("data-value")) == 0.30000001192092896
    assert "token id 2" in shown.text("tooltip")
    shown.page.mouse.move(0, 0)
    assert not shown.part("tooltip").is_visible()
    target.focus()
    assert shown.part("tooltip").is_visible()
    assert target.get_attribute("aria-describedby") == "tooltip"


def test_the_keyboard_walks_the_tokens_of_a_window_without_leaving_the_feature(show: Any):
    shown = show(small_index())
    keyboard = shown.page.keyboard
    for _ in range(40):
        keyboard.press("Tab")
        if shown.page.evaluate("document.activeElement.dataset.target === 'true'"):
            break
    keyboard.press("ArrowLeft")
    assert shown.page.evaluate("document.activeElement.textContent") == " the"
    keyboard.press("End")
    assert shown.page.evaluate("document.activeElement.textContent") == "\n"
    keyboard.press("ArrowRight")
    assert shown.text("heading") == "Feature 0"
    assert shown.part("tooltip").is_visible()
    keyboard.press("Escape")
    assert not shown.part("tooltip").is_visible()


def test_arrow_keys_and_buttons_go_to_the_features_with_examples(show: Any):
    shown = show(numbered(12))
    shown.wait_for(0)
    assert shown.part("previous").is_disabled()
    for expected in (1, 2, 4):
        shown.page.keyboard.press("ArrowRight")
        shown.wait_for(expected)
    shown.page.keyboard.press("ArrowLeft")
    shown.wait_for(2)
    shown.part("next").click()
    shown.wait_for(4)
    shown.part("previous").click()
    shown.wait_for(2)
    shown.page.wait_for_url("**#/feature/2")
    assert shown.text("count") == "feature 3 of 11"
    for _ in range(20):
        shown.page.keyboard.press("ArrowRight")
    shown.wait_for(11)
    assert shown.part("next").is_disabled()


def test_arrow_keys_do_nothing_while_typing_or_with_a_modifier(show: Any):
    shown = show(numbered(12))
    shown.part("goto").focus()
    shown.page.keyboard.press("ArrowRight")
    shown.part("sort").focus()
    shown.page.keyboard.press("ArrowRight")
    shown.page.keyboard.press("ArrowLeft")
    shown.part("heading").focus()
    for key in ("Control+ArrowRight", "Shift+ArrowRight", "Meta+ArrowRight"):
        shown.page.keyboard.press(key)
    assert shown.text("heading") == "Feature 0"


def test_a_checkbox_does_not_catch_the_arrow_keys(show: Any):
    shown = show(numbered(12))
    shown.part("only-full").check()
    shown.wait_for(5)
    shown.part("only-full").uncheck()
    shown.page.keyboard.press("ArrowRight")
    shown.wait_for(6)


def test_a_feature_is_chosen_by_its_number(show: Any):
    shown = show(numbered(12))
    shown.part("goto").fill("7")
    shown.page.keyboard.press("Enter")
    shown.wait_for(7)
    shown.part("goto").fill("#8")
    shown.part("goto-button").click()
    shown.wait_for(8)
    shown.page.go_back()
    shown.wait_for(7)


def test_a_feature_is_chosen_from_the_list_by_mouse_and_by_keyboard(show: Any):
    shown = show(numbered(300))
    shown.page.locator("[data-testid=row][data-feature='2']").click()
    shown.wait_for(2)
    shown.part("list").focus()
    shown.page.keyboard.press("ArrowDown")
    shown.wait_for(4)
    shown.page.keyboard.press("End")
    shown.wait_for(299)
    row = shown.page.locator("[data-testid=row][data-feature='299']")
    assert row.is_visible()
    assert row.get_attribute("aria-selected") == "true"
    assert shown.part("list").get_attribute("aria-activedescendant") == "row-299"
    assert shown.part("row").count() < 60
    shown.page.keyboard.press("Home")
    shown.wait_for(0)


def test_features_of_later_blocks_are_decoded_when_they_are_shown(show: Any):
    index = numbered(300)
    shown = show(index, "#/feature/255")
    shown.wait_for(255)
    assert shown.part("example").count() == 3
    assert shown.tokens() == list(index[255].examples[0].tokens)


def test_only_full_examples_keeps_the_features_with_top_k_examples(show: Any):
    shown = show(numbered(40))
    shown.part("only-full").check()
    shown.wait_for(5)
    assert shown.text("count") == "feature 1 of 4"
    shown.part("next").click()
    shown.wait_for(15)
    shown.part("only-full").uncheck()
    assert shown.text("count") == "feature 14 of 36"
    assert shown.text("heading") == "Feature 15"


def test_dead_features_are_hidden_by_default(show: Any):
    shown = show(numbered(12))
    assert "11 features (1 hidden)" in shown.text("list-count")
    shown.part("show-dead").check()
    assert shown.text("list-count") == "12 features"
    shown.part("goto").fill("3")
    shown.page.keyboard.press("Enter")
    shown.wait_for(3)
    assert "Feature 3 is dead" in shown.text("no-examples")


def test_the_list_is_sorted_by_the_largest_activation(show: Any):
    features = [[example(v, 9, [1], 0)] for v in (1.0, 5.0, 3.0)]
    shown = show(index_of(features))
    shown.part("sort").select_option("max")
    order = shown.part("row").evaluate_all(
        "rows => rows.sort((a, b) => a.offsetTop - b.offsetTop).map(row => row.dataset.feature)"
    )
    assert order == ["1", "2", "0"]
    shown.wait_for(1)
    assert shown.part("row").locator(".row-note").all_text_contents() == ["5", "3", "1"]
    assert shown.part("sort").locator("option[value=stable]").count() == 0, "none has one"


def test_a_link_to_a_feature_opens_it_even_when_it_is_hidden(show: Any):
    shown = show(numbered(12), "#/feature/3")
    shown.wait_for(3)
    assert "hidden by the filters" in shown.text("count")
    shown.page.keyboard.press("ArrowRight")
    shown.wait_for(4)


@pytest.mark.parametrize("word", ["12", "99999999999999999999", "-1", "abc", "", "%3Cb%3E", "%"])
def test_a_link_to_an_unknown_feature_shows_a_message_and_arrow_keys_still_work(
    show: Any, word: str
):
    shown = show(numbered(12), f"#/feature/{word}")
    assert "There is no feature" in shown.text("message")
    assert "features 0 to 11" in shown.text("message")
    shown.page.keyboard.press("ArrowRight")
    shown.wait_for(0)


@pytest.mark.slow
def test_a_key_pressed_while_the_address_changes_is_not_undone(show: Any):
    shown = show(numbered(12))
    shown.page.evaluate(
        """addEventListener("hashchange", () => {
          const press = new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true});
          document.body.dispatchEvent(press);
        }, {capture: true, once: true})"""
    )
    shown.page.keyboard.press("ArrowRight")
    shown.page.wait_for_url("**#/feature/2")
    shown.wait_for(2)
    shown.page.evaluate("location.hash = '#/feature/1'")
    shown.wait_for(1)


def test_a_page_without_a_live_feature_says_so(show: Any):
    shown = show(index_of([[], []]))
    assert "None of the 2 features has an example" in shown.text("message")
    assert shown.part("next").is_disabled()
    shown.part("show-dead").check()
    shown.wait_for(0)


def test_a_page_without_any_feature_says_so(show: Any):
    assert "no features" in show(index_of([], {})).text("message")


def test_a_page_of_one_feature_has_no_next_feature(show: Any):
    shown = show(index_of([[example(1.0, 2, [1], 0)]]))
    shown.wait_for(0)
    assert shown.text("count") == "feature 1 of 1"
    assert shown.part("next").is_disabled()
    assert shown.part("previous").is_disabled()
    shown.page.keyboard.press("ArrowRight")
    assert shown.text("heading") == "Feature 0"


def test_no_full_feature_is_explained(show: Any):
    shown = show(index_of([[example(1.0, 2, [1], 0)]]))
    shown.part("only-full").check()
    assert "No feature has all 3 examples" in shown.text("message")
    shown.part("only-full").uncheck()
    shown.wait_for(0)


def test_whitespace_special_tokens_and_split_characters_are_marked(show: Any):
    tokens = {**TOKENS, 7: b"\t", 8: "中文".encode()[:4], 9: "中文".encode()[4:], 10: b" \n\n x"}
    tokens[11] = "\u2028\u202e\x00".encode()
    shown = show(index_of([[example(1.0, 9, [5, 7, 8, 9, 6, 10, 11], 0)]], tokens))
    window = shown.part("window")
    assert shown.tokens() == ["\n", "\t", "中文", "", "<|im_end|>", " \n\n x", "\u2028\u202e\x00"]
    marks = window.locator(".mark").evaluate_all("nodes => nodes.map(node => node.dataset.mark)")
    assert marks == ["↵", "⇥", "↵", "↵", "U+2028", "U+202E", "U+0000"]
    assert window.locator(".special").all_text_contents() == ["<|im_end|>"]
    assert window.locator(".continued").all_text_contents() == [""]
    window.get_by_test_id("token").nth(2).hover()
    assert "part of a character, bytes e4 b8 ad e6" in shown.text("tooltip")


def test_text_in_many_scripts_is_shown_unchanged(show: Any):
    text = "naïve 中文 👩\u200d👧 مرحبا e\u0301 \u200d done"
    raw = text.encode()
    pieces = {i + 1: raw[a:b] for i, (a, b) in enumerate(pairwise(range(0, len(raw) + 3, 3)))}
    shown = show(index_of([[example(1.0, 99, list(pieces), 2)]], pieces))
    assert "".join(shown.tokens()) == text


@pytest.mark.slow
def test_a_token_of_a_megabyte_is_cut_and_says_so(show: Any):
    shown = show(index_of([[example(1.0, 99, [1, 2], 1)]], {1: b"x" * 1_000_000, 2: b"y"}))
    assert [len(text) for text in shown.tokens()] == [400, 1]
    shown.part("token").first.hover()
    assert "1,000,000 characters, the first 400 shown" in shown.text("tooltip")


def test_negative_values_have_their_own_colours(show: Any):
    negative = example(1.0, 9, [1, 2, 5], 0)
    activations = [1.0, -1.0, 0.0]
    shown = show(index_of([[replace(negative, activations=activations)]]))
    classes = shown.part("token").evaluate_all("nodes => nodes.map(node => node.className)")
    assert "heat-9" in classes[0]
    assert "minus-9" in classes[1]
    assert not re.search("heat|minus", classes[2])


def luminance(color: str) -> float:
    channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_level_is_readable_and_stronger_than_the_one_before(show: Any, scheme: str):
    shown = show(small_index(), scheme=scheme)
    for ramp in ("heat", "minus"):
        found = shown.page.evaluate(
            """ramp => Array.from({length: 9}, (_, i) => {
              const node = document.createElement("i");
              node.className = `${ramp}-${i + 1}`;
              document.body.append(node);
              const style = getComputedStyle(node);
              return [style.backgroundColor, style.color];
            })""",
            ramp,
        )
        levels = [luminance(background) for background, _ in found]
        for background, ink in found:
            low, high = sorted([luminance(background), luminance(ink)])
            assert (high + 0.05) / (low + 0.05) >= 4.5
        assert levels == sorted(levels, reverse=scheme == "light")


@pytest.mark.slow
def test_the_page_fits_a_phone_and_its_list_opens_on_request(show: Any):
    shown = show(numbered(300), width=360)
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 360
    assert not shown.part("list").is_visible()
    shown.page.get_by_role("button", name="Browse list").click()
    shown.page.locator("[data-testid=row][data-feature='2']").click()
    shown.wait_for(2)


@pytest.mark.slow
@pytest.mark.parametrize("view", ["overview", "feature", "rollout"])
def test_on_paper_nothing_scrolls_or_sticks_and_every_view_prints(show: Any, view: str):
    """Chromium hangs when it prints columns with panes inside that scroll."""
    shown = show(full_index(), f"#/{view}")
    shown.page.emulate_media(media="print")
    loose = shown.page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter((one) => {
          const style = getComputedStyle(one);
          return one.checkVisibility() && (/auto|scroll/.test(style.overflowY)
            || /sticky|fixed/.test(style.position) || style.columnCount !== "auto");
        }).map((one) => one.className || one.tagName)"""
    )
    shown.page.emulate_media(media="screen")
    assert loose == []
    pages = shown.page.pdf(format="A4").count(b"/Type /Page\n")
    assert 1 <= pages <= (2 if view == "overview" else 9)
