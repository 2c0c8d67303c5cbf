"""Read a page's payload as its script does."""

import base64
import zlib
from typing import Any

import numpy as np

from lorascope.dashboard.payload import numpy_type


def column(core: dict[str, Any], name: str) -> list[Any]:
    entry = core["columns"][name]
    return np.frombuffer(base64.b64decode(entry["data"]), entry["type"]).tolist()


def block(core: dict[str, Any], text: str) -> dict[str, list[Any]]:
    """Decode a block as the page does."""
    raw = zlib.decompress(base64.b64decode(text))
    names = core["block_columns"]
    lengths = np.frombuffer(raw, "<u4", len(names))
    at, found = 4 * len(names), {}
    for (name, dtype), length in zip(names, lengths, strict=True):
        at += -at % 8
        read = np.frombuffer(raw, numpy_type(dtype), length, at)
        at += read.nbytes
        if dtype == "<b2":
            read = (read.astype("<u4") << 16).view("<f4")
        found[name] = read.tolist()
    assert at == len(raw)
    return found
