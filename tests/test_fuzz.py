"""Whatever a user gives ends in a result or in one line, never in a traceback.

Each test takes valid input, changes it at random, and lets lorascope read it. The examples are the
same in every run; `--hypothesis-seed` has no effect.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from builders.records import CHAT_TEMPLATE
from builders.subjects import CPU
from builders.tiny_tokenizers import byte_level, fast
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorascope import config as options
from lorascope.cli import call, stage_parser
from lorascope.commands import COMMANDS
from lorascope.errors import LorascopeError
from lorascope.inspection import describe
from lorascope.subject.adapter import CONFIG, inspect_adapter
from lorascope.subject.adapter_files import WEIGHTS
from lorascope.subject.base import find_base
from lorascope.subject.load import Subject, load_subject, load_tokenizer
from lorascope.subject.sampling import log_ignored_settings, sample_rollouts
from lorascope.texts.conversations import FIELDS
from lorascope.texts.rollouts import Rollout, load_rollouts

WORDS = st.sampled_from(
    ["", "x", "auto", "default", "q_proj", ".*", "(", "model.layers.0", "../base", "\x00", "\ud800",
     "é", "llama", "yarn", "linear", "float16", "relu", "CAUSAL_LM", "{{ x }}", "{%", "<s>"]
)  # fmt: skip
NUMBERS = st.integers(-2, 70) | st.sampled_from([0.0, -1.0, 1e-30, 1e30, 1e9, float("inf")])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
LENGTHS = [6, pytest.param(120, marks=pytest.mark.slow)]  # examples of each test


def run(n: int, check: Callable[..., None], **drawn: Any) -> None:
    """Call `check` with `n` examples of what is drawn."""
    settings(max_examples=n, derandomize=True, database=None)(given(**drawn)(check))()


def ends_in_one_line(action: Callable[[], object]) -> bool:
    """Run what may raise only lorascope's errors, of one line; say whether it raised none."""
    try:
        action()
    except LorascopeError as error:
        assert "\n" not in str(error)
        return False
    return True


