import argparse
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

from lorascope.commands import COMMANDS
from lorascope.config import (
    ALIASES,
    OPTION_GROUPS,
    Config,
    add_flags,
    default_text,
    load_config,
    option,
)
from lorascope.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Example(Config):
    source: Path = option(help="where to read", identity=False)
    top_k: int = option(10, help="examples kept")
    k: float = option(50.0, help="latents a token")
    kind: Literal["a", "b"] = option("a", help="kind")
    types: tuple[str, ...] = option((), help="projections")
    name: str | None = option(None, help="name or path", path=True)
    others: tuple[str, ...] = option((), help="names or paths", identity=False, path=True)
    fast: bool = option(False, help="be fast", identity=False)


@dataclass(frozen=True, kw_only=True)
class Aliased(Config):
    sae: Path = option(Path("sae"), help="SAE to read with")
    output: Path | None = option(None, help="file to make")


def parse(*arguments: str, files: list[Path] | None = None, options: type[Config] = Example) -> Any:
    parser = argparse.ArgumentParser()
    add_flags(parser, options)
    return load_config(options, vars(parser.parse_args(arguments)), files or [])


parse_aliased = partial(parse, options=Aliased)


def test_flags_give_the_types_of_the_fields():
    config = parse("--source", "x", "--top-k", "3", "--k", "1.5", "--types", "g", "u", "--fast")
    assert config == Example(source=Path("x"), top_k=3, k=1.5, types=("g", "u"), fast=True)


def test_strength_rises_from_default_over_files_to_flags(tmp_path):
    weak, strong = tmp_path / "weak.toml", tmp_path / "strong.toml"
    weak.write_text('source = "a"\ntop_k = 1\nk = 1')
    strong.write_text("top-k = 2\nfast = true")
    config = parse("--k", "7", files=[weak, strong])
    assert (config.source, config.top_k, config.k, config.fast) == (Path("a"), 2, 7.0, True)


def test_relative_paths_of_a_file_are_relative_to_that_file(tmp_path):
    file = tmp_path / "lorascope.toml"
    file.write_text('source = "../data"\nname = "org/model"\nothers = ["./one", "org/two"]')
    config = parse(files=[file])
    assert config.others == (f"{tmp_path}/one", "org/two")
    assert config.source == tmp_path / ".." / "data"
    assert config.name == "org/model"


def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path):
    file = tmp_path / "lorascope.toml"
    file.write_text("top_kk = 3")
    with pytest.raises(ConfigError, match="unknown key top_kk; did you mean top_k"):
        parse("--source", "x", files=[file])


def test_a_key_of_another_command_is_passed_over(tmp_path):
    file = tmp_path / "lorascope.toml"
    file.write_text("num_gpus = 3")
    assert parse("--source", "x", files=[file]).top_k == 10


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    file = tmp_path / "lorascope.toml"
    file.write_text("top_k = 3", encoding="utf-8-sig")
    assert parse("--source", "x", files=[file]).top_k == 3


@pytest.mark.parametrize("text", ["top_k = ", "\xff"])
def test_a_file_that_is_not_toml_is_named(tmp_path, text):
    file = tmp_path / "lorascope.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not TOML"):
        parse("--source", "x", files=[file])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_k", "ten", "--top-k is 'ten', expected integer"),
        ("top_k", 1.5, "--top-k is 1.5, expected integer"),
        ("top_k", True, "--top-k is True"),
        ("k", "x", "--k is 'x', expected number"),
        ("kind", "c", "--kind is 'c', expected one of a, b"),
        ("fast", "yes", "--fast is 'yes'"),
        ("types", 3, "--types is 3, expected a list"),
        ("top_k", None, "--top-k is None"),
    ],
)
def test_a_value_of_another_type_is_one_line(name, value, message):
    with pytest.raises(ConfigError, match=message):
        Example(**{"source": Path("x"), name: value})


def test_a_missing_option_says_how_to_give_it():
    with pytest.raises(ConfigError, match=r"--source is missing \(where to read\).*lorascope.toml"):
        parse()


