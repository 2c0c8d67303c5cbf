import json
import logging
from typing import Any

import numpy as np
import pytest
from builders.records import CHAT_TEMPLATE, s1_records
from hypothesis import given
from hypothesis import strategies as st

from lorascope.errors import DatasetError
from lorascope.texts.roles import ROLES
from lorascope.texts.rollouts import load_rollouts, roles_of_generated, windows
from lorascope.texts.tokens import special_ids

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n"
    "{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture
def bos_tokenizer(tokenizer):
    """A tokenizer that puts a BOS before every plain text, whose template writes one as well."""
    from tokenizers import processors

    tokenizer.add_special_tokens(
        {"bos_token": "<bos>", "additional_special_tokens": ["<|header|>", "<|/header|>"]}
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.convert_tokens_to_ids("<bos>"))]
    )
    tokenizer.chat_template = LLAMA3
    return tokenizer


@pytest.fixture
def load(tmp_path):
    """Return a function that writes records to a file and loads them as rollouts or prompts."""

    def load(tokenizer, *records, prompts=False, duplicates: Any = "drop", **given):
        file = tmp_path / "texts.jsonl"
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        source: Any = {"dataset": str(file), "split": "train", "limit": None, "template": "auto"}
        source |= given | {"tokenizer": tokenizer}
        return load_rollouts(**source, duplicates=duplicates, prompts=prompts)

    return load


def runs(rollout, tokenizer):
    """Return the decoded text of each run of one role, in order."""
    pieces: list[tuple[str, list[int]]] = []
    for token, role in zip(rollout.token_ids.tolist(), rollout.roles.tolist(), strict=True):
        if not pieces or pieces[-1][0] != ROLES[role]:
            pieces.append((ROLES[role], []))
        pieces[-1][1].append(token)
    return [(role, tokenizer.decode(tokens)) for role, tokens in pieces]


def test_every_part_of_an_s1_text_has_its_role(tokenizer, load):
    record = s1_records(1)[0]
    (rollout,), counts = load(tokenizer, record)
    pieces = runs(rollout, tokenizer)
    assert [role for role, _ in pieces] == [
        "special", "system", "special", "user", "special", "think", "special", "answer", "special",
    ]  # fmt: skip
    by_role = dict(pieces)
    assert by_role["system"] == "You help."
    assert by_role["user"] == record["question"]
    assert by_role["think"] == record["deepseek_thinking_trajectory"]
    assert by_role["answer"] == record["deepseek_attempt"]
    assert counts == {"empty": 0, "broken": 0, "duplicate": 0}
    assert (rollout.token_ids.dtype, rollout.roles.dtype) == (np.int32, np.uint8)


def test_chunks_and_forms_in_one_file_do_not_mix_texts_up(tokenizer, load, caplog):
    records = [*s1_records(300), *({"text": f"Text {i} é"} for i in range(300))]
    records = records[::2] + records[1::2]
    with caplog.at_level(logging.WARNING):
        rollouts, _ = load(tokenizer, *records)
    assert [rollout.id for rollout in rollouts] == list(range(600))
    for rollout, record in zip(rollouts, records, strict=True):
        pieces = dict(runs(rollout, tokenizer))
        assert pieces.get("text") == record.get("text")
        assert pieces.get("user") == record.get("question")
    assert "several forms: 300 s1, 300 text" in caplog.text


def test_a_word_whose_token_begins_with_a_space_outside_its_part_belongs_to_the_part(
    tokenizer, load
):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (rollout,), _ = load(tokenizer, {"question": "Let me see.", "answer": "Wait."})
    assert [run for run in runs(rollout, tokenizer) if run[0] != "special"] == [
        ("user", " Let me see."), ("answer", " Wait."),
    ]  # fmt: skip


def test_no_token_is_added_to_a_rendered_chat(tokenizer, bos_tokenizer, load):  # pitfall 6
    bos = bos_tokenizer.bos_token_id
    (rollout,), _ = load(bos_tokenizer, {"question": "One?", "answer": "Two."})
    assert bos_tokenizer.decode(rollout.token_ids) == (
        "<bos><|header|>user<|/header|>\n\nOne?<|im_end|>"
        "<|header|>assistant<|/header|>\n\nTwo.<|im_end|>"
    )
    assert (rollout.token_ids == bos).tolist().count(True) == 1
    (rendered,), _ = load(bos_tokenizer, {"text": "<|im_start|>user\nHi<|im_end|>\n"})
    assert bos not in rendered.token_ids
    assert runs(rendered, bos_tokenizer)[1] == ("user", "Hi")


