"""Measure how two adapters of one base differ, and which features of a joint dictionary do it.

A latent of a joint dictionary has one value at a token, and a part of its decoder row for each
adapter: what it stands for in that adapter's row. `Writes` has the size of what each part writes.

1. Both adapters read the same texts. The difference is `KL(first ‖ second)` of their predictions
   of what a model writes: in chats, from the opening of the first answer on, without what users
   say. Fine-tuning leaves other predictions to chance.
2. `y(a)` is KL(first ‖ a model on the way): the first adapter's rows at `1 - a` times what they
   are, and the second's at `a` times, both written into one model. `y(0)` is 0 and `y(1)` is the
   difference. The gradients by both rows, averaged over `a` from 0 to 1 (integrated gradients:
   Sundararajan et al. 2017), give each latent its contribution, `Σ value · (second part · G₂ −
   first part · G₁)`. Contributions of latents, of what rows share with the dictionary's bias, and
   of what it leaves unexplained add up to the difference. The way does not pass the base, so that
   they are as exact for a small difference as for a large one.
3. A latent that does the same in both adapters contributes nothing, whatever its parts are: what
   one part takes away, the other brings back. So it is no difference that two seeds store one
   function in other directions.
4. The latents of largest contribution are really *exchanged*: at the tokens where one fires, the
   second adapter's part is replaced by the first's, in the second's model. What the KL loses is
   what the latent explains. Several latents are exchanged together as well. Apart from that, each
   part is removed from its own adapter, which shows what it does there.
5. Chance: what the same firings would contribute if they wrote what other latents write, as much
   as the latent's two parts differ.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope import runtime
from lorascope.causal.effects import (
    kl_and_loss,
    kl_divergence,
    log_probabilities,
    select_measured,
    sum_by,
)
from lorascope.causal.gradients import fitting_graph, input_gradients
from lorascope.causal.held_out import Batch, HeldOut, require_rows_of
from lorascope.causal.openings import prompt_length
from lorascope.causal.removals import HeldChange, held_runs
from lorascope.causal.shifts import ShiftAccumulator
from lorascope.compare.writes import SideBySide, Writes
from lorascope.sae.model import SAE
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject
from lorascope.texts.roles import has_role

Floats = npt.NDArray[np.float64]
Pair = tuple[str, str]

BASE, ITSELF = "base", "itself"  # names of adapters are single letters or numbers
_N_CONTROLS = 64  # latents whose writes are tried at the firings of others
_COPIES = 4  # times the memory of a plain run that a batch takes


@dataclass
class Predictions:
    """KL in nats of each prediction, made at `rows`: `kl[a, b]` is KL(a ‖ b) of two adapters.

    `b` may be `BASE` too, or `ITSELF`: `a` with its rows changed by one rounding step. `written`
    marks the predictions of what a model writes; `shifts` of pairs are of these.
    """

    rows: npt.NDArray[np.int64]
    written: npt.NDArray[np.bool_]
    kl: dict[Pair, Floats]
    shifts: dict[Pair, ShiftAccumulator]


@dataclass
class Contributions:
    """What makes the difference of a pair, in nats, summed over the tokens of each rollout.

    `of_latent` is `(latent, rollout)`, `bias` and `unexplained` `(rollout,)`. `controls` is
    `(latent, control)` over all rollouts: what a latent's firings would contribute if they wrote
    what some other latents write.
    """

    of_latent: Floats
    bias: Floats
    unexplained: Floats
    controls: Floats


@dataclass
class Differences:
    """Adapters that run side by side on some rollouts of their joint store, and a dictionary."""

    subjects: Mapping[str, Subject]
    held_out: HeldOut
    sae: SAE
    editors: dict[str, RowEditor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = self.sae.layout
        self.columns = {name: torch.from_numpy(layout.columns_of(name)) for name in self.subjects}
        self.number = {int(index): i for i, index in enumerate(self.held_out.rollouts)}
        self.n_rollouts = len(self.number)
        self.written = written_rows(self.held_out)
        self.n_fired = np.zeros(self.sae.d_sae, np.int64)
        self.total = np.zeros(self.sae.d_sae)  # of values

    def __enter__(self) -> "Differences":
        with ExitStack() as stack:
            for name, subject in self.subjects.items():
                self.editors[name] = stack.enter_context(RowEditor(subject, fast=True))
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()
        self.editors.clear()

    def owners(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of each row's rollout among those that are run."""
        return np.array([self.number[i] for i in self.held_out.store.rollout_of(rows).tolist()])

    def _only_written(self, batch: Batch) -> Batch:
        """Return a batch in which only predictions of what a model writes are measured."""
        return replace(batch, mask=batch.mask & torch.from_numpy(self.written)[batch.rows])

    def _run(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the logits of each adapter, and their rows side by side."""
        outs = {name: editor.run(batch.token_ids) for name, editor in self.editors.items()}
        rows = torch.cat([out.rows for out in outs.values()], dim=-1)
        return {name: out.logits for name, out in outs.items()}, rows

    def _code(self, batch: Batch, rows: Tensor) -> Float[Tensor, "token latent"]:
        """Return the code of the batch's own tokens; zero where the dictionary does not read."""
        own = batch.rows[batch.own].numpy()
        code = self.sae.encode_dense(rows[batch.own.to(rows.device)].cpu())
        return code * self.held_out.is_read(self.sae, own)[:, None]

    @torch.no_grad()
    def predictions(self, pairs: Sequence[Pair]) -> Predictions:
        """Do step 1. Raises ArtifactError if rows are not those of the store."""
        found: dict[Pair, list[npt.NDArray[np.float32]]] = defaultdict(list)
        shifts = {pair: ShiftAccumulator() for pair in pairs}
        measured: list[npt.NDArray[np.int64]] = []

        def add(pair: Pair, log_p: Tensor, logits: Tensor, targets: Tensor) -> None:
            found[pair].append(kl_and_loss(log_p, logits, targets)[0].cpu().numpy())

        first = next(iter(self.editors.values()))
        eps = torch.finfo(first.subject.dtype).eps
        with runtime.progress(self.held_out.n_tokens, "compare", "tokens") as bar:
            for batch in self.held_out.batches(len(self.editors) + 1):
                outs, rows = self._run(batch)
                require_rows_of(self.held_out.store, batch, rows)
                code = self._code(batch, rows)
                self.n_fired += (code > 0).sum(0).numpy()
                self.total += code.double().sum(0).numpy()
                outs[BASE] = first.base(batch.token_ids)
                at = {name: select_measured(one, batch.mask) for name, one in outs.items()}
                log_p = {name: log_probabilities(at[name]) for name in self.editors}
                targets = batch.targets[batch.mask].to(at[BASE].device)
                here = self.written[batch.measured]
                at_written = torch.from_numpy(here).to(targets.device)
                roles = self.held_out.role_of(batch.measured)[here]
                for name, editor in self.editors.items():
                    add((name, BASE), log_p[name], at[BASE], targets)
                    own = rows[..., self.columns[name].to(rows.device)]
                    again = editor.run(batch.token_ids, held=own * (1 + eps)).logits
                    add((name, ITSELF), log_p[name], select_measured(again, batch.mask), targets)
                for one, other in pairs:
                    add((one, other), log_p[one], at[other], targets)
                    add((other, one), log_p[other], at[one], targets)
                    p, q = log_p[one][at_written], log_p[other][at_written]
                    shifts[one, other].add(p, q, batch.measured[here], roles)
                measured.append(batch.measured)
                bar.update(int(batch.own.sum()))
        rows = np.concatenate(measured)
        kl = {pair: np.concatenate(some).astype(np.float64) for pair, some in found.items()}
        return Predictions(rows, self.written[rows], kl, shifts)

    def contributions(self, pair: Pair, steps: int, seed: int) -> Contributions:
        """Do steps 2 and 5 for a pair of adapters."""
        d_sae, n = self.sae.d_sae, self.n_rollouts
        found = Contributions(
            np.zeros((d_sae, n)), np.zeros(n), np.zeros(n), np.zeros((d_sae, _N_CONTROLS))
        )
        columns = torch.cat([self.columns[name] for name in pair])
        W, bias = self.sae.W_dec[:, columns], self.sae.b_dec[columns]
        size, differ = self.writes.sizes(pair), self.writes.apart(*pair)
        alive = np.flatnonzero((self.n_fired > 0) & (size > 0))
        if not len(alive):
            return found
        drawn = np.random.default_rng([seed, d_sae]).choice(alive, _N_CONTROLS)
        others = W[drawn] / torch.from_numpy(size[drawn]).float()[:, None]
        others[:, : len(self.columns[pair[0]])] *= -1  # the first's gradient is that of taking away
        kept = fitting_graph(self.subjects[pair[0]])
        small = replace(self.held_out, batch_tokens=min(self.held_out.batch_tokens, kept))
        label = f"explain {' and '.join(pair)}"
        with self._both(pair) as both, runtime.progress(small.n_tokens, label, "tokens") as bar:
            for batch in map(self._only_written, small.batches(_COPIES)):
                with torch.no_grad():
                    logits, rows = self._run(batch)
                    code = self._code(batch, rows)
                    log_p = log_probabilities(select_measured(logits[pair[0]], batch.mask))
                own = rows[batch.own.to(rows.device)].cpu()[:, columns]
                ends = [rows[..., self.columns[name].to(rows.device)] for name in pair]
                gradient = self._gradient(both, batch, ends, log_p, steps, kept)
                numbers = batch.rows[batch.own].numpy()
                owner, read = self.owners(numbers), self.held_out.is_read(self.sae, numbers)
                left = torch.where(read[:, None], own - code @ W - bias, own) * gradient
                moved = (code * (gradient @ W.T)).double()
                torch.from_numpy(found.of_latent).index_add_(1, torch.from_numpy(owner), moved.T)
                found.bias += sum_by(owner, (gradient @ bias * read).double().numpy(), n)
                found.unexplained += sum_by(owner, left.double().sum(1).numpy(), n)
                found.controls += (code.T @ (gradient @ others.T)).double().numpy()
                bar.update(int(batch.own.sum()))
        found.controls *= differ[:, None]
        return found

    def _gradient(
        self,
        both: SideBySide,
        batch: Batch,
        ends: list[Tensor],
        log_p: Tensor,
        steps: int,
        kept: int,
    ) -> Float[Tensor, "token columns"]:
        """Return the gradient of the KL along the way, averaged over it, by the rows of both."""
        points, weights = np.polynomial.legendre.leggauss(steps)
        own = batch.own.to(log_p.device)
        out = log_p == -torch.inf
        p = log_p.masked_fill(out, 0)
        total = torch.zeros(int(own.sum()), sum(end.shape[-1] for end in ends))
        for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
            with torch.enable_grad():
                parts = [
                    (float(share) * end).requires_grad_()
                    for share, end in zip((1 - point, point), ends, strict=True)
                ]
                run = both.run(
                    batch.token_ids, held=torch.cat(parts, -1), lean=batch.own.numel() > kept
                )
                log_q = select_measured(run.logits, batch.mask).float().log_softmax(-1)
                kl = (log_p.exp() * (p - log_q.masked_fill(out, 0))).sum()
                of_first, of_second = input_gradients(both.subject, kl, parts)
            total += float(weight) * torch.cat([-of_first[own], of_second[own]], dim=-1).cpu()
        return total

    @torch.no_grad()
    def exchanges(self, pair: Pair, sets: Sequence[npt.NDArray[np.int64]]) -> Floats:
        """Return what KL(first ‖ second) loses by the exchange of sets of latents, in nats.

        `(set, rollout)`.
        """
        first, second = (self.sae.W_dec[:, self.columns[name]] for name in pair)
        with self._both(pair) as both:
            return -self._gains(both, pair, torch.cat([first, -second], 1), sets)

    @torch.no_grad()
    def removals(self, name: str, sets: Sequence[npt.NDArray[np.int64]]) -> Floats:
        """Return KL(adapter ‖ without) of sets of latents, in nats, `(set, rollout)`."""
        part = self.sae.W_dec[:, self.columns[name]]
        return self._gains(self.editors[name], (name,), -part, sets)

    def _gains(
        self,
        editor: RowEditor,
        names: Sequence[str],
        W: Float[Tensor, "latent columns"],
        sets: Sequence[npt.NDArray[np.int64]],
    ) -> Floats:
        """Return what KL(first ‖ last of the names) gains if sets of latents write `W` as well.

        `editor` runs the last; columns of `W` before its own are of an adapter that writes nothing.
        """
        found = np.zeros((len(sets), self.n_rollouts))
        label = f"change features of {' and '.join(names)}"
        for rollout, whole in self.held_out.alone(label) if sets else ():
            batch = self._only_written(whole)
            logits, rows = self._run(batch)
            code = self._code(batch, rows)
            own = rows[0][:, self.columns[names[-1]].to(rows.device)]
            own = torch.nn.functional.pad(own, (W.shape[1] - own.shape[1], 0))
            numbers, changes = [], []
            for number, latents in enumerate(sets):
                values = code[:, latents]
                at = (values > 0).any(1).nonzero()[:, 0]
                if len(at):
                    numbers.append(number)
                    changes.append(HeldChange(at, values[at] @ W[latents]))
            for chunk, start, others in held_runs(
                editor, self.held_out, batch.token_ids, own, changes, with_reference=True
            ):
                mask = batch.mask[0, start:].to(others.device)
                first = logits[names[0]][0, start:][mask]
                kl = [float(kl_divergence(first, q[mask]).double().sum()) for q in others]
                found[[numbers[i] for i in chunk], self.number[rollout]] += np.array(kl[1:]) - kl[0]
        return found

    def _both(self, pair: Pair) -> SideBySide:
        first, second = (self.subjects[name] for name in pair)
        return SideBySide(second, first)

    @cached_property
    def writes(self) -> Writes:
        """What the latents' parts write."""
        return Writes(self.subjects, self.sae)


def written_rows(held_out: HeldOut) -> npt.NDArray[np.bool_]:
    """Return which rows predict what a model writes, `(n_rows,)`; all, if no text has a role."""
    store = held_out.store
    generated = has_role(store.roles, ("think", "answer"))
    if not generated.any():
        return np.ones(store.n_rows, bool)
    predicted = np.zeros(store.n_rows, bool)  # by the token that is predicted
    for index in held_out.rollouts.tolist():
        first, last = store.rollout_start[index : index + 2].tolist()
        if generated[first:last].any():
            predicted[first + prompt_length(store, index) : last] = True
    predicted &= ~has_role(store.roles, ("system", "user"))
    return np.append(predicted[1:], False)
