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
        self.index = index
        self.ids = np.array(sorted(bytes_of), np.int32)  # (vocabulary,); the next three too
        self.special = np.isin(self.ids, index.token_id[index.token_special != 0])
        self.raw = [bytes_of[i] for i in self.ids.tolist()]
        self.partial = np.array([not _is_text(token) for token in self.raw], dtype=bool)
        self.texts = [token.decode(errors="replace") for token in self.raw]  # of each entry
        self.token = list(range(len(self.raw)))  # entry -> index into the vocabulary
        self.entry = np.arange(len(self.raw) + 1)  # and back, as long as tokens stand alone
        self.window_entries: dict[int, list[int]] = {}  # window -> entries
        self.rollout_entries: dict[int, list[int]] = {}  # whole rollout -> entries
        known = {(v, text): v for v, text in enumerate(self.texts)}
        for offset, ids, entries in (
            (index.window_offset, index.window_token_id, self.window_entries),
            (index.text_offset, index.text_token_id, self.rollout_entries),
        ):
            for sequence, tokens in self._sequences_with_partial(offset, ids):
                entries[sequence] = self._entries(tokens, known)
        self._sort()

    def _sort(self) -> None:
        """Put the entries into the order of their use in windows and whole rollouts."""
        windows = self.entries_of_windows(0, len(self.index.window_offset) - 1)
        rollouts = map(self.entries_of_rollout, range(len(self.index.text_offset) - 1))
        n_used = np.bincount(np.concatenate([windows, *rollouts]), minlength=len(self.texts))
        order = np.argsort(-n_used, kind="stable")
        new = np.empty_like(order)
        new[order] = np.arange(len(order))
        self.entry = np.append(new[: len(self.raw)], 0)  # 0: of an id that stands for none
        self.texts = [self.texts[i] for i in order]
        self.token = [self.token[i] for i in order]
        for known in (self.window_entries, self.rollout_entries):
            known.update({key: new[entries].tolist() for key, entries in known.items()})

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

    def entries_of_windows(self, first: int, last: int) -> Ints:
        """Return the entries of all tokens of windows `first` to `last - 1`, concatenated."""
        index = self.index
        return self._run(
            index.window_offset, index.window_token_id, self.window_entries, first, last
        )

    def entries_of_rollout(self, number: int) -> Ints:
        """Return the entries of all tokens of a whole rollout."""
        index = self.index
        return self._run(
            index.text_offset, index.text_token_id, self.rollout_entries, number, number + 1
        )

    def _run(
        self,
        offset: Ints,
        ids: npt.NDArray[np.int32],
        extra: Mapping[int, list[int]],
        first: int,
        last: int,
    ) -> Ints:
        begin = int(offset[first])
        entries = self.entries_of_ids(ids[begin : int(offset[last])])
        for sequence in extra.keys() & range(first, last):
            start = int(offset[sequence]) - begin
            entries[start : start + len(extra[sequence])] = extra[sequence]
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
