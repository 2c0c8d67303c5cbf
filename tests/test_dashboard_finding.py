"""Finding features: search, filters, sorting, and the address that keeps them."""

from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
from builders.indexes import example, full_index, index_of

TOKENS = {1: b" the", 2: b" def", 3: b" ma", 4: b"in", 5: b"Zebra", 6: b"<|im_end|>"}


def few_features() -> Any:
    """Latent 0 fires on ` def` before ` main`, 1 on `in`, 2 on ` the` after `Zebra`, 3 never."""
    return index_of(
        [
            [example(3.0, 9, [1, 2, 3, 4], 1, also=[2])],
            [example(1.0, 19, [3, 4, 1], 1), example(0.5, 29, [1, 4], 1)],
            [example(2.0, 39, [5, 1], 1)],
            [],
        ],
        TOKENS,
    )


def listed(shown: Any) -> list[int]:
    """The features in the list, in order, after the search has ended."""
    shown.page.wait_for_selector("[data-testid=list]:not([aria-busy=true])")
    return shown.part("row").evaluate_all(
        "rows => rows.sort((a, b) => a.offsetTop - b.offsetTop).map(r => Number(r.dataset.feature))"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "fires", "context"),
    [
        ("the", [2], [0, 1, 2]),
        ("DEF", [0], [0]),
        ("zebra", [], [2]),
        ("def main", [0], [0]),
        ("f ma", [0], [0]),
        ("main", [0, 1], [0, 1]),
        ("main the", [1], [1]),
        ("nowhere", [], []),
    ],
)
def test_a_search_finds_tokens_and_phrases(
    show: Any, words: str, fires: list[int], context: list[int]
):
    shown = show(few_features())
    shown.part("search").fill(words)
    shown.wait_listed(fires)
    shown.part("search-in").select_option("context")
    shown.wait_listed(context)


def test_search_results_appear_while_typing_and_letters_trigger_no_keys(show: Any):
    shown = show(few_features())
    shown.press("/")
    assert shown.page.evaluate("document.activeElement.dataset.testid") == "search"
    shown.page.keyboard.type("the")
    shown.wait_listed([2])
    shown.wait_for(2)
    assert shown.page.locator("html").get_attribute("data-theme") == "light"
    shown.press("Escape", "c")
    shown.wait_listed([0, 1, 2])


def test_a_search_finds_a_number_and_a_label(show: Any):
    shown = show(few_features())
    shown.part("label").fill("Opening of Functions")
    shown.part("search").fill("1")
    shown.wait_listed([1])
    shown.part("search").fill("functions")
    shown.wait_listed([0])
    shown.part("search").fill("functions open")
    shown.wait_listed([0])
    shown.part("search").fill("functions closed")
    shown.wait_listed([])


def test_what_was_searched_is_marked_in_the_examples_over_tokens(show: Any):
    shown = show(few_features())
    shown.part("search").fill("EF MA")
    shown.wait_listed([0])
    shown.page.wait_for_function(
        """() => [...CSS.highlights.get("found")].map(String).join() === "ef ma" """
    )
    shown.part("search").fill("(")
    shown.wait_listed([])
    shown.part("clear").click()
    assert shown.page.evaluate("CSS.highlights.get('found').size") == 0


@pytest.mark.slow
def test_a_link_with_an_order_opens_the_map_and_keeps_it(show: Any):
    shown = show(full_index(), "#/feature/1")
    shown.page.evaluate("location.hash = '#/map?sort=max'")
    shown.page.wait_for_selector("body[data-view=map]")
    shown.page.wait_for_timeout(300)  # an address that is amended comes late
    assert shown.page.evaluate("location.hash") == "#/map?sort=max"
    assert shown.page.locator("body").get_attribute("data-view") == "map"
    assert shown.part("sort").input_value() == "max"


@pytest.mark.slow
def test_the_list_has_room_on_a_small_screen_with_all_filters_open(show: Any):
    shown = show(full_index())
    shown.page.set_viewport_size({"width": 1366, "height": 768})
    shown.part("more-filters").click()
    shown.page.evaluate("scrollTo(0, 999)")
    box = shown.part("list").bounding_box()
    assert box["height"] >= 300
    assert min(768, box["y"] + box["height"]) - box["y"] >= 240


