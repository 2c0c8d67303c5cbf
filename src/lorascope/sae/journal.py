"""The log of a training run: one JSON line per logged step, and trackers for those who ask.

`NAME.jsonl` holds `step`, `tokens`, what the caller measured, and two clock fields: `seconds` of
training, those before a kill included, and `tokens_per_second` since the line before (null on the
first line after a resume). It stands beside the SAE and is no part of its digest, so that it may
hold a clock. Without the clock fields, a killed and resumed run leaves the same lines as a run that
was never stopped: going on from step s cuts the file at the first line that is torn or later than
s. Lines are written in order of their step, so that the cut is a truncation, which needs no room
and cannot be done by half.

No log stops a training run. A full disk costs lines, a tracker that fails is dropped; either is
told once. One process of a job keeps the journals.
"""

import errno
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import Any

from lorascope.errors import ConfigError

log = logging.getLogger(__name__)

CLOCK_FIELDS = ("seconds", "tokens_per_second")
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"(?<=://)[^\s/@]+@|[0-9A-Za-z_-]{32,}")
_REASON = 200  # characters of a tracker's message that a warning repeats


@dataclass(frozen=True)
class _Tracker:
    """What a run needs of a tracker. `log` takes a prefix, a step and values by their names."""

    log: Callable[[str, int, dict[str, float]], None]
    finish: Callable[[int], None]


class Trackers:
    """The trackers that were asked for and still work."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        config: Mapping[str, Any],
        folder: Path,
        prefixes: Sequence[str] = ("",),
        step: int = 0,
    ) -> None:
        require_trackers(names)
        self._alive: dict[str, _Tracker] = {}
        for name in dict.fromkeys(names):
            start = _STARTS[name]
            with self._going_on(name, "cannot start", "; pip install 'lorascope[track]'"):
                self._alive[name] = start(dict(config), folder, prefixes, step)

    def log(self, prefix: str, step: int, values: Mapping[str, float | None]) -> None:
        """Hand the finite ones of `values` to every tracker, under names after `prefix`."""
        numbers = {name: value for name, value in values.items() if value is not None}
        for name, tracker in list(self._alive.items()):
            with self._going_on(name, f"failed at step {step}"):
                tracker.log(prefix, step, dict(numbers))

    def finish(self, exit_code: int) -> None:
        """Close every tracker; `exit_code` is what the run ends with."""
        for name, tracker in list(self._alive.items()):
            with self._going_on(name, "failed at the end"):
                tracker.finish(exit_code)
        self._alive.clear()

    @contextmanager
    def _going_on(self, name: str, what: str, advice: str = "") -> Generator[None]:
        """Drop tracker `name` if the block raises, and say so once.

        The one place where any exception is caught: a tracker is somebody else's code and somebody
        else's service, it decides nothing about the SAE, and hours of training must not end with
        it. SystemExit is among them; an interrupt by the user is not.
        """
        try:
            yield
        except (Exception, SystemExit) as error:
            self._alive.pop(name, None)
            log.warning(
                "--track %s %s (%s)%s; training goes on with its JSONL log",
                *(name, what, _reason(error), advice),
            )


class Journal:
    """The log of one SAE."""

    def __init__(
        self,
        path: Path,
        trackers: Trackers,
        *,
        prefix: str = "",
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self._trackers, self._prefix, self._clock = path, trackers, prefix, clock
        self._file: FileIO | None = None
        self._end = 0  # bytes of whole lines
        self._warned = False
        before = 0.0
        with self._room():
            self._file = path.open("ab", buffering=0)  # a line is on its way to disk at once
            for end, line in _lines(path.read_bytes()):
                if line["step"] > step:
                    break
                self._end, before = end, _number(line.get("seconds")) or before
            self._file.truncate(self._end)
        self._begun = clock() - before
        self._last = (0, self._begun) if step == 0 else None

    def log(self, step: int, tokens: int, values: Mapping[str, float | None]) -> None:
        """Add a line. `step` counts from 1 and rises, `tokens` are those trained on so far.

        A value that is not finite is written as null.
        """
        now = self._clock()
        rate = None
        if self._last and now > self._last[1]:
            rate = float(f"{(tokens - self._last[0]) / (now - self._last[1]):.4g}")
        self._last = tokens, now
        measured = {name: _number(value) for name, value in values.items()}
        measured |= dict(zip(CLOCK_FIELDS, (round(now - self._begun, 3), rate), strict=True))
        text = json.dumps({"step": step, "tokens": tokens, **measured}, allow_nan=False)
        with self._room():
            self._append(text.encode() + b"\n")
        self._trackers.log(self._prefix, step, {"tokens": tokens, **measured})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with self._room():
                self._file.close()
            self._file = None

    def _append(self, line: bytes) -> None:
        if self._file is None:
            return
        if self._file.seek(0, os.SEEK_END) != self._end:
            self._file.truncate(self._end)  # the rest of a line that did not fit
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)

    @contextmanager
    def _room(self) -> Generator[None]:
        """Warn once where the file cannot be written; the next line tries again."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                log.warning(
                    "cannot write the training log %s (%s); training goes on without these lines",
                    *(self.path, error.strerror or error),
                )
            self._warned = True


