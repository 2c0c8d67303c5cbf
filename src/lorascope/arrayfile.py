"""Files of named arrays: HDF5 for everybody else, a memory map with a table for lorascope.

libhdf5 can crash on a damaged file, so lorascope never lets it parse one of its own:

1. The file begins with a *header*, one line of JSON in the user block of HDF5, which libhdf5 skips.
   Its `files` gives the type, the shape and the offset in bytes of every array.
2. `write_arrays` writes the HDF5 part with h5py, arrays contiguous and uncompressed, and asks it
   where they are.
3. `map_arrays` reads the header, compares every array's end with the file's size, and maps them.
   Those of an object store are read, except the large ones that the caller names.

Other programs read the same file as ordinary HDF5. The same arrays give the same bytes.
"""

import io
import json
import math
import mmap
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.errors import ArtifactError
from lorascope.remote import RemotePath

Arrays = dict[str, npt.NDArray[Any]]
_Span = tuple[str, tuple[int, ...], int, int]  # type, shape, first byte and end of an array

_LONGEST = 1 << 26  # bytes of a header; a line longer than this is no header
_DTYPE = re.compile(r"<[iuf][248]|\|[iu]1")
_DIGITS = 20  # of an offset
_AT_FIRST = 1 << 13  # bytes read for a header, which is rarely longer
_PIECE = 4 << 20  # bytes that one request to an object store asks for at most
_GAP = 64 << 10  # bytes that are read and dropped rather than skipped by another request


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]], header: Any) -> None:
    """Write arrays by name, `/` for groups. `header` is a JSON object, without the table.

    Facts that its `files` already holds of an array are kept. Not atomic by itself.
    """
    import h5py

    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    block = 512
    while block < len(_header_line(header, plain, {})) + _DIGITS * len(plain):
        block *= 2
    with _Unfailing(path, "w+") as raw:
        with h5py.File(
            raw, "w", userblock_size=block, alignment_threshold=1, alignment_interval=64
        ) as file:
            for name, array in plain.items():
                file.create_dataset(name, data=array, track_times=False)
            offsets = {name: file[name].id.get_offset() for name in plain if plain[name].size}
        if raw.failure:
            raise raw.failure
    with path.open("r+b") as file:
        file.write(_header_line(header, plain, offsets))


class _Unfailing(FileIO):
    """A file that keeps the error of a write for later: libhdf5 can crash on a full disk."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write all bytes, or none after a failure, and say that all are written."""
        rest = memoryview(data)
        try:
            while rest and not self.failure:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = OSError(error.errno, error.strerror, self.name)
        return len(memoryview(data))


def _header_line(header: Any, arrays: Arrays, offsets: Mapping[str, int]) -> bytes:
    known = header.get("files") or {}
    table = {
        name: {
            **known.get(name, {}),
            "dtype": array.dtype.str,
            "shape": list(array.shape),
            "offset": offsets.get(name, 0),
        }
        for name, array in arrays.items()
    }
    text = json.dumps({**header, "files": table}, allow_nan=False)
    return text.encode("ascii") + b"\n"


def read_header(path: Path) -> dict[str, Any] | None:
    """Return the header of a file of arrays, or None where there is none."""
    with path.open("rb", buffering=_AT_FIRST) as file:
        if file.read(1) != b"{":
            return None
        line = b"{" + file.readline(_LONGEST)
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def mapped(file: io.BufferedIOBase) -> mmap.mmap:
    """Map a file into memory to read it. Private, because some file systems share no maps.

    A file of an object store has no descriptor, and is read.
    """
    try:
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    except io.UnsupportedOperation:
        content = file.read()
        memory = mmap.mmap(-1, len(content))
        memory[:] = content
        return memory


