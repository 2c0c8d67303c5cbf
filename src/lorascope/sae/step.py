"""The gradients of the loss (`objective.py`), computed from the pairs that fire.

The encoder's product is the only dense one. The rule keeps `k` of the scores of each row, and
everything else uses these pairs alone:

1. `x_hat = gather_sum(values, latents, W_dec) + b_dec`. A matryoshka sums prefix by prefix: the
   bags are (row, part of the dictionary), and a prefix is the sum of the parts up to it.
2. `G` is the gradient of the reconstructions; the gradient of a value is `pair_dot(G, W_dec)`.
3. The gradient of a decoder row is the sum of `value * G` over the rows in which the latent fires;
   the gradient of an encoder row is the sum of `gradient * (x - b_dec)`. Both are `gather_sum`. All
   gradients take the pairs ordered by latent, so that a row of a matrix is read once.
4. Aux-k revives dead latents (`objective.py`, step 4). `_revive_dead` is dense in the dead latents,
   which are few. CUDA graphs need shapes that do not depend on how many are dead, so there
   `_revive_static` takes the `k_aux` best of all latents in each row, with the living ones at
   minus infinity.

In a job of several processes each has its rows of the batch. The choice is made over the best
scores of all processes and the gradients are summed, so they are those of one process with the
whole batch.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lorascope import kernels
from lorascope.kernels import cpu
from lorascope.kernels.prefilter import Prefilter
from lorascope.sae.objective import AUX_ROWS, JUMP_WEIGHT, JUMP_WIDTH, LEAST_SPREAD, Loss, Weights
from lorascope.sae.sparsity import Rule
from lorascope.sae.team import Team


@dataclass
class Step:
    """Computes a step's gradients: what is fixed in a run, and memory that every step reuses.

    `static` keeps every shape independent of the data, for a CUDA graph.
    """

    rule: Rule
    k_aux: int
    auxk_alpha: float
    team: Team
    static: bool = False
    _ends: Tensor | None = field(default=None, repr=False)
    _scores: Tensor | None = field(default=None, repr=False)
    _guess: float | None = field(default=None, repr=False)
    _prefilter: Prefilter = field(default_factory=Prefilter, repr=False)

    @torch.no_grad()
    def take(
        self,
        weights: Weights,
        x: Float[Tensor, "batch d_in"],
        dead: Bool[Tensor, "latent"],
        *,
        by_row: bool = False,
    ) -> Loss:
        """Write the gradients into the weights' `.grad` and return the loss of the batch.

        `x` is this process's part of the batch.
        """
        kernel = kernels.for_device(x.device)
        n_rows = self.team.share(len(x))[1]
        mean = self.team.sum(x.sum(0)) / n_rows
        spread = self.team.sum((x - mean).square().sum())
        spread = spread.clamp(min=LEAST_SPREAD * n_rows * x.shape[1])
        centred = x - weights.b_dec
        by_row = by_row or self.rule.architecture == "topk"
        rows, latents, scores = self._pairs(weights, centred, by_row)
        d_sae, code = len(weights.b_enc), scores
        threshold = None
        if weights.log_threshold is not None:
            threshold = weights.log_threshold.exp()
            code = code * (code > threshold[latents])

        prefixes = self.rule.prefixes(d_sae)
        bags = rows
        if len(prefixes) > 1:
            if self._ends is None:
                self._ends = torch.tensor(prefixes, device=x.device)
            bags = rows * len(prefixes) + torch.bucketize(latents, self._ends, right=True)
        offsets = kernel.row_offsets(bags, len(x) * len(prefixes))
        decoded = kernel.gather_sum(code, latents, offsets, weights.W_dec)
        decoded = decoded.view(len(x), len(prefixes), x.shape[1])
        if len(prefixes) > 1:
            decoded = decoded.cumsum(1)
        errors = decoded + weights.b_dec - x[:, None]  # (batch, prefix, d_in)
        to_prefix = errors * (2 / (spread * len(prefixes)))
        to_part = to_prefix.flip(1).cumsum(1).flip(1) if len(prefixes) > 1 else to_prefix
        flat = to_part.reshape(-1, x.shape[1])  # (batch * prefix, d_in)

        order, starts = kernel.by_latent(latents, d_sae)
        latents, bags, code = latents[order], bags[order], code[order]
        rows = rows[order] if len(prefixes) > 1 else bags
        fires = code != 0
        to_code = kernel.pair_dot(weights.W_dec, latents, flat, bags)
        to_pre = to_code * fires
        to_decoder = kernel.gather_sum(code, bags, starts, flat)
        to_encoder = kernel.gather_sum(to_pre, rows, starts, centred)
        to_bias = torch.zeros_like(weights.b_enc).index_add_(0, latents, to_pre)
        to_threshold = None
        l0 = self.team.sum(fires.sum().to(x.dtype)) / n_rows
        if threshold is not None:
            near = (scores[order] - threshold[latents]).abs() < JUMP_WIDTH / 2
            from_l0 = 2 * JUMP_WEIGHT * (l0 / self.rule.k - 1) / (self.rule.k * n_rows)
            through = (threshold[latents] * to_code + from_l0) * near / -JUMP_WIDTH
            to_threshold = torch.zeros_like(threshold).index_add_(0, latents, through)
            to_threshold *= threshold

        auxk = x.new_zeros(())
        if self.auxk_alpha and (self.static or bool(dead.any())):
            own = slice(-self.team.share(len(x))[0] % AUX_ROWS, None, AUX_ROWS)
            share = n_rows / -(-n_rows // AUX_ROWS)
            factor = 2 * self.auxk_alpha * share / spread
            revive = _revive_static if self.static else _revive_dead
            revival = revive(weights, centred[own], errors[own, -1], dead, self.k_aux, factor)
            auxk = self.team.sum(revival.error) * share / spread
            revival.add_to(to_encoder, to_decoder, to_bias, torch.isfinite(auxk))
            auxk = auxk.nan_to_num(0.0, 0.0, 0.0)
        to_mean = to_part[:, 0].sum(0) - to_bias @ weights.W_enc.T
        if weights.log_threshold is not None and to_threshold is not None:
            weights.log_threshold.grad = self.team.sum(to_threshold)
        weights.W_enc.grad = self.team.sum(to_encoder).T
        weights.b_enc.grad = self.team.sum(to_bias)
        weights.W_dec.grad = self.team.sum(to_decoder)
        weights.b_dec.grad = self.team.sum(to_mean)

        fvu = self.team.sum(errors[:, -1].square().sum()) / spread
        fired = torch.zeros_like(dead, dtype=torch.int32)
        fired.index_add_(0, latents, fires.int())
        return Loss(fvu=fvu, auxk=auxk, l0=l0, fired=self.team.sum(fired) > 0)

    def _product(self, weights: Weights, centred: Tensor) -> Float[Tensor, "batch latent"]:
        """Return the scores, `centred @ W_enc + b_enc`."""
        shape = (len(centred), len(weights.b_enc))
        if self._scores is None or self._scores.shape != shape:
            self._scores = centred.new_empty(shape)
        product = kernels.for_device(centred.device).product
        return product(centred, weights.W_enc.T, self._scores).add_(weights.b_enc)

    def _pairs(
        self, weights: Weights, centred: Tensor, by_row: bool
    ) -> tuple[Int64[Tensor, "pair"], Int64[Tensor, "pair"], Float[Tensor, "pair"]]:
        """Choose what fires; with learned thresholds, everything that gets a gradient.

        Returns rows, latents and scores, ordered by row and latent.
        """
        kernel, bias = kernels.for_device(centred.device), weights.b_enc
        k, n = math.ceil(self.rule.k), round(self.rule.k * self.team.share(len(centred))[1])
        is_too_many = k != self.rule.k if by_row else self.team.world > 1
        if weights.log_threshold is not None:
            bound, is_too_many = weights.log_threshold.exp() - JUMP_WIDTH / 2, False
            best = kernel.indices_above(self._product(weights, centred), bound)
        elif kernel is cpu and cpu.multiplies_bytes(centred.device, centred.dtype):
            encoder = weights.W_enc.T
            if by_row:
                best = self._prefilter.best_of_rows(centred, encoder, bias, k)
            else:
                best = self._prefilter.best_indices(centred, encoder, bias, n)
        elif by_row:
            best = kernel.best_of_rows(self._product(weights, centred), k)
        else:
            best = kernel.best_indices(self._product(weights, centred), n, guess=self._guess)
            self._guess = best.guess
        if is_too_many:
            best = self._best_of_all(best, n)
        rows = best.indices // len(bias)
        return rows, best.indices - rows * len(bias), best.values

    def _best_of_all(self, best: Any, n: int) -> Any:
        """Keep those of this process's best that are among the `n` best of all processes."""
        parts = self.team.gather(best.values)
        every = torch.cat(parts)[None]  # by rank, so in the order of the whole batch's indices
        kept = kernels.for_device(every.device).best_indices(every, n)
        own, values = kept.indices, kept.values  # padding on CUDA has value 0 there
        if self.team.world > 1:
            own = own - sum(len(part) for part in parts[: self.team.rank])
            is_own = (own >= 0) & (own < len(best.values))
            own, values = own[is_own], values[is_own]
        return best._replace(indices=best.indices[own], values=values)


