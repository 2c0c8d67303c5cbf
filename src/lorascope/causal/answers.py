"""Let base and adapter answer the same prompts with the same noise, to be read side by side.

1. A prompt is a held-out rollout up to where the assistant begins: before the opening of its first
   thought or answer (`openings`), because opening one is part of what an adapter may learn.
2. Both continue it (`continuation`): the base is the adapter with all rows held at zero, which is
   exact for plain LoRA. A token is drawn with noise that depends on its position only, so the texts
   are equal up to the first token at which the difference of the models matters.
"""

import numpy as np
import torch

from lorascope.activations.store import ActivationStore
from lorascope.causal.continuation import Change, continue_prompt
from lorascope.causal.held_out import HeldOut
from lorascope.causal.openings import prompt_length
from lorascope.causal.report_records import Answer
from lorascope.subject.intervene import RowEditor

N_TOKENS = 96  # of an answer
_TEMPERATURE = 0.7
_PROMPT_SHOWN = 400  # characters, from its end


def answers_of(editor: RowEditor, held_out: HeldOut, n: int, seed: int) -> tuple[Answer, ...]:
    """Return what the base and the adapter write after the first `n` held-out prompts."""
    base = Change(lambda rows, _: torch.zeros_like(rows), held=True)
    decode, found = held_out.subject.tokenizer.decode, []
    for index in held_out.rollouts:
        if len(found) == n:
            break
        ids, is_text = _prompt(held_out.store, int(index))
        if not 0 < len(ids) < (held_out.subject.max_length or 1 << 62):
            continue
        written = continue_prompt(
            editor,
            ids,
            is_text,
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
                rollout=int(held_out.store.rollout_id[index]),
                prompt=decode(ids)[-_PROMPT_SHOWN:],
                same=decode(of_base[:n_same]),
                base=decode(of_base[n_same:]),
                adapter=decode(of_adapter[n_same:]),
            )
        )
    return tuple(found)


def _prompt(store: ActivationStore, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of a rollout's prompt, and which of them are text."""
    first = int(store.rollout_start[index])
    rows = np.arange(first, first + prompt_length(store, index))
    ids = torch.from_numpy(store.token_ids[rows].astype(np.int64))
    return ids, torch.from_numpy(np.array(store.eligible[rows]))
