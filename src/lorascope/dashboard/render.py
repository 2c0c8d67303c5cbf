"""Write one HTML page from a feature index or from published JSON.

1. Read the input: `features.h5`, or JSON in the published schema.
2. Bundle the assets: all modules as one script, each after those that it imports.
3. Write the core and the first block before the script, and the other blocks after it. The browser
   then shows the first feature while it still reads the rest of a large file.

The page's policy forbids all requests, and all scripts and styles except the two whose hashes it
names. The data is JSON and packs of text (packs.py) in script elements that no browser runs.

`--serve` shows the same page at an address of this machine until Ctrl-C and writes no file. It
encodes data when the page requests them (serve.py), so the index may be larger than a file can be.
"""

import base64
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from lorascope.artifact import Identity, Manifest
from lorascope.config import Config, option
from lorascope.dashboard.payload import Payload, manifest_comment
from lorascope.dashboard.reports import Reports
from lorascope.dashboard.serve import PageServer, serve
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.feature import escape_html
from lorascope.features.label_file import read_labels
from lorascope.features.published_json import digest_of_index, read_index
from lorascope.runtime import progress
from lorascope.stage import Build, built

log = logging.getLogger(__name__)

KIND = "dashboard"
SCHEMA = 1
STYLES = ("colors.css", "page.css", "feature.css", "overview.css", "views.css")
_PAGE = "page.html"
_LARGE = 20_000_000  # bytes; a larger page is hard to share
_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([a-z_]+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?function|const) (\w+)", re.MULTILINE)
_SLOT = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True, kw_only=True)
class DashboardConfig(Config):
    """Options of `lorascope dashboard`."""

    input: Path = option(
        help="features.h5, or a features JSON in the published schema", identity=False
    )
    output: Path = option(Path("sae_dashboard_new.html"), help="HTML file to write", identity=False)
    effects: tuple[Path, ...] = option(
        (),
        help="reports of evaluate, ablate, direct and attribute to show with the features",
        identity=False,
    )
    labels: Path | None = option(
        None, help="labels of the features; default: labels.json next to the input", identity=False
    )
    title: str = option("LoRA features", help="heading of the page")
    overwrite: bool = option(
        False, help="replace an output that has other settings", identity=False
    )
    serve: bool = option(
        False, help="serve the page at a local address instead of writing a file", identity=False
    )
    port: int | None = option(
        None, help="port of 127.0.0.1 for --serve; default: any free port", identity=False
    )

    def check(self) -> None:
        """Refuse a port that is out of range or given without --serve."""
        super().check()
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}, expected 1 to 65535")
        if self.port is not None and not self.serve:
            raise ConfigError("--port needs --serve; add it, or leave out --port")


def run(config: DashboardConfig) -> Path:
    """Write the page and return its path. The same input gives the same bytes.

    With `serve`, serve it until Ctrl-C and return the input's path. Raises ArtifactError if the
    input is not a feature index, or if the output exists, differs and `overwrite` is off.
    """
    source, output = config.input.expanduser(), config.output.expanduser()
    index = read_index(source)
    parents = {"features": digest_of_index(source)}
    if config.labels is not None:
        labels = read_labels(config.labels)
        if labels.manifest.parents.get("features") != parents["features"]:
            raise ArtifactError(
                f"{config.labels} has labels of another index than {source}; give its own labels"
            )
        index = replace(index, labels=labels)
    if index.labels is not None:
        parents["labels"] = index.labels.manifest.digest
    reports = Reports.open(config.effects, index, source)
    parents |= reports.parents
    identity = Identity(kind=KIND, schema=SCHEMA, settings=config.settings(), parents=parents)
    content = {"n_features": len(index), "n_examples": len(index.example_value)}
    manifest = identity.manifest(index.manifest.layout, content)

    payload = Payload(index, config.title, reports)

    def make(build: Build) -> None:
        with (build.path / _PAGE).open("w", encoding="ascii", newline="\n") as file:
            for piece in page(payload, manifest):
                file.write(piece)
        size = (build.path / _PAGE).stat().st_size
        build.publish_file(_PAGE)
        log.info("%d features with %d examples: %.1f MB", *content.values(), size / 1e6)
        if size > _LARGE:
            log.warning("%s is large; collect with a lower --top-k, or use --serve", output)

    if config.serve:
        serve(server_of(payload, manifest, config.port or 0))
        return source
    return built(output, identity, make, overwrite=config.overwrite)


