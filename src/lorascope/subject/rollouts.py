"""Texts as the model sees them: records of a dataset, rendered once into token ids with roles.

1. `read_records` takes a local file (JSON, JSONL, Parquet, text) or a hub data set.
2. `render` turns a record into the text that the model is run on and says which spans are whose.
3. `tokenize` gives token ids and the role of every token; template headers and special tokens
   are `special`.

The s1 form is the one that s1 models are trained on (simplescaling/s1, `data/tokenization.py`): the
tokenizer's chat template around the question, then `<|im_start|>think` and `<|im_start|>answer`
inside the assistant's turn, the answer led by `Answer: ` where it does not say so itself.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.errors import DatasetError

log = logging.getLogger(__name__)

ROLES = ("system", "user", "think", "answer", "special", "text")
TEMPLATES = ("auto", "s1", "chat", "text")
Record = dict[str, Any]
_FILE_TYPES = (".json", ".jsonl", ".parquet", ".txt", ".text")
_S1 = ("question", "deepseek_thinking_trajectory", "deepseek_attempt")
_PAIRS = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"))
_HEADERS = {"system", "user", "assistant", "developer"}


@dataclass(frozen=True)
class Rollout:
    """One text ready for the model: `token_ids (n,)`, `roles (n,)` as indices into `ROLES`."""

    id: int
    token_ids: npt.NDArray[np.int32]
    roles: npt.NDArray[np.uint8]


def read_records(dataset: str, split: str, limit: int | None) -> list[tuple[int, Record]]:
    """Return `(number in the dataset, record)` of at most `limit` first records.

    Raises DatasetError when the file or hub data set cannot be read, names the line of a broken
    JSONL record, and refuses a dataset without records.
    """
    path = Path(dataset).expanduser()
    if path.suffix.lower() in _FILE_TYPES or path.exists() or _looks_like_path(dataset):
        records = _read_file(path, limit)
    else:
        records = _read_hub(dataset, split, limit)
    if not records:
        raise DatasetError(f"dataset {dataset} holds no records; give one with texts")
    return records


def form_of(record: Record, where: str) -> str:
    """Return the template that a record's fields ask for: `s1`, `chat` or `text`."""
    if _s1_parts(record) is not None:
        return "s1"
    if "messages" in record or any(set(pair) <= record.keys() for pair in _PAIRS):
        return "chat"
    if "text" in record:
        return "text"
    raise DatasetError(
        f"{where} has the fields {', '.join(sorted(map(str, record))) or 'none'}; expected "
        f"{' + '.join(_S1)} (s1), messages or question + answer (chat), or text"
    )


def render(
    record: Record, template: str, tokenizer: Any, where: str
) -> tuple[str, list[tuple[int, int, str]]]:
    """Return the text of a record and the spans `(start, stop, role)` of its contents.

    Raises DatasetError when the record lacks the fields of the template or holds no string there.
    """
    form = form_of(record, where) if template == "auto" else template
    if form == "text":
        text = _string(record, "text", where)
        return text, [(0, len(text), "text")]
    messages, contents = _s1_messages(record, where) if form == "s1" else _chat(record, where)
    if not messages:
        return "", []
    if tokenizer.chat_template is None:
        raise DatasetError(
            f"the tokenizer has no chat template, which {where} needs; give --template text "
            "and a text field"
        )
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    spans: list[tuple[int, int, str]] = []
    position = 0
    for content, role in contents:
        found = text.find(content, position) if content else -1
        if found >= 0:
            position = found + len(content)
            spans.append((found, position, role))
    if spans and spans[0][2] != "system":
        spans = _default_system(text[: spans[0][0]], tokenizer) + spans
    return text, spans


