"""Run the adapter's rollouts with other rows written at every site, and say what they recover.

Rows are *held*: each site gets the row that is written, whatever it would read. In the **open
loop** the SAE reads the rows of the adapter's own run. In the **closed loop** it reads the rows of
the run that it is part of. A code needs all sites of a token, but the sites run one after the
other, so the loop is closed by passes:

1. Pass 1 is the open loop.
2. Pass n writes the reconstruction of the rows that the sites of pass n − 1 read: what `A·x` gave
   there, in answer to the rows that were written before.

If the passes settled, the rows that are encoded would be those of the run itself. `change` says how
far they are from that.

Parts of the adapter are rebuilt **alone**, while the others keep their rows. Sites may make up for
each other's errors, so that a part of them alone loses more than all of them. `worst_subset`
searches for the subset of sites whose reconstruction has the largest KL:

1. Begin with all sites. `m` is 1 for a site that is rebuilt, 0 for one that keeps its row.
2. Run `x + m·(x̂ − x)` and take the gradient of the KL by `m`. To first order, to flip a site
   changes the KL by `(1 − 2m)·gradient`.
3. Flip the sites that promise most, at first half of all. If the KL has risen, go on from there;
   else flip half as many.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.causal.effects import (
    Sums,
    Values,
    bootstrap_interval,
    kl_and_loss,
    log_probabilities,
    ratio_of_sums,
    recovered,
    select_measured,
    sum_by,
)
from lorascope.causal.gradients import input_gradients
from lorascope.causal.held_out import Batch, HeldOut
from lorascope.causal.removals import adapter_parts
from lorascope.causal.report_records import (
    GroupRecovered,
    Recovered,
    RoleRecovered,
    RunRecovered,
    SubsetRecovered,
    TokensRecovered,
)
from lorascope.sae.model import SAE
from lorascope.sites import SiteLayout
from lorascope.subject.intervene import RowEditor
from lorascope.texts.roles import has_role

PASSES = 3  # of the closed loop, the open one included
_ABOVE_FLOOR = 10.0  # times the floor: a smaller effect has no meaningful share
_COPIES = 4  # times the memory of a plain run that a gradient takes


class Compared(NamedTuple):
    """KL to the adapter and CE of each measured token of a run, in nats."""

    kl: Values
    ce: Values


class SplicedBatch:
    """One batch of the adapter's run, and runs of the same batch with other rows.

    `x` are the adapter's rows in the given columns, `(batch, seq, d_in)`; `read` those in all
    columns. Columns that are not given keep the adapter's rows.
    """

    def __init__(self, editor: RowEditor, batch: Batch, columns: npt.NDArray[np.int64]) -> None:
        out = editor.run(batch.token_ids)
        self._editor, self._batch, self._columns = editor, batch, columns
        self.read, self.x = out.rows, out.rows[..., columns]
        self.log_p = log_probabilities(select_measured(out.logits, batch.mask))
        self._targets = batch.targets[batch.mask].to(self.log_p.device)

    def adapter(self) -> Compared:
        """Return what the adapter's run gives: KL is 0."""
        loss = -self.log_p.gather(-1, self._targets[:, None])[:, 0].cpu().numpy()
        return Compared(np.zeros_like(loss), loss)

    def base(self) -> Float[Tensor, "token vocab"]:
        """Return the logits of the base model."""
        return select_measured(self._editor.base(self._batch.token_ids), self._batch.mask)

    def compared(self, logits: Float[Tensor, "token vocab"]) -> Compared:
        """Return what the logits of a run give."""
        kl, ce = kl_and_loss(self.log_p, logits, self._targets)
        return Compared(kl.cpu().numpy(), ce.cpu().numpy())

    def written(self, rows: Float[Tensor, "batch seq d_in"]) -> Compared:
        """Return what a run gives in which `rows` are written."""
        return self.compared(self.run(rows)[0])

    def closed_loop(
        self,
        rebuild: Callable[[Tensor], Tensor],
        first: Float[Tensor, "batch seq d_in"],
        scale: Float[Tensor, "d_in"],
    ) -> tuple[Compared, Compared, tuple[float, float]]:
        """Return what the open and the closed loop give, and the change of the last pass.

        `first` are the rows that the open loop writes, `rebuild(x)`. The change is `Σ‖after −
        before‖²` and `Σ‖before‖²` of the rows that were read, columns times `scale`.
        """
        logits, rows = self.run(first)
        opened = self.compared(logits)
        before = self.x
        for _ in range(PASSES - 1):
            before = rows
            logits, rows = self.run(rebuild(before))
        own = self._batch.own.to(rows.device)
        step, size = (
            ((part * scale)[own]).double().square().sum() for part in (rows - before, before)
        )
        return opened, self.compared(logits), (float(step), float(size))

    def run(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Run the batch with `rows` written.

        Return the logits at the measured tokens, `(token, vocab)`, and the rows that were read.
        """
        whole = self.read.clone()
        whole[..., self._columns] = rows
        out = self._editor.run(self._batch.token_ids, lambda here, _: whole[..., here])
        return select_measured(out.logits, self._batch.mask), out.rows[..., self._columns]


class Shares:
    """Sums over tokens, as shares with intervals.

    `values` has KL and CE of the measured `rows` for each run, in nats. A run is a name, or `(kind,
    group, how)`; `zero` is the run of share 0, `rounding` the floor.
    """

    def __init__(
        self,
        held_out: HeldOut,
        rows: npt.NDArray[np.int64],
        values: Mapping[Any, Compared],
        *,
        zero: str,
        rounding: float,
        seed: int,
    ) -> None:
        _, self._rollout = np.unique(held_out.store.rollout_of(rows), return_inverse=True)
        self.n_rollouts = int(self._rollout.max(initial=-1)) + 1
        self.role = held_out.role_of(rows)
        self.generated = held_out.is_generated(rows)
        self._values, self._zero, self._rounding, self._seed = values, zero, rounding, seed

    def interval(self, run: str) -> tuple[float, float] | None:
        """Return the interval of a run's KL in nats a token, 0 or more."""
        everywhere = np.ones(len(self.role), bool)
        n = self._sums(np.ones(len(self.role), np.float32), everywhere)
        edges = bootstrap_interval(self._sums(self._values[run].kl, everywhere), n, self._seed)
        return None if edges is None else (max(edges[0], 0.0), max(edges[1], 0.0))

    def of_run(self, run: str, l0: float | None) -> RunRecovered:
        """Return what a run with `l0` values a token recovers, of all tokens and generated ones."""
        everything = np.ones(len(self.role), bool)
        generated = self._over(run, self.generated) if self.generated.any() else None
        return RunRecovered(**vars(self._over(run, everything)), generated=generated, l0=l0)

    def of_role(self, number: int) -> RoleRecovered:
        """Return what the SAE's run recovers over the tokens of one role."""
        where = self.role == number
        return RoleRecovered(
            **vars(self._recovered("sae", self._zero, where)),
            n_tokens=int(where.sum()),
            kl_zero=float(self._values[self._zero].kl[where].mean(dtype=np.float64)),
        )

    def of_group(self, kind: str, name: str) -> GroupRecovered:
        """Return what the SAE recovers of the columns of one group: of generated tokens, if any."""
        where = self.generated if self.generated.any() else ~self.generated
        share = self._recovered((kind, name, "sae"), (kind, name, "zero"), where)
        removed = self._recovered((kind, name, "zero"), self._zero, where).kl
        if removed <= _ABOVE_FLOOR * self._rounding:
            share = Recovered(kl=share.kl, recovered=None, recovered_interval=None)
        return GroupRecovered(**vars(share), kl_zero=removed)

    def of_subset(self, name: str, sites: tuple[str, ...]) -> SubsetRecovered:
        """Return the same of a subset of the sites."""
        how = "worst" if name == "worst" else "drawn"
        return SubsetRecovered(**vars(self.of_group("subsets", name)), how=how, sites=sites)

    def _over(self, run: str, where: npt.NDArray[np.bool_]) -> TokensRecovered:
        ce, best, worst = (
            self._sums(self._values[name].ce, where) for name in (run, "adapter", self._zero)
        )
        conditional = self._recovered(run, "constant", where)
        return TokensRecovered(
            **vars(self._recovered(run, self._zero, where)),
            conditional=conditional.recovered,
            conditional_interval=conditional.recovered_interval,
            ce=float(ce.sum()) / int(where.sum()),
            ce_recovered=ratio_of_sums(worst - ce, worst - best),
            ce_recovered_interval=bootstrap_interval(worst - ce, worst - best, self._seed),
        )

    def _recovered(self, run: Any, reference: Any, where: npt.NDArray[np.bool_]) -> Recovered:
        kl, below = (self._sums(self._values[name].kl, where) for name in (run, reference))
        return recovered(kl, below, int(where.sum()), self._seed)

    def _sums(self, values: Values, where: npt.NDArray[np.bool_]) -> Sums:
        return sum_by(self._rollout[where], values[where], self.n_rollouts)


def of_all_batches(parts: Mapping[Any, Sequence[Compared]]) -> dict[Any, Compared]:
    """Return each run's tokens of all batches."""
    return {
        name: Compared(*map(np.concatenate, zip(*some, strict=True)))
        for name, some in parts.items()
    }


def column_groups(layout: SiteLayout) -> dict[tuple[str, str], npt.NDArray[np.bool_]]:
    """Return a mask of the columns, `(d_in,)`, of each layer and of each projection."""
    return {
        (f"{kind}s", part.name): part.columns.numpy()
        for kind in ("layer", "projection")
        for part in adapter_parts(layout)
        if part.kind == kind
    }


def sites_in(layout: SiteLayout, mask: npt.NDArray[np.bool_]) -> tuple[str, ...]:
    """Return the names of the sites whose columns are in a mask, `(d_in,)`."""
    sites = zip(layout.sites, layout.slices, strict=True)
    return tuple(site.name for site, columns in sites if mask[columns].all())


def subsets(
    held_out: HeldOut, sae: SAE, n: int, seed: int
) -> dict[tuple[str, str], npt.NDArray[np.bool_]]:
    """Return a mask of the columns, `(d_in,)`, of `n` random subsets of the sites and of the worst.

    A subset has each site with probability 1/2. Nothing is searched for or returned for n = 0.
    """
    if not n:
        return {}
    ranks = [site.rank for site in sae.layout.sites]
    drawn = np.random.default_rng([seed, len(ranks)]).random((n, len(ranks))) < 0.5
    drawn[~drawn.any(1)] = True
    masks = {("subsets", str(i)): mask for i, mask in enumerate(drawn)}
    masks["subsets", "worst"] = worst_subset(held_out, sae, n)
    return {key: np.repeat(mask, ranks) for key, mask in masks.items()}


def worst_subset(held_out: HeldOut, sae: SAE, n_steps: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the sites whose reconstruction alone has the largest KL that was found.

    The KL is that of generated tokens, or of all if no token is generated.
    """
    _, columns = held_out.subject.layout.select(sae.layout.adapter_types)
    ranks = [site.rank for site in sae.layout.sites]
    n_sites = len(ranks)
    size = max(1, n_sites // 2)
    mask = np.ones(n_sites, bool)
    site = torch.repeat_interleave(torch.arange(n_sites), torch.tensor(ranks))
    of_all = not has_role(held_out.store.roles, ("think", "answer")).any()
    with RowEditor(held_out.subject) as editor:

        def measured(mask: npt.NDArray[np.bool_]) -> tuple[float, npt.NDArray[np.float64]]:
            total, gradient = 0.0, np.zeros(n_sites)
            for batch in held_out.batches(_COPIES):
                with torch.no_grad():
                    spliced = SplicedBatch(editor, batch, columns)
                    rebuilt = sae.decode(sae.encode(spliced.x.cpu())).to(spliced.x.device)
                m = torch.from_numpy(mask).float().requires_grad_()
                part = m[site].to(rebuilt.device)
                counts = torch.from_numpy(held_out.is_generated(batch.measured) | of_all)
                logits, _ = spliced.run(spliced.x + part * (rebuilt - spliced.x))
                counts = counts.to(rebuilt.device)
                log_q = logits[counts].float().log_softmax(-1)
                log_p = spliced.log_p[counts]
                kl = (log_p.exp() * (log_p - log_q).nan_to_num(0.0)).sum()
                gradient += input_gradients(held_out.subject, kl, [m])[0].double().numpy()
                total += float(kl.detach())
            return total, gradient

        kl, gradient = measured(mask)
        for _ in range(n_steps - 1):
            gain = np.where(mask, -gradient, gradient)
            flips = [i for i in np.argsort(-gain, kind="stable")[:size] if gain[i] > 0]
            trial = mask.copy()
            trial[flips] = ~trial[flips]
            if not flips or not trial.any():
                break
            trial_kl, trial_gradient = measured(trial)
            if trial_kl > kl:
                mask, kl, gradient = trial, trial_kl, trial_gradient
            elif len(flips) == 1:
                break
            else:
                size = len(flips) // 2
    return mask
