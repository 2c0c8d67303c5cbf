"""Measure the cost of a page: file size, build time, opening, next feature, and memory.

    python benchmarks/dashboard.py --features 7168 100000

For each size this makes a synthetic index (`synthetic_features.py`) with 10 examples of 21 tokens
per feature, and two pages of the same examples, in turn: ours from `features.h5`, with everything
it has besides examples, and the published form from its JSON (`published_page.py`).
`--per-fifth 2` adds the ten samples per feature that `collect` draws: as many windows again, which
the published JSON lacks. Each page is then opened in a fresh headless Chromium, in turn. Figures
are medians over the runs:

- `first`: from the start of the navigation to the frame after the first tokens appear, by the
  page's own clock. The file is in the page cache.
- `next`: from pressing the right arrow key to the next feature's tokens, styled and laid out;
  `slowest` is the slowest press of a run. Each press waits for 30 ms of quiet first.
- `heap`: the JavaScript heap after the presses and a garbage collection; `process`: the resident
  memory of the process that shows the page, including the file's text and the elements.

With `--budget`, the exit code is 1 when one of our figures exceeds the budget of its size.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from published_page import write_page
from synthetic_features import synthetic

from lorascope.dashboard.render import DashboardConfig, run
from lorascope.features.published_json import write_published

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TIMEOUT = 180_000  # milliseconds that a page may take to open

# Runs in the page before anything of it.
_CLOCK = """
const found = () => document.querySelector("[data-testid=token], .token");
requestAnimationFrame(function look() {
  if (!found()) return requestAnimationFrame(look);
  requestAnimationFrame(() => { document.documentElement.dataset.firstShown = performance.now(); });
});
"""
_NEXT = """
async ([presses, selector]) => {
  const shown = () => document.querySelector(selector).dataset.feature;
  const times = [];
  for (let i = 0; i < presses; i++) {
    await new Promise((done) => setTimeout(done, 30));
    const before = shown();
    const begun = performance.now();
    const event = new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true });
    document.body.dispatchEvent(event);
    while (shown() === before) await new Promise((done) => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = done;
      port2.postMessage(0);
    });
    document.body.getBoundingClientRect();
    times.push(performance.now() - begun);
  }
  return times;
}
"""


class Contender(NamedTuple):
    """A way to make a page, and where the page says which feature it shows."""

    name: str
    shown: str
    build: Callable[[Path], Path]


class Opened(NamedTuple):
    """What one visit measured."""

    first: float  # ms
    next: float  # ms, median of the presses
    slowest: float  # ms
    heap: float  # MB
    process: float  # MB


class Budget(NamedTuple):
    """What a page may cost."""

    size: float  # MB
    first: float  # ms
    next: float  # ms
    heap: float  # MB


BUDGETS = {7168: Budget(6, 400, 16, 150), 100_000: Budget(80, 1500, 16, 500)}


def _ours(folder: Path) -> Path:
    page = folder / "ours.html"
    page.unlink(missing_ok=True)
    return run(DashboardConfig(input=folder / "features.h5", output=page))


def _published(folder: Path) -> Path:
    write_page(folder / "features.json", folder / "published.html")
    return folder / "published.html"


CONTENDERS = (
    Contender("lorascope", "[data-testid=feature-view]", _ours),
    Contender("published form", "#shown", _published),
)


@contextmanager
def _browser(playwright: Any, chromium: str) -> Iterator[Any]:
    browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
    try:
        yield browser
    finally:
        browser.close()


def _visit(playwright: Any, chromium: str, page: Path, shown: str, presses: int) -> Opened:
    with _browser(playwright, chromium) as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.set_default_timeout(TIMEOUT)
        tab.add_init_script(_CLOCK)
        tab.goto(page.resolve().as_uri() + "#/feature/0", wait_until="commit")
        tab.wait_for_selector("html[data-first-shown]")
        first = float(tab.locator("html").get_attribute("data-first-shown"))
        tab.wait_for_load_state("load")
        times = tab.evaluate(_NEXT, [presses, shown])
        cdp = tab.context.new_cdp_session(tab)
        cdp.send("HeapProfiler.collectGarbage")
        cdp.send("Performance.enable")
        metrics = {m["name"]: m["value"] for m in cdp.send("Performance.getMetrics")["metrics"]}
        infos = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
        resident = max(_resident(info["id"]) for info in infos if info["type"] == "renderer")
        heap = metrics["JSHeapUsedSize"] / 1e6
        return Opened(first, statistics.median(times), max(times), heap, resident)


def _resident(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1e3


def measure(n_features: int, given: argparse.Namespace, folder: Path) -> list[str]:
    """Print a table of one size, and return what is over its budget."""
    from playwright.sync_api import Error, sync_playwright

    index = synthetic(n_features, 10, 10, per_fifth=given.per_fifth, n_rollouts=4000, dead=0)
    index.save(folder / "features.h5")
    write_published(index, folder / "features.json", index.manifest)
    n_examples, n_tokens = (
        len(index.example_value),
        int(index.window_offset[len(index.example_value)]),
    )
    seconds: dict[str, list[float]] = {contender.name: [] for contender in CONTENDERS}
    visits: dict[str, list[Opened]] = {contender.name: [] for contender in CONTENDERS}
    failed: dict[str, str] = {}
    pages: dict[str, Path] = {}
    found: dict[str, Budget] = {}
    for _ in range(given.builds):
        for contender in CONTENDERS:
            begun = time.perf_counter()
            pages[contender.name] = contender.build(folder)
            seconds[contender.name].append(time.perf_counter() - begun)
    with sync_playwright() as playwright:
        for _ in range(given.runs):
            for name, shown, _ in CONTENDERS:
                if name in failed:
                    continue
                try:
                    visits[name].append(
                        _visit(playwright, given.chromium, pages[name], shown, given.presses)
                    )
                except Error as error:
                    failed[name] = error.message.splitlines()[0]
    print(
        f"\n{n_features:,} features, {n_examples:,} examples, {n_tokens:,} tokens in them, "
        f"{len(index.sample_value):,} samples\n"
    )
    print(
        "| page | file, MB | built, s | first, ms | next (slowest), ms | heap, MB | process, MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, page in pages.items():
        size, built = page.stat().st_size / 1e6, statistics.median(seconds[name])
        line = f"| {name} | {size:.1f} | {built:.1f} | "
        if visits[name]:
            middle = Opened(*map(statistics.median, zip(*visits[name], strict=True)))
            spread = [visit.first for visit in visits[name]]
            line += (
                f"{middle.first:.0f} ({min(spread):.0f} to {max(spread):.0f}) | "
                f"{middle.next:.1f} ({middle.slowest:.0f}) | {middle.heap:.0f} | "
                f"{middle.process:.0f} |"
            )
            found[name] = Budget(size, middle.first, middle.next, middle.heap)
        else:
            line += f"{failed[name]} | | | |"
        print(line)
    budget = BUDGETS.get(n_features)
    if budget is None:
        return []
    print(
        f"| budget | {budget.size:.0f} | | {budget.first:.0f} | {budget.next:.0f} | "
        f"{budget.heap:.0f} | |"
    )
    if CONTENDERS[0].name not in found:
        return [f"{n_features:,} features: the page did not open"]
    return [
        f"{n_features:,} features: {name} is {value:.1f}, budget {most:.0f}"
        for name, value, most in zip(Budget._fields, found[CONTENDERS[0].name], budget, strict=True)
        if value > most
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--features", type=int, nargs="+", default=[7168, 100_000])
    parser.add_argument("--per-fifth", type=int, default=0, help="samples of each fifth")
    parser.add_argument("--runs", type=int, default=5, help="visits to each page")
    parser.add_argument("--builds", type=int, default=3, help="times that each page is built")
    parser.add_argument("--presses", type=int, default=200, help="features that a visit goes on")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--budget", action="store_true", help="exit 1 when over the budget")
    given = parser.parse_args()
    over: list[str] = []
    for n_features in given.features:
        with tempfile.TemporaryDirectory() as folder:
            over += measure(n_features, given, Path(folder))
    print("\n".join(["", *over] if over else ["", "within every budget"]))
    sys.exit(bool(over and given.budget))


if __name__ == "__main__":
    main()
