"""Read a dataset into records: named fields, one record for each text.

1. What looks like a path is a file or a folder, and never becomes a hub request.
2. A file is read by its ending: JSON, JSON lines, CSV, TSV, text (each also as .gz or .zst) or
   Parquet. A folder is one that `datasets.save_to_disk` made. Other names are hub data sets.
3. Every reader yields `(line or None, record or the reason why there is none)`, in order, lazily.

A row that cannot be read is no end of the run: `Records` keeps its place and the reason, and
`Records.report` warns of all broken ones at once, or raises when they are more than half.
"""

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lorascope.config import did_you_mean
from lorascope.errors import DatasetError

log = logging.getLogger(__name__)

Record = dict[str, Any]
Row = tuple[int | None, Record | str]
_PACKED = {".gz": "gzip", ".zst": "zstd"}
_LINES = (".jsonl", ".ndjson", ".txt", ".text")
_TABLES = {".csv": ",", ".tsv": "\t"}
_ENDINGS = (".json", *_LINES, *_TABLES, ".parquet")
_NAMED = 5  # broken records that a warning names
_NOT_UTF8 = "not UTF-8"


class RecordError(DatasetError):
    """One record cannot be used; the run goes on without it."""


@dataclass(frozen=True)
class Records:
    """A dataset as read: `usable` holds `(number, record)`, `broken` the reason by number.

    Numbers start at 0 and count every record, the broken ones too. `lines` has the line by number,
    for files that have lines.
    """

    name: str
    usable: list[tuple[int, Record]]
    broken: dict[int, str]
    lines: dict[int, int]

    def __len__(self) -> int:
        return len(self.usable) + len(self.broken)

    def where(self, number: int) -> str:
        """Return where a record stands: its line, or its number."""
        return f"line {self.lines[number]}" if number in self.lines else f"record {number}"

    def report(self, broken: dict[int, str]) -> None:
        """Warn of the broken records by count, the first five by place and reason.

        `broken` are those of this object and those that turned out so later. Raises DatasetError
        when they are more than half of all.
        """
        if not broken:
            return
        reasons = [f"{self.where(number)}: {broken[number]}" for number in sorted(broken)]
        if 2 * len(broken) > len(self):
            fields = ", ".join(sorted(map(str, self.usable[0][1]))) if self.usable else "none"
            raise DatasetError(
                f"dataset {self.name}: {len(broken)} of {len(self)} records cannot be used, the "
                f"first at {reasons[0]}; fields found: {fields or 'none'}; mend the file, or give "
                "another --template"
            )
        log.warning(
            "left out %d of %d records of %s that are broken: %s%s",
            len(broken),
            len(self),
            self.name,
            "; ".join(reasons[:_NAMED]),
            "; ..." if len(reasons) > _NAMED else "",
        )


def read_records(dataset: str, split: str, limit: int | None) -> Records:
    """Return the first `limit` records of a file, a folder or a hub data set (`org/name:config`).

    Raises DatasetError when it cannot be read, holds no record, or more than half are broken.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        rows = _arrow_rows(_from_disk(path, split))
    elif path.exists() or _looks_like_path(dataset):
        rows = _file_rows(path)
    else:
        rows = _arrow_rows(_from_hub(dataset, split))
    usable: list[tuple[int, Record]] = []
    records = Records(dataset, usable, {}, {})
    for number, (line, found) in enumerate(islice(rows, limit)):
        if line is not None:
            records.lines[number] = line
        if isinstance(found, str):
            records.broken[number] = found
        else:
            usable.append((number, found))
    if not len(records):
        raise DatasetError(f"dataset {dataset} holds no records; give one with texts")
    if 2 * len(records.broken) > len(records):
        records.report(records.broken)
    return records


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or "\\" in name
        or name.count("/") > 1
        or _ending(Path(name)) in _ENDINGS
    )


def _ending(path: Path) -> str:
    """Return the ending that says what a file holds, in lower case, a compression's left out."""
    packed = path.suffix.lower() in _PACKED
    return (path.with_suffix("") if packed else path).suffix.lower()


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return did_you_mean(path.name, [child.name for child in path.parent.iterdir()])


def _file_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa

    if not path.exists():
        raise DatasetError(f"dataset {path} does not exist{_near(path)}")
    ending = _ending(path)
    packed = path.suffix.lower() in _PACKED
    if ending not in _ENDINGS or (packed and ending == ".parquet"):
        raise DatasetError(
            f"{path} ends in {path.suffix or 'nothing'}; expected {', '.join(_ENDINGS)}, "
            "or any but the last with .gz or .zst behind it"
        )
    try:
        if ending == ".parquet":
            yield from _parquet(path)
            return
        with _open(path) as file:
            if ending == ".json":
                yield from _json(path, file)
            elif ending in _TABLES:
                yield from _table(path, file, _TABLES[ending])
            else:
                yield from _lines(path, file, as_json=ending in (".jsonl", ".ndjson"))
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read ({_first_line(error)})") from error


