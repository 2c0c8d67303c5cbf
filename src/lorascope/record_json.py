"""Write records, which are frozen dataclasses, as JSON, read them strictly, and give their schema.

Every key must be known and every number in its range. The types say all of it:

- `int`, `float`, `bool`, `str`, `Literal`, `X | None`, `Mapping[str, X]` and records mean what
  they say;
- `tuple[X, ...]` is a list; `tuple[X, Y]` and NamedTuples are lists of fixed length;
- `Annotated[float, Range(low, high)]` limits a number; `Any` is not checked;
- a field with a default may be missing, and is not written when it has that default.
"""

import functools
import inspect
import json
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lorascope.errors import ArtifactError

_LARGEST = 1e30  # of any number: float32 holds it
_QUOTED = 40  # characters of a wrong value that a message shows

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
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(record: type[R], data: Any, source: str) -> R:
    """Return JSON values as a record. `source` is the file that they come from.

    Raises ArtifactError at a missing or unknown key, or a value that its type does not allow.
    """
    try:
        return _reader(record)(data)
    except _MismatchError as error:
        path = error.path.removeprefix(".") or "the report"
        raise ArtifactError(f"{source}: {path} {error.problem}; make the report again") from None


def json_schema(record: type) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a record: what `from_json` accepts.

    Each record in it is an entry of `$defs`, by the name of its class, with its docstring. To a
    schema, unlike here, 1.0 is a whole number.
    """
    definitions: dict[str, Any] = {}
    known: dict[str, type] = {}
    own = _schema(record, definitions, known)
    own = definitions.pop(record.__name__) if record.__name__ in definitions else own
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **own}
    return {**schema, "$defs": dict(sorted(definitions.items()))} if definitions else schema


def _schema(hint: Any, definitions: dict[str, Any], known: dict[str, type]) -> dict[str, Any]:
    """Return the schema of a type; records go to `definitions`, their classes to `known`."""

    def of(inner: Any) -> dict[str, Any]:
        return _schema(inner, definitions, known)

    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits: Range = args[1]
        return {**of(args[0]), "minimum": limits.low, "maximum": limits.high}
    if hint in (int, float):
        kind = "integer" if hint is int else "number"
        return {"type": kind, "minimum": -_LARGEST, "maximum": _LARGEST}
    if hint is Any:
        return {}
    if hint is bool:
        return {"type": "boolean"}
    if hint is str:
        return {"type": "string"}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        inner = next(one for one in args if one is not type(None))
        return {"anyOf": [of(inner), {"type": "null"}]}
    if origin is tuple and args[-1] is Ellipsis:
        return {"type": "array", "items": of(args[0])}
    if origin is tuple:
        return _fixed_schema([of(one) for one in args])
    if origin is Mapping:
        return {"type": "object", "additionalProperties": of(args[1])}
    name = hint.__name__
    assert known.setdefault(name, hint) is hint, f"two records are called {name}"
    if name not in definitions:
        hints = get_type_hints(hint, include_extras=True)
        definitions[name] = {"title": name, "description": inspect.getdoc(hint)}
        if is_dataclass(hint):
            definitions[name] |= {
                "type": "object",
                "properties": {field.name: of(hints[field.name]) for field in fields(hint)},
                "required": [field.name for field in fields(hint) if field.default is MISSING],
                "additionalProperties": False,
            }
        else:  # a NamedTuple
            parts = [{"title": key, **of(one)} for key, one in hints.items()]
            definitions[name] |= _fixed_schema(parts)
    return {"$ref": f"#/$defs/{name}"}


def _fixed_schema(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "array",
        "prefixItems": parts,
        "minItems": len(parts),
        "maxItems": len(parts),
    }


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


@functools.cache
def _reader(hint: Any) -> _Reader:
    """Return the function that checks and converts a JSON value of a type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _number(args[0], args[1])
    if hint in (int, float):
        return _number(hint, Range())
    if hint is Any:
        return lambda value: value
    if hint is bool:
        return _choice(lambda value: type(value) is bool, "true or false")
    if hint is str:
        return _choice(lambda value: type(value) is str, "a string")
    if origin is Literal:
        return _choice(
            lambda value: type(value) is str and value in args, f"one of {', '.join(args)}"
        )
    if origin in (Union, types.UnionType):
        inner = _reader(next(one for one in args if one is not type(None)))
        return lambda value: None if value is None else inner(value)
    if origin is tuple and args[-1] is Ellipsis:
        return _list(_reader(args[0]))
    if origin is tuple:
        return _fixed([_reader(one) for one in args], lambda *values: values)
    if origin is Mapping:
        return _mapping(_reader(args[1]))
    hints = get_type_hints(hint, include_extras=True)
    if isinstance(hint, type) and is_dataclass(hint):
        return _record(hint, {field.name: _reader(hints[field.name]) for field in fields(hint)})
    return _fixed([_reader(one) for one in hints.values()], hint)  # a NamedTuple


def _number(kind: type, limits: Range) -> _Reader:
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

    return read


def _choice(allowed: Callable[[Any], bool], noun: str) -> _Reader:
    def read(value: Any) -> Any:
        if not allowed(value):
            raise _unexpected(value, noun)
        return value

    return read


def _list(item: _Reader) -> _Reader:
    def read(data: Any) -> Any:
        if type(data) is not list:
            raise _unexpected(data, "a list")
        return tuple(_items((i, item, value) for i, value in enumerate(data)))

    return read


def _fixed(readers: list[_Reader], make: Callable[..., Any]) -> _Reader:
    def read(data: Any) -> Any:
        if type(data) is not list or len(data) != len(readers):
            raise _unexpected(data, f"a list of {len(readers)} values")
        return make(*_items(zip(range(len(data)), readers, data, strict=True)))

    return read


def _mapping(item: _Reader) -> _Reader:
    def read(data: Any) -> Any:
        if type(data) is not dict:
            raise _unexpected(data, "an object")
        return dict(
            zip(data, _items((key, item, value) for key, value in data.items()), strict=True)
        )

    return read


def _record(record: type, readers: Mapping[str, _Reader]) -> _Reader:
    required = {field.name for field in fields(record) if field.default is MISSING}

    def read(data: Any) -> Any:
        if type(data) is not dict:
            raise _unexpected(data, "an object")
        if missing := required - data.keys():
            raise _MismatchError(f"lacks {', '.join(sorted(missing))}")
        if unknown := data.keys() - readers.keys():
            raise _MismatchError(f"has the unknown key {_one_line(min(unknown))}")
        values = _items((key, readers[key], value) for key, value in data.items())
        return record(**dict(zip(data, values, strict=True)))

    return read


def _items(parts: Iterable[tuple[str | int, _Reader, Any]]) -> Iterator[Any]:
    """Yield what each part of a container becomes; an error says which part."""
    for key, reader, value in parts:
        try:
            yield reader(value)
        except _MismatchError as error:
            raise error.inside(key) from None
