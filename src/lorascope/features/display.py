"""Tokens as people may read them, when a token may hold half a character."""

import re
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt

# One match is one character of the text, or one U+FFFD: the longest broken piece that Python,
# browsers and the Unicode standard all replace by a single mark.
_CHARACTER = re.compile(
    rb"[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]?"
    rb"|[\xe1-\xec\xee\xef][\x80-\xbf]{1,2}|\xed[\x80-\x9f][\x80-\xbf]?"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]{0,2}|[\xf1-\xf3][\x80-\xbf]{1,3}"
    rb"|\xf4[\x80-\x8f][\x80-\xbf]{0,2}|[\x80-\xff]"
)


def display_texts(tokens: Sequence[bytes]) -> list[str]:
    """Return a text for each token; joined, they are the UTF-8 text of the joined bytes.

    A character that is split over several tokens stands whole at the token with its first byte,
    and the others hold less, often "". Bytes that are no part of a whole character, such as those
    of a character that began before the first token, are U+FFFD, as in `errors="replace"`.
    """
    try:
        return [token.decode() for token in tokens]
    except UnicodeDecodeError:
        pass
    ends = list(accumulate(map(len, tokens)))
    texts: list[list[str]] = [[] for _ in tokens]
    token = 0
    for match in _CHARACTER.finditer(b"".join(tokens)):
        while match.start() >= ends[token]:
            token += 1
        texts[token].append(match.group().decode(errors="replace"))
    return ["".join(pieces) for pieces in texts]


def pack_tokens(tokens: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return `token_offset` and `token_data` of tokens in the order of their ids."""
    offset = np.array([0, *accumulate(map(len, tokens))], dtype=np.int64)
    return offset, np.frombuffer(b"".join(tokens), dtype=np.uint8)
