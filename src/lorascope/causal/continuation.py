"""Let the subject continue texts while its rows are changed, several changes side by side.

A feature's value at a token depends on the token's whole row, of which late layers have a part. So
every token takes two passes, each with a cache of its own:

1. The *clean* pass reads the text so far with the adapter as it is. Its rows are those that the
   store would hold for this text.
2. The *changed* pass reads the same token; each `Change` says by the clean rows what its sites are
   to write: something added to what a site reads then (live), or rows as given (held).
3. The next token is drawn from the changed pass: the likeliest, or by the Gumbel-max trick
   (Maddison et al. 2014) with noise that depends on the seed, the prompt, the sample and the place.
   Every arm meets the same noise, so that texts differ where the change matters and not by luck.

Copies of a prompt are a batch: all have one length, so that nothing is padded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorascope.causal.effects import ce_of, kl_of
from lorascope.subject.intervene import Edit, RowEditor
from lorascope.subject.sampling import end_ids
from lorascope.texts.tokens import special_ids


@dataclass(frozen=True)
class Change:
    """What one arm does to rows: `of(rows, counts)`, both `(copy, seq, ...)`, in the rows' shape.

    `counts` marks tokens of text, at which features count. What `of` returns is added to what is
    read, or with `held` written in its place.
    """

    of: Callable[[Tensor, Tensor], Tensor]
    held: bool = False


@dataclass(frozen=True)
class Written:
    """One text as an arm wrote it; the arrays have an entry for each written token.

    `kl` is KL(clean ‖ changed) of the prediction that it was drawn from, `surprise` its −log p in
    the clean pass, both in nats. `rows` are its clean rows, without that of the last token, which
    nothing read.
    """

    token_ids: npt.NDArray[np.int64]
    kl: npt.NDArray[np.float64]
    surprise: npt.NDArray[np.float64]
    rows: Float[Tensor, "read d_in"]
    counts: Bool[Tensor, "read"]


@torch.inference_mode()
def continue_text(
    editor: RowEditor,
    prompt: Int[Tensor, "seq"],
    counts: Bool[Tensor, "seq"],
    arms: Sequence[Change | None],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: Sequence[int] = (0,),
    everywhere: bool = False,
) -> list[list[Written]]:
    """Return what each arm writes behind a prompt, `[arm][sample]`; None is an arm without change.

    `counts` are the prompt's tokens of text. The change is made at the last token of the prompt,
    from which the first new one is predicted, and at all written ones; `everywhere` at the whole
    prompt. `seed` is to name the prompt too. A text ends with a token that ends a turn, which is
    kept, or at `max_new_tokens`, or where the model's context ends.
    """
    subject = editor.subject
    copies = len(arms) * samples
    ends = torch.tensor(end_ids(subject))
    special = torch.tensor(special_ids(subject.tokenizer))
    room = (subject.max_length or 1 << 62) - len(prompt)
    caches: list[Any] = [True, True]
    ids = prompt.expand(copies, -1)
    of_text = counts.expand(copies, -1)
    active = torch.ones_like(of_text)
    active[:, :-1] = everywhere
    kept: list[list[Tensor]] = [[], [], [], [], []]  # ids, KL, surprise, rows, counts
    done = torch.zeros(copies, dtype=torch.bool)
    for step in range(max(0, min(max_new_tokens, room))):
        clean = editor.run(ids, cache=caches[0])
        edit = _joined(arms, samples, clean.rows, of_text, active)
        changed = editor.run(ids, edit, cache=caches[1])
        caches = [clean.cache, changed.cache]
        p, q = clean.logits[:, -1].float(), changed.logits[:, -1].float()
        drawn = _draw(q, samples, temperature, [*seed, step]).cpu()
        if step:
            kept[3].append(clean.rows[:, 0].cpu())
            kept[4].append(of_text[:, 0])
        kept[0].append(drawn)
        kept[1].append(kl_of(p, q).cpu())
        kept[2].append(ce_of(p, drawn.to(p.device)).cpu())
        done |= torch.isin(drawn, ends)
        if done.all():
            break
        ids = drawn[:, None]
        of_text, active = ~torch.isin(ids, special), torch.ones_like(ids, dtype=torch.bool)
    return [
        [_written(kept, arm * samples + sample, ends) for sample in range(samples)]
        for arm in range(len(arms))
    ]


def _joined(
    arms: Sequence[Change | None], samples: int, rows: Tensor, counts: Tensor, active: Tensor
) -> Edit:
    """Return the edit of a batch in which each arm has `samples` copies, one behind another."""
    added, held = torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.bool)
    for i, arm in enumerate(arms):
        if arm is None:
            continue
        mine = slice(i * samples, (i + 1) * samples)
        given = arm.of(rows[mine], counts[mine].to(rows.device)).to(rows.device)
        held[mine] = arm.held
        where = active[mine, :, None].to(rows.device)
        added[mine] = torch.where(where, given, rows[mine] if arm.held else 0.0)
    whole = held[:, None, None].to(rows.device)

    def edit(columns: slice, values: Tensor) -> Tensor:
        here = added[..., columns].to(values.device)
        return torch.where(whole.to(values.device), here, values + here)

    return edit


def _draw(logits: Tensor, samples: int, temperature: float, seed: Sequence[int]) -> Tensor:
    """Return the next token of each copy; copies of one sample meet the same noise."""
    if not temperature:
        return logits.argmax(-1)
    noise = []
    for sample in range(samples):
        state = np.random.SeedSequence([*seed, sample]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        uniform = torch.rand(logits.shape[1], generator=generator, dtype=torch.float64)
        noise.append(-torch.log(-torch.log(uniform.clamp(min=1e-300))))
    both = torch.stack(noise).repeat(len(logits) // samples, 1).to(logits.device)
    return (logits.double() / temperature + both).argmax(-1)


def _written(kept: Sequence[Sequence[Tensor]], copy: int, ends: Tensor) -> Written:
    """Return what one copy wrote, up to the token that ends it."""
    ids = torch.tensor([int(step[copy]) for step in kept[0]], dtype=torch.int64)
    stops = torch.isin(ids, ends).nonzero()
    n = int(stops[0]) + 1 if len(stops) else len(ids)
    kl, surprise = (np.array([float(step[copy]) for step in part[:n]]) for part in kept[1:3])
    read = [step[copy] for step in kept[3][: max(n - 1, 0)]]
    marks = [bool(step[copy]) for step in kept[4][: max(n - 1, 0)]]
    return Written(
        ids[:n].numpy(),
        kl,
        surprise,
        torch.stack(read) if read else torch.zeros(0, 0),
        torch.tensor(marks, dtype=torch.bool),
    )
