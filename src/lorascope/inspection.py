"""Describe adapters and the files that lorascope made, and check the files for damage.

Descriptions come from headers alone and need no torch. A check reads every byte first, then what
they mean. `report_schema` is the JSON schema of a kind of file.
"""

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.artifact import Manifest, check_files, read_manifest
from lorascope.config import did_you_mean
from lorascope.errors import ArtifactError, ConfigError, LorascopeError
from lorascope.hub import find_folder
from lorascope.record_json import DIALECT, from_json, json_schema
from lorascope.remote import as_path

if TYPE_CHECKING:
    from lorascope.causal.report_records import ReportRecord

_FOREIGN = "is no artifact of this version of lorascope, or its header is damaged"
_LARGEST_UNSEALED = 1 << 24  # bytes of such a file
_OF_RUN = (
    "activations",
    "sae",
    "features.h5",
    "labels.json",
    "dashboard.html",
    *("report.json", "report.md"),
    *("compare.json", "compare.md", "compare.html", "audit.json", "audit.md", "audit.html"),
    "evaluation.json",
    "effects/direct.json",
    "effects/ablation.json",
    "effects/attribution.json",
)  # what a run makes, so that one without a header is damaged

# the file of each kind of JSON and its record; importing one may take a while
_REPORTS = {
    "evaluation": ("evaluation.json", "causal.report_records.EvaluationReport"),
    "ablation": ("effects/ablation.json", "causal.report_records.AblationReport"),
    "attribution": ("effects/attribution.json", "causal.report_records.AttributionReport"),
    "direct": ("effects/direct.json", "causal.report_records.DirectReport"),
    "steering": ("the JSON of lorascope steer", "causal.report_records.SteeringReport"),
    "edit": ("report.json in an edited adapter", "causal.report_records.EditReport"),
    "overview": ("report.json of a run", "dashboard.overview.Overview"),
    "study": ("the JSON of lorascope study", "labels.published_study.StudyReport"),
    "audit": ("audit.json", "audit.audit_records.AuditReport"),
    "comparison": ("compare.json", "compare.compare_records.ComparisonReport"),
}
_FILES = {
    "labels": ("labels.json", "features.label_file.LabelFile"),
    "features": ("a features JSON", "features.published_records.PublishedFeatures"),
    "summary": ("summary.json of a run", "run_summary.RunSummary"),
    "runs": ("NAME.runs.json of a sweep", "sae.training_log.SweepRow"),
    "training-log": ("a line of NAME.jsonl, an SAE's log", "sae.training_log.TrainingLine"),
    "effect-texts": ("effects/texts.json", "depth.PlannedTexts"),
}
_SEALED = {  # those of them with a manifest: the oldest schema, and where the newest is
    "labels": (1, "features.label_file.SCHEMA"),
    "features": (4, "features.arrays.SCHEMA"),
}
_IN_A_FOLDER = ("edit",)  # whose manifest is beside the report, not in it
_MANIFEST = "manifest"
KINDS = {
    **{kind: file for kind, (file, _) in (_REPORTS | _FILES).items()},
    _MANIFEST: "manifest.json of a store or an SAE",
}


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"lorascope.{module}"), attribute)


def _record_of(kind: str) -> "type[ReportRecord]":
    """Import and return the record of a kind of report."""
    return _imported(_REPORTS[kind][1])


