"""What the commands that study effects share: the stage around a report, and its table.

`report_at` is the skeleton of a stage: find the finished file, lock its name, make the report, draw
it, and give it its name when all of it is there. `report_records` says what each report holds.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lorascope.artifact import (
    Build,
    built,
    digest_of,
    make_manifest,
    open_manifest,
    read_manifest,
    sealed,
    with_seal,
    write_text,
)
from lorascope.causal.record_json import from_json, to_json
from lorascope.causal.report_records import ReportRecord
from lorascope.errors import ArtifactError
from lorascope.sites import SiteLayout

log = logging.getLogger(__name__)

R = TypeVar("R", bound=ReportRecord)

_FILE = "report.json"


class Made(NamedTuple):
    """A new report, the layout of its sites, and what its manifest says of the run."""

    report: ReportRecord
    layout: SiteLayout
    content: Mapping[str, Any]


def report_at(
    out: Path,
    record: type[R],
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    overwrite: bool,
    make: Callable[[], Made],
    table: Callable[[R], str],
    draw: Callable[[R, Mapping[str, Any]], Any] | None = None,
) -> Path:
    """Return `out`; make it first unless it has these settings and parents already.

    `draw` gets the report and its manifest before the file gets its name.
    """

    def fill(build: Build) -> None:
        report, layout, content = make()
        assert isinstance(report, record)
        manifest = make_manifest(
            record.kind,
            record.schema,
            settings=settings,
            parents=parents,
            layout=layout.to_json(),
            content=content,
        )
        write_text(build.path / _FILE, seal(manifest, to_json(report)))
        if draw is not None:
            draw(report, manifest)
        build.publish_file(_FILE)
        log.info("%s", table(report))

    return built(out, record.kind, fill, settings=settings, parents=parents, overwrite=overwrite)


def read_report(path: Path, records: Sequence[type[R]]) -> tuple[R, Mapping[str, Any]]:
    """Return a report that is of one of these kinds, and its manifest.

    Raises ArtifactError at another kind, another schema, and a report that is damaged or does not
    hold what its kind does.
    """
    parts = open_report(path)
    manifest = parts.pop("metadata")["lorascope"]
    by_kind = {record.kind: record for record in records}
    record = by_kind.get(manifest["kind"])
    if record is None:
        raise ArtifactError(
            f"{path} is a report of kind {manifest['kind']}, expected {', '.join(by_kind)}"
        )
    open_manifest(path, record.kind, record.schema, oldest=record.schema)
    return from_json(record, parts, str(path)), manifest


def format_interval(edges: Sequence[float] | None, digits: str) -> str:
    """Return an interval for a table, each edge in the format `digits`; a dash for None."""
    return "—" if edges is None else f"{edges[0]:{digits}} to {edges[1]:{digits}}"


def format_number(value: float | None, digits: str) -> str:
    """Return a number for a table; a dash for None."""
    return "—" if value is None else f"{value:{digits}}"


def seal(manifest: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Return the text of a report's file: its numbers, the manifest and their seals."""
    content = {**manifest["content"], "report_sha256": digest_of(report)}
    data = {"metadata": {"lorascope": with_seal({**manifest, "content": content})}, **report}
    return sealed(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def open_report(path: Path) -> dict[str, Any]:
    """Return a report of effects: its parts by name, and `metadata`.

    Raises ArtifactError if the file is missing, is not a report, or was changed.
    """
    manifest = read_manifest(path)
    content = None if manifest is None else manifest.get("content")
    expected = content.get("report_sha256") if isinstance(content, dict) else None
    if expected is None:
        raise ArtifactError(
            f"{path} is not a lorascope report; make one, for example with lorascope evaluate"
        )
    data = json.loads(path.read_text(encoding="utf-8"))
    report = {name: part for name, part in data.items() if name != "metadata"}
    try:
        digest = digest_of(report)
    except ValueError as error:  # JSON has no NaN and no infinity
        raise ArtifactError(f"{path} has a number that is not finite; make it again") from error
    if digest != expected:
        raise ArtifactError(f"{path} has other numbers than its manifest says; make it again")
    return data