@dataclass(frozen=True)
class _Revival:
    """Aux-k's squared error and the gradients of the weights' rows `latents` (None: all rows)."""

    error: Float[Tensor, ""]
    latents: Int64[Tensor, "dead"] | None
    encoder: Float[Tensor, "dead d_in"]
    decoder: Float[Tensor, "dead d_in"]
    bias: Float[Tensor, "dead"]

    def add_to(self, encoder: Tensor, decoder: Tensor, bias: Tensor, finite: Tensor) -> None:
        """Add the gradients to those of all weights if the loss is finite."""
        for total, own in ((encoder, self.encoder), (decoder, self.decoder), (bias, self.bias)):
            usable = own.masked_fill_(~finite, 0.0)
            if self.latents is None:
                total.add_(usable)
            else:
                total.index_add_(0, self.latents, usable)


def _revive_dead(
    weights: Weights,
    centred: Float[Tensor, "row d_in"],
    errors: Float[Tensor, "row d_in"],
    dead: Bool[Tensor, "latent"],
    k_aux: int,
    factor: Float[Tensor, ""],
) -> _Revival:
    """Return aux-k's error and gradients from dense products with the dead latents.

    `errors` is the reconstruction minus the rows. The gradients are those of the squared error
    times `factor / 2`.
    """
    latents = dead.nonzero()[:, 0]
    scores = centred @ weights.W_enc[:, latents] + weights.b_enc[latents]
    values, chosen = scores.topk(min(k_aux, len(latents)), sorted=False)
    code = torch.zeros_like(scores).scatter_(1, chosen, values)
    W_dec = weights.W_dec[latents]
    missed = code @ W_dec + errors
    out = missed * factor
    to_pre = torch.where(code != 0, out @ W_dec.T, 0.0)
    return _Revival(
        error=missed.square().sum(),
        latents=latents,
        encoder=to_pre.T @ centred,
        decoder=code.T @ out,
        bias=to_pre.sum(0),
    )


