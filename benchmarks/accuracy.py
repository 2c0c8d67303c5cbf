"""Measure how many held-out problems the shipped subject solves with its rows kept or replaced.

`evaluate` asks how close the predictions stay. This asks whether the model still does what the
adapter taught it. Every arm (one way to write the rows) answers the same problems, greedily. A
problem is solved when the number after the last answer marker is right.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorascope.causal.continuation import Change, Opening, continue_prompts
from lorascope.runtime import progress
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject
from lorascope.texts.roles import ROLES
from lorascope.texts.rollouts import Rollout, load_rollouts

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_problems import Problem, answer_of

Rebuild = Callable[[Tensor], Tensor]
_BATCH = 50  # problems that all arms answer together


def prompts_of(problems: Sequence[Problem], tokenizer: Any) -> list[Rollout]:
    """Return each problem as a chat that ends where the assistant's answer starts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "questions.jsonl"
        records = [{"messages": [{"role": "user", "content": p.question}]} for p in problems]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        prompts, _ = load_rollouts(
            dataset=str(file),
            split="train",
            limit=None,
            template="chat",
            prompts=True,
            tokenizer=tokenizer,
        )
    return prompts


def spliced(rebuild: Rebuild) -> Change:
    """Return the change that writes rebuilt rows at every token."""

    def rebuilt(rows: Tensor, counts: Tensor) -> Tensor:
        return rebuild(rows.reshape(-1, rows.shape[-1]).cpu()).view(rows.shape).to(rows.device)

    return Change(rebuilt, held=True)


def without_adapter() -> Change:
    """Return the change that writes zeros: for plain LoRA, this is the base model."""
    return Change(lambda rows, counts: torch.zeros_like(rows), held=True)


def solved(
    subject: Subject,
    problems: Sequence[Problem],
    arms: Mapping[str, Change | None],
    max_new_tokens: int = 220,
) -> dict[str, list[bool]]:
    """Return for each arm whether it solved each problem, in the problems' order."""
    special = ROLES.index("special")
    openings = [
        Opening(
            torch.from_numpy(prompt.token_ids.astype(np.int64)),
            torch.from_numpy(prompt.roles != special),
        )
        for prompt in prompts_of(problems, subject.tokenizer)
    ]
    by_length = sorted(range(len(problems)), key=lambda i: len(openings[i].token_ids))
    is_right = {name: [False] * len(problems) for name in arms}
    with RowEditor(subject) as editor, progress(len(problems), "solve", "problems") as bar:
        for start in range(0, len(problems), _BATCH):
            some = by_length[start : start + _BATCH]
            written = continue_prompts(
                editor,
                [openings[i] for i in some],
                list(arms.values()),
                max_new_tokens=max_new_tokens,
                everywhere=True,
            )
            for i, answers in zip(some, written, strict=True):
                for name, (answer,) in zip(arms, answers, strict=True):
                    text = str(subject.tokenizer.decode(answer.token_ids))
                    is_right[name][i] = answer_of(text) == problems[i].answer
            bar.update(len(some))
    return is_right