def tokenize(
    text: str, spans: Sequence[tuple[int, int, str]], tokenizer: Any
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Return token ids and roles of a rendered text; a token has the role of its first character.

    Only plain text gets the tokenizer's own special tokens: a rendered chat holds them already.
    """
    plain = len(spans) == 1 and spans[0][2] == "text"
    encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], np.int32)
    by_character = np.full(len(text) + 1, ROLES.index("special"), np.uint8)
    for start, stop, role in spans:
        by_character[start:stop] = ROLES.index(role)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64).reshape(-1)
    roles = by_character[starts] if len(ids) else np.zeros(0, np.uint8)
    special = np.isin(ids, np.array(special_ids(tokenizer), np.int32))
    roles[special] = ROLES.index("special")
    return ids, roles


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of all tokens that never stand for text."""
    added = tokenizer.added_tokens_decoder
    marked = {token_id for token_id, token in added.items() if token.special}
    return sorted(marked | set(tokenizer.all_special_ids))


def token_bytes(tokenizer: Any, n_tokens: int = 0) -> list[bytes]:
    """Return the raw bytes of every token, in id order; ids without a token give `b""`.

    Byte-level vocabularies (GPT-2, Qwen, Llama 3) spell bytes as printable characters, and
    SentencePiece ones (Llama 2, Gemma) write a space as U+2581 and single bytes as `<0xNN>`.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and '"ByteLevel"' in json.dumps(
        json.loads(backend.to_str())["decoder"]
    )
    alphabet = {character: byte for byte, character in _byte_alphabet().items()}
    tokens = [b""] * max(n_tokens, max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token in added:
            tokens[token_id] = token.encode()
        elif byte_level and all(character in alphabet for character in token):
            tokens[token_id] = bytes(alphabet[character] for character in token)
        elif match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
            tokens[token_id] = bytes([int(match.group(1), 16)])
        else:
            tokens[token_id] = token.replace("\u2581", " ").encode("utf-8", "replace")
    return tokens


def _byte_alphabet() -> dict[int, str]:
    """Return the printable character that byte-level BPE writes for each byte.

    The 188 bytes that are printable in Latin-1 stand for themselves, the others follow from 256.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return table


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1


def _read_file(path: Path, limit: int | None) -> list[tuple[int, Record]]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DatasetError(f"dataset file {path} {what}; give a {', '.join(_FILE_TYPES)} file")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return _read_parquet(path, limit)
        if suffix == ".json":
            return _read_json(path, limit)
        with path.open(encoding="utf-8-sig") as file:
            if suffix == ".jsonl":
                return list(_read_lines(file, path, limit))
            if suffix in (".txt", ".text"):
                lines = enumerate(line.rstrip("\r\n") for line in file)
                return [(i, {"text": line}) for i, line in lines if limit is None or i < limit]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    raise DatasetError(
        f"{path} has the suffix {suffix or 'none'}; expected {', '.join(_FILE_TYPES)}"
    )


def _read_lines(file: Any, path: Path, limit: int | None) -> Iterator[tuple[int, Record]]:
    number = 0
    for line_number, line in enumerate(file, start=1):
        if limit is not None and number >= limit:
            return
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{path}, line {line_number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DatasetError(f"{path}, line {line_number} is no JSON object with named fields")
        yield number, record
        number += 1


def _read_json(path: Path, limit: int | None) -> list[tuple[int, Record]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        if isinstance(error, UnicodeDecodeError):
            raise
        raise DatasetError(f"{path} is not JSON: {error}") from error
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else data
    if not isinstance(data, list) or not all(isinstance(record, dict) for record in data):
        raise DatasetError(f"{path} is no list of JSON objects; give one object per text")
    return list(enumerate(data[:limit]))


def _read_parquet(path: Path, limit: int | None) -> list[tuple[int, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} is not Parquet: {error}") from error
    return list(enumerate(table.slice(0, limit).to_pylist()))


def _read_hub(dataset: str, split: str, limit: int | None) -> list[tuple[int, Record]]:
    import datasets

    try:
        data = datasets.load_dataset(dataset, split=split)
    except Exception as error:  # any of a dozen types, all of which mean: it cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DatasetError(
            f"hub data set {dataset} cannot be loaded ({reason}); check the name, the network "
            "and your login, or give a local file"
        ) from error
    n_rows = len(data) if limit is None else min(limit, len(data))
    return [(i, dict(data[i])) for i in range(n_rows)]


def _s1_parts(record: Record) -> tuple[Any, Any, Any] | None:
    if set(_S1) <= record.keys():
        return record[_S1[0]], record[_S1[1]], record[_S1[2]]
    if {"question", "thinking_trajectories", "attempt"} <= record.keys():
        thinking = record["thinking_trajectories"]
        thinking = "\n".join(thinking) if isinstance(thinking, list) else thinking
        return record["question"], thinking, record["attempt"]
    return None


def _s1_messages(record: Record, where: str) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    parts = _s1_parts(record)
    if parts is None:
        raise DatasetError(
            f"{where} lacks the s1 fields {' + '.join(_S1)}; it has {', '.join(sorted(record))}"
        )
    for name, part in zip(_S1, parts, strict=True):
        if not isinstance(part, str):
            raise DatasetError(f"{where}: field {name} is {type(part).__name__}, expected text")
    question, thinking, attempt = (part.strip() for part in parts)
    if not (question and thinking and attempt):
        return [], []
    answer = attempt if "Answer:" in attempt else "Answer: " + attempt
    assistant = f"<|im_start|>think\n{thinking}\n<|im_start|>answer\n{answer}"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": assistant},
    ]
    return messages, [(question, "user"), (thinking, "think"), (answer, "answer")]


def _chat(record: Record, where: str) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m
            for m in messages
        ):
            raise DatasetError(f"{where}: messages is no list of objects with role and content")
    else:
        pair = next((pair for pair in _PAIRS if set(pair) <= record.keys()), None)
        if pair is None:
            raise DatasetError(
                f"{where} has no messages and no question + answer; it has "
                f"{', '.join(sorted(record))}"
            )
        user, assistant = (_string(record, name, where) for name in pair)
        if not user.strip() or not assistant.strip():
            return [], []
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ]
    role_of = {"system": "system", "developer": "system", "assistant": "answer"}
    contents = [(m["content"].strip(), role_of.get(m["role"], "user")) for m in messages]
    return messages, contents


def _string(record: Record, name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        found = "missing" if value is None else type(value).__name__
        raise DatasetError(f"{where}: field {name} is {found}, expected text")
    return value


def _default_system(prefix: str, tokenizer: Any) -> list[tuple[int, int, str]]:
    """Find the system prompt that the template itself puts before the first message."""
    specials = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in specials)
    spans: list[tuple[int, int, str]] = []
    position = 0
    pieces = re.split(f"({pattern})", prefix) if pattern else [prefix]
    for piece in pieces:
        first, _, rest = piece.partition("\n")
        skipped = len(first) + 1 if first.strip() in _HEADERS else 0
        content = rest if skipped else piece
        if content.strip() and content.strip() not in _HEADERS and piece not in specials:
            start = position + skipped + len(content) - len(content.lstrip())
            spans.append((start, start + len(content.strip()), "system"))
        position += len(piece)
    return spans
