"""Accessibility: axe-core finds no serious violation in any view of the page."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from builders.effect_reports import write_all
from builders.indexes import index_of, synthetic

from lorascope.dashboard.render import DashboardConfig, run
from lorascope.features.index import FeatureIndex

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of a page with everything and of an empty page, and a rollout."""
    folder = tmp_path_factory.mktemp("access")
    full = synthetic(300, 5, 6, n_texts=9, n_rollouts=30, n_layers=4)

    def made(name: str, index: FeatureIndex, effects: tuple[Path, ...] = ()) -> str:
        index.save(folder / f"{name}.h5")
        source, output = folder / f"{name}.h5", folder / f"{name}.html"
        config = DashboardConfig(input=source, output=output, effects=effects)
        return run(config).resolve().as_uri()

    shortest = int(full.text_rollout[np.diff(full.text_offset).argmin()])
    return {
        "full": made("full", full),
        "effects": made("effects", full, write_all(folder, full)),
        "empty": made("empty", index_of([])),
        "rollout": str(shortest),  # axe-core takes long for each token
    }


@pytest.fixture(scope="module")
def tab(browser: "Browser") -> Iterator["Page"]:
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(120_000)
        yield page


def violations(page: "Page") -> list[str]:
    """Serious and critical violations that axe-core finds on the page, one line each."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{violation['impact']}: {violation['id']} at {node['target']}: {node['failureSummary']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


# View -> page, address, and what is pressed there.
VIEWS = {
    "overview": ("effects", "", ()),
    "overview without reports": ("full", "#/overview", ()),
    "overview of nothing": ("empty", "", ()),
    "feature": ("full", "#/feature/1", ()),
    "feature with a note": ("full", "#/feature/1", ("note-button", "star")),
    "filters": ("full", "#/feature/1?q=a&dmin=0.0001", ("more-filters",)),
    "map": ("full", "#/map", ()),
    "rollouts": ("full", "#/rollout/{rollout}", ()),
    "highlighted rollout": ("full", "#/rollout/{rollout}?paint=1,2,4", ()),
    "effects": ("effects", "#/feature/3", ()),
    "effects of nothing": ("effects", "#/feature/1", ()),
    "rollout with effects": ("effects", "#/rollout/{rollout}", ()),
    "contributions": ("effects", "#/rollout/{rollout}?token=2", ()),
    "help": ("full", "#/feature/1", ("help-button",)),
    "unknown feature": ("full", "#/feature/9999", ()),
    "unknown rollout": ("full", "#/rollout/9999", ()),
    "nothing": ("empty", "", ()),
    "no map": ("empty", "#/map", ()),
    "no rollouts": ("empty", "#/rollout", ()),
}


def every_look() -> Iterator[Any]:
    """Every view in both colour schemes on a desktop and a phone; `make test` has one of them."""
    for view, scheme, width in product(VIEWS, ("light", "dark"), (1280, 360)):
        fast = (view, scheme, width) == ("effects", "light", 1280)
        marks = () if fast else pytest.mark.slow
        yield pytest.param(view, scheme, width, marks=marks, id=f"{view}-{scheme}-{width}")


@pytest.mark.parametrize(("view", "scheme", "width"), list(every_look()))
def test_no_view_has_a_serious_violation(
    tab: "Page", pages: dict[str, str], view: str, scheme: Any, width: int
):
    name, address, pressed = VIEWS[view]
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    tab.goto("about:blank")
    tab.goto(pages[name] + address.format_map(pages), wait_until="domcontentloaded")
    tab.wait_for_selector("html[data-ready=true]")
    for testid in pressed:
        tab.get_by_test_id(testid).evaluate("node => node.click()")
    assert violations(tab) == []


def test_a_planted_violation_is_found(tab: "Page", pages: dict[str, str], tmp_path: Path):
    tab.goto(pages["full"], wait_until="domcontentloaded")
    tab.wait_for_selector("html[data-ready=true]")
    tab.evaluate("document.body.append(document.createElement('button'))")
    assert any("button-name" in text for text in violations(tab))