@dataclass
class RemoteArray:
    """An array of `shape`, at least one axis, that lies at `start` of an object.

    A slice is read when it is asked for. Where slices follow each other, the next is read ahead.
    """

    path: RemotePath
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    _last: int = 0  # where the last slice ended
    _ahead: dict[tuple[int, int], "Future[npt.NDArray[Any]]"] = field(default_factory=dict)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        values = self._read(0, len(self))
        return values if dtype is None else values.astype(dtype, copy=False)

    def __getitem__(self, rows: slice) -> npt.NDArray[Any]:
        start, stop, _ = rows.indices(len(self))
        stop = max(start, stop)
        ahead = self._ahead.pop((start, stop), None)
        follows, self._last = start == self._last, stop
        end = min(2 * stop - start, len(self))
        if follows and end > stop:
            with_one = ThreadPoolExecutor(1, "lorascope-ahead")
            self._ahead = {(stop, end): with_one.submit(self._read, stop, end)}
            with_one.shutdown(wait=False)  # it ends when it has read
        return self._read(start, stop) if ahead is None else ahead.result()

    def take(self, rows: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Copy rows, given in rising order, to `out`."""
        most = max(_GAP // self._row_bytes, 1)
        ends = np.append(np.flatnonzero(np.diff(rows) > most) + 1, len(rows)).tolist()
        runs = list(zip([0, *ends], ends, strict=False))
        spans = [(int(rows[first]), int(rows[end - 1]) + 1) for first, end in runs]
        for (first, end), values in zip(runs, self._spans(spans), strict=True):
            np.take(values, rows[first:end] - rows[first], axis=0, out=out[first:end], mode="clip")

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * max(math.prod(self.shape[1:]), 1)

    def _read(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self._spans([(start, stop)])[0]

    def _spans(self, spans: Sequence[tuple[int, int]]) -> list[npt.NDArray[Any]]:
        """Return rows `[start, stop)` of every span, in pieces that are read at the same time."""
        size = self._row_bytes
        pieces, counts = [], []
        for first, last in spans:
            begin, end = self.start + first * size, self.start + last * size
            starts = range(begin, end, _PIECE)
            pieces += [(at, min(at + _PIECE, end)) for at in starts]
            counts.append(len(starts))
        parts = iter(self.path.ranges(pieces))
        return [
            np.frombuffer(b"".join(next(parts) for _ in range(n)), self.dtype).reshape(
                last - first, *self.shape[1:]
            )
            for n, (first, last) in zip(counts, spans, strict=True)
        ]


def map_arrays(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Return the header and every array, mapped into memory: nothing is read before it is used.

    Raises ArtifactError when the file is missing or damaged.
    """
    header, spans = _table(path)
    with path.open("rb") as file:
        data = np.frombuffer(mapped(file), np.uint8)
    return header, {
        name: data[start:stop].view(dtype).reshape(shape)
        for name, (dtype, shape, start, stop) in spans.items()
    }


def remote_arrays(path: RemotePath, large: Collection[str]) -> dict[str, Any]:
    """Return every array of a file on an object store: `large` as `RemoteArray`, others read now.

    Raises ArtifactError when the file is missing or damaged.
    """
    spans = _table(path)[1]
    small = [name for name in spans if name not in large]
    read = dict(zip(small, path.ranges([spans[name][2:] for name in small]), strict=True))
    return {
        name: np.frombuffer(read[name], dtype).reshape(shape)
        if name in read
        else RemoteArray(path, np.dtype(dtype), shape, start)
        for name, (dtype, shape, start, _) in spans.items()
    }


def _table(path: Path) -> tuple[dict[str, Any], dict[str, _Span]]:
    """Return the header of a file and where its arrays are, all of them inside the file."""
    try:
        header = read_header(path)
        size = path.stat().st_size
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}; check the path") from error
    table = header.get("files") if header is not None else None
    if header is None or not isinstance(table, dict):
        raise ArtifactError(
            f"{path} is damaged, or an older lorascope made it: it begins with no table of arrays; "
            "make it again"
        )
    spans: dict[str, _Span] = {}
    for name, entry in table.items():
        if (span := _span(entry, size)) is None:
            raise ArtifactError(
                f"{path} is damaged: its table has no type, shape and offset of {name} that fit "
                f"its {size} bytes; make it again"
            )
        spans[name] = span
    return header, spans


def _span(entry: Any, size: int) -> _Span | None:
    """Return type, shape, first byte and end of an array, or None where it is not in the file."""
    if not isinstance(entry, dict):
        return None
    dtype, shape, start = (entry.get(key) for key in ("dtype", "shape", "offset"))
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype) or not isinstance(shape, list):
        return None
    if not isinstance(start, int) or len(shape) > 8:
        return None
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (start, *shape)):
        return None
    if math.prod(length or 1 for length in shape) >= 1 << 60:  # more than NumPy can count
        return None
    stop = start + math.prod(shape, start=int(dtype[-1]))
    return (dtype, tuple(shape), start, stop) if stop <= size else None
