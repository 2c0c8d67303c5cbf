"""Options: one frozen dataclass per stage, the same as flags, as TOML keys and in Python.

A field made by `option` is a flag (`data_dir` is `--data-dir`), a TOML key (`data_dir` or
`data-dir`) and a keyword argument. Strength rises from the default over `lorascope.toml` in the
working directory and `--config FILE` to the flag itself. An unknown key or flag is an error that
names the nearest known one.
"""

import argparse
import dataclasses
import difflib
import tomllib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lorascope.errors import ConfigError

CONFIG_FILE = "lorascope.toml"
C = TypeVar("C", bound="Config")


_ALIASES = {  # published names of an option, and earlier ones of ours
    "sae": ("model_path",),
    "output": ("output_dir", "output_path"),
    "same_context": ("alike",),
    "rollout_tokens": ("text_tokens",),
}


def option(default: Any = MISSING, *, help: str, identity: bool = True, path: bool = False) -> Any:
    """Declare a field of a config.

    `identity` says whether the option decides what the artifact holds: it is then recorded in
    the artifact, and an output made with another value is not overwritten by accident. Inputs are
    recorded by their content's digest, so their paths are no identity. `path` marks a string that
    may be a path: in a TOML file it is then relative to that file.
    """
    metadata = {"help": help, "identity": identity, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every stage's config: converts strings to paths and lists to tuples, then checks."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, _convert(field.name, hints[field.name], value))
        self.check()

    @classmethod
    def names(cls) -> set[str]:
        """Return the names of the options."""
        return {field.name for field in dataclasses.fields(cls)}

    @classmethod
    def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
        """Make a config from JSON values, or from words of the command line."""
        hints = get_type_hints(cls)
        return cls(**{name: _convert(name, hints[name], values[name]) for name in values})

    @classmethod
    def from_shared(cls: type[C], source: "Config", **given: Any) -> C:
        """Make a config from the options that `source` has too, replaced by those `given`."""
        shared = {name: getattr(source, name) for name in cls.names() & source.names()}
        return cls(**{**shared, **given})

    def check(self) -> None:
        """Raise ConfigError when a value is impossible by itself. Children extend this."""

    def to_json(self) -> dict[str, Any]:
        """Return every option as a JSON value; `from_json` makes an equal config of it."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the artifact's content, as JSON values."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.metadata.get("identity", True)
        }

    def require(self, name: str, at_least: float, *, unit: str = "") -> None:
        """Raise ConfigError unless option `name` is None or at least `at_least`."""
        value = getattr(self, name)
        if value is not None and not value >= at_least:
            flag = flag_of(name)
            raise ConfigError(f"{flag} is {value}, expected {at_least} or more{unit}")


def flag_of(name: str) -> str:
    """Return the flag of a field name: `data_dir` is `--data-dir`."""
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
    """Add a flag for every option of a config, with its help sentence and its default."""
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        inner, many, choices = _shape(hints[field.name])
        text = field.metadata["help"].replace("%", "%%") + _default_text(field)
        names = [flag_of(name) for name in (field.name, *_ALIASES.get(field.name, ()))]
        if inner is bool:
            parser.add_argument(
                *names, action=argparse.BooleanOptionalAction, default=MISSING, help=text
            )
        else:
            parser.add_argument(
                *names,
                dest=field.name,
                default=MISSING,
                help=text,
                nargs="+" if many else None,
                metavar=_metavar(inner, choices),
            )


def load_config(
    config_class: type[C],
    flags: Mapping[str, Any],
    files: Iterable[Path],
    every_key: Callable[[], set[str]] = set,
) -> C:
    """Make a config from defaults, TOML files in rising strength, and parsed flags.

    One TOML file may serve every command: a key in `every_key()` that is no option of this
    config is passed over, any other is an error.
    """
    names = [field.name for field in dataclasses.fields(config_class)]
    values: dict[str, Any] = {}
    for file in files:
        values.update(_from_toml(file, config_class, every_key))
    values.update({name: flags[name] for name in names if flags.get(name, MISSING) is not MISSING})
    for field in dataclasses.fields(config_class):
        if field.default is MISSING and field.name not in values:
            raise ConfigError(
                f"{flag_of(field.name)} is missing ({field.metadata['help']}); "
                f"give the flag, or put {field.name} = ... into {CONFIG_FILE}"
            )
    return config_class.from_json(values)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _from_toml(
    file: Path, config_class: type[Config], every_key: Callable[[], set[str]]
) -> dict[str, Any]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; give a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    meant = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        name = meant.get(name, name)
        if name in fields:
            values[name] = _relative_to(file.parent, fields[name], value)
        elif name not in (known := every_key() | set(fields)):
            raise ConfigError(f"{file}: unknown key {key}{did_you_mean(name, sorted(known))}")
    return values


def _relative_to(folder: Path, field: "Field[Any]", value: Any) -> Any:
    is_path = field.metadata["path"] or field.type in (Path, Path | None, "Path", "Path | None")
    if is_path and isinstance(value, str) and value.startswith(("./", "../")):
        return str(folder / value)
    return value


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _shape(hint: Any) -> tuple[type, bool, tuple[str, ...]]:
    """Return the scalar type of an annotation, whether it takes many, and its choices."""
    if _is_union(hint):
        args = [arg for arg in get_args(hint) if arg is not type(None)]
        hint = args[0]
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True, ()
    if get_origin(hint) is Literal:
        return str, False, get_args(hint)
    return hint, False, ()


def _convert(name: str, hint: Any, value: Any) -> Any:
    inner, many, choices = _shape(hint)
    optional = type(None) in get_args(hint)
    flag = flag_of(name)
    if value is None and optional:
        return None
    if many:
        one_will_do = _is_union(hint) and inner in get_args(hint)
        alone = isinstance(value, str) or (one_will_do and isinstance(value, int | float))
        parts = [value] if alone else value
        if not isinstance(parts, Sequence):
            raise ConfigError(f"{flag} is {value!r}, expected a list")
        return tuple(_convert(name, inner, part) for part in parts)
    if choices:
        if value not in choices:
            raise ConfigError(f"{flag} is {value!r}, expected one of {', '.join(choices)}")
        return value
    wrong = ConfigError(f"{flag} is {value!r}, expected {_metavar(inner, ()).lower()}")
    if inner is bool:
        if not isinstance(value, bool):
            raise wrong
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Path)):
        raise wrong
    if inner is int and isinstance(value, float) and not value.is_integer():
        raise wrong
    plain: Any = value
    try:
        return inner(plain)
    except (TypeError, ValueError) as error:
        raise wrong from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    return list(value) if isinstance(value, tuple) else value


def _metavar(inner: type, choices: tuple[str, ...]) -> str:
    if choices:
        return "{" + ",".join(choices) + "}"
    return {int: "INTEGER", float: "NUMBER", Path: "PATH", bool: "TRUE|FALSE"}.get(inner, "TEXT")


def _default_text(field: "Field[Any]") -> str:
    if field.default is MISSING:
        return " (required)"
    if field.default is None or field.default == ():
        return ""
    value = field.default
    return f" (default: {' '.join(map(str, value)) if isinstance(value, tuple) else value})"
