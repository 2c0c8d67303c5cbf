"""Let the subject continue prompts while its rows are changed, several changes in one batch.

A feature's value at a token depends on the token's whole row, late layers included. So every token
takes two passes, each with its own cache (a model without one reads the text again each time):

1. The *clean* pass reads the text so far with the unchanged adapter. Its rows are those that a
   store would hold for this text.
2. The *changed* pass reads the same token. Each `Change` computes from the clean rows what its
   sites write: something added to what a site reads (live), or given rows (held).
3. The next token is drawn from the changed pass (`sampling.draw`): the likeliest, or with noise
   that depends on seed, prompt, sample and position only. All changes meet the same noise, so texts
   differ where the change matters and not by chance.

`answers_of` lets base and adapter answer the same prompts, to be read side by side. A prompt is a
held-out rollout up to where the assistant begins: before the opening of its first thought or answer
(`openings`), because opening one is part of what an adapter may learn. The base is the adapter with
all rows held at zero, which is exact for plain LoRA.

Nothing is padded: all texts of a batch begin at position 0 and grow by one token at a time. While
they are shorter than their prompt, the next token is the prompt's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorascope.activations.store import ActivationStore
from lorascope.causal.effects import cross_entropy, kl_divergence
from lorascope.causal.held_out import HeldOut
from lorascope.causal.openings import prompt_length
from lorascope.causal.report_records import Answer
from lorascope.errors import AdapterError, DatasetError
from lorascope.subject.intervene import Edit, RowEditor
from lorascope.subject.load import Subject
from lorascope.subject.sampling import draw, end_ids
from lorascope.texts.roles import SPECIAL
from lorascope.texts.rollouts import load_rollouts
from lorascope.texts.tokens import special_ids

N_TOKENS = 96  # of an answer
_TEMPERATURE = 0.7
_PROMPT_SHOWN = 400  # characters, from its end


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


class Opening(NamedTuple):
    """A prompt to continue: token ids, which of them are text, and the seed of the noise."""

    token_ids: Int[Tensor, "seq"]
    is_text: Bool[Tensor, "seq"]
    seed: Sequence[int] = (0,)


def read_prompts(dataset: str, limit: int, subject: Subject) -> list[Opening]:
    """Return the prompts of a dataset's first `limit` records, with the records' numbers as seeds.

    Raises DatasetError if none is usable, or if one leaves no room in the model's context.
    """
    rollouts, _ = load_rollouts(
        dataset=dataset,
        split="train",
        limit=limit,
        template="auto",
        prompts=True,
        tokenizer=subject.tokenizer,
    )
    room = subject.max_length or 1 << 62
    for rollout in rollouts:
        if (n := len(rollout.token_ids)) >= room:
            raise DatasetError(
                f"prompt {rollout.id} of {dataset} has {n} tokens, which leaves no room "
                f"in the model's context of {room}; shorten it"
            )
    return [
        Opening(
            torch.from_numpy(rollout.token_ids.astype(np.int64)),
            torch.from_numpy(rollout.roles != SPECIAL),
            (rollout.id,),
        )
        for rollout in rollouts
    ]


def held_out_prompts(
    held_out: HeldOut, limit: int, length: Callable[[ActivationStore, int], int]
) -> list[Opening]:
    """Return the first `limit` held-out rollouts, cut, with the rollouts' ids as seeds.

    `length(store, index)` is how many tokens of a rollout are its prompt. Rollouts without one are
    left out, and those whose prompt leaves no room in the model's context.
    """
    store, prompts = held_out.store, list[Opening]()
    for index in held_out.rollouts.tolist():
        if len(prompts) == limit:
            break
        n = length(store, index)
        if 0 < n < (held_out.subject.max_length or 1 << 62):
            first = int(store.rollout_start[index])
            rows = slice(first, first + n)
            ids = torch.from_numpy(store.token_ids[rows].astype(np.int64))
            is_text = torch.from_numpy(np.array(store.eligible[rows]))
            prompts.append(Opening(ids, is_text, (int(store.rollout_id[index]),)))
    return prompts


@torch.inference_mode()
def continue_prompts(
    editor: RowEditor,
    prompts: Sequence[Opening],
    changes: Sequence[Change | None],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 0.0,
    everywhere: bool = False,
) -> list[list[list[Continuation]]]:
    """Return what is written after each prompt, `[prompt][change][sample]`.

    None among `changes` is no change. Rows are changed at a prompt's last token, which predicts the
    first new one, and at all written tokens; with `everywhere`, at the whole prompt. Prompts need
    different seeds. A text ends with a token that ends a turn, which is kept, or at
    `max_new_tokens`, or at the end of the model's context, where each prompt must leave room.
    """
    subject = editor.subject
    ends = torch.tensor(end_ids(subject))
    special = torch.tensor(special_ids(subject.tokenizer))
    copied = [prompt for _ in changes for prompt in prompts for _ in range(samples)]
    own_ids = pad_sequence([prompt.token_ids for prompt in copied], batch_first=True)
    own_text = pad_sequence([prompt.is_text for prompt in copied], batch_first=True)
    length = torch.tensor([len(prompt.token_ids) for prompt in copied])
    longest = (length + max_new_tokens).clamp(max=subject.max_length or 1 << 62)
    first = int(length.min())
    ids, text_mask = own_ids[:, :first], own_text[:, :first]
    caches: list[Any] = [True, True]
    n_read = 0
    steps: list[_Step] = []
    done = torch.zeros(len(copied), dtype=torch.bool)
    while not done.all():
        n = ids.shape[1]
        if n_read and subject.length_class(n) != subject.length_class(n_read):
            caches, n_read = [True, True], 0  # the whole text now has other rotary frequencies
        clean = editor.run(ids[:, n_read:], cache=caches[0])
        active = (torch.arange(n_read, n) >= length[:, None] - 1) | everywhere
        edit = _combined_edit(changes, clean.rows, text_mask[:, n_read:], active)
        changed = editor.run(ids[:, n_read:], edit, cache=caches[1])
        caches = [clean.cache, changed.cache]
        n_read = n if None not in caches else 0
        p, q = clean.logits[:, -1].float(), changed.logits[:, -1].float()
        written = (n - length).clamp(min=0).tolist()
        seeds = [(*copied[i].seed, step, i % samples) for i, step in enumerate(written)]
        drawn = draw(q, temperature, seeds).cpu()
        steps.append(
            _Step(
                drawn,
                kl_divergence(p, q).cpu(),
                cross_entropy(p, drawn.to(p.device)).cpu(),
                clean.rows[:, -1].cpu(),
                text_mask[:, -1],
            )
        )
        done |= (n >= length) & (torch.isin(drawn, ends) | (n + 1 >= longest))
        new, is_text = drawn, ~torch.isin(drawn, special)
        if n < own_ids.shape[1]:
            new = torch.where(n < length, own_ids[:, n], new)
            is_text = torch.where(n < length, own_text[:, n], is_text)
        ids = torch.cat([ids, new[:, None]], 1)
        text_mask = torch.cat([text_mask, is_text[:, None]], 1)
    every = _Step(*map(torch.stack, zip(*steps, strict=True)))
    texts = [
        _continuation(_Step(*(x[n - first : m - first, i] for x in every)), ends)
        for i, (n, m) in enumerate(zip(length.tolist(), longest.tolist(), strict=True))
    ]
    per_change = len(prompts) * samples
    return [
        [
            texts[start + i * samples : start + (i + 1) * samples]
            for start in range(0, len(texts), per_change)
        ]
        for i in range(len(prompts))
    ]


class _Step(NamedTuple):
    """A step of all copies: the token drawn, its numbers, and the row that predicted it.

    Stacked, all steps of all copies, `(step, copy, ...)`, or of one, `(step, ...)`.
    """

    token: Tensor
    kl: Tensor
    surprise: Tensor
    row: Tensor
    is_text: Tensor


def _combined_edit(
    changes: Sequence[Change | None],
    rows: Tensor,
    is_text: Tensor,
    active: Tensor,
) -> Edit:
    """Return the edit of a batch in which each change has as many copies, one after another."""
    size = len(rows) // len(changes)
    written, held = torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.bool)
    for i, change in enumerate(changes):
        if change is None:
            continue
        copies = slice(i * size, (i + 1) * size)
        computed = change.compute(rows[copies], is_text[copies].to(rows.device)).to(rows.device)
        held[copies] = change.held
        where = active[copies, :, None].to(rows.device)
        written[copies] = torch.where(where, computed, rows[copies] if change.held else 0.0)
    is_held = held[:, None, None].to(rows.device)

    def edit(columns: slice, values: Tensor) -> Tensor:
        here = written[..., columns].to(values.device)
        return torch.where(is_held.to(values.device), here, values + here)

    return edit


def _continuation(steps: _Step, ends: Tensor) -> Continuation:
    """Return what one copy wrote, up to the token that ends it."""
    stops = torch.isin(steps.token, ends).nonzero()
    n = int(stops[0]) + 1 if len(stops) else len(steps.token)
    return Continuation(
        token_ids=steps.token[:n].numpy(),
        kl=steps.kl[:n].double().numpy(),
        surprise=steps.surprise[:n].double().numpy(),
        rows=steps.row[1:n],  # step i reads the token that step i - 1 drew
        is_text=steps.is_text[1:n],
    )


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