def test_a_text_that_begins_with_the_bos_gets_no_second_one(bos_tokenizer, load):  # pitfall 6
    texts = ["Hi", "<bos>Hey", "<bos>", "<bos><bos>Ho"]
    rollouts, _ = load(bos_tokenizer, *({"text": text} for text in texts))
    found = [bos_tokenizer.decode(rollout.token_ids) for rollout in rollouts]
    assert found == ["<bos>Hi", "<bos>Hey", "<bos>", "<bos><bos>Ho"]
    assert [ROLES[rollouts[0].roles[0]], ROLES[rollouts[0].roles[1]]] == ["special", "text"]


def test_repeated_tokens_are_dropped_and_named(tokenizer, load, caplog):  # pitfall B19
    texts = [{"text": text} for text in ("a", "b", "a", "c", "a", "b")]
    with caplog.at_level(logging.WARNING):
        rollouts, counts = load(tokenizer, *texts)
    assert [rollout.id for rollout in rollouts] == [0, 1, 3]
    assert counts["duplicate"] == 3
    assert "left out 3 of 6 records that have the same tokens as an earlier one: 2, 4, 5" in (
        caplog.text
    )
    rollouts, counts = load(tokenizer, *texts, duplicates="keep")
    assert (len(rollouts), counts["duplicate"]) == (6, 0)


def test_broken_records_are_left_out_counted_and_named(tokenizer, load, caplog):  # pitfall B19
    records = [
        {"text": "a"}, "{broken", {"body": "b"}, {"text": 3}, {"text": "x\ud800"}, {"text": "\x00"},
        *({"text": str(i)} for i in range(4)),
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        rollouts, counts = load(tokenizer, *records)
    assert [rollout.id for rollout in rollouts] == [0, 5, 6, 7, 8, 9]
    assert counts == {"empty": 0, "broken": 4, "duplicate": 0}
    (message,) = caplog.messages
    for fact in (
        "left out 4 broken of 10 records", "line 2: not JSON", "line 3: it has the fields body;",
        "line 4: field text is int", "line 5: it contains a lone surrogate",
    ):  # fmt: skip
        assert fact in message


@pytest.mark.parametrize("form", ["text", "chat"])
def test_texts_of_odd_characters_come_back_whole(tokenizer, load, form):
    odd = ["\x00", "a\x00b", "\u2028", "👩‍👩‍👧", "e\u0301", "\u202e abc", "</script>", "\ufeffx"]
    odd.append("\x02" + "0\x03")
    records = [{"text": o} if form == "text" else {"question": o, "answer": o + "!"} for o in odd]
    rollouts, counts = load(tokenizer, *records)
    assert counts["broken"] == 0
    role = {"text": "text", "chat": "user"}[form]
    found = [dict(runs(rollout, tokenizer)).get(role) for rollout in rollouts]
    wanted = [o if form == "text" else o.strip() for o in odd]
    assert found == [text or None for text in wanted if text.strip()]


def test_when_more_than_half_is_broken_the_dataset_is_refused(tokenizer, load):  # pitfall B19
    records = [{"text": "a"}, {"text": None}, {"text": "b", "id": 1}, {"id": 2}, {"id": 3}]
    with pytest.raises(DatasetError) as caught:
        load(tokenizer, *records)
    message = str(caught.value)
    assert "3 of 5 records cannot be used, the first at line 2: all its fields are" in message
    assert "fields found: text" in message
    with pytest.raises(DatasetError, match="lacks the s1 fields"):
        load(tokenizer, {"text": "a"}, template="s1")


def test_columns_that_are_not_read_are_named(tokenizer, load, caplog):
    with caplog.at_level(logging.INFO):
        load(tokenizer, {"text": "a", "id": 1}, {"text": "b", "rejected": "c", "tag": ""})
    (message,) = caplog.messages
    assert "not read, with their number of records: id (1), rejected (1); --columns" in message


def test_empty_records_are_counted_and_too_many_are_no_text(tokenizer, load):  # pitfall B18
    long = "word " * 2000
    rollouts, counts = load(
        tokenizer, {"text": ""}, {"text": " \n"}, {"text": "x"}, {"question": "Q", "answer": " "},
        {"text": long},
    )  # fmt: skip
    assert [len(rollout.token_ids) == 1 for rollout in rollouts] == [True, False]
    assert counts == {"empty": 3, "broken": 0, "duplicate": 0}
    with pytest.raises(DatasetError, match="no usable record among 2: 2 empty"):
        load(tokenizer, {"text": ""}, {"text": " "})


def test_what_a_template_does_to_messages_is_counted(tokenizer, load, caplog):
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] | replace('cat', 'dog') }}"
    )
    with caplog.at_level(logging.WARNING):
        _, counts = load(
            tokenizer,
            {"question": "One?", "answer": "<think>Hm.</think>Two."},
            {"question": "A cat?", "answer": "No cat."},
        )
    assert (counts["left_out_by_template"], counts["unknown_roles"]) == (1, 2)
    assert "roles of 2 message parts are unknown" in caplog.text
    assert "the chat template omits 1 message parts" in caplog.text


