"""Fold an edit of features into the weights of an adapter, as closely as weights can express it.

An edit subtracts `(1 − factor) · value · decoder row` of its features from the row of a token. A
feature's value is not linear in the row and depends on sites that come later in the network; the
weights of a site can express only a linear function of its own columns. So, for each site:

1. `D` is the best linear approximation of the edit `d` of a site's columns `x`, by least squares
   over all tokens of the store: `min Σ ‖d − D·x‖²`, `D = (Σ d·xᵀ) (Σ x·xᵀ)⁺`. It is the same for
   every B of full column rank.
2. `B' = B · (1 + D)` in the gauge of the rows. Sites that the edit does not touch keep their bytes.
3. The error is `Σ ‖d − D·x‖² / Σ ‖d‖²` in effect units, on rows that were not fitted. It is 0 when
   the features are whole columns or directions of a site that they read linearly. A sparse feature
   that reads many sites has an error near 1; its edit must be a runtime patch (`patch`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from safetensors.torch import save_file
from torch import Tensor

from lorascope.activations.store import ActivationStore
from lorascope.artifact import replacing
from lorascope.causal.patch import Patch
from lorascope.sites import SiteLayout
from lorascope.subject.adapter import Adapter, lora_tensors
from lorascope.subject.bottlenecks import unmix

_BLOCK = 8192


@dataclass(frozen=True)
class Fold:
    """The change `D` of each site that an edit touches, by the site's index in the layout.

    `error` is the share of the whole edit that is missed, from 0 to about 1, and `errors` is that
    of each site. None if no feature fires on the rows that were not fitted.
    """

    changes: Mapping[int, Float64[Tensor, "rank rank"]]
    error: float | None
    errors: Mapping[str, float]


def fit_fold(
    patch: Patch,
    store: ActivationStore,
    is_edited: npt.NDArray[np.bool_],
    fitted: npt.NDArray[np.bool_],
) -> Fold:
    """Fit the changes on the rollouts that `fitted` marks, and measure the error on the others.

    If all rollouts are fitted, the error is measured on them. `store` has the patch's columns.
    `is_edited` marks the rows to edit; the fit keeps the other rows unchanged.
    """
    layout = store.layout
    is_fitted = fitted[store.rollout_of(np.arange(store.n_rows))]
    touched = _touched(patch)
    ranks = {i: layout.sites[i].rank for i in touched}
    sums = {i: torch.zeros(2, rank, rank, dtype=torch.float64) for i, rank in ranks.items()}
    for x, d, rows in _blocks(patch, store, is_edited):
        here = torch.from_numpy(is_fitted[rows])
        for i, columns in touched.items():
            x_site = x[here][:, columns]
            sums[i][0] += d[here][:, columns].T @ x_site
            sums[i][1] += x_site.T @ x_site
    changes = {
        i: _clear_rounding(dx @ torch.linalg.pinv(xx, hermitian=True))
        for i, (dx, xx) in sums.items()
    }
    effect = torch.from_numpy(layout.effect_scale)
    left, whole = torch.zeros(2, len(layout.sites), dtype=torch.float64)
    measured = ~is_fitted if (~is_fitted).any() else is_fitted
    for x, d, rows in _blocks(patch, store, is_edited):
        here = torch.from_numpy(measured[rows])
        for i, columns in touched.items():
            edit = d[here][:, columns]
            rest = (edit - x[here][:, columns] @ changes[i].T) * effect[columns]
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
    """Write the adapter's tensors with `B` of each changed site folded, in their own dtypes.

    `mixes` are the gauges by module; None is the raw gauge.
    """
    tensors = adapter.tensors()
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
    with replacing(out) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def _touched(patch: Patch) -> dict[int, slice]:
    """Return the columns of the sites that the edit writes to, by the site's index."""
    writes = (patch.sae.W_dec != 0).any(0) & (patch.factor != 1)
    return {i: columns for i, columns in enumerate(patch.layout.slices) if writes[columns].any()}


def _blocks(
    patch: Patch, store: ActivationStore, is_edited: npt.NDArray[np.bool_]
) -> Iterator[tuple[Tensor, Tensor, npt.NDArray[np.int64]]]:
    """Yield rows and their edits in float64, and the row numbers."""
    for first, block in store.blocks(_BLOCK):
        x = torch.from_numpy(np.array(block, np.float32))
        rows = np.arange(first, first + len(x))
        d = patch.change(x, torch.from_numpy(is_edited[rows]))
        yield x.double(), d.double(), rows


def _clear_rounding(change: Tensor) -> Tensor:
    """Return a change with entries that are only rounding errors set to 0."""
    return torch.where(change.abs() < 1e-12, 0.0, change)
