"""Columns of numbers as compressed base64 text, and how numbers are made smaller.

A pack is a header of one uint32 per column, its length in items, and then the columns, little
endian, each at a multiple of 8 bytes; all compressed with zlib. assets/pack.js reads it.
"""

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_LEVEL = 7  # of zlib; 9 takes ten times as long for 3 % (measured on 62,350 examples)
FULL = 32767  # what the largest value of a scaled column is written as
SHARES = 31  # the same for shares of a fingerprint

Types = Mapping[str, str]


def pack(values: Mapping[str, npt.NDArray[Any]], types: Types) -> str:
    """Return columns as base64 text, in the order of `types`, which gives NumPy's name of each."""
    lengths = [values[name].size for name in types]
    pieces = [np.array(lengths, dtype="<u4").tobytes()]
    for name, dtype in types.items():
        pieces.append(bytes(-len(pieces[-1]) % 8))
        pieces.append(np.ascontiguousarray(values[name], plain_type(dtype)).tobytes())
    return text_of(zlib.compress(b"".join(pieces), _LEVEL))


def plain_type(dtype: str) -> str:
    """Return the type of a column's bytes; `<b2` is the upper half of a float32."""
    return "<u2" if dtype == "<b2" else dtype


def text_of(data: bytes) -> str:
    """Return bytes as base64."""
    return base64.b64encode(data).decode("ascii")


def narrowest(largest: int) -> str:
    """Return the smallest type of whole numbers from 0 to `largest`."""
    return "<u2" if largest < 1 << 16 else "<u4"


def scaled(values: npt.NDArray[Any], scale: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    """Return values as parts of their scales, which broadcast: at most `scale / FULL` beside them.

    Only 0 becomes 0, so what fires is seen to fire.
    """
    share = values / np.where(scale > 0, scale, 1)
    near = np.rint(FULL * share)
    return np.where((near == 0) & (values != 0), np.sign(values), near).astype(np.int16)


def halved(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the upper halves of float32 values, rounded: at most 1/256 of the value beside it."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x8000) >> 16).astype(np.uint16)
