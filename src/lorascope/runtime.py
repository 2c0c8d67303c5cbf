"""The processes that a stage runs in: their devices, signals, progress bars and shares of work.

The only module that knows how many processes and devices there are. A job of several is started by
`torchrun`, or by `launch` for the user. Its work is cut into units that the config alone fixes;
each process takes the next free unit (`claim_work_units`), and holds a lock on it that dies with
the process. No process ever waits for another inside a unit, so that fast ones do more.
"""

import errno
import fcntl
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

from lorascope.config import Config
from lorascope.errors import ConfigError, Interrupted, WorkerError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

WORKER = "--worker"  # lorascope --worker COMMAND JSON is one process of a job
_JOB = "lorascope-"  # begins the id of a job that `launch` started
_POLL = 0.1  # seconds between looks at what the others have finished


def process_rank() -> int:
    """Return the rank of this process in its job, from torchrun's environment; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes in the job; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def prints_result() -> bool:
    """Say whether this process prints the job's result: rank 0, unless `launch` started it."""
    return process_rank() == 0 and not os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_JOB)


def n_workers(device: str, num_gpus: int | None) -> int:
    """Return how many processes to start: one for each GPU to use, 1 inside a running job."""
    import torch

    if world_size() > 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return 1
    found = torch.cuda.device_count()
    return max(min(found if num_gpus is None else num_gpus, found), 1)


def launch(n: int, command: str, config: Config) -> None:
    """Run a command with this config in `n` processes on this machine, and wait for them.

    Raises WorkerError naming the first process that failed, once all others are stopped.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    log.info("starting %d processes", n)
    options = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=f"{_JOB}{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        options_text = json.dumps(config.to_json())
        elastic_launch(options, sys.executable)("-m", "lorascope", WORKER, command, options_text)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {_signal(-code)}"
        raise WorkerError(
            f"rank {rank} of {n} {how}; finished work stays, the same command continues",
            exit_code=code if code > 0 else 1,
        ) from error
    except SignalException as stop:
        raise Interrupted(stop.sigval) from stop


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True)
class Claim:
    """A unit of work that is this process's until `release`, or until the process dies."""

    work_unit: int
    _locks: IO[str] | None

    def release(self) -> None:
        """Let go of the unit: its file is there, or it is to be done by another."""
        if self._locks is not None:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, self.work_unit)


def claim_work_units(
    targets: Sequence[Path],
    locks: Path,
    on_finished: Callable[[int], None],
    on_idle: Callable[[], None],
) -> Generator[Claim]:
    """Yield the units to do, until every file of `targets` is there, by whomever it was made.

    The caller writes `targets[i]` for unit i, atomically, and then releases the claim.
    `on_finished(i)` is called once for every file, whoever made it; `on_idle()` while all that is
    left to do is to wait. Byte i of the file `locks` is locked for unit i. On a file system without
    locks the units are dealt out by rank instead.
    """
    pending = dict(enumerate(targets))
    mine: set[int] = set()

    def see(units: Iterable[int]) -> None:
        for unit in [unit for unit in units if pending[unit].exists()]:
            del pending[unit]
            mine.discard(unit)
            on_finished(unit)

    see(list(pending))
    if not pending or not locks.parent.exists():
        return  # nothing to do, or published: leave nothing in a folder that rank 0 may be sealing
    with locks.open("a") as file:
        while pending:
            see(list(pending))
            taken = False
            for unit in list(pending):
                if unit in mine or targets[unit].exists() or not _lock(file, unit):
                    continue
                claim = Claim(unit, file if world_size() > 1 else None)
                if targets[unit].exists():  # made since the look before
                    claim.release()
                    continue
                if not locks.exists():
                    return  # made and published since the look before
                taken = True
                mine.add(unit)
                yield claim
                see(list(mine))
            if pending and not taken:
                if not locks.exists():
                    return  # rank 0 saw the last file before this process did, and published
                on_idle()
                time.sleep(_POLL)


def _lock(file: IO[str], unit: int) -> bool:
    if world_size() == 1:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, unit)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return unit % world_size() == process_rank()
        return False
    return True