def _revive_static(
    weights: Weights,
    centred: Float[Tensor, "row d_in"],
    errors: Float[Tensor, "row d_in"],
    dead: Bool[Tensor, "latent"],
    k_aux: int,
    factor: Float[Tensor, ""],
) -> _Revival:
    """Return the same as `_revive_dead`, with shapes that do not depend on the number of dead."""
    kernel, n_rows, W_dec = kernels.for_device(dead.device), len(centred), weights.W_dec
    scores = centred @ weights.W_enc + weights.b_enc
    scores.masked_fill_(~dead, -torch.inf)
    best = scores.topk(min(k_aux, len(dead)), sorted=False)
    width = best.indices.shape[1]
    latents = best.indices.flatten()
    values = torch.where(dead[latents], best.values.flatten(), 0.0)
    offsets = torch.arange(n_rows + 1, device=latents.device) * width
    rows = torch.arange(n_rows, device=latents.device).repeat_interleave(
        width, output_size=n_rows * width
    )
    missed = kernel.gather_sum(values, latents, offsets, W_dec) + errors
    out = missed * factor
    to_pre = kernel.pair_dot(out, rows, W_dec, latents) * (values != 0)
    order, starts = kernel.by_latent(latents, len(dead))
    return _Revival(
        error=torch.where(dead.any(), missed.square().sum(), 0.0),
        latents=None,
        encoder=kernel.gather_sum(to_pre[order], rows[order], starts, centred),
        decoder=kernel.gather_sum(values[order], rows[order], starts, out),
        bias=torch.zeros_like(weights.b_enc).index_add_(0, latents, to_pre),
    )
