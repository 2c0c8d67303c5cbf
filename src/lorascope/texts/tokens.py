"""Which tokens stand for text, and the raw bytes that each is spelled with.

Joined, the bytes of a text's tokens are the text: a character may be spread over several tokens,
and only together do these spell it.
"""

import json
import re
from collections.abc import Callable
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of all tokens that never stand for text."""
    added = tokenizer.added_tokens_decoder
    marked = {token_id for token_id, token in added.items() if token.special}
    return sorted(marked | set(tokenizer.all_special_ids))


def token_bytes(tokenizer: Any, n_tokens: int = 0) -> list[bytes]:
    """Return the raw bytes of every token, in id order; ids without a token give `b""`."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    spell = speller(tokenizer)
    tokens = [b""] * max(n_tokens, max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        tokens[token_id] = spell(token)
    return tokens


def speller(tokenizer: Any) -> Callable[[str], bytes]:
    """Return the function from a token, as the vocabulary writes it, to its raw bytes.

    It goes by the tokenizer's decoder. Byte-level vocabularies (GPT-2, Qwen, Llama 3) write bytes
    as printable characters; SentencePiece ones (Llama 2, Gemma) write a space as U+2581 and, with
    byte fallback, single bytes as `<0xNN>`. Llama 2's tokenizer puts a space before a text, which
    is a part of the first token here, and which its own decoding of a whole text takes off again.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.decoder.__getstate__()) if backend and backend.decoder else {}
    decoder = json.dumps(state, ensure_ascii=False)
    byte_level, spaced = '"ByteLevel"' in decoder, "\u2581" in decoder
    fallback = '"ByteFallback"' in decoder
    alphabet = {character: byte for byte, character in _byte_alphabet().items()}

    def spell(token: str) -> bytes:
        if fallback and (match := _BYTE.fullmatch(token)):
            return bytes([int(match.group(1), 16)])
        if byte_level and token not in added and all(map(alphabet.__contains__, token)):
            return bytes(map(alphabet.__getitem__, token))
        return (token.replace("\u2581", " ") if spaced else token).encode("utf-8", "replace")

    return spell


def _byte_alphabet() -> dict[int, str]:
    """Return the printable character that byte-level BPE writes for each byte.

    The 188 bytes that are printable in Latin-1 stand for themselves, the others follow from 256.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return table
