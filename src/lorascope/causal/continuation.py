"""Let the subject continue a prompt while its rows are changed, several changes in one batch.

A feature's value at a token depends on the token's whole row, late layers included. So every token
takes two passes, each with its own cache:

1. The *clean* pass reads the text so far with the unchanged adapter. Its rows are those that a
   store would hold for this text.
2. The *changed* pass reads the same token. Each `Change` computes from the clean rows what its
   sites write: something added to what a site reads (live), or given rows (held).
3. The next token is drawn from the changed pass (`sampling.draw`): the likeliest, or with noise
   that depends on seed, prompt, sample and position only. All changes meet the same noise, so texts
   differ where the change matters and not by chance.

All copies of a prompt have the same length, so nothing is padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorascope.causal.effects import cross_entropy, kl_divergence
from lorascope.subject.intervene import Edit, RowEditor
from lorascope.subject.sampling import draw, end_ids
from lorascope.texts.tokens import special_ids


@dataclass(frozen=True)
class Change:
    """A change of rows: `compute(rows, is_text)`, both `(copy, seq, ...)`, returns the rows' shape.

    `is_text` marks tokens of text, the only ones that features are read at. The result is added to
    what each site reads, or with `held` is written in its place.
    """

    compute: Callable[[Tensor, Tensor], Tensor]
    held: bool = False


@dataclass(frozen=True)
class Continuation:
    """One text that was written after a prompt; the arrays have an entry for each written token.

    `kl` is KL(clean ‖ changed) of the prediction that the token was drawn from, `surprise` its
    −log p in the clean pass, both in nats. `rows` are the clean rows of all tokens but the last,
    which no pass read; `is_text` marks those that are tokens of text.
    """

    token_ids: npt.NDArray[np.int64]
    kl: npt.NDArray[np.float64]
    surprise: npt.NDArray[np.float64]
    rows: Float[Tensor, "read d_in"]
    is_text: Bool[Tensor, "read"]


@torch.inference_mode()
def continue_prompt(
    editor: RowEditor,
    prompt: Int[Tensor, "seq"],
    is_text: Bool[Tensor, "seq"],
    changes: Sequence[Change | None],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: Sequence[int] = (0,),
    everywhere: bool = False,
) -> list[list[Continuation]]:
    """Return what is written after a prompt, `[change][sample]`; None among `changes` is no change.

    `is_text` marks the prompt's tokens of text. Rows are changed at the prompt's last token, which
    predicts the first new one, and at all written tokens; with `everywhere`, at the whole prompt.
    `seed` must name the prompt too. A text ends with a token that ends a turn, which is kept, or
    at `max_new_tokens`, or at the end of the model's context, where the prompt must leave room.
    """
    subject = editor.subject
    copies = len(changes) * samples
    ends = torch.tensor(end_ids(subject))
    special = torch.tensor(special_ids(subject.tokenizer))
    room = (subject.max_length or 1 << 62) - len(prompt)
    caches: list[Any] = [True, True]
    ids = prompt.expand(copies, -1)
    n_read = 0
    text_mask = is_text.expand(copies, -1)
    active = torch.ones_like(text_mask)
    active[:, :-1] = everywhere
    steps: list[_Step] = []
    done = torch.zeros(copies, dtype=torch.bool)
    for step in range(min(max_new_tokens, room)):
        n = ids.shape[1]
        if n_read and subject.length_class(n) != subject.length_class(n_read):
            caches, n_read = [True, True], 0  # the whole text now has other rotary frequencies
        clean = editor.run(ids[:, n_read:], cache=caches[0])
        edit = _combined_edit(
            changes, samples, clean.rows, text_mask[:, n_read:], active[:, n_read:]
        )
        changed = editor.run(ids[:, n_read:], edit, cache=caches[1])
        caches, n_read = [clean.cache, changed.cache], n
        p, q = clean.logits[:, -1].float(), changed.logits[:, -1].float()
        drawn = draw(q, temperature, [(*seed, step, i % samples) for i in range(copies)]).cpu()
        steps.append(
            _Step(
                drawn,
                kl_divergence(p, q).cpu(),
                cross_entropy(p, drawn.to(p.device)).cpu(),
                clean.rows[:, -1].cpu(),
                text_mask[:, -1],
            )
        )
        done |= torch.isin(drawn, ends)
        if done.all():
            break
        new = drawn[:, None]
        ids = torch.cat([ids, new], 1)
        text_mask = torch.cat([text_mask, ~torch.isin(new, special)], 1)
        active = torch.cat([active, torch.ones_like(new, dtype=torch.bool)], 1)
    every = _Step(*map(torch.stack, zip(*steps, strict=True)))
    return [
        [_continuation(every, i * samples + sample, ends) for sample in range(samples)]
        for i in range(len(changes))
    ]


class _Step(NamedTuple):
    """A step of all copies: the token drawn, its numbers, and the row that predicted it.

    Stacked, all steps of all copies, `(step, copy, ...)`.
    """

    token: Tensor
    kl: Tensor
    surprise: Tensor
    row: Tensor
    is_text: Tensor


def _combined_edit(
    changes: Sequence[Change | None],
    samples: int,
    rows: Tensor,
    is_text: Tensor,
    active: Tensor,
) -> Edit:
    """Return the edit of a batch in which each change has `samples` copies, one after another."""
    written, held = torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.bool)
    for i, change in enumerate(changes):
        if change is None:
            continue
        copies = slice(i * samples, (i + 1) * samples)
        computed = change.compute(rows[copies], is_text[copies].to(rows.device)).to(rows.device)
        held[copies] = change.held
        where = active[copies, :, None].to(rows.device)
        written[copies] = torch.where(where, computed, rows[copies] if change.held else 0.0)
    is_held = held[:, None, None].to(rows.device)

    def edit(columns: slice, values: Tensor) -> Tensor:
        here = written[..., columns].to(values.device)
        return torch.where(is_held.to(values.device), here, values + here)

    return edit


def _continuation(steps: _Step, copy: int, ends: Tensor) -> Continuation:
    """Return what one copy wrote, up to the token that ends it."""
    token_ids = steps.token[:, copy]
    stops = torch.isin(token_ids, ends).nonzero()
    n = int(stops[0]) + 1 if len(stops) else len(token_ids)
    return Continuation(
        token_ids=token_ids[:n].numpy(),
        kl=steps.kl[:n, copy].double().numpy(),
        surprise=steps.surprise[:n, copy].double().numpy(),
        rows=steps.row[1:n, copy],  # step i reads the token that step i - 1 drew
        is_text=steps.is_text[1:n, copy],
    )