def test_settings_are_json_of_what_decides_the_artifact():
    settings = Example(source=Path("x"), types=("g",), fast=True).settings()
    assert settings == {"top_k": 10, "k": 50.0, "kind": "a", "types": ["g"], "name": None}


def test_a_config_takes_the_options_that_it_shares_with_another():
    @dataclass(frozen=True, kw_only=True)
    class Other(Config):
        top_k: int = option(1, help="n")
        other: int = option(2, help="n")

    assert Other.from_shared(Example(source=Path("x"), top_k=5), other=9) == Other(top_k=5, other=9)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_of_every_command_has_a_help_sentence_and_survives_json(name):
    import dataclasses
    import json

    config_class = COMMANDS[name].config_class()
    for field in dataclasses.fields(config_class):
        assert len(field.metadata["help"]) > 8, field.name
    hints = get_type_hints(config_class)
    needed = [f.name for f in dataclasses.fields(config_class) if f.default is MISSING]
    examples = {Path: Path("x.json"), tuple[str, ...]: ("x",)}
    given = {name: examples.get(hints[name], (1,)) for name in needed}
    settings = config_class(**given).settings()
    assert json.loads(json.dumps(settings)) == settings


def test_every_option_of_every_command_has_a_group_and_every_name_in_the_groups_is_an_option():
    options = {name for command in COMMANDS.values() for name in command.config_class().names()}
    grouped = [name for names in OPTION_GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(options)
    assert set(ALIASES) <= options
    assert not options & {alias for aliases in ALIASES.values() for alias in aliases}


def test_a_flag_given_twice_under_two_names_counts_as_given_last():
    assert parse_aliased("--model-path", "a").sae == Path("a")
    assert parse_aliased("--model-path", "a", "--sae", "b").sae == Path("b")
    assert parse_aliased("--sae", "b", "--model-path", "a").sae == Path("a")
    assert parse_aliased("--output-dir", "a", "--output-path", "b").output == Path("b")


def test_a_toml_key_may_be_an_alias_and_two_names_of_one_option_are_an_error(tmp_path):
    file = tmp_path / "lorascope.toml"
    file.write_text('model-path = "a"\noutput_dir = "out"')
    assert parse_aliased(files=[file]) == Aliased(sae=Path("a"), output=Path("out"))
    file.write_text('model_path = "a"\nsae = "b"')
    with pytest.raises(ConfigError, match="sae.*another name"):
        parse_aliased(files=[file])


def test_the_usage_line_names_what_is_required_and_help_names_aliases_once():
    parser = argparse.ArgumentParser(prog="lorascope x")
    add_flags(parser, Aliased)
    text = parser.format_help()
    assert text.startswith("usage: lorascope x [options]\n")
    assert text.count("--model-path") == 1
    parser = argparse.ArgumentParser(prog="lorascope x")
    add_flags(parser, Example)
    assert parser.format_usage() == "usage: lorascope x --source PATH [options]\n"


def test_defaults_are_shown_as_one_types_them():
    @dataclass(frozen=True, kw_only=True)
    class Defaults(Config):
        roles: tuple[str, ...] = option(("user", "think"), help="roles")
        doses: tuple[float, ...] = option((0.5, 1.0), help="doses")
        k: float = option(50.0, help="latents")
        n: int = option(100_000, help="tokens")
        resume: bool = option(True, help="resume")
        keep_all: bool = option(False, help="keep")
        none: int | None = option(None, help="none")
        empty: tuple[str, ...] = option((), help="empty")
        path: Path = option(Path("a/b"), help="path")

    shown = {name: default_text(field) for name, field in Defaults.__dataclass_fields__.items()}
    assert shown == {
        "roles": "user think",
        "doses": "0.5 1",
        "k": "50",
        "n": "100000",
        "resume": "--resume",
        "keep_all": "--no-keep-all",
        "none": "",
        "empty": "",
        "path": "a/b",
    }
