"""The subject with its adapter, and the rollouts that an SAE never saw.

The SAE's manifest says which rollouts of the store its training held out and did not calibrate on.
For a store that it was not trained on, all rollouts are used. `activations/replay.py` runs them.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool
from torch import Tensor

from lorascope import runtime
from lorascope.activations.batches import halves, split_rows
from lorascope.activations.replay import Batch, Replay, fitting_tokens, load_subject_of
from lorascope.activations.store import ActivationStore
from lorascope.causal.effect_options import EffectOptions
from lorascope.texts.roles import ROLES, SPECIAL, has_role

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

__all__ = ["Batch", "HeldOut", "describe_run", "held_out_rollouts", "open_held_out"]

log = logging.getLogger(__name__)


class HeldOut(Replay):
    """The rollouts to run are those that an SAE never saw."""

    def alone(self, label: str) -> Iterator[tuple[int, Batch]]:
        """Yield each rollout, or window of one, in its own batch, after the rollout's index.

        `label` names the progress bar.
        """
        batches = list(self.batches(copies=self.batch_tokens))
        with runtime.progress(len(batches), label, "rollouts") as bar:
            for batch in batches:
                yield int(self.store.rollout_of(batch.rows[0, :1].numpy())[0]), batch
                bar.update(1)

    def is_read(self, sae: "SAE", rows: npt.NDArray[np.int64]) -> Bool[Tensor, "seq"]:
        """Return which rows are of a role that the SAE was trained on; default: all."""
        roles = sae.manifest.settings.get("roles", ROLES)
        return torch.from_numpy(has_role(self.store.roles[rows], roles))

    def is_usual(self, measured: npt.NDArray[np.int64]) -> Bool[Tensor, "measured"]:
        """Return which measured rows predict a token that is not special."""
        return torch.from_numpy(self.role_of(measured) != SPECIAL)

    def is_generated(self, measured: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which measured rows predict a token that the model writes: think or answer."""
        return has_role(self.role_of(measured), ("think", "answer"))


def describe_run(held_out: HeldOut, sae: Path | None) -> dict[str, Any]:
    """Return what a report's manifest says of the run: names, dtype and batch size."""
    return {
        "sae_name": None if sae is None else sae.name,
        "adapter_name": held_out.subject.adapter.name,
        "compute_dtype": str(held_out.subject.dtype).removeprefix("torch."),
        "batch_tokens": held_out.batch_tokens,
    }


def open_held_out(config: EffectOptions, sae: "SAE | None") -> HeldOut:
    """Load the subject of a store, and choose the rollouts to run.

    Raises ArtifactError when adapter, base and store do not belong together.
    """
    store = ActivationStore.open(config.data_dir)
    subject = load_subject_of(store, config, device=config.device, dtype=config.dtype)
    rollouts = np.arange(store.n_rollouts) if sae is None else held_out_rollouts(sae, store)
    rollouts = rollouts[: config.max_rollouts]
    return HeldOut(subject, store, rollouts, config.batch_tokens or fitting_tokens(subject))


def held_out_rollouts(sae: "SAE", store: ActivationStore) -> npt.NDArray[np.int64]:
    """Return the indices of the rollouts that the SAE's own report measures.

    They are the rollouts that training held out, without the half that set the threshold. If the
    SAE was trained on another store or by another tool, return all rollouts and log a warning.
    """
    settings, parents = sae.manifest.settings, sae.manifest.parents
    known = {"holdout", "data_seed"} <= settings.keys()
    if not known or parents.get("activations") != store.digest:
        log.warning(
            "the SAE was not trained on %s: all %d rollouts are used; they are held out only if "
            "its training never saw them",
            store.path,
            store.n_rollouts,
        )
        return np.arange(store.n_rollouts)
    _, held = split_rows(
        store, settings["holdout"], settings["data_seed"], settings.get("roles", ())
    )
    return np.unique(store.rollout_of(halves(store, held)[1]))
