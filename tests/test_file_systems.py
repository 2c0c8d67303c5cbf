"""File systems that lack locks, synced folders, shared maps or space, by a preloaded library."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from builders.stores import write_store

_SOURCE = Path(__file__).with_name("builders") / "file_faults.c"
_CALLS = """
import contextlib, io, json, os, sys
import h5py, safetensors.torch, torch
from lorascope.cli import call
torch.set_num_threads(1)
for number, words in enumerate(json.load(sys.stdin)):
    space = os.environ["FAULT_SPACES"].split()
    os.environ["FAULT_SPACE"] = f"{number}:{space[number % len(space)]}"
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = call(words)
    print(json.dumps([code, said.getvalue()]), flush=True)
"""
FAULTS = ("locks", "sync", "maps")


@pytest.fixture(scope="session")
def faults(tmp_path_factory) -> Path:
    """The library that makes calls fail; skips where nothing can compile it or preload it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("faults") / "file_faults.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def calls(folder, commands, library=None, fault="", spaces=(0,)):
    """Run commands in one process whose files in `folder` have a fault: exit code and stderr.

    `spaces` are the bytes that each command may write.
    """
    environment = {**os.environ, "FAULT_DIR": str(folder.resolve()), "FAULT": fault}
    environment["FAULT_SPACES"] = " ".join(map(str, spaces))
    if library is not None:
        environment["LD_PRELOAD"] = str(library)
    done = subprocess.run(
        [sys.executable, "-c", _CALLS],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(commands), (commands[len(answers)], done.stderr[-3000:])
    return answers


def content(folder):
    """Every file of a folder with its bytes, without logs, which have times in them."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".jsonl"
    }


LIGHT = [
    line.split()
    for line in (
        "train --data-dir store --output out/sae --k 3 --expansion-factor 2 --batch-size 64",
        "collect --data-dir store --sae out/sae --output out/features.h5",
        "dashboard --input out/features.h5 --output out/page.html",
    )
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a store, and in `out` what the light stages make of it without a fault."""
    folder = tmp_path_factory.mktemp("plain")
    write_store(folder / "store")
    assert [code for code, _ in calls(folder, LIGHT)] == [0, 0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_stages_work_on_a_file_system_that_lacks_something(fault, faults, plain, tmp_path):
    shutil.copytree(plain / "store", tmp_path / "store")
    commands = [*LIGHT, ["verify", "out/sae"], ["verify", "out/features.h5"]]
    for words, (code, said) in zip(commands, calls(tmp_path, commands, faults, fault), strict=True):
        assert code == 0, (words, said)
        is_warned = fault == "locks" and words[0] != "verify"
        assert ("has no locks: start no other" in said) == is_warned, (words, said)
    assert content(tmp_path / "out") == content(plain / "out")


def size(path):
    """The bytes of a file or of a folder's files."""
    return sum(map(len, content(path).values())) if path.is_dir() else path.stat().st_size


def assert_said(answers, commands):
    """Each command found no space, and says so in one line at the end."""
    for words, (code, said) in zip(commands, answers, strict=True):
        assert code == 2, (words, said)
        assert "Traceback" not in said, (words, said)
        line = said.splitlines()[-1]
        assert re.match("ArtifactError.*no space left on device; finished work is kept", line), said


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(faults, plain, tmp_path):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    commands = [[*words, "--overwrite"] for words in LIGHT]
    spaces = [size(tmp_path / words[words.index("--output") + 1]) // 2 for words in commands]
    assert_said(calls(tmp_path, commands, faults, "space", spaces), commands)
    assert content(tmp_path / "out").items() >= content(plain / "out").items()
    assert [code for code, _ in calls(tmp_path, commands)] == [0, 0, 0]
    assert content(tmp_path / "out") == content(plain / "out")


LORA = "--lora-path adapter --base-model base --device cpu"
DATA = f"{LORA} --data-dir out/activations --sae out/sae"
MADE = "--data-dir out/activations --k 3 --expansion-factor 2 --batch-size 64"
EVERYTHING = [
    line.split()
    for line in (
        f"generate {LORA} --dataset texts.jsonl --num-examples 40 --output out/activations",
        f"train --output out/sae {MADE}",
        f"train --output out/sae.pt {MADE}",
        "collect --data-dir out/activations --sae out/sae --output out/features.h5",
        "collect --data-dir out/activations --sae out/sae.pt --output out/features.json",
        f"evaluate {DATA} --max-rollouts 2 --output out/evaluation.json",
        f"ablate {DATA} --max-rollouts 2 --output out/ablation.json",
        f"attribute {DATA} --max-rollouts 2 --rollouts-of out/features.h5 --output out/causes.json",
        f"direct {LORA} --sae out/sae --output out/direct.json",
        f"steer {DATA} --features 0 --max-new-tokens 4 --num-prompts 1 --output out/steering.json",
        f"edit {DATA} --max-rollouts 2 --features 0 --tolerance 0 --output out/edited",
        "label --input out/features.h5 --output out/labels.json",
        "export --input out/features.h5 --output out/features.csv",
        "dashboard --input out/features.h5 --output out/page.html",
        "info out/activations",
        *(f"verify out/{name}" for name in ("activations", "sae", "sae.pt", "features.h5")),
    )
]


@pytest.fixture(scope="module")
def whole(subject_dirs, dataset_file, tmp_path_factory):
    """A folder with base, adapter and texts, and in `out` what every stage makes of them."""
    folder = tmp_path_factory.mktemp("whole")
    for name, source in zip(("base", "adapter"), subject_dirs, strict=True):
        shutil.copytree(source, folder / name)
    shutil.copy(dataset_file, folder / "texts.jsonl")
    answers = calls(folder, EVERYTHING)
    assert [code for code, _ in answers] == [0] * len(answers), answers
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_stage_and_reader_works_there(fault, faults, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out")
    answers = calls(tmp_path, EVERYTHING, faults, fault)
    for words, (code, said) in zip(EVERYTHING, answers, strict=True):
        assert code == 0, (words, said)
    assert content(tmp_path / "out") == content(whole / "out")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_disk_that_fills_is_one_line_in_every_stage(share, faults, whole, tmp_path):
    """Each stage finds the others' work, makes its own again, and may write a part of it."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    commands = [[*words, "--overwrite"] for words in EVERYTHING if "--output" in words]
    made = [tmp_path / words[words.index("--output") + 1] for words in commands]
    spaces = [int(share * size(path)) for path in made]
    assert_said(calls(tmp_path, commands, faults, "space", spaces), commands)
    assert content(tmp_path / "out").items() >= content(whole / "out").items()
