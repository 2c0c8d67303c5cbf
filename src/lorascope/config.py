"""Options: one frozen dataclass per stage, the same as flags, as TOML keys and in Python.

A field made by `option` is a flag (`data_dir` is `--data-dir`), a TOML key (`data_dir` or
`data-dir`) and a keyword argument. Flags override `--config FILE`, which overrides `lorascope.toml`
in the working directory, which overrides the defaults. An unknown flag or key is an error that
names the nearest known one.
"""

import argparse
import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lorascope.errors import ConfigError
from lorascope.remote import as_path

CONFIG_FILE = "lorascope.toml"
_LEAST_TEMPERATURE = 1e-3  # two logits that differ by 0.1 then differ by 100: no draw sees less
C = TypeVar("C", bound="Config")


OPTION_GROUPS = {  # the groups of `--help` with the options of all commands, most used first
    "data": "adapters null dataset input data_dir num_examples rollouts rollouts_of prompts "
    "num_prompts max_rollouts roles template columns split long_texts max_length duplicates sample "
    "max_new_tokens temperature sample_seed".split(),
    "model": "lora_path base_model base_revision adapter_types adapter_name dtype gauge device_map "
    "skip_unhookable".split(),
    "dictionary": "sae expansion_factor k batch_size epochs lr architecture normalize "
    "holdout dead_after auxk_alpha max_fvu buffer_rows against".split(),
    "features": "features top_k context_window max_per_rollout same_context samples rollout_tokens "
    "depth evaluate_texts effect_texts label_tokens directions verify part_rollouts by_site "
    "subsets answers how factor doses where target tokens positions steps top "
    "check_rollouts greedy tolerance".split(),
    "language model": "llm_model llm_base_url judge_model llm_parallel".split(),
    "output": "output overwrite store_dtype title effects labels by_hand open serve port".split(),
    "run": "device num_gpus batch_tokens seed resume checkpoint_every budget".split(),
}
ALIASES = {  # other names of an option: those of the published scripts
    "sae": ("model_path",),
    "output": ("output_dir", "output_path"),
}


def option(
    default: Any = MISSING,
    *,
    help: str,
    identity: bool = True,
    path: bool = False,
    positional: bool = False,
    at_least: float | None = None,
    suffix: str | None = None,
) -> Any:
    """Declare a field of a config.

    `identity` says whether the option decides what the artifact holds. Such options are recorded in
    the artifact, and an existing output with another value is not overwritten by accident. Paths
    of inputs are not recorded, because the digests of the inputs are. `path` marks a string that
    may be a path: in a TOML file it is relative to that file. A `positional` option is given
    without a flag on the command line. `at_least` is the smallest allowed value of a number, or of
    each number in a list, `suffix` is how a path must end.
    """
    metadata = {
        "help": help,
        "identity": identity,
        "path": path,
        "positional": positional,
        "at_least": at_least,
        "suffix": suffix,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Base of every stage's config: converts values to the types of the fields and checks them."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _convert(field.name, hints[field.name], getattr(self, field.name))
            _require_allowed(field, value)
            object.__setattr__(self, field.name, value)
        self.check()

    @classmethod
    def names(cls) -> set[str]:
        """Return the names of the options."""
        return {field.name for field in dataclasses.fields(cls)}

    @classmethod
    def from_json(cls: type[C], values: Mapping[str, Any]) -> C:
        """Make a config from JSON values or from strings of the command line."""
        hints = get_type_hints(cls)
        return cls(**{name: _convert(name, hints[name], values[name]) for name in values})

    @classmethod
    def from_shared(cls: type[C], source: "Config", **given: Any) -> C:
        """Make a config from `given` options, and else from those that `source` has too."""
        shared = {name: getattr(source, name) for name in cls.names() & source.names()}
        return cls(**{**shared, **given})

    def check(self) -> None:
        """Raise ConfigError at an impossible value. Subclasses extend this."""

    def to_json(self) -> dict[str, Any]:
        """Return every option as a JSON value, for `from_json`."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def settings(self) -> dict[str, Any]:
        """Return the options with `identity`, as JSON values."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.metadata.get("identity", True)
        }


def _require_allowed(field: "Field[Any]", value: Any) -> None:
    least, suffix = field.metadata.get("at_least"), field.metadata.get("suffix")
    for one in value if isinstance(value, tuple) else () if value is None else (value,):
        if least is not None and not one >= least:  # NaN too
            raise ConfigError(f"{flag_of(field.name)} is {one}, expected {least} or more")
        if suffix is not None and one.suffix != suffix:
            raise ConfigError(
                f"{flag_of(field.name)} is {one}, expected a name that ends in {suffix}"
            )


