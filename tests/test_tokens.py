"""The bytes of a text's tokens, joined, are what the tokenizer itself decodes (pitfall 19)."""

import pytest
from builders.tiny_tokenizers import TEXTS, byte_level, fast, sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from lorascope.texts.tokens import display_texts, pack_tokens, special_ids, token_bytes


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte level", "unigram", "bpe", "bpe with a prefix"])
def test_joined_bytes_are_what_the_tokenizer_decodes(kind, text):  # pitfall 19
    prefix = kind.endswith("prefix")
    made = byte_level() if kind == "byte level" else sentencepiece(kind.split()[0], prefix=prefix)
    tokenizer = fast(made)
    ids = tokenizer(text + "<|end|>", add_special_tokens=False)["input_ids"]
    tokens = token_bytes(tokenizer)
    assert tokenizer.unk_token_id not in ids
    joined = b"".join(tokens[token_id] for token_id in ids)
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # Llama 2 puts a space before a text, and its own decoding of a whole text takes it off again.
    assert joined.decode().removeprefix(" " * prefix) == decoded
    if kind == "byte level":  # SentencePiece cannot tell a space from U+2581
        assert decoded == text + "<|end|>"


def test_one_character_may_be_several_tokens_and_none_is_garbage():  # pitfall 19
    for made in (byte_level(), sentencepiece("unigram", prefix=False)):
        tokenizer = fast(made)
        tokens = token_bytes(tokenizer)
        pieces = [tokens[i] for i in tokenizer("🎉", add_special_tokens=False)["input_ids"]]
        assert pieces == [bytes([byte]) for byte in "🎉".encode()]


def test_without_byte_fallback_a_byte_in_brackets_is_a_word():
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<0x41>": 1, "▁a": 2}, []))
    tokenizer.decoder = decoders.Metaspace()
    assert token_bytes(fast(tokenizer))[:3] == [b"<unk>", b"<0x41>", b" a"]
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "▁a": 1}, []))
    assert token_bytes(fast(tokenizer))[1] == "▁a".encode()


def test_ids_without_a_token_have_no_bytes_and_special_ones_are_known():
    tokenizer = fast(byte_level())
    n = len(tokenizer)
    assert token_bytes(tokenizer, n + 2)[n:] == [b"", b""]
    assert [token_bytes(tokenizer)[i] for i in special_ids(tokenizer)] == [b"<|end|>"]


def test_packed_tokens_are_found_by_their_offsets():
    offset, data = pack_tokens([b"ab", b"", b"\xff"])
    assert offset.tolist() == [0, 2, 2, 3]
    assert data.tobytes() == b"ab\xff"


@given(st.lists(st.binary(max_size=6), max_size=12))
def test_display_texts_of_any_bytes_join_to_their_text(tokens: list[bytes]):
    texts = display_texts(tokens)
    assert len(texts) == len(tokens)
    assert "".join(texts) == b"".join(tokens).decode(errors="replace")


@given(st.text(max_size=12), st.data())
def test_display_texts_of_cut_text_join_to_the_text(text: str, data: st.DataObject):
    raw = text.encode(errors="replace")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    tokens = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    assert "".join(display_texts(tokens)) == raw.decode()
    for at in (i for i, token in enumerate(tokens) if token):
        # A character stands where its first byte is.
        first = len(b"".join(tokens[:at]).decode(errors="ignore").encode())
        if first == sum(map(len, tokens[:at])):
            assert raw.decode()[len(raw[:first].decode()) :].startswith(display_texts(tokens)[at])


def test_a_split_character_stands_at_its_first_byte():
    raw = "a😀b".encode()
    assert display_texts([raw[:2], raw[2:3], raw[3:]]) == ["a😀", "", "b"]


def test_a_window_that_cuts_a_character_shows_the_mark_of_broken_bytes():
    raw = "é".encode()
    assert display_texts([raw[1:], b"x", raw[:1]]) == ["\ufffd", "x", "\ufffd"]
    assert display_texts(["😀".encode()[:2], "😀".encode()[2:3]]) == ["\ufffd", ""]


def test_a_long_token_of_broken_bytes_is_a_mark_for_each():
    # In time that grows with the length: a copy for each broken byte would take 20 s.
    assert display_texts([b"\xff" * 300_000])[0] == "\ufffd" * 300_000
