"""Write a feature index in a format that other tools read.

- `json`: the published schema, for the published dashboard script and for `dashboard`.
- `csv`: the table of statistics, one line per feature.

In: `features.h5`, or a features JSON of the published schema. Out: a JSON or CSV file.
The same index gives the same bytes.
"""

import filecmp
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lorascope.artifact import Identity, read_manifest
from lorascope.config import Config, option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import digest_of_index, read_index, write_published
from lorascope.stage import Build, building, built

_FORMULA = ("=", "+", "-", "@")  # a spreadsheet runs a text that starts with one of these


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Options of `export`."""

    input: Path = option(
        help="feature index to read: features.h5, or JSON of the published schema", identity=False
    )
    format: Literal["json", "csv"] = option(
        "json", help="json is the published schema, csv the table of statistics"
    )
    output: Path = option(help=".json or .csv file to write", identity=False)
    overwrite: bool = option(False, help="replace an output with other contents", identity=False)

    def check(self) -> None:
        """Check that the output's suffix fits the format."""
        super().check()
        wanted = f".{self.format}"
        if self.output.suffix.lower() != wanted:
            raise ConfigError(
                f"--output is {self.output}, expected a {wanted} file for --format {self.format}"
            )


def run(config: ExportConfig) -> Path:
    """Write the export and return its path.

    Raises ArtifactError if the input is not a feature index, or if the output exists with other
    contents and `overwrite` is off.
    """
    source, out = config.input.expanduser(), config.output.expanduser()
    index = read_index(source)
    if config.format == "json":
        return _export_json(index, source, out, overwrite=config.overwrite)
    identity = Identity(
        kind="table",
        schema=1,
        settings=config.settings(),
        parents={"features": digest_of_index(source)},
    )
    return _export_csv(index, out, identity, overwrite=config.overwrite)


def write_csv(index: FeatureIndex, path: Path) -> None:
    """Write the table of statistics as UTF-8 CSV, not atomically.

    Unknown values are empty cells. A text that a spreadsheet could run as a formula gets a leading
    apostrophe.
    """
    table = index.table()
    for name in table.columns:
        if table[name].dtype.kind not in "iuf":
            table[name] = [_cell(str(value)) for value in table[name]]
    table.columns = [_cell(str(name)) for name in table.columns]
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        table.to_csv(file, lineterminator="\n")


def _export_json(index: FeatureIndex, source: Path, out: Path, *, overwrite: bool) -> Path:
    """Write what `collect` would write to a `.json` output, and the labels if there are any."""
    manifest = replace(index.manifest, files={})
    if read_manifest(source) is None:
        manifest = replace(manifest, parents={"features": digest_of_index(source)})
    if index.labels is not None:
        parents = {**manifest.parents, "labels": index.labels.manifest.digest}
        manifest = replace(manifest, parents=parents)

    def make(build: Build) -> None:
        write_published(index, build.path / "features.json", manifest)
        build.publish_file("features.json")

    return built(out, manifest.identity, make, overwrite=overwrite)


def _export_csv(index: FeatureIndex, out: Path, identity: Identity, *, overwrite: bool) -> Path:
    """Write the table. A CSV has no manifest, so an existing file is compared byte by byte."""
    with building(out, identity, overwrite=overwrite) as build:
        table = build.path / "features.csv"
        write_csv(index, table)
        is_same = out.is_file() and filecmp.cmp(table, out, shallow=False)
        if (out.exists() or out.is_symlink()) and not is_same and not overwrite:
            table.unlink()
            raise ArtifactError(
                f"{out} exists with other contents; choose another --output, "
                "or pass --overwrite to replace it"
            )
        return build.publish_file(table.name)


def _cell(text: str) -> str:
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