class Team:
    """The processes that train together; alone, everything here is the identity.

    A batch is shared out in the order of the ranks. Every process calls every method.
    """

    def __init__(self, world: int = 1, rank: int = 0) -> None:
        self.world, self.rank = world, rank
        self._shares: dict[int, tuple[int, int]] = {}

    def share(self, n: int) -> tuple[int, int]:
        """Return how many rows the ranks before have, and how many all have, where this has `n`.

        Asked of the others once for each `n`: the shares of a run's batches never change.
        """
        if self.world == 1:
            return 0, n
        if n not in self._shares:
            import torch
            import torch.distributed

            on_gpu = torch.distributed.get_backend() == "nccl"
            mine = torch.tensor([n], device="cuda" if on_gpu else "cpu")
            sizes = [int(part) for part in self.gather(mine)]
            self._shares[n] = sum(sizes[: self.rank]), sum(sizes)
        return self._shares[n]

    def sum(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return the sum over the processes; the argument may be overwritten."""
        if self.world > 1:
            import torch.distributed

            tensor = tensor.contiguous()
            torch.distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return rank 0's tensor; the argument is overwritten."""
        if self.world > 1:
            import torch.distributed

            whole = tensor.contiguous()
            torch.distributed.broadcast(whole, 0)
            tensor.copy_(whole)
        return tensor

    def any(self, yes: bool) -> bool:
        """Say whether any process says yes."""
        if self.world == 1:
            return yes
        import torch
        import torch.distributed

        on_gpu = torch.distributed.get_backend() == "nccl"
        vote = torch.tensor([int(yes)], device="cuda" if on_gpu else "cpu")
        return bool(self.sum(vote) > 0)

    def gather(self, values: "torch.Tensor") -> "list[torch.Tensor]":
        """Return every process's vector, by rank; their lengths may differ."""
        if self.world == 1:
            return [values]
        import torch
        import torch.distributed

        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        lengths = [length.to(values.device) for length in lengths]
        mine = torch.tensor([len(values)], device=values.device)
        torch.distributed.all_gather(lengths, mine)
        longest = max(int(length) for length in lengths)
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        torch.distributed.all_gather(parts, padded)
        return [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]


@contextmanager
def join_team(device: "torch.device") -> Generator[Team]:
    """Join the processes that torchrun started, with its time limit; alone, be a team of one."""
    if world_size() == 1:
        yield Team()
        return
    import torch
    import torch.distributed

    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(world_size(), process_rank())
    finally:
        torch.distributed.destroy_process_group()


def pick_device(requested: str = "auto", num_gpus: int | None = None) -> "torch.device":
    """Return the device to compute on, and say so when it is not what was asked for.

    `requested` is `auto` (CUDA, then Apple's MPS, then CPU) or a torch device string; in a job of
    several processes `auto` and `cuda` are the GPU of this one. `num_gpus` above what the machine
    has is lowered with a notice.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus is not None and num_gpus > found:
        where = f"{found} GPU{'s' if found != 1 else ''}" if found else "the CPU"
        log.warning("asked for %d GPUs, the machine has %d: using %s", num_gpus, found, where)
    if found and world_size() > 1 and num_gpus != 0 and requested in ("auto", "cuda"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % found)
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


def peak_memory(device: "torch.device") -> int:
    """Return the most bytes that this process has held: on its GPU, else in memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
        disable=process_rank() > 0,
    )


class LogHandler(logging.StreamHandler[Any]):
    """Write log lines to stderr above the progress bars, which are drawn anew below them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def interruptible() -> Generator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, so that `finally` blocks run; restore after.

    In a job of several processes they end the process at once: whoever started the job waits for
    it and speaks, and what is finished is safe at any moment.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    action = stop if world_size() == 1 else signal.SIG_DFL
    before = {number: signal.signal(number, action) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stop_between_steps() -> Generator[list[int]]:
    """Note SIGINT and SIGTERM in the list that this yields; the second one stops at once.

    A step must not be cut in two: its half would be saved.
    """
    asked: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise Interrupted(number)
        log.warning("finishing the step, then saving; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
