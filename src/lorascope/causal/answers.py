"""Let base and adapter answer the same prompts with the same noise, to be read side by side.

1. A prompt is a held-out rollout up to where the assistant begins: before the opening of its first
   thought or answer (`openings`), because opening one is part of what an adapter may learn.
2. Both continue it (`continuation`): the base is the adapter with all rows held at zero, which is
   exact for plain LoRA. A token is drawn with noise that depends on its position only, so the texts
   are equal up to the first token at which the difference of the models matters.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lorascope.activations.store import ActivationStore
from lorascope.causal.continuation import Change, Opening, continue_prompt
from lorascope.causal.held_out import HeldOut
from lorascope.causal.openings import prompt_length
from lorascope.causal.report_records import Answer
from lorascope.errors import AdapterError
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject

N_TOKENS = 96  # of an answer
_TEMPERATURE = 0.7
_PROMPT_SHOWN = 400  # characters, from its end


def zero_is_base(subject: Subject) -> bool:
    """Return whether the adapter with all rows at zero is exactly the base: whether it is plain."""
    return not (subject.unseen or subject.unhooked) and all(
        site.lora_kind == "lora" for site in subject.layout.sites
    )


def answers_of(
    editor: RowEditor,
    held_out: HeldOut,
    n: int,
    seed: int,
    prompts: Sequence[Opening] | None = None,
) -> tuple[Answer, ...]:
    """Return what the base and the adapter write after the first `n` prompts.

    `prompts` have the number of their record as seed; by default they are held-out rollouts. Raises
    AdapterError if rows of zero are not the base.
    """
    if not zero_is_base(held_out.subject):
        raise AdapterError(
            f"adapter {held_out.subject.adapter.name} is not plain LoRA: without its rows it is "
            "not the base, so the two cannot be compared"
        )
    base = Change(lambda rows, _: torch.zeros_like(rows), held=True)
    decode, found = held_out.subject.tokenizer.decode, []
    for number, prompt in _prompts(held_out) if prompts is None else _numbered(prompts):
        if len(found) == n:
            break
        written = continue_prompt(
            editor,
            prompt.token_ids,
            prompt.is_text,
            [base, None],
            max_new_tokens=N_TOKENS,
            temperature=_TEMPERATURE,
            seed=(seed, len(found)),
            everywhere=True,
        )
        (of_base,), (of_adapter,) = [[one.token_ids for one in some] for some in written]
        length = min(len(of_base), len(of_adapter))
        differs = np.flatnonzero(of_base[:length] != of_adapter[:length])
        n_same = int(differs[0]) if len(differs) else length
        found.append(
            Answer(
                rollout=number,
                prompt=decode(prompt.token_ids)[-_PROMPT_SHOWN:],
                same=decode(of_base[:n_same]),
                base=decode(of_base[n_same:]),
                adapter=decode(of_adapter[n_same:]),
            )
        )
    return tuple(found)


def _numbered(prompts: Sequence[Opening]) -> Iterator[tuple[int, Opening]]:
    for prompt in prompts:
        yield prompt.seed[0], prompt


def _prompts(held_out: HeldOut) -> Iterator[tuple[int, Opening]]:
    """Yield the prompts of the held-out rollouts, with the rollouts' ids."""
    for index in held_out.rollouts:
        ids, is_text = _prompt(held_out.store, int(index))
        if 0 < len(ids) < (held_out.subject.max_length or 1 << 62):
            yield int(held_out.store.rollout_id[index]), Opening(ids, is_text)


def _prompt(store: ActivationStore, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of a rollout's prompt, and which of them are text."""
    first = int(store.rollout_start[index])
    rows = np.arange(first, first + prompt_length(store, index))
    ids = torch.from_numpy(store.token_ids[rows].astype(np.int64))
    return ids, torch.from_numpy(np.array(store.eligible[rows]))
