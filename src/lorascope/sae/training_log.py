"""The log of a training run: `NAME.jsonl`, one JSON object per logged step.

A line holds `step`, `tokens`, what the caller measured, and two clock fields: `seconds` of
training, including those before an interruption, and `tokens_per_second` since the previous line
(null on the first line after a resume). The file lies next to the SAE and is not part of its
digest, so it may hold a clock. Without the clock fields, an interrupted and resumed run leaves the
same lines as an uninterrupted one: resuming from step s drops the lines of later steps.

The file is written as a whole at each line, of which there are about 200. Logging never stops
training: while the disk is full the file stays as it was, and a warning says so once.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

CLOCK_FIELDS = ("seconds", "tokens_per_second")


class TrainingLog:
    """The training log of one SAE."""

    def __init__(
        self, path: Path, *, step: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Continue the log of a run that starts at `step`, without lines of later steps."""
        self.path, self._clock, self._warned = path, clock, False
        self._lines = [line for line in read_training_log(path) if line["step"] <= step]
        earlier = _finite(self._lines[-1].get("seconds")) if self._lines else None
        self._start = clock() - (earlier or 0.0)
        self._last = (0, self._start) if step == 0 else None

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
        self._lines.append({"step": step, "tokens": tokens, **measured})
        partial = self.path.with_name(self.path.name + ".tmp")
        try:
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in self._lines))
            partial.replace(self.path)
        except OSError as error:
            if not self._warned:
                log.warning(
                    "cannot write the training log %s (%s); training continues without it",
                    self.path,
                    error.strerror or error,
                )
            self._warned = True


def read_training_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a training log up to a damaged one; an empty list if there is no file."""
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:
            break
        if not isinstance(values, dict) or _finite(values.get("step")) is None:
            break
        lines.append(values)
    return lines


def _finite(value: Any) -> float | None:
    """Return a finite number as it is, None for anything else."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
