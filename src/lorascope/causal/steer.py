"""Let the subject write with features added, removed or clamped, at increasing doses.

1. Prompts are held-out rollouts up to where the assistant begins to think or to answer, or those
   of `--prompts`. Every condition continues each prompt (`continuation`), with the same noise.
2. Conditions: no change, which is dose 0; each dose; and for each dose a control, in which a random
   direction of the same norm in the SAE's units takes the place of the feature's decoder row.
3. At a token where the feature's value is `c`, and `u` is its largest value on the store, dose `t`
   adds this many decoder rows to the row: `t·u` (`add`), `−t·c` (`remove`; 1 removes the feature),
   or `max(0, t·u − c)` (`clamp`: the value becomes at least `t·u`). Later sites respond.
4. Each condition is described by KL(adapter ‖ steered) of its predictions, by how unlikely its text
   is for the adapter and for the base, and by how much it repeats itself.

In: adapter, activation store, SAE, features. Out: a report (JSON) with the texts, and a picture.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope import runtime
from lorascope.activations.batches import read_blocks
from lorascope.activations.store import ActivationStore
from lorascope.artifact import digest_file
from lorascope.causal.continuation import (
    Change,
    Continuation,
    Opening,
    continue_prompts,
    held_out_prompts,
    read_prompts,
)
from lorascope.causal.effect_options import SteerConfig, require_features
from lorascope.causal.effects import bootstrap_interval, cross_entropy, ratio_of_sums, sum_by
from lorascope.causal.figures import draw_steering
from lorascope.causal.held_out import HeldOut, describe_run, open_held_out
from lorascope.causal.openings import length_before_writing
from lorascope.causal.patch import select_latents
from lorascope.causal.report_records import (
    Prompt,
    SteeredText,
    SteeringCondition,
    SteeringReport,
)
from lorascope.causal.study import Made, format_number, format_table, report_at
from lorascope.errors import ArtifactError
from lorascope.sae.model import SAE, load_sae
from lorascope.subject.intervene import RowEditor
from lorascope.subject.sampling import log_ignored_settings

log = logging.getLogger(__name__)

_N_GRAM = 4  # tokens of a run that may be repeated
_TEXT_SHOWN = 100  # characters of a text in the table

Floats = npt.NDArray[np.float64]


def run(config: SteerConfig) -> Path:
    """Let the model write with features at several doses, and return the report's file (JSON).

    KL(adapter ‖ steered) is in nats a token, beside that of a random direction of the same size. A
    finished report of the same settings is kept. Raises ArtifactError if inputs do not belong
    together.
    """
    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.sae, store)
    require_features(config.features, sae)
    parents = {"activations": store.digest, "sae": sae.digest}
    if config.prompts is not None and Path(config.prompts).is_file():
        parents["prompts"] = digest_file(Path(config.prompts))

    def make() -> Made:
        held_out = open_held_out(config, sae)
        report = measure(held_out, sae, config)
        return Made(report, held_out.subject.layout, describe_run(held_out, config.sae))

    return report_at(
        config.output,
        SteeringReport,
        settings={**config.settings(), "prompts": config.prompts and Path(config.prompts).name},
        parents=parents,
        overwrite=config.overwrite,
        make=make,
        table=table,
        draw=draw_steering,
    )


class _Written(NamedTuple):
    """One continuation: its prompt's index, −log p by the base, and the features' values.

    The values, `(read, feature)`, are those that the clean pass reads at tokens of text.
    """

    prompt: int
    text: Continuation
    base_surprise: Floats
    values: Tensor


@dataclass
class _Condition:
    """One condition, its change (None: no change), and what was written under it so far."""

    kind: Literal["none", "feature", "control"]
    dose: float
    change: Change | None
    written: list[_Written] = field(default_factory=list)


@torch.inference_mode()
def measure(held_out: HeldOut, sae: SAE, config: SteerConfig) -> SteeringReport:
    """Let the subject continue the prompts under every condition, and return the report."""
    log_ignored_settings(held_out.subject.base)
    prompts, selected = _prompts(held_out, config), select_latents(sae, config.features)
    largest = _largest_values(selected, held_out.store, config.features)
    _, columns = held_out.subject.layout.select(sae.layout.adapter_types)
    conditions = _conditions(sae, selected, largest, columns, config)
    with (
        RowEditor(held_out.subject) as editor,
        runtime.progress(len(prompts), "steer", "prompts") as bar,
    ):
        longest = max(len(prompt.token_ids) for prompt in prompts) + config.max_new_tokens
        size = max(1, held_out.batch_tokens // (config.samples * longest))  # prompts × conditions
        n_prompts = max(1, size // len(conditions))
        for begin in range(0, len(prompts), n_prompts):
            group = prompts[begin : begin + n_prompts]
            for first in range(0, len(conditions), size):
                chunk = conditions[first : first + size]
                continuations = continue_prompts(
                    editor,
                    [one._replace(seed=(config.seed, begin + i)) for i, one in enumerate(group)],
                    [condition.change for condition in chunk],
                    samples=config.samples,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    everywhere=config.where == "all",
                )
                for number, of_prompt in enumerate(continuations, begin):
                    ids = prompts[number].token_ids
                    for condition, samples in zip(chunk, of_prompt, strict=True):
                        condition.written += [
                            _Written(
                                number,
                                text,
                                _base_surprise(editor, ids, text),
                                selected.encode_dense(text.rows[:, columns])[text.is_text],
                            )
                            for text in samples
                        ]
            bar.update(len(group))
    decode = held_out.subject.tokenizer.decode
    unchanged = [one.text.token_ids.tolist() for one in conditions[0].written]
    return SteeringReport(
        features=config.features,
        how=config.how,
        where=config.where,
        unit=dict(zip(map(str, config.features), largest.tolist(), strict=True)),
        prompts=tuple(
            Prompt(
                rollout=prompt.seed[0] if config.prompts is None else None,
                text=decode(prompt.token_ids),
            )
            for prompt in prompts
        ),
        arms=tuple(
            _summarize(condition, unchanged, len(prompts), decode, config.seed)
            for condition in conditions
        ),
    )


def _prompts(held_out: HeldOut, config: SteerConfig) -> list[Opening]:
    """Return the prompts of the config's dataset, or else of the store."""
    if config.prompts is not None:
        return read_prompts(config.prompts, config.num_prompts, held_out.subject)
    prompts = held_out_prompts(held_out, config.num_prompts, length_before_writing)
    if not prompts:
        raise ArtifactError(
            f"{held_out.store.path}: every held-out rollout begins with the assistant, or its "
            "prompt fills the model's context; give prompts with --prompts"
        )
    return prompts


