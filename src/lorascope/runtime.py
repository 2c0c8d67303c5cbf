"""The processes that a stage runs in: their devices, signals, progress and shares of the work.

Only this module knows how many processes and devices there are. `torchrun` starts a job of several
processes; `launch` does it for the user. The config alone cuts the work into work units. Each
process claims the next free unit (`claim_work_units`) and holds a lock on it that dies with the
process. Inside a unit no process waits for another, so faster ones do more units.
"""

import errno
import fcntl
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
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
_JOB = "lorascope-"  # the ids of jobs that `launch` started begin with this
_LINE_EVERY = 10.0  # seconds between lines of progress where stderr is no terminal
_MARKS = 7  # lines of progress that a rate is measured over
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of a file system without any
_POLL = 0.1  # seconds between checks for what other processes have finished


def process_rank() -> int:
    """Return the rank of this process in its job, from torchrun's environment; 0 without one."""
    rank, world = _from_environment("RANK", 0), world_size()
    if rank >= world:  # it would wait for the others for ever
        raise ConfigError(
            f"the environment variable RANK is {rank}, expected less than WORLD_SIZE, which is "
            f"{world}; unset it, or start the processes with torchrun"
        )
    return rank


def world_size() -> int:
    """Return the number of processes in the job; 1 without torchrun."""
    return _from_environment("WORLD_SIZE", 1)


def _from_environment(name: str, least: int) -> int:
    """Return a number that torchrun sets; `least` if it is unset or empty."""
    text = os.environ.get(name) or str(least)
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(
            f"the environment variable {name} is {text!r}, expected {least} or more; unset it, or "
            "start the processes with torchrun"
        )
    return int(text)


def prints_result() -> bool:
    """Say whether this process prints the job's result: rank 0, unless `launch` started it."""
    return process_rank() == 0 and not os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_JOB)


def n_workers(device: str, num_gpus: int | None) -> int:
    """Return how many processes to start: one per GPU to use, 1 inside a running job."""
    import torch

    if world_size() > 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return 1
    n_gpus = torch.cuda.device_count()
    return max(min(n_gpus if num_gpus is None else num_gpus, n_gpus), 1)


