"""Compare reports with their JSON schemas by a validator that knows nothing of lorascope."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from lorascope.inspection import report_schema


def faults(kind: str, report: Any) -> list[str]:
    """Return what a validator says of a report."""
    schema = report_schema(kind)
    Draft202012Validator.check_schema(schema)
    return [error.message for error in Draft202012Validator(schema).iter_errors(report)]


def require_schema(path: Path, kind: str) -> None:
    """Fail unless the file of a report fits the schema of its kind."""
    assert faults(kind, json.loads(path.read_text(encoding="utf-8"))) == []
