"""The training log: the same lines however often the run was killed, and trackers that cannot."""

import errno
import json
import logging
import os
import subprocess
import sys

import pytest
from builders.trackers import FakeWandb, fake_tensorboard, timeless

from lorascope.errors import ConfigError, Interrupted
from lorascope.sae.journal import (
    Journal,
    Trackers,
    journals,
    read_journal,
    require_trackers,
)

CONFIG = {"k": 5.0, "adapter_types": ["gate_proj"], "output": "sae"}


def no_trackers(folder):
    return Trackers((), config={}, folder=folder)


def write(path, first, last, *, step=0, clock=None):
    """Log steps `first` to `last` of 10 tokens each, as a run that went on from `step` does."""
    given = {"clock": clock} if clock else {}
    journal = Journal(path, no_trackers(path.parent), step=step, **given)
    for i in range(first, last + 1):
        journal.log(i, 10 * i, {"fvu": 1 / i, "l0": 5.0, "dead": 0})
    journal.close()


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def use_wandb(monkeypatch):
    def use(*given):
        fake = FakeWandb(*given)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return use


def run_journals(tmp_path, n_steps=5, **given):
    given = {"config": CONFIG, "folder": tmp_path / "tb", **given}
    paths = given.pop("paths", {"sae": tmp_path / "sae.jsonl"})
    with journals(paths, **given) as opened:
        for i in range(1, n_steps + 1):
            for journal in opened.values():
                journal.log(i, 10 * i, {"fvu": 0.5})


def test_a_line_holds_what_was_measured_and_the_clock(tmp_path):
    now = iter([100.0, 102.0, 106.0])
    path = tmp_path / "sae.jsonl"
    write(path, 1, 2, clock=lambda: next(now))
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == {
        **{"step": 1, "tokens": 10, "fvu": 1.0, "l0": 5.0, "dead": 0},
        **{"seconds": 2.0, "tokens_per_second": 5.0},
    }
    assert json.loads(second)["seconds"] == 6.0
    assert json.loads(second)["tokens_per_second"] == 2.5
    assert list(json.loads(first))[:2] == ["step", "tokens"]


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    journal = Journal(tmp_path / "sae.jsonl", no_trackers(tmp_path))
    journal.log(1, 10, {"fvu": 0.5})
    assert [line["step"] for line in read_journal(tmp_path / "sae.jsonl")] == [1]
    journal.close()


def test_values_that_are_not_finite_are_null(tmp_path):
    journal = Journal(tmp_path / "sae.jsonl", no_trackers(tmp_path))
    journal.log(1, 10, {"fvu": float("nan"), "auxk": float("inf"), "l0": None})
    journal.close()
    assert "NaN" not in journal.path.read_text(encoding="utf-8")
    (line,) = read_journal(journal.path)
    assert (line["fvu"], line["auxk"], line["l0"]) == (None, None, None)


@pytest.mark.parametrize("checkpoint", [0, 3, 6])
def test_a_killed_and_resumed_run_leaves_the_lines_of_a_straight_one(tmp_path, checkpoint):
    write(tmp_path / "straight.jsonl", 1, 9)
    write(tmp_path / "killed.jsonl", 1, 6)
    write(tmp_path / "killed.jsonl", checkpoint + 1, 9, step=checkpoint)
    assert timeless(tmp_path / "killed.jsonl") == timeless(tmp_path / "straight.jsonl")
    assert len(timeless(tmp_path / "straight.jsonl")) == 9


def test_seconds_go_on_from_the_lines_that_stay_and_the_first_rate_is_unknown(tmp_path):
    path = tmp_path / "sae.jsonl"
    before, after = iter([0.0, 4.0, 7.0]), iter([1000.0, 1002.0, 1004.0])
    write(path, 1, 2, clock=lambda: next(before))
    write(path, 2, 3, step=1, clock=lambda: next(after))
    lines = read_journal(path)
    assert [line["seconds"] for line in lines] == [4.0, 6.0, 8.0]
    assert [line["tokens_per_second"] for line in lines] == [2.5, None, 5.0]


