"""How good a dictionary is, measured on rows that it was not trained on.

The same functions serve training and the command, so that both show the same numbers. Sums are
taken in float64, column by column; a ratio is formed once, from whole sums, never averaged over
rows or batches. `docs/metrics.md` gives every formula.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.errors import ArtifactError
from lorascope.sae.model import SAE
from lorascope.sites import SiteLayout

_DECADES = range(-6, 0)
_N_WORST = 5
_BLOCK = 2048  # rows of a dictionary compared at once
Columns = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ColumnMoments:
    """Count, mean, spread and range of each column, `(d_in,)` each, in raw units.

    `spread` is `sum (x - mean)^2`. Blocks are merged by the pairwise formula of Chan, Golub and
    LeVeque (1979), which keeps its digits where the mean is much larger than the spread.
    """

    n: int
    mean: Columns
    spread: Columns
    low: Columns
    high: Columns

    @classmethod
    def from_blocks(cls, blocks: Iterable[Float[Tensor, "_ d_in"]]) -> "ColumnMoments":
        """Sum up blocks of rows. Raises ArtifactError when there is no row."""
        parts = [ColumnMoments.from_block(block) for block in blocks if len(block)]
        if not parts:
            raise ArtifactError("there are no rows to measure; generate more")
        return functools.reduce(ColumnMoments.merge, parts)

    @classmethod
    def from_block(cls, block: Float[Tensor, "batch d_in"]) -> "ColumnMoments":
        """Sum up one block of one row or more."""
        x = block.cpu().numpy().astype(np.float64)
        mean = x.mean(0)
        return cls(len(x), mean, np.square(x - mean).sum(0), x.min(0), x.max(0))

    def merge(self, other: "ColumnMoments") -> "ColumnMoments":
        """Return the moments of both sets of rows together."""
        n = self.n + other.n
        step = other.mean - self.mean
        return ColumnMoments(
            n=n,
            mean=self.mean + step * (other.n / n),
            spread=self.spread + other.spread + np.square(step) * (self.n * other.n / n),
            low=np.minimum(self.low, other.low),
            high=np.maximum(self.high, other.high),
        )

    @property
    def constant(self) -> npt.NDArray[np.bool_]:
        """Columns that hold one value only."""
        return self.low == self.high

    @property
    def std(self) -> Columns:
        """Standard deviation."""
        return np.where(self.constant, 0.0, np.sqrt(self.spread / self.n))


def fvu(residual: Columns, spread: Columns, scale: Columns | float = 1.0) -> float | None:
    """Return `sum |x - x_hat|^2 / sum |x - mean(x)|^2`, columns in units of `scale`.

    `residual` and `spread` are the sums of each column, `(d_in,)`. None where nothing varies: the
    ratio has no value then.
    """
    weight = np.square(np.broadcast_to(scale, residual.shape))
    unexplained, total = float((weight * residual).sum()), float((weight * spread).sum())
    return unexplained / total if total > 0 else None


@torch.inference_mode()
def evaluate(sae: SAE, blocks: Iterable[Float[Tensor, "_ d_in"]]) -> dict[str, Any]:
    """Return the metrics of an SAE over raw rows, as JSON values.

    The result depends on the rows, not on how they are cut into blocks (to float64 rounding).
    Raises ArtifactError when there is no row, or when the SAE has no threshold.
    """
    moments: ColumnMoments | None = None
    residual = np.zeros(sae.d_in)
    times_fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    cosine, n_directed = 0.0, 0
    scale = sae.scale
    for rows in blocks:
        if len(rows) == 0:
            continue
        here = ColumnMoments.from_block(rows)
        moments = moments.merge(here) if moments else here
        x = rows.to(scale.device, torch.float32)
        code = sae.encode(x)
        x_hat = sae.decode(code)
        residual += (x.double() - x_hat.double()).square().sum(0).cpu().numpy()
        times_fired += torch.bincount(code.latents, minlength=sae.d_sae).cpu()
        seen, made = (x * scale).double(), (x_hat * scale).double()
        norms = seen.norm(dim=1) * made.norm(dim=1)
        directed = norms > 0
        cosine += float(((seen * made).sum(1)[directed] / norms[directed]).sum())
        n_directed += int(directed.sum())
    if moments is None:
        raise ArtifactError("there are no held-out rows to evaluate on; generate more")
    alive = int((times_fired > 0).sum())
    known = all(site.b_norms for site in sae.layout.sites)
    return {
        "n_rows": moments.n,
        "fvu": fvu(residual, moments.spread, scale.double().cpu().numpy()),
        "fvu_raw": fvu(residual, moments.spread),
        # None where the layout does not know the norms of `B`
        "fvu_effect": fvu(residual, moments.spread, sae.layout.effect_scale) if known else None,
        "cosine": cosine / n_directed if n_directed else None,
        "l0": int(times_fired.sum()) / moments.n,
        "alive": alive,
        "never_fired": 1.0 - alive / sae.d_sae,
        "density": _density(times_fired.numpy() / moments.n),
        "worst_columns": _worst(residual, moments.spread, sae.layout),
    }


def stability(
    mine: Float[Tensor, "latent d_in"], others: Sequence[Float[Tensor, "other d_in"]]
) -> Float[Tensor, "latent"]:
    """Return the cosine of each decoder row with the nearest of each other dictionary, averaged.

    The dictionaries differ by their seed alone; rows have unit norm in the units of training. A
    latent that only one seed finds says more of the seed than of the adapter.
    """
    best = [
        torch.cat([(block @ other.T).amax(1) for block in mine.split(_BLOCK)]) for other in others
    ]
    return torch.stack(best).mean(0).clamp(-1.0, 1.0)


def _density(rate: npt.NDArray[np.float64]) -> dict[str, int]:
    """Count the latents by the decade of their firing rate; `never` is apart."""
    decade = np.floor(np.log10(rate[rate > 0])).clip(_DECADES[0], _DECADES[-1])
    counts = {f"1e{d}": int((decade == d).sum()) for d in _DECADES}
    return {"never": int((rate == 0).sum()), **counts}


def _worst(residual: Columns, spread: Columns, layout: SiteLayout) -> list[dict[str, Any]]:
    """Return the columns of highest FVU."""
    varies = spread > 0
    each = np.divide(residual, spread, out=np.full_like(spread, -np.inf), where=varies)
    order = np.argsort(-each, kind="stable")[: min(_N_WORST, int(varies.sum()))]
    return [{"column": layout.column_names[c], "fvu": float(each[c])} for c in order]