def _largest_values(selected: SAE, store: ActivationStore, features: Sequence[int]) -> Tensor:
    """Return the largest value of each latent of `selected` on the store's tokens of text."""
    largest = torch.zeros(selected.d_sae)
    for rows in read_blocks(selected.narrow(store), np.flatnonzero(store.eligible)):
        largest = torch.maximum(largest, selected.encode_dense(rows).amax(0))
    silent = [feature for feature, u in zip(features, largest.tolist(), strict=True) if not u]
    if silent:
        log.warning("features %s never fire on the store: steering them has no effect", silent)
    return largest


def _conditions(
    sae: SAE,
    selected: SAE,
    largest: Tensor,
    columns: npt.NDArray[np.int64],
    config: SteerConfig,
) -> list[_Condition]:
    """Return no change first, then each dose with its control."""
    random_rows = _random_decoder_rows(sae, config.seed)[list(config.features)]

    def change(dose: float, decoder: Tensor) -> Change:
        def compute(rows: Tensor, is_text: Tensor) -> Tensor:
            amounts = dose * largest  # `t·u` of each latent
            if config.how == "add":
                factors = amounts.expand(*rows.shape[:2], -1)
            else:
                values = selected.encode_dense(rows[..., columns].cpu()) * is_text.cpu()[..., None]
                is_removal = config.how == "remove"
                factors = -dose * values if is_removal else (amounts - values).clamp(min=0)
            added = torch.zeros_like(rows)
            added[..., columns] = (factors @ decoder).to(rows.device)
            return added

        return Change(compute)

    conditions = [_Condition("none", 0.0, None)]
    for dose in dict.fromkeys(dose for dose in config.doses if dose):
        conditions.append(_Condition("feature", dose, change(dose, selected.W_dec)))
        conditions.append(_Condition("control", dose, change(dose, random_rows)))
    return conditions


