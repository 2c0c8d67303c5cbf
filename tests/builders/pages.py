"""Read HTML, and a page's payload as its script does."""

import base64
import zlib
from html.parser import HTMLParser
from typing import Any

import numpy as np

from lorascope.dashboard.packs import numpy_type

_ALPHABET = [chr(c) for c in range(32, 127) if chr(c) not in '"&<\\']


class Parsed(HTMLParser):
    """The elements, attributes and text of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def column(core: dict[str, Any], name: str) -> list[Any]:
    entry = core["columns"][name]
    return np.frombuffer(base64.b64decode(entry["data"]), entry["type"]).tolist()


def bytes_of(text: str) -> bytes:
    """Return the bytes of a pack's text: two characters have 13 bits, one at the end 6."""
    number = {character: i for i, character in enumerate(_ALPHABET)}
    bits = "".join(
        f"{number[a] * 91 + number[b]:013b}" for a, b in zip(text[0::2], text[1::2], strict=False)
    )
    if len(text) % 2:
        bits += f"{number[text[-1]]:06b}"
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits) - 7, 8))


def block(core: dict[str, Any], text: str) -> dict[str, list[Any]]:
    """Decode a block as the page does."""
    raw = zlib.decompress(bytes_of(text))
    names = core["block_columns"]
    lengths = np.frombuffer(raw, "<u4", len(names))
    at, found = 4 * len(names), {}
    for (name, described), length in zip(names, lengths.tolist(), strict=True):
        dtype, coding = (described + " ").split(" ")[:2]
        read, at = _decoded(raw, at, np.dtype(numpy_type(dtype)), coding, length)
        if dtype == "<b2":
            read = (read.astype("<u4") << 16).view("<f4")
        found[name] = read.tolist()
    assert at == len(raw)
    return found


def _decoded(raw: bytes, at: int, dtype: Any, coding: str, n: int) -> tuple[Any, int]:
    """Return the next `n` values and where they end."""
    if coding == "entry":
        values = []
        for _ in range(n):
            first = raw[at]
            extra = (first >= 192) + (first >= 248) + 2 * (first == 255)
            rest = int.from_bytes(raw[at + 1 : at + 1 + extra], "big")
            above = {0: first, 1: 192 + ((first - 192) << 8), 2: 14_528 + ((first - 248) << 16)}
            values.append(above.get(extra, 0) + rest)
            at += 1 + extra
        return np.array(values, dtype), at
    if coding == "sparse":
        kept = np.unpackbits(np.frombuffer(raw, np.uint8, -(-n // 8), at), count=n) != 0
        out = np.zeros(n, dtype)
        out[kept], at = _decoded(raw, at - (-n // 8), dtype, "", int(kept.sum()))
        return out, at
    n_bytes = n * dtype.itemsize
    planes = np.frombuffer(raw, np.uint8, n_bytes, at).reshape(dtype.itemsize, n)
    read = np.ascontiguousarray(planes.T).view(dtype).ravel()
    if coding == "falls" and n:
        bits = read.view(f"<u{dtype.itemsize}").copy()
        bits[1:] = -bits[1:]
        read = np.cumsum(bits, dtype=bits.dtype).view(dtype)
    return read, at + n_bytes
