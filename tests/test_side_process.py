"""The second process of a sweep saves time: no byte, message or error depends on it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders.stores import planted_rows

from lorascope.errors import NumberError
from lorascope.sae import side_process, train, trainer
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run


@pytest.fixture
def config(make_store, tmp_path):
    store = make_store(planted_rows(600), n_rollouts=12)
    return TrainConfig(
        data_dir=store.path,
        output=tmp_path / "sae.pt",
        expansion_factor=2,
        k=(2, 3, 4),
        batch_size=64,
        epochs=3,
        device="cpu",
    )


@pytest.fixture
def pays(monkeypatch):
    """Let a second process pay for any sweep, on any number of threads."""
    monkeypatch.setattr(side_process, "_FEWEST_STEPS", 0)
    monkeypatch.setattr(side_process, "_LEAST_THREADS", 1)


@pytest.fixture
def taken(monkeypatch):
    """The k of every step that this process takes."""
    ks, take = [], trainer.Trainer.take

    def noted(self, x):
        ks.append(self.rule.k)
        return take(self, x)

    monkeypatch.setattr(trainer.Trainer, "take", noted)
    return ks


def contents(config: TrainConfig) -> list[bytes]:
    assert config.output
    return [member.path(config.output).read_bytes() for member in config.sweep()]


@pytest.fixture
def alone(config, tmp_path):
    """The bytes that one process makes."""
    straight = replace(config, output=tmp_path / "straight" / "sae.pt")
    run(straight)
    return contents(straight)


@pytest.mark.slow
def test_two_processes_make_the_bytes_and_the_messages_of_one(
    config, alone, taken, pays, caplog, tmp_path
):
    caplog.set_level("INFO")
    table = run(config)
    assert contents(config) == alone
    assert set(taken) == {2.0, 4.0}
    assert "a second process trains sae_k3.pt" in caplog.text
    for k in (2, 3, 4):
        assert f"k{k}: held out" in caplog.text
        assert (tmp_path / f"sae_k{k}.jsonl").exists()
    assert table.read_text() == (tmp_path / "straight" / "sae.runs.json").read_text()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["import os; os._exit(1)", "raise MemoryError"])
def test_what_the_second_process_does_not_finish_the_first_one_trains(
    config, alone, taken, pays, monkeypatch, command
):
    monkeypatch.setattr(side_process, "_COMMAND", command)
    run(config)
    assert contents(config) == alone
    assert set(taken) == {2.0, 3.0, 4.0}


def test_without_a_second_process_the_first_one_trains_all(config, taken, pays, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    run(replace(config, k=(2, 3), epochs=1))
    assert set(taken) == {2.0, 3.0}


@pytest.mark.slow
def test_an_error_of_the_second_process_is_raised_once_and_the_others_are_published(
    config, pays, tmp_path
):
    with pytest.raises(NumberError, match="sae_k2.pt is not published: its FVU is"):
        run(replace(config, k=(4, 2), max_fvu=0.3))
    assert (tmp_path / "sae_k4.pt").exists()
    with pytest.raises(NumberError, match="--lr 1e\\+30"):
        run(replace(config, k=3, lr=("0.01", "1e30")))
    assert (tmp_path / "sae_lr0.01.pt").exists()


@pytest.mark.slow
def test_an_interrupted_sweep_resumes_to_the_same_bytes(config, alone, pays, monkeypatch):
    take = trainer.Trainer.take

    def interrupted(self, x):
        if self.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "take", interrupted)
        with pytest.raises(train.Interrupted):
            run(config)
    run(config)
    assert contents(config) == alone


@pytest.mark.slow
def test_the_second_process_ends_when_the_first_one_is_killed(tmp_path):
    """It waits for the end of its input, which comes with the end of the first one."""
    second = f"""
import os, time
from lorascope.sae import side_process
side_process.asked_for()
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
time.sleep(600)
"""
    script = tmp_path / "first.py"
    script.write_text(f"""
import time
from lorascope.sae import side_process
from lorascope.sae.settings import TrainConfig
side_process._COMMAND = {second!r}
with side_process.side_process(TrainConfig(), [__import__("pathlib").Path("sae.pt")]):
    time.sleep(600)
""")
    first = subprocess.Popen([sys.executable, script])
    pid = wait_for(tmp_path / "pid")
    first.kill()
    first.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the second process is still there")


def wait_for(path: Path) -> int:
    for _ in range(600):
        if path.exists() and (text := path.read_text()):
            return int(text)
        time.sleep(0.1)
    raise TimeoutError(path)


@pytest.mark.parametrize(
    ("given", "ks"),
    [
        ({}, {3.0}),
        ({"k": (2.0,)}, set()),
        ({"k": (2.0,), "seed": (1, 2, 3)}, set()),  # these need each other
        ({"k": (2.0, 3.0), "seed": (1, 2)}, {3.0}),
    ],
)
def test_members_that_differ_by_seed_stay_together(config, pays, given, ks):
    config = replace(config, **given)
    found = side_process.choose_others(config, config.sweep(), 25, d_in=14, n_bytes=0)
    assert {member.k for member in found} == ks
    assert len(found) == len(ks) * len(config.values_of("seed"))


def test_large_and_small_dictionaries_are_shared_fairly(config, pays):
    config = replace(config, k=(2.0,), expansion_factor=(1, 2, 3, 4))
    found = side_process.choose_others(config, config.sweep(), 25, d_in=14, n_bytes=0)
    assert sum(member.expansion_factor for member in found) == 5


def test_short_sweeps_one_thread_and_little_memory_get_no_second_process(config, monkeypatch):
    def chosen(n_steps: int, n_bytes: int = 0):
        return side_process.choose_others(config, config.sweep(), n_steps, d_in=14, n_bytes=n_bytes)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert chosen(1000)
    assert not chosen(10)
    assert not chosen(1000, n_bytes=1 << 50)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not chosen(1000)
