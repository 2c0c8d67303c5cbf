"""The files of a store: shards with the rows of some rollouts, and the bytes of every token.

A shard is mapped into memory when it is first read. On an object store, its rows stay there.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import numpy as np
import numpy.typing as npt

from lorascope.arrayfile import Arrays, map_arrays, remote_arrays, write_arrays
from lorascope.errors import ArtifactError
from lorascope.remote import RemotePath
from lorascope.texts.tokens import pack_tokens

VOCABULARY = "vocabulary.h5"
Rows = npt.NDArray[np.floating[Any]]

_Fields = Mapping[str, tuple[tuple[str, ...], int]]  # array -> its types, its number of axes
_FIELDS: _Fields = {
    "activations": (("<f2", "<f4"), 2),
    "token_ids": (("<i4",), 1),
    "role": (("|u1",), 1),
    "rollout_start": (("<i8",), 1),
    "rollout_id": (("<i8",), 1),
}
_VOCABULARY_FIELDS: _Fields = {
    "offset": (("<i8",), 1),
    "data": (("|u1",), 1),
    "special": (("|u1",), 1),
}


@dataclass(frozen=True)
class Shard:
    """The rows of some rollouts in one file. Each process opens maps of its own."""

    path: Path
    n_rows: int
    rollout_start: npt.NDArray[np.int64]
    rollout_id: npt.NDArray[np.int64]

    def read(self, name: str) -> Any:
        """Return `activations (n_rows, d_in)`, `token_ids (n_rows,)` or `role (n_rows,)`.

        Activations on an object store are a `RemoteArray`.
        """
        return self._arrays[name]

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        return _open(self.path)

    def read_rows(self, rows: npt.NDArray[np.int64], out: Rows) -> None:
        """Copy rows, given in rising order, from the file itself to contiguous memory.

        Through a map, a system may read megabytes around each row, and counts all of them as this
        process's memory.
        """
        if isinstance(self.path, RemotePath):
            return self.read("activations").take(rows, out)
        start = map_arrays(self.path)[0]["files"]["activations"]["offset"]
        ends = np.append(np.flatnonzero(np.diff(rows) != 1) + 1, len(rows)).tolist()
        with self.path.open("rb", buffering=0) as file:
            if len(ends) > 1 and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for first, end in zip([0, *ends], ends, strict=False):
                file.seek(start + int(rows[first]) * out[0].nbytes)
                rest = out[first:end].data.cast("B")
                while n_read := file.readinto(rest):
                    rest = rest[n_read:]
                if rest:
                    _refuse(self.path, "it ends before its last row")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_arrays"}


def open_shard(path: Path, info: Mapping[str, Any], d_in: int) -> Shard:
    """Open a shard without reading its rows.

    `info` is its entry in the manifest. Raises ArtifactError if the shard is damaged.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"{path} is missing; run generate again with --overwrite") from error
    if size != info.get("bytes"):
        raise ArtifactError(
            f"{path} has {size} bytes, its manifest says {info.get('bytes')}: it is damaged; "
            "run generate again with --overwrite"
        )
    arrays = _open(path)
    n_rows, width = arrays["activations"].shape
    starts, ids = np.array(arrays["rollout_start"]), np.array(arrays["rollout_id"])
    if width != d_in:
        _refuse(path, f"its rows have {width} columns, the layout {d_in}")
    if len(arrays["token_ids"]) != n_rows or len(arrays["role"]) != n_rows:
        _refuse(path, f"its token ids or roles are not {n_rows}, one per row")
    if len(starts) != len(ids) + 1 or starts[0] != 0 or starts[-1] != n_rows:
        _refuse(path, f"its {len(ids)} rollouts do not cover rows 0 to {n_rows}")
    if (starts[1:] < starts[:-1]).any():
        _refuse(path, "the first rows of its rollouts are not in rising order")
    shard = Shard(path, n_rows, starts, ids)
    if isinstance(path, RemotePath):
        vars(shard)["_arrays"] = arrays  # to read small arrays once
    return shard


def count_rows(path: Path) -> int:
    """Return the number of rows of a shard, from its header."""
    return len(_open(path, large=_FIELDS)["token_ids"])


def write_shard(
    path: Path,
    activations: Rows,
    token_ids: npt.NDArray[np.int32],
    roles: npt.NDArray[np.uint8],
    lengths: Sequence[int],
    rollout_id: Sequence[int],
) -> None:
    """Write one shard: the rows of whole rollouts, `lengths[i]` rows each."""
    arrays: Arrays = {
        "activations": activations,
        "token_ids": token_ids,
        "role": roles,
        "rollout_start": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "rollout_id": np.asarray(rollout_id, np.int64),
    }
    write_arrays(path, arrays, {})


def _open(
    path: Path, fields: _Fields = _FIELDS, large: Collection[str] = ("activations",)
) -> dict[str, Any]:
    """Map the arrays of a file, or read those of an object store that are not large.

    Raises ArtifactError if one is missing or has a wrong type.
    """
    is_remote = isinstance(path, RemotePath)
    arrays = remote_arrays(path, large) if is_remote else map_arrays(path)[1]
    for name, (dtypes, n_axes) in fields.items():
        array = arrays.get(name)
        if array is None or array.dtype.str not in dtypes or array.ndim != n_axes:
            _refuse(path, f"it has no array {name} of type {' or '.join(dtypes)}")
    return arrays


def _refuse(path: Path, found: str) -> NoReturn:
    raise ArtifactError(f"{path} is damaged: {found}; run generate again with --overwrite")


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token: token i is `data[offset[i]:offset[i + 1]]`.

    `offset (n + 1,)` int64, `data` uint8, `special (n,)` bool: tokens that never stand for text.
    """

    offset: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8]
    special: npt.NDArray[np.bool_]

    @classmethod
    def from_tokens(cls, tokens: Sequence[bytes], special: npt.NDArray[np.bool_]) -> "Vocabulary":
        """Make a vocabulary from every token's bytes, in id order."""
        return cls(*pack_tokens(tokens), special)

    def __len__(self) -> int:
        return len(self.special)

    def __getitem__(self, token_id: SupportsIndex) -> bytes:
        first, last = self.offset[int(token_id) : int(token_id) + 2]
        return self.data[first:last].tobytes()

    def text(self, token_ids: Iterable[SupportsIndex]) -> str:
        """Return the text of some tokens in a row; U+FFFD where bytes are no whole character."""
        return b"".join(self[i] for i in token_ids).decode(errors="replace")

    def save(self, path: Path) -> None:
        """Write `vocabulary.h5`."""
        special = self.special.astype(np.uint8)
        write_arrays(path, {"offset": self.offset, "data": self.data, "special": special}, {})

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read `vocabulary.h5`. Raises ArtifactError when it is missing or damaged."""
        arrays = _open(path, _VOCABULARY_FIELDS)
        offset, data, special = (arrays[name] for name in _VOCABULARY_FIELDS)
        if len(offset) != len(special) + 1:
            _refuse(path, "its arrays do not fit")
        if offset[0] != 0 or offset[-1] != len(data) or (offset[1:] < offset[:-1]).any():
            _refuse(path, "offset does not rise")
        return cls(np.array(offset), np.array(data), special.astype(bool))
