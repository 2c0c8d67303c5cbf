"""Write records, which are frozen dataclasses, as JSON, read them strictly, and give their schema.

Every key must be known and every number in its range. The types say all of it:

- `int`, `float`, `bool`, `str`, `Literal`, `X | Y`, `X | None`, `Mapping[str, X]` and records mean
  what they say;
- `tuple[X, ...]` is a list; `tuple[X, Y]` and NamedTuples are lists of fixed length;
- `Annotated[float, Range(low, high)]` limits a number; `Any` is not checked;
- a field with a default may be missing, and is not written when it has that default.
"""

import functools
import inspect
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from lorascope.errors import ArtifactError

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LARGEST = 1e30  # of any number: float32 holds it
_QUOTED = 40  # characters of a wrong value that a message shows

_PLAIN = {str, int, float, bool, type(None)}

R = TypeVar("R")
_Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of a number."""

    low: float = -_LARGEST
    high: float = _LARGEST


def to_json(value: Any) -> Any:
    """Return a record as JSON values, its fields in their order."""
    if is_dataclass(value):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in fields(value)
            if field.default is MISSING or getattr(value, field.name) != field.default
        }
    if isinstance(value, tuple):
        is_plain = {type(item) for item in value} <= _PLAIN  # fast for long ones
        return [*value] if is_plain else [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(record: type[R], data: Any, source: str) -> R:
    """Return JSON values as a record. `source` is the file that they come from.

    Raises ArtifactError at a missing or unknown key, or a value that its type does not allow.
    """
    try:
        return _kind(record).read(data)
    except _MismatchError as error:
        path = error.path.removeprefix(".") or "the report"
        raise ArtifactError(f"{source}: {path} {error.problem}; make the report again") from None


def json_schema(hint: Any) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a record, or of a list of records.

    It allows what `from_json` accepts. Each record in it is an entry of `$defs`, by the name of its
    class, with its docstring. To a schema, unlike here, 1.0 is a whole number.
    """
    own = _kind(hint).schema
    definitions: dict[str, Any] = {}
    left = _referred(own)
    while left:
        name = left.pop()
        if name not in definitions:
            definitions[name] = json.loads(json.dumps(_DEFINED[name][1]))
            left += _referred(definitions[name])
    if "$ref" in own:
        own = definitions.pop(hint.__name__)
    schema = {"$schema": DIALECT, **own}
    return {**schema, "$defs": dict(sorted(definitions.items()))} if definitions else schema


def _referred(schema: Any) -> list[str]:
    """Return the names of the records that a schema refers to."""
    return re.findall(r"#/\$defs/(\w+)", json.dumps(schema))


class _MismatchError(Exception):
    """A value that its type does not allow; each container adds its key to `path`."""

    def __init__(self, problem: str, path: str = "") -> None:
        self.problem, self.path = problem, path

    def inside(self, key: str | int) -> "_MismatchError":
        here = f"[{key}]" if isinstance(key, int) else f".{_one_line(key)}"
        return _MismatchError(self.problem, here + self.path)


def _one_line(key: str) -> str:
    return key if key.isprintable() else ascii(key)


def _unexpected(value: Any, expected: str) -> _MismatchError:
    shown = json.dumps(value, default=repr)
    shown = shown if len(shown) <= _QUOTED else shown[:_QUOTED] + "…"
    return _MismatchError(f"is {shown}, expected {expected}")


class _Kind(NamedTuple):
    """What is done with a JSON value of a type, and the schema of such values."""

    read: _Reader  # checks and converts
    schema: dict[str, Any]


_DEFINED: dict[str, tuple[type, dict[str, Any]]] = {}  # class and schema of each record by name


