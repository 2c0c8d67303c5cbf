"""The raw bytes of every token, and which tokens are special.

The joined bytes of a text's tokens are the text. A character may be split over several tokens, so
single tokens need not be valid UTF-8.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# One match is one character, or the longest invalid sequence that Python, browsers and the Unicode
# standard replace by a single U+FFFD.
_CHARACTER = re.compile(
    rb"[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]?"
    rb"|[\xe1-\xec\xee\xef][\x80-\xbf]{1,2}|\xed[\x80-\x9f][\x80-\xbf]?"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]{0,2}|[\xf1-\xf3][\x80-\xbf]{1,3}"
    rb"|\xf4[\x80-\x8f][\x80-\xbf]{0,2}|[\x80-\xff]"
)


def visible(text: str) -> str:
    """Return a text on one line, with characters that cannot be seen written as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of all special tokens: those that never stand for text."""
    added = tokenizer.added_tokens_decoder
    special = {token_id for token_id, token in added.items() if token.special}
    return sorted(special | set(tokenizer.all_special_ids))


def token_bytes(tokenizer: Any, n_tokens: int = 0) -> list[bytes]:
    """Return the raw bytes of every token, in id order, `b""` for ids without a token."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    spell = speller(tokenizer)
    tokens = [b""] * max(n_tokens, max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        tokens[token_id] = spell(token)
    return tokens


def speller(tokenizer: Any) -> Callable[[str], bytes]:
    """Return a function from a token, as the vocabulary writes it, to its raw bytes.

    The tokenizer's decoder decides how. Byte-level vocabularies (GPT-2, Qwen, Llama 3) write bytes
    as printable characters. SentencePiece vocabularies (Llama 2, Gemma) write a space as U+2581
    and, with byte fallback, single bytes as `<0xNN>`. Llama 2's tokenizer puts a space before every
    text: here the first token keeps it, although decoding a whole text removes it.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.decoder.__getstate__()) if backend and backend.decoder else {}
    decoder = json.dumps(state, ensure_ascii=False)
    byte_level, spaced = '"ByteLevel"' in decoder, "\u2581" in decoder
    fallback = '"ByteFallback"' in decoder
    alphabet = _byte_alphabet()

    def spell(token: str) -> bytes:
        if fallback and (match := _BYTE.fullmatch(token)):
            return bytes([int(match.group(1), 16)])
        if byte_level and token not in added and all(map(alphabet.__contains__, token)):
            return bytes(map(alphabet.__getitem__, token))
        return (token.replace("\u2581", " ") if spaced else token).encode("utf-8", "replace")

    return spell


def display_texts(tokens: Sequence[bytes]) -> list[str]:
    """Return a text for each token. Joined, the texts are the joined bytes decoded as UTF-8.

    A character that is split over several tokens belongs to the token with its first byte; the
    other tokens get the rest, often "". Bytes that form no whole character become U+FFFD, as with
    `errors="replace"`.
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
    """Return offsets `(n + 1,)` and joined bytes; token i is `data[offset[i]:offset[i + 1]]`."""
    offset = np.array([0, *accumulate(map(len, tokens))], dtype=np.int64)
    return offset, np.frombuffer(b"".join(tokens), dtype=np.uint8)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each printable character of byte-level BPE stands for.

    The 188 bytes that are printable in Latin-1 stand for themselves; the others map to 256 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
