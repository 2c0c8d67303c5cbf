"""Check what must hold for every feature index: the promises F of `docs/formats.md`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lorascope.errors import ArtifactError
from lorascope.features.arrays import (
    RANKINGS,
    WINDOWS,
    check_offsets,
    check_shapes,
    checksum,
    dataset_name,
)
from lorascope.features.index import FeatureIndex

N_QUANTILES = 5


def verify(index: FeatureIndex) -> None:
    """Raise ArtifactError that names the first fault of an index, if it has one."""
    for name, said in index.manifest.files.items():
        array = index.arrays.get(name.replace("/", "_", 1))
        if array is None or checksum(array) != said.get("sha256"):
            raise _damaged(f"{name} has other bytes than its checksum")
    for fault, holds in _checks(index):
        if not holds:
            raise _damaged(fault)


def _damaged(fault: str) -> ArtifactError:
    return ArtifactError(f"the feature index is damaged: {fault}; run collect again")


def _checks(index: FeatureIndex) -> Iterator[tuple[str, Any]]:
    """Yield each possible fault, and True unless the index has it. Later checks rely on earlier."""
    yield from check_shapes(index.arrays)
    yield from check_offsets(index.arrays)
    yield from _check_examples(index)
    yield from _check_statistics(index)
    yield from _check_windows(index)
    yield from _check_whole_rollouts(index)


def _check_examples(index: FeatureIndex) -> Iterator[tuple[str, Any]]:
    for part, largest, fired in (
        ("example", index.latent_max, index.latent_n_active),
        ("special", np.full(len(index), np.nan), index.latent_n_special),
    ):
        counts = np.diff(getattr(index, f"{part}_offset"))
        latent = np.repeat(np.arange(len(index)), counts)
        value, row = getattr(index, f"{part}_value"), getattr(index, f"{part}_row")
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
    counts = index.n_examples
    top_k = index.content.get("top_k")
    within = not isinstance(top_k, int) or np.all(counts <= top_k)
    yield f"latent has more than top_k = {top_k} examples", within
    quantile = index.sample_quantile
    latent = np.repeat(np.arange(len(index)), np.diff(index.sample_offset))
    key = latent * N_QUANTILES + (N_QUANTILES - 1 - quantile)
    yield (
        "sample/quantile is not between 0 and 4",
        np.all((quantile >= 0) & (quantile < N_QUANTILES)),
    )
    yield "sample/quantile is not in descending order", np.all(np.diff(key) >= 0)
    largest = index.latent_max[latent]
    yield "latent/max is below a sample's value", np.all(index.sample_value <= largest)


def _check_statistics(index: FeatureIndex) -> Iterator[tuple[str, Any]]:
    fired, n_special = index.latent_n_active, np.maximum(index.latent_n_special, 0)
    for name in ("latent_histogram", "latent_by_role", "latent_by_position"):
        counts = getattr(index, name)
        if counts.shape[1]:
            total, said = counts.sum(axis=1, dtype=np.int64), "n_active"
            if name == "latent_by_role":
                total, said = total - n_special, "n_active and n_special"
            yield f"{dataset_name(name)} does not add up to {said}", np.all(total == fired)
    rises = np.all(np.diff(index.latent_histogram_edges) > 0)
    yield "latent/histogram_edges do not rise", rises
    if index.latent_fingerprint.shape[1]:
        total = index.latent_fingerprint.sum(axis=1, dtype=np.float64)
        adds_up = (np.abs(total - 1) < 0.02) | (total == 0)
        yield "latent/fingerprint does not add up to 1", np.all(adds_up)
    for ids, scores in (
        (index.near_decoder, index.near_cosine),
        (index.near_cofiring, index.near_jaccard),
    ):
        known = ids >= 0
        itself = ids == np.arange(len(index))[:, None]
        yield "near names a latent that does not exist", np.all(ids < len(index))
        yield "near names the latent itself", not np.any(itself)
        falls = (scores[:, 1:] <= scores[:, :-1]) | ~known[:, 1:]
        yield "near is not in descending order", np.all(falls)
    for ranking in RANKINGS:
        ids = getattr(index, f"ranked_{ranking}_id")
        missing = (ids != -1) & ~np.isin(ids, index.token_id)
        yield f"ranked/{ranking}_id is missing in token/id", not np.any(missing)


def _check_windows(index: FeatureIndex) -> Iterator[tuple[str, Any]]:
    start, target = index.window_offset[:-1], index.window_target
    inside = (target >= 0) & (target < np.diff(index.window_offset))
    yield "window/target is outside its window", np.all(inside)
    position = np.concatenate([getattr(index, f"{part}_position") for part in WINDOWS])
    starts_inside = (position >= target) | (position < 0)
    yield "window begins before its rollout", np.all(starts_inside)
    value = np.concatenate([getattr(index, f"{part}_value") for part in WINDOWS])
    at_target = index.window_activation[start + target]
    yield "window/activation at the target is not the example's value", np.all(at_target == value)
    yield "window/activation is not finite", np.all(np.isfinite(index.window_activation))
    yield "token/id is not in ascending order", np.all(np.diff(index.token_id) > 0)
    known = np.isin(index.window_token_id, index.token_id)
    yield "window/token_id is missing in token/id", np.all(known)


def _check_whole_rollouts(index: FeatureIndex) -> Iterator[tuple[str, Any]]:
    known = np.isin(index.text_token_id, index.token_id)
    yield "text/token_id is missing in token/id", np.all(known)
    latent = index.text_latent
    yield (
        "text/latent names a latent that does not exist",
        np.all((latent >= 0) & (latent < len(index))),
    )
    token = np.repeat(np.arange(len(index.text_token_id)), np.diff(index.text_code_offset))
    rises = np.diff(token * len(index) + latent) > 0
    yield "text/latent does not rise within a token", np.all(rises)
    yield "text/value is not positive", np.all(index.text_value > 0)
