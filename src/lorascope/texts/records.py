"""Read a dataset into records: dictionaries of named fields, one per rollout.

1. A name that looks like a path is a file or a folder, and never becomes a hub request.
2. The file's extension decides how it is read: JSON, JSON lines, CSV, TSV, text (each also with
   .gz or .zst) or Parquet. A folder must come from `datasets.save_to_disk`. Any other name is a hub
   dataset.
3. Every reader yields `(line or None, record or reason why it is broken)`, in order, lazily.

A broken record does not stop the run. `Records` keeps its number and the reason. `Records.report`
warns about all broken records at once, and raises if they are more than half.

Local files have readers of their own because `datasets` aborts at the first broken record and does
not say on which line it is. `datasets` reads its own folders and the hub.
"""

import csv
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lorascope.artifact import require_content
from lorascope.errors import DatasetError, first_line
from lorascope.hub import similar

log = logging.getLogger(__name__)

Record = dict[str, Any]
Row = tuple[int | None, Record | str]  # line, record or why it is broken
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_LINES = (".jsonl", ".ndjson", ".txt", ".text")
_TABLES = {".csv": ",", ".tsv": "\t"}
_EXTENSIONS = (".json", *_LINES, *_TABLES, ".parquet")
_N_NAMED = 5  # broken records that a warning names
_NOT_UTF8 = "not UTF-8"


class RecordError(DatasetError):
    """One record cannot be used; the run continues without it."""


class Fields(dict[str, Any]):
    """The fields of a record that have a value, and the names of those that are read.

    `columns` says for each field in which column it is; without it, all columns are fields.
    """

    def __init__(self, record: Record, columns: Mapping[str, str]) -> None:
        names = columns or {name: name for name in record}
        super().__init__(
            {
                field: record[column]
                for field, column in names.items()
                if record.get(column) is not None
            }
        )
        self._filled = {name for name, value in record.items() if value not in (None, "", [], {})}
        self._names = names

    def __getitem__(self, name: str) -> Any:
        self._filled.discard(self._names[name])
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, which counts as read, or `default`."""
        return self[name] if name in self else default  # noqa: SIM401 (it is this method)

    @property
    def unread(self) -> set[str]:
        """The names of the columns that were not read, although they say something."""
        return self._filled


@dataclass(frozen=True)
class Records:
    """A dataset as read: `usable` holds `(number, record)`, `broken` the reasons by number.

    Numbers start at 0 and include broken records. `lines` maps numbers to lines, for files that
    have lines.
    """

    name: str
    usable: list[tuple[int, Record]]
    broken: dict[int, str]
    lines: dict[int, int]

    def __len__(self) -> int:
        return len(self.usable) + len(self.broken)

    def where(self, number: int) -> str:
        """Return where a record is: its line, or its number if the file has no lines."""
        return f"line {self.lines[number]}" if number in self.lines else f"record {number}"

    def report(self, broken: dict[int, str]) -> None:
        """Warn about broken records: their number, and where and why for the first five.

        `broken` includes records that turned out broken after reading. Raises DatasetError if more
        than half of all records are broken.
        """
        if not broken:
            return
        reasons = [f"{self.where(number)}: {broken[number]}" for number in sorted(broken)]
        if 2 * len(broken) > len(self):
            fields = ", ".join(sorted(map(str, self.usable[0][1]))) if self.usable else "none"
            raise DatasetError(
                f"dataset {self.name}: {len(broken)} of {len(self)} records cannot be used, the "
                f"first at {reasons[0]}; fields found: {fields or 'none'}; fix the file, or use "
                "another --template"
            )
        log.warning(
            "left out %d broken of %d records of %s: %s%s",
            len(broken),
            len(self),
            self.name,
            "; ".join(reasons[:_N_NAMED]),
            "; ..." if len(reasons) > _N_NAMED else "",
        )


def read_records(dataset: str, split: str, limit: int | None) -> Records:
    """Return the first `limit` records of a file, a folder or a hub dataset (`org/name:config`).

    Raises DatasetError if it cannot be read, is empty, or more than half of it is broken.
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
    for number, (line, record) in enumerate(islice(rows, limit)):
        if line is not None:
            records.lines[number] = line
        if isinstance(record, str):
            records.broken[number] = record
        else:
            usable.append((number, record))
    if not len(records):
        raise DatasetError(f"dataset {dataset} holds no records; give a dataset with texts")
    if 2 * len(records.broken) > len(records):
        records.report(records.broken)
    return records


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or "\\" in name
        or name.count("/") > 1
        or _extension(Path(name)) in _EXTENSIONS
    )


def _extension(path: Path) -> str:
    """Return the extension in lower case, without that of a compression."""
    compressed = path.suffix.lower() in _COMPRESSIONS
    return (path.with_suffix("") if compressed else path).suffix.lower()


