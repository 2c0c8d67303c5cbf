"""The log of a training run: `NAME.jsonl`, one JSON object per logged step.

A line holds `step`, `tokens`, what the caller measured, and two clock fields: `seconds` of
training, including those before an interruption, and `tokens_per_second` since the previous line
(null on the first line after a resume). The file lies next to the SAE and is not part of its
digest, so it may hold a clock. Without the clock fields, an interrupted and resumed run leaves the
same lines as an uninterrupted one: resuming from step s cuts the file at the first line that is
torn or later than s. Lines are ordered by step, so the cut is a truncation, which needs no space
and cannot stop half-way.

Logging never stops training: a full disk costs lines, and a warning says so once. Rank 0 logs.
"""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CLOCK_FIELDS = ("seconds", "tokens_per_second")


class TrainingLog:
    """The training log of one SAE, as a context manager that closes the file."""

    def __init__(
        self, path: Path, *, step: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Open the log of a run that starts at `step`, and cut lines of later steps."""
        self.path, self._clock = path, clock
        self._file: FileIO | None = None
        self._end = 0  # bytes of whole lines
        self._warned = False
        earlier = 0.0
        with self._warning_once():
            self._file = path.open("ab", buffering=0)  # each line goes to disk at once
            for end, line in _lines(path.read_bytes()):
                if line["step"] > step:
                    break
                self._end, earlier = end, _finite(line.get("seconds")) or earlier
            self._file.truncate(self._end)
        self._start = clock() - earlier
        self._last = (0, self._start) if step == 0 else None

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with self._warning_once():
                self._file.close()
            self._file = None

    def write(self, step: int, tokens: int, values: Mapping[str, float | None]) -> None:
        """Add a line. `step` starts at 1 and rises; `tokens` counts all trained on so far.

        A value that is not finite is written as null.
        """
        now = self._clock()
        rate = None
        if self._last and now > self._last[1]:
            rate = float(f"{(tokens - self._last[0]) / (now - self._last[1]):.4g}")
        self._last = tokens, now
        measured = {name: _finite(value) for name, value in values.items()}
        measured |= dict(zip(CLOCK_FIELDS, (round(now - self._start, 3), rate), strict=True))
        text = json.dumps({"step": step, "tokens": tokens, **measured}, allow_nan=False)
        with self._warning_once():
            self._append(text.encode() + b"\n")

    def _append(self, line: bytes) -> None:
        if self._file is None:
            return
        if self._file.seek(0, os.SEEK_END) != self._end:
            self._file.truncate(self._end)  # the rest of a line that did not fit
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)

    @contextmanager
    def _warning_once(self) -> Generator[None]:
        """Warn at the first error of the file; the next line tries again."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                log.warning(
                    "cannot write the training log %s (%s); training continues without these lines",
                    self.path,
                    error.strerror or error,
                )
            self._warned = True


def read_training_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a training log up to a torn one; an empty list if there is no file."""
    return [line for _, line in _lines(path.read_bytes())] if path.exists() else []


def _lines(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the end, in bytes, and the values of each whole line up to the first torn one."""
    end = 0
    for line in data.splitlines(keepends=True):
        end += len(line)
        try:
            values = json.loads(line)
        except ValueError:
            return
        whole = line.endswith(b"\n") and isinstance(values, dict)
        if not whole or _finite(values.get("step")) is None:
            return
        yield end, values


def _finite(value: Any) -> float | None:
    """Return a finite number as it is, None for anything else."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
