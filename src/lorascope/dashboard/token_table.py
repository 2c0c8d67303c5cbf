"""The token table: the text of every token on the page.

The table has one entry per vocabulary token, and extra entries for tokens whose text depends on
their neighbours, because a character is split between tokens. The entries that the page uses most
come first: small numbers take less space.
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
    """Texts by entry, and the entries of those windows and rollouts that need extra ones."""

    ids: npt.NDArray[np.int32]  # (vocabulary,), token ids, ascending
    special: npt.NDArray[np.bool_]  # (vocabulary,)
    index: FeatureIndex
    texts: list[str]
    token: list[int]  # entry -> index into the vocabulary
    raw: list[bytes]  # (vocabulary,)
    partial: npt.NDArray[np.bool_]  # (vocabulary,), whether the bytes alone are not valid UTF-8
    entry: Ints = field(default_factory=lambda: np.zeros(0, np.int64))  # (vocabulary + 1,)
    window_entries: dict[int, list[int]] = field(default_factory=dict)  # window -> entries
    rollout_entries: dict[int, list[int]] = field(default_factory=dict)  # whole rollout -> entries

    @classmethod
    def from_index(
        cls, index: FeatureIndex, extra: Mapping[int, bytes] | None = None
    ) -> "TokenTable":
        """Build the table: vocabulary, then extra entries of windows, then of whole rollouts.

        `extra` has the bytes of tokens that the index may lack.
        """
        bytes_of = {int(i): index.token_bytes(int(i)) for i in index.token_id}
        bytes_of = {**(extra or {}), **bytes_of}
        ids = np.array(sorted(bytes_of), np.int32)
        raw = [bytes_of[i] for i in ids.tolist()]
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
            np.arange(len(raw) + 1),
        )
        known = {(v, text): v for v, text in enumerate(table.texts)}
        for offset, ids, entries in (
            (index.window_offset, index.window_token_id, table.window_entries),
            (index.text_offset, index.text_token_id, table.rollout_entries),
        ):
            for sequence, tokens in table._sequences_with_partial(offset, ids):
                entries[sequence] = table._entries(tokens, known)
        table._sort()
        return table

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
        return self.entry[self._vocabulary_index(ids)]

    def _vocabulary_index(self, ids: npt.NDArray[np.int32]) -> Ints:
        return np.searchsorted(self.ids, ids)

    def entries_of_windows(self, first: int, last: int) -> Ints:
        """Return the entries of all tokens of windows `first` to `last - 1`, concatenated."""
        index = self.index
        run = range(first, last)
        return self._entries_of(
            self.window_entries, index.window_offset, index.window_token_id, run
        )

    def entries_of_rollout(self, number: int) -> Ints:
        """Return the entries of all tokens of a whole rollout."""
        index = self.index
        run = range(number, number + 1)
        return self._entries_of(self.rollout_entries, index.text_offset, index.text_token_id, run)

    def _entries_of(
        self, extra: dict[int, list[int]], offset: Ints, ids: npt.NDArray[np.int32], run: range
    ) -> Ints:
        first, last = run.start, run.stop
        begin = int(offset[first])
        entries = self.entries_of_ids(ids[begin : int(offset[last])])
        for sequence in run if extra else ():
            if sequence in extra:
                start = int(offset[sequence]) - begin
                entries[start : start + len(extra[sequence])] = extra[sequence]
        return entries

    def _sequences_with_partial(
        self, offset: npt.NDArray[np.int64], ids: npt.NDArray[np.int32]
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (sequence, vocabulary indices) of sequences that contain part of a character."""
        tokens = self._vocabulary_index(ids)
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
