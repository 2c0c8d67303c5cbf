"""One-sided directions of three kinds, and the tokens on which each fires.

- *features*: the latents of the SAE that fire, at the tokens on which they fire.
- *columns*: the columns of the adapter's rows, both signs of each.
- *neurons*: the neurons of the subject's MLPs, `act(gate) · up`, both signs of each: what the down
  projection reads, in the same forward pass that gives the adapter's rows. They are drawn from all
  layers; a model with experts is refused.

A column or a neuron has a value at every token. So that all kinds are compared on equally rare
firings, each is given the number of firings of a feature that is drawn at random: it fires where it
is largest on the choosing half, above the next value, and above 0.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope.activations.store import ActivationStore
from lorascope.errors import AdapterError
from lorascope.features.index import FeatureIndex
from lorascope.labels.by_rule import Halves
from lorascope.labels.clues import Ints

if TYPE_CHECKING:
    from lorascope.causal.held_out import HeldOut

_ROWS = 1 << 14  # rows read at once
_LARGEST = 6e4  # that float16 holds, nearly
_READERS = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "wo", "w2", "c_proj")
Values = npt.NDArray[Any]


class Directions(NamedTuple):
    """Directions of one kind, drawn from `n_all`; `firings` has (choosing, scoring) of each."""

    n_all: int
    firings: tuple[tuple[Ints, Ints], ...]


class Drawn(NamedTuple):
    """Some of the one-sided directions of `n_all / 2` units, by unit and sign."""

    n_all: int
    units: Ints
    signs: npt.NDArray[np.int64]


def draw(n_units: int, n: int, rng: np.random.Generator) -> Drawn:
    """Draw at most `n` of the directions of units, both signs counted."""
    chosen = np.sort(rng.permutation(2 * n_units)[:n])
    return Drawn(2 * n_units, chosen // 2, 1 - 2 * (chosen % 2))


def features(halves: Halves, index: FeatureIndex, n: int, rng: np.random.Generator) -> Directions:
    """Return at most `n` of the features that fire."""
    alive = np.flatnonzero(index.alive)
    chosen = np.sort(rng.permutation(alive)[:n]).tolist()
    firings = tuple((halves.choosing.firings(i), halves.scoring.firings(i)) for i in chosen)
    return Directions(len(alive), firings)


def of_values(
    drawn: Drawn, values: Sequence[Values], like: Directions, rng: np.random.Generator
) -> Directions:
    """Return the directions of units whose values on both halves are given, `(token, drawn)`.

    Each has about as many firings as one of the directions in `like`.
    """
    counts = [len(choosing) for choosing, _ in like.firings]
    wanted = rng.choice(counts, len(drawn.units))
    firings: list[tuple[Ints, Ints]] = []
    for i, (sign, n) in enumerate(zip(drawn.signs.tolist(), wanted.tolist(), strict=True)):
        choosing, scoring = (sign * half[:, i].astype(np.float32) for half in values)
        next_one = len(choosing) - 1 - min(n, len(choosing) - 1)
        bound = max(float(np.partition(choosing, next_one)[next_one]), 0.0)
        firings.append((np.flatnonzero(choosing > bound), np.flatnonzero(scoring > bound)))
    return Directions(drawn.n_all, tuple(firings))


def column_values(store: ActivationStore, rows: Ints, drawn: Drawn) -> Values:
    """Return the values of drawn columns at rows of the store, `(row, drawn)`."""
    parts = [rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS)]
    return np.concatenate([store.take(part)[:, drawn.units] for part in parts])


def mlp_readers(causal: Any) -> list[tuple[Any, int]]:
    """Return the down projections of a model's MLPs, with the number of neurons that each reads.

    Raises AdapterError if the model has none, or has experts.
    """
    names = [name for name, _ in causal.named_modules()]
    found = [
        name
        for name in names
        if name.rpartition(".")[2] in _READERS and "att" not in name.rpartition(".")[0]
    ]
    if not found or any("expert" in name for name in names):
        what = "has experts, whose neurons see some tokens only" if found else "has no known MLP"
        raise AdapterError(f"{type(causal).__name__} {what}; leave out --lora-path")
    modules = [causal.get_submodule(name) for name in found]
    return [(module, _width(getattr(module, "base_layer", module))) for module in modules]


def _width(module: Any) -> int:
    """Return how many inputs a layer has; GPT-2's Conv1D keeps its weight as (inputs, outputs)."""
    return int(getattr(module, "in_features", 0) or module.weight.shape[0])


def neuron_values(
    replay: "HeldOut", readers: Sequence[tuple[Any, int]], rows: Ints, drawn: Drawn
) -> Values:
    """Run rollouts again, and return the values of drawn neurons at their rows, `(row, drawn)`.

    `rows` are ascending. Raises ArtifactError if the adapter's rows are not those of the store.
    """
    import torch

    from lorascope import runtime
    from lorascope.subject.hooks import RowReader

    values = np.zeros((len(rows), len(drawn.units)), np.float16)  # 2 bytes: they are compared only
    is_final = np.zeros(len(rows), bool)  # windows of long rollouts overlap
    begin = np.cumsum([0, *(width for _, width in readers)])
    owner = np.searchsorted(begin, drawn.units, side="right") - 1
    kept: list[Any] = []

    def keep(local: torch.Tensor) -> Any:
        return lambda _module, args: kept.append(args[0][..., local.to(args[0].device)].cpu())

    hooks = [
        module.register_forward_pre_hook(
            keep(torch.from_numpy(drawn.units[owner == layer] - begin[layer]))
        )
        for layer, (module, _) in enumerate(readers)
    ]
    bar = runtime.progress(replay.n_tokens, "neurons", "tokens")
    try:
        with RowReader(replay.subject) as reader, bar:
            for batch in replay.batches():
                kept.clear()
                replay.require_rows(batch, reader.read(batch.token_ids))
                found = torch.cat(kept, dim=-1).clamp(-_LARGEST, _LARGEST).half()  # as `drawn`
                for mask in (batch.own, batch.mask):
                    here = batch.rows[mask].numpy()
                    at = np.searchsorted(rows, here).clip(max=len(rows) - 1)
                    fits = (rows[at] == here) & (mask is batch.mask or ~is_final[at])
                    values[at[fits]] = found[mask].numpy()[fits]
                is_final[at[fits]] = True
                bar.update(int(batch.own.sum()))
    finally:
        for hook in hooks:
            hook.remove()
    return values
