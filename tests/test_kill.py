"""`kill -9` at a random moment, then the same command again: the bytes of an undisturbed run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders.saes import make_sae
from builders.stores import write_store

from lorascope.features import collect
from lorascope.features.collect import CollectConfig

pytestmark = pytest.mark.slow
HARNESS = Path(__file__).with_name("builders") / "kill_harness.py"


def killed(folder: Path, suffix: str, command: list[str]) -> int:
    """Run the harness and return how many kills found the command at work."""
    out = [str(folder / f"{name}{suffix}") for name in ("calm", "disturbed")]
    done = subprocess.run(
        [sys.executable, HARNESS, "7", "6", *out, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"killed (\d+) of", done.stdout)
    assert found
    return int(found.group(1))


def test_generate_survives_kill_9(subject_dirs, dataset_file, tmp_path):
    command = ["generate", "--lora-path", str(subject_dirs[1]), "--dataset", str(dataset_file)]
    n = killed(tmp_path, "", [*command, "--batch-tokens", "64", "--output", "OUT"])
    assert n >= 1


@pytest.mark.parametrize("suffix", ["", ".pt"])
def test_train_survives_kill_9(tmp_path, suffix):
    store = write_store(tmp_path / "store", n_rollouts=12, length=60)
    command = ["train", "--data-dir", str(store.path), "--output", "OUT", "--batch-size", "64"]
    command += ["--k", "3", "--expansion-factor", "4", "--epochs", "8", "--checkpoint-every", "0"]
    assert killed(tmp_path, suffix, command) >= 1


@pytest.mark.parametrize("suffix", [".h5", ".json"])
def test_collect_survives_kill_9(tmp_path, suffix):
    store = write_store(tmp_path / "store", n_rollouts=12, length=60)
    make_sae(tmp_path / "sae")
    command = ["collect", "--data-dir", str(store.path), "--sae", str(tmp_path / "sae")]
    n = killed(tmp_path, suffix, [*command, "--batch-size", "7", "--output", "OUT"])
    assert n >= 1


def test_dashboard_survives_kill_9(tmp_path):
    store = write_store(tmp_path / "store")
    make_sae(tmp_path / "sae")
    index = tmp_path / "features.h5"
    collect.run(CollectConfig(data_dir=store.path, sae=tmp_path / "sae", output=index))
    assert killed(tmp_path, ".html", ["dashboard", "--input", str(index), "--output", "OUT"]) >= 1
