"""The map of features: move, zoom, open and select."""

from typing import Any

import numpy as np
import pytest
from builders.indexes import full_index

from lorascope.dashboard.layout import layout
from lorascope.labels.groups import groups_of


def open_map(show: Any, address: str = "#/map") -> Any:
    shown = show(full_index(), address)
    shown.page.wait_for_selector("body[data-view=map]")
    shown.page.wait_for_function("() => document.querySelector('canvas').width > 300")
    return shown


def dot_of(shown: Any, latent: int) -> tuple[float, float]:
    """Screen coordinates of a feature's dot while the whole map is shown."""
    box = shown.part("canvas").evaluate(
        """node => { const box = node.getBoundingClientRect();
          return [box.left + 1, box.top + 1, node.clientWidth, node.clientHeight]; }"""
    )
    unit = 0.94 * min(box[2:])
    x, y = layout(full_index())[latent].tolist()
    return box[0] + box[2] / 2 + (x - 0.5) * unit, box[1] + box[3] / 2 + (y - 0.5) * unit


def isolated() -> int:
    """The feature that is farthest from its nearest neighbour on the map."""
    places = layout(full_index())
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(apart, np.nan)
    inside = (np.abs(places - 0.5) < 0.4).all(axis=1)
    return int(np.nanargmax(np.where(inside, np.nanmin(apart, axis=1, initial=9), np.nan)))


@pytest.mark.slow
def test_a_dot_names_its_feature_and_opens_it(show: Any):
    shown = open_map(show)
    latent = isolated()
    shown.page.mouse.move(*dot_of(shown, latent))
    assert f"Feature {latent}" in shown.text("tooltip")
    shown.page.mouse.click(*dot_of(shown, latent))
    shown.wait_for(latent)
    shown.page.go_back()
    shown.page.wait_for_selector("body[data-view=map]")


@pytest.mark.slow
def test_the_map_is_moved_and_zoomed_by_buttons_wheel_and_drag(show: Any):
    shown = open_map(show)
    latent = isolated()
    x, y = dot_of(shown, latent)

    def hit(at: tuple[float, float]) -> bool:
        shown.page.mouse.move(*at)
        return shown.part("canvas").get_attribute("data-hovered") == str(latent)

    assert hit((x, y))
    shown.page.mouse.down()
    shown.page.mouse.move(x + 30, y + 20, steps=4)
    shown.page.mouse.move(x + 60, y + 40, steps=4)
    shown.page.mouse.up()
    assert not hit((x, y))
    assert hit((x + 60, y + 40))
    shown.page.mouse.wheel(0, -400)
    assert hit((x + 60, y + 40))
    assert not hit((x + 110, y + 90))
    shown.part("zoom-all").click()
    assert hit((x, y))
    shown.part("zoom-in").click()
    shown.part("zoom-out").click()
    assert hit((x, y))


@pytest.mark.slow
def test_the_keyboard_walks_the_map_and_opens_the_feature_in_the_middle(show: Any):
    shown = open_map(show)
    shown.part("save-map").focus()
    shown.press("Tab")
    places = layout(full_index())
    middle = int(np.nanargmin(np.linalg.norm(places - 0.5, axis=1)))
    assert shown.part("canvas").get_attribute("data-hovered") == str(middle)
    assert f"Feature {middle}" in shown.part("canvas").get_attribute("aria-label")
    shown.press("+", "+", *["ArrowRight"] * 6, "ArrowDown")
    other = shown.part("canvas").get_attribute("data-hovered")
    assert other != str(middle)
    shown.press("0")
    assert shown.part("canvas").get_attribute("data-hovered") == str(middle)
    shown.press("Enter")
    shown.wait_for(middle)


def test_groups_have_names_and_colours_on_the_map(show: Any):
    index = full_index()
    shown = open_map(show)
    assert shown.part("map-color").input_value() == "group"
    shown.page.wait_for_selector("canvas[data-named]", state="attached")
    groups = groups_of(index)
    named = shown.part("canvas").get_attribute("data-named").split(",")
    assert named[0] == "0"  # the largest comes first
    assert all(len(groups[int(number)].latents) >= 5 for number in named)
    names = shown.page.locator(".legend-kind").all_text_contents()
    assert names[:2] == [group.name for group in groups[:2]]
    shown.page.mouse.move(*dot_of(shown, isolated()))
    own = next(group.name for group in groups if isolated() in group.latents)
    assert own in shown.text("tooltip")


@pytest.mark.slow
def test_a_finger_on_the_map_scrolls_the_page(show: Any):
    shown = open_map(show)
    canvas, session = shown.part("canvas"), shown.page.context.new_cdp_session(shown.page)
    shown.page.set_viewport_size({"width": 390, "height": 600})

    canvas.evaluate("node => node.scrollIntoView({ block: 'start' })")
    shown.page.evaluate("scrollBy(0, -200)")
    shown.page.wait_for_timeout(300)  # until the browser knows what a finger does there
    box, before = canvas.bounding_box(), shown.page.evaluate("scrollY")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind, moved in (("touchStart", 0), *(("touchMove", d) for d in range(10, 160, 10))):
        touch = {"type": kind, "touchPoints": [{"x": x, "y": y - moved}]}
        session.send("Input.dispatchTouchEvent", touch)
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert shown.page.evaluate("scrollY") - before > 1


@pytest.mark.slow
def test_colours_have_a_legend(show: Any):
    shown = open_map(show)
    for choice, words in (("density", "frequent"), ("layer", "layer 0")):
        shown.part("map-color").select_option(choice)
        shown.page.get_by_text(words, exact=True).wait_for()
    shown.part("map-color").select_option("projection")
    shown.page.wait_for_function("() => document.querySelectorAll('.legend-kind').length === 7")
    shown.part("map-color").select_option("role")
    shown.page.wait_for_function(
        "() => document.querySelector('.map-legend').textContent.includes('think')"
    )
