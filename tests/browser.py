"""A headless Chromium for page tests, which skip without one unless CI says it must be there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

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
