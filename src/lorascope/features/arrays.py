"""The arrays of `features.h5`, schema 2: their types, their shapes, and the file.

The file holds arrays only, contiguous and uncompressed, so that opening it is mapping it. The
array `latent_n_active` is the dataset `latent/n_active`, and so on. The attribute `manifest` is the
manifest, whose `files` gives size and SHA-256 of every array. The same content gives the same
bytes.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from lorascope.artifact import canonical, open_manifest
from lorascope.errors import ArtifactError

KIND = "features"
SCHEMA = 2
Arrays = dict[str, npt.NDArray[Any]]

# Array -> type and axes. Equal names of axes are equal lengths; `x+1` has one more, for bounds.
# `window` counts the examples and after them the samples.
FIELDS: dict[str, tuple[str, str]] = {
    "latent_n_active": ("<i8", "latent"),
    "latent_max": ("<f4", "latent"),
    "latent_mean": ("<f4", "latent"),
    "latent_std": ("<f4", "latent"),
    "latent_n_rollouts": ("<i8", "latent"),
    "latent_by_role": ("<i8", "latent role"),
    "latent_by_position": ("<i8", "latent tenth"),
    "latent_histogram": ("<u4", "latent bin"),
    "latent_histogram_edges": ("<f4", "edge"),
    "latent_fingerprint": ("<f2", "latent site"),
    "latent_stability": ("<f4", "latent"),
    "near_decoder": ("<i4", "latent near"),
    "near_cosine": ("<f4", "latent near"),
    "near_cofiring": ("<i4", "latent beside"),
    "near_jaccard": ("<f4", "latent beside"),
    "ranked_mean_id": ("<i4", "latent mean"),
    "ranked_mean_score": ("<f4", "latent mean"),
    "ranked_lift_id": ("<i4", "latent lift"),
    "ranked_lift_score": ("<f4", "latent lift"),
    "ranked_before_id": ("<i4", "latent before"),
    "ranked_before_score": ("<f4", "latent before"),
    "ranked_after_id": ("<i4", "latent after"),
    "ranked_after_score": ("<f4", "latent after"),
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
    "sample_quantile": ("|i1", "sample"),
    "window_offset": ("<i8", "window+1"),
    "window_target": ("<i4", "window"),
    "window_token_id": ("<i4", "window_token"),
    "window_activation": ("<f4", "window_token"),
    "text_rollout": ("<i8", "text"),
    "text_why": ("|u1", "text"),
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
    "token_special": ("|u1", "vocabulary"),
}
RANKINGS = ("mean", "lift", "before", "after")


def completed(given: Mapping[str, npt.ArrayLike]) -> Arrays:
    """Return every array: the given ones in their types, and others of which nothing is known.

    Unknown is -1 in whole numbers and NaN in others; axes that no given array has are of length 0.
    """
    arrays = {name: np.asarray(given[name], FIELDS[name][0]) for name in given}
    lengths: dict[str, int] = {}
    for name, array in arrays.items():
        for axis, length in zip(FIELDS[name][1].split(), array.shape, strict=True):
            lengths.setdefault(axis.removesuffix("+1"), length - axis.endswith("+1"))
    lengths.setdefault("window", lengths.get("example", 0) + lengths.get("sample", 0))
    for name, (dtype, axes) in FIELDS.items():
        if name not in arrays:
            unknown = {"i": 0 if axes.endswith("+1") else -1, "f": np.nan}.get(dtype[1], 0)
            arrays[name] = np.full(_shape(axes, lengths), unknown, dtype=dtype)
    return arrays


def save_arrays(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], manifest: Mapping[str, Any]
) -> None:
    """Write the file. The manifest in it is the given one with `files` filled in."""
    plain = {n: np.ascontiguousarray(arrays[n], dtype) for n, (dtype, _) in FIELDS.items()}
    files = {dataset_of(name): seal(array) for name, array in plain.items()}
    with h5py.File(path, "w", alignment_threshold=1, alignment_interval=64) as file:
        for name, array in plain.items():
            file.create_dataset(dataset_of(name), data=array, track_times=False)
        file.attrs["manifest"] = canonical({**manifest, "files": files})


def map_arrays(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Return the manifest and the arrays, mapped into memory: nothing is read before it is used.

    Raises ArtifactError when the file is no feature index, of another schema, or lacks an array.
    """
    manifest = open_manifest(path, KIND, SCHEMA)
    if manifest["schema"] < SCHEMA:
        raise ArtifactError(
            f"{path} has schema {manifest['schema']} of {KIND}, this version reads {SCHEMA}; "
            "run collect again"
        )
    arrays: Arrays = {}
    mapped = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    with h5py.File(path, "r") as file:
        for name, (dtype, _) in FIELDS.items():
            dataset = file.get(dataset_of(name))
            if not isinstance(dataset, h5py.Dataset) or dataset.dtype != np.dtype(dtype):
                raise ArtifactError(
                    f"{path} has no array {dataset_of(name)} of type {np.dtype(dtype)}; "
                    "run collect again"
                )
            start = dataset.id.get_offset()
            if start is None and dataset.size:
                raise ArtifactError(f"{path}: {dataset_of(name)} is compressed, expected plain")
            end = (start or 0) + dataset.nbytes
            arrays[name] = mapped[start or 0 : end].view(dtype).reshape(dataset.shape)
    return manifest, arrays


def shape_promises(arrays: Mapping[str, npt.NDArray[Any]]) -> Iterator[tuple[str, bool]]:
    """Yield for each array whether its shape fits the others', as a claim and its truth."""
    lengths: dict[str, int] = {}
    for name, (_, axes) in FIELDS.items():
        shape = arrays[name].shape
        for axis, length in zip(axes.split(), shape, strict=False):
            lengths.setdefault(axis.removesuffix("+1"), length - axis.endswith("+1"))
        expected = _shape(axes, lengths)
        yield f"{dataset_of(name)} has shape {shape}, expected {expected}", shape == expected
    edges = lengths["bin"] + 1 if lengths["bin"] else 0
    yield f"latent/histogram_edges has not {edges} entries", lengths["edge"] == edges
    n_windows = lengths["example"] + lengths["sample"]
    yield f"window/offset is not of {n_windows} windows", lengths["window"] == n_windows


def _shape(axes: str, lengths: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(
        lengths.get(axis.removesuffix("+1"), 0) + axis.endswith("+1") for axis in axes.split()
    )


def dataset_of(name: str) -> str:
    """Return the name that an array has in the file."""
    return name.replace("_", "/", 1)


def seal(array: npt.NDArray[Any]) -> dict[str, Any]:
    """Return an array's size in bytes and its SHA-256."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"size": array.nbytes, "sha256": hashlib.sha256(raw.data).hexdigest()}