def server_of(payload: Payload, manifest: Manifest, port: int = 0) -> PageServer:
    """Return a server for the page and the packs that it requests."""

    def pack(name: str) -> str | None:
        kind, _, number = name.partition("-")
        n, encode = {
            "block": (payload.n_blocks, payload.block),
            "rollout": (payload.n_rollouts, payload.rollout),
        }[kind]
        return encode(int(number)) if int(number) < n else None

    text = "".join(page(payload, manifest, served=True))
    return PageServer(text.encode("ascii"), policy(served=True), pack, port)


def policy(*, served: bool = False) -> str:
    """Return the page's Content-Security-Policy. A served page may request from its own server."""
    script, style = _hash(bundle(served=served)), _hash(_style())
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; "
        + "connect-src 'self'; " * served
        + "base-uri 'none'; form-action 'none'"
    )


def page(payload: Payload, manifest: Manifest, *, served: bool = False) -> Iterator[str]:
    """Yield the page in pieces, as ASCII. A `served` page contains only the first block."""
    slots = {
        "policy": policy(served=served),
        "manifest": manifest_comment(manifest),
        "title": escape_html(payload.title),
        "style": _style(),
        "script": bundle(served=served),
        "glossary": _glossary_html(),
    }
    n_packs = 1 if served else payload.n_blocks + payload.n_rollouts
    with progress(n_packs, "dashboard", "block") as bar:
        # `split` gives text and slot names in turn, so that slots in the filled-in text stay text.
        for i, piece in enumerate(_SLOT.split(_asset("index.html"))):
            if i % 2 == 0:
                yield piece
            elif piece == "core":
                yield payload.core()
            elif piece == "first_block":
                number = payload.first_block
                yield _pack_element(f"block-{number}", payload.block(number))
                bar.update()
            elif piece != "blocks":
                yield slots[piece]
            elif not served:
                for number in range(payload.n_blocks):
                    if number != payload.first_block:
                        yield _pack_element(f"block-{number}", payload.block(number))
                        bar.update()
                for number in range(payload.n_rollouts):
                    yield _pack_element(f"rollout-{number}", payload.rollout(number))
                    bar.update()


def bundle(*, served: bool = False) -> str:
    """Return the page's modules as one script: each in a scope of its own, after its imports.

    Only a `served` page has a module that can make requests.
    """
    scopes: dict[str, str] = {}

    def visit(name: str) -> None:
        if name in scopes:
            return
        file = "packs_served" if served and name == "packs_embedded" else name
        text = _asset(f"{file}.js")
        for _, imported in _IMPORT.findall(text):
            visit(imported)
        exports = ", ".join(exported for _, exported in _EXPORT.findall(text))
        body = _EXPORT.sub(r"\1 \2", _IMPORT.sub(r"const \1 = \2_js;", text))
        scopes[name] = f"const {name}_js = (() => {{\n{body}return {{ {exports} }};\n}})();"

    visit("app")
    return "\n".join(["(() => {", '"use strict";', *scopes.values(), "})();"])


def read_glossary() -> dict[str, dict[str, str]]:
    """Return the glossary: subject -> term -> definition. docs/glossary.md is written from it."""
    return json.loads(_asset("glossary.json"))


def _glossary_html() -> str:
    """Return the glossary as sections of the page's help."""
    lines = []
    for subject, entries in read_glossary().items():
        lines += ["<section>", f"<h4>{escape_html(subject)}</h4>", '<dl class="glossary">']
        lines += [
            f'<div class="glossary-entry"><dt>{escape_html(term)}</dt>'
            f"<dd>{escape_html(definition)}</dd></div>"
            for term, definition in entries.items()
        ]
        lines += ["</dl>", "</section>"]
    return "\n".join(lines) + "\n"


def _pack_element(name: str, data: str) -> str:
    return f'<script type="text/plain" id="{name}">{data}</script>\n'


def _style() -> str:
    return "".join(map(_asset, STYLES))


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _asset(name: str) -> str:
    return files("lorascope.dashboard").joinpath("assets", name).read_text(encoding="ascii")
