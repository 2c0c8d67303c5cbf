"""The file of a report of effects: its numbers, its manifest, and what proves them whole.

`report_at` is what every stage that makes one does around its own work: find the finished file,
lock its name, make the report, draw it, and give it its name when all of it is there.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lorascope.artifact import (
    building,
    digest_of,
    is_made,
    make_manifest,
    read_manifest,
    sealed,
    with_seal,
    write_text,
)
from lorascope.errors import ArtifactError
from lorascope.sites import SiteLayout

log = logging.getLogger(__name__)

_FILE = "report.json"


class Report(NamedTuple):
    """A report's parts as JSON values, the layout that its names are of, and what made it."""

    parts: Mapping[str, Any]
    layout: SiteLayout
    content: Mapping[str, Any]


def report_at(
    out: Path,
    kind: str,
    schema: int,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    overwrite: bool,
    make: Callable[[], Report],
    table: Callable[[Mapping[str, Any]], str],
    draw: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Path:
    """Return `out`, made unless it is already what settings and parents make.

    `draw` gets the parts and `metadata`, as they are in the file, before the file has its name.
    """
    identity = {"settings": settings, "parents": parents, "overwrite": overwrite}
    if is_made(out, kind, **identity):
        log.info("%s is already made with these settings", out)
        return out
    with building(out, kind, **identity) as build:
        report = make()
        manifest = make_manifest(
            kind,
            schema,
            settings=settings,
            parents=parents,
            layout=report.layout.to_json(),
            content=report.content,
        )
        write_text(build.path / _FILE, seal(manifest, report.parts))
        if draw is not None:
            draw({"metadata": {"lorascope": manifest}, **report.parts})
        build.publish_file(_FILE)
    log.info("%s", table(report.parts))
    return out


def seal(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Return the text of a report's file: its numbers, the manifest, and what proves them whole."""
    content = {**manifest["content"], "report_sha256": digest_of(report)}
    data = {"metadata": {"lorascope": with_seal({**manifest, "content": content})}, **report}
    return sealed(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def open_report(path: Path) -> dict[str, Any]:
    """Return a report of effects: its parts by name, and `metadata`.

    Raises ArtifactError when it is missing, no report, or was changed.
    """
    manifest = read_manifest(path)
    content = None if manifest is None else manifest.get("content")
    expected = content.get("report_sha256") if isinstance(content, dict) else None
    if expected is None:
        raise ArtifactError(f"{path} is no report of lorascope; make it with lorascope evaluate")
    data = json.loads(path.read_text(encoding="utf-8"))
    report = {name: part for name, part in data.items() if name != "metadata"}
    try:
        found = digest_of(report)
    except ValueError as error:  # a number that JSON has no word for
        raise ArtifactError(f"{path} holds a number that is not finite; make it anew") from error
    if found != expected:
        raise ArtifactError(f"{path} holds other numbers than its manifest says; make it anew")
    return data
