"""Find the features behind a prediction: contributions of features, by gradients of the rows.

1. For every token of some rollouts: how far the adapter's prediction is from the base model's, as
   KL and as the rise of the log-probability of the token that follows, and the likeliest tokens of
   both.
2. For the tokens with the highest KL in each rollout, or those that you name: what each feature at
   each earlier token contributed to the prediction (`gradients`). The contributions of features,
   of the SAE's bias, of what it leaves unexplained and of rows that it does not read add up to the
   effect of the whole adapter; `completeness` says how far they miss it.
3. `removal` is the first-order effect of removing a feature: the gradient at the adapter's rows.
4. In some rollouts every feature is really removed, and `agreement` compares both numbers with the
   real effect.

In: adapter, activation store, SAE. Out: a report (JSON); the table goes to stderr.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope.activations.store import ActivationStore
from lorascope.causal.attribution_report import ComparedRollout, TokenAttribution, summarize, table
from lorascope.causal.effect_options import AttributeConfig
from lorascope.causal.effects import cross_entropy, kl_divergence, likeliest, select_measured
from lorascope.causal.gradients import (
    RowDecomposition,
    Targets,
    fitting_graph,
    no_weight_gradients,
    path_gradients,
)
from lorascope.causal.held_out import Batch, HeldOut, describe_run, open_held_out
from lorascope.causal.removals import HeldChange, held_runs
from lorascope.causal.report_records import AttributionReport
from lorascope.causal.study import Made, report_at
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.index import FeatureIndex
from lorascope.sae.model import SAE, load_sae
from lorascope.subject.intervene import RowEditor


def run(config: AttributeConfig) -> Path:
    """Explain single predictions by features, and return the report's file (JSON).

    Contributions are in the units of the target: nats for a KL or a log-probability, logits for a
    difference of logits. A finished report of the same settings is kept. Raises ArtifactError if
    inputs do not belong together.
    """
    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.sae, store)
    chosen = _chosen_rollouts(config, store)

    def make() -> Made:
        held_out = open_held_out(config, sae)
        if chosen:
            # Of an index, all rollouts are compared, which is fast, and only the first explained.
            n = config.max_rollouts if config.rollouts_of is None else None
            held_out = replace(held_out, rollouts=np.array(chosen)[:n])
        report = measure(held_out, sae, config)
        return Made(report, held_out.subject.layout, describe_run(held_out, config.sae))

    return report_at(
        config.output,
        AttributionReport,
        settings={**config.settings(), "rollouts": [int(store.rollout_id[i]) for i in chosen]},
        parents={"activations": store.digest, "sae": sae.digest},
        overwrite=config.overwrite,
        make=make,
        table=table,
    )


def _chosen_rollouts(config: AttributeConfig, store: ActivationStore) -> list[int]:
    """Return the indices of the rollouts that the config names; empty for the held-out ones."""
    ids = config.rollouts
    if config.rollouts_of is not None:
        index = FeatureIndex.open(config.rollouts_of)
        if index.manifest.parents.get("activations") != store.digest:
            raise ArtifactError(
                f"{config.rollouts_of} was made from another store than {config.data_dir}; give "
                "its store with --data-dir"
            )
        ids = tuple(int(rollout) for rollout in index.text_rollout)
    index_of = {int(rollout): i for i, rollout in enumerate(store.rollout_id)}
    missing = [rollout for rollout in ids if rollout not in index_of]
    if missing:
        raise ConfigError(
            f"{config.data_dir} has no rollout {missing[0]}; it has {store.n_rollouts}, with ids "
            f"from {int(store.rollout_id.min())} to {int(store.rollout_id.max())}"
        )
    return [index_of[rollout] for rollout in ids]


def measure(held_out: HeldOut, sae: SAE, config: AttributeConfig) -> AttributionReport:
    """Run the rollouts, explain tokens of each, and return the report."""
    with RowEditor(held_out.subject, fast=True) as editor, no_weight_gradients(held_out.subject):
        study = _Study(editor, held_out, sae, config)
        study.compare()
        study.explain()
    return summarize(
        list(study.rollouts.values()),
        study.attributions,
        held_out.store.vocabulary,
        sae.d_sae,
        config,
    )


class _Study:
    """The numbers of each rollout: first of all its tokens, then of those to explain."""

    def __init__(
        self, editor: RowEditor, held_out: HeldOut, sae: SAE, config: AttributeConfig
    ) -> None:
        self.editor, self.held_out, self.sae, self.config = editor, held_out, sae, config
        start = held_out.store.rollout_start
        self.start = {int(i): int(start[i]) for i in held_out.rollouts}
        self.rollouts = {
            i: ComparedRollout.of_length(
                int(held_out.store.rollout_id[i]), int(start[i + 1]) - first
            )
            for i, first in self.start.items()
        }
        self.attributions: list[TokenAttribution] = []

    @torch.no_grad()
    def compare(self) -> None:
        """Do step 1: compare adapter and base at every token."""
        for rollout, batch in self.held_out.alone("compare"):
            out, base_logits = self.editor.run(batch.token_ids), self.editor.base(batch.token_ids)
            self.held_out.require_rows(batch, out.rows)
            adapter = select_measured(out.logits, batch.mask)
            base = select_measured(base_logits, batch.mask)
            targets = batch.targets[batch.mask].to(adapter.device)
            position = batch.measured - self.start[rollout] + 1
            kl = kl_divergence(adapter, base)
            rise = cross_entropy(base, targets) - cross_entropy(adapter, targets)
            compared, (ids, p) = self.rollouts[rollout], likeliest(adapter, base)
            compared.numbers[:, position] = torch.stack([kl, rise]).cpu().numpy()
            compared.usual[position] = self.held_out.is_usual(batch.measured).numpy()
            n = ids.shape[1]
            compared.likely_id[position, :n] = ids.cpu().numpy()
            compared.likely_p[:, position, :n] = p.cpu().numpy()

    def explain(self) -> None:
        """Do steps 2 to 4 at the tokens to explain."""
        explained = list(self.start)[: self.config.max_rollouts]
        positions = {i: self._positions_to_explain(i) for i in explained}
        checked = set(list(self.start)[: self.config.check_rollouts])
        for rollout, batch in self.held_out.alone("attribute"):
            position = batch.measured - self.start[rollout] + 1
            is_target = np.isin(position, positions.get(rollout, ()))
            here = np.flatnonzero(batch.mask[0].numpy())[is_target]
            if len(here):
                self._explain(rollout, batch, torch.from_numpy(here) + 1, rollout in checked)

    def _positions_to_explain(self, rollout: int) -> npt.NDArray[np.int64]:
        """Return the positions that the config names, or those of highest KL."""
        kl, usual = self.rollouts[rollout].numbers[0], self.rollouts[rollout].usual
        if self.config.positions:
            beyond = [position for position in self.config.positions if position >= len(kl)]
            if beyond:
                raise ConfigError(f"--positions has {beyond[0]}, the rollout has {len(kl)} tokens")
            return np.array(self.config.positions)
        kl = np.where(usual, kl, -1)
        order = np.argsort(-kl, kind="stable")[: self.config.tokens]
        return order[kl[order] >= 0]

    def _explain(self, rollout: int, batch: Batch, positions: Tensor, is_checked: bool) -> None:
        """Add the attributions of the tokens at `positions` of the batch's rollout or window."""
        ids, store = batch.token_ids, self.held_out.store
        with torch.no_grad():
            out, base = self.editor.run(ids), self.editor.base(ids)
            zeroed = self.editor.run(ids, held=torch.zeros_like(out.rows)).logits
            targets = Targets.at(self.config.target, positions, ids, base)
            y, y_base = (
                targets.values(logits[0, targets.positions - 1]).cpu()
                for logits in (out.logits, zeroed)
            )
            rows = out.rows[0]
            _, columns = self.held_out.subject.layout.select(self.sae.layout.adapter_types)
            read = self.held_out.is_read(self.sae, batch.rows[0].numpy())
            parts = RowDecomposition(self.sae, rows, columns, read)
            removed = self._remove_each(ids, rows, parts, targets, y) if is_checked else None
        first = int(batch.rows[0, 0]) - self.start[rollout]  # position of the window
        kept_tokens = fitting_graph(self.held_out.subject)
        for group in targets.groups():
            along, at_end = path_gradients(
                self.editor, ids, rows, group, self.config.steps, kept_tokens
            )
            contributions = parts.firing_contributions(along)
            removals = parts.firing_contributions(at_end)
            others, by_row = parts.other_contributions(along), parts.row_contributions(along)
            for i, position in enumerate(group.positions.tolist()):
                number = int((positions == position).nonzero())
                self.attributions.append(
                    TokenAttribution(
                        rollout=int(store.rollout_id[rollout]),
                        token=first + position,
                        text=store.vocabulary.text([group.tokens[i]]),
                        adapter=float(y[number]),
                        base=float(y_base[number]),
                        others={name: float(values[i]) for name, values in others.items()},
                        row_contributions=by_row[i].numpy(),
                        first=first,
                        latents=parts.latent.numpy(),
                        sources=parts.position.numpy() + first,
                        contributions=contributions[i].numpy(),
                        removals=removals[i].numpy(),
                        removed=None if removed is None else removed[:, number].numpy(),
                    )
                )

    def _remove_each(
        self, ids: Tensor, rows: Tensor, parts: RowDecomposition, targets: Targets, y: Tensor
    ) -> Tensor:
        """Return how much of `y` is lost when each latent is removed, `(fired, target)`."""
        n, order = int(targets.positions.max()), targets.positions.argsort()
        sorted_targets, changes, numbers = targets.take(order), [], []
        layout = self.held_out.subject.layout
        for number, latent in enumerate(parts.fired.tolist()):
            firings = (parts.latent == latent) & (parts.position < n)
            if firings.any():  # else nothing before a target changes
                positions, values = parts.position[firings], parts.value[firings]
                changes.append(HeldChange.removal(self.sae, layout, latent, positions, values))
                numbers.append(number)
        lost = torch.zeros(len(parts.fired), len(targets))
        at = sorted_targets.positions - 1
        runs = held_runs(self.editor, self.held_out, ids[:, :n], rows[:n], changes, logits_at=at)
        for chunk, start, logits in runs:
            after = (at >= start).nonzero()[:, 0]
            values = sorted_targets.take(after).values(logits).cpu()
            here = order[after].cpu()
            lost[torch.tensor(numbers)[chunk][:, None], here] = y[here] - values
        return lost
