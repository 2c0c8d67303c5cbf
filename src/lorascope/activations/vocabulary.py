"""The bytes of every token, as a store keeps them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from lorascope.arrayfile import map_arrays, write_arrays
from lorascope.errors import ArtifactError
from lorascope.texts.tokens import pack_tokens

VOCABULARY = "vocabulary.h5"


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

    def save(self, path: Path) -> None:
        """Write `vocabulary.h5`."""
        special = self.special.astype(np.uint8)
        write_arrays(path, {"offset": self.offset, "data": self.data, "special": special}, {})

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Read `vocabulary.h5`. Raises ArtifactError when it is missing or damaged."""
        arrays = map_arrays(path)[1]
        offset, data, special = (arrays.get(name) for name in ("offset", "data", "special"))
        if offset is None or data is None or special is None:
            raise ArtifactError(f"{path} is damaged: it lacks an array; run generate again")
        are_bytes = offset.dtype == "<i8" and data.dtype == special.dtype == np.uint8
        are_lists = offset.ndim == data.ndim == special.ndim == 1
        if not are_bytes or not are_lists or len(offset) != len(special) + 1:
            raise ArtifactError(f"{path} is damaged: its arrays do not fit; run generate again")
        if offset[0] != 0 or offset[-1] != len(data) or (offset[1:] < offset[:-1]).any():
            raise ArtifactError(f"{path} is damaged: offset does not rise; run generate again")
        return cls(np.array(offset), np.array(data), special.astype(bool))