def paths_of(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of the parts of a JSON value: all of the whole, the first of others."""
    parts = list(data.items()) if isinstance(data, dict) else []
    parts = list(enumerate(data)) if isinstance(data, list) else parts
    parts = parts[:4] if path else parts
    return [p for key, part in parts for p in [(*path, key), *paths_of(part, (*path, key))]]


def changed(data: Any, changes: list[tuple[int, Any]]) -> Any:
    """Return a copy of a JSON value with parts replaced, or taken out where the value is `...`."""
    data = copy.deepcopy(data)
    for number, value in changes:
        paths = paths_of(data)
        if not paths:
            return value
        *above, key = paths[number % len(paths)]
        holder = data
        for step in above:
            holder = holder[step]
        if value is ...:
            del holder[key]
        else:
            holder[key] = value
    return data


CHANGES = st.lists(st.tuples(st.integers(0, 10**6), VALUES | st.just(...)), min_size=1, max_size=3)


class Folder:
    """A temporary copy of a folder, in which one JSON file is rewritten again and again."""

    def __init__(self, source: Path, name: str, root: Path) -> None:
        self.path = root / source.name
        shutil.copytree(source, self.path)
        self.file = self.path / name
        self.data = json.loads(self.file.read_text())

    def write(self, data: Any) -> None:
        self.file.write_text(json.dumps(data))


def load(adapter: Path, base: Path) -> Subject:
    """Load folders as `generate` does."""
    found = inspect_adapter(str(adapter))
    source = find_base(found, str(base))
    return load_subject(found, source, load_tokenizer(found, source), CPU, "auto")


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about what was changed
def test_any_config_of_an_adapter_is_read_or_refused_in_one_line(n, subject_dirs, tmp_path):
    folder = Folder(subject_dirs[1], CONFIG, tmp_path)

    def check(changes: list[tuple[int, Any]]) -> None:
        folder.write(changed(folder.data, changes))
        ends_in_one_line(lambda: describe(str(folder.path)))
        ends_in_one_line(lambda: describe(str(folder.path), as_json=True))
        ends_in_one_line(lambda: load(folder.path, subject_dirs[0]))

    run(n, check, changes=CHANGES)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.filterwarnings("ignore")
def test_any_tensors_of_an_adapter_are_read_or_refused_in_one_line(n, subject_dirs, tmp_path):
    folder = Folder(subject_dirs[1], CONFIG, tmp_path)
    tensors = load_file(folder.path / WEIGHTS)
    shapes = st.lists(st.integers(0, 17), max_size=4).map(torch.zeros)
    kinds = st.sampled_from([torch.float16, torch.int64, torch.bool]).map(torch.ones(1, 16).to)

    def check(changes: list[tuple[str, str, Any]]) -> None:
        changed = dict(tensors)
        for name, new, tensor in changes:
            old = changed.pop(name, torch.ones(1))
            changed[new or name] = old if tensor is None else tensor
        save_file(changed, folder.path / WEIGHTS)
        ends_in_one_line(lambda: describe(str(folder.path)))
        ends_in_one_line(lambda: load(folder.path, subject_dirs[0]))

    names = st.sampled_from(sorted(tensors))
    damage = st.sampled_from(
        [("", ""), ("lora_A", "lora_B"), (".weight", ""), ("model.", ""), ("0", "x"), ("lora_", ""),
         ("q_proj", "gate"), ("lora_A", "lora_embedding_A"), ("weight", "bias"), ("base_", "")]
    )  # fmt: skip
    renamed = st.builds(lambda name, pair: (name, name.replace(*pair)), names, damage)
    change = st.builds(lambda pair, tensor: (*pair, tensor), renamed, st.none() | shapes | kinds)
    run(n, check, changes=st.lists(change, min_size=1, max_size=4))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.filterwarnings("ignore")
def test_any_config_of_a_base_is_read_or_refused_in_one_line(n, name, subject_dirs, tmp_path):
    folder = Folder(subject_dirs[0], name, tmp_path)
    if name == "generation_config.json":
        folder.data |= {"eos_token_id": [2, 7], "repetition_penalty": 1.05, "do_sample": True}
    prompt = Rollout(0, np.array([5, 9], np.int32), np.ones(2, np.uint8))

    def write(subject: Subject) -> None:
        log_ignored_settings(subject.base)
        sample_rollouts(subject, [prompt], max_new_tokens=1, temperature=0.0, seed=(0,))

    def check(changes: list[tuple[int, Any]]) -> None:
        folder.write(changed(folder.data, changes))
        ends_in_one_line(lambda: write(load(subject_dirs[1], folder.path)))

    run(n, check, changes=CHANGES)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
@pytest.mark.filterwarnings("ignore")
def test_any_tokenizer_is_read_or_refused_in_one_line(n, name, subject_dirs, tmp_path):
    folder = Folder(subject_dirs[0], name, tmp_path)
    adapter = inspect_adapter(str(subject_dirs[1]))
    (tmp_path / "texts.jsonl").write_text('{"text": "a b"}\n{"question": "Is it?", "answer": "é"}')

    def check(changes: list[tuple[int, Any]]) -> None:
        folder.write(changed(folder.data, changes))
        ends_in_one_line(
            lambda: rollouts(
                load_tokenizer(adapter, find_base(adapter, str(folder.path))),
                tmp_path / "texts.jsonl",
            )
        )

    run(n, check, changes=CHANGES)


def rollouts(tokenizer: Any, file: Path, **given: Any) -> None:
    source: Any = {"dataset": str(file), "split": "train", "limit": None, "tokenizer": tokenizer}
    source |= {"template": "auto", **given}
    for prompts in (False, True):
        ends_in_one_line(lambda prompts=prompts: load_rollouts(**source, prompts=prompts))


TEMPLATE_PARTS = st.sampled_from(
    [CHAT_TEMPLATE, "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m.role }}",
     "{{ 1 / 0 }}", "{{ range(10**9) | list }}", "{{ messages[7].x.y }}", "{{ messages[7] }}",
     "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('no') }}", "{{", "%}",
     "{{ strftime_now(3) }}", "{{ ''.__class__ }}", "{{ 'x' * 100 }}", "{{ tools[0].name }}",
     "{% include 'x' %}", "{{ m.content.split() | first }}", "{% if %}", "{{ 'a' | int + 'b' }}",
     "{% set m = 3 %}{{ m.x.y() }}", "{{ '%d' | format('x') }}", "{{ '\ud800' }}", "<|end|>"]
)  # fmt: skip


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.filterwarnings("ignore")
def test_any_chat_template_renders_or_is_refused_in_one_line(n, tmp_path):
    tokenizer = fast(byte_level())
    file = tmp_path / "texts.jsonl"
    file.write_text('{"question": "Is it?", "answer": "é", "tools": [{"name": "f"}]}\n' * 2)

    def check(parts: list[str]) -> None:
        tokenizer.chat_template = "".join(parts)
        rollouts(tokenizer, file)

    run(n, check, parts=st.lists(TEMPLATE_PARTS, min_size=1, max_size=4))


RECORDS = [
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                  {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]},
                  {"role": "assistant", "content": "x", "reasoning_content": "y"}],
     "tools": [{"name": "f", "parameters": {}}], "system": "s"},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "x"}},
    {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "text": "f"},
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "user", "content": "b"}]},
    {"question": "a", "thinking_trajectories": ["b"], "attempt": "c"},
]  # fmt: skip


@pytest.mark.parametrize("n", LENGTHS)
def test_any_dataset_is_read_or_refused_in_one_line(n, tmp_path):
    tokenizer = fast(byte_level())
    tokenizer.chat_template = CHAT_TEMPLATE

    def check(
        changes: list[tuple[int, Any]], template: str, columns: list[str], names: str
    ) -> None:
        records = changed(RECORDS, changes)
        records = records if isinstance(records, list) else [records]
        file = tmp_path / "texts.jsonl"
        file.write_text("\n".join(map(json.dumps, records)))
        rollouts(tokenizer, file, template=template)
        rollouts(tokenizer, file, template=template, columns=[f"{c}={names}" for c in columns])

    run(
        n * 2,
        check,
        changes=CHANGES,
        template=st.sampled_from(["auto", "s1", "chat", "text"]),
        columns=st.lists(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=3),
        names=st.sampled_from(["text", "messages", "input", ""]),
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_any_bytes_of_any_file_type_are_read_or_refused_in_one_line(n, tmp_path):
    tokenizer = fast(byte_level())
    kinds = [
        "json",
        "jsonl",
        "csv",
        "tsv",
        "txt",
        "parquet",
        "json.gz",
        "csv.zst",
        "xml",
        "",
        "PARQUET",
    ]
    pieces = st.sampled_from(
        [b"text\n", b'{"text": "a"}\n', b"[", b"]", b'"', b",", b"\n", b"\r", b"\xff", b"PAR1",
         b"\x1f\x8b", b"\xef\xbb\xbf", b"\xff\xfe", b"1e999", b"NaN", b"a,b\n1,2\n"]
    )  # fmt: skip

    def check(kind: str, content: list[bytes]) -> None:
        file = tmp_path / f"a.{kind}"
        file.write_bytes(b"".join(content))
        rollouts(tokenizer, file)

    run(n * 4, check, kind=st.sampled_from(kinds), content=st.lists(pieces, max_size=6))


NAMES = sorted({name for group in options.OPTION_GROUPS.values() for name in group} | {"x"})


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


@pytest.mark.parametrize("n", LENGTHS)
def test_any_toml_file_is_read_or_refused_in_one_line(n, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def check(pairs: dict[str, Any], name: str, loose: str) -> None:
        text = "\n".join(f"{key} = {toml(value)}" for key, value in pairs.items())
        Path("lorascope.toml").write_bytes(f"{text}\n{loose}".encode("utf-8", "surrogatepass"))
        ends_in_one_line(
            lambda: options.load_config(
                COMMANDS[name].config_class(), {}, [Path("lorascope.toml")]
            ).to_json()
        )
        if name not in ("demo", "run"):
            assert call([name]) == 2
            assert capsys.readouterr().err.count("Error: ") == 1

    run(
        n * 4,
        check,
        pairs=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
        name=st.sampled_from(sorted(COMMANDS)),
        loose=st.sampled_from(
            ["", "", "", "[", "[a]", "a.b = 1", "\x00", "k = 1979-05-27", "k = nan"]
        ),
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_any_command_line_is_one_line(n, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "0",
        "-1",
        "nan",
        "1e999",
        "",
        "none.h5",
        "a/b",
        "gate",
        "--k",
        "\udcff",
        "/" + "x" * 5000,
    ]

    def check(name: str, given: list[tuple[int, list[str]]]) -> None:
        flags = [f for a in stage_parser(name)._actions for f in a.option_strings]
        flags = [flag for flag in flags if flag not in ("-h", "--help", "--debug")]
        line = [word for number, rest in given for word in (flags[number % len(flags)], *rest)]
        assert call([name, *line]) == 2
        assert capsys.readouterr().err.count("Error: ") == 1

    run(
        n * 4,
        check,
        name=st.sampled_from(sorted(COMMANDS.keys() - {"demo", "run"})),
        given=st.lists(
            st.tuples(st.integers(0, 10**4), st.lists(st.sampled_from(words), max_size=2)),
            max_size=4,
        ),
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_any_environment_is_one_line_or_has_no_effect(n, tmp_path, capsys):
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "COLUMNS"]
    names += ["TERM", "TMPDIR", "HF_TOKEN"]
    values = ["", " ", "0", "1", "2", "-1", "x", "1.5", "٣", "²", "9" * 30, "/no", "é"]
    lines = ["--version", "--help", "info no", "verify no", "train --data-dir no"]
    lines += ["generate --lora-path no/such"]

    def check(variables: dict[str, str], line: str) -> None:
        with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.chdir(folder)
            assert call(line.split()) in (0, 2)
            errors = capsys.readouterr().err
            assert errors.count("Error: ") <= 1 and "Traceback" not in errors
            patch.chdir(tmp_path)

    run(
        n * 4,
        check,
        variables=st.dictionaries(st.sampled_from(names), st.sampled_from(values), max_size=4),
        line=st.sampled_from(lines),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "TORCH_LOGS"])
def test_what_a_library_finds_wrong_at_its_import_is_one_line(name, tmp_path):
    command = [sys.executable, "-m", "lorascope", "generate", "--lora-path", "no/such"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, name: "x"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: a library cannot be imported (")
    assert done.stderr.count("\n") == 1
