"""What each token looks like, wherever it stands on the page.

The table has an entry per vocabulary token, in the vocabulary's order, and after them more for
tokens whose text depends on their neighbours: the pieces of a character that tokens share.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lorascope.features.index import FeatureIndex
from lorascope.texts.tokens import display_texts

_SPECIAL, _PARTIAL = 1, 2
Ints = npt.NDArray[np.int64]


@dataclass
class TokenTable:
    """Texts, their tokens, and the entries of every window and text where they are its own."""

    ids: npt.NDArray[np.int32]  # of the vocabulary, ascending
    special: npt.NDArray[np.bool_]
    index: FeatureIndex
    texts: list[str]
    token: list[int]  # entry -> place in the vocabulary
    raw: list[bytes]  # of the vocabulary
    partial: npt.NDArray[np.bool_]  # (vocabulary,), whether the bytes alone are no text
    windows: dict[int, list[int]] = field(default_factory=dict)  # window -> entries
    rollouts: dict[int, list[int]] = field(default_factory=dict)  # kept text -> entries

    @classmethod
    def from_index(
        cls, index: FeatureIndex, more: Mapping[int, bytes] | None = None
    ) -> "TokenTable":
        """Build the table in the order of the vocabulary, then windows, then kept texts.

        `more` are tokens with their bytes that need not occur in the index.
        """
        spelled = {int(i): index.token_bytes(int(i)) for i in index.token_id}
        spelled = {**(more or {}), **spelled}
        ids = np.array(sorted(spelled), np.int32)
        raw = [spelled[i] for i in ids.tolist()]
        special = np.isin(ids, index.token_id[index.token_special != 0])
        partial = np.array([not _is_text(token) for token in raw], dtype=bool)
        table = cls(
            ids,
            special,
            index,
            [token.decode(errors="replace") for token in raw],
            list(range(len(raw))),
            raw,
            partial,
        )
        known = {(v, text): v for v, text in enumerate(table.texts)}
        for offset, ids, found in (
            (index.window_offset, index.window_token_id, table.windows),
            (index.text_offset, index.text_token_id, table.rollouts),
        ):
            for owner, places in table._broken(offset, ids):
                found[owner] = table._entries(places, known)
        return table

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """Token id of every entry."""
        return self.ids[np.array(self.token, dtype=np.int64)]

    @property
    def flags(self) -> npt.NDArray[np.uint8]:
        """Whether each entry is of a special token or of a piece of a character."""
        owner = np.array(self.token, dtype=np.int64)
        special = _SPECIAL * self.special[owner]
        return (special + _PARTIAL * self.partial[owner]).astype(np.uint8)

    @property
    def bytes(self) -> dict[str, str]:
        """Bytes in hexadecimal of the entries whose text does not say them."""
        return {str(i): self.raw[v].hex(" ") for i, v in enumerate(self.token) if self.partial[v]}

    def of_ids(self, ids: npt.NDArray[np.int32]) -> Ints:
        """Return the vocabulary's own entries of tokens, whatever stands beside them."""
        return np.searchsorted(self.ids, ids)

    def of_windows(self, first: int, last: int) -> Ints:
        """Return the entries of the tokens of windows `first` to `last`, behind one another."""
        return self._of(
            self.windows, self.index.window_offset, self.index.window_token_id, first, last
        )

    def of_text(self, text: int) -> Ints:
        """Return the entries of the tokens of a text that is kept whole."""
        return self._of(
            self.rollouts, self.index.text_offset, self.index.text_token_id, text, text + 1
        )

    def _of(
        self,
        own: dict[int, list[int]],
        offset: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int32],
        first: int,
        last: int,
    ) -> Ints:
        begin = int(offset[first])
        entries = self.of_ids(ids[begin : int(offset[last])])
        for owner in range(first, last) if own else ():
            if owner in own:
                at = int(offset[owner]) - begin
                entries[at : at + len(own[owner])] = own[owner]
        return entries

    def _broken(
        self, offset: npt.NDArray[np.int64], ids: npt.NDArray[np.int32]
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield the sequences that hold a piece of a character, as places in the vocabulary."""
        at = self.of_ids(ids)
        broken = np.flatnonzero(self.partial[at]) if self.raw else np.zeros(0, dtype=np.int64)
        owners = np.searchsorted(offset, broken, side="right") - 1
        for owner in np.unique(owners).tolist():
            yield owner, at[offset[owner] : offset[owner + 1]].tolist()

    def _entries(self, places: list[int], known: dict[tuple[int, str], int]) -> list[int]:
        entries = []
        for pair in zip(places, display_texts([self.raw[v] for v in places]), strict=True):
            if pair not in known:
                known[pair] = len(self.texts)
                self.token.append(pair[0])
                self.texts.append(pair[1])
            entries.append(known[pair])
        return entries


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True
