"""Let the subject write with features added, removed or clamped, in rising doses.

1. Prompts are held-out texts up to where the assistant begins to think or to answer, or those of
   `--prompts`. Each is continued by every arm (`continuing`), with the same noise in all of them.
2. Arms: no change, which is dose 0 of each kind of change; each dose; and for each dose a control,
   a random direction as long as the feature's decoder row in the SAE's units in its place.
3. What a dose `t` does at a token, with `c` the feature's value there and `u` its largest value on
   the store, is to add to the row `t·u` times the decoder row (`add`), `−t·c` (`remove`: 1 takes
   the feature out), or `max(0, t·u − c)` (`clamp`: the value is at least `t·u` then). Later sites
   answer to it.
4. Each arm is told by KL(adapter ‖ steered) of its predictions, by how unlikely its text is for the
   adapter and for the base, and by how much it repeats itself.

In: adapter, activation store, SAE, features. Out: a report (JSON) with the texts, and a picture.
"""

import logging
import math
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
from lorascope.artifact import digest_file
from lorascope.causal.continuation import Change, Written, continue_text
from lorascope.causal.effects import ce_of
from lorascope.causal.held_out import (
    HeldOut,
    RandomEffectOptions,
    described,
    open_held_out,
    require_features,
)
from lorascope.causal.steering_report import Arm, summarize, table
from lorascope.causal.study import Report, report_at
from lorascope.config import option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.texts.roles import ROLES

if TYPE_CHECKING:
    from lorascope.sae.model import SAE
    from lorascope.subject.intervene import RowEditor

log = logging.getLogger(__name__)

KIND = "steering"
SCHEMA = 1
_BLOCK = 8192
_SAID = tuple(ROLES.index(role) for role in ("think", "answer"))


@dataclass(frozen=True, kw_only=True)
class SteerConfig(RandomEffectOptions):
    """Options of `steer`."""

    sae: Path = option(
        Path("trained_sae_adapters_g-u-d-q-k-v-o.pt"), help="SAE of the features", identity=False
    )
    features: tuple[int, ...] = option(help="numbers of the features to steer, together")
    how: Literal["add", "remove", "clamp"] = option(
        "add",
        help="what a dose does: add to the row, remove from it, or raise the value to at least",
    )
    doses: tuple[float, ...] = option(
        (0.5, 1.0, 2.0, 4.0),
        help="in units of each feature's largest value on the store; of remove, 1 is all of it",
    )
    where: Literal["generated", "all"] = option(
        "generated", help="tokens to change: what is written and the prompt's last one, or all"
    )
    prompts: str | None = option(
        None,
        help="dataset whose prompts to continue; default: the store's held-out texts, cut where "
        "the assistant begins",
        identity=False,
        path=True,
    )
    num_prompts: int = option(8, help="prompts to continue")
    samples: int = option(1, help="continuations of each prompt")
    max_new_tokens: int = option(64, help="longest continuation in tokens")
    temperature: float = option(0.0, help="of what is written; 0 takes the likeliest token")
    output: Path = option(Path("steering.json"), help="report to make", identity=False)

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        for name in ("num_prompts", "samples", "max_new_tokens"):
            self.require(name, 1)
        self.require("temperature", 0)
        if self.output.suffix != ".json":
            raise ConfigError(f"--output is {self.output}, expected a .json file")
        if not self.features:
            raise ConfigError("--features names no feature; give the numbers of those to steer")
        require_features(self.features)
        if not self.doses or not all(map(math.isfinite, (*self.doses, self.temperature))):
            raise ConfigError("--doses and --temperature are to be finite numbers")
        if self.samples > 1 and not self.temperature:
            raise ConfigError("--samples above 1 are all alike at --temperature 0; raise it")


def run(config: SteerConfig) -> Path:
    """Make a report, or find the finished one, and return its file."""
    from lorascope.causal.figures import draw_steering
    from lorascope.sae.model import load_sae

    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.sae, store)
    require_features(config.features, sae)
    parents = {"activations": store.digest, "sae": sae.digest}
    if config.prompts is not None and Path(config.prompts).is_file():
        parents["prompts"] = digest_file(Path(config.prompts))

    def make() -> Report:
        texts = open_held_out(config, sae)
        report = measure(texts, sae, config)
        return Report(report, texts.subject.layout, described(texts, config.sae))

    return report_at(
        config.output,
        KIND,
        SCHEMA,
        settings={**config.settings(), "prompts": config.prompts and Path(config.prompts).name},
        parents=parents,
        overwrite=config.overwrite,
        make=make,
        table=table,
        draw=lambda data: draw_steering(data, config.output.with_suffix(".png")),
    )


