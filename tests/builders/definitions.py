"""What training and its kernels compute, by plain definitions, for any dtype.

Nothing here is optimised. Ties and order are part of the definitions.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lorascope.sae.objective import (
    AUX_ROWS,
    JUMP_WEIGHT,
    JUMP_WIDTH,
    LEAST_SPREAD,
    Loss,
    Weights,
)
from lorascope.sae.sparsity import Rule


def best_indices(scores: Float[Tensor, "batch latent"], n: int) -> Int64[Tensor, "pair"]:
    """Return the flat indices, rising, of the `n` largest positive scores.

    Ties go to the lower index. Returns fewer than `n` if fewer scores are positive.
    """
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:n]
    return order[flat[order] > 0].sort().values


def gather_sum(
    values: Float[Tensor, "pair"],
    index: Int64[Tensor, "pair"],
    offsets: Int64[Tensor, "bag_plus_1"],
    table: Float[Tensor, "entry d"],
) -> Float[Tensor, "bag d"]:
    """Return for each bag the sum of `values[p] * table[index[p]]` over its pairs.

    Bag i holds the pairs `[offsets[i], offsets[i + 1])`. With rows as bags and `W_dec` as table
    this decodes; with latents as bags and rows as table it is the gradient of a weight matrix.
    """
    bags = torch.repeat_interleave(offsets.diff())
    out = table.new_zeros(len(offsets) - 1, table.shape[1])
    return out.index_add(0, bags, values[:, None] * table[index])


def pair_dot(
    left: Float[Tensor, "left d"],
    left_index: Int64[Tensor, "pair"],
    right: Float[Tensor, "right d"],
    right_index: Int64[Tensor, "pair"],
) -> Float[Tensor, "pair"]:
    """Return the inner product of `left[left_index[p]]` and `right[right_index[p]]` of each pair.

    `left_index` rises. With the gradient of the rows as left and `W_dec` as right this is the
    gradient of a code's values.
    """
    return (left[left_index] * right[right_index]).sum(1)


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in latent"],
    b_enc: Float[Tensor, "latent"],
    threshold: Float[Tensor, "latent"],
) -> Float[Tensor, "batch latent"]:
    """Return the dense code that `encoder.Encoder` computes: scores above their thresholds."""
    pre = x @ W_enc + b_enc
    return torch.where(pre > threshold, pre, 0.0)


@dataclass(frozen=True)
class DefinedLoss(Loss):
    """The loss, whose `total` carries a gradient."""

    total: Float[Tensor, ""]


@torch.no_grad()
def choose(
    scores: Float[Tensor, "batch latent"], rule: Rule, *, by_row: bool
) -> Bool[Tensor, "batch latent"]:
    """Return a mask of what fires, by the plain definition; for every rule except `jumprelu`.

    `by_row` chooses like `topk` whatever the rule. Only positive scores fire. Ties go to the lower
    flat index. If `k` has a fraction, `topk` takes the `ceil(k)` best of each row, and of these the
    `round(k * batch)` best of the batch.
    """
    fires = torch.zeros_like(scores, dtype=torch.bool)
    batch, flat = len(scores), fires.view(-1)
    if not by_row and rule.architecture != "topk":
        flat[best_indices(scores, round(rule.k * batch))] = True
        return fires
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order[:, : math.ceil(rule.k)]
    best = torch.zeros_like(scores).scatter_(1, order, scores.gather(1, order))
    flat[best_indices(best, round(rule.k * batch))] = True
    return fires


def objective(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    rule: Rule,
    dead: Bool[Tensor, "latent"],
    *,
    k_aux: int,
    auxk_alpha: float,
    by_row: bool = False,
) -> DefinedLoss:
    """Return the loss of a batch. `dead` marks the latents that aux-k should revive.

    `by_row` chooses what fires row by row, whatever the rule. Aux-k adds nothing if no latent is
    dead, and never a value that is not finite.
    """
    pre = (x - weights.b_dec) @ weights.W_enc + weights.b_enc
    from_l0 = pre.new_zeros(())
    if weights.log_threshold is not None:
        threshold = weights.log_threshold.exp()
        fires = pre > threshold
        code = _Jump.apply(pre, threshold)
        l0 = _Step.apply(pre, threshold).sum() / len(x)
        from_l0 = JUMP_WEIGHT * (l0 / rule.k - 1).square()
    else:
        fires = choose(pre, rule, by_row=by_row)
        code = pre * fires
    spread = (x - x.mean(0)).square().sum().clamp(min=LEAST_SPREAD * x.numel())
    losses, residual = [], x
    for prefix in rule.prefixes(pre.shape[1]):
        residual = x - code[:, :prefix] @ weights.W_dec[:prefix] - weights.b_dec
        losses.append(residual.square().sum() / spread)
    auxk = _auxk(weights, pre[::AUX_ROWS], residual[::AUX_ROWS].detach(), dead, k_aux)
    auxk = auxk * len(x) / len(pre[::AUX_ROWS]) / spread
    return DefinedLoss(
        total=sum(losses[1:], losses[0]) / len(losses) + auxk_alpha * auxk + from_l0,
        fvu=losses[-1].detach(),
        auxk=auxk.detach(),
        l0=fires.sum() / len(x),
        fired=fires.any(0),
    )


def _auxk(weights: Weights, pre: Tensor, residual: Tensor, dead: Tensor, k_aux: int) -> Tensor:
    """Return the squared error of the dead latents' reconstruction of the residual."""
    latents = dead.nonzero()[:, 0]
    if len(latents) == 0:
        return residual.new_zeros(())
    values, chosen = pre[:, latents].topk(min(k_aux, len(latents)), sorted=False)
    code = torch.zeros_like(pre[:, latents]).scatter(1, chosen, values)
    error = (residual - code @ weights.W_dec[latents]).square().sum()
    return error.nan_to_num(0.0, 0.0, 0.0)


class _Jump(torch.autograd.Function):
    """`pre * (pre > threshold)` with the pseudo-derivative of the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < JUMP_WIDTH / 2
        return grad * (pre > threshold), -(threshold / JUMP_WIDTH) * (grad * near).sum(0)


class _Step(torch.autograd.Function):
    """`pre > threshold` as a number, with the pseudo-derivative of the threshold alone."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < JUMP_WIDTH / 2
        return None, -(grad * near).sum(0) / JUMP_WIDTH
