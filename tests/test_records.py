import gzip
import json
import logging

import pytest

from lorascope.errors import DatasetError
from lorascope.texts.records import read_records

RECORDS = [{"text": "a"}, {"text": 'é "x", y\nz'}, {"text": "c" * 200_000}]
JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def usable(path, limit=None, split="train"):
    return read_records(str(path), split, limit).usable


def packed(content: bytes, kind: str, path) -> None:
    """Write bytes plain, as gzip or as zstd."""
    if kind == "zst":
        import pyarrow as pa

        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(content)
    else:
        path.write_bytes(gzip.compress(content) if kind == "gz" else content)


@pytest.mark.parametrize("kind", ["", "gz", "zst"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])  # pitfall B19: a BOM is no part of it
@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("jsonl", JSON_LINES),
        ("ndjson", JSON_LINES.replace("\n", "\r\n\n")),
        ("json", json.dumps(RECORDS, indent=1)),
        ("json", json.dumps({"version": 1, "data": RECORDS})),
        ("json", JSON_LINES),
        ("csv", 'text\na\n"é ""x"", y\nz"\n\n' + "c" * 200_000 + "\n"),
        ("tsv", ' text \r\na\r\n"é ""x"", y\nz"\r\n' + "c" * 200_000),
    ],
)
def test_every_file_type_gives_the_same_records(tmp_path, kind, mark, ending, content):
    file = tmp_path / (f"A.{ending}" + f".{kind}" * bool(kind))
    packed(mark + content.encode(), kind, file)
    assert usable(file) == list(enumerate(RECORDS))
    assert usable(file, 2) == list(enumerate(RECORDS[:2]))


def test_records_that_have_a_sender_or_a_role_are_no_messages(tmp_path):
    records = [{"from": "Ann", "text": "a"}, {"role": "guest", "text": "b"}]
    (tmp_path / "a.json").write_text(json.dumps({"mails": records}))
    assert usable(tmp_path / "a.json") == list(enumerate(records))


@pytest.mark.parametrize("kind", ["", "gz", "zst"])
def test_a_text_file_has_one_text_on_each_line(tmp_path, kind):
    file = tmp_path / (f"a.txt.{kind}" if kind else "a.txt")
    packed(b"\xef\xbb\xbfa\r\n\n b\x00\xe2\x80\xa8c", kind, file)
    texts = ["a", "", " b\x00\u2028c"]
    assert usable(file) == [(i, {"text": text}) for i, text in enumerate(texts)]


def test_parquet_and_a_saved_data_set_give_the_same_records(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet", row_group_size=1)
    data = datasets.Dataset.from_list(RECORDS)
    data.select([2, 0, 1]).select([1, 2, 0]).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data, "train": data.select([1])}).save_to_disk(tmp_path / "two")
    for path in ("a.parquet", "one"):
        assert usable(tmp_path / path) == list(enumerate(RECORDS))
        assert usable(tmp_path / path, 2) == list(enumerate(RECORDS[:2]))
    assert usable(tmp_path / "two", split="test") == list(enumerate(RECORDS))
    assert usable(tmp_path / "two") == [(0, RECORDS[1])]
    with pytest.raises(DatasetError, match="no split 'dev'; it has test, train"):
        usable(tmp_path / "two", split="dev")