def _open(path: Path) -> IO[bytes]:
    """Open a file for bytes, decompressed."""
    import pyarrow as pa

    packed = _PACKED.get(path.suffix.lower())
    if packed is None:
        return path.open("rb")
    stream: Any = pa.input_stream(str(path), compression=packed)
    return io.BufferedReader(stream, 1 << 20)


def _raw_lines(path: Path, file: Iterable[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(file):
        if number == 0:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DatasetError(f"{path} is UTF-16; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")  # noqa: PLW2901 (the mark is no text)
        yield line


def _lines(path: Path, file: Iterable[bytes], *, as_json: bool) -> Iterator[Row]:
    for number, line in enumerate(_raw_lines(path, file), start=1):
        if as_json and not line.strip():
            continue
        try:
            text = line.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            yield number, f"{_NOT_UTF8} at byte {error.start + 1}"
            continue
        yield number, _parsed(text) if as_json else {"text": text}


def _parsed(text: str) -> Record | str:
    """Return the object of a line of JSON, or what is wrong with it."""
    try:
        return _object(json.loads(text))
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at character {error.pos + 1})"
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        return f"not JSON ({_first_line(error)})"


def _object(found: Any) -> Record | str:
    return found if isinstance(found, dict) else f"no JSON object but {type(found).__name__}"


def _json(path: Path, file: Iterable[bytes]) -> Iterator[Row]:
    """Yield the objects of one JSON list; a file of JSON lines that is called .json is read too."""
    raw = b"".join(_raw_lines(path, file))
    # What is not UTF-8 becomes lone surrogates: only the record that holds them is broken by it.
    text = raw.decode("utf-8", "surrogateescape")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        first = text.lstrip().partition("\n")[0]
        if error.msg == "Extra data" and isinstance(_parsed(first), dict):
            yield from _lines(path, io.BytesIO(raw), as_json=True)
            return
        raise DatasetError(f"{path} is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {_first_line(error)}") from error
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else data
    if not isinstance(data, list):
        raise DatasetError(f"{path} is no list of JSON objects; give one object per text")
    for found in data:
        yield None, _object(found)


def _table(path: Path, file: Iterable[bytes], delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV file by the names of its first row; quotes must balance."""
    csv.field_size_limit(2**31 - 1)  # the module's default refuses fields above 131,072 characters
    decoded = (line.decode("utf-8", "surrogateescape") for line in _raw_lines(path, file))
    reader = csv.reader(decoded, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise DatasetError(f"{path}: the header is broken ({error})") from error
            yield line, f"broken quotes ({error})"
            continue
        if header is None:
            header = [name.strip() for name in row]
            twice = {name for name in header if header.count(name) > 1}
            if twice:
                raise DatasetError(f"{path} has two columns {min(twice)!r}; name them apart")
        elif row:
            yield line, _named(header, row)


def _named(header: list[str], row: list[str]) -> Record | str:
    if len(row) != len(header):
        return f"{len(row)} fields, the header has {len(header)}"
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return _NOT_UTF8
    return dict(zip(header, row, strict=True))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} is not Parquet: {_first_line(error)}") from error
    with file:
        yield from _arrow_rows(file.iter_batches(batch_size=1024))


def _arrow_rows(batches: Iterator[Any]) -> Iterator[Row]:
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            if len(batch) == 1:
                yield None, _NOT_UTF8
            else:
                yield from _arrow_rows(batch.slice(i, 1) for i in range(len(batch)))
            continue
        for row in rows:
            yield None, row


def _from_disk(path: Path, split: str) -> Iterator[Any]:
    import datasets

    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        raise DatasetError(
            f"{path} is a folder that datasets.save_to_disk did not make; give such a one or a "
            f"{', '.join(_ENDINGS)} file"
        )
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{path} cannot be loaded ({_first_line(error)})") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DatasetError(
                f"{path} has no split {split!r}; it has {', '.join(map(str, data))}: "
                "choose one with --split"
            )
        data = data[split]
    return _tables(data)


def _from_hub(dataset: str, split: str) -> Iterator[Any]:
    import datasets

    name, _, config = dataset.partition(":")
    try:
        data = datasets.load_dataset(name, *([config] if config else []), split=split)
    except Exception as error:  # any of a dozen types, all of which mean: it cannot be had
        raise DatasetError(
            f"hub data set {dataset} cannot be loaded ({_first_line(error)}); check the name "
            "(org/name, or org/name:config), the network and your login, or give a local file"
            f"{_near(Path(dataset))}"
        ) from error
    return _tables(data)


def _tables(data: Any) -> Iterator[Any]:
    """Yield Arrow tables, which hold the values as they are stored: no image is decoded."""
    return data.with_format("arrow").iter(batch_size=1024)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