def _file_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa

    if not path.exists():
        raise DatasetError(f"dataset {path} does not exist{similar(path)}")
    require_content(path, DatasetError)
    extension = _extension(path)
    compressed = path.suffix.lower() in _COMPRESSIONS
    if extension not in _EXTENSIONS or (compressed and extension == ".parquet"):
        raise DatasetError(
            f"{path} ends in {path.suffix or 'nothing'}; expected {', '.join(_EXTENSIONS)}, "
            "or any of these but .parquet followed by .gz or .zst"
        )
    try:
        if extension == ".parquet":
            yield from _parquet(path)
            return
        with _open(path) as file:
            if extension == ".json":
                yield from _json(path, file)
            elif extension in _TABLES:
                yield from _table(path, file, _TABLES[extension])
            else:
                yield from _lines(path, file, as_json=extension in (".jsonl", ".ndjson"))
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read ({first_line(error)})") from error


def _open(path: Path) -> io.BufferedReader:
    """Open a file for bytes, decompressed."""
    import pyarrow as pa

    compression = _COMPRESSIONS.get(path.suffix.lower())
    stream: Any = pa.input_stream(str(path), compression=compression)
    return io.BufferedReader(stream, 1 << 20)


def _raw_lines(path: Path, file: Iterable[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(file):
        if number == 0:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DatasetError(f"{path} is UTF-16; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")  # noqa: PLW2901 (the byte-order mark is not text)
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
    """Return the JSON object of a line, or what is wrong with it."""
    try:
        return _object(json.loads(text))
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at character {error.pos + 1})"
    except (ValueError, RecursionError) as error:  # a number is too long, or brackets are too deep
        return f"not JSON ({first_line(error)})"


def _object(value: Any) -> Record | str:
    if isinstance(value, dict):
        return value
    return f"{type(value).__name__}, expected a JSON object"


def _json(path: Path, file: Iterable[bytes]) -> Iterator[Row]:
    """Yield the objects of a JSON list. JSON lines under the name .json are read too."""
    raw = b"".join(_raw_lines(path, file))
    # Bytes that are not UTF-8 become lone surrogates, which break only the record that holds them.
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
        raise DatasetError(f"{path} is not JSON: {first_line(error)}") from error
    if isinstance(data, dict):
        lists = [name for name, value in data.items() if isinstance(value, list)]
        if len(lists) == 1 and _holds_messages(data[lists[0]]):
            raise DatasetError(
                f"{path} is one conversation, expected a list of objects; put it into a list, [...]"
            )
        if len(lists) == 1:
            log.info("the records of %s are its list %r", path, lists[0])
            data = data[lists[0]]
    if not isinstance(data, list):
        raise DatasetError(f"{path} is not a list of JSON objects; give one object per rollout")
    for value in data:
        yield None, _object(value)


def _holds_messages(value: list[Any]) -> bool:
    """Return whether a list has the messages of one conversation."""
    return any(
        isinstance(one, dict)
        and ({"role", "content"} <= one.keys() or {"from", "value"} <= one.keys())
        for one in value
    )


def _table(path: Path, file: Iterable[bytes], delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV file, with the fields that its first row names."""
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
            repeated = {name for name in header if header.count(name) > 1}
            if repeated:
                raise DatasetError(f"{path} has two columns {min(repeated)!r}; rename one")
        elif row:
            yield line, _fields_of_row(header, row)


def _fields_of_row(header: list[str], row: list[str]) -> Record | str:
    if len(row) != len(header):
        return f"{len(row)} fields, expected {len(header)} as in the header"
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
        raise DatasetError(f"{path} is not Parquet: {first_line(error)}") from error
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
            yield None, _without_none(row)


def _without_none(value: Any) -> Any:
    """Return a value without the empty fields that Arrow adds where other rows have them."""
    if isinstance(value, dict):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return list(map(_without_none, value)) if isinstance(value, list) else value


def _from_disk(path: Path, split: str) -> Iterator[Any]:
    import datasets

    require_content(path, DatasetError)
    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        raise DatasetError(
            f"{path} is not a folder of datasets.save_to_disk; give one of those, or a "
            f"{', '.join(_EXTENSIONS)} file"
        )
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"{path} cannot be loaded ({first_line(error)})") from error
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
    except Exception as error:  # a dozen types, which all mean that it is unavailable
        raise DatasetError(
            f"hub dataset {dataset} cannot be loaded ({first_line(error)}); check the name "
            "(org/name, or org/name:config), the network and your login, or give a local file"
            f"{similar(Path(dataset))}"
        ) from error
    return _tables(data)


def _tables(data: Any) -> Iterator[Any]:
    """Yield Arrow tables: values as stored, so that no image is decoded."""
    return data.with_format("arrow").iter(batch_size=1024)
