"""The weights, and the loss that training minimises over scaled rows.

1. `pre = (x - b_dec) @ W_enc + b_enc`. Decoder rows have unit norm, so no latent gains from a long
   row and a small value, and `pre` is the score.
2. The rule (`sparsity.py`) chooses what fires; `x_hat = code @ W_dec + b_dec`.
3. The reconstruction loss is `sum |x - x_hat|^2 / sum |x - mean(x)|^2` over the batch; for a
   matryoshka, its mean over the prefixes of the dictionary.
4. Dead latents get a gradient from aux-k (Gao et al. 2024, arXiv 2406.04093, appendix A.2): in each
   row the `k_aux` dead latents with the largest pre-activation reconstruct the detached residual
   `x - x_hat`; the squared error is divided by the same sum and weighted by `auxk_alpha`. Their
   values may be negative here: after a ReLU, a latent that is negative for every row would have no
   gradient and stay dead (measured: of 24 planted dead latents 3 to 9 stay dead instead of 15 to
   24). Aux-k uses one row in four, because rows are shuffled and all of them would take longer than
   the rest of the step.
5. `jumprelu` learns its thresholds through the pseudo-derivatives of Rajamanoharan et al. 2024
   (arXiv 2407.14435, section 3): a rectangle of width `JUMP_WIDTH` around the threshold. The term
   `(L0 / k - 1)^2` keeps the L0 at `k` (their appendix on a fixed sparsity).

`step.py` computes the gradients from the pairs that fire. The tests compare them with this
definition in dense products and automatic gradients (`tests/builders/definitions.py`).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from lorascope.errors import ArtifactError
from lorascope.sae.metrics import ColumnMoments, Columns

LEAST_SPREAD = 1e-4  # least spread of a batch per number: equal rows have none
AUX_ROWS = 4  # aux-k uses one row in this many
JUMP_WIDTH = 0.2  # width of the rectangle around a learned threshold; columns have variance 1
JUMP_WEIGHT = 0.1  # weight of the term that keeps the L0 at k
_INITIAL_ENCODER = 0.3  # size of the first encoder, relative to the decoder


@dataclass(frozen=True)
class Weights:
    """The trained weights, for scaled rows.

    `W_enc` lies in memory as `(latent, d_in)`, because its gradient is computed latent by latent.
    Only `jumprelu` has a `log_threshold`.
    """

    W_enc: Float[Tensor, "d_in latent"]
    b_enc: Float[Tensor, "latent"]
    W_dec: Float[Tensor, "latent d_in"]
    b_dec: Float[Tensor, "d_in"]
    log_threshold: Float[Tensor, "latent"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    @torch.no_grad()
    def folded(
        self, scale: Float64[Tensor, "d_in"], mean: Float64[Tensor, "d_in"]
    ) -> dict[str, Tensor]:
        """Return float32 weights for raw rows; scaled decoder rows have unit norm.

        `scale` multiplies raw columns. A column with scale 0 is left out, and reconstructed as its
        `mean`. A latent's value becomes its score. A learned threshold is folded the same way.
        """
        b_dec = self.b_dec.double()
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        # One matrix at a time: in float64 each is as large as both are in float32.
        matrix = self.W_dec.double()
        norm = matrix.norm(dim=1)
        matrix /= norm.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        W_dec = matrix.mul_(inverse).float()
        matrix = self.W_enc.double()
        b_enc = (self.b_enc.double() - b_dec @ matrix) * norm
        raw = {
            "W_enc": matrix.mul_(scale[:, None]).mul_(norm).float().contiguous(),
            "b_enc": b_enc.float(),
            "W_dec": W_dec,
            "b_dec": torch.where(scale > 0, b_dec * inverse, mean).float(),
        }
        if self.log_threshold is not None:
            raw["threshold"] = (self.log_threshold.double().exp() * norm).float()
        return raw


@dataclass(frozen=True)
class Loss:
    """What a step reports of its batch."""

    fvu: Float[Tensor, ""]
    auxk: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    fired: Bool[Tensor, "latent"]


def initial_weights(
    rows: Float[Tensor, "sample d_in"],
    d_sae: int,
    generator: torch.Generator,
    *,
    learns_threshold: bool = False,
) -> Weights:
    """Return the weights to start from. `rows` is at least one scaled row.

    Decoder rows are rows of the data minus their mean, of unit norm (random directions if there are
    fewer rows than latents, or if a row equals the mean). The encoder is 0.3 times their transpose,
    and `b_dec` is the mean. The small encoder lets one latent win each direction instead of many
    sharing it; `docs/training.md` compares other choices.
    """
    mean = rows.mean(0)
    W_dec = torch.randn(d_sae, rows.shape[1], generator=generator)
    picked = torch.randperm(len(rows), generator=generator)[:d_sae]
    offsets = rows[picked].float() - mean
    usable = offsets.norm(dim=1) > 1e-6 * offsets.norm(dim=1).mean()
    W_dec[: len(picked)][usable] = offsets[usable]
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    weights = Weights(
        W_enc=(_INITIAL_ENCODER * W_dec).T,
        b_enc=torch.zeros(d_sae),
        W_dec=W_dec,
        b_dec=mean,
        log_threshold=torch.full((d_sae,), math.nan) if learns_threshold else None,
    )
    for tensor in weights.tensors().values():
        tensor.requires_grad_()
    return weights


def aux_latents(d_in: int) -> int:
    """Return how many dead latents aux-k uses in a row: about half the columns, a power of two.

    Gao et al., appendix A.2.
    """
    return 2 ** round(math.log2(max(d_in / 2, 1)))


def column_scale(
    normalize: str, moments: ColumnMoments, typical: ColumnMoments | None = None
) -> Columns:
    """Return the factor of each raw column, `(d_in,)`, so that the mean variance is 1.

    - `std`: every column has variance 1. The default: it stays the same if A is multiplied and B
      divided by a number, and no column can drown the others.
    - `none`: raw columns.

    Variances are those of `typical` rows, if they are given: without the first token of each text,
    which in many models is an attention sink, with values far beyond all others (Xiao et al. 2023,
    arXiv 2309.17453). A column with one value in all rows gets 0. Raises ArtifactError if all do.
    """
    if moments.constant.all():
        raise ArtifactError("every column of the store is constant, so there is nothing to learn")
    std = moments.std if typical is None else np.where(typical.constant, moments.std, typical.std)
    factor = np.where(moments.constant, 0.0, 1.0)
    if normalize == "std":
        factor = np.divide(factor, std, out=factor, where=~moments.constant)
    variance = np.square(factor * std)[factor > 0].mean()
    return factor / math.sqrt(variance)
