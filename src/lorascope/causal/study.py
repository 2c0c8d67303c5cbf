"""What the commands that study effects share: the stage around a report, and its table.

`report_at` is the skeleton of a stage: find the finished file, lock its name, make the report, draw
it, and give it its name when all of it is there. `report_records` says what each report holds.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lorascope.artifact import (
    Identity,
    Manifest,
    check_seal,
    open_manifest,
    read_manifest,
    sealed_json,
    write_text,
)
from lorascope.causal.report_records import ReportRecord
from lorascope.errors import ArtifactError
from lorascope.record_json import from_json, to_json
from lorascope.sites import SiteLayout
from lorascope.stage import Build, built

log = logging.getLogger(__name__)

R = TypeVar("R", bound=ReportRecord)

_FILE = "report.json"
_BESIDE = {  # files of the reports of a run, by kind, seen from its index
    "evaluation": "evaluation.json",
    "direct": "effects/direct.json",
    "ablation": "effects/ablation.json",
    "attribution": "effects/attribution.json",
}


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
    draw: Callable[[R, Manifest, Path], None] | None = None,
) -> Path:
    """Return `out`; make it first unless it has these settings and parents already.

    `draw` gets the report, its manifest and `out`, before that file is there.
    """
    identity = Identity(kind=record.kind, schema=record.schema, settings=settings, parents=parents)

    def fill(build: Build) -> None:
        report, layout, content = make()
        assert isinstance(report, record)
        manifest = identity.manifest(layout, content)
        write_text(build.path / _FILE, sealed_json(manifest, to_json(report)))
        if draw is not None:
            draw(report, manifest, out)
        build.publish_file(_FILE)
        log.info("%s", table(report))

    return built(out, identity, fill, overwrite=overwrite)


def read_report(path: Path, records: Sequence[type[R]]) -> tuple[R, Manifest]:
    """Return a report that is of one of these kinds, and its manifest.

    Raises ArtifactError at another kind, another schema, and a report that is damaged or does not
    hold what its kind does.
    """
    parts = open_report(path)
    manifest = Manifest.from_json(parts.pop("metadata")["lorascope"])
    by_kind = {record.kind: record for record in records}
    record = by_kind.get(manifest.kind)
    if record is None:
        raise ArtifactError(
            f"{path} is a report of kind {manifest.kind}, expected {', '.join(by_kind)}"
        )
    open_manifest(path, record.kind, record.schema, oldest=record.oldest or record.schema)
    return from_json(record, parts, str(path)), manifest


def reports_beside(
    source: Path, index: Manifest, kinds: Iterable[str] = tuple(_BESIDE)
) -> dict[str, Path]:
    """Return the reports beside an index that are of its SAE and store, by kind; warn of others.

    Damaged reports are among them: reading one names the damage.
    """
    paths = {kind: source.parent / _BESIDE[kind] for kind in kinds}
    return {
        kind: path for kind, path in paths.items() if path.is_file() and _is_of_index(path, index)
    }


def _is_of_index(path: Path, index: Manifest) -> bool:
    manifest = read_manifest(path)
    if manifest is None:
        return True
    of_index, of_report = index.parents, manifest.parents
    both = {"sae"} | of_index.keys() & of_report.keys() & {"activations"}
    others = [name for name in sorted(both) if of_report.get(name) != of_index.get(name)]
    if others or "sae" not in of_report:
        name = "activation store" if others == ["activations"] else "SAE"
        log.warning("%s is left out: it is not of the index's %s; make it again", path, name)
        return False
    return True


def format_interval(edges: Sequence[float] | None, digits: str) -> str:
    """Return an interval for a table, each edge in the format `digits`; a dash for None."""
    return "—" if edges is None else f"{edges[0]:{digits}} to {edges[1]:{digits}}"


def format_number(value: float | None, digits: str) -> str:
    """Return a number for a table; a dash for None."""
    return "—" if value is None else f"{value:{digits}}"


def format_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)
) -> list[str]:
    """Return the lines of a table for the terminal, the columns `left` aligned at their left."""
    lines = [head, *rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    ]


def open_report(path: Path) -> dict[str, Any]:
    """Return a report: its parts by name, and `metadata`.

    Raises ArtifactError if the file is missing, is not a report, or was changed.
    """
    if read_manifest(path) is None or path.suffix != ".json":
        raise ArtifactError(
            f"{path} is not a lorascope report; make one, for example with lorascope evaluate"
        )
    if damage := check_seal(path):
        raise ArtifactError(f"{path} is damaged ({damage}); make it again")
    return json.loads(path.read_text(encoding="utf-8"))
