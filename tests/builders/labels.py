"""Labels made by hand, and their file next to an index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorascope.artifact import Identity, read_manifest
from lorascope.features.label_file import FILE, KIND, SCHEMA, Label, write_labels


def label_of(text: str, **given: Any) -> Label:
    """A label by rule with this text, and a score of 0.9 unless others are given."""
    values: dict[str, Any] = {
        "name": text,
        "sentence": f"Fires on {text}.",
        "kind": "token",
        "category": "word",
        "author": "rule",
        "balanced_accuracy": 0.9,
        "interval": (0.85, 0.95),
        "precision": 0.5,
        "recall": 0.9,
        "same_token": None,
        "near": 0.8,
        "shuffled": 0.5,
        "n_fired": 20,
        "rule": (),
    }
    return Label(**{**values, **given})


def save_labels(index: Path, labels: Mapping[int, Label], digest: str | None = None) -> Path:
    """Write labels next to an index, as labels of it or of the index with another digest."""
    manifest = read_manifest(index)
    assert manifest is not None
    identity = Identity(
        kind=KIND, schema=SCHEMA, settings={}, parents={"features": digest or manifest.digest}
    )
    path = index.with_name(FILE)
    content = {"n_features": manifest.content["n_features"]}
    write_labels(path, labels, identity.manifest(None, content))
    return path
