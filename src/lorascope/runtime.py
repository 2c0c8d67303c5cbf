"""The process that a stage runs in: its device, its signals, its progress bars.

The only module that knows how many processes and devices there are.
"""

import logging
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from lorascope.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def pick_device(requested: str = "auto", num_gpus: int | None = None) -> "torch.device":
    """Return the device to compute on, and say so when it is not what was asked for.

    `requested` is `auto` (CUDA, then Apple's MPS, then CPU) or a torch device string. `num_gpus`
    above what the machine has is lowered with a notice.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus is not None and num_gpus > found:
        where = f"{found} GPU{'s' if found != 1 else ''}" if found else "the CPU"
        log.warning("asked for %d GPUs, the machine has %d: using %s", num_gpus, found, where)
    if num_gpus is not None and min(num_gpus, found) > 1:
        log.warning("this stage runs in one process: using one of %d GPUs", found)
    if requested != "auto":
        try:
            device = torch.device(requested)
        except RuntimeError as error:
            raise ConfigError(f"device {requested!r} is unknown; try auto, cpu or cuda") from error
        if device.type == "cuda" and not found:
            raise ConfigError(f"device {requested} was asked for, but no CUDA GPU is here; try cpu")
        return device
    if found and num_gpus != 0:
        return torch.device("cuda")
    if num_gpus is None and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def progress(total: int, label: str, unit: str) -> "tqdm[Any]":
    """Return a progress bar on stderr that counts `unit`s up to `total`."""
    return tqdm(
        total=total,
        desc=label,
        unit=f" {unit}",
        unit_scale=total > 99_999,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.2,
    )


@contextmanager
def stoppable() -> Generator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, so that `finally` blocks run; restore after."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
