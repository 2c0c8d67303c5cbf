"""Simple reconstructions of rows with as many values a token as an SAE, for comparison with it.

They are fitted on rows of rollouts that are not measured, in the SAE's units (`s·x`). Each has the
*constant* row of a token and `m` values, where `m` is the SAE's L0, rounded, and at least 1.

The constant row is the mean over the training rows of the same place. A special token's place is
its position in its run of special tokens, with the roles of the texts before and after it: the
third token of the header between a question and a thought. Other tokens of one role are one place.

- `constant`: no value, only the constant row.
- `pca`: the coordinates along the first m principal directions of the difference from it.
- `columns`: the m columns that are farthest from it.
- `random`: draws as many random directions as the SAE has latents, takes the m that match the row
  best, and fits their values by least squares together, which an encoder cannot do.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32
from torch import Tensor

from lorascope.activations.batches import read_blocks
from lorascope.activations.store import ActivationStore
from lorascope.sae.model import SAE
from lorascope.texts.roles import ROLES, SPECIAL

_N_FITTED = 65_536  # rows that baselines are fitted on
_CHUNK = 1024  # rows at a time: m directions are copied for each
_BLOCK = 8192  # rows whose products are summed at a time
_RIDGE = 1e-6  # keeps the least squares solvable when two directions are almost equal
_LONGEST_HEADER = 64  # special tokens in a row that have places of their own
_FEWEST = 4  # training rows of a place; with fewer, it has the mean of its role


class Rebuild(NamedTuple):
    """A way to rebuild rows, and how many values a token it keeps.

    `rows(x, constant)` takes and returns raw rows, `(n, d_in)` in float32 on the CPU.
    """

    rows: Callable[[Tensor, Tensor], Tensor]
    l0: float


def fit_rebuilds(
    saes: Mapping[str, SAE],
    store: ActivationStore,
    measured: npt.NDArray[np.int64],
    seed: int,
) -> "tuple[dict[str, Rebuild], ConstantRows]":
    """Return what makes the rows to write, and the constant rows.

    A key is the name of a run, that of an SAE or of a baseline. Baselines have as many values a
    token as the SAE named `sae`. They are fitted on the rows of the rollouts that are not
    `measured`, or on all rows if all are.
    """
    elsewhere = np.setdiff1d(np.arange(store.n_rollouts), measured)
    training = rows_of(store, elsewhere if len(elsewhere) else measured)
    training = training[:: -(-len(training) // _N_FITTED)]
    rows = torch.cat(list(read_blocks(store, training)))
    constant = ConstantRows(store, training, rows)

    def by(one: SAE) -> Rebuild:
        blocks = list(read_blocks(store, rows_of(store, measured)))
        n_fired = sum(len(one.encode(x).latents) for x in blocks)
        return Rebuild(lambda x, _: one.decode(one.encode(x)), n_fired / sum(map(len, blocks)))

    found = {name: by(one) for name, one in saes.items()}
    n_values = round(found["sae"].l0)
    return found | baselines(saes["sae"], rows, constant.at(training), n_values, seed), constant


def rows_of(store: ActivationStore, rollouts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the numbers of all rows of some rollouts."""
    row = np.arange(store.n_rows)
    return row[np.isin(store.rollout_of(row), rollouts)]


