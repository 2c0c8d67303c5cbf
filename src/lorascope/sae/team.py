"""The processes that train one SAE together, by `torch.distributed`."""

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, distributed

from lorascope.errors import ConfigError, WorkerError
from lorascope.runtime import process_rank, world_size

_PATIENCE = timedelta(minutes=10)  # how long a process waits for the others


class Team:
    """The processes that train together; with one process every method is the identity.

    Each process has a share of every batch, in the order of the ranks. All processes must call the
    same methods in the same order.
    """

    def __init__(self, world: int = 1, rank: int = 0) -> None:
        self.world, self.rank = world, rank
        self._shares: dict[int, tuple[int, int]] = {}

    def share(self, n: int) -> tuple[int, int]:
        """Return how many rows of a batch the lower ranks have, and how many all ranks have.

        `n` is how many this rank has. The ranks exchange their counts once for each `n`, because
        the shares of a run's batches never change.
        """
        if self.world == 1:
            return 0, n
        if n not in self._shares:
            sizes = [int(part) for part in self.gather(_count(n))]
            self._shares[n] = sum(sizes[: self.rank]), sum(sizes)
        return self._shares[n]

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the processes; the argument may be overwritten."""
        if self.world > 1:
            tensor = tensor.contiguous()
            with _exchange():
                distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Return rank 0's tensor; the argument is overwritten."""
        if self.world > 1:
            contiguous = tensor.contiguous()
            with _exchange():
                distributed.broadcast(contiguous, 0)
            tensor.copy_(contiguous)
        return tensor

    def any(self, flag: bool) -> bool:
        """Say whether the flag is true in any process."""
        return flag if self.world == 1 else bool(self.sum(_count(int(flag))) > 0)

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return every process's vector, by rank; their lengths may differ."""
        if self.world == 1:
            return [values]
        length = torch.tensor([len(values)], device=values.device)
        lengths = [torch.empty_like(length) for _ in range(self.world)]
        with _exchange():
            distributed.all_gather(lengths, length)
        padded = values.new_zeros(max(int(length) for length in lengths))
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        with _exchange():
            distributed.all_gather(parts, padded)
        return [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]


def _count(n: int) -> Tensor:
    """Return a number as a tensor that the processes of the job can exchange."""
    on_gpu = distributed.get_backend() == "nccl"
    return torch.tensor([n], device="cuda" if on_gpu else "cpu")


@contextmanager
def _exchange() -> Generator[None]:
    """Raise WorkerError if the other processes do not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise WorkerError(
            f"rank {process_rank()} of {world_size()} has lost the others: one of them ended, or "
            f"the network is down ({error}); run again to continue from the last checkpoint",
            exit_code=1,
        ) from error


@contextmanager
def join_team(device: torch.device) -> Generator[Team]:
    """Join the processes that torchrun started; without torchrun, yield a team of one."""
    if world_size() == 1:
        yield Team()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but the processes cannot meet ({error}); start them "
            "with torchrun, or unset WORLD_SIZE"
        ) from error
    try:
        yield Team(world_size(), process_rank())
    finally:
        distributed.destroy_process_group()
