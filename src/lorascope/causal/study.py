"""What the commands that study effects share: options, the stage around a report, its table.

`report_at` is the skeleton of a stage: find the finished file, lock its name, make the report, draw
it, and give it its name when all of it is there. `report_records` says what each report holds.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from lorascope.artifact import (
    building,
    digest_of,
    is_made,
    make_manifest,
    open_manifest,
    read_manifest,
    sealed,
    with_seal,
    write_text,
)
from lorascope.causal.record_json import from_json, to_json
from lorascope.causal.report_records import ReportRecord
from lorascope.config import option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.sites import SiteLayout
from lorascope.subject.options import AdapterOptions

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

log = logging.getLogger(__name__)

R = TypeVar("R", bound=ReportRecord)

_FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class ReportOptions(AdapterOptions):
    """Options of every command that loads the subject and writes a report."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="type in which the model computes; auto: float32 on the CPU"
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(
        False, help="replace an output that was made with other settings", identity=False
    )


@dataclass(frozen=True, kw_only=True)
class EffectOptions(ReportOptions):
    """Options of every command that runs the subject on the rollouts of a store."""

    data_dir: Path = option(
        Path("activations_all_adapters"),
        help="activation store whose rollouts to run",
        identity=False,
    )
    max_rollouts: int | None = option(
        None, help="largest number of held-out rollouts to run; default: all"
    )
    batch_tokens: int | None = option(
        None,
        help="tokens in one batch, padding included; changes results by rounding only; "
        "default: as many as keep the logits below 512 MB, at most 2048",
        identity=False,
    )

    def check(self) -> None:
        """Refuse impossible numbers."""
        super().check()
        self.require("max_rollouts", 1)
        self.require("batch_tokens", 1)


@dataclass(frozen=True, kw_only=True)
class SeededEffectOptions(EffectOptions):
    """Options of the commands that draw random numbers."""

    seed: int = option(0, help="seed of random directions, of sampling and of the bootstrap")

    def check(self) -> None:
        """Refuse impossible numbers."""
        super().check()
        self.require("seed", 0)


def sae_option() -> Any:
    """Return the option that names the SAE under study."""
    return option(
        Path("trained_sae_adapters_g-u-d-q-k-v-o.pt"), help="SAE to study", identity=False
    )


def require_json_name(output: Path) -> None:
    """Raise ConfigError unless `--output` ends in .json."""
    if output.suffix != ".json":
        raise ConfigError(f"--output is {output}, expected a name that ends in .json")


def require_features(features: Sequence[int], sae: "SAE | None" = None) -> None:
    """Raise ConfigError unless `--features` are different numbers, and of `sae` if it is given."""
    if min(features, default=0) < 0 or len(set(features)) < len(features):
        raise ConfigError("--features must be different numbers, from 0")
    if sae is not None and max(features, default=0) >= sae.d_sae:
        raise ConfigError(
            f"--features names {max(features)}, the SAE has features 0 to {sae.d_sae - 1}"
        )


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
    identity = {"settings": settings, "parents": parents, "overwrite": overwrite}
    if is_made(out, record.kind, **identity):
        log.info("%s is already made with these settings", out)
        return out
    with building(out, record.kind, **identity) as build:
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
    return out


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
    open_manifest(path, record.kind, record.schema)
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
