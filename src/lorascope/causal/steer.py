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
import torch
from torch import Tensor

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.artifact import building, digest_file, is_made, make_manifest, write_text
from lorascope.causal.effects import ce_of, seal
from lorascope.causal.heldout import EffectOptions, HeldOut, open_held_out
from lorascope.causal.steering_report import Arm, summarize, table
from lorascope.config import option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.subject.rollouts import ROLES

if TYPE_CHECKING:
    from lorascope.causal.continuing import Change, Written
    from lorascope.sae.model import SAE
    from lorascope.subject.intervene import RowEditor

log = logging.getLogger(__name__)

KIND = "steering"
SCHEMA = 1
_BLOCK = 8192
_SAID = tuple(ROLES.index(role) for role in ("think", "answer"))


@dataclass(frozen=True, kw_only=True)
class SteerConfig(EffectOptions):
    """Options of `steer`."""

    model_path: Path = option(
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
        if min(self.features) < 0 or len(set(self.features)) < len(self.features):
            raise ConfigError("--features are to be different numbers from 0")
        if not self.doses or not all(map(math.isfinite, (*self.doses, self.temperature))):
            raise ConfigError("--doses and --temperature are to be finite numbers")
        if self.samples > 1 and not self.temperature:
            raise ConfigError("--samples above 1 are all alike at --temperature 0; raise it")


def run(config: SteerConfig) -> Path:
    """Make a report, or find the finished one, and return its file."""
    from lorascope.causal.figures import draw_steering
    from lorascope.sae.model import load_sae

    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.model_path, store)
    if max(config.features) >= sae.d_sae:
        raise ConfigError(
            f"--features names {max(config.features)}, the SAE has features 0 to {sae.d_sae - 1}"
        )
    parents = {"activations": store.digest, "sae": sae.digest}
    if config.prompts is not None and Path(config.prompts).is_file():
        parents["prompts"] = digest_file(Path(config.prompts))
    settings = {**config.settings(), "prompts": config.prompts and Path(config.prompts).name}
    identity = {"settings": settings, "parents": parents}
    if is_made(config.output, KIND, **identity, overwrite=config.overwrite):
        log.info("%s is already made with these settings", config.output)
        return config.output
    texts = open_held_out(config, sae)
    with building(config.output, KIND, **identity, overwrite=config.overwrite) as build:
        report = measure(texts, sae, config)
        manifest = make_manifest(
            KIND,
            SCHEMA,
            **identity,
            layout=texts.subject.layout.to_json(),
            content={
                "sae_name": config.model_path.name,
                "adapter_name": texts.subject.adapter.name,
                "compute_dtype": str(texts.subject.dtype).removeprefix("torch."),
            },
        )
        write_text(build.path / "report.json", seal(manifest, report))
        data = {"metadata": {"lorascope": manifest}, **report}
        draw_steering(data, config.output.with_suffix(".png"))
        build.publish_file("report.json")
    log.info("%s", table(report))
    return config.output


@torch.inference_mode()
def measure(texts: HeldOut, sae: "SAE", config: SteerConfig) -> dict[str, Any]:
    """Return the report's parts as JSON values."""
    from lorascope.causal.continuing import continue_text
    from lorascope.subject.intervene import RowEditor

    prompts = _prompts(texts, config)
    largest = _largest(sae, texts.store, config.features)
    doses = [dose for dose in dict.fromkeys(config.doses) if dose]
    named = [("none", 0.0), *((kind, dose) for dose in doses for kind in ("feature", "control"))]
    changes = _changes(texts, sae, config, largest)
    arms = [None if kind == "none" else changes(kind, dose) for kind, dose in named]
    found = [Arm(kind, dose, [], []) for kind, dose in named]
    _, columns = texts.subject.layout.select(sae.layout.adapter_types)
    with (
        RowEditor(texts.subject) as editor,
        runtime.progress(len(prompts), "steer", "texts") as bar,
    ):
        for number, (_, prompt, counts) in enumerate(prompts):
            written = continue_text(
                editor,
                prompt,
                counts,
                arms,
                samples=config.samples,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                seed=(config.seed, number),
                everywhere=config.where == "all",
            )
            for arm, ours in zip(found, written, strict=True):
                for one in ours:
                    arm.texts.append((number, one, _base_surprise(editor, prompt, one)))
                    arm.values.append(_values(sae, one, columns, config.features))
            bar.update(1)
    spell = texts.subject.tokenizer.decode
    heads = [{"rollout": rollout, "text": spell(prompt)} for rollout, prompt, _ in prompts]
    return {
        "features": list(config.features),
        "how": config.how,
        "where": config.where,
        "unit": dict(zip(map(str, config.features), largest.tolist(), strict=True)),
        "prompts": heads,
        "arms": summarize(found, len(prompts), spell, config.seed),
    }


def _prompts(texts: HeldOut, config: SteerConfig) -> list[tuple[int | None, Tensor, Tensor]]:
    """Return each prompt's rollout (None: not of the store), token ids, and what counts as text."""
    if config.prompts is not None:
        from lorascope.subject.rollouts import load_prompts

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


def _largest(sae: "SAE", store: ActivationStore, features: Sequence[int]) -> Tensor:
    """Return each feature's largest value on the store's tokens of text."""
    narrow, some = sae.narrow(store), torch.tensor(features)
    largest = torch.zeros(len(features))
    for first, block in narrow.blocks(_BLOCK):
        rows = torch.from_numpy(np.array(block)[store.eligible[first : first + len(block)]])
        if len(rows):
            largest = torch.maximum(largest, sae.encode_dense(rows, some).amax(0))
    silent = [feature for feature, u in zip(features, largest.tolist(), strict=True) if not u]
    if silent:
        log.warning("features %s never fire on the store: no dose does anything", silent)
    return largest


def _changes(texts: HeldOut, sae: "SAE", config: SteerConfig, largest: Tensor) -> Any:
    """Return the function from a kind of arm and a dose to its change."""
    from lorascope.causal.baselines import random_rows
    from lorascope.causal.continuing import Change

    some = torch.tensor(config.features)
    _, columns = texts.subject.layout.select(sae.layout.adapter_types)
    written = {"feature": sae.W_dec[some], "control": random_rows(sae, config.seed)[some]}

    def change(kind: str, dose: float) -> "Change":
        def of(rows: Tensor, counts: Tensor) -> Tensor:
            if config.how == "add":
                amount = (dose * largest).expand(*rows.shape[:2], -1)
            else:
                values = sae.encode_dense(rows[..., columns].cpu(), some)
                values = values * counts.cpu()[..., None]
                amount = (
                    -dose * values
                    if config.how == "remove"
                    else (dose * largest - values).clamp(min=0) * (largest > 0)
                )
            added = torch.zeros_like(rows)
            added[..., columns] = (amount @ written[kind]).to(rows.device)
            return added

        return Change(of)

    return change


def _values(sae: "SAE", one: "Written", columns: Any, features: Sequence[int]) -> Tensor:
    """Return the features' values as the clean pass reads the written tokens, `(read, feature)`."""
    if not len(one.rows):
        return torch.zeros(0, len(features))
    code = sae.encode_dense(one.rows[:, columns], torch.tensor(features))
    return code[one.counts]


def _base_surprise(editor: "RowEditor", prompt: Tensor, one: "Written") -> Any:
    """Return −log p of each written token under the base model, in nats."""
    written = torch.from_numpy(one.token_ids)
    whole = torch.cat([prompt, written])[None]
    logits = editor.base(whole)[0, len(prompt) - 1 : -1]
    return ce_of(logits, written.to(logits.device)).double().cpu().numpy()
