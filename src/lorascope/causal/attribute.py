"""Say which features made the model predict this token: contributions, by gradients of the rows.

1. Every token of some texts: how far the adapter's prediction is from the base model's, as KL and
   as the rise of the log-probability of the token that came.
2. Of the tokens with the highest KL in each text, or of those that are asked for: what each feature
   at each earlier token contributed to the prediction (`gradients`). Contributions of features, the
   SAE's bias, what it leaves unexplained and the rows of special tokens add up to the effect of the
   whole adapter; `completeness` says how far from it they end.
3. `removal` is what taking a feature out would take away, by the gradient at the adapter's rows.
4. On some of the texts every feature is really taken out, and both numbers are compared with that:
   `agreement`.

In: adapter, activation store, SAE. Out: a report (JSON); the table goes to stderr.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.causal.attribution_report import TokenAttribution, summarize, table
from lorascope.causal.effects import ce_of, counted, kl_of
from lorascope.causal.held_out import (
    SPECIAL,
    Batch,
    EffectOptions,
    HeldOut,
    described,
    open_held_out,
)
from lorascope.causal.study import Report, report_at
from lorascope.config import option
from lorascope.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from lorascope.causal.gradients import Share, Targets
    from lorascope.sae.model import SAE
    from lorascope.subject.intervene import RowEditor

KIND = "attribution"
SCHEMA = 1
_COPIES = 16  # of a text in one batch: each keeps its activations for the backward pass


@dataclass(frozen=True, kw_only=True)
class AttributeConfig(EffectOptions):
    """Options of `attribute`."""

    sae: Path = option(
        Path("trained_sae_adapters_g-u-d-q-k-v-o.pt"), help="SAE of the features", identity=False
    )
    target: Literal["kl", "logprob", "logit-difference"] = option(
        "kl",
        help="number of a prediction to explain: KL from the base, the token's log-probability, or "
        "its logit less that of the base's likeliest other token",
    )
    rollouts: tuple[int, ...] = option((), help="ids of the texts to read; default: held-out ones")
    texts_of: Path | None = option(
        None, help="feature index whose whole texts to read instead", identity=False
    )
    tokens: int = option(10, help="tokens of each text to explain: those of highest KL")
    places: tuple[int, ...] = option(
        (),
        help="places in the text, from 0, of the tokens to explain instead; needs one --rollouts",
    )
    steps: int = option(
        16, help="points between base and adapter at which gradients are taken; more add up better"
    )
    top: int = option(10, help="features to name for each token")
    check_texts: int = option(
        2, help="texts on which every feature is really taken out, to compare"
    )
    output: Path = option(Path("attribution.json"), help="report to make", identity=False)

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        self.require("tokens", 1)
        self.require("steps", 1)
        self.require("top", 1)
        self.require("check_texts", 0)
        if self.output.suffix != ".json":
            raise ConfigError(f"--output is {self.output}, expected a .json file")
        if self.rollouts and self.texts_of is not None:
            raise ConfigError("--rollouts and --texts-of both say which texts to read; give one")
        if self.places and len(self.rollouts) != 1:
            raise ConfigError(
                f"--places are of one text, --rollouts names {len(self.rollouts)}; name the text"
            )
        if min(self.places, default=1) < 1:
            raise ConfigError("--places are to be 1 or more: the first token is not predicted")


def run(config: AttributeConfig) -> Path:
    """Make a report, or find the finished one, and return its file."""
    from lorascope.sae.model import load_sae

    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.sae, store)
    chosen = _chosen(config, store)

    def make() -> Report:
        texts = open_held_out(config, sae)
        if chosen:
            texts = replace(texts, rollouts=np.array(chosen)[: config.max_rollouts])
        report = measure(texts, sae, config)
        return Report(report, texts.subject.layout, described(texts, config.sae))

    return report_at(
        config.output,
        KIND,
        SCHEMA,
        settings={**config.settings(), "rollouts": [int(store.rollout_id[i]) for i in chosen]},
        parents={"activations": store.digest, "sae": sae.digest},
        overwrite=config.overwrite,
        make=make,
        table=table,
    )


def _chosen(config: AttributeConfig, store: ActivationStore) -> list[int]:
    """Return the rollouts that are asked for, by index; none where held-out ones are to be read."""
    from lorascope.features.index import FeatureIndex

    ids = config.rollouts
    if config.texts_of is not None:
        index = FeatureIndex.open(config.texts_of)
        theirs = (index.manifest.get("parents") or {}).get("activations")
        if theirs != store.digest:
            raise ArtifactError(
                f"{config.texts_of} was made from another store than {config.data_dir}; give "
                "--data-dir the store that it was collected from"
            )
        ids = tuple(int(rollout) for rollout in index.text_rollout)
    place = {int(rollout): i for i, rollout in enumerate(store.rollout_id)}
    missing = [rollout for rollout in ids if rollout not in place]
    if missing:
        raise ConfigError(
            f"{config.data_dir} has no rollout {missing[0]}; it has {store.n_rollouts}, with ids "
            f"from {int(store.rollout_id.min())} to {int(store.rollout_id.max())}"
        )
    return [place[rollout] for rollout in ids]


def measure(texts: HeldOut, sae: "SAE", config: AttributeConfig) -> dict[str, Any]:
    """Return the report's parts as JSON values."""
    from lorascope.causal.gradients import no_weight_gradients
    from lorascope.subject.intervene import RowEditor

    with RowEditor(texts.subject) as editor, no_weight_gradients(texts.subject):
        study = _Study(editor, texts, sae, config)
        study.compare()
        study.explain()
    return summarize(study.rollouts, study.behind, study.usual, sae.d_sae, config)


