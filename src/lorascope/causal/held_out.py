"""The subject with its adapter, and texts that an SAE never saw, ready to be run in batches.

1. The store says which texts there are; the SAE, which of them its training held out and did not
   calibrate on either. Of a store that it was not trained on, all texts are taken.
2. The subject is loaded in the store's gauge, and must be the adapter and the base of the store.
3. A text longer than the model was run on becomes windows, as when its rows were read.
4. Position t of a text predicts token t + 1. What is measured there counts under the role of that
   token. Special tokens and template headers are measured but stand apart, under `special`.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorascope import runtime
from lorascope.activations.batches import halves, split_rows
from lorascope.activations.capture import plan_batches
from lorascope.activations.store import ActivationStore
from lorascope.artifact import read_manifest
from lorascope.config import option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.options import AdapterOptions
from lorascope.texts.roles import ROLES
from lorascope.texts.rollouts import windows

if TYPE_CHECKING:
    from lorascope.sae.model import SAE
    from lorascope.subject.load import Subject

log = logging.getLogger(__name__)

SPECIAL = ROLES.index("special")
_PLACES = 2048  # of a batch on the CPU
_LOGITS = 1 << 27  # of a batch, in float32 512 MB; several runs of them are kept at once
_PRICE = 16  # places that the start of a batch costs
_DRIFT = 0.05  # share of the rows' norm: 16-bit computing moves them by about a hundredth


@dataclass(frozen=True, kw_only=True)
class EffectOptions(AdapterOptions):
    """Options of every command that runs the subject on the texts of a store."""

    data_dir: Path = option(
        Path("activations_all_adapters"),
        help="activation store whose texts to run",
        identity=False,
    )
    max_rollouts: int | None = option(None, help="held-out rollouts to run at most; default: all")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="type in which the model computes; auto: float32 on the CPU"
    )
    batch_tokens: int | None = option(
        None,
        help="places in one batch, padding included; changes numbers by rounding only; "
        "default: what keeps its logits below 512 MB, at most 2048",
        identity=False,
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace an output of other settings", identity=False)

    def check(self) -> None:
        """Refuse impossible numbers."""
        super().check()
        self.require("max_rollouts", 1)
        self.require("batch_tokens", 1)


@dataclass(frozen=True, kw_only=True)
class RandomEffectOptions(EffectOptions):
    """Options of those that draw something besides."""

    seed: int = option(0, help="seed of random directions, of noise and of the bootstrap")

    def check(self) -> None:
        """Refuse impossible numbers."""
        super().check()
        self.require("seed", 0)


@dataclass(frozen=True)
class Batch:
    """Texts of one forward, padded behind their ends; all are `(batch, seq)`.

    `mask` are the positions that are measured, `targets` the tokens that they predict, `own` the
    places that hold a token at all, `rows` the row number of each (0 where there is none).
    """

    token_ids: Int[Tensor, "batch seq"]
    targets: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    own: Bool[Tensor, "batch seq"]
    rows: Int[Tensor, "batch seq"]

    @property
    def measured(self) -> npt.NDArray[np.int64]:
        """Row numbers of the positions that are measured, in the order of `effects.counted`."""
        return self.rows[self.mask].numpy()


@dataclass(frozen=True)
class HeldOut:
    """A subject, a store of it, and the rollouts of the store to run, by their index."""

    subject: "Subject"
    store: ActivationStore
    rollouts: npt.NDArray[np.int64]
    batch_tokens: int

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the rollouts."""
        return int(np.diff(self.store.rollout_start)[self.rollouts].sum())

    def batches(self, copies: int = 1) -> Iterator[Batch]:
        """Yield the texts in batches such that `copies` of each fit, longest texts first."""
        longest = self.store.content.get("longest") or self.subject.max_length
        pieces = [
            (int(rollout), *window)
            for rollout in self.rollouts
            for n in [int(np.diff(self.store.rollout_start[rollout : rollout + 2])[0])]
            for window in windows(n, longest or n)
        ]
        lengths = [stop - start for _, start, stop, _ in pieces]
        for places in plan_batches(lengths, max(1, self.batch_tokens // copies), _PRICE):
            yield self._batch([pieces[place] for place in places])

    def _batch(self, pieces: Sequence[tuple[int, int, int, int]]) -> Batch:
        longest = max(stop - start for _, start, stop, _ in pieces)
        ids = np.zeros((4, len(pieces), longest), np.int64)
        token_ids, targets, rows, flags = ids
        for i, (rollout, start, stop, keep) in enumerate(pieces):
            first, last = (int(row) for row in self.store.rollout_start[rollout : rollout + 2])
            n = stop - start
            here = np.arange(first + start, first + stop)
            token_ids[i, :n], rows[i, :n] = self.store.token_ids[here], here
            targets[i, :n] = self.store.token_ids[np.minimum(here + 1, last - 1)]
            flags[i, :n] = 1 + ((here + 1 < last) & (here >= first + keep))
        return Batch(
            token_ids=torch.from_numpy(token_ids),
            targets=torch.from_numpy(targets),
            mask=torch.from_numpy(flags == 2),
            own=torch.from_numpy(flags > 0),
            rows=torch.from_numpy(rows),
        )

    def role_of(self, measured: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return the role under which each measured row counts: that of the token it predicts."""
        following = measured + 1
        eligible = self.store.eligible[following]
        return np.where(eligible, self.store.roles[following], SPECIAL).astype(np.uint8)

    def require_rows(self, batch: Batch, rows: Float[Tensor, "batch seq d_in"]) -> float:
        """Return how far rows are from the store's, as a share of their norm.

        Raises ArtifactError where that is more than computing in another type explains: the model
        is then another one than the store was made with.
        """
        mine, wanted = rows[batch.own.to(rows.device)], batch.rows[batch.own].numpy()
        _, columns = self.subject.layout.select(self.store.layout.adapter_types)
        stored = torch.from_numpy(self.store.take(wanted).astype(np.float32)).to(mine.device)
        drift = float((mine[:, columns] - stored).norm() / stored.norm().clamp(min=1e-30))
        if drift > _DRIFT:
            raise ArtifactError(
                f"rows differ from those of {self.store.path} by {drift:.2g} of their norm, "
                f"expected at most {_DRIFT}: the store was made with another model, or in another "
                "dtype; generate it again"
            )
        return drift


def require_features(features: Sequence[int], sae: "SAE | None" = None) -> None:
    """Raise ConfigError unless `--features` are different numbers, and of `sae` if it is given."""
    if min(features, default=0) < 0 or len(set(features)) < len(features):
        raise ConfigError("--features are to be different numbers from 0")
    if sae is not None and max(features, default=0) >= sae.d_sae:
        raise ConfigError(
            f"--features names {max(features)}, the SAE has features 0 to {sae.d_sae - 1}"
        )


def described(texts: HeldOut, sae: Path | None) -> dict[str, Any]:
    """Return what a report says of its subject and of the SAE's file."""
    return {
        "sae_name": None if sae is None else sae.name,
        "adapter_name": texts.subject.adapter.name,
        "compute_dtype": str(texts.subject.dtype).removeprefix("torch."),
        "batch_tokens": texts.batch_tokens,
    }


def open_held_out(config: EffectOptions, sae: "SAE | None") -> HeldOut:
    """Load the subject of a store, and choose the texts to run.

    Raises ArtifactError where adapter, base and store do not belong together.
    """
    from lorascope.subject.load import find_base, load_subject, load_tokenizer

    store = ActivationStore.open(config.data_dir)
    manifest = (
        read_manifest(config.data_dir) if (config.data_dir / "manifest.json").exists() else {}
    )
    if not manifest:
        raise ArtifactError(
            f"{config.data_dir} is a folder of the published scripts, which does not say the ids "
            "of its tokens; make a store with lorascope generate"
        )
    adapter = inspect_adapter(config.lora_path, config.adapter_name)
    base = find_base(adapter, config.base_model)
    if manifest["parents"].get("base_model") not in (None, base.digest):
        raise ArtifactError(
            f"{config.data_dir} was made with another base model than {base.name}; give that one "
            "with --base-model"
        )
    subject = load_subject(
        adapter,
        base,
        load_tokenizer(adapter, base),
        runtime.pick_device(config.device),
        config.dtype,
        gauge=manifest["settings"].get("gauge", "auto"),
        skip_unhookable=manifest["settings"].get("skip_unhookable", False),
    )
    mine, _ = subject.layout.select(store.layout.adapter_types)
    store.layout.require_same(mine, str(config.data_dir), f"adapter {adapter.name}")
    rollouts = np.arange(store.n_rollouts) if sae is None else held_out_rollouts(sae, store)
    rollouts = rollouts[: config.max_rollouts]
    vocab = int(subject.causal.config.get_text_config().vocab_size)
    places = config.batch_tokens or max(1, min(_PLACES, _LOGITS // vocab))
    return HeldOut(subject, store, rollouts, places)


def held_out_rollouts(sae: "SAE", store: ActivationStore) -> npt.NDArray[np.int64]:
    """Return the rollouts, by index, of which the SAE's own report is; else all of the store.

    They are those that training held out, less the half that set the threshold. An SAE of another
    store, or of another tool, does not say what it saw: a warning says that all are taken.
    """
    settings, parents = sae.manifest["settings"], sae.manifest["parents"]
    known = {"holdout", "data_seed"} <= settings.keys()
    if not known or parents.get("activations") != store.digest:
        log.warning(
            "the SAE was not trained on %s: all %d rollouts are taken as held out, which they are "
            "only if it never saw these texts",
            *(store.path, store.n_rollouts),
        )
        return np.arange(store.n_rollouts)
    _, held = split_rows(
        store, settings["holdout"], settings["data_seed"], settings.get("roles", ())
    )
    return np.unique(store.rollout_of(halves(store, held)[1]))