@functools.cache
def _kind(hint: Any) -> _Kind:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _number(args[0], args[1])
    if hint in (int, float):
        return _number(hint, Range())
    if hint is Any:
        return _Kind(lambda value: value, {})
    if hint is bool:
        return _choice(lambda value: type(value) is bool, "true or false", {"type": "boolean"})
    if hint is str:
        return _choice(lambda value: type(value) is str, "a string", {"type": "string"})
    if origin is Literal:
        noun = f"one of {', '.join(args)}"
        return _choice(lambda value: type(value) is str and value in args, noun, {"enum": [*args]})
    if origin in (Union, types.UnionType):
        kinds = [_kind(one) for one in args if one is not type(None)]
        is_optional = len(kinds) < len(args)
        schemas = [one.schema for one in kinds] + [{"type": "null"}] * is_optional
        return _Kind(_either([one.read for one in kinds], is_optional), {"anyOf": schemas})
    if origin is tuple and args[-1] is Ellipsis:
        item = _kind(args[0])
        return _Kind(_list(item.read), {"type": "array", "items": item.schema})
    if origin is tuple:
        return _fixed([_kind(one) for one in args], lambda *values: values)
    if origin is Mapping:
        item = _kind(args[1])
        return _Kind(_mapping(item.read), {"type": "object", "additionalProperties": item.schema})
    record: type = hint
    hints, name = get_type_hints(record, include_extras=True), record.__name__
    if is_dataclass(record):
        parts = {field.name: _kind(hints[field.name]) for field in fields(record)}
        read, schema = _record(record, parts)
    else:  # a NamedTuple
        named = {key: _kind(one) for key, one in hints.items()}
        titled = [_Kind(one.read, {"title": key, **one.schema}) for key, one in named.items()]
        read, schema = _fixed(titled, record)
    schema = {"title": name, "description": inspect.getdoc(record), **schema}
    assert _DEFINED.setdefault(name, (record, schema))[0] is record, (
        f"two records are called {name}"
    )
    return _Kind(read, {"$ref": f"#/$defs/{name}"})


def _number(kind: type, limits: Range) -> _Kind:
    allowed = (int,) if kind is int else (int, float)
    low, high = limits.low, limits.high
    noun = "a whole number" if kind is int else "a number"
    if limits.high < _LARGEST:
        noun += f" from {low:g} to {high:g}"
    elif limits.low > -_LARGEST:
        noun += f" of {low:g} or more"

    def read(value: Any) -> Any:
        if type(value) not in allowed or not low <= value <= high:
            raise _unexpected(value, noun)
        return value

    name = "integer" if kind is int else "number"
    return _Kind(read, {"type": name, "minimum": low, "maximum": high})


def _choice(allowed: Callable[[Any], bool], noun: str, schema: dict[str, Any]) -> _Kind:
    def read(value: Any) -> Any:
        if not allowed(value):
            raise _unexpected(value, noun)
        return value

    return _Kind(read, schema)


def _either(readers: list[_Reader], is_optional: bool) -> _Reader:
    *others, last = readers

    def read(value: Any) -> Any:
        if value is None and is_optional:
            return None
        for other in others:
            try:
                return other(value)
            except _MismatchError:
                continue
        return last(value)

    return read


def _list(item: _Reader) -> _Reader:
    def read(data: Any) -> Any:
        if type(data) is not list:
            raise _unexpected(data, "a list")
        return tuple(_items((i, item, value) for i, value in enumerate(data)))

    return read


def _fixed(parts: list[_Kind], make: Callable[..., Any]) -> _Kind:
    readers, n = [part.read for part in parts], len(parts)

    def read(data: Any) -> Any:
        if type(data) is not list or len(data) != n:
            raise _unexpected(data, f"a list of {n} values")
        return make(*_items(zip(range(n), readers, data, strict=True)))

    schemas = [part.schema for part in parts]
    schema = {"type": "array", "prefixItems": schemas, "minItems": n, "maxItems": n}
    return _Kind(read, schema)


def _mapping(item: _Reader) -> _Reader:
    def read(data: Any) -> Any:
        if type(data) is not dict:
            raise _unexpected(data, "an object")
        return dict(
            zip(data, _items((key, item, value) for key, value in data.items()), strict=True)
        )

    return read


def _record(record: type, parts: Mapping[str, _Kind]) -> _Kind:
    readers = {name: part.read for name, part in parts.items()}
    required = [field.name for field in fields(record) if field.default is MISSING]

    def read(data: Any) -> Any:
        if type(data) is not dict:
            raise _unexpected(data, "an object")
        if missing := set(required) - data.keys():
            raise _MismatchError(f"lacks {', '.join(sorted(missing))}")
        if unknown := data.keys() - readers.keys():
            raise _MismatchError(f"has the unknown key {_one_line(min(unknown))}")
        values = _items((key, readers[key], value) for key, value in data.items())
        return record(**dict(zip(data, values, strict=True)))

    schema = {
        "type": "object",
        "properties": {name: part.schema for name, part in parts.items()},
        "required": required,
        "additionalProperties": False,
    }
    return _Kind(read, schema)


def _items(parts: Iterable[tuple[str | int, _Reader, Any]]) -> Iterator[Any]:
    """Yield what each part of a container becomes; an error says which part."""
    for key, reader, value in parts:
        try:
            yield reader(value)
        except _MismatchError as error:
            raise error.inside(key) from None
