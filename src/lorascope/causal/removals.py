"""Run a text many times in one batch, each time with another change, and compare with no change.

1. A text is alone in its batch, as often as fits. Copy 0 is left as it is: the reference of all
   others. A kernel may sum in another order when a batch has another shape, so that only runs of
   one batch differ by their changes alone.
2. Two kinds of changes. `Live` ones multiply what each site reads by `keep` and push what it
   writes; later sites answer to what is left. `Held` ones write rows that are given, at all sites.
3. Of each change the sums over a text's tokens are kept: of KL(reference ‖ change), of the rise of
   the loss on the next token, and of KL at marked tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorascope.causal.effects import ce_of, counted, kl_of
from lorascope.causal.held_out import SPECIAL, Batch, HeldOut
from lorascope.subject.intervene import RowEditor

__all__ = ["Held", "Live", "Sums", "copies_of", "run_held", "run_live"]

T = TypeVar("T")
_COPIES = 64  # of a text at once; more gain nothing


@dataclass(frozen=True)
class Live:
    """What a change does to each column, `(d_in,)`, and to what each site writes, `(n_sites,)`.

    `keep` multiplies; `push` adds a random direction of so many times the norm of what is written.
    """

    keep: Float[Tensor, "d_in"]
    push: Float[Tensor, "site"]


@dataclass(frozen=True)
class Held:
    """Rows to write, `(seq, d_in)`, and the tokens at which they differ from the adapter's."""

    rows: Float[Tensor, "seq d_in"]
    where: Bool[Tensor, "seq"]


@dataclass(frozen=True)
class Sums:
    """Sums over one text's tokens for each change, `(n_changes,)`, in nats.

    `kl` and `ce` are over the tokens that count, `special` is KL over special ones, `here` KL over
    those that count at which the change was made.
    """

    kl: npt.NDArray[np.float64]
    ce: npt.NDArray[np.float64]
    special: npt.NDArray[np.float64]
    here: npt.NDArray[np.float64]

    @classmethod
    def joined(cls, parts: "Sequence[Sums]") -> "Sums":
        """Return the sums of the changes of several batches, in their order."""
        names = ("kl", "ce", "special", "here")
        empty = [np.zeros(0)]
        return cls(*(np.concatenate([*empty, *(getattr(p, n) for p in parts)]) for n in names))


def run_live(
    editor: RowEditor, texts: HeldOut, batch: Batch, changes: Sequence[Live]
) -> tuple[Sums, Tensor]:
    """Return the sums of live changes to one text, and the reference's logits `(token, vocab)`."""
    parts, reference = [], torch.empty(0)
    for some in _cut(changes, copies_of(texts, batch)):
        none = Live(torch.ones_like(some[0].keep), torch.zeros_like(some[0].push))
        keep = torch.stack([change.keep for change in (none, *some)])[:, None]
        push = torch.stack([change.push for change in (none, *some)])
        ids = batch.token_ids.expand(len(some) + 1, -1)
        logits = editor.run(
            ids,
            lambda columns, values, keep=keep: values * keep[..., columns].to(values.device),
            push=push if push.any() else None,
        ).logits
        sums, reference = _compare(logits, texts, batch, [None] * len(some))
        parts.append(sums)
    return Sums.joined(parts), reference


def run_held(
    editor: RowEditor, texts: HeldOut, batch: Batch, rows: Tensor, changes: Sequence[Held]
) -> Sums:
    """Return the sums of held changes to one text, of which `rows` are those of the adapter."""
    parts = []
    for some in _cut(changes, copies_of(texts, batch)):
        given = torch.stack([rows, *(change.rows for change in some)])
        ids = batch.token_ids.expand(len(some) + 1, -1)
        logits = editor.run(ids, lambda columns, _, given=given: given[..., columns]).logits
        parts.append(_compare(logits, texts, batch, [change.where for change in some])[0])
    return Sums.joined(parts)


def copies_of(texts: HeldOut, batch: Batch) -> int:
    """Return how many changed copies of a text fit beside the reference, at least one."""
    return max(1, min(_COPIES, texts.batch_tokens // batch.token_ids.shape[1]) - 1)


def _cut(changes: Sequence[T], size: int) -> list[Sequence[T]]:
    return [changes[first : first + size] for first in range(0, len(changes), size)]


def _compare(
    logits: Tensor, texts: HeldOut, batch: Batch, where: Sequence[Tensor | None]
) -> tuple[Sums, Tensor]:
    mask = batch.mask
    targets = batch.targets[mask].to(logits.device)
    usual = torch.from_numpy(texts.role_of(batch.measured) != SPECIAL)
    reference = counted(logits[:1], mask)
    loss = ce_of(reference, targets)
    found = np.zeros((4, len(where)))
    for i, marked in enumerate(where):
        other = counted(logits[i + 1 : i + 2], mask)
        kl = kl_of(reference, other).double().cpu()
        rise = (ce_of(other, targets) - loss).double().cpu()
        here = usual if marked is None else usual & marked.cpu()[mask[0]]
        values = kl[usual].sum(), rise[usual].sum(), kl[~usual].sum(), kl[here].sum()
        found[:, i] = [float(value) for value in values]
    return Sums(*found), reference
