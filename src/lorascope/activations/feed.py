"""Training batches on the device that they are wanted on.

On a CPU they are those of the plan. For CUDA the rows stay on the GPU, in the stored dtype, where
they take less than half of its free memory: then only row numbers travel. Other stores are streamed
through pinned memory, a batch ahead of the one in use. Every way gives the same batches.
"""

from collections.abc import Generator, Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.activations.batches import BatchPlan

_AT_ONCE = 64  # batches whose row numbers travel together


def batches_on(
    device: torch.device, plan: BatchPlan, first: int, last: int, part: tuple[int, int] = (0, 1)
) -> Iterator[Float[Tensor, "_ d_in"]]:
    """Yield batches `first` to `last - 1` of a plan, float32, as `BatchPlan.batches` does."""
    if device.type != "cuda":
        return (x.to(device) for x in plan.batches(first, last, part))
    if plan.loaded is not None and plan.loaded.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return resident(device, plan, first, last, part)
    return _pinned(device, plan.batches(first, last, part))


def resident(
    device: torch.device, plan: BatchPlan, first: int, last: int, part: tuple[int, int] = (0, 1)
) -> Generator[Float[Tensor, "_ d_in"]]:
    """Yield a plan's batches from a copy of its loaded rows on the device."""
    rows = torch.from_numpy(plan.loaded).to(device)
    rank, world = part
    here = slice(rank * plan.batch_size // world, (rank + 1) * plan.batch_size // world)
    for start in range(first, last, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, last))
        places = torch.from_numpy(np.stack([plan.places(number)[here] for number in numbers]))
        if device.type == "cuda":
            places = places.pin_memory()
        for wanted in places.to(device, non_blocking=True):
            yield rows.index_select(0, wanted).float()


def _pinned(
    device: torch.device, batches: Generator[Float[Tensor, "_ d_in"]]
) -> Generator[Float[Tensor, "_ d_in"]]:
    """Copy batches to the GPU on a stream of their own, one ahead."""
    stream, ahead = torch.cuda.Stream(device), None
    for x in batches:
        with torch.cuda.stream(stream):
            copied = x.pin_memory().to(device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        if ahead is not None:
            yield _taken(*ahead)
        ahead = copied, ready
    if ahead is not None:
        yield _taken(*ahead)


def _taken(copied: Tensor, ready: torch.cuda.Event) -> Tensor:
    """Let the current stream wait for a copy, and keep its memory until that stream is done."""
    current = torch.cuda.current_stream()
    current.wait_event(ready)
    copied.record_stream(current)
    return copied