def launch(n: int, command: str, config: Config) -> None:
    """Run a command with this config in `n` processes on this machine and wait for them.

    When one fails, stops the others and raises WorkerError, which names the failed one.
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
        words = [WORKER, command, json.dumps(config.to_json()), *_verbosity()]
        elastic_launch(options, sys.executable)("-m", "lorascope", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = int(failure.exitcode)
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {_signal(-code)}"
        raise WorkerError(
            f"rank {rank} of {n} {how}: finished work is kept; run again to continue",
            exit_code=code if code > 0 else 1,
        ) from error
    except SignalException as stop:
        raise Interrupted(stop.sigval) from stop


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _verbosity() -> list[str]:
    level = logging.getLogger("lorascope").getEffectiveLevel()
    return ["--quiet"] if level > logging.INFO else ["--verbose"] if level < logging.INFO else []


def claim_work_units(
    targets: Sequence[Path],
    locks: Path | None,
    on_finished: Callable[[int], None],
    on_idle: Callable[[], None],
) -> Generator[int]:
    """Yield work units for this process to do until every file in `targets` exists.

    The caller writes `targets[i]` for work unit i, atomically and at any time. `on_finished(i)` is
    called once for every file, whichever process wrote it; `on_idle()` is called while there is
    nothing to do but wait. Byte i of the file `locks` is the lock of work unit i; it is held to the
    end, because nobody asks for a unit whose file exists. Without `locks`, or on a file system that
    has none, work unit i belongs to rank `i % world_size`.
    """
    pending = dict(enumerate(targets))
    claimed: set[int] = set()  # by this process, file not seen yet

    def report_finished(candidates: Iterable[int]) -> None:
        for i in [i for i in candidates if pending[i].exists()]:
            del pending[i]
            claimed.discard(i)
            on_finished(i)

    report_finished(list(pending))
    if not pending or (locks and not locks.parent.exists()):
        return  # finished or published: write nothing into a folder that rank 0 may be sealing
    with locks.open("a") if locks else nullcontext() as file:
        while pending:
            report_finished(list(pending))
            has_claimed = False
            for i in list(pending):
                if i in claimed or targets[i].exists() or not _lock(file, i):
                    continue
                if targets[i].exists():  # written between the check and the lock
                    continue
                if locks and not locks.exists():
                    return  # written and published between the check and the lock
                has_claimed = True
                claimed.add(i)
                yield i
                report_finished(list(claimed))
            if pending and not has_claimed:
                if locks and not locks.exists():
                    return  # rank 0 saw the last file before this process did, and published
                on_idle()
                time.sleep(_POLL)


def _lock(file: IO[str] | None, work_unit: int) -> bool:
    if world_size() == 1 or file is None:
        return work_unit % world_size() == process_rank()
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, work_unit)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return work_unit % world_size() == process_rank()
        return False
    return True


def pick_device(requested: str = "auto", num_gpus: int | None = None) -> "torch.device":
    """Return the device to compute on.

    `requested` is `auto` (CUDA, then Apple's MPS, then CPU) or a torch device string. In a job of
    several processes, `auto` and `cuda` mean the GPU of this process. Warns when `num_gpus` is
    more than the machine has, and uses those there are.
    """
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus is not None and num_gpus > n_gpus:
        fallback = f"{n_gpus} GPU{'s' if n_gpus != 1 else ''}" if n_gpus else "the CPU"
        log.warning("asked for %d GPUs, the machine has %d: using %s", num_gpus, n_gpus, fallback)
    if n_gpus and world_size() > 1 and num_gpus != 0 and requested in ("auto", "cuda"):
        return torch.device("cuda", _from_environment("LOCAL_RANK", 0) % n_gpus)
    if requested != "auto":
        try:
            device = torch.device(requested)
        except RuntimeError as error:
            raise ConfigError(f"--device is {requested!r}, expected auto, cpu or cuda") from error
        if device.type == "cuda" and not n_gpus:
            raise ConfigError(f"--device is {requested}, but there is no CUDA GPU; use cpu")
        return device
    if n_gpus and num_gpus != 0:
        return torch.device("cuda")
    if num_gpus is None and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def free_memory(device: "torch.device") -> int | None:
    """Return how many bytes this process can still take: of its GPU, else of RAM. None: unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        free = _field(Path("/proc/meminfo"), "MemAvailable:") << 10
    except (OSError, ValueError):
        return None
    try:  # the limit of a container, whose cached files can go
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        return min(free, max(limit - _field(group / "memory.stat", "anon"), 0))
    except (OSError, ValueError):
        return free  # there is none


def _field(file: Path, name: str) -> int:
    """Return the number after a name in a file of names and numbers, a pair on a line."""
    words = file.read_text(encoding="ascii").split()
    return int(words[words.index(name) + 1])


def measure_speed(device: "torch.device") -> float:
    """Return how many multiplications and additions a second a large product makes."""
    import torch

    n = 1024 if device.type == "cpu" else 8192
    a = torch.ones(n, n, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    a = a.to(device)
    out, best = a @ a, math.inf
    for _ in range(3):
        begun = time.perf_counter()
        torch.mm(a, a, out=out)
        out[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that RAM or a GPU's memory is full; torch has no one type."""
    text = str(error).lower()
    phrases = ("out of memory", "can't allocate memory", "not enough memory")
    is_torch = isinstance(error, RuntimeError) and any(phrase in text for phrase in phrases)
    return isinstance(error, MemoryError) or is_torch


def shows_bars() -> bool:
    """Say whether bars are drawn: on a terminal or in a notebook, without `--quiet`, by rank 0."""
    return not _is_quiet() and (sys.stderr.isatty() or in_notebook())


def in_notebook() -> bool:
    """Say whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _is_quiet() -> bool:
    return logging.getLogger("lorascope").level > logging.INFO or process_rank() > 0


def progress(total: int, label: str, unit: str) -> "tqdm[Any] | ProgressLog":
    """Return a counter of `unit`s up to `total`: a bar if `shows_bars`, else lines in the log.

    There is none at `--quiet` and in processes other than rank 0.
    """
    is_quiet = _is_quiet()
    if not (is_quiet or shows_bars()):
        return ProgressLog(total, label, unit)
    return (_notebook_bar() if in_notebook() else tqdm)(
        total=total,
        desc=label,
        unit=f" {unit}",
        unit_scale=total > 99_999,
        file=sys.stderr,
        dynamic_ncols=True,
        mininterval=0.2,
        disable=is_quiet,
    )


def _notebook_bar() -> "type[tqdm[Any]]":
    """Return tqdm's bar for notebooks: a widget, or a line of text without ipywidgets."""
    with warnings.catch_warnings(action="ignore"):  # the line of text is as good
        from tqdm.auto import tqdm as bar
    return bar


class ProgressLog:
    """Log one line every ten seconds: what is done of how much, the rate and the time remaining.

    The rate is that of the last minute, so that work found finished at the start is soon forgotten.
    """

    def __init__(
        self, total: int, label: str, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.label, self.unit = total, label, unit
        self._clock, self._done, self._suffix = clock, 0, ""
        self._marks = deque([(clock(), 0)], maxlen=_MARKS)  # when a line was due, and what was done

    def __enter__(self) -> "ProgressLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        """Count `n` more, and log a line if one is due."""
        self._done += n
        now = self._clock()
        if now - self._marks[-1][0] < _LINE_EVERY:
            return
        since, done_then = self._marks[0]
        self._marks.append((now, self._done))
        rate = (self._done - done_then) / (now - since)
        remaining = max(self.total - self._done, 0) / rate if rate else 0
        log.info(
            "%s: %s of %s %s, %s a second, %s remaining%s",
            self.label,
            f"{self._done:,}",
            f"{self.total:,}",
            self.unit,
            f"{rate:,.3g}" if rate < 100 else f"{rate:,.0f}",
            tqdm.format_interval(remaining),
            self._suffix and f", {self._suffix}",
        )

    def set_postfix_str(self, text: str) -> None:
        """Add a text to the lines that follow."""
        self._suffix = text


class LogHandler(logging.StreamHandler[Any]):
    """Write log lines to stderr above the progress bars, which are redrawn below them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def interruptible() -> Generator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, so that `finally` blocks run.

    In a job of several processes the signals end the process at once: the process that started the
    job waits for it and reports, and finished work is safe at any moment.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _on_signals(stop if world_size() == 1 else signal.SIG_DFL):
        yield


@contextmanager
def stop_between_steps() -> Generator[list[int]]:
    """Collect SIGINT and SIGTERM in the list that this yields; the second one stops at once.

    Training checks the list between steps, because half a step must not be saved.
    """
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise Interrupted(number)
        log.warning("stopping after this step and saving; interrupt again to stop at once")

    if threading.current_thread() is threading.main_thread():
        with _on_signals(note):
            yield received
    else:
        yield received  # Python lets only the main thread handle signals


@contextmanager
def _on_signals(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers,
) -> Generator[None]:
    """Handle SIGINT and SIGTERM with `handler`, and restore the old handlers at the end."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