@pytest.mark.parametrize("torn", ['{"step": 3, "tok', '{"step": 3}', "\0\0\0\n", "[3]\n", "{}\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path / "straight.jsonl", 1, 5)
    path = tmp_path / "sae.jsonl"
    write(path, 1, 2)
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    assert [line["step"] for line in read_journal(path)] == [1, 2]
    write(path, 3, 5, step=2)
    assert timeless(path) == timeless(tmp_path / "straight.jsonl")


def test_a_missing_log_reads_as_empty(tmp_path):
    assert read_journal(tmp_path / "none.jsonl") == []


class FullDisk:
    """A file whose writes fail, or are cut short, while `full`."""

    def __init__(self, file, kept):
        self.file, self.kept, self.full = file, kept, True

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if not self.full:
            return self.file.write(data)
        if self.kept is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[: self.kept])


@pytest.mark.parametrize("kept", [None, 0, 7])
def test_a_full_disk_costs_lines_and_one_warning_only(tmp_path, monkeypatch, caplog, kept):
    journal = Journal(tmp_path / "sae.jsonl", no_trackers(tmp_path))
    journal.log(1, 10, {"fvu": 0.9})
    disk = FullDisk(journal._file, kept)
    monkeypatch.setattr(journal, "_file", disk)
    journal.log(2, 20, {"fvu": 0.8})
    journal.log(3, 30, {"fvu": 0.7})
    disk.full = False
    journal.log(4, 40, {"fvu": 0.6})
    journal.close()
    (warning,) = warnings_in(caplog)
    assert "sae.jsonl (No space left on device)" in warning
    lines = (tmp_path / "sae.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]


def test_a_log_that_cannot_be_opened_is_told_once_and_the_run_goes_on(tmp_path, caplog):
    write(tmp_path / "no-folder" / "sae.jsonl", 1, 3)
    (warning,) = warnings_in(caplog)
    assert "sae.jsonl" in warning


def test_trackers_are_imported_only_when_asked_for(tmp_path):
    code = (
        "import sys, pathlib\n"
        "from lorascope.sae.journal import journals\n"
        f"path = pathlib.Path({str(tmp_path / 'sae.jsonl')!r})\n"
        "with journals({'sae': path}, config={}, folder=path.parent) as opened:\n"
        "    opened['sae'].log(1, 10, {'fvu': 0.5})\n"
        "assert not {'wandb', 'tensorboard', 'torch.utils.tensorboard'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_journal(tmp_path / "sae.jsonl")) == 1


def test_wandb_gets_the_config_and_nothing_that_overrides_the_users_environment(
    tmp_path, use_wandb, caplog
):
    fake = use_wandb()
    run_journals(tmp_path, n_steps=2, track=("wandb",))
    assert fake.given == {"config": CONFIG}
    assert fake.metrics == {"step": None, "*": "step"}
    assert [values["step"] for values in fake.logged] == [1, 2]
    assert fake.logged[1]["fvu"] == 0.5
    assert fake.logged[1]["tokens"] == 20
    assert fake.finished == [0]
    assert warnings_in(caplog) == []


def test_a_tracker_gets_only_numbers(tmp_path, use_wandb):
    fake = use_wandb()
    with journals(
        {"sae": tmp_path / "a.jsonl"}, config={}, folder=tmp_path, track=("wandb",)
    ) as opened:
        opened["sae"].log(1, 10, {"fvu": float("nan"), "l0": 5.0})
    assert "fvu" not in fake.logged[0]
    assert fake.logged[0]["l0"] == 5.0


def test_metrics_of_saes_side_by_side_carry_their_label(tmp_path, use_wandb):
    fake = use_wandb()
    paths = {label: tmp_path / f"{label}.jsonl" for label in ("k16", "k32")}
    run_journals(tmp_path, n_steps=1, paths=paths, track=("wandb",))
    assert fake.metrics["k32/*"] == "k32/step"
    assert [sorted(values)[0] for values in fake.logged] == ["k16/fvu", "k32/fvu"]
    assert all(len(read_journal(path)) == 1 for path in paths.values())


@pytest.mark.parametrize(
    ("fails", "words", "n_sent"),
    [
        ("init", ["cannot start", "lorascope[track]"], 0),
        ("log", ["failed at step 3"], 2),
        ("finish", ["failed at the end"], 5),
    ],
)
@pytest.mark.parametrize("error", [RuntimeError("no\nnetwork"), SystemExit("no network")])
def test_a_tracker_that_raises_is_told_once_dropped_and_never_stops_the_run(
    tmp_path, use_wandb, caplog, fails, words, n_sent, error
):
    fake = use_wandb(fails, error)
    run_journals(tmp_path, track=("wandb",))
    (warning,) = warnings_in(caplog)
    for word in ["--track wandb", "no network", *words]:
        assert word in warning
    assert "\n" not in warning
    assert len(fake.logged) == n_sent
    assert len(read_journal(tmp_path / "sae.jsonl")) == 5


def test_a_tracker_that_is_not_installed_is_one_warning_that_names_the_extra(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run_journals(tmp_path, track=("wandb",))
    (warning,) = warnings_in(caplog)
    assert "wandb" in warning
    assert "pip install 'lorascope[track]'" in warning
    assert len(read_journal(tmp_path / "sae.jsonl")) == 5


def test_the_other_tracker_goes_on_when_one_fails(tmp_path, use_wandb, monkeypatch):
    use_wandb("init")
    scalars = fake_tensorboard(monkeypatch)["scalars"]
    run_journals(tmp_path, n_steps=2, track=("wandb", "tensorboard"))
    assert ("fvu", 0.5, 2) in scalars


def test_an_interrupt_inside_a_tracker_is_no_failure_of_it(tmp_path, use_wandb):
    fake = use_wandb("log", Interrupted(2))
    with pytest.raises(Interrupted):
        run_journals(tmp_path, track=("wandb",))
    assert fake.finished == [130]


def test_a_tracker_is_told_that_the_run_failed(tmp_path, use_wandb):
    fake = use_wandb()
    given = {"config": {}, "folder": tmp_path, "track": ("wandb",)}
    with pytest.raises(ConfigError), journals({"sae": tmp_path / "a.jsonl"}, **given):
        raise ConfigError("wrong")
    assert fake.finished == [2]


@pytest.mark.parametrize(
    "text", ["key hunter22hunter22 refused", "f" * 40, "https://me:hunter22hunter22@host/x"]
)
def test_a_warning_holds_no_secret(tmp_path, use_wandb, caplog, monkeypatch, text):
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", "hunter22hunter22")
    use_wandb("init", RuntimeError(text))
    run_journals(tmp_path, track=("wandb",))
    (warning,) = warnings_in(caplog)
    assert "***" in warning
    assert "hunter22" not in warning
    assert "f" * 32 not in warning


def test_tensorboard_writes_beside_the_sae_and_hides_what_a_kill_left(tmp_path, monkeypatch):
    seen = fake_tensorboard(monkeypatch)
    run_journals(tmp_path, n_steps=1, track=("tensorboard",), step=7)
    assert seen["given"] == {"log_dir": str(tmp_path / "tb"), "purge_step": 8}
    assert '"k": 5.0' in seen["texts"][0][1]
    assert ("fvu", 0.5, 1) in seen["scalars"]
    assert seen["closed"] == 1


def test_an_unknown_tracker_is_the_users_error():
    require_trackers(("wandb", "tensorboard"))
    with pytest.raises(ConfigError, match="--track is 'mlflow', expected wandb or tensorboard"):
        require_trackers(("mlflow",))