@torch.inference_mode()
def measure(texts: HeldOut, sae: "SAE", config: SteerConfig) -> dict[str, Any]:
    """Return the report's parts as JSON values."""
    from lorascope.causal.baselines import random_rows
    from lorascope.causal.patch import only
    from lorascope.subject.intervene import RowEditor

    prompts, few = _prompts(texts, config), only(sae, config.features)
    largest = _largest(few, texts.store, config.features)
    control = random_rows(sae, config.seed)[list(config.features)]
    _, columns = texts.subject.layout.select(sae.layout.adapter_types)
    arms: list[tuple[Arm, Change | None]] = [(Arm("none", 0.0, [], []), None)]
    for dose in dict.fromkeys(dose for dose in config.doses if dose):
        for kind, written in (("feature", few.W_dec), ("control", control)):
            change = _change(few, columns, config.how, dose * largest, dose, written)
            arms.append((Arm(kind, dose, [], []), change))
    with (
        RowEditor(texts.subject) as editor,
        runtime.progress(len(prompts), "steer", "texts") as bar,
    ):
        for number, (_, prompt, counts) in enumerate(prompts):
            longest = config.samples * (len(prompt) + config.max_new_tokens)
            at_once = max(1, texts.batch_tokens // longest)
            for first in range(0, len(arms), at_once):
                some = arms[first : first + at_once]
                written = continue_text(
                    editor,
                    prompt,
                    counts,
                    [change for _, change in some],
                    samples=config.samples,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    seed=(config.seed, number),
                    everywhere=config.where == "all",
                )
                for (arm, _), ours in zip(some, written, strict=True):
                    for one in ours:
                        arm.texts.append((number, one, _base_surprise(editor, prompt, one)))
                        arm.values.append(_values(few, one, columns))
            bar.update(1)
    spell = texts.subject.tokenizer.decode
    heads = [{"rollout": rollout, "text": spell(prompt)} for rollout, prompt, _ in prompts]
    return {
        "features": list(config.features),
        "how": config.how,
        "where": config.where,
        "unit": dict(zip(map(str, config.features), largest.tolist(), strict=True)),
        "prompts": heads,
        "arms": summarize([arm for arm, _ in arms], len(prompts), spell, config.seed),
    }


def _prompts(texts: HeldOut, config: SteerConfig) -> list[tuple[int | None, Tensor, Tensor]]:
    """Return each prompt's rollout (None: not of the store), token ids, and what counts as text."""
    if config.prompts is not None:
        from lorascope.texts.rollouts import load_prompts

        rollouts, _ = load_prompts(
            dataset=config.prompts,
            split="train",
            limit=config.num_prompts,
            template="auto",
            tokenizer=texts.subject.tokenizer,
        )
        special = ROLES.index("special")
        return [
            (
                None,
                torch.from_numpy(one.token_ids.astype(np.int64)),
                torch.from_numpy(one.roles != special),
            )
            for one in rollouts
        ]
    store, found = texts.store, []
    for index in texts.rollouts:
        first, last = (int(row) for row in store.rollout_start[index : index + 2])
        said = np.isin(store.roles[first:last], _SAID)
        n = int(said.argmax()) if said.any() else (last - first) // 2
        if not n:
            continue
        ids = torch.from_numpy(store.token_ids[first : first + n].astype(np.int64))
        counts = torch.from_numpy(np.array(store.eligible[first : first + n]))
        found.append((int(store.rollout_id[index]), ids, counts))
        if len(found) == config.num_prompts:
            break
    if not found:
        raise ArtifactError("no held-out text has anything before what the assistant says")
    return found


def _largest(few: "SAE", store: ActivationStore, features: Sequence[int]) -> Tensor:
    """Return the largest value of each latent of `few` on the store's tokens of text."""
    largest = torch.zeros(few.d_sae)
    for first, block in few.narrow(store).blocks(_BLOCK):
        rows = torch.from_numpy(np.array(block)[store.eligible[first : first + len(block)]])
        if len(rows):
            largest = torch.maximum(largest, few.encode_dense(rows).amax(0))
    silent = [feature for feature, u in zip(features, largest.tolist(), strict=True) if not u]
    if silent:
        log.warning("features %s never fire on the store: no dose does anything", silent)
    return largest


def _change(
    few: "SAE",
    columns: npt.NDArray[np.int64],
    how: str,
    wanted: Tensor,
    dose: float,
    written: Tensor,
) -> Change:
    """Return the change of one dose; `wanted` is `t·u` of each latent, `written` what it writes."""

    def of(rows: Tensor, counts: Tensor) -> Tensor:
        if how == "add":
            amount = wanted.expand(*rows.shape[:2], -1)
        else:
            values = few.encode_dense(rows[..., columns].cpu()) * counts.cpu()[..., None]
            raised = (wanted - values).clamp(min=0) * (wanted != 0)
            amount = -dose * values if how == "remove" else raised
        added = torch.zeros_like(rows)
        added[..., columns] = (amount @ written).to(rows.device)
        return added

    return Change(of)


def _values(few: "SAE", one: Written, columns: npt.NDArray[np.int64]) -> Tensor:
    """Return the features' values as the clean pass reads the written tokens, `(read, feature)`."""
    if not len(one.rows):
        return torch.zeros(0, few.d_sae)
    return few.encode_dense(one.rows[:, columns])[one.counts]


def _base_surprise(editor: "RowEditor", prompt: Tensor, one: Written) -> Any:
    """Return −log p of each written token under the base model, in nats."""
    written = torch.from_numpy(one.token_ids)
    whole = torch.cat([prompt, written])[None]
    logits = editor.base(whole)[0, len(prompt) - 1 : -1]
    return ce_of(logits, written.to(logits.device)).double().cpu().numpy()
