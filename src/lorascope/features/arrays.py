"""The arrays of `features.h5`, schema 4: their types, their shapes, and the file.

The array `latent_n_active` is the dataset `latent/n_active`, and so on. The header of the file
(`arrayfile`) is the manifest, whose `files` gives type, shape, offset and SHA-256 of every array.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope import arrayfile
from lorascope.arrayfile import Arrays
from lorascope.artifact import Manifest, open_manifest, seal_file
from lorascope.errors import ArtifactError

KIND = "features"
SCHEMA = 4

WINDOWS = ("example", "sample", "special")
RANKINGS = ("mean", "lift", "before", "after")

# Array -> type and axes. Axes with the same name have the same length; `x+1` has one entry more.
# `window` has the examples, then the samples, then the examples at special tokens.
FIELDS: dict[str, tuple[str, str]] = {
    "latent_n_active": ("<i8", "latent"),
    "latent_n_special": ("<i8", "latent"),  # firings at special tokens
    "latent_max": ("<f4", "latent"),
    "latent_mean": ("<f4", "latent"),
    "latent_std": ("<f4", "latent"),
    "latent_n_rollouts": ("<i8", "latent"),
    "latent_by_role": ("<i8", "latent role"),  # firings; roles as in `content`
    "latent_by_position": ("<i8", "latent tenth"),  # firings in each tenth of the rollouts
    "latent_histogram": ("<u4", "latent bin"),
    "latent_histogram_edges": ("<f4", "edge"),  # one more than bins, or none
    "latent_fingerprint": ("<f2", "latent site"),  # rows add up to 1
    "latent_stability": ("<f4", "latent"),
    "near_decoder": ("<i4", "latent near"),  # nearest first, -1 if there are no more
    "near_cosine": ("<f4", "latent near"),
    "near_cofiring": ("<i4", "latent cofiring"),  # likewise
    "near_jaccard": ("<f4", "latent cofiring"),
    **{
        f"ranked_{name}_{part}": (dtype, f"latent {name}")  # best first, -1 if there are no more
        for name in RANKINGS
        for part, dtype in (("id", "<i4"), ("score", "<f4"))
    },
    "example_offset": ("<i8", "latent+1"),
    "example_value": ("<f4", "example"),
    "example_row": ("<i8", "example"),
    "example_rollout": ("<i8", "example"),
    "example_position": ("<i4", "example"),
    "example_n_alike": ("<i8", "example"),
    "sample_offset": ("<i8", "latent+1"),
    "sample_value": ("<f4", "sample"),
    "sample_row": ("<i8", "sample"),
    "sample_rollout": ("<i8", "sample"),
    "sample_position": ("<i4", "sample"),
    "sample_quantile": ("|i1", "sample"),  # 0 for the weakest fifth to 4
    "special_offset": ("<i8", "latent+1"),
    "special_value": ("<f4", "special"),
    "special_row": ("<i8", "special"),
    "special_rollout": ("<i8", "special"),
    "special_position": ("<i4", "special"),
    "window_offset": ("<i8", "window+1"),
    "window_target": ("<i4", "window"),
    "window_token_id": ("<i4", "window_token"),
    "window_activation": ("<f4", "window_token"),
    "text_rollout": ("<i8", "text"),  # ids of the rollouts that are kept whole
    "text_why": ("|u1", "text"),  # bits, see `examples`
    "text_l0": ("<f4", "text"),
    "text_fvu": ("<f4", "text"),
    "text_rarity": ("<f4", "text"),
    "text_offset": ("<i8", "text+1"),
    "text_token_id": ("<i4", "text_token"),
    "text_role": ("|u1", "text_token"),
    "text_code_offset": ("<i8", "text_token+1"),
    "text_latent": ("<i4", "fired"),
    "text_value": ("<f4", "fired"),
    "token_id": ("<i4", "vocabulary"),
    "token_offset": ("<i8", "vocabulary+1"),
    "token_data": ("|u1", "byte"),
    "token_special": ("|u1", "vocabulary"),  # 1 for special tokens
}


def complete_arrays(given: Mapping[str, npt.ArrayLike]) -> Arrays:
    """Return every array: the given ones with their types, and the rest filled with unknown.

    Unknown is -1 in integers and NaN in floats. Axes that no given array has get length 0.
    """
    arrays = {name: np.asarray(given[name], FIELDS[name][0]) for name in given}
    lengths: dict[str, int] = {}
    for name, array in arrays.items():
        for axis, length in zip(FIELDS[name][1].split(), array.shape, strict=True):
            lengths.setdefault(axis.removesuffix("+1"), length - axis.endswith("+1"))
    lengths.setdefault("window", sum(lengths.get(part, 0) for part in WINDOWS))
    for name, (dtype, axes) in FIELDS.items():
        if name not in arrays:
            unknown = {"i": 0 if axes.endswith("+1") else -1, "f": np.nan}.get(dtype[1], 0)
            arrays[name] = np.full(_shape(axes, lengths), unknown, dtype=dtype)
    return arrays


def save_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], manifest: Manifest) -> None:
    """Write the file, with `files` of the manifest filled in."""
    plain = {
        dataset_name(name): np.ascontiguousarray(arrays[name], dtype)
        for name, (dtype, _) in FIELDS.items()
    }
    files = {name: {"sha256": checksum(array)} for name, array in plain.items()}
    arrayfile.write_arrays(path, plain, replace(manifest, files=files).to_sealed_json())
    seal_file(path)


def map_arrays(path: Path) -> tuple[Manifest, Arrays]:
    """Return the manifest and the arrays, mapped into memory; most are read when they are used.

    Raises ArtifactError if the file is not a feature index, has another schema, lacks an array, or
    if shapes or offsets do not fit each other.
    """
    manifest = open_manifest(path, KIND, SCHEMA, oldest=SCHEMA)
    mapped = arrayfile.map_arrays(path)[1]
    arrays: Arrays = {}
    for name, (dtype, axes) in FIELDS.items():
        array = mapped.get(dataset_name(name))
        if array is None or array.dtype != np.dtype(dtype) or array.ndim != len(axes.split()):
            raise ArtifactError(
                f"{path} has no array {dataset_name(name)} of type {np.dtype(dtype)} and axes "
                f"({axes}); run collect again"
            )
        arrays[name] = array
    for fault, holds in chain(check_shapes(arrays), check_offsets(arrays)):
        if not holds:
            raise ArtifactError(f"{path} is damaged: {fault}; run collect again")
    return manifest, arrays


def check_offsets(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[tuple[str, bool]]:
    """Yield for each array of offsets a fault, and True unless the array has that fault."""
    for name, values in (
        ("example_offset", "example_value"),
        ("sample_offset", "sample_value"),
        ("special_offset", "special_value"),
        ("window_offset", "window_token_id"),
        ("text_offset", "text_token_id"),
        ("text_code_offset", "text_latent"),
        ("token_offset", "token_data"),
    ):
        offset, total = arrays[name], len(arrays[values])
        rises = offset[0] == 0 and offset[-1] == total and bool(np.all(offset[1:] >= offset[:-1]))
        yield f"{dataset_name(name)} does not rise from 0 to {total}", rises


def check_shapes(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[tuple[str, bool]]:
    """Yield for each array a fault of its shape, and True unless the array has that fault."""
    lengths: dict[str, int] = {}
    for name, (_, axes) in FIELDS.items():
        shape = arrays[name].shape
        for axis, length in zip(axes.split(), shape, strict=False):
            lengths.setdefault(axis.removesuffix("+1"), length - axis.endswith("+1"))
        expected = _shape(axes, lengths)
        yield f"{dataset_name(name)} has shape {shape}, expected {expected}", shape == expected
    n_edges, n_bins = lengths["edge"], lengths["bin"]
    expected = n_bins + 1 if n_bins else 0
    yield f"latent/histogram_edges has {n_edges} entries, expected {expected}", n_edges == expected
    n_windows, expected = lengths["window"], sum(lengths[part] for part in WINDOWS)
    yield f"window/offset has {n_windows} windows, expected {expected}", n_windows == expected


def _shape(axes: str, lengths: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(
        lengths.get(axis.removesuffix("+1"), 0) + axis.endswith("+1") for axis in axes.split()
    )


def dataset_name(name: str) -> str:
    """Return the name of an array in the file."""
    return name.replace("_", "/", 1)


def checksum(array: npt.NDArray[Any]) -> str:
    """Return the SHA-256 of an array's bytes."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(raw.data).hexdigest()
