"""Write columns of numbers as compressed base64 text, and round numbers to fewer bits.

A pack has a header with one uint32 per column (its length in items), then the columns, little
endian, each starting at a multiple of 8 bytes. All of it is compressed with zlib.
assets/unpack.js reads it.
"""

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_LEVEL = 7  # of zlib; 9 takes ten times as long to save 3 % (measured on 62,350 examples)
FULL_SCALE = 32767  # stands for the largest activation in a feature's windows
FULL_SHARE = 31  # stands for a feature's largest share in its fingerprint

Types = Mapping[str, str]


def pack(values: Mapping[str, npt.NDArray[Any]], types: Types) -> str:
    """Return columns as base64 text, in the order of `types` (column name -> type)."""
    lengths = [values[name].size for name in types]
    pieces = [np.array(lengths, dtype="<u4").tobytes()]
    for name, dtype in types.items():
        pieces.append(bytes(-len(pieces[-1]) % 8))
        pieces.append(np.ascontiguousarray(values[name], numpy_type(dtype)).tobytes())
    return base64_text(zlib.compress(b"".join(pieces), _LEVEL))


def numpy_type(dtype: str) -> str:
    """Return NumPy's name of a column type; `<b2` is the upper half of a float32."""
    return "<u2" if dtype == "<b2" else dtype


def base64_text(data: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(data).decode("ascii")


def narrowest_type(largest: int) -> str:
    """Return the smallest type for whole numbers from 0 to `largest`."""
    return "<u2" if largest < 1 << 16 else "<u4"


def to_scaled_int16(values: npt.NDArray[Any], scale: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    """Return `FULL_SCALE * values / scale`, rounded; the error is at most `scale / FULL_SCALE`.

    Only 0 becomes 0, so that every firing stays visible. `scale` broadcasts.
    """
    share = values / np.where(scale > 0, scale, 1)
    rounded = np.rint(FULL_SCALE * share)
    return np.where((rounded == 0) & (values != 0), np.sign(values), rounded).astype(np.int16)


def to_half_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the rounded upper halves of float32 values; the error is at most 1/256 of a value."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x8000) >> 16).astype(np.uint16)