def report_schema(kind: str) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of the files of a kind, such as "evaluation".

    It allows what lorascope writes, and nothing else. `lorascope schema` lists the kinds. Raises
    ConfigError at another kind.
    """
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise ConfigError(f"no file has the kind {kind}{hint}; there are {', '.join(KINDS)}")
    if kind == _MANIFEST:
        return {"$schema": DIALECT, **_manifest_schema({"type": "string"}, {"minimum": 1})}
    record = _imported((_REPORTS | _FILES)[kind][1])
    schema = json_schema(tuple[record, ...] if kind == "runs" else record)
    if kind in _SEALED:
        oldest, newest = _SEALED[kind][0], _imported(_SEALED[kind][1])
    elif kind in _REPORTS and kind not in _IN_A_FOLDER:
        oldest, newest = record.oldest or record.schema, record.schema
    else:
        return schema
    manifest = _manifest_schema({"const": kind}, {"minimum": oldest, "maximum": newest})
    if kind == "features":
        schema["$defs"]["PublishedMetadata"]["properties"]["lorascope"] = manifest
        return schema
    metadata = {
        "type": "object",
        "properties": {"lorascope": manifest},
        "required": ["lorascope"],
        "additionalProperties": False,
    }
    schema["properties"] = {"metadata": metadata, **schema["properties"]}
    schema["required"] = ["metadata", *schema["required"]]
    return schema


def _manifest_schema(kind: dict[str, Any], numbers: dict[str, int]) -> dict[str, Any]:
    """Return the schema of a manifest, with those of its kind and of its schema number."""
    return {
        "description": "What the file says of itself: docs/formats.md, M.",
        "type": "object",
        "properties": {
            "seal": {"type": "string", "pattern": "^lorascope-sha256:[0-9a-f]{64}$"},
            "kind": kind,
            "schema": {"type": "integer", **numbers},
            "version": {"type": "string"},
            "settings": {"type": "object"},
            "parents": {"type": "object", "additionalProperties": {"type": "string"}},
            "layout": {"type": ["object", "null"]},
            "content": {"type": "object"},
            "files": {"type": "object"},
        },
        "required": ["seal", "kind", "schema", "version", "settings", "parents", "content"],
    }


def describe(name: str, adapter_name: str | None = None, *, as_json: bool = False) -> str:
    """Return what a file, a folder or an adapter holds: short lines, or everything as JSON.

    `name` is a path, or the hub id of an adapter; `adapter_name` is one of several in its folder.
    """
    path = as_path(name).expanduser()
    if _is_adapter(path):
        from lorascope.subject import inventory
        from lorascope.subject.adapter import inspect_adapter

        adapter = inspect_adapter(name, adapter_name)
        if as_json:
            return json.dumps(inventory.to_json(adapter), indent=1, ensure_ascii=False)
        return inventory.describe(adapter)
    manifest = read_manifest(path)
    if manifest is None:
        if parts := _parts_of(path):
            return _describe_run(path, parts, as_json=as_json)
        if found := _unsealed(path):
            return json.dumps(found[1], indent=1) if as_json else "\n".join(_lines_of(*found))
        raise ArtifactError(f"{path} {_why_foreign(path)}")
    if as_json:
        return json.dumps(manifest.to_json(), indent=1, ensure_ascii=False)
    return "\n".join(_summary(manifest))


def _describe_run(folder: Path, parts: Mapping[Path, Manifest | None], *, as_json: bool) -> str:
    """Return what the artifacts in the folder of a run are, a line each."""
    named = {path.relative_to(folder).as_posix(): one for path, one in parts.items()}
    if as_json:
        found = {name: one and one.to_json() for name, one in named.items()}
        return json.dumps(found, indent=1, ensure_ascii=False)
    return "\n".join(
        f"{name}: {next(_summary(one)) if one else _FOREIGN}" for name, one in named.items()
    )


def _unsealed(path: Path) -> tuple[str, Any] | None:
    """Return the kind and the JSON of a file that lorascope writes without a manifest, if it is."""
    if not path.is_file() or path.stat().st_size > _LARGEST_UNSEALED:
        return None
    if path.suffix == ".jsonl":
        from lorascope.sae.training_log import read_training_log

        kinds, data = ("training-log",), read_training_log(path)
    else:
        kinds = ("runs", "summary", "effect-texts")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return None
    for kind in kinds if data else ():
        record = _imported(_FILES[kind][1])
        try:
            for one in data if isinstance(data, list) else [data]:
                from_json(record, one, str(path))
        except ArtifactError:
            continue
        return kind, data
    return None


def _lines_of(kind: str, data: Any) -> Iterator[str]:
    """Yield what a file without a manifest says, a line for each part of it."""
    if kind == "training-log":
        first, last = data[0], data[-1]
        steps = f"{first['step']:,} to {last['step']:,}"
        yield f"the training log of an SAE: {len(data)} lines, steps {steps}"
        for name in (name for name in last if name != "step"):
            yield f"{name}: {_short(first[name]) or 'unknown'} → {_short(last[name]) or 'unknown'}"
    elif kind == "runs":
        yield f"the table of a sweep: {len(data)} SAEs"
        yield from (_short(row) for row in data)
    else:
        yield "the summary of a run" if kind == "summary" else "a run's note of texts for effects"
        yield from (f"{name}: {_short(value)}" for name, value in data.items())


def _why_foreign(path: Path) -> str:
    """Return what a path is that is no artifact, as far as it can be told."""
    if found := _unsealed(path):
        return f"is {next(_lines_of(*found))}; it has no checksum, lorascope info shows it"
    if path.is_dir():
        find_folder(str(path), "adapter", [])  # raises for a cache of the hub
    elif (path.parent / "adapter_config.json").is_file():
        return f"is a file of an adapter; give its folder {path.parent}"
    if (path / "config.json").is_file():
        return "holds a full model; give the folder of an adapter, or what lorascope made"
    if path.is_dir() and not (path / "manifest.json").exists():
        return "holds nothing that lorascope made"
    return _FOREIGN


def _is_adapter(path: Path) -> bool:
    """Say whether a path is an adapter: a folder with its files, or a hub id."""
    if path.is_dir():
        files = ("adapter_config.json", "*/adapter_config.json", "adapter_model.*")
        is_artifact = (path / "manifest.json").exists()
        return not is_artifact and any(any(path.glob(file)) for file in files)
    is_file = path.exists() or path.suffix in (".h5", ".pt", ".json", ".html", ".safetensors")
    return not is_file and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) is not None


def _summary(manifest: Manifest) -> Iterator[str]:
    """Yield what an artifact says of itself, a line for each part of its content."""
    yield f"{manifest.kind}, schema {manifest.schema}, made by lorascope {manifest.version}"
    if layout := manifest.layout:
        yield f"columns: {layout.d_in} at {len(layout.sites)} sites ({layout.initials})"
    for name, value in manifest.content.items():
        if text := _short(value):
            yield f"{name}: {text}"
    yield f"settings: {_short(manifest.settings)}"
    for name, digest in manifest.parents.items():
        yield f"made from {name} {digest[:12]}"


def _short(value: Any) -> str:
    """Return a JSON value on one line: long lists by their length, nothing that is unknown."""
    if isinstance(value, dict):
        parts = {key: _short(part) for key, part in value.items() if not isinstance(part, dict)}
        return ", ".join(f"{key} {text}" for key, text in parts.items() if text)
    if isinstance(value, list):
        is_long = len(value) > 8 or any(isinstance(part, dict | list) for part in value)
        return f"({len(value)} values)" if is_long else " ".join(map(_short, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def artifacts_in(path: Path) -> list[Path]:
    """Return the path itself, or what lorascope made in the folder of a run."""
    return list(_parts_of(path)) or [path]


def _parts_of(path: Path) -> dict[Path, Manifest | None]:
    """Return the artifacts in the folder of a run, None if the header is damaged; else nothing."""
    if not path.is_dir() or (path / "manifest.json").exists():
        return {}
    found = {
        one: read_manifest(one)
        for one in sorted([*path.iterdir(), *path.glob("effects/*"), *path.glob("rows/*")])
    }
    if not any(found.values()):
        return {}
    of_run = {path / name for name in _OF_RUN}
    return {one: manifest for one, manifest in found.items() if manifest or one in of_run}


def verify(path: Path) -> list[str]:
    """Return what is broken in an artifact, a line each: first its bytes, then what they mean."""
    manifest = read_manifest(path)
    if manifest is None:
        return [_why_foreign(path)]
    if broken := check_files(path):
        return broken
    kind = manifest.kind
    try:
        if kind == "activations":
            from lorascope.activations.store import check_contents

            return check_contents(path)
        if kind == "features" and path.suffix == ".h5":
            from lorascope.features.index import FeatureIndex

            FeatureIndex.open(path).verify()
        elif kind == "features":
            from lorascope.features.published_json import read_published

            read_published(path)
        elif kind == "labels":
            from lorascope.features.label_file import read_labels

            read_labels(path)
        elif kind == "sae":
            from lorascope.sae.model import load_sae

            load_sae(path)
        elif kind in _REPORTS and kind not in _IN_A_FOLDER and path.suffix == ".json":
            from lorascope.causal.study import read_report

            read_report(path, (_record_of(kind),))
    except LorascopeError as error:
        return [str(error)]
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        return [f"holds values that do not fit each other ({type(error).__name__}: {error})"]
    return []
