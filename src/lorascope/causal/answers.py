"""Let base and adapter answer the same prompts with the same noise, to be read side by side.

1. A prompt is a held-out rollout up to where the assistant begins: before the opening of its first
   thought or answer (`openings`), because opening one is part of what an adapter may learn.
2. Both continue it (`continuation`): the base is the adapter with all rows held at zero, which is
   exact for plain LoRA. A token is drawn with noise that depends on its position only, so the texts
   are equal up to the first token at which the difference of the models matters.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lorascope.causal.continuation import Change, Opening, continue_prompts, held_out_prompts
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

    `prompts` have the number of their record as seed; by default they are held-out rollouts, with
    their ids. Raises AdapterError if rows of zero are not the base.
    """
    if not zero_is_base(held_out.subject):
        raise AdapterError(
            f"adapter {held_out.subject.adapter.name} is not plain LoRA: without its rows it is "
            "not the base, so the two cannot be compared"
        )
    base = Change(lambda rows, _: torch.zeros_like(rows), held=True)
    decode, found = held_out.subject.tokenizer.decode, list[Answer]()
    given = held_out_prompts(held_out, n, prompt_length) if prompts is None else prompts[:n]
    longest = max((len(prompt.token_ids) for prompt in given), default=0) + N_TOKENS
    size = max(1, held_out.batch_tokens // (2 * longest))
    while chunk := given[len(found) : len(found) + size]:
        written = continue_prompts(
            editor,
            [prompt._replace(seed=(seed, len(found) + i)) for i, prompt in enumerate(chunk)],
            [base, None],
            max_new_tokens=N_TOKENS,
            temperature=_TEMPERATURE,
            everywhere=True,
        )
        for prompt, of_both in zip(chunk, written, strict=True):
            of_base, of_adapter = (one.token_ids for (one,) in of_both)
            length = min(len(of_base), len(of_adapter))
            differs = np.flatnonzero(of_base[:length] != of_adapter[:length])
            n_same = int(differs[0]) if len(differs) else length
            found.append(
                Answer(
                    rollout=prompt.seed[0],
                    prompt=decode(prompt.token_ids)[-_PROMPT_SHOWN:],
                    same=decode(of_base[:n_same]),
                    base=decode(of_base[n_same:]),
                    adapter=decode(of_adapter[n_same:]),
                )
            )
    return tuple(found)