@contextmanager
def journals(
    paths: Mapping[str, Path],
    *,
    config: Mapping[str, Any],
    folder: Path,
    track: Sequence[str] = (),
    step: int | Mapping[str, int] = 0,
) -> Generator[dict[str, Journal]]:
    """Open a journal for each SAE of a run, by its label, and the trackers that they share.

    `step` is the one that the run goes on from; `config` goes to the trackers, as JSON values
    without secrets; tensorboard writes its files into `folder`. With more than one SAE, a
    tracker's metric is named `LABEL/NAME`, else `NAME`.
    """
    prefixes = {label: f"{label}/" if len(paths) > 1 else "" for label in paths}
    steps = step if isinstance(step, Mapping) else dict.fromkeys(paths, step)
    first = min(steps.values(), default=0)
    trackers = Trackers(
        track, config=config, folder=folder, prefixes=tuple(prefixes.values()), step=first
    )
    opened: dict[str, Journal] = {}
    exit_code = 1
    try:
        for label, path in paths.items():
            opened[label] = Journal(path, trackers, prefix=prefixes[label], step=steps[label])
        yield opened
        exit_code = 0
    except BaseException as error:
        exit_code = getattr(error, "exit_code", exit_code)
        raise
    finally:
        for journal in opened.values():
            journal.close()
        trackers.finish(exit_code)


def require_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError at a tracker that does not exist."""
    for name in names:
        if name not in _STARTS:
            raise ConfigError(f"--track is {name!r}, expected {' or '.join(_STARTS)}")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a training log, up to a torn one; none where there is no file."""
    return [line for _, line in _lines(path.read_bytes())] if path.exists() else []


def _lines(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the end, in bytes, and the values of each whole line, up to the first torn one."""
    end = 0
    for line in data.splitlines(keepends=True):
        end += len(line)
        try:
            values = json.loads(line)
        except ValueError:
            return
        whole = line.endswith(b"\n") and isinstance(values, dict)
        if not whole or _number(values.get("step")) is None:
            return
        yield end, values


def _start_wandb(
    config: dict[str, Any], _folder: Path, prefixes: Sequence[str], _step: int
) -> _Tracker:
    """Start a run of Weights & Biases.

    Nothing but the config is passed: project, name, mode and folder are the user's, by WANDB_*
    variables and settings files, which an argument would override (offline and disabled among
    them). The step is a metric, because wandb's own may not fall, and it does after a resume.
    """
    wandb: Any = import_module("wandb")  # no dependency of ours: an extra
    run = wandb.init(config=config)
    for prefix in prefixes:
        run.define_metric(f"{prefix}step")
        run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")

    def send(prefix: str, step: int, values: dict[str, float]) -> None:
        run.log({prefix + name: value for name, value in {"step": step, **values}.items()})

    def finish(exit_code: int) -> None:
        run.finish(exit_code=exit_code)

    return _Tracker(send, finish)


def _start_tensorboard(
    config: dict[str, Any], folder: Path, _prefixes: Sequence[str], step: int
) -> _Tracker:
    """Start an event file in `folder`; what an earlier run wrote after `step` is hidden."""
    tensorboard: Any = import_module("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(log_dir=str(folder), purge_step=step + 1 if step else None)
    writer.add_text("config", f"```\n{json.dumps(config, indent=1, sort_keys=True)}\n```", step)

    def send(prefix: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(prefix + name, value, step)

    def finish(_exit_code: int) -> None:
        writer.close()

    return _Tracker(send, finish)


_STARTS = {"wandb": _start_wandb, "tensorboard": _start_tensorboard}


def _number(value: Any) -> float | None:
    """Return a finite number as it is, None for anything else."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _reason(error: BaseException) -> str:
    """Return an exception in one line, without anything that looks like a secret."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, "***")
    return _SECRET_TEXT.sub("***", text)[:_REASON]
