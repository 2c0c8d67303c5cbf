"""A second process that trains some of a sweep's SAEs on a CPU.

Most operations of a step are too small for two cores, and Python's lock lets two threads take turns
only. So the first process hands some SAEs to a second one, which reads the data itself and trains
each SAE as it would be trained alone: with the same number of threads, so with the same bits.

The second process saves time and nothing else depends on it: it is silent, and what it has not
published when it ends, the first process trains from its checkpoints, with all messages.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import torch

from lorascope.runtime import free_memory, world_size
from lorascope.sae.settings import SweepMember, TrainConfig

log = logging.getLogger(__name__)

_FEWEST_STEPS = 1000  # of all SAEs together, that take longer than starting a process
_LEAST_THREADS = 2  # with one, two processes would take the time of two
_PROCESS_BYTES = 1 << 30  # that a process takes beside the rows and the SAEs
_COMMAND = "from lorascope.sae import train; train.run_as_side_process()"


def choose_others(
    config: TrainConfig, members: Iterable[SweepMember], n_steps: int, *, d_in: int, n_bytes: int
) -> set[SweepMember]:
    """Return the members of a sweep that a second process should train; none if it does not pay.

    `n_bytes` is the size of the loaded rows, which both processes hold. Members that differ by
    their seed alone stay together, because their stability is computed from all their decoders.
    """
    groups: dict[tuple[float, int, str], list[SweepMember]] = {}
    for member in members:
        groups.setdefault(member.without_seed, []).append(member)
    n_saes = sum(map(len, groups.values()))
    needed = config.training_bytes(d_in) + n_bytes + _PROCESS_BYTES
    if (
        world_size() > 1
        or torch.get_num_threads() < _LEAST_THREADS
        or len(groups) < 2
        or n_steps * n_saes < _FEWEST_STEPS
        or needed > (free_memory(torch.device("cpu")) or 0)
    ):
        return set()
    own, others = 0, 0
    chosen: set[SweepMember] = set()
    for group in sorted(groups.values(), key=_n_latents, reverse=True):
        if others < own:
            others += _n_latents(group)
            chosen |= {*group}
        else:
            own += _n_latents(group)
    return chosen


def _n_latents(group: list[SweepMember]) -> int:
    return sum(member.expansion_factor for member in group)


@contextmanager
def side_process(config: TrainConfig, outs: Collection[Path]) -> Generator[Callable[[], bool]]:
    """Train the SAEs `outs` of a run in a second process, if there are any.

    Yields a function that waits until the process ends, and says whether all are published. If the
    body raises, the process saves its last step and ends. It also ends when this process dies.
    """
    given = {
        "config": config.to_json(),
        "outs": [str(out) for out in outs],
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }
    words = [sys.executable, "-P", "-c", _COMMAND, json.dumps(given)]
    if not outs:
        yield lambda: True
        return
    try:
        process = Popen(words, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)
    except OSError:
        yield lambda: False
        return
    log.info("a second process trains %s", ", ".join(out.name for out in outs))
    with process:  # closes the pipe at the end, at which the process would end too
        try:
            yield lambda: process.wait() == 0
        except BaseException:
            process.terminate()
            process.wait()
            raise


def asked_for() -> tuple[TrainConfig, set[Path]]:
    """Return, in the second process, what it is to train, and let it end with the first one."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    torch.set_float32_matmul_precision(given["precision"])
    return TrainConfig.from_json(given["config"]), {Path(out) for out in given["outs"]}


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the other end of the pipe is closed
    os._exit(1)
