"""Take parts of an adapter out and measure what becomes of its model's output.

1. Parts are sites, projections, layers, the MLP and the attention. Each is taken out alone (its
   rows become zero, later sites answer to what is left), and each is kept alone.
2. Controls: nothing taken out; rows moved by one rounding step; and for each part a random
   direction of the same norm added to what each of its sites writes, instead of taking that away.
3. `--greedy` takes one kind of part out step by step, each time the one that costs least.
4. With an SAE, each feature is taken out: `value · decoder row` is subtracted from the rows of the
   tokens of text on which it fires, all other rows are held. Control: a random direction of the
   same norm in the SAE's units instead of the decoder row. Texts where it never fires need no run.
5. Each is compared with the whole adapter in the same batch: KL(adapter ‖ without) in nats a token,
   float32, and the rise of the loss on the next token.

In: adapter, activation store, perhaps an SAE. Out: a report (JSON) and its picture beside it, as
.png and .svg; the table goes to stderr.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.causal.ablation_report import (
    feature_entries,
    greedy_entries,
    part_entries,
    table,
)
from lorascope.causal.effects import counted, kl_of
from lorascope.causal.held_out import (
    SPECIAL,
    HeldOut,
    RandomEffectOptions,
    described,
    open_held_out,
    require_features,
)
from lorascope.causal.parts import Part, parts_of
from lorascope.causal.study import Report, report_at
from lorascope.config import option
from lorascope.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from lorascope.causal.removals import Sums
    from lorascope.sae.model import SAE
    from lorascope.subject.intervene import RowEditor

log = logging.getLogger(__name__)

KIND = "ablation"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class AblateConfig(RandomEffectOptions):
    """Options of `ablate`."""

    sae: Path | None = option(
        None, help="SAE whose features to take out too, and whose held-out texts to run",
        identity=False,
    )  # fmt: skip
    features: tuple[int, ...] = option(
        (), help="numbers of the features to take out; default: all that fire"
    )
    greedy: Literal["none", "projection", "layer", "site"] = option(
        "projection", help="kind of part to take out step by step; n of them take n²/2 runs"
    )
    output: Path = option(Path("ablation.json"), help="report to make", identity=False)

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        if self.output.suffix != ".json":
            raise ConfigError(f"--output is {self.output}, expected a .json file")
        if self.features and self.sae is None:
            raise ConfigError("--features are those of an SAE; name it with --sae")
        require_features(self.features)


def run(config: AblateConfig) -> Path:
    """Make a report, or find the finished one, and return its file."""
    from lorascope.causal.figures import draw_ablation
    from lorascope.sae.model import load_sae

    store = ActivationStore.open(config.data_dir)
    sae = None if config.sae is None else load_sae(config.sae, store)
    require_features(config.features, sae)

    def make() -> Report:
        texts = open_held_out(config, sae)
        report = measure(texts, config, sae)
        return Report(report, texts.subject.layout, described(texts, config.sae))

    return report_at(
        config.output,
        KIND,
        SCHEMA,
        settings=config.settings(),
        parents={"activations": store.digest, **({} if sae is None else {"sae": sae.digest})},
        overwrite=config.overwrite,
        make=make,
        table=table,
        draw=lambda data: [
            draw_ablation(data, config.output.with_suffix(end)) for end in (".png", ".svg")
        ],
    )


@torch.inference_mode()
def measure(texts: HeldOut, config: AblateConfig, sae: "SAE | None" = None) -> dict[str, Any]:
    """Return the report's parts as JSON values; `sae` None leaves the features out."""
    from lorascope.subject.intervene import RowEditor

    parts = parts_of(texts.subject.layout)
    with RowEditor(texts.subject, seed=config.seed) as editor:
        study = _Study(editor, texts)
        report = study.parts(parts, config.seed)
        if config.greedy != "none":
            some = [part for part in parts if part.kind == config.greedy]
            report["greedy"] = greedy_entries(study.greedy(some), study.n_tokens)
        if sae is not None:
            report["features"] = study.features(sae, config.features, config.seed)
    return report


