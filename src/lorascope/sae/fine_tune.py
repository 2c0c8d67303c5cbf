"""Fine-tune an SAE on what its reconstruction does to the model's output (`--objective kl`).

1. Replay a batch of training rollouts with the adapter: rows `x` and next-token probabilities.
2. Choose the sites to splice: all of them in even steps, each with probability 1/2 in odd ones.
   With all sites only, a site could learn to compensate for the error of another.
3. Run the batch again with `x_hat` of the rows of step 1 at these sites, and `x` at the others. The
   backward pass runs each decoder layer once more, so only their inputs are kept.
4. The loss is `KL(adapter || spliced) / KL_0 + 4 · objective / objective_0`: the mean over
   generated tokens (think and answer; all tokens if there are none), and the loss of training
   (`objective.py`) on the batch's rows, which keeps the reconstruction, the L0 and the latents
   alive. The divisors are the values of the first batches before the first step, so the terms
   start at 1 and 4 whatever the adapter.
5. The trainer does the rest: Adam, unit decoder rows, log, checkpoint.

Batches, their order and the choice of sites follow from the seed and the step alone, and the
divisors from the SAE that fine-tuning starts with, so a resumed run continues exactly.
"""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorascope.activations.replay import Batch, Replay
from lorascope.sae.objective import Loss, Weights, aux_latents, objective
from lorascope.sae.sparsity import Rule
from lorascope.subject.intervene import RowEditor
from lorascope.texts.roles import ROLES

log = logging.getLogger(__name__)

LR = 5e-4  # peak; docs/training.md compares rates and weights
BATCH_TOKENS = 1024
_WEIGHT = 4.0  # of the loss of training
_GENERATED = tuple(ROLES.index(role) for role in ("think", "answer"))
_N_FIRST = 8  # batches whose losses divide the terms
_LEAST = 1e-6  # least divisor: an exact SAE has nothing to learn, and rounding errors must not grow


@dataclass
class SplicedStep:
    """Computes the gradients of a step in place of `step.Step`.

    Call `read` before each `take`: it replays the step's batch and returns its scaled rows.
    """

    editor: RowEditor
    replay: Replay
    scale: Float[Tensor, "d_in"]
    constant: Float[Tensor, "d_in"]  # raw values of the columns with scale 0
    rule: Rule
    seed: int
    auxk_alpha: float
    divisors: tuple[float, float] = (1.0, 1.0)
    _batches: list[Batch] = field(default_factory=list, repr=False)
    _read: tuple[Batch, Tensor, Tensor] | None = field(default=None, repr=False)
    _step: int = 0

    def __post_init__(self) -> None:
        self._batches = list(self.replay.batches())
        layout = self.replay.store.layout
        _, self._columns = self.replay.subject.layout.select(layout.adapter_types)
        self._site = torch.repeat_interleave(torch.tensor([site.rank for site in layout.sites]))

    @property
    def n_batches(self) -> int:
        """Number of batches in one pass over the rollouts."""
        return len(self._batches)

    def n_tokens(self, step: int) -> int:
        """Return how many tokens the steps before `step` have read, nearly."""
        return round(step / self.n_batches * self.replay.n_tokens)

    def read(self, step: int) -> Float[Tensor, "tok d_in"]:
        """Replay the batch of a step with the adapter; return its scaled rows."""
        epoch, index = divmod(step, self.n_batches)
        order = np.random.default_rng([self.seed, 3, epoch]).permutation(self.n_batches)
        batch = self._batches[order[index]]
        with torch.no_grad():
            out = self.editor.run(batch.token_ids)
            self.replay.require_rows(batch, out.rows)
            log_p = out.logits[self._aimed_at(batch)].float().log_softmax(-1)
        self._read, self._step = (batch, out.rows, log_p), step
        return out.rows[batch.own.to(out.rows.device)][:, self._columns] * self.scale

    def take(
        self,
        weights: Weights,
        x: Float[Tensor, "tok d_in"],
        dead: Bool[Tensor, "latent"],
        *,
        by_row: bool = False,
    ) -> Loss:
        """Write the gradients into the weights' `.grad` and return the loss of the batch."""
        rebuilt = objective(
            weights,
            x,
            self.rule,
            dead,
            k_aux=aux_latents(x.shape[1]),
            auxk_alpha=self.auxk_alpha,
            by_row=by_row,
        )
        assert rebuilt.x_hat is not None, "objective gives it"
        kl = self._kl(rebuilt.x_hat)
        total = kl / self.divisors[0] + _WEIGHT * rebuilt.total / self.divisors[1]
        for tensor in weights.tensors().values():
            tensor.grad = None
        total.backward()
        return Loss(**{**vars(rebuilt), "total": total.detach(), "kl": kl.detach(), "x_hat": None})

    def measure_divisors(self, weights: Weights, dead: Bool[Tensor, "latent"]) -> None:
        """Set the divisors: the mean of both terms over the first batches, with these weights."""
        sums = torch.zeros(2, dtype=torch.float64)
        for step in range(_N_FIRST):
            loss = self.take(weights, self.read(step), dead)  # the divisors are 1
            assert loss.kl is not None, "take() measures it"
            sums += torch.stack([loss.kl, (loss.total - loss.kl) / _WEIGHT]).double().cpu()
        first = (sums / _N_FIRST).clamp(min=_LEAST).tolist()
        self.divisors = (first[0], first[1])
        log.info("before fine-tuning: KL %.4g nats a token, spliced; loss of training %.4g", *first)

    def _kl(self, x_hat: Float[Tensor, "tok d_in"]) -> Float[Tensor, ""]:
        """Return the mean divergence of the spliced run, with a gradient to `x_hat`."""
        assert self._read is not None, "read() comes before take()"
        batch, rows, log_p = self._read
        raw = torch.where(self.scale > 0, x_hat / self.scale, self.constant)
        own = batch.own.to(rows.device)
        read = rows[own]
        mixed = read.clone()
        mixed[:, self._columns] = torch.where(
            self._spliced().to(raw.device), raw, read[:, self._columns]
        )
        whole = torch.zeros_like(rows)
        whole[own] = mixed
        out = self.editor.run(batch.token_ids, held=whole, lean=True)
        log_q = out.logits[self._aimed_at(batch)].float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def _aimed_at(self, batch: Batch) -> Bool[Tensor, "batch seq"]:
        """Return the positions whose predictions count."""
        mask = batch.mask.clone()
        predicted = self.replay.role_of(batch.measured)
        generated = torch.from_numpy(np.isin(predicted, _GENERATED))
        if generated.any():
            mask[batch.mask] = generated
        return mask.to(self.replay.subject.device)

    def _spliced(self) -> Bool[Tensor, "d_in"]:
        """Return which columns are spliced in this step."""
        if self._step % 2 == 0:
            return torch.ones_like(self._site, dtype=torch.bool)
        drawn = np.random.default_rng([self.seed, 4, self._step]).random(int(self._site[-1]) + 1)
        return torch.from_numpy(drawn < 0.5)[self._site]
