"""Make one HTML file from a feature index or from published JSON.

1. Read the input, `features.h5` or JSON of the published schema.
2. Bundle the assets: modules in the order of their imports, as one script.
3. Write the page with the core and the first block ahead of the script, so that the first feature
   is painted while the rest of a large file is still being read; then the other blocks.

The page's policy forbids every request and every script or style but the two whose hashes it
names. Data reaches it as JSON and base64 in script elements that no browser runs.
"""

import base64
import hashlib
import html
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lorascope.artifact import (
    building,
    digest_file,
    digest_of,
    is_made,
    make_manifest,
    read_manifest,
)
from lorascope.config import Config, option
from lorascope.dashboard.payload import Payload, manifest_comment
from lorascope.errors import ArtifactError
from lorascope.features.export import read_published
from lorascope.features.index import FeatureIndex
from lorascope.runtime import progress

log = logging.getLogger(__name__)

KIND = "dashboard"
SCHEMA = 1
STYLES = ("colors.css", "page.css", "feature.css", "views.css")
_PAGE = "page.html"
_LARGE = 20_000_000  # bytes; above it a page is hard to send to others
_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([a-z]+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?function|const) (\w+)", re.MULTILINE)
_SLOT = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True, kw_only=True)
class DashboardConfig(Config):
    """What `lorascope dashboard` needs to know."""

    input: Path = option(
        help="features.h5, or a features JSON of the published schema", identity=False
    )
    output: Path = option(Path("sae_dashboard_new.html"), help="HTML file to write", identity=False)
    title: str = option("LoRA features", help="heading of the page")
    overwrite: bool = option(
        False, help="replace an output that was made with other settings", identity=False
    )


def run(config: DashboardConfig) -> Path:
    """Write the page and return its path. The same input gives the same bytes.

    Raises ArtifactError when the input is not a feature index, or when the output is something
    else and `overwrite` is off.
    """
    source, output = config.input.expanduser(), config.output.expanduser()
    index = _read(source)
    made_by = read_manifest(source)
    parents = {"features": digest_file(source) if made_by is None else digest_of(made_by)}
    settings = config.settings()
    identity = {"settings": settings, "parents": parents, "overwrite": config.overwrite}
    if is_made(output, KIND, **identity):
        log.info("%s is already made from %s", output, source)
        return output
    manifest = make_manifest(
        KIND,
        SCHEMA,
        settings=settings,
        parents=parents,
        layout=index.manifest.get("layout"),
        content={"n_features": len(index), "n_examples": len(index.example_value)},
    )
    payload = Payload(index, config.title)
    with building(output, KIND, **identity) as build:
        with (build.path / _PAGE).open("w", encoding="ascii", newline="\n") as file:
            for piece in page(payload, manifest):
                file.write(piece)
        size = (build.path / _PAGE).stat().st_size
        published = build.publish_file(_PAGE)
    log.info("%d features with %d examples: %.1f MB", *manifest["content"].values(), size / 1e6)
    if size > _LARGE:
        log.warning("%s is large; collect with a smaller --top-k or --context-window", output)
    return published


def page(payload: Payload, manifest: dict[str, object]) -> Iterator[str]:
    """Yield the page piece by piece, ASCII only."""
    style, script = "".join(map(_asset, STYLES)), bundle()
    slots = {
        "policy": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "base-uri 'none'; form-action 'none'",
        "manifest": manifest_comment(manifest),
        "title": html.escape(payload.title).encode("ascii", "xmlcharrefreplace").decode(),
        "style": style,
        "script": script,
    }
    with progress(payload.n_blocks + payload.n_texts, "dashboard", "block") as bar:
        # Alternating text and slot names: what a slot is filled with is never searched for slots.
        for place, piece in enumerate(_SLOT.split(_asset("index.html"))):
            if place % 2 == 0:
                yield piece
            elif piece == "core":
                yield payload.core()
            elif piece == "first_block":
                number = payload.first_block
                yield _block(f"block-{number}", payload.block(number))
                bar.update()
            elif piece == "blocks":
                for number, data in payload.blocks():
                    yield _block(f"block-{number}", data)
                    bar.update()
                for number in range(payload.n_texts):
                    yield _block(f"text-{number}", payload.text(number))
                    bar.update()
            else:
                yield slots[piece]


def bundle() -> str:
    """Return the modules of the page as one script: each a scope, after those that it imports."""
    scopes: dict[str, str] = {}

    def visit(name: str) -> None:
        if name in scopes:
            return
        text = _asset(f"{name}.js")
        for _, needed in _IMPORT.findall(text):
            visit(needed)
        exports = ", ".join(name for _, name in _EXPORT.findall(text))
        body = _EXPORT.sub(r"\1 \2", _IMPORT.sub(r"const \1 = \2_js;", text))
        scopes[name] = f"const {name}_js = (() => {{\n{body}return {{ {exports} }};\n}})();"

    visit("app")
    return "\n".join(["(() => {", '"use strict";', *scopes.values(), "})();"])


def _read(source: Path) -> FeatureIndex:
    if source.is_dir():
        raise ArtifactError(f"{source} is a folder, expected a features.h5 or a features JSON")
    if source.suffix == ".h5":
        return FeatureIndex.open(source)
    return read_published(source)


def _block(name: str, data: str) -> str:
    return f'<script type="text/plain" id="{name}">{data}</script>\n'


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _asset(name: str) -> str:
    return files("lorascope.dashboard").joinpath("assets", name).read_text(encoding="ascii")
