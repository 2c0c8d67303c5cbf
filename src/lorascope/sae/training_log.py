"""What a training leaves next to its SAE: the log `NAME.jsonl`, and the table of several SAEs.

Neither is part of an SAE's digest, and no stage reads them, so the log may hold a clock.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from lorascope.record_json import Range

log = logging.getLogger(__name__)

CLOCK_FIELDS = ("seconds", "tokens_per_second")

Count = Annotated[int, Range(0)]
Amount = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True)
class TrainingLine:
    """A line of a training log: running means over about 50 steps, and the clock.

    `step` and `tokens` count what was trained on so far. `fvu`, `l0` and `auxk` (the loss of dead
    latents) are of batches, `dead` is the share of latents that are dead. A number that was not
    finite is None.
    """

    step: Count
    tokens: Count
    fvu: Amount | None
    l0: Amount | None
    auxk: Amount | None
    dead: Annotated[float, Range(0, 1)] | None
    lr: Amount | None
    seconds: Amount | None
    tokens_per_second: Amount | None


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One SAE of a sweep, `NAME.runs.json`: its options, and its figures on held-out rows.

    `stability` is the median over latents of the cosine with the nearest latent of SAEs of other
    seeds, None without them; `cosine` and `fvu` are None where they are undefined.
    """

    sae: str
    k: Amount
    expansion_factor: Count
    lr: Literal["auto"] | Amount
    seed: int
    fvu: Amount | None
    l0: Amount
    alive: Count
    cosine: float | None
    stability: float | None


def sibling(out: Path, suffix: str) -> Path:
    """Return the path of a file next to an SAE: `sae.pt` and `sae/` have `sae.jsonl`."""
    return out.with_name(out.name.removesuffix(".pt") + suffix)


class TrainingLog:
    """The training log of one SAE, written as a whole at each line, of which there are about 200.

    A line holds `step`, `tokens`, what was measured, and two clock fields: `seconds` of training,
    including those before an interruption, and `tokens_per_second` since the previous line (null on
    the first line after a resume). Without the clock fields, an interrupted and resumed run leaves
    the same lines as an uninterrupted one: resuming from step s drops the lines of later steps.

    Logging never stops training: while the disk is full the file stays as it was, and a warning
    says so once.
    """

    def __init__(
        self, path: Path, *, step: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Continue the log of a run that starts at `step`, without lines of later steps."""
        self.path, self._clock, self._warned = path, clock, False
        kept: list[dict[str, Any]] = []
        self._text = ""
        with self._warning_once():
            found = read_training_log(path)
            kept = [line for line in found if line["step"] <= step]
            self._text = "".join(f"{json.dumps(line)}\n" for line in kept)
            if len(kept) < len(found):
                self._save()  # now: this run may stop before it logs a line
        earlier = _finite(kept[-1].get("seconds")) if kept else None
        self._start = clock() - (earlier or 0.0)
        self._last = (0, self._start) if step == 0 else None

    def write(self, tokens: int, values: Mapping[str, float]) -> None:
        """Add a line. `tokens` counts all trained on so far; `values` has the `step`, which rises.

        A value that is not finite is written as null.
        """
        now = self._clock()
        rate = None
        if self._last and now > self._last[1]:
            rate = float(f"{(tokens - self._last[0]) / (now - self._last[1]):.4g}")
        self._last = tokens, now
        measured = {name: _finite(value) for name, value in values.items()}
        measured |= dict(zip(CLOCK_FIELDS, (round(now - self._start, 3), rate), strict=True))
        line = {"step": values["step"], "tokens": tokens, **measured}
        self._text += f"{json.dumps(line)}\n"
        with self._warning_once():
            self._save()

    def _save(self) -> None:
        partial = self.path.with_name(self.path.name + ".tmp")
        partial.write_text(self._text)
        partial.replace(self.path)

    @contextmanager
    def _warning_once(self) -> Generator[None]:
        try:
            yield
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
