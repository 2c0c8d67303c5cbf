"""The arrays of `features.h5`, schema 4: types, shapes, the file, and what always holds of them.

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
N_QUANTILES = 5
_Known = Mapping[str, npt.NDArray[Any]]

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


def save_arrays(path: Path, arrays: _Known, manifest: Manifest) -> None:
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


def check_offsets(arrays: _Known) -> Iterator[tuple[str, bool]]:
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


def check_shapes(arrays: _Known) -> Iterator[tuple[str, bool]]:
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


def verify_arrays(manifest: Manifest, arrays: _Known) -> None:
    """Raise ArtifactError that names the first broken promise (F in `docs/formats.md`), if any."""
    for name, said in manifest.files.items():
        array = arrays.get(name.replace("/", "_", 1))
        if array is None or checksum(array) != said.get("sha256"):
            raise _damaged(f"{name} has other bytes than its checksum")
    checks = chain(
        check_shapes(arrays),
        check_offsets(arrays),
        _check_examples(arrays, manifest.content.get("top_k")),
        _check_statistics(arrays),
        _check_windows(arrays),
        _check_whole_rollouts(arrays),
    )
    for fault, holds in checks:  # later ones rely on earlier
        if not holds:
            raise _damaged(fault)


def _damaged(fault: str) -> ArtifactError:
    return ArtifactError(f"the feature index is damaged: {fault}; run collect again")


def _check_examples(arrays: _Known, top_k: Any) -> Iterator[tuple[str, Any]]:
    for part, largest, fired in (
        ("example", arrays["latent_max"], arrays["latent_n_active"]),
        ("special", np.full_like(arrays["latent_max"], np.nan), arrays["latent_n_special"]),
    ):
        counts = np.diff(arrays[f"{part}_offset"])
        latent = np.repeat(np.arange(len(arrays["latent_n_active"])), counts)
        value, row = arrays[f"{part}_value"], arrays[f"{part}_row"]
        same_latent, is_tie = latent[1:] == latent[:-1], value[1:] == value[:-1]
        falls = value[1:] <= value[:-1]
        row_rises = (row[1:] > row[:-1]) | (row[1:] < 0)
        yield f"{part}/value is not finite", np.all(np.isfinite(value))
        yield f"{part}/value is not in descending order", np.all(falls | ~same_latent)
        yield (
            f"{part}/row is not ascending among equal values",
            np.all(row_rises | ~is_tie | ~same_latent),
        )
        above = value > largest[latent]
        yield f"latent/max is below the value of an {part}", not np.any(above)
        yield f"latent has more {part}s than firings", np.all((counts <= fired) | (fired < 0))
    counts = np.diff(arrays["example_offset"])
    within = not isinstance(top_k, int) or np.all(counts <= top_k)
    yield f"latent has more than top_k = {top_k} examples", within
    quantile = arrays["sample_quantile"]
    latent = np.repeat(np.arange(len(arrays["latent_n_active"])), np.diff(arrays["sample_offset"]))
    key = latent * N_QUANTILES + (N_QUANTILES - 1 - quantile)
    yield (
        "sample/quantile is not between 0 and 4",
        np.all((quantile >= 0) & (quantile < N_QUANTILES)),
    )
    yield "sample/quantile is not in descending order", np.all(np.diff(key) >= 0)
    largest = arrays["latent_max"][latent]
    yield "latent/max is below a sample's value", np.all(arrays["sample_value"] <= largest)


def _check_statistics(arrays: _Known) -> Iterator[tuple[str, Any]]:
    fired, n_special = arrays["latent_n_active"], np.maximum(arrays["latent_n_special"], 0)
    for name in ("latent_histogram", "latent_by_role", "latent_by_position"):
        counts = arrays[name]
        if counts.shape[1]:
            total, said = counts.sum(axis=1, dtype=np.int64), "n_active"
            if name == "latent_by_role":
                total, said = total - n_special, "n_active and n_special"
            yield f"{dataset_name(name)} does not add up to {said}", np.all(total == fired)
    rises = np.all(np.diff(arrays["latent_histogram_edges"]) > 0)
    yield "latent/histogram_edges do not rise", rises
    if arrays["latent_fingerprint"].shape[1]:
        total = arrays["latent_fingerprint"].sum(axis=1, dtype=np.float64)
        adds_up = (np.abs(total - 1) < 0.02) | (total == 0)
        yield "latent/fingerprint does not add up to 1", np.all(adds_up)
    for ids, scores in (
        (arrays["near_decoder"], arrays["near_cosine"]),
        (arrays["near_cofiring"], arrays["near_jaccard"]),
    ):
        known = ids >= 0
        itself = ids == np.arange(len(arrays["latent_n_active"]))[:, None]
        yield (
            "near names a latent that does not exist",
            np.all(ids < len(arrays["latent_n_active"])),
        )
        yield "near names the latent itself", not np.any(itself)
        falls = (scores[:, 1:] <= scores[:, :-1]) | ~known[:, 1:]
        yield "near is not in descending order", np.all(falls)
    for ranking in RANKINGS:
        ids = arrays[f"ranked_{ranking}_id"]
        missing = (ids != -1) & ~np.isin(ids, arrays["token_id"])
        yield f"ranked/{ranking}_id is missing in token/id", not np.any(missing)


def _check_windows(arrays: _Known) -> Iterator[tuple[str, Any]]:
    start, target = arrays["window_offset"][:-1], arrays["window_target"]
    inside = (target >= 0) & (target < np.diff(arrays["window_offset"]))
    yield "window/target is outside its window", np.all(inside)
    position = np.concatenate([arrays[f"{part}_position"] for part in WINDOWS])
    starts_inside = (position >= target) | (position < 0)
    yield "window begins before its rollout", np.all(starts_inside)
    value = np.concatenate([arrays[f"{part}_value"] for part in WINDOWS])
    at_target = arrays["window_activation"][start + target]
    yield "window/activation at the target is not the example's value", np.all(at_target == value)
    yield "window/activation is not finite", np.all(np.isfinite(arrays["window_activation"]))
    yield "token/id is not in ascending order", np.all(np.diff(arrays["token_id"]) > 0)
    known = np.isin(arrays["window_token_id"], arrays["token_id"])
    yield "window/token_id is missing in token/id", np.all(known)


def _check_whole_rollouts(arrays: _Known) -> Iterator[tuple[str, Any]]:
    known = np.isin(arrays["text_token_id"], arrays["token_id"])
    yield "text/token_id is missing in token/id", np.all(known)
    latent = arrays["text_latent"]
    yield (
        "text/latent names a latent that does not exist",
        np.all((latent >= 0) & (latent < len(arrays["latent_n_active"]))),
    )
    token = np.repeat(np.arange(len(arrays["text_token_id"])), np.diff(arrays["text_code_offset"]))
    rises = np.diff(token * len(arrays["latent_n_active"]) + latent) > 0
    yield "text/latent does not rise within a token", np.all(rises)
    yield "text/value is not positive", np.all(arrays["text_value"] > 0)
