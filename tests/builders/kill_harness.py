"""Run one command undisturbed into A; into B, kill it at random moments first; compare the bytes.

`python kill_harness.py SEED N_KILLS A B COMMAND...` where `OUT` in the command stands for A or B.
Children are forked from a process that has imported everything and computed nothing, so a kill
falls into the stage's work and not into its imports.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import h5py  # noqa: F401  imported for the children
import peft  # noqa: F401
import safetensors.torch  # noqa: F401
import torch
import transformers  # noqa: F401

from lorascope.cli import call
from lorascope.commands import COMMANDS


def start(command: list[str], out: Path) -> int:
    """Fork a child that runs the command, and return its process id."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(call([str(out) if word == "OUT" else word for word in command]))
    return child


def finish(child: int) -> None:
    """Wait for a child that must succeed."""
    _, status = os.waitpid(child, 0)
    if status != 0:
        sys.exit(f"the command ended with status {status}")


def content(path: Path) -> dict[str, bytes]:
    """Return every file of an artifact with its bytes."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(f.relative_to(path)): f.read_bytes() for f in files if f.is_file()}


def main() -> None:
    """Do what the module says; exit with a sentence when the bytes differ."""
    seed, n_kills, calm, disturbed, command = (
        int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:],
    )  # fmt: skip
    COMMANDS[command[0]].config_class()
    begun = time.monotonic()
    finish(start(command, calm))
    duration = time.monotonic() - begun
    chance = random.Random(seed)
    n_killed = 0
    for _ in range(n_kills):
        child = start(command, disturbed)
        time.sleep(chance.uniform(0.02, 0.95) * duration)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        n_killed += os.WIFSIGNALED(status)
        if disturbed.exists() and content(disturbed) != content(calm):
            sys.exit("a killed run left a finished artifact with other bytes")
    finish(start(command, disturbed))
    if content(disturbed) != content(calm):
        names = [n for n, b in content(calm).items() if content(disturbed).get(n) != b]
        sys.exit(f"the bytes differ in {names}")
    if disturbed.with_name(disturbed.name + ".partial").exists():
        sys.exit("unfinished work was left behind")
    print(f"killed {n_killed} of {n_kills}")


main()
