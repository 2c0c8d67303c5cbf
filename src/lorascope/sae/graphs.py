"""Whole training steps as CUDA graphs: one launch instead of a hundred.

A step's shapes are static and nothing in it waits for the device (`Step.static`), so it can be
recorded. The first steps of each kind run as they are: they compile the kernels and make the
optimiser's state.
"""

from collections import Counter
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from lorascope.sae.objective import Loss

_AS_THEY_ARE = 3  # steps of a kind before it is recorded


class StepGraphs:
    """Takes steps `change(x, by_row)`, from the fourth of a kind on by replaying its graph."""

    def __init__(self, change: Callable[[Tensor, bool], Loss]) -> None:
        self._change = change
        self._taken: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Loss]] = {}

    def take(self, x: Tensor, by_row: bool) -> Loss:
        """Take one step; the loss's tensors are overwritten by the next step of this kind."""
        kind = (by_row, x.shape)
        self._taken[kind] += 1
        if self._taken[kind] <= _AS_THEY_ARE:
            return self._change(x, by_row)
        if kind not in self._graphs:
            graph, held = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph):
                loss = self._change(held, by_row)
            self._graphs = {kind: (graph, held, loss)}  # an earlier kind does not come again
        graph, held, loss = self._graphs[kind]
        held.copy_(x, non_blocking=True)
        graph.replay()
        return loss