def baselines(
    sae: SAE,
    training: Float32[Tensor, "row d_in"],
    constant: Float32[Tensor, "row d_in"],
    n_values: int,
    seed: int,
) -> dict[str, Rebuild]:
    """Fit on training rows and their constant rows, and return the reconstructions by name.

    `m` is `n_values`, but at least 1 and at most the number of columns.
    """
    m = min(max(1, n_values), sae.d_in)
    scale = sae.scale
    unscale = torch.where(scale > 0, 1 / scale, 0.0)  # an unused column keeps its constant
    covariance = torch.zeros(sae.d_in, sae.d_in, dtype=torch.float64)
    for x, usual in zip(training.split(_BLOCK), constant.split(_BLOCK), strict=True):
        difference = ((x - usual) * scale).double()
        covariance += difference.T @ difference
    directions = torch.linalg.eigh(covariance).eigenvectors.T.flip(0).float()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(sae.d_sae, sae.d_in, generator=generator)
    drawn = (drawn / drawn.norm(dim=1, keepdim=True)).to(training.device)
    first = directions[:m]

    def pca(x: Tensor, constant: Tensor) -> Tensor:
        return constant + ((x - constant) * scale) @ first.T @ first * unscale

    def columns(x: Tensor, constant: Tensor) -> Tensor:
        far = (x - constant) * scale
        kept = far.abs().topk(m, dim=1).indices
        return constant + torch.zeros_like(far).scatter(1, kept, far.gather(1, kept)) * unscale

    def random(x: Tensor, constant: Tensor) -> Tensor:
        parts = [_best_of(drawn, part, m) for part in ((x - constant) * scale).split(_CHUNK)]
        return constant + torch.cat(parts) * unscale

    return {
        "constant": Rebuild(lambda _, usual: usual, 0),
        "pca": Rebuild(pca, m),
        "columns": Rebuild(columns, m),
        "random": Rebuild(random, m),
    }


class ConstantRows:
    """The constant row of every token of a store, fitted on the rows `training` of it."""

    def __init__(
        self,
        store: ActivationStore,
        training: npt.NDArray[np.int64],
        rows: Float32[Tensor, "row d_in"],
    ) -> None:
        self._places, role_of_place = _places(store)
        place = torch.from_numpy(self._places[training])
        role = torch.from_numpy(role_of_place)
        n = torch.bincount(place, minlength=len(role)).double()
        sums = torch.zeros(len(role), rows.shape[1], dtype=torch.float64)
        sums.index_add_(0, place, rows.double())
        of_role = torch.zeros(len(ROLES), rows.shape[1], dtype=torch.float64)
        of_role.index_add_(0, role, sums)
        n_of_role = torch.zeros(len(ROLES), dtype=torch.float64).index_add_(0, role, n)
        of_role /= n_of_role.clamp(min=1)[:, None]
        of_role[n_of_role == 0] = sums.sum(0) / n.sum()
        known = (n >= _FEWEST)[:, None]
        self._rows = torch.where(known, sums / n.clamp(min=1)[:, None], of_role[role]).float()

    def at(self, rows: npt.NDArray[np.int64]) -> Float32[Tensor, "row d_in"]:
        """Return the constant row of each of the given row numbers."""
        return self._rows[torch.from_numpy(self._places[rows])]


def _places(store: ActivationStore) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the place of every token of a store, numbered from 0, and the role of each place."""
    outside = len(ROLES)  # the role before the first run of a rollout, and after the last
    role = store.roles.astype(np.int64)
    row = np.arange(store.n_rows)
    first = np.isin(row, store.rollout_start[:-1])
    begins = first | np.concatenate([[True], role[1:] != role[:-1]])
    start = np.flatnonzero(begins)
    run = np.cumsum(begins) - 1
    before = np.where(first[start], outside, np.roll(role[start], 1))
    after = np.where(np.roll(first[start], -1), outside, np.roll(role[start], -1))
    position = np.minimum(row - start[run], _LONGEST_HEADER - 1)
    header = (before * (outside + 1) + after)[run] * _LONGEST_HEADER + position
    _, index, place = np.unique(
        np.where(role == SPECIAL, outside + header, role), return_index=True, return_inverse=True
    )
    return place, role[index]


def _best_of(directions: Tensor, x: Tensor, m: int) -> Tensor:
    """Return `x` as the least-squares sum of the m directions that match each row best."""
    chosen = directions[(x @ directions.T).abs().topk(min(m, len(directions)), dim=1).indices]
    gram = chosen @ chosen.mT  # (row, m, m)
    gram += _RIDGE * torch.eye(gram.shape[-1], device=x.device)
    values = torch.linalg.solve(gram, (chosen @ x[:, :, None]))
    return (values * chosen).sum(1)