class _Study:
    """The texts of a study, of which each is run alone, and sums over them."""

    def __init__(self, editor: "RowEditor", texts: HeldOut) -> None:
        self.editor, self.texts = editor, texts
        self.batches = list(texts.batches(copies=texts.batch_tokens))
        usual = [texts.role_of(batch.measured) != SPECIAL for batch in self.batches]
        self.n_tokens = int(sum(mask.sum() for mask in usual))
        self.n_special = int(sum((~mask).sum() for mask in usual))
        if not self.n_tokens:
            raise ArtifactError("no token to predict counts: all are special; give other texts")
        first = np.array([int(batch.rows[0, 0]) for batch in self.batches])
        _, self.text = np.unique(texts.store.rollout_of(first), return_inverse=True)
        sizes = np.array([mask.sum() for mask in usual])
        self.counts = np.bincount(self.text, weights=sizes).astype(np.float64)  # of each text
        d_in, n_sites = texts.subject.layout.d_in, len(texts.subject.layout.sites)
        self.ones, self.none = torch.ones(d_in), torch.zeros(n_sites)

    def parts(self, parts: Sequence[Part], seed: int) -> dict[str, Any]:
        """Return the report's entries of all parts, and the floors."""
        from lorascope.causal.removals import Live

        eps = torch.finfo(self.texts.subject.dtype).eps
        changes = [
            Live(self.ones * (1 + eps), self.none),
            Live(0 * self.ones, self.none),
            *(Live((~part.columns).float(), self.none) for part in parts),
            *(Live(part.columns.float(), self.none) for part in parts),
            *(Live(self.ones, part.sites.float()) for part in parts),
        ]
        sums, null = self._live(changes, "parts")
        return {
            "n_rollouts": len(self.counts),
            "n_tokens": self.n_tokens,
            "n_special": self.n_special,
            "floor": {"null": null, "rounding": float(sums.kl[0].sum()) / self.n_tokens},
            **part_entries(parts, sums, self.counts, self.n_special, seed),
        }

    def greedy(self, parts: Sequence[Part]) -> list[tuple[str, float, float]]:
        """Return the parts as they are taken out, each with the KL and the loss summed then."""
        from lorascope.causal.removals import Live

        left, keep, steps = list(parts), self.ones.bool(), []
        while left:
            changes = [Live((keep & ~part.columns).float(), self.none) for part in left]
            sums, _ = self._live(changes, f"greedy, {len(left)} left")
            best = int(np.argmin(sums.kl.sum(1)))
            keep = keep & ~left[best].columns
            steps.append((left[best].name, float(sums.kl[best].sum()), float(sums.ce[best].sum())))
            left.pop(best)
        return steps

    def _live(self, changes: Sequence[Any], label: str) -> "tuple[Sums, float]":
        """Return sums `(n_changes, n_texts)`, and the KL a token that the batch alone makes."""
        from lorascope.causal.removals import Sums, run_live

        found = np.zeros((4, len(changes), len(self.counts)))
        null = 0.0
        with runtime.progress(len(self.batches), label, "texts") as bar:
            for text, batch in zip(self.text, self.batches, strict=True):
                sums, reference = run_live(self.editor, self.texts, batch, changes)
                for into, values in zip(found, vars(sums).values(), strict=True):
                    into[:, text] += values
                alone = counted(self.editor.run(batch.token_ids).logits, batch.mask)
                usual = torch.from_numpy(self.texts.role_of(batch.measured) != SPECIAL)
                null += float(kl_of(alone, reference).double().cpu()[usual].sum())
                bar.update(1)
        return Sums(*found), null / self.n_tokens

    def features(self, sae: "SAE", chosen: Sequence[int], seed: int) -> list[dict[str, Any]]:
        """Return the entries of the features that are asked for, by number."""
        from lorascope.causal.baselines import random_rows
        from lorascope.causal.removals import run_held

        _, columns = self.texts.subject.layout.select(sae.layout.adapter_types)
        random = random_rows(sae, seed)
        found = np.zeros((2, 4, sae.d_sae, len(self.counts)))
        n_fired = np.zeros(sae.d_sae, np.int64)
        wanted = np.isin(np.arange(sae.d_sae), chosen) if chosen else np.ones(sae.d_sae, bool)
        with runtime.progress(len(self.batches), "features", "texts") as bar:
            for text, batch in zip(self.text, self.batches, strict=True):
                rows = self.editor.run(batch.token_ids).rows
                self.texts.require_rows(batch, rows)
                code = sae.encode_dense(rows[0][:, columns].cpu())
                code *= torch.from_numpy(self.texts.store.eligible[batch.rows[0].numpy()])[:, None]
                fired = np.flatnonzero((code > 0).any(0).numpy() & wanted)
                n_fired += (code[batch.mask[0]] > 0).sum(0).numpy()
                for kind, written in enumerate((sae.W_dec, random)):
                    changes = [
                        _without(rows[0], columns, code[:, latent], written[latent])
                        for latent in fired
                    ]
                    sums = run_held(self.editor, self.texts, batch, rows[0], changes)
                    for into, values in zip(found[kind], vars(sums).values(), strict=True):
                        into[fired, text] += values
                bar.update(1)
        numbers = [int(n) for n in (chosen or np.flatnonzero(n_fired))]
        return feature_entries(numbers, n_fired, found, self.counts, self.n_special, seed)


def _without(rows: Tensor, columns: npt.NDArray[np.int64], values: Tensor, written: Tensor) -> Any:
    """Return the change that takes `value · written` out of the rows of each token."""
    from lorascope.causal.removals import Held

    changed = rows.clone()
    changed[:, columns] -= (values[:, None] * written).to(rows.device)
    return Held(changed, values > 0)
