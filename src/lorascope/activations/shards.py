"""One file of a store: the rows of some rollouts, mapped into memory when they are asked for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from lorascope.errors import ArtifactError

Rows = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Shard:
    """Some rollouts' rows in one file. `read()` returns all `(n_rows, d_in)`, lazily if it can.

    So do `token_ids()` and `roles()`, `(n_rows,)` each.
    """

    path: Path
    n_rows: int
    token_ids: Callable[[], npt.NDArray[np.int32]] = field(repr=False)
    roles: Callable[[], npt.NDArray[np.uint8]] = field(repr=False)
    rollout_start: npt.NDArray[np.int64]
    rollout_id: npt.NDArray[np.int64]
    read: Callable[[], Rows] = field(repr=False)


def open_shard(path: Path, info: dict[str, Any]) -> Shard:
    """Open a shard without reading its rows. Raises ArtifactError when it is not whole."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path} is missing; run generate again with --overwrite") from error
    if size != info["bytes"]:
        raise ArtifactError(
            f"{path} has {size} bytes, its manifest says {info['bytes']}: it is damaged; "
            "run generate again with --overwrite"
        )
    try:
        with h5py.File(path, "r", locking=False) as file:
            (n_rows,) = read_shape(file, "token_ids")
            read_shape(file, "role")
            return Shard(
                path=path,
                n_rows=n_rows,
                token_ids=_Mapped(path, "token_ids"),
                roles=_Mapped(path, "role"),
                rollout_start=read_array(file, "rollout_start"),
                rollout_id=read_array(file, "rollout_id"),
                read=_Mapped(path, "activations"),
            )
    except (OSError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); run generate again") from error


def write_shard(
    path: Path,
    activations: Rows,
    token_ids: npt.NDArray[np.int32],
    roles: npt.NDArray[np.uint8],
    lengths: Sequence[int],
    rollout_id: Sequence[int],
) -> None:
    """Write one shard file: rows of whole rollouts, `lengths[i]` rows each."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file["activations"] = activations
        file["token_ids"] = token_ids
        file["role"] = roles
        file["rollout_start"] = starts
        file["rollout_id"] = np.asarray(rollout_id, np.int64)


class _Mapped:
    """An array of one shard as a memory map, made anew in each process that needs it."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._map: npt.NDArray[Any] | None = None

    def __call__(self) -> npt.NDArray[Any]:
        if self._map is None:
            with h5py.File(self.path, "r", locking=False) as file:
                data = file[self.name]
                assert isinstance(data, h5py.Dataset), "write_shard wrote it"
                offset = data.id.get_offset()
                if offset is None:  # empty or chunked: nothing to map
                    self._map = read_array(file, self.name)
                else:
                    self._map = np.memmap(
                        self.path, data.dtype, "r", offset=offset, shape=data.shape
                    )
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name, "_map": None}


def read_array(file: h5py.File, name: str) -> npt.NDArray[Any]:
    """Return a whole dataset of an HDF5 file. Raises KeyError where it has none of that name."""
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise KeyError(f"{name} is no array")
    return dataset[()]


def read_shape(file: h5py.File, name: str) -> tuple[int, ...]:
    """Return the shape of a dataset without reading it. Raises KeyError where there is none."""
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise KeyError(f"{name} is no array")
    return dataset.shape
