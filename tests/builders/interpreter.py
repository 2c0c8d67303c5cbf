"""Run kernel tests on CUDA, or in Triton's interpreter in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def on_device(test):
    """Mark a test that launches kernels: on CUDA, or in the interpreter's process."""
    if INTERPRETED:
        return test
    return pytest.mark.gpu(test)


def passed_in_the_interpreter(file):
    """Run a file's tests in a process that interprets kernels; return how many passed, all."""
    own = {"PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"}
    env = {name: value for name, value in os.environ.items() if name not in own}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not gpu", file],
        cwd=Path(__file__).parents[2],
        env=env | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
    return int(re.findall(r"(\d+) passed", done.stdout)[-1])