def test_a_tokenizer_with_neither_pad_nor_bos_nor_template_reads_texts(tokenizer, load):  # B15
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert plain.pad_token is plain.bos_token is plain.eos_token is plain.chat_template is None
    (rollout, _), _ = load(plain, {"text": "a b"}, {"text": "c"})
    assert plain.decode(rollout.token_ids) == "a b"
    assert np.all(rollout.roles == ROLES.index("text"))
    with pytest.raises(DatasetError, match="the tokenizer has no chat template"):
        load(plain, s1_records(1)[0])


def test_an_eos_that_is_also_the_pad_is_kept_in_a_text(tokenizer, load):  # pitfall B16
    tokenizer.pad_token = tokenizer.eos_token
    (rollout,), _ = load(tokenizer, s1_records(1)[0])
    ends = rollout.token_ids == tokenizer.eos_token_id
    assert ends.sum() == 3
    assert np.all(rollout.roles[ends] == ROLES.index("special"))


@pytest.mark.parametrize("thought", ["Hm.", "Es ist 漢字 🎉."])
def test_prompts_are_the_start_of_the_rollouts_and_what_is_written_has_the_same_roles(
    tokenizer, load, thought
):
    records = [
        s1_records(1)[0] | {"deepseek_thinking_trajectory": thought},
        {"question": "One?", "answer": f"<think>\n{thought}\n</think>\n\nTwo."},
        {"question": "One?", "answer": "Two. A user wrote <think>!"},
    ]
    rollouts, _ = load(tokenizer, *records)
    prompts, counts = load(tokenizer, *records, prompts=True)
    assert counts == {"empty": 0, "broken": 0, "duplicate": 0}
    assert [prompt.id for prompt in prompts] == [0, 1, 2]  # equal prompts are kept
    for rollout, prompt in zip(rollouts, prompts, strict=True):
        n = len(prompt.token_ids)
        assert np.array_equal(rollout.token_ids[:n], prompt.token_ids)
        assert np.array_equal(rollout.roles[:n], prompt.roles)
        written = roles_of_generated(prompt, rollout.token_ids[n:], tokenizer)
        assert written.dtype == np.uint8
        assert np.array_equal(written, rollout.roles[n:])


def test_what_a_model_writes_behind_an_open_think_tag_is_thinking(tokenizer, load):
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    (prompt,), _ = load(tokenizer, {"question": "What is <think>?"}, prompts=True)
    ids = tokenizer("Hm.\n</think>\n\nYes.<|im_end|>", add_special_tokens=False)["input_ids"]
    roles = roles_of_generated(prompt, np.array(ids), tokenizer)
    said = [tokenizer.decode(np.array(ids)[roles == ROLES.index(r)]) for r in ("think", "answer")]
    assert said == ["Hm.", "Yes."]


def test_sampled_ids_are_never_tokenised_anew(tokenizer, load):
    (prompt,), _ = load(tokenizer, {"text": "It"}, prompts=True)
    assert runs(prompt, tokenizer) == [("text", "It")]
    merged = tokenizer(" Wait", add_special_tokens=False)["input_ids"]
    split = [tokenizer.convert_tokens_to_ids(c) for c in "ĠWait"]
    assert len(merged) < len(split)
    for ids in (merged, split):
        roles = roles_of_generated(prompt, np.array(ids), tokenizer)
        assert roles.tolist() == [ROLES.index("answer")] * len(ids)
    end = [*merged, tokenizer.eos_token_id, len(tokenizer) + 5]
    assert roles_of_generated(prompt, np.array(end), tokenizer)[-2] == ROLES.index("special")
    assert len(roles_of_generated(prompt, np.array([], np.int32), tokenizer)) == 0


def test_special_ids_are_those_of_the_tokenizers_special_tokens(tokenizer):
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert special_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(names))


@given(n_tokens=st.integers(0, 3000), longest=st.integers(2, 700))
def test_windows_read_every_token_once_with_half_a_window_before_it(n_tokens, longest):
    found = windows(n_tokens, longest)
    kept = [token for _, stop, keep in found for token in range(keep, stop)]
    assert kept == list(range(n_tokens))
    for i, (start, stop, keep) in enumerate(found):
        assert 0 < stop - start <= longest
        assert start <= keep < stop
        if i == 0:
            assert start == keep == 0
        else:
            assert keep == found[i - 1][1]
            assert keep - start == (longest + 1) // 2  # tokens read before the first that is kept
    assert len(found) <= 1 + max(0, -(-(n_tokens - longest) // (longest // 2)))


def test_windows_of_one_token_are_only_for_texts_of_one():
    assert windows(1, 1) == [(0, 1, 0)]
    assert windows(0, 0) == []
    with pytest.raises(ValueError, match="at least 2"):
        windows(2, 1)
