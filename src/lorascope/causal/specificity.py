"""Estimate the effect of removing each feature from gradients, and say which features are specific.

A rollout's rows are held, so its predictions are a function of them. One forward pass and 32
backward passes serve all features, all controls and all rollouts of a batch; a control is another
direction, of the norm of the feature's decoder row in the SAE's units, written with its values at
its tokens.

1. Size. Removing `δ = value · direction` changes the predictions by KL ≈ ½ δᵀFδ, with `F` the
   Fisher information of the rows. Draw a token `w_t` at each position t from the adapter's own
   prediction; then F is the mean of `G Gᵀ`, with `G = ∇ Σ_t log p_t(w_t)`, over such draws: scores
   of different positions are independent, of mean 0.
2. Pull. At each token the adapter raises one token's probability most: the largest term of
   KL(adapter ‖ base). `pull` is the gradient, along the feature's values, of the sum of log p of
   these tokens over the tokens at which the feature fires; its product with a direction is how much
   log p falls if that is removed. To leave out the other tokens, each pass sums every 16th token
   with random signs, and counts with the signs at the feature's own tokens: the mean is exact.
3. Controls are differences of two rows of the store, drawn at random, and for the size decoder rows
   of other features too.
4. Verdict. If a feature's direction were one of the controls', its pull would be as likely in any
   rank among theirs: `p = (1 + number of controls that pull as much) / (1 + number of controls)`.
   A feature is *specific* if it is chosen at a false discovery rate of 5 % (Benjamini and Hochberg
   1995) among all features that fire at 3 tokens or more. The interval of its excess over the
   controls is at the level at which it is chosen (Benjamini and Yekutieli 2005): it lies above 0
   exactly if the feature is specific.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.causal.gradients import fitting_graph, input_gradients
from lorascope.causal.held_out import Batch, HeldOut
from lorascope.causal.removals import HeldChange
from lorascope.causal.report_records import Verdict
from lorascope.sae.model import SAE
from lorascope.subject.intervene import RowEditor

RATE = 0.05  # of false discoveries
FEWEST = 3  # firings of a feature that is judged
_PASSES = 16  # backward passes for the size, and as many for the pull
_N_SIZES = 32  # controls of each kind for the size
_GRADIENT_BYTES = 1 << 28  # of all passes of a batch, on the CPU
_BLOCK = 256  # features that are compared with all controls at a time

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """The pull of one feature at each of its firings, its excess over the controls', in nats."""

    verdict: Verdict
    pull: float | None = None
    p: float | None = None
    interval: tuple[float, float] | None = None


