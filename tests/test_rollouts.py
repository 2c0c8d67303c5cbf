import json

import numpy as np
import pytest
from conftest import s1_records

from lorascope.errors import DatasetError
from lorascope.subject.rollouts import (
    ROLES,
    form_of,
    read_records,
    render,
    special_ids,
    token_bytes,
    tokenize,
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


def role_texts(record, template, tokenizer):
    """Return the decoded text of each role, in order of appearance."""
    ids, roles = tokenize(*render(record, template, tokenizer, "record 0"), tokenizer)
    pieces: list[tuple[str, list[int]]] = []
    for token, role in zip(ids.tolist(), roles.tolist(), strict=True):
        if not pieces or pieces[-1][0] != ROLES[role]:
            pieces.append((ROLES[role], []))
        pieces[-1][1].append(token)
    return [(role, tokenizer.decode(tokens)) for role, tokens in pieces]


def test_the_s1_text_is_the_one_that_s1_models_are_trained_on(tokenizer):
    record = s1_records(1)[0]
    text, _ = render(record, "auto", tokenizer, "record 0")
    assistant = (
        "<|im_start|>think\n" + record["deepseek_thinking_trajectory"].strip()
        + "\n<|im_start|>answer\n" + record["deepseek_attempt"].strip()
    )  # fmt: skip
    assert text == tokenizer.apply_chat_template(
        [
            {"role": "user", "content": record["question"]},
            {"role": "assistant", "content": assistant},
        ],
        tokenize=False,
    )


def test_an_answer_that_does_not_say_so_is_led_by_answer(tokenizer):
    record = {**s1_records(1)[0], "deepseek_attempt": "It is 1."}
    assert "answer\nAnswer: It is 1.<|im_end|>" in render(record, "s1", tokenizer, "record 0")[0]


def test_every_part_of_an_s1_text_has_its_role(tokenizer):
    record = s1_records(1)[0]
    pieces = role_texts(record, "s1", tokenizer)
    assert [role for role, _ in pieces] == [
        "special", "system", "special", "user", "special", "think", "special", "answer", "special",
    ]  # fmt: skip
    by_role = dict(pieces)
    assert by_role["system"] == "You help."
    assert by_role["user"] == record["question"]
    assert by_role["think"] == record["deepseek_thinking_trajectory"]
    assert by_role["answer"] == record["deepseek_attempt"]


def test_chat_messages_keep_the_roles_of_all_turns(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    pieces = role_texts({"messages": messages}, "auto", tokenizer)
    assert [p for p in pieces if p[0] != "special"] == [
        ("system", "Be brief."), ("user", "Hi"), ("answer", "Hi"), ("user", "Bye"),
    ]  # fmt: skip


def test_question_and_answer_is_a_chat_and_text_is_text(tokenizer):
    pair = {"question": "One?", "answer": "Two."}
    assert ("answer", "Two.") in role_texts(pair, "auto", tokenizer)
    assert role_texts({"text": "Plain é text"}, "auto", tokenizer) == [("text", "Plain é text")]


def test_no_token_is_added_to_a_rendered_chat(tokenizer):
    text, spans = render(s1_records(1)[0], "s1", tokenizer, "record 0")
    ids, _ = tokenize(text, spans, tokenizer)
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_an_empty_part_makes_an_empty_rollout(tokenizer):
    for name in ("question", "deepseek_thinking_trajectory", "deepseek_attempt"):
        record = {**s1_records(1)[0], name: "  "}
        assert render(record, "auto", tokenizer, "record 0") == ("", [])


def test_token_bytes_join_to_the_tokenizers_own_text(tokenizer):
    tokens = token_bytes(tokenizer)
    record = {**s1_records(1)[0], "question": "Is 漢字 🎉 text?"}
    text, spans = render(record, "s1", tokenizer, "record 0")
    ids, _ = tokenize(text, spans, tokenizer)
    assert b"".join(tokens[i] for i in ids).decode() == text
    assert any(not tokens[i].isascii() and len(tokens[i]) == 1 for i in ids), "no split character"


def test_token_bytes_of_a_sentencepiece_vocabulary_are_spaces_and_bytes():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁a": 3, "b": 4}, []))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert token_bytes(fast, 6) == [b"<unk>", b"\xc3", b"\xa9", b" a", b"b", b""]
    assert special_ids(fast) == [0]


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_every_file_type_gives_the_same_records(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"text": "a"}, {"text": "é"}, {"text": "c"}]
    lines = write(tmp_path / "a.jsonl", *[json.dumps(r) for r in records], "")
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps(records))
    wrapped = tmp_path / "b.json"
    wrapped.write_text(json.dumps({"data": records}))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    plain = write(tmp_path / "a.txt", *[r["text"] for r in records])
    for file in (lines, whole, wrapped, tmp_path / "a.parquet", plain):
        assert read_records(str(file), "train", None) == list(enumerate(records))
        assert read_records(str(file), "train", 2) == list(enumerate(records[:2]))


def test_a_bom_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n')
    assert read_records(str(tmp_path / "a.jsonl"), "train", None) == [(0, {"text": "a"})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"},\n', "line 1 is not JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is no JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "is not UTF-8"),
        ("a.jsonl", b"\n\n", "holds no records"),
        ("a.json", b"3", "is no list of JSON objects"),
        ("a.json", b"[", "is not JSON"),
        ("a.parquet", b"nope", "is not Parquet"),
        ("a.csv", b"x", "has the suffix .csv; expected"),
    ],
)
def test_a_broken_file_is_one_line_that_names_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        read_records(str(tmp_path / name), "train", None)
    assert "\n" not in str(caught.value)


def test_a_missing_file_never_becomes_a_hub_request(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    for name in (str(tmp_path / "none.jsonl"), "./none", "data/train/none", "none.parquet"):
        with pytest.raises(DatasetError, match="does not exist"):
            read_records(name, "train", None)
    with pytest.raises(DatasetError, match="is a folder"):
        read_records(str(tmp_path), "train", None)


def test_a_hub_data_set_is_read_by_name_and_split(monkeypatch):
    import datasets

    def load(name, *, split):
        assert (name, split) == ("org/set", "test")
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}, {"text": "c"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_records("org/set", "test", 2) == [(0, {"text": "a"}), (1, {"text": "b"})]


def test_a_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(DatasetError, match="hub data set org/never cannot be loaded") as caught:
        read_records("org/never", "train", 2)
    assert "\n" not in str(caught.value)


def test_fields_that_fit_no_template_are_listed():
    with pytest.raises(DatasetError, match=r"record 3 has the fields body, title; expected"):
        form_of({"title": "a", "body": "b"}, "record 3")


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"text": 3}, "text", "field text is int, expected text"),
        ({"body": "x"}, "text", "field text is missing"),
        ({"question": "x"}, "s1", "lacks the s1 fields"),
        ({**s1_records(1)[0], "question": None}, "s1", "field question is NoneType"),
        ({"messages": "x"}, "chat", "messages is no list"),
        ({"text": "x"}, "chat", "has no messages"),
    ],
)
def test_a_record_without_its_fields_is_named(tokenizer, record, template, message):
    with pytest.raises(DatasetError, match=message):
        render(record, template, tokenizer, "record 7")


def test_a_tokenizer_without_a_chat_template_is_told_of(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DatasetError, match="no chat template.*--template text"):
        render(s1_records(1)[0], "s1", tokenizer, "record 0")
    ids, roles = tokenize(*render({"text": "a b"}, "auto", tokenizer, "record 0"), tokenizer)
    assert len(ids) == len(roles) > 0
    assert np.all(roles == ROLES.index("text"))
