"""Files of named arrays: HDF5 for everybody else, a memory map with a table for lorascope.

libhdf5 can crash on a damaged file, so lorascope never lets it parse one of its own:

1. The file begins with a *header*, one line of JSON in the user block of HDF5, which libhdf5 skips.
   Its `files` gives the type, the shape and the offset in bytes of every array.
2. `write_arrays` writes the HDF5 part with h5py, arrays contiguous and uncompressed, and asks it
   where they are.
3. `map_arrays` reads the header, compares every array's end with the file's size, and maps them.

Other programs read the same file as ordinary HDF5. The same arrays give the same bytes.
"""

import json
import math
import mmap
import re
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from lorascope.errors import ArtifactError

Arrays = dict[str, npt.NDArray[Any]]

_LONGEST = 1 << 26  # bytes of a header; a line longer than this is no header
_DTYPE = re.compile(r"<[iuf][248]|\|[iu]1")
_DIGITS = 20  # of an offset


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
    with path.open("rb") as file:
        if file.read(1) != b"{":
            return None
        line = b"{" + file.readline(_LONGEST)
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def mapped(file: IO[bytes]) -> mmap.mmap:
    """Map a file into memory to read it. Private, because some file systems share no maps."""
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def map_arrays(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Return the header and every array, mapped into memory: nothing is read before it is used.

    Raises ArtifactError when the file is missing or damaged.
    """
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
    with path.open("rb") as file:
        data = np.frombuffer(mapped(file), np.uint8)
    arrays: Arrays = {}
    for name, entry in table.items():
        if (span := _span(entry, size)) is None:
            raise ArtifactError(
                f"{path} is damaged: its table has no type, shape and offset of {name} that fit "
                f"its {size} bytes; make it again"
            )
        dtype, shape, start, stop = span
        arrays[name] = data[start:stop].view(dtype).reshape(shape)
    return header, arrays


def _span(entry: Any, size: int) -> tuple[str, tuple[int, ...], int, int] | None:
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
