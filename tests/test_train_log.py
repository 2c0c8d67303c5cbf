"""The training log has the same lines however often the run was interrupted."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest
from builders.training_logs import timeless

from lorascope.sae.training_log import TrainingLog, read_training_log


def write(path, first, last, *, step=0, clock=None):
    """Log steps `first` to `last` of 10 tokens each, as a run that resumed at `step` does."""
    given = {"clock": clock} if clock else {}
    training_log = TrainingLog(path, step=step, **given)
    for i in range(first, last + 1):
        training_log.write(10 * i, {"step": i, "fvu": 1 / i, "l0": 5.0, "dead": 0})


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_line_holds_what_was_measured_and_the_clock(tmp_path):
    now = iter([100.0, 102.0, 106.0])
    path = tmp_path / "sae.jsonl"
    write(path, 1, 2, clock=lambda: next(now))
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == {
        "step": 1,
        "tokens": 10,
        "fvu": 1.0,
        "l0": 5.0,
        "dead": 0,
        "seconds": 2.0,
        "tokens_per_second": 5.0,
    }
    assert json.loads(second)["seconds"] == 6.0
    assert json.loads(second)["tokens_per_second"] == 2.5
    assert list(json.loads(first))[:2] == ["step", "tokens"]


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    training_log = TrainingLog(tmp_path / "sae.jsonl")
    for step in (1, 2):
        training_log.write(10 * step, {"step": step, "fvu": 0.5})
        assert read_training_log(training_log.path)[-1]["step"] == step


def test_values_that_are_not_finite_are_null(tmp_path):
    training_log = TrainingLog(tmp_path / "sae.jsonl")
    training_log.write(10, {"step": 1, "fvu": float("nan"), "auxk": float("inf")})
    assert "NaN" not in training_log.path.read_text(encoding="utf-8")
    (line,) = read_training_log(training_log.path)
    assert line["fvu"] is line["auxk"] is None


@pytest.mark.parametrize("checkpoint", [0, 3, 6])
def test_a_killed_and_resumed_run_leaves_the_lines_of_a_straight_one(tmp_path, checkpoint):
    write(tmp_path / "straight.jsonl", 1, 9)
    write(tmp_path / "killed.jsonl", 1, 6)
    write(tmp_path / "killed.jsonl", checkpoint + 1, 9, step=checkpoint)
    assert timeless(tmp_path / "killed.jsonl") == timeless(tmp_path / "straight.jsonl")
    assert len(timeless(tmp_path / "straight.jsonl")) == 9


def test_seconds_continue_from_the_lines_that_stay_and_the_first_rate_is_unknown(tmp_path):
    path = tmp_path / "sae.jsonl"
    before, after = iter([0.0, 4.0, 7.0]), iter([1000.0, 1002.0, 1004.0])
    write(path, 1, 2, clock=lambda: next(before))
    write(path, 2, 3, step=1, clock=lambda: next(after))
    lines = read_training_log(path)
    assert [line["seconds"] for line in lines] == [4.0, 6.0, 8.0]
    assert [line["tokens_per_second"] for line in lines] == [2.5, None, 5.0]


@pytest.mark.parametrize("torn", ['{"step": 3, "tok', '{"step": 3}', "\0\0\0\n", "[3]\n", "{}\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write(tmp_path / "straight.jsonl", 1, 5)
    path = tmp_path / "sae.jsonl"
    write(path, 1, 2)
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    assert [line["step"] for line in read_training_log(path)] == [1, 2]
    write(path, 3, 5, step=2)
    assert timeless(path) == timeless(tmp_path / "straight.jsonl")


def test_a_missing_log_reads_as_empty(tmp_path):
    assert read_training_log(tmp_path / "none.jsonl") == []


def test_a_run_that_replaces_another_leaves_no_line_of_it_even_if_it_logs_none(tmp_path):
    write(tmp_path / "sae.jsonl", 1, 3)
    TrainingLog(tmp_path / "sae.jsonl")  # from step 0, stopped before its first line
    assert read_training_log(tmp_path / "sae.jsonl") == []


def test_a_full_disk_costs_no_line_for_good_and_one_warning_only(tmp_path, monkeypatch, caplog):
    path = tmp_path / "sae.jsonl"
    training_log = TrainingLog(path)
    training_log.write(10, {"step": 1, "fvu": 0.9})

    def full(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        training_log.write(20, {"step": 2, "fvu": 0.8})
        training_log.write(30, {"step": 3, "fvu": 0.7})
    assert [line["step"] for line in read_training_log(path)] == [1]
    training_log.write(40, {"step": 4, "fvu": 0.6})
    (warning,) = warnings_in(caplog)
    assert "sae.jsonl (No space left on device)" in warning
    assert [line["step"] for line in read_training_log(path)] == [1, 2, 3, 4]


def test_a_log_that_cannot_be_opened_is_one_warning_and_the_run_continues(tmp_path, caplog):
    write(tmp_path / "no-folder" / "sae.jsonl", 1, 3)
    (warning,) = warnings_in(caplog)
    assert "sae.jsonl" in warning
