"""Write a feature index in a form that other tools read.

- `json`: the published schema, which the published dashboard script takes, and `dashboard`.
- `csv`: the table of statistics, a line for each feature.
- `neuronpedia`: a folder of `batch-N.json` as SAEDashboard writes them for import there.

In: `features.h5`, or a features JSON of the published schema. The same index gives the same bytes.
"""

import filecmp
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorascope.artifact import (
    building,
    digest_file,
    digest_of,
    is_made,
    read_manifest,
)
from lorascope.config import Config, option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features import neuronpedia
from lorascope.features.arrays import KIND
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import read_published, to_published
from lorascope.runtime import progress

log = logging.getLogger(__name__)

_FORMULA = ("=", "+", "-", "@")  # with these a spreadsheet takes a text for something to run


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """What `lorascope export` needs to know."""

    input: Path = option(
        help="features.h5, or a features JSON of the published schema", identity=False
    )
    format: Literal["json", "csv", "neuronpedia"] = option(
        "json",
        help="published features JSON, table of statistics, or batches for import to Neuronpedia",
    )
    output: Path = option(
        help="file to write, .json or .csv; for neuronpedia a folder", identity=False
    )
    overwrite: bool = option(False, help="replace another output", identity=False)

    def check(self) -> None:
        """Refuse a name that would be read as something else."""
        super().check()
        suffix = self.output.suffix.lower()
        wanted = "" if self.format == "neuronpedia" else f".{self.format}"
        if wanted and suffix != wanted:
            raise ConfigError(f"--output is {self.output}, expected a {wanted} file")
        if not wanted and suffix in (".json", ".csv", ".h5"):
            raise ConfigError(f"--output is {self.output}, expected the name of a folder")


def run(config: ExportConfig) -> Path:
    """Write the export and return its path.

    Raises ArtifactError when the input is no feature index, or when the output is something else
    and `overwrite` is off.
    """
    source, out = config.input.expanduser(), config.output.expanduser()
    index = read_index(source)
    if config.format == "json":
        return _export_json(index, source, out, overwrite=config.overwrite)
    identity = {
        "settings": config.settings(),
        "parents": {"features": _digest(source)},
        "overwrite": config.overwrite,
    }
    if config.format == "csv":
        return _export_csv(index, out, identity)
    return neuronpedia.export(index, out, **identity)


def read_index(source: Path) -> FeatureIndex:
    """Return the index of a `features.h5` or of a published JSON, by the file's name.

    Raises ArtifactError when it is neither.
    """
    if source.is_dir():
        raise ArtifactError(f"{source} is a folder, expected a features.h5 or a features JSON")
    return FeatureIndex.open(source) if source.suffix == ".h5" else read_published(source)


def write_csv(index: FeatureIndex, path: Path) -> None:
    """Write the table of statistics as CSV, UTF-8. Not atomic by itself.

    What is unknown is an empty cell. A text that a spreadsheet could take for a formula has an
    apostrophe before it.
    """
    table = index.table()
    for name in table.columns:
        if table[name].dtype.kind not in "iuf":
            table[name] = [_cell(str(value)) for value in table[name]]
    table.columns = [_cell(str(name)) for name in table.columns]
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        table.to_csv(file, lineterminator="\n")


def _export_json(index: FeatureIndex, source: Path, out: Path, *, overwrite: bool) -> Path:
    """Write what `collect` would have written under this name."""
    manifest = {**index.manifest, "files": {}}
    if read_manifest(source) is None:
        manifest["parents"] = {"features": _digest(source)}
    identity = {
        "settings": manifest["settings"],
        "parents": manifest["parents"],
        "overwrite": overwrite,
    }
    if is_made(out, KIND, **identity):
        log.info("%s is already made from %s", out, source)
        return out
    with (
        building(out, KIND, **identity) as build,
        progress(len(index) + 2, "export", "pieces") as bar,
    ):
        with (build.path / "features.json").open("w", encoding="utf-8", newline="\n") as file:
            for piece in to_published(index, manifest):
                file.write(piece)
                bar.update()
        return build.publish_file("features.json")


def _export_csv(index: FeatureIndex, out: Path, identity: Mapping[str, Any]) -> Path:
    """Write the table. It has no room for a manifest: an equal file is taken for the same."""
    with building(out, "table", **identity) as build:
        made = build.path / "features.csv"
        write_csv(index, made)
        same = out.is_file() and filecmp.cmp(made, out, shallow=False)
        if (out.exists() or out.is_symlink()) and not same and not identity["overwrite"]:
            made.unlink()
            raise ArtifactError(
                f"{out} exists and holds something else; give another output, "
                "or --overwrite to replace it"
            )
        return build.publish_file(made.name)


def _digest(source: Path) -> str:
    manifest = read_manifest(source)
    return digest_file(source) if manifest is None else digest_of(manifest)


def _cell(text: str) -> str:
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
