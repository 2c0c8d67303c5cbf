"""The subject with its adapter, and the rollouts of a store that it runs again, in batches.

1. The subject is loaded in the store's gauge. Its adapter and base must be those of the store.
2. The SAE's manifest says which rollouts of the store its training held out and did not calibrate
   on: these are run. For a store that it was not trained on, all rollouts are.
3. Rollouts longer than the store's `longest` run in windows, as when their rows were captured.
4. Position t predicts token t + 1 and counts under the role of that token.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorascope import runtime
from lorascope.activations.batches import halves, split_rows
from lorascope.activations.capture import Piece, plan_pieces
from lorascope.activations.store import ActivationStore
from lorascope.artifact import read_manifest
from lorascope.causal.effect_options import EffectOptions
from lorascope.errors import ArtifactError
from lorascope.runtime import pick_device
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.options import AdapterOptions
from lorascope.texts.roles import ROLES, SPECIAL, has_role

if TYPE_CHECKING:
    from lorascope.sae.model import SAE
    from lorascope.subject.load import Subject

log = logging.getLogger(__name__)

_BATCH_TOKENS = 2048
_BATCH_LOGITS = 1 << 27  # 512 MB in float32; those of several runs are kept at once
_BATCH_COST = 16  # tokens that take as long as the start of a batch
_LARGEST_DRIFT = 0.05  # share of the rows' norm; computing in 16 bits causes about 0.01


@dataclass(frozen=True)
class Batch:
    """Rollouts of one forward pass, padded at their ends; every tensor is `(batch, seq)`.

    `mask` marks the positions to measure, `targets` are the tokens that they predict, `own` marks
    the positions that are not padding, `rows` are their row numbers (0 for padding).
    """

    token_ids: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    own: Bool[Tensor, "batch seq"]
    rows: Int[Tensor, "batch seq"]

    @property
    def measured(self) -> npt.NDArray[np.int64]:
        """Row numbers of the measured positions, in the order of `effects.select_measured`."""
        return self.rows[self.mask].numpy()


@dataclass(frozen=True)
class HeldOut:
    """A subject, a store of its rows, and the rollouts of the store to run, by their index.

    With an SAE, these are the rollouts that it never saw.
    """

    subject: "Subject"
    store: ActivationStore
    rollouts: npt.NDArray[np.int64]
    batch_tokens: int

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the rollouts."""
        return int(np.diff(self.store.rollout_start)[self.rollouts].sum())

    def batches(self, copies: int = 1) -> Iterator[Batch]:
        """Yield the rollouts in batches, longest first, so small that `copies` of each fit."""
        longest = self.store.content.get("longest") or self.subject.max_length
        lengths = np.diff(self.store.rollout_start)[self.rollouts].tolist()
        size = max(1, self.batch_tokens // copies)
        yield from map(
            self._batch, plan_pieces(lengths, longest, size, _BATCH_COST, self.subject.length_class)
        )

    def _batch(self, pieces: Sequence[Piece]) -> Batch:
        token_ids, targets, rows, flags = np.zeros(
            (4, len(pieces), max(map(len, pieces))), np.int64
        )
        for i, piece in enumerate(pieces):
            rollout = self.rollouts[piece.index]
            first, last = self.store.rollout_start[rollout : rollout + 2].tolist()
            here, n = np.arange(first + piece.start, first + piece.stop), len(piece)
            token_ids[i, :n], rows[i, :n] = self.store.token_ids[here], here
            targets[i, :n] = self.store.token_ids[np.minimum(here + 1, last - 1)]
            flags[i, :n] = 1 + ((here + 1 < last) & (here >= first + piece.keep))
        return Batch(
            token_ids=torch.from_numpy(token_ids),
            targets=torch.from_numpy(targets),
            mask=torch.from_numpy(flags == 2),
            own=torch.from_numpy(flags > 0),
            rows=torch.from_numpy(rows),
        )

    def role_of(self, measured: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return the role of the token that each measured row predicts."""
        return self.store.roles[measured + 1]

    def require_rows(self, batch: Batch, rows: Float[Tensor, "batch seq d_in"]) -> float:
        """Return how far the subject's rows are from the store's, as `require_rows_of` does."""
        _, columns = self.subject.layout.select(self.store.layout.adapter_types)
        return require_rows_of(self.store, batch, rows[..., columns])

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


def require_rows_of(
    store: ActivationStore, batch: Batch, rows: Float[Tensor, "batch seq d_in"]
) -> float:
    """Return how far rows are from the store's, as a share of the stored rows' norm.

    Raises ArtifactError where the difference is larger than another dtype explains, so that the
    store must have been made with another model.
    """
    read = rows[batch.own.to(rows.device)]
    stored = store.take(batch.rows[batch.own].numpy()).astype(np.float32)
    norm = max(float(np.linalg.norm(stored)), 1e-30)
    drift = float((read - torch.from_numpy(stored).to(read.device)).norm()) / norm
    if drift > _LARGEST_DRIFT:
        raise ArtifactError(
            f"rows differ from those of {store.path} by {drift:.2g} of their norm, expected at "
            f"most {_LARGEST_DRIFT}: the store was made with another model or dtype; generate it "
            "again"
        )
    return drift


def load_subject_of(
    store: ActivationStore, options: AdapterOptions, *, device: str, dtype: str
) -> "Subject":
    """Load the adapter and the base model whose rows a store has, in the store's gauge.

    Raises ArtifactError when adapter, base and store do not belong together.
    """
    from lorascope.subject.base import find_base
    from lorascope.subject.load import load_subject, load_tokenizer

    manifest = read_manifest(store.path)
    if manifest is None:
        raise ArtifactError(
            f"{store.path} was made by the published scripts and has no token ids; make a "
            "store with lorascope generate"
        )
    adapter = inspect_adapter(options.lora_path, options.adapter_name)
    base = find_base(adapter, options.base_model, options.base_revision)
    base.require_same(manifest.parents.get("base_weights"), store.path)
    subject = load_subject(
        adapter,
        base,
        load_tokenizer(adapter, base),
        pick_device(device),
        dtype,
        gauge=manifest.settings.get("gauge", "auto"),
        skip_unhookable=manifest.settings.get("skip_unhookable", False),
    )
    own_layout, _ = subject.layout.select(store.layout.adapter_types)
    store.layout.require_same(own_layout, str(store.path), f"adapter {adapter.name}")
    return subject


def fitting_tokens(subject: "Subject") -> int:
    """Return how many tokens a batch may have, so that its logits take at most 512 MB."""
    vocab = int(subject.causal.config.get_text_config().vocab_size)
    return max(1, min(_BATCH_TOKENS, _BATCH_LOGITS // vocab))