class Specificity:
    """Sums over rollouts for every latent: `kl` and its controls', `pull`, firings.

    `n_fired` are firings where a token is predicted, `n_here` those where a usual one is.
    """

    def __init__(self, editor: RowEditor, held_out: HeldOut, sae: SAE, seed: int) -> None:
        self.editor, self.held_out, self.sae, self.seed = editor, held_out, sae, seed
        _, self.columns = held_out.subject.layout.select(sae.layout.adapter_types)
        self._number = {int(index): i for i, index in enumerate(held_out.rollouts)}
        self.kl = np.zeros((sae.d_sae, len(self._number)))  # by rollout
        self.kl_controls = np.zeros((sae.d_sae, 2 * _N_SIZES))
        self.pull = torch.zeros(sae.d_sae, sae.d_in)
        self.n_fired, self.n_here = np.zeros((2, sae.d_sae), np.int64)
        rng = np.random.default_rng([seed, 0])
        rows = row_differences(sae.narrow(held_out.store), sae, _N_SIZES, rng)
        other = unit_directions(sae.W_dec.cpu()[rng.integers(0, sae.d_sae, _N_SIZES)], sae)
        self._sizes = torch.cat([rows, other])  # (control, d_in)
        self._norms = (sae.W_dec * sae.scale).norm(dim=1).cpu()

    def code(
        self, numbers: npt.NDArray[np.int64], rows: Float[Tensor, "seq d_in"]
    ) -> Float[Tensor, "seq latent"]:
        """Return the dense code of rows with these numbers: 0 where nothing is removed."""
        code = self.sae.encode_dense(rows[:, self.columns].cpu())
        return code * self.held_out.is_read(self.sae, numbers)[:, None]

    def removal(self, code: Float[Tensor, "seq latent"], latent: int) -> HeldChange:
        """Return the change that subtracts `value · decoder row` from the rows of a rollout."""
        positions = code[:, latent].nonzero()[:, 0]
        layout, values = self.held_out.subject.layout, code[positions, latent]
        return HeldChange.removal(self.sae, layout, latent, positions, values)

    def run(self) -> None:
        """Add the gradients of every held-out rollout."""
        held_out, fitting = self.held_out, fitting_graph(self.held_out.subject)
        kept = _GRADIENT_BYTES // (2 * _PASSES * 4 * self.sae.d_in)  # tokens
        copies = max(1, -(-held_out.batch_tokens // max(1, min(fitting, kept))))
        batches = list(held_out.batches(copies))
        with runtime.progress(len(batches), "estimates", "batches") as bar:
            for batch in batches:
                self.add(batch, lean=batch.token_ids.numel() > fitting)
                bar.update(1)

    def add(self, batch: Batch, *, lean: bool = False) -> None:
        """Add the gradients of a batch of rollouts, or of windows of them.

        `lean` computes activations again in the backward passes.
        """
        usual = batch.mask.clone()
        usual[batch.mask] = self.held_out.is_usual(batch.measured)
        rows = self.editor.run(batch.token_ids).rows
        signs, gradients = self._gradients(batch, rows, usual, lean)
        first = batch.rows[:, 0].numpy()
        indices = self.held_out.store.rollout_of(first).tolist()
        for i, n in enumerate(batch.own.sum(1).tolist()):
            code = self.code(batch.rows[i, :n].numpy(), rows[i, :n])
            self.n_fired += (code[batch.mask[i, :n]] > 0).sum(0).numpy()
            number = self._number[indices[i]]
            self._add_rollout(number, code, usual[i, :n], signs[:, i, :n], gradients[:, i, :n])

    def _add_rollout(
        self, number: int, whole: Tensor, usual: Tensor, signs: Tensor, gradients: Tensor
    ) -> None:
        """Add one rollout, given its code and the gradients of all passes, `(pass, seq, d_in)`."""
        latents = (whole > 0).any(0).nonzero()[:, 0]
        code = whole[:, latents]
        along = torch.einsum("nf,snd->sfd", code, gradients)
        dec, norms = self.sae.W_dec.cpu()[latents], self._norms[latents]
        half = 0.5 / _PASSES
        kl = half * (along[:_PASSES] * dec).sum(-1).square().sum(0)
        controls = half * (along[:_PASSES] @ self._sizes.T).square().sum(0) * norms[:, None] ** 2
        self.kl[latents, number] += kl.double().numpy()
        self.kl_controls[latents] += controls.double().numpy()
        here = (code > 0) & usual[:, None]
        self.pull[latents] += torch.einsum("sf,sfd->fd", signs @ here.float(), along[_PASSES:])
        self.n_here[latents] += here.sum(0).numpy()

    def _gradients(
        self, batch: Batch, rows: Tensor, usual: Tensor, lean: bool
    ) -> tuple[Float[Tensor, "pass batch seq"], Float[Tensor, "both batch seq d_in"]]:
        """Return the signs of the passes for the pull, and the gradients of all, on the CPU.

        The passes for the size come first. What is drawn for a rollout does not depend on the
        others of its batch.
        """
        ids, at, subject = batch.token_ids, usual.to(rows.device), self.held_out.subject
        base = self.editor.base(ids)[at].float().log_softmax(-1)
        every = torch.arange(ids.shape[1]) % _PASSES == torch.arange(_PASSES)[:, None]
        signs, tokens = torch.zeros(_PASSES, *ids.shape), []
        with torch.enable_grad():
            leaf = rows.clone().requires_grad_()
            log_p = self.editor.run(ids, held=leaf, lean=lean).logits[at].float().log_softmax(-1)
            given = log_p.detach()
            p = given.exp()
            of_rollout = p.cpu().split(usual.sum(1).tolist())
            for i, n in enumerate(batch.own.sum(1).tolist()):
                seed = self.seed * 1_000_003 + int(batch.rows[i, 0])
                generator = torch.Generator().manual_seed(seed)
                drawn = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1
                signs[:, i, :n] = every[:, :n] * drawn
                if len(of_rollout[i]):
                    tokens.append(
                        of_rollout[i].multinomial(_PASSES, replacement=True, generator=generator)
                    )
            signs *= usual
            drawn_tokens = torch.cat([torch.zeros(0, _PASSES, dtype=torch.long), *tokens])
            raised = (p * torch.where(p > 0, given - base, 0)).argmax(-1, keepdim=True)
            sums = torch.cat(
                [
                    log_p.gather(1, drawn_tokens.to(log_p.device)).sum(0),
                    signs[:, usual].to(log_p.device) @ log_p.gather(1, raised)[:, 0],
                ]
            )
            gradients = [
                input_gradients(subject, one, [leaf], keep_graph=True)[0][..., self.columns].cpu()
                for one in sums
            ]
        return signs, torch.stack(gradients)

    def judge(self, latents: npt.NDArray[np.int64]) -> list[Judgement]:
        """Return the verdict of each of these latents, corrected for their number."""
        counts = self.n_here[latents]
        tested = latents[counts >= FEWEST]
        n_controls = max(1, round(len(tested) / RATE)) - 1
        if not n_controls:
            return [Judgement("too few firings")] * len(latents)
        store, rng = self.sae.narrow(self.held_out.store), np.random.default_rng([self.seed, 1])
        controls = row_differences(store, self.sae, n_controls, rng)
        found = judge(
            self.pull[tested] / torch.from_numpy(self.n_here[tested])[:, None],
            self.sae.W_dec.cpu()[tested],
            controls,
            self._norms[tested],
        )
        by_latent = dict(zip(tested.tolist(), found, strict=True))
        return [by_latent.get(i, Judgement("too few firings")) for i in latents.tolist()]


def judge(
    pull: Float[Tensor, "feature d_in"],
    directions: Float[Tensor, "feature d_in"],
    controls: Float[Tensor, "control d_in"],
    norms: Float[Tensor, "feature"],
) -> list[Judgement]:
    """Do step 4 for each feature: `controls` are of norm 1, and are made as long as its direction.

    With `n / RATE − 1` controls for n features the smallest p passes the correction.
    """
    own = (pull * directions).sum(1).double().numpy()
    n, n_controls = len(own), len(controls)
    if not n_controls:
        return [Judgement("not distinguishable", float(x)) for x in own]

    def blocks() -> Iterator[tuple[slice, Floats]]:
        for first in range(0, n, _BLOCK):
            at = slice(first, first + _BLOCK)
            yield at, ((pull[at] @ controls.T) * norms[at, None]).double().numpy()

    p = np.empty(n)
    for at, theirs in blocks():
        p[at] = (1 + (theirs >= own[at, None]).sum(1)) / (1 + n_controls)
    ranked = np.sort(p)
    passed = np.flatnonzero(ranked <= RATE * np.arange(1, n + 1) / n)
    level = RATE * max(1, passed[-1] + 1 if len(passed) else 1) / n
    edge = max(1, int(level * (1 + n_controls) + 1e-9))  # controls beyond each end of the interval
    found: list[Judgement] = []
    for at, theirs in blocks():
        theirs.partition([edge - 1, n_controls - edge], axis=1)
        low, high = own[at] - theirs[:, n_controls - edge], own[at] - theirs[:, edge - 1]
        found += [
            Judgement(
                "specific" if value <= level * (1 + 1e-9) else "not distinguishable",
                float(x),
                float(value),
                (float(a), float(b)),
            )
            for value, x, a, b in zip(p[at], own[at], low, high, strict=True)
        ]
    return found


def unit_directions(directions: Float[Tensor, "n d_in"], sae: SAE) -> Float[Tensor, "m d_in"]:
    """Return directions at norm 1 in the SAE's units; those of norm 0 are left out."""
    directions = directions * (sae.scale.cpu() > 0)
    norms = (directions * sae.scale.cpu()).norm(dim=1, keepdim=True)
    return directions[norms[:, 0] > 0] / norms[norms[:, 0] > 0]


def row_differences(
    store: ActivationStore, sae: SAE, n: int, rng: np.random.Generator
) -> Float[Tensor, "n d_in"]:
    """Return differences of two rows of text tokens, at norm 1 in the SAE's units.

    Fewer than `n` only if hardly any two rows differ, as those of a constant adapter.
    """
    text = np.flatnonzero(store.eligible)
    found = torch.zeros(0, sae.d_in)
    if not len(text):
        return found
    for _ in range(100):  # equal rows have no difference
        pairs = text[rng.integers(0, len(text), (2, n - len(found)))]
        first, second = (torch.from_numpy(store.take(rows).astype(np.float32)) for rows in pairs)
        found = torch.cat([found, unit_directions(first - second, sae)])
        if len(found) == n:
            break
    return found
