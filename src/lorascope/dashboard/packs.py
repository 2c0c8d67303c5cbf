"""Write columns of numbers as text that may stand in a script element: the packs of the page.

1. Each column is coded so that similar bytes are neighbours (`_coded`). Its *type* is a NumPy type,
   little endian, or `<b2`, the upper half of a float32; one of the codings below may follow it.
2. A *pack* has a uint32 per column (its length in items), then the coded columns, one after
   another. All of it is compressed with zlib; each part of a column gets its own Huffman code.
3. Every 13 bits are two of 91 printable characters: 8 % shorter than base64, and as safe in HTML,
   JSON and UTF-8. If at most 6 bits are left at the end, they are one character.

assets/unpack.js reads packs.

Codings, besides plain values, of which all first bytes come first, then all second ones:

- `falls`: the bits of each value, taken from those of the value before it: for sorted values
- `sparse`: a bit per value (the highest first) that says whether it is 0, then the other values
- `entry`: 0 to 191 in one byte; 192 to 14,527 in two, after an offset of 192; more in three, or in
  five with 255 as the first: for numbers of which small ones are frequent
"""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_LEVEL = 7  # of zlib; 9 takes several times as long to save 1 %
_ALPHABET = np.array([c for c in range(32, 127) if chr(c) not in '"&<\\'], np.uint8)
_BITS = 13  # of two characters: 91 * 91 = 8281 > 2**13
_ONE, _TWO, _THREE = 192, 248, 255  # first bytes from which an entry has more bytes

Column = npt.NDArray[Any]


def pack(values: Mapping[str, Column], types: Mapping[str, str]) -> str:
    """Return columns as a pack, in the order of `types` (column name -> type and coding)."""
    parts = [np.array([values[name].size for name in types], "<u4").tobytes()]
    for name, dtype in types.items():
        parts += _coded(values[name], *dtype.split())
    zipped = zlib.compressobj(_LEVEL)
    pieces = [zipped.compress(part) + zipped.flush(zlib.Z_BLOCK) for part in parts if part]
    return to_text(b"".join([*pieces, zipped.flush()]))


def _coded(values: Column, dtype: str, coding: str = "") -> list[bytes]:
    """Return the parts of a column; in each, bytes are alike."""
    column = to_half_bits(values) if dtype == "<b2" else values
    column = np.ascontiguousarray(column, numpy_type(dtype)).ravel()
    if coding == "falls":
        bits = column.view(f"<u{column.itemsize}")
        return _planes(np.concatenate([bits[:1], bits[:-1] - bits[1:]]))
    if coding == "sparse":
        kept = column != 0
        return [np.packbits(kept).tobytes(), *_planes(column[kept])]
    if coding == "entry":
        return [_entries(column.astype(np.int64))]
    return _planes(column)


def _planes(column: Column) -> list[bytes]:
    """Return the first bytes of all values, their second bytes, and so on."""
    return [plane.tobytes() for plane in column.view(np.uint8).reshape(-1, column.itemsize).T]


def _entries(column: npt.NDArray[np.int64]) -> bytes:
    two, three = _ONE, _ONE + ((_TWO - _ONE) << 8)  # the first numbers of so many bytes
    five = three + ((_THREE - _TWO) << 16)
    wide = [column >= two, column >= three, column >= five]
    rest = column - np.choose(np.sum(wide, axis=0), [0, two, three, 0])
    n_bytes = 1 + wide[0] + wide[1] + 2 * wide[2].astype(np.int64)
    first = np.choose(np.sum(wide, axis=0), [rest, _ONE + (rest >> 8), _TWO + (rest >> 16), _THREE])
    at = np.cumsum(n_bytes) - n_bytes
    out = np.empty(int(n_bytes.sum()), np.uint8)
    out[at] = first
    for i in range(1, 5):  # the lower bytes, the highest of them first
        here = n_bytes > i
        out[at[here] + i] = rest[here] >> (8 * (n_bytes[here] - 1 - i)) & 255
    return out.tobytes()


def to_text(data: bytes) -> str:
    """Return bytes as printable ASCII without `"`, `&`, `<` and the backslash."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    last = len(bits) % _BITS  # at most 6 bits are one character
    bits = np.append(bits, np.zeros(-len(bits) % _BITS, np.uint8)).reshape(-1, _BITS)
    code = bits @ (1 << np.arange(_BITS)[::-1])
    text = _ALPHABET[np.stack(np.divmod(code, len(_ALPHABET)), axis=1)].tobytes().decode("ascii")
    if not 0 < last <= 6:
        return text
    return text[:-2] + chr(_ALPHABET[code[-1] >> (_BITS - 6)])


def numpy_type(dtype: str) -> str:
    """Return NumPy's name of a column type; `<b2` is the upper half of a float32."""
    return "<u2" if dtype == "<b2" else dtype


def narrowest_type(largest: int) -> str:
    """Return the smallest type for whole numbers from 0 to `largest`."""
    return "<u2" if largest < 1 << 16 else "<u4"


def whole_type(values: Column) -> str:
    """Return the narrowest of the types that hold these values exactly, `<f8` for any."""
    low, high = values.min(initial=0), values.max(initial=0)
    if not (np.isfinite(low) and low >= 0 and high < 1 << 32 and (values == np.rint(values)).all()):
        return "<f8"
    return narrowest_type(int(high))


def to_half_bits(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint16]:
    """Return the rounded upper halves of float32 values; the error is at most 1/256 of a value."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4").astype(np.uint64)
    return np.where(np.isnan(values), 0x7FC0, (bits + 0x8000) >> 16).astype(np.uint16)