class _Study:
    """What is known of each text: numbers of all its tokens, then of those to explain."""

    def __init__(
        self, editor: "RowEditor", texts: HeldOut, sae: "SAE", config: AttributeConfig
    ) -> None:
        self.editor, self.texts, self.sae, self.config = editor, texts, sae, config
        start = texts.store.rollout_start
        self.start = {int(i): int(start[i]) for i in texts.rollouts}
        sizes = {i: int(start[i + 1]) - first for i, first in self.start.items()}
        # of each rollout: KL, rise, and whether the token counts, by its place
        self.numbers = {i: np.full((2, n), np.nan) for i, n in sizes.items()}
        self.usual = {i: np.zeros(n, bool) for i, n in sizes.items()}
        self.behind: list[TokenAttribution] = []

    @property
    def rollouts(self) -> dict[int, Any]:
        """Return KL and rise of every token of each text, by the text's id."""
        return {int(self.texts.store.rollout_id[i]): found for i, found in self.numbers.items()}

    def batches(self, label: str) -> Iterator[tuple[int, Batch]]:
        """Yield each text or window alone, with the index of its rollout."""
        batches = list(self.texts.batches(copies=self.texts.batch_tokens))
        with runtime.progress(len(batches), label, "texts") as bar:
            for batch in batches:
                yield int(self.texts.store.rollout_of(batch.rows[0, :1].numpy())[0]), batch
                bar.update(1)

    @torch.no_grad()
    def compare(self) -> None:
        """Do step 1: adapter and base at every token."""
        for rollout, batch in self.batches("compare"):
            out, base = self.editor.run(batch.token_ids), self.editor.base(batch.token_ids)
            self.texts.require_rows(batch, out.rows)
            mine, its = counted(out.logits, batch.mask), counted(base, batch.mask)
            targets = batch.targets[batch.mask].to(mine.device)
            place = batch.measured - self.start[rollout] + 1
            kl, rise = kl_of(mine, its), ce_of(its, targets) - ce_of(mine, targets)
            self.numbers[rollout][:, place] = torch.stack([kl, rise]).cpu().numpy()
            self.usual[rollout][place] = self.texts.role_of(batch.measured) != SPECIAL

    def explain(self) -> None:
        """Do steps 2 to 4 at the tokens that are asked for, or those of highest KL."""
        wanted = {i: self._wanted(i) for i in self.start}
        checked = set(list(self.start)[: self.config.check_texts])
        for rollout, batch in self.batches("attribute"):
            place = batch.measured - self.start[rollout] + 1
            here = np.flatnonzero(batch.mask[0].numpy())[np.isin(place, wanted[rollout])]
            if len(here):
                self._explain(rollout, batch, torch.from_numpy(here) + 1, rollout in checked)

    def _wanted(self, rollout: int) -> npt.NDArray[np.int64]:
        """Return the places of the tokens of a text that are to be explained."""
        kl = self.numbers[rollout][0]
        if self.config.places:
            beyond = [place for place in self.config.places if place >= len(kl)]
            if beyond:
                raise ConfigError(f"--places has {beyond[0]}, the text has {len(kl)} tokens")
            return np.array(self.config.places)
        kl = np.where(self.usual[rollout], kl, -1)
        order = np.argsort(-kl, kind="stable")[: self.config.tokens]
        return order[kl[order] >= 0]

    def _explain(self, rollout: int, batch: Batch, places: Tensor, is_checked: bool) -> None:
        from lorascope.causal.gradients import Share, Targets, mean_gradients

        ids, store = batch.token_ids, self.texts.store
        with torch.no_grad():
            out, base = self.editor.run(ids), self.editor.base(ids)
            nothing = self.editor.run(ids, lambda _, values: torch.zeros_like(values)).logits
            targets = Targets.at(self.config.target, places, ids, base)
            y, y_base = (
                targets.values(logits[0, targets.places - 1]).cpu()
                for logits in (out.logits, nothing)
            )
            rows = out.rows[0]
            _, columns = self.texts.subject.layout.select(self.sae.layout.adapter_types)
            share = Share(self.sae, rows, columns, store.eligible[batch.rows[0].numpy()])
            taken = self._taken(ids, rows, columns, share, targets, y) if is_checked else None
        first = int(batch.rows[0, 0]) - self.start[rollout]  # of the window in its text
        size = max(1, min(_COPIES, self.texts.batch_tokens // ids.shape[1]))
        for group in targets.split(size):
            along = mean_gradients(self.editor, ids, rows, group, self.config.steps)
            at_end = mean_gradients(self.editor, ids, rows, group, 0)
            contributions, removals = share.firings(along), share.firings(at_end)
            rests, tokens = share.rests(along), share.tokens(along)
            for i, place in enumerate(group.places.tolist()):
                number = int((places == place).nonzero())
                self.behind.append(
                    TokenAttribution(
                        rollout=int(store.rollout_id[rollout]),
                        token=first + place,
                        text=store.vocabulary[int(group.tokens[i])].decode(errors="replace"),
                        adapter=float(y[number]),
                        base=float(y_base[number]),
                        rests={name: float(values[i]) for name, values in rests.items()},
                        tokens=tokens[i].numpy(),
                        first=first,
                        latents=share.latent.numpy(),
                        sources=share.place.numpy() + first,
                        contributions=contributions[i].numpy(),
                        removals=removals[i].numpy(),
                        taken=None if taken is None else taken[:, number].numpy(),
                    )
                )

    def _taken(
        self,
        ids: Tensor,
        rows: Tensor,
        columns: npt.NDArray[np.int64],
        share: "Share",
        targets: "Targets",
        y: Tensor,
    ) -> Tensor:
        """Return what goes when each latent of `share.fired` is taken out, `(fired, target)`."""
        found = []
        copies = max(1, min(_COPIES, self.texts.batch_tokens // ids.shape[1]))
        for some in share.fired.split(copies):
            changed = rows.expand(len(some), -1, -1).clone()
            for i, latent in enumerate(some):
                mine = share.latent == latent
                part = share.value[mine, None] * self.sae.W_dec[latent]
                at = share.place[mine][:, None]
                changed[i, at, torch.from_numpy(columns)] -= part.to(rows.device)
            logits = self.editor.run(
                ids.expand(len(some), -1), lambda here, _, changed=changed: changed[..., here]
            ).logits
            found.append(y - targets.values(logits[:, targets.places - 1]).cpu())
        return torch.cat(found) if found else torch.zeros(0, len(targets))
