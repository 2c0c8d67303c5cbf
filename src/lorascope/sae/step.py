"""The gradients of `objective`, by the pairs that fire.

The encoder's product is the only dense one. Of the `batch * latent` scores the rule keeps `k` a
row, and with these pairs alone:

1. `x_hat = gather_sum(values, latents, W_dec) + b_dec`, for a matryoshka prefix by prefix: the
   bags are (row, part of the dictionary), and a prefix is the sum of the parts up to it.
2. `G`, the gradient of the reconstructions; that of a value is `pair_dot(G, W_dec)`.
3. The gradient of a decoder row is the sum of `value * G` over the rows in which the latent fires,
   that of an encoder row the sum of `gradient * (x - b_dec)`: `gather_sum` with the pairs in the
   order of their latents.
4. Aux-k is in `auxk.py`.

In a job of several processes each has its rows of the batch. The choice is made over all of them
from every process's best scores, and the gradients are summed, so that they are those of one
process with the whole batch.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lorascope import kernels
from lorascope.kernels import cpu, prefilter
from lorascope.kernels.prefilter import Screen
from lorascope.runtime import Team
from lorascope.sae.auxk import AuxK, by_dead, by_pairs
from lorascope.sae.objective import AUX_ROWS, JUMP_WEIGHT, JUMP_WIDTH, LEAST_SPREAD, Loss, Weights
from lorascope.sae.sparsity import Rule


@dataclass(frozen=True)
class Pairs:
    """The places where a latent fires or may, in rising order of row and latent."""

    rows: Int64[Tensor, "pair"]
    latents: Int64[Tensor, "pair"]
    values: Float[Tensor, "pair"]


@dataclass
class Step:
    """How gradients are computed: what is fixed in a run, and the memory used again by each step.

    `bfloat16` takes the encoder's product in that type, from float32 weights; sums are float32.
    `static` lets no shape depend on the data, for a CUDA graph. `take` leaves the gradients in the
    weights' `.grad`.
    """

    rule: Rule
    k_aux: int
    auxk_alpha: float
    team: Team
    bfloat16: bool = False
    static: bool = False
    _ends: Tensor | None = field(default=None, repr=False)
    _scores: Tensor | None = field(default=None, repr=False)
    _guess: float | None = field(default=None, repr=False)
    _screen: Screen = field(default_factory=Screen, repr=False)

    @torch.no_grad()
    def take(
        self,
        weights: Weights,
        x: Float[Tensor, "batch d_in"],
        dead: Bool[Tensor, "latent"],
        *,
        by_row: bool = False,
    ) -> Loss:
        """Return the loss of a batch, of which `x` is this process's part, after its gradients."""
        kernel = kernels.for_device(x.device)
        n_rows = self.team.share(len(x))[1]
        mean = self.team.sum(x.sum(0)) / n_rows
        spread = self.team.sum((x - mean).square().sum())
        spread = spread.clamp(min=LEAST_SPREAD * n_rows * x.shape[1])
        centred = x - weights.b_dec
        pairs = self._pairs(weights, centred, by_row or self.rule.architecture == "topk")
        d_sae = len(weights.b_enc)
        threshold = None
        code = pairs.values
        if weights.log_threshold is not None:
            threshold = weights.log_threshold.exp()
            code = code * (code > threshold[pairs.latents])
        fires = code != 0

        prefixes = self.rule.prefixes(d_sae)
        bags = pairs.rows
        if len(prefixes) > 1:
            if self._ends is None:
                self._ends = torch.tensor(prefixes, device=x.device)
            part = torch.bucketize(pairs.latents, self._ends, right=True)
            bags = pairs.rows * len(prefixes) + part
        offsets = kernel.row_offsets(bags, len(x) * len(prefixes))
        parts = kernel.gather_sum(code, pairs.latents, offsets, weights.W_dec)
        made = parts.view(len(x), len(prefixes), x.shape[1]).cumsum(1)
        errors = made + weights.b_dec - x[:, None]  # (batch, prefix, d_in)
        to_prefix = errors * (2 / (spread * len(prefixes)))
        to_part = to_prefix.flip(1).cumsum(1).flip(1) if len(prefixes) > 1 else to_prefix
        flat = to_part.reshape(-1, x.shape[1])  # (batch * prefix, d_in)
        to_code = kernel.pair_dot(flat, bags, weights.W_dec, pairs.latents)
        to_pre = to_code * fires

        order, starts = kernel.by_latent(pairs.latents, d_sae)
        to_decoder = kernel.gather_sum(code[order], bags[order], starts, flat)
        to_encoder = kernel.gather_sum(to_pre[order], pairs.rows[order], starts, centred)
        to_bias = torch.zeros_like(weights.b_enc).index_add_(0, pairs.latents, to_pre)
        to_threshold = None
        l0 = self.team.sum(fires.sum().to(x.dtype)) / n_rows
        if threshold is not None:
            near = (pairs.values - threshold[pairs.latents]).abs() < JUMP_WIDTH / 2
            held = 2 * JUMP_WEIGHT * (l0 / self.rule.k - 1) / (self.rule.k * n_rows)
            through = (threshold[pairs.latents] * to_code + held) * near / -JUMP_WIDTH
            to_threshold = torch.zeros_like(threshold).index_add_(0, pairs.latents, through)
            to_threshold *= threshold

        auxk = x.new_zeros(())
        if self.auxk_alpha and (self.static or bool(dead.any())):
            mine = slice(-self.team.share(len(x))[0] % AUX_ROWS, None, AUX_ROWS)
            share = n_rows / -(-n_rows // AUX_ROWS)
            of = AuxK(
                *(weights, centred[mine], errors[mine, -1], self.k_aux),
                factor=2 * self.auxk_alpha * share / spread,
            )
            revival = by_pairs(of, dead) if self.static else by_dead(of, dead)
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

        unexplained = self.team.sum(errors.square().sum((0, 2))) / spread
        fired = torch.zeros_like(dead, dtype=torch.int32)
        fired.index_add_(0, pairs.latents, fires.int())
        fvu = unexplained[-1]
        total = unexplained.mean() + self.auxk_alpha * auxk
        if threshold is not None:
            total = total + JUMP_WEIGHT * (l0 / self.rule.k - 1).square()
        return Loss(total=total, fvu=fvu, auxk=auxk, l0=l0, fired=self.team.sum(fired) > 0)

    def _product(self, weights: Weights, centred: Tensor) -> Float[Tensor, "batch latent"]:
        """Return `centred @ W_enc` without `b_enc`, which is added to the few that matter."""
        encoder = weights.W_enc.T
        if self.bfloat16:
            centred, encoder = centred.bfloat16(), encoder.bfloat16()
        shape = (len(centred), len(encoder))
        if self._scores is None or self._scores.shape != shape:
            self._scores = centred.new_empty(shape)
        return kernels.for_device(centred.device).product(centred, encoder, self._scores)

    def _pairs(self, weights: Weights, centred: Tensor, by_row: bool) -> Pairs:
        """Choose what fires, and where thresholds are learned what may."""
        kernel, rule, bias = kernels.for_device(centred.device), self.rule, weights.b_enc
        k = rule.k if self.team.world == 1 else math.ceil(rule.k)
        n = round(rule.k * self.team.share(len(centred))[1])
        able = kernel is cpu and prefilter.is_faster(centred.device, centred.dtype)
        if weights.log_threshold is not None:
            bound = weights.log_threshold.exp() - JUMP_WIDTH / 2
            best = kernel.above(self._product(weights, centred), bound, bias=bias)
        elif able and not self.bfloat16:
            encoder = weights.W_enc.T
            if by_row:
                best = self._screen.best_of_rows(centred, encoder, bias, k, signed=rule.signed)
            else:
                best = self._screen.best_places(centred, encoder, bias, n, signed=rule.signed)
        elif by_row:
            pre = self._product(weights, centred).add_(bias)
            best = kernel.best_of_rows(pre, k, signed=rule.signed)
        else:
            pre, guess = self._product(weights, centred), self._guess
            best = kernel.best_places(pre, n, signed=rule.signed, bias=bias, guess=guess)
            self._guess = best.guess
        if self.team.world > 1 and weights.log_threshold is None:
            if not by_row:
                best = self._best_of_all(best, n)
            elif k != rule.k:
                best = self._fraction_of_all(best, len(centred), len(bias))
        rows = best.places // len(bias)
        return Pairs(rows, best.places - rows * len(bias), best.values.to(bias.dtype))

    def _fraction_of_all(self, best: Any, n_rows: int, width: int) -> Any:
        """Spend the fraction of `k` on the batch, of whose rows each has one score too many."""
        whole, rows = math.floor(self.rule.k), best.places // width
        order = best.values.abs().argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]  # by row, the best first
        place = torch.arange(len(order), device=order.device) - torch.searchsorted(rows, rows)
        last = torch.zeros_like(order, dtype=torch.bool)
        last[order[place == whole]] = True
        n = round((self.rule.k - whole) * self.team.share(n_rows)[1])
        some = best._replace(places=best.places[last], values=best.values[last])
        some = self._best_of_all(some, n)
        last &= ~torch.isin(best.places, some.places[some.values != 0])
        return best._replace(places=best.places[~last], values=best.values[~last])

    def _best_of_all(self, best: Any, n: int) -> Any:
        """Return those of this process's best that are among the `n` best of all processes."""
        parts = self.team.gather(best.values)
        every = torch.cat(parts)[None]  # by rank, so in the order of the whole batch's places
        kept = kernels.for_device(every.device).best_places(every, n, signed=self.rule.signed)
        first = sum(len(part) for part in parts[: self.team.rank])
        here = (kept.places >= first) & (kept.places < first + len(best.values))
        mine = kept.places[here] - first
        # the values are kept's: of the pads that fill up on CUDA, they are 0
        return best._replace(places=best.places[mine], values=kept.values[here])
