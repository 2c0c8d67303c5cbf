"""Aux-k for a step: the loss that revives dead latents, and its gradients (objective.py, 4).

`by_dead` is dense in the dead latents, of which there are few. `by_pairs` is for CUDA graphs, where
no shape may depend on how many there are: a row's `k_aux` best of all latents, the living ones at
minus infinity.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lorascope import kernels
from lorascope.sae.objective import Weights


@dataclass(frozen=True)
class AuxK:
    """The rows that aux-k looks at, in this process, and what is known of them.

    `errors` is the reconstruction minus the rows. The gradients are those of the squared error of
    the revival times `factor / 2`.
    """

    weights: Weights
    centred: Float[Tensor, "row d_in"]
    errors: Float[Tensor, "row d_in"]
    k_aux: int
    factor: Float[Tensor, ""]


@dataclass(frozen=True)
class Revival:
    """The squared error, and the gradients of the rows `latents` of the weights (None: of all)."""

    error: Float[Tensor, ""]
    latents: Int64[Tensor, "dead"] | None
    encoder: Float[Tensor, "dead d_in"]
    decoder: Float[Tensor, "dead d_in"]
    bias: Float[Tensor, "dead"]

    def add_to(self, encoder: Tensor, decoder: Tensor, bias: Tensor, finite: Tensor) -> None:
        """Add the gradients to those of all weights, where the loss is finite."""
        for total, own in ((encoder, self.encoder), (decoder, self.decoder), (bias, self.bias)):
            usable = own.masked_fill_(~finite, 0.0)
            if self.latents is None:
                total.add_(usable)
            else:
                total.index_add_(0, self.latents, usable)


def by_dead(of: AuxK, dead: Bool[Tensor, "latent"]) -> Revival:
    """Return the revival by products with the dead latents alone."""
    latents = dead.nonzero()[:, 0]
    scores = of.centred @ of.weights.W_enc[:, latents] + of.weights.b_enc[latents]
    values, chosen = scores.topk(min(of.k_aux, len(latents)), sorted=False)
    code = torch.zeros_like(scores).scatter_(1, chosen, values)
    W_dec = of.weights.W_dec[latents]
    missed = code @ W_dec + of.errors
    out = missed * of.factor
    to_pre = torch.where(code != 0, out @ W_dec.T, 0.0)
    return Revival(
        missed.square().sum(), latents, to_pre.T @ of.centred, code.T @ out, to_pre.sum(0)
    )


def by_pairs(of: AuxK, dead: Bool[Tensor, "latent"]) -> Revival:
    """Return the revival by the chosen pairs; the number of the dead decides no shape."""
    kernel, n_rows, W_dec = kernels.for_device(dead.device), len(of.centred), of.weights.W_dec
    scores = of.centred @ of.weights.W_enc + of.weights.b_enc
    scores.masked_fill_(~dead, -torch.inf)
    best = scores.topk(min(of.k_aux, len(dead)), sorted=False)
    width = best.indices.shape[1]
    latents = best.indices.flatten()
    values = torch.where(dead[latents], best.values.flatten(), 0.0)
    counted = torch.arange(n_rows + 1, device=latents.device) * width
    rows = torch.arange(n_rows, device=latents.device).repeat_interleave(
        width, output_size=n_rows * width
    )
    missed = kernel.gather_sum(values, latents, counted, W_dec) + of.errors
    out = missed * of.factor
    to_pre = kernel.pair_dot(out, rows, W_dec, latents) * (values != 0)
    order, starts = kernel.by_latent(latents, len(dead))
    return Revival(
        torch.where(dead.any(), missed.square().sum(), 0.0),
        None,
        kernel.gather_sum(to_pre[order], rows[order], starts, of.centred),
        kernel.gather_sum(values[order], rows[order], starts, out),
        torch.zeros_like(of.weights.b_enc).index_add_(0, latents, to_pre),
    )
