"""Compare where the attention heads of base and adapter look.

1. A batch has two copies of one rollout: in the first all rows are held at zero, which is the base
   model for plain LoRA, in the second they are the adapter's own.
2. Attention runs in its eager form, whose weights are read layer by layer and dropped again, so
   that memory holds those of one layer.
3. For each head and each token that looks back, the share of its attention that moves: half of
   `Σ|adapter − base|` over the tokens it can see. A head's number is the mean over tokens. Beside
   it `KL(adapter ‖ base)` in nats, which has no upper end: a weight that was 0 counts as 1e-12.

A head that looks elsewhere need not be adapted itself: what it reads may have changed before.
"""

import re
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.activations.store import ActivationStore
from lorascope.causal.held_out import HeldOut
from lorascope.causal.report_records import (
    AttendedToken,
    AttentionExample,
    AttentionShift,
    HeadShift,
)
from lorascope.subject.intervene import RowEditor

N_ROLLOUTS = 8
N_TOKENS = 512  # of each rollout, from its beginning
_N_HEADS = 8  # with an example
_N_KEYS = 3  # tokens that gain, and that lose
_CONTEXT = 12  # tokens before an example
_MIN_MOVED = 0.01  # share of the attention; smaller changes are not named
_TINY = 1e-12  # smaller weights count as this one in KL


@torch.inference_mode()
def attention_of(editor: RowEditor, held_out: HeldOut) -> AttentionShift | None:
    """Return how far the heads look elsewhere on the first held-out rollouts.

    None if the model has no eager attention, or none that gives its weights.
    """
    store, found = held_out.store, _Heads()
    n_tokens = 0
    with _weights_read(held_out.subject.causal, found.add) as is_eager:
        if not is_eager:
            return None
        rollouts = held_out.rollouts[:N_ROLLOUTS]
        for index in rollouts.tolist():
            first, last = store.rollout_start[index : index + 2].tolist()
            longest = min(N_TOKENS, held_out.subject.max_length or N_TOKENS)
            rows = np.arange(first, min(last, first + longest))
            ids = torch.from_numpy(store.token_ids[rows].astype(np.int64)).expand(2, -1)
            found.begin(first)
            editor.run(ids, _without_first, logits_at=torch.tensor([0]))
            n_tokens += max(0, len(rows) - 1)
    if not found.sums or not n_tokens:
        return None
    return found.shift(store, len(rollouts), n_tokens)


def _without_first(_: slice, values: Tensor) -> Tensor:
    """Return the rows of two copies, those of the first at zero."""
    keep = torch.tensor([0.0, 1.0], device=values.device)
    return values * keep.view(2, *[1] * (values.ndim - 1))


@dataclass
class _Best:
    """The token at which a head's attention moves most, and its weights in base and adapter."""

    moved: float
    row: int
    weights: npt.NDArray[np.float32]  # (2, seen)


@dataclass
class _Heads:
    """Sums over tokens by layer, of moved attention and of KL `(2, head)`; strongest tokens."""

    first_row: int = 0
    sums: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict)
    best: dict[tuple[int, int], _Best] = field(default_factory=dict)
    _read: set[int] = field(default_factory=set)  # layers of the present rollout

    def begin(self, first_row: int) -> None:
        """Begin with the rollout whose first row is given."""
        self.first_row = first_row
        self._read.clear()

    def add(self, layer: int, weights: Float[Tensor, "2 head seq seq"]) -> None:
        """Add the weights of one layer for one rollout.

        Attention modules may be nested; the outer one gives the same weights again.
        """
        if layer in self._read:
            return
        self._read.add(layer)
        base, own = weights.float()
        kl = own * (own.clamp(min=_TINY) / base.clamp(min=_TINY)).log() - own + base
        moved = (own - base).abs().sum(-1) / 2
        sums = torch.stack([moved, kl.sum(-1).clamp(min=0)]).sum(-1, dtype=torch.float64)
        self.sums[layer] = self.sums.get(layer, 0.0) + sums.cpu().numpy()
        largest, position = (part.cpu().tolist() for part in moved.max(1))
        for head, at in enumerate(position):
            before = self.best.get((layer, head))
            if before is None or largest[head] > before.moved:
                seen = weights[:, head, at, : at + 1].float().cpu().numpy()
                self.best[layer, head] = _Best(largest[head], self.first_row + at, seen)

    def shift(self, store: ActivationStore, n_rollouts: int, n_tokens: int) -> AttentionShift:
        """Return the means, and the heads of which most attention moves, largest first."""
        layers = sorted(self.sums)
        means = {layer: self.sums[layer] / n_tokens for layer in layers}
        moved = {at: float(means[at[0]][0, at[1]]) for at in self.best}
        largest = sorted((at for at in moved if moved[at] > 0), key=lambda at: (-moved[at], at))
        return AttentionShift(
            n_rollouts=n_rollouts,
            n_tokens=n_tokens,
            layers=tuple(layers),
            moved=tuple(tuple(np.minimum(means[layer][0], 1).tolist()) for layer in layers),
            heads=tuple(
                HeadShift(
                    layer=layer,
                    head=head,
                    moved=min(moved[layer, head], 1.0),
                    kl=float(means[layer][1, head]),
                    example=_example(store, self.best[layer, head]),
                )
                for layer, head in largest[:_N_HEADS]
            ),
        )


def _example(store: ActivationStore, best: _Best) -> AttentionExample:
    rollout = int(store.rollout_of(np.array([best.row]))[0])
    first = int(store.rollout_start[rollout])
    base, own = np.minimum(best.weights, 1)
    order = np.argsort(base - own, kind="stable")
    text = store.vocabulary.text

    def attended(positions: npt.NDArray[np.int64]) -> tuple[AttendedToken, ...]:
        return tuple(
            AttendedToken(
                position=at,
                token=text([store.token_ids[first + at]]),
                base=float(base[at]),
                adapter=float(own[at]),
            )
            for at in positions.tolist()
            if abs(float(own[at]) - float(base[at])) >= _MIN_MOVED
        )

    return AttentionExample(
        rollout=int(store.rollout_id[rollout]),
        position=best.row - first,
        before=text(store.token_ids[max(first, best.row - _CONTEXT) : best.row]),
        token=text([store.token_ids[best.row]]),
        gains=attended(order[own[order] > base[order]][:_N_KEYS]),
        losses=attended(order[own[order] < base[order]][::-1][:_N_KEYS]),
    )


@contextmanager
def _weights_read(causal: Any, add: Callable[[int, Tensor], None]) -> Generator[bool]:
    """Give the attention weights of each layer to `add` in this block; False if that cannot be."""
    before = causal.config._attn_implementation
    try:
        causal.set_attn_implementation("eager")
    except (AttributeError, ValueError):  # such as a model with an attention of its own
        yield False
        return
    with ExitStack() as undo:
        undo.callback(causal.set_attn_implementation, before)
        for name, module in causal.named_modules():
            number = re.search(r"\.(\d+)\.", f".{name}.")
            if number and "attention" in type(module).__name__.lower():
                hook = module.register_forward_hook(_reader(int(number[1]), add))
                undo.callback(hook.remove)
        yield True


def _reader(layer: int, add: Callable[[int, Tensor], None]) -> Callable[..., None]:
    def hook(_module: Any, _args: Any, out: Any) -> None:
        weights = out[1] if isinstance(out, tuple) and len(out) > 1 else None
        is_square = isinstance(weights, Tensor) and weights.ndim == 4
        if weights is not None and is_square and weights.shape[::2] == (2, weights.shape[3]):
            add(layer, weights)

    return hook
