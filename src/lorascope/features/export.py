"""Write a feature index in a format that other tools read; the output's suffix says which.

- `.json`: the published schema, for the published dashboard script and for `dashboard`.
- `.csv`: the table of statistics, one line per feature; with the tokens that it promotes and
  suppresses, if a report of `direct` says them.

In: `features.h5`, or a features JSON of the published schema. The same index gives the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from lorascope.artifact import check_seal, open_manifest, read_manifest, replacing
from lorascope.config import Config, option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import digest_of_index, read_index, write_published
from lorascope.stage import Build, built

_FORMULA = ("=", "+", "-", "@")  # a spreadsheet runs a text that starts with one of these


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Options of `export`."""

    input: Path = option(
        help="feature index to read: features.h5, or JSON of the published schema", identity=False
    )
    output: Path = option(
        help="file to write: .json is the published schema, .csv the table of statistics",
        identity=False,
    )
    effects: Path | None = option(
        None,
        help="report of lorascope direct: its promoted and suppressed tokens become columns of the "
        ".csv",
        identity=False,
    )
    overwrite: bool = option(False, help="replace an output with other contents", identity=False)

    def check(self) -> None:
        """Check the output's suffix."""
        super().check()
        if self.output.suffix not in (".json", ".csv"):
            raise ConfigError(f"--output is {self.output}, expected a .json or .csv file")
        if self.effects is not None and self.output.suffix != ".csv":
            raise ConfigError("--effects adds columns to a .csv, --output is a .json; leave it out")


def run(config: ExportConfig) -> Path:
    """Write the export and return its path.

    Raises ArtifactError if the input is not a feature index, or if the output exists with other
    contents and `overwrite` is off.
    """
    source, out = config.input.expanduser(), config.output.expanduser()
    index = read_index(source)
    if out.suffix == ".json":
        return _export_json(index, source, out, overwrite=config.overwrite)
    direct = {} if config.effects is None else _direct_tokens(config.effects, index)
    return _export_csv(csv_of(index, direct), out, overwrite=config.overwrite)


def csv_of(index: FeatureIndex, added: Mapping[str, Sequence[str]] = MappingProxyType({})) -> bytes:
    """Return the table of statistics as UTF-8 CSV, with `added` columns of text at its end.

    Unknown values are empty cells. A text that a spreadsheet could run as a formula gets a leading
    apostrophe.
    """
    table = index.table().assign(**added)
    for name in table.columns:
        if table[name].dtype.kind not in "iuf":
            table[name] = [_cell(str(value)) for value in table[name]]
    table.columns = [_cell(str(name)) for name in table.columns]
    return table.to_csv(lineterminator="\n").encode("utf-8", "replace")


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


def _direct_tokens(path: Path, index: FeatureIndex) -> dict[str, list[str]]:
    """Return the promoted and the suppressed tokens of every feature, from a report of `direct`.

    Raises ArtifactError if it is damaged, of another kind or of another SAE.
    """
    manifest = open_manifest(path, "direct", 1)
    if damage := check_seal(path):
        raise ArtifactError(f"{path} is damaged ({damage}); make it again")
    features = json.loads(path.read_text(encoding="utf-8"))["features"]
    sae = index.manifest.parents.get("sae")
    if sae is None or manifest.parents.get("sae") != sae or len(features) != len(index):
        raise ArtifactError(
            f"{path} was made with another SAE than the feature index, so feature numbers do not "
            "match; make both from the same SAE"
        )
    return {
        side: [" | ".join(token["token"] for token in one[side]) for one in features]
        for side in ("promoted", "suppressed")
    }


def _export_csv(data: bytes, out: Path, *, overwrite: bool) -> Path:
    """Write the table. A CSV has no manifest, so an existing file is compared byte by byte."""
    if out.exists() and not overwrite:
        if not out.is_file() or out.read_bytes() != data:
            raise ArtifactError(
                f"{out} exists with other contents; choose another --output, "
                "or pass --overwrite to replace it"
            )
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        temporary.write_bytes(data)
    return out


def _cell(text: str) -> str:
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
