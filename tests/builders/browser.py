"""A headless Chromium for page tests, which skip without one unless CI says it must be there."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
_NAMES = ("chromium", "google-chrome", "chrome")


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start Chromium and yield Playwright's browser."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        if os.environ.get("LORASCOPE_NEED_BROWSER"):
            pytest.fail("LORASCOPE_NEED_BROWSER is set, and no Chromium is here")
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Shown:
    """A page in a browser, and everything that it complained of or asked the network for."""

    page: "Page"
    complaints: list[str]

    def part(self, testid: str) -> "Locator":
        return self.page.get_by_test_id(testid)

    def text(self, testid: str) -> str:
        return self.part(testid).first.text_content() or ""

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def copied(self, testid: str, name: str) -> str:
        """The text that an entry of a panel's copy menu gives to the clipboard."""
        self.page.evaluate(
            """() => Object.defineProperty(navigator, "clipboard", { configurable: true, value:
              { writeText: async (text) => { window.copiedText = text; } } })"""
        )
        menu = self.part(testid).locator(".copy-menu")
        menu.locator("summary").focus()
        self.press("Enter")
        menu.get_by_role("button", name=name).click()
        menu.get_by_text("Copied").wait_for()
        return self.page.evaluate("window.copiedText")

    def wait_for(self, feature: int) -> None:
        self.page.wait_for_selector(f"[data-testid=feature-view][data-feature='{feature}']")
        assert self.text("heading") == f"Feature {feature}"

    def tokens(self, n: int = 0) -> list[str]:
        """The texts of the tokens of example `n`."""
        return self.part("window").nth(n).get_by_test_id("token").all_text_contents()

    def wait_listed(self, expected: Iterable[int]) -> None:
        """Wait until the list of features has these, in this order."""
        self.page.wait_for_function(
            """ids => [...document.querySelectorAll("[data-testid=row]")]
              .sort((a, b) => a.offsetTop - b.offsetTop)
              .map(row => row.dataset.feature).join() === ids""",
            arg=",".join(map(str, expected)),
        )