def test_a_search_without_results_says_so_and_can_be_cleared(show: Any):
    shown = show(few_features())
    shown.part("search").fill("nowhere")
    shown.wait_listed([])
    assert "No feature matches" in shown.text("message")
    shown.part("clear").click()
    shown.wait_listed([0, 1, 2])
    shown.wait_for(0)


@pytest.mark.slow
def test_each_filter_matches_the_index(show: Any):
    index = full_index()
    shown = show(index)
    shown.part("more-filters").click()
    content, sites = index.content, index.manifest.columns.sites
    density = 100 * (index.latent_n_active / content["n_eligible"])
    alive = index.alive
    by_role = index.latent_by_role / np.maximum(content["n_by_role"], 1)
    by_role[:, content["roles"].index("special")] = 2 * (
        index.latent_n_special > index.latent_n_active
    )
    role = content["roles"].index("think")
    site = index.latent_fingerprint.argmax(axis=1)
    layer = np.array([s.layer for s in sites])[site]
    projection = np.array([s.projection for s in sites])[site]
    middle = float(np.median(density[alive]))
    largest = float(np.median(index.latent_max[alive]))
    cases = {
        "density-min": (f"{middle}", density >= middle),
        "density-max": (f"{middle}", density <= middle),
        "max-min": (f"{largest}", index.latent_max >= largest),
        "max-max": (f"{largest}", index.latent_max <= largest),
        "examples-min": ("5", index.n_examples >= 5),
        "stability-min": ("0.8", index.latent_stability >= 0.8),
        "role": ("think", by_role.argmax(axis=1) == role),
        "layer": ("2", layer == 2),
        "projection": ("q_proj", projection == "q_proj"),
    }
    for name, (value, passes) in cases.items():
        control = shown.part(name)
        if control.evaluate("node => node.tagName") == "SELECT":
            control.select_option(value)
        else:
            control.fill(value)
        n = int((passes & alive).sum())
        assert 0 < n < alive.sum(), name
        text = f"{n} feature{'' if n == 1 else 's'} "
        shown.page.wait_for_function(
            "text => document.getElementById('list-count').textContent.startsWith(text)", arg=text
        )
        shown.part("clear").click()
    shown.part("only-template").check()
    template = [latent for latent in range(len(index)) if index.stats(latent).is_template]
    assert {index.n_examples[latent] > 0 for latent in template} == {False, True}
    shown.wait_listed(template)
    shown.part("search").fill("<|im_start|>")
    shown.wait_listed(template)


def test_filters_are_kept_in_the_address(show: Any):
    shown = show(few_features(), "#/feature/1?sort=max&in=context&q=the")
    shown.wait_for(1)
    shown.wait_listed([0, 2, 1])
    assert shown.part("search").input_value() == "the"
    shown.part("sort").select_option("often")
    shown.wait_listed([1, 0, 2])
    shown.page.wait_for_url("**sort=often**")
    found = parse_qs(shown.page.url.partition("?")[2])
    assert found == {"sort": ["often"], "in": ["context"], "q": ["the"]}
    shown.page.evaluate("location.hash = '#/feature/2'")
    shown.wait_for(2)
    assert shown.part("search").input_value() == "the"


@pytest.mark.parametrize(
    "query", ["sort=%3Cb%3E&role=x", "q=%", "dmin=many", "__proto__=1", "full=yes"]
)
def test_invalid_filters_in_an_address_are_ignored(show: Any, query: str):
    shown = show(few_features(), f"#/feature/1?{query}")
    shown.wait_for(1)
    assert set(listed(shown)) <= {0, 1, 2}


def test_sorting_by_stability_puts_unknown_values_last(show: Any):
    index = few_features()
    index.latent_stability[:] = [0.5, 0.75, np.nan, np.nan]
    shown = show(index)
    shown.part("sort").select_option("stable")
    shown.wait_listed([1, 0, 2])
