"""The token table: the text of every token on the page.

The table has one entry per vocabulary token, and extra entries for tokens whose text depends on
their neighbours, because a character is split between tokens. The entries that the page uses most
come first: small numbers take less space.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from lorascope.features.index import FeatureIndex
from lorascope.texts.tokens import display_texts

_SPECIAL, _PARTIAL = 1, 2
Ints = npt.NDArray[np.int64]


class TokenTable:
    """Texts by entry, and the entries of those windows and rollouts that need extra ones.

    The vocabulary comes first, then extra entries of windows, then of whole rollouts. `extra` has
    the bytes of tokens that the index may lack.
    """

    def __init__(self, index: FeatureIndex, extra: Mapping[int, bytes]) -> None:
        bytes_of = {**extra, **{int(i): index.token_bytes(int(i)) for i in index.token_id}}
        self.ids = np.array(sorted(bytes_of), np.int32)  # (vocabulary,); the next three too
        self.special = np.isin(self.ids, index.token_id[index.token_special != 0])
        self.raw = [bytes_of[i] for i in self.ids.tolist()]
        self.partial = np.array([not _is_text(token) for token in self.raw], dtype=bool)
        self.texts = [token.decode(errors="replace") for token in self.raw]  # of each entry
        self.token = list(range(len(self.raw)))  # entry -> index into the vocabulary
        self.entry = np.arange(len(self.raw) + 1)  # and back, as long as tokens stand alone
        self._sequences = {  # windows and whole rollouts: their offsets and token ids
            "window": (index.window_offset, index.window_token_id),
            "text": (index.text_offset, index.text_token_id),
        }
        self.own: dict[str, dict[int, list[int]]] = {}  # entries of those that need extra ones
        known = {(v, text): v for v, text in enumerate(self.texts)}
        for part, (offset, ids) in self._sequences.items():
            self.own[part] = {
                sequence: self._entries(tokens, known)
                for sequence, tokens in self._sequences_with_partial(offset, ids)
            }
        self._sort()

    def _sort(self) -> None:
        """Put the entries into the order of their use in windows and whole rollouts."""
        used = [
            self.entries_of(part, 0, len(offset) - 1)
            for part, (offset, _) in self._sequences.items()
        ]
        n_used = np.bincount(np.concatenate(used), minlength=len(self.texts))
        order = np.argsort(-n_used, kind="stable")
        new = np.empty_like(order)
        new[order] = np.arange(len(order))
        self.entry = np.append(new[: len(self.raw)], 0)  # 0: of an id that stands for none
        self.texts = [self.texts[i] for i in order]
        self.token = [self.token[i] for i in order]
        for own in self.own.values():
            own.update({key: new[entries].tolist() for key, entries in own.items()})

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """Token id of every entry."""
        return self.ids[np.array(self.token, dtype=np.int64)]

    @property
    def flags(self) -> npt.NDArray[np.uint8]:
        """Flags of every entry: special token, part of a character."""
        owner = np.array(self.token, dtype=np.int64)
        special = _SPECIAL * self.special[owner]
        return (special + _PARTIAL * self.partial[owner]).astype(np.uint8)

    @property
    def bytes(self) -> dict[str, str]:
        """Bytes in hexadecimal of the entries that are part of a character."""
        return {str(i): self.raw[v].hex(" ") for i, v in enumerate(self.token) if self.partial[v]}

    def entries_of_ids(self, ids: npt.NDArray[np.int32]) -> Ints:
        """Return the vocabulary entries of token ids, whatever their neighbours are."""
        return self.entry[np.searchsorted(self.ids, ids)]

    def entries_of(self, part: str, first: int, last: int) -> Ints:
        """Return the entries of all tokens of sequences `first` to `last - 1`, concatenated.

        Sequences of the part `window` are the index's windows, of `text` its whole rollouts.
        """
        (offset, ids), own = self._sequences[part], self.own[part]
        begin = int(offset[first])
        entries = self.entries_of_ids(ids[begin : int(offset[last])])
        for sequence in own.keys() & range(first, last):
            start = int(offset[sequence]) - begin
            entries[start : start + len(own[sequence])] = own[sequence]
        return entries

    def _sequences_with_partial(
        self, offset: npt.NDArray[np.int64], ids: npt.NDArray[np.int32]
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (sequence, vocabulary indices) of sequences that contain part of a character."""
        tokens = np.searchsorted(self.ids, ids)
        partial = np.flatnonzero(self.partial[tokens]) if self.raw else np.zeros(0, dtype=np.int64)
        sequences = np.searchsorted(offset, partial, side="right") - 1
        for sequence in np.unique(sequences).tolist():
            yield sequence, tokens[offset[sequence] : offset[sequence + 1]].tolist()

    def _entries(self, tokens: list[int], known: dict[tuple[int, str], int]) -> list[int]:
        """Return the entries of a sequence of vocabulary indices; add those that are new."""
        entries = []
        for pair in zip(tokens, display_texts([self.raw[v] for v in tokens]), strict=True):
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
