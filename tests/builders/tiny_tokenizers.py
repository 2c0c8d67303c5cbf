"""Tiny tokenizers of every kind, and texts that are hard for them."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

TEXTS = [
    "Hello world", "  two leading spaces", "a\tb\n\n  c \n", "🎉 👩‍👩‍👧 flags 🇫🇷",
    "漢字かな交じり文。", "مرحبا بالعالم", "e\u0301a\u0308 na\u00efve", "x\u200by \ufeff z",
    "<tool> a <tool>b", "\x00\x01", "▁ and Ġ and Ċ", "", "<0x41> is no A", "it is 7 <|end|> 7 77",
]  # fmt: skip


def byte_level():
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["Hello world, hello there"], trainer)
    return tokenizer


def sentencepiece(kind, *, prefix):
    """A tiny vocabulary of pieces and the 256 bytes, as Gemma (no prefix) or Llama 2 has it."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁Hello", "▁world", "▁▁", "e", "l", "o", "漢", "字", "▁and", "H", "▁H", "el"]
    if kind == "unigram":
        scores: list[tuple[str, float]] = [(piece, -float(i)) for i, piece in enumerate(pieces)]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    else:
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        merges = [("e", "l"), ("▁", "▁"), ("▁", "H")]
        tokenizer = Tokenizer(
            models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
    end = [decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        before = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(before)
        end.append(decoders.Strip(" ", 1, 0))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *end])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        metaspace = decoders.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence([metaspace, *end])
    return tokenizer


def fast(tokenizer):
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in ("<tool>", " 7")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
