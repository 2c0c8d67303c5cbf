"""Fold an edit of features into the weights of an adapter, as well as weights can have it.

An edit subtracts `(1 − factor) · value · decoder row` of its features from the row of a token. A
feature's value is no linear function of the row, and it reads sites that come later in the network;
an adapter's site can only make a linear function of its own columns. So, site by site:

1. `D` is what comes nearest to the edit `d` of a site's columns `x`, by least squares over the
   store's rows, all tokens of them: `min Σ ‖d − D·x‖²`, `D = (Σ d·xᵀ) (Σ x·xᵀ)⁺`. What B makes of
   the columns plays no part: the nearest `D` is the same for every B of full column rank.
2. `B' = B · (1 + D)` in the gauge of the rows. Sites that the edit does not touch keep their bytes.
3. The error is what is left of the edit, `Σ ‖d − D·x‖² / Σ ‖d‖²` in effect units, on rows that were
   not fitted. 0 is exact: so it is where the features are whole columns or whole directions of a
   site that they read linearly. A sparse feature that reads many sites comes near 1: its edit is
   a runtime patch (`patch`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorascope.activations.store import ActivationStore
from lorascope.causal.patch import Patch
from lorascope.sites import SiteLayout
from lorascope.subject.adapter import WEIGHTS, Adapter, lora_tensors
from lorascope.subject.gauge import unmix

_BLOCK = 8192


@dataclass(frozen=True)
class Fold:
    """The change of each site that an edit touches: `D` by the site's place in the layout.

    `error` is what is left of the whole edit, `errors` of each site's part, 0 to about 1; None
    where no feature fires on the rows that were not fitted.
    """

    changes: Mapping[int, Float64[Tensor, "rank rank"]]
    error: float | None
    errors: Mapping[str, float]


def fit(
    patch: Patch,
    store: ActivationStore,
    counts: npt.NDArray[np.bool_],
    fitted: npt.NDArray[np.bool_],
) -> Fold:
    """Fit the changes on the rollouts that `fitted` marks, and measure them on the others.

    Where none is left to measure on, all serve for both. `store` has the patch's columns, `counts`
    are the rows that are edited; the others are to stay as they are.
    """
    layout = store.layout
    of_row = fitted[store.rollout_of(np.arange(store.n_rows))]
    sums = {i: torch.zeros(2, s.rank, s.rank, dtype=torch.float64) for i, s in _touched(patch)}
    for x, d, rows in _blocks(patch, store, counts):
        mine = torch.from_numpy(of_row[rows])
        for i, columns in _columns(layout, sums):
            here = x[mine][:, columns]
            sums[i][0] += d[mine][:, columns].T @ here
            sums[i][1] += here.T @ here
    changes = {
        i: _exact(both[0] @ torch.linalg.pinv(both[1], hermitian=True)) for i, both in sums.items()
    }
    effect = torch.from_numpy(layout.effect_scale)
    left, whole = torch.zeros(2, len(layout.sites), dtype=torch.float64)
    measured = ~of_row if (~of_row).any() else of_row
    for x, d, rows in _blocks(patch, store, counts):
        mine = torch.from_numpy(measured[rows])
        for i, columns in _columns(layout, sums):
            edit = d[mine][:, columns]
            rest = (edit - x[mine][:, columns] @ changes[i].T) * effect[columns]
            left[i] += rest.square().sum()
            whole[i] += (edit * effect[columns]).square().sum()
    names = {i: layout.sites[i].name for i in changes}
    return Fold(
        changes,
        float(left.sum() / whole.sum()) if whole.sum() else None,
        {names[i]: float(left[i] / whole[i]) for i in changes if whole[i]},
    )


def write_folded(
    adapter: Adapter,
    layout: SiteLayout,
    mixes: Mapping[str, Tensor | None],
    fold: Fold,
    out: Path,
) -> None:
    """Write the adapter's tensors with every `B` of a changed site folded, in their own types.

    `mixes` are the gauges by module (None: raw).
    """
    tensors = load_file(adapter.path / WEIGHTS)
    names = lora_tensors(tensors)
    for i, change in fold.changes.items():
        module = layout.sites[i].module
        name = names[module]["lora_B"]
        whole = torch.eye(len(change), dtype=torch.float64) + change
        mix = mixes[module]
        if mix is not None:
            exact = mix.cpu().double()
            whole = unmix(exact) @ whole @ exact
        b = tensors[name]
        tensors[name] = (b.double() @ whole).to(b.dtype).contiguous()
    save_file(tensors, out, metadata={"format": "pt"})


def _touched(patch: Patch) -> list[tuple[int, Any]]:
    """Return the sites whose columns any feature of the edit writes, by place."""
    writes = (patch.sae.W_dec != 0).any(0)
    found, start = [], 0
    for i, site in enumerate(patch.layout.sites):
        if writes[start : start + site.rank].any() and patch.factor != 1:
            found.append((i, site))
        start += site.rank
    return found


def _columns(layout: SiteLayout, wanted: Mapping[int, Any]) -> list[tuple[int, slice]]:
    ends = np.cumsum([site.rank for site in layout.sites]).tolist()
    return [(i, slice(ends[i] - layout.sites[i].rank, ends[i])) for i in wanted]


def _blocks(
    patch: Patch, store: ActivationStore, counts: npt.NDArray[np.bool_]
) -> Iterator[tuple[Tensor, Tensor, npt.NDArray[np.int64]]]:
    """Yield rows in float64, what the edit does to them, and their numbers."""
    for first, block in store.blocks(_BLOCK):
        x = torch.from_numpy(np.array(block, np.float32))
        rows = np.arange(first, first + len(x))
        d = patch.change(x, torch.from_numpy(counts[rows]))
        yield x.double(), d.double(), rows


def _exact(change: Tensor) -> Tensor:
    """Return a change with what rounding left of nothing put to nothing."""
    return torch.where(change.abs() < 1e-12, 0.0, change)