def require_temperature(temperature: float) -> None:
    """Raise ConfigError unless a sampling temperature is 0, or large enough to divide logits by."""
    if temperature != 0 and not _LEAST_TEMPERATURE <= temperature < math.inf:
        raise ConfigError(
            f"--temperature is {temperature:g}, expected 0, which takes the likeliest token, or "
            f"{_LEAST_TEMPERATURE:g} or more"
        )


def flag_of(name: str) -> str:
    """Return the flag of a field name: `data_dir` is `--data-dir`."""
    return "--" + name.replace("_", "-")


def grouped_options(config_class: type[Config]) -> "dict[str, list[Field[Any]]]":
    """Return the options of a config by group, in the order of `OPTION_GROUPS`."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    groups = {
        group: [fields.pop(name) for name in names if name in fields]
        for group, names in OPTION_GROUPS.items()
    }
    groups["other"] = list(fields.values())  # a test holds that there are none
    return {group: options for group, options in groups.items() if options}


def default_text(field: "Field[Any]") -> str:
    """Return an option's default as one would type it; empty where there is none to type."""
    value = field.default
    if isinstance(value, bool):
        return flag_of(field.name if value else f"no_{field.name}")
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    return " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def add_flags(parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
    """Add the options of a config to a parser, in groups, with help, default and aliases."""
    hints = get_type_hints(config_class)
    required = []
    for group, fields in grouped_options(config_class).items():
        section = parser.add_argument_group(group)
        for field in fields:
            inner, many, choices = _shape(hints[field.name])
            metavar = _metavar(inner, choices)
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if inner is not bool:
                kind = {"nargs": "+" if many else None, "metavar": metavar}
            if field.metadata["positional"]:
                required.append(f"{field.name.upper()} ... ")
                kind = {"nargs": "*", "metavar": field.name.upper()}
                section.add_argument(
                    field.name, help=field.metadata["help"], default=MISSING, **kind
                )
                continue
            kind |= {"dest": field.name, "default": MISSING}
            aliases = [flag_of(alias) for alias in ALIASES.get(field.name, ())]
            notes = [f"also {', '.join(aliases)}"] if aliases else []
            if field.default is MISSING:
                notes.append("required")
                required.append(f"{flag_of(field.name)} {metavar}{' ...' if many else ''} ")
            elif default := default_text(field):
                notes.append(f"default: {default}")
            text = field.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
            section.add_argument(flag_of(field.name), help=text.replace("%", "%%"), **kind)
            if aliases:
                section.add_argument(*aliases, help=argparse.SUPPRESS, **kind)
    parser.usage = f"{parser.prog} {''.join(required)}[options]"


def load_config(config_class: type[C], flags: Mapping[str, Any], files: Iterable[Path]) -> C:
    """Make a config from defaults, TOML files and parsed flags; later ones override earlier ones.

    One TOML file may serve every command: keys of other commands' options are ignored, and any
    other key is an error.
    """
    names = [field.name for field in dataclasses.fields(config_class)]
    values: dict[str, Any] = {}
    for file in files:
        values.update(_from_toml(file, config_class))
    values.update({name: flags[name] for name in names if flags.get(name, MISSING) is not MISSING})
    for field in dataclasses.fields(config_class):
        if field.default is MISSING and field.name not in values:
            if field.metadata["positional"]:
                raise ConfigError(f"{field.name} are missing: {field.metadata['help']}")
            raise ConfigError(
                f"{flag_of(field.name)} is missing ({field.metadata['help']}); "
                f"give the flag, or put {field.name} = ... into {CONFIG_FILE}"
            )
    return config_class.from_json(values)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _from_toml(file: Path, config_class: type[Config]) -> dict[str, Any]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; give a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    known = {name for names in OPTION_GROUPS.values() for name in names} | set(fields)
    name_of_alias = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        name = name_of_alias.get(name, name)
        if name in values:
            raise ConfigError(f"{file}: {key} is another name of {name}, which is there too")
        if name in fields:
            values[name] = _relative_to(file.parent, fields[name], value)
        elif name not in known:
            raise ConfigError(f"{file}: unknown key {key}{did_you_mean(name, sorted(known))}")
    return values


def _relative_to(folder: Path, field: "Field[Any]", value: Any) -> Any:
    if isinstance(value, list):
        return [_relative_to(folder, field, one) for one in value]
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
        takes_scalar = _is_union(hint) and inner in get_args(hint)
        is_scalar = isinstance(value, str) or (takes_scalar and isinstance(value, int | float))
        parts = [value] if is_scalar else value
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
    if inner is Path:
        return as_path(str(plain))
    try:
        return inner(plain)
    except (TypeError, ValueError) as error:
        raise wrong from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


def _metavar(inner: type, choices: tuple[str, ...]) -> str:
    if choices:
        return "{" + ",".join(choices) + "}"
    return {int: "INTEGER", float: "NUMBER", Path: "PATH", bool: "TRUE|FALSE"}.get(inner, "TEXT")
