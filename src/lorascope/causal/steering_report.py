"""Sum up what steering did to texts: how far, how fluent, how repetitive, against a control."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lorascope.causal.effects import interval_of, ratio_of

if TYPE_CHECKING:
    from lorascope.causal.continuation import Written

_GRAM = 4  # tokens of what may be repeated
_SHOWN = 100  # characters of a text in the table

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Arm:
    """What one arm wrote: texts as (number of the prompt, text, −log p by the base), and values.

    `kind` is `none`, `feature` or `control`.
    """

    kind: str
    dose: float
    texts: "list[tuple[int, Written, Floats]]"
    values: list[Tensor]


def summarize(
    arms: Sequence[Arm], n_prompts: int, spell: Callable[[Any], str], seed: int
) -> list[dict[str, Any]]:
    """Return an entry of each arm, that of no change first, as JSON values."""
    unchanged = [one.token_ids.tolist() for _, one, _ in arms[0].texts]
    return [_entry(arm, unchanged, n_prompts, spell, seed) for arm in arms]


def _entry(
    arm: Arm, unchanged: Sequence[list[int]], n_prompts: int, spell: Any, seed: int
) -> dict[str, Any]:
    counts = np.zeros(n_prompts)
    sums: dict[str, Floats] = {
        name: np.zeros(n_prompts) for name in ("kl", "surprise_adapter", "surprise_base", "repeats")
    }
    grams = np.zeros(n_prompts)
    for number, one, base in arm.texts:
        counts[number] += len(one.token_ids)
        sums["kl"][number] += one.kl.sum()
        sums["surprise_adapter"][number] += one.surprise.sum()
        sums["surprise_base"][number] += base.sum()
        again, n = repeats_of(one.token_ids)
        sums["repeats"][number] += again
        grams[number] += n
    read = np.concatenate([values.numpy() for values in arm.values])
    differ = [
        one.token_ids.tolist() != before
        for (_, one, _), before in zip(arm.texts, unchanged, strict=True)
    ]
    return {
        "kind": arm.kind,
        "dose": arm.dose,
        "n_tokens": int(counts.sum()),
        "length": float(counts.sum()) / max(len(arm.texts), 1),
        "kl": ratio_of(sums["kl"], counts),
        "kl_interval": interval_of(sums["kl"], counts, seed),
        "surprise_adapter": ratio_of(sums["surprise_adapter"], counts),
        "surprise_adapter_interval": interval_of(sums["surprise_adapter"], counts, seed),
        "surprise_base": ratio_of(sums["surprise_base"], counts),
        "repeats": ratio_of(sums["repeats"], grams),
        "differ": float(np.mean(differ)) if differ else 0.0,
        "values": [float(v) for v in read.mean(0)] if len(read) else None,
        "texts": [
            {
                "prompt": number,
                "token_ids": one.token_ids.tolist(),
                "text": spell(one.token_ids),
                "kl": float(one.kl.mean()) if len(one.kl) else None,
            }
            for number, one, _ in arm.texts
        ],
    }


def repeats_of(token_ids: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Return how many runs of four tokens are there before in the text, and how many there are."""
    runs = [tuple(token_ids[i : i + _GRAM]) for i in range(len(token_ids) - _GRAM + 1)]
    return len(runs) - len(set(runs)), len(runs)


def table(report: Mapping[str, Any]) -> str:
    """Return the dose curve as a table for the terminal, with the first text of each arm."""
    named = ", ".join(map(str, report["features"]))
    lines = [
        f"features {named}, {report['how']}, at {report['where']} tokens; KL(adapter ‖ steered) "
        "and −log p of what was written, in nats a token",
        f"{'dose':>8}{'':<9}{'KL':>10}{'by adapter':>12}{'by base':>10}{'repeats':>9}{'value':>9}"
        "  first text",
    ]
    for arm in report["arms"]:
        value = "—" if arm["values"] is None else f"{arm['values'][0]:.3g}"
        text = ascii(arm["texts"][0]["text"])[1:-1] if arm["texts"] else ""
        lines.append(
            f"{arm['dose']:>8g} {arm['kind'] if arm['kind'] == 'control' else '':<8}"
            f"{_shown(arm['kl']):>10}{_shown(arm['surprise_adapter']):>12}"
            f"{_shown(arm['surprise_base']):>10}{_shown(arm['repeats']):>9}{value:>9}  "
            f"{text[:_SHOWN]}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"