def test_fields_that_arrow_adds_are_no_fields(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": "a", "tools": [{"x": 1}]}, {"tools": [{"y": [{"z": 2}]}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert usable(tmp_path / "a.parquet") == list(enumerate(rows))


def test_text_in_parquet_that_is_not_utf8_breaks_its_own_row_only(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = read_records(str(tmp_path / "a.parquet"), "train", None)
    assert found.usable == [(0, {"text": "a"}), (2, {"text": "c"})]
    assert found.broken == {1: "not UTF-8"}


def test_broken_lines_are_left_out_with_their_place_and_reason(tmp_path):  # pitfall B19
    lines = [
        b'{"text": "a"}', b'{"text": "b"},', b"", b"[1]", b'{"text": "\xff"}', b"3",
        b"[" * 100_000, b'{"text": "c"}', *[b'{"text": "d"}'] * 9,
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read_records(str(tmp_path / "a.jsonl"), "train", None)
    assert found.usable[:2] == [(0, {"text": "a"}), (6, {"text": "c"})]
    places = {found.where(number): reason for number, reason in found.broken.items()}
    assert places.pop("line 7").startswith("not JSON (")
    assert places == {
        "line 2": "not JSON (Extra data at character 14)",
        "line 4": "list, expected a JSON object",
        "line 5": "not UTF-8 at byte 11",
        "line 6": "int, expected a JSON object",
    }
    assert len(found) == 16
    assert found.where(6) == "line 8"


def test_rows_of_another_width_broken_quotes_and_wrong_bytes_leave_a_table(tmp_path):
    rows = [b"id,text", b"1,a", b"2", b"3,b,c", b'4,"x"y', b"5,\xff", b'6,"two', b'lines"', b"7,z"]
    rows += [b"8,w"] * 4
    (tmp_path / "a.csv").write_bytes(b"\n".join(rows) + b"\n")
    found = read_records(str(tmp_path / "a.csv"), "train", None)
    assert [record["id"] for _, record in found.usable] == ["1", "6", "7", *"8888"]
    places = {found.where(number): reason for number, reason in found.broken.items()}
    assert places.pop("line 5").startswith("broken quotes (")
    assert places == {
        "line 3": "1 fields, expected 2 as in the header",
        "line 4": "3 fields, expected 2 as in the header",
        "line 6": "not UTF-8",
    }


def test_a_quote_that_never_closes_does_not_pass_for_a_text(tmp_path):
    (tmp_path / "a.csv").write_text('text\na\nb\n"c\nd\ne\n')
    found = read_records(str(tmp_path / "a.csv"), "train", None)
    assert [record["text"] for _, record in found.usable] == ["a", "b"]
    assert found.broken == {2: "broken quotes (unexpected end of data)"}


def test_a_file_that_is_mostly_broken_is_refused_with_the_first_reason(tmp_path):  # pitfall B19
    (tmp_path / "a.jsonl").write_text('{"body": "a", "id": 1}\nnope\n\nnor this\n')
    with pytest.raises(DatasetError) as caught:
        read_records(str(tmp_path / "a.jsonl"), "train", None)
    message = str(caught.value)
    assert "2 of 3 records cannot be used, the first at line 2: not JSON (Expecting" in message
    assert "fields found: body, id" in message
    assert "\n" not in message


def test_the_first_five_broken_records_are_named_in_one_warning(tmp_path, caplog):
    lines = ["{" if i % 3 == 0 else '{"text": "a"}' for i in range(24)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read_records(str(tmp_path / "a.jsonl"), "train", None)
    with caplog.at_level(logging.WARNING):
        found.report(found.broken)
    (message,) = caplog.messages
    assert message.startswith("left out 8 broken of 24 records of ")
    assert [f"line {n}: not JSON" in message for n in (1, 4, 7, 10, 13, 16)] == [True] * 5 + [False]
    assert message.endswith("; ...")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\n\n", "holds no records"),
        ("a.csv", b"id,text\n", "holds no records"),
        ("a.csv", b"id,id\n1,2\n", "two columns 'id'"),
        ("a.json", b"3", "is not a list of JSON objects"),
        ("a.json", b'{"a": [1], "b": [2]}', "is not a list of JSON objects"),
        ("a.json", b'{"messages": [{"role": "user", "content": "a"}]}', "is one conversation"),
        ("a.json", b'{"turns": [{"from": "human", "value": "a"}]}', "is one conversation"),
        (
            "a.json",
            b"[1, 2]",
            "2 of 2 records cannot be used.*record 0: int, expected a JSON object",
        ),
        ("a.json", b"[", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.parquet", b"nope", "is not Parquet"),
        ("a.jsonl.gz", b"nope", "cannot be read"),
        ("a.txt.zst", b"nope", "cannot be read"),
        ("a.txt.gz", gzip.compress(bytes(range(256)) * 99)[:-30], "cannot be read .*[Tt]runcated"),
        ("a.xlsx", b"x", r"ends in \.xlsx; expected"),
        ("a.parquet.gz", b"x", r"ends in \.gz; expected"),
        ("plain", b"x", "ends in nothing; expected"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        read_records(str(tmp_path / name), "train", None)
    assert "\n" not in str(caught.value)


def test_a_limit_reads_no_further_than_it_says(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n' * 5 + b"\xff\n" * 100)
    assert len(read_records(str(file), "train", 5)) == 5
    assert read_records(str(file), "train", 8).broken.keys() == {5, 6, 7}


def test_a_missing_file_never_becomes_a_hub_request(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "none.jsonl"), "./none", "data/train/none", "none.csv.gz", "~/no"):
        with pytest.raises(DatasetError, match="does not exist"):
            read_records(name, "train", None)
    with pytest.raises(DatasetError, match="is not a folder of datasets.save_to_disk"):
        read_records(str(tmp_path), "train", None)


def test_a_name_that_is_nearly_right_is_named(tmp_path, monkeypatch):
    (tmp_path / "problems.jsonl").write_text("{}")
    with pytest.raises(DatasetError, match=r"did you mean problems\.jsonl\?"):
        read_records(str(tmp_path / "problem.jsonl"), "train", None)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dataset").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"hub dataset mine/datset .*did you mean dataset\?"):
        read_records("mine/datset", "train", None)


@pytest.mark.parametrize(("name", "asked"), [("o/s", ("o/s",)), ("o/s:main", ("o/s", "main"))])
def test_a_hub_data_set_is_read_by_name_configuration_and_split(monkeypatch, name, asked):
    import datasets

    def load(*given, split):
        assert (given, split) == (asked, "test")
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}, {"text": "c"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert usable(name, 2, "test") == [(0, {"text": "a"}), (1, {"text": "b"})]


def test_an_offline_hub_is_one_line():  # pitfall B14: the tests run with HF_HUB_OFFLINE=1
    with pytest.raises(DatasetError, match="hub dataset org/never cannot be loaded") as caught:
        read_records("org/never", "train", 2)
    assert "\n" not in str(caught.value)


def test_a_gated_hub_data_set_is_one_line(monkeypatch):  # pitfall B14
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def load(*_, **__):
        raise DatasetNotFoundError(
            "Dataset 'o/s' is a gated dataset on the Hub.\nYou must be authenticated."
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DatasetError, match="gated dataset.*your login") as caught:
        read_records("o/s", "train", 2)
    assert "\n" not in str(caught.value)