def _random_decoder_rows(sae: SAE, seed: int) -> Tensor:
    """Return a random direction for each latent, of its decoder row's norm in the SAE's units.

    Drawn in raw units, it would lie mostly in columns that the adapter hardly uses.
    """
    scale = sae.scale.cpu()
    drawn = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(seed))
    drawn *= scale > 0
    length = (sae.W_dec.cpu() * scale).norm(dim=1, keepdim=True)
    drawn *= length / drawn.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.where(scale > 0, drawn / scale, 0.0)


def _base_surprise(editor: RowEditor, prompt: Tensor, text: Continuation) -> Floats:
    """Return −log p of each written token under the base model, in nats."""
    written = torch.from_numpy(text.token_ids)
    whole = torch.cat([prompt, written])[None]
    read = range(len(prompt), whole.shape[1])  # tokens before each that was written
    logits = torch.cat(
        [
            editor.base(whole[:, : lengths[-1]])[0, lengths[0] - 1 :]
            for _, same in groupby(read, editor.subject.length_class)
            for lengths in [list(same)]
        ]
    )
    return cross_entropy(logits, written.to(logits.device)).double().cpu().numpy()


def _summarize(
    condition: _Condition,
    unchanged: Sequence[list[int]],
    n_prompts: int,
    decode: Callable[[Any], str],
    seed: int,
) -> SteeringCondition:
    """Return one condition's sums over tokens; `unchanged` are the token ids of no change."""
    written = condition.written

    def by_prompt(values: Sequence[float]) -> Floats:
        return sum_by(np.array([one.prompt for one in written]), values, n_prompts)

    n_tokens = by_prompt([len(one.text.token_ids) for one in written])
    kl = by_prompt([one.text.kl.sum() for one in written])
    surprise = by_prompt([one.text.surprise.sum() for one in written])
    base_surprise = by_prompt([one.base_surprise.sum() for one in written])
    repeats = [count_repeats(one.text.token_ids) for one in written]
    values = np.concatenate([one.values.numpy() for one in written])
    differ = [
        one.text.token_ids.tolist() != before
        for one, before in zip(written, unchanged, strict=True)
    ]
    return SteeringCondition(
        kind=condition.kind,
        dose=condition.dose,
        n_tokens=int(n_tokens.sum()),
        length=float(n_tokens.sum()) / max(len(written), 1),
        kl=ratio_of_sums(kl, n_tokens),
        kl_interval=bootstrap_interval(kl, n_tokens, seed),
        surprise_adapter=ratio_of_sums(surprise, n_tokens),
        surprise_adapter_interval=bootstrap_interval(surprise, n_tokens, seed),
        surprise_base=ratio_of_sums(base_surprise, n_tokens),
        repeats=ratio_of_sums(
            by_prompt([again for again, _ in repeats]), by_prompt([n for _, n in repeats])
        ),
        differ=float(np.mean(differ)) if differ else 0.0,
        values=tuple(float(v) for v in values.mean(0)) if len(values) else None,
        texts=tuple(
            SteeredText(
                prompt=one.prompt,
                token_ids=tuple(one.text.token_ids.tolist()),
                text=decode(one.text.token_ids),
                kl=float(one.text.kl.mean()) if len(one.text.kl) else None,
            )
            for one in written
        ),
    )


def count_repeats(token_ids: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Return how many runs of four tokens occurred earlier in the text, and how many there are."""
    runs = [tuple(token_ids[i : i + _N_GRAM]) for i in range(len(token_ids) - _N_GRAM + 1)]
    return len(runs) - len(set(runs)), len(runs)


def table(report: SteeringReport) -> str:
    """Return the dose curve as a table for the terminal, with the first text of each condition."""
    named = ", ".join(map(str, report.features))
    lines = [
        f"features {named}, {report.how}, at {report.where} tokens; KL(adapter ‖ steered) and "
        "−log p of the text, in nats a token",
        *format_table(
            ("dose", "", "KL", "by adapter", "by base", "repeats", "value", "first text"),
            (
                (
                    f"{arm.dose:g}",
                    arm.kind if arm.kind == "control" else "",
                    format_number(arm.kl, ".4g"),
                    format_number(arm.surprise_adapter, ".4g"),
                    format_number(arm.surprise_base, ".4g"),
                    format_number(arm.repeats, ".4g"),
                    format_number(None if arm.values is None else arm.values[0], ".3g"),
                    repr(arm.texts[0].text)[1:-1][:_TEXT_SHOWN] if arm.texts else "",
                )
                for arm in report.arms
            ),
            left=(1, 7),
        ),
    ]
    return "\n".join(lines)
