"""Name the parts of an adapter, and measure many changes of one rollout in the same batch.

1. Each batch has one rollout, repeated. Copy 0 is unchanged and is the reference for the others: a
   kernel may sum in another order in a batch of another shape, so only copies of the same batch
   differ by their changes alone.
2. A `LiveChange` multiplies what each site reads by `keep` and pushes what it writes; later sites
   respond. A `HeldChange` writes given rows at all sites.
3. For each change the sums over the rollout's tokens are kept: KL(reference ‖ change), the rise of
   the loss on the next token, and KL at marked tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lorascope.causal.effects import cross_entropy, kl_divergence, select_measured
from lorascope.causal.held_out import SPECIAL, Batch, HeldOut
from lorascope.sites import PROJECTIONS, SiteLayout

if TYPE_CHECKING:
    from lorascope.subject.intervene import RowEditor

T = TypeVar("T")
_MOST_COPIES = 64  # of a rollout in one batch; more are not faster
_BLOCKS = {"mlp": PROJECTIONS[:3], "attention": PROJECTIONS[3:]}


@dataclass(frozen=True)
class Part:
    """Some sites of a layout: a mask of their columns, `(d_in,)`, and of the sites, `(n_sites,)`.

    `kind` is `site`, `projection`, `layer` or `block`. Layer -1 has the sites outside any layer.
    """

    kind: str
    name: str
    columns: Bool[Tensor, "d_in"]
    sites: Bool[Tensor, "site"]


def adapter_parts(layout: SiteLayout) -> list[Part]:
    """Return sites, projections, layers, then MLP and attention, each in column order.

    MLP and attention are there only when the layout has sites of both, under their usual names.
    """
    ranks = torch.tensor([site.rank for site in layout.sites])

    def part(kind: str, name: str, members: list[bool]) -> Part:
        sites = torch.tensor(members)
        return Part(kind, name, sites.repeat_interleave(ranks), sites)

    blocks = {
        block: [site.projection in names for site in layout.sites]
        for block, names in _BLOCKS.items()
    }
    has_both = all(any(members) for members in blocks.values())
    return [
        *(
            part("site", site.name, [other is site for other in layout.sites])
            for site in layout.sites
        ),
        *(
            part("projection", name, [site.projection == name for site in layout.sites])
            for name in layout.adapter_types
        ),
        *(
            part("layer", str(layer), [site.layer == layer for site in layout.sites])
            for layer in sorted({site.layer for site in layout.sites})
        ),
        *(part("block", name, members) for name, members in blocks.items() if has_both),
    ]


@dataclass(frozen=True)
class LiveChange:
    """Change what each column reads, `(d_in,)`, and what each site writes, `(n_sites,)`.

    `keep` multiplies the rows. `push` adds a random direction to what a site writes, of `push`
    times its norm.
    """

    keep: Float[Tensor, "d_in"]
    push: Float[Tensor, "site"]


@dataclass(frozen=True)
class HeldChange:
    """Write these rows, `(seq, d_in)`; `where` marks the tokens whose rows are changed."""

    rows: Float[Tensor, "seq d_in"]
    where: Bool[Tensor, "seq"]


@dataclass(frozen=True)
class TokenSums:
    """Sums over one rollout's tokens for each change, `(n_changes,)`, in nats.

    `kl` and `ce` are over usual tokens, `special` is KL over special tokens, `here` is KL over the
    usual tokens at which a held change was made.
    """

    kl: npt.NDArray[np.float64]
    ce: npt.NDArray[np.float64]
    special: npt.NDArray[np.float64]
    here: npt.NDArray[np.float64]

    @classmethod
    def concatenate(cls, parts: "Sequence[TokenSums]") -> "TokenSums":
        """Return the sums of the changes of several batches, in their order."""
        names = ("kl", "ce", "special", "here")
        empty = [np.zeros(0)]
        return cls(*(np.concatenate([*empty, *(getattr(p, n) for p in parts)]) for n in names))


def run_live(
    editor: "RowEditor", held_out: HeldOut, batch: Batch, changes: Sequence[LiveChange]
) -> tuple[TokenSums, Tensor]:
    """Return the sums of live changes to one rollout, and the reference logits `(token, vocab)`."""
    parts, reference = [], torch.empty(0)
    for chunk in _chunks(changes, n_changed_copies(held_out, batch)):
        unchanged = LiveChange(torch.ones_like(chunk[0].keep), torch.zeros_like(chunk[0].push))
        keep = torch.stack([change.keep for change in (unchanged, *chunk)])[:, None]
        push = torch.stack([change.push for change in (unchanged, *chunk)])
        ids = batch.token_ids.expand(len(chunk) + 1, -1)
        logits = editor.run(
            ids,
            lambda columns, values, keep=keep: values * keep[..., columns].to(values.device),
            push=push if push.any() else None,
        ).logits
        sums, reference = _compare(logits, held_out, batch, [None] * len(chunk))
        parts.append(sums)
    return TokenSums.concatenate(parts), reference


def run_held(
    editor: "RowEditor",
    held_out: HeldOut,
    batch: Batch,
    rows: Tensor,
    changes: Sequence[HeldChange],
) -> TokenSums:
    """Return the sums of held changes to one rollout; `rows` are the adapter's own."""
    parts = []
    for chunk in _chunks(changes, n_changed_copies(held_out, batch)):
        given = torch.stack([rows, *(change.rows for change in chunk)])
        ids = batch.token_ids.expand(len(chunk) + 1, -1)
        logits = editor.run(ids, lambda columns, _, given=given: given[..., columns]).logits
        parts.append(_compare(logits, held_out, batch, [change.where for change in chunk])[0])
    return TokenSums.concatenate(parts)


def n_changed_copies(held_out: HeldOut, batch: Batch) -> int:
    """Return how many changed copies of a rollout fit in a batch with the reference, at least 1."""
    return max(1, min(_MOST_COPIES, held_out.batch_tokens // batch.token_ids.shape[1]) - 1)


def _chunks(changes: Sequence[T], size: int) -> list[Sequence[T]]:
    return [changes[first : first + size] for first in range(0, len(changes), size)]


def _compare(
    logits: Tensor, held_out: HeldOut, batch: Batch, where: Sequence[Tensor | None]
) -> tuple[TokenSums, Tensor]:
    """Compare copies 1 and later with copy 0; `where` marks each change's own tokens."""
    mask = batch.mask
    targets = batch.targets[mask].to(logits.device)
    usual = torch.from_numpy(held_out.role_of(batch.measured) != SPECIAL)
    reference = select_measured(logits[:1], mask)
    loss = cross_entropy(reference, targets)
    sums = np.zeros((4, len(where)))
    for i, marked in enumerate(where):
        other = select_measured(logits[i + 1 : i + 2], mask)
        kl = kl_divergence(reference, other).double().cpu()
        rise = (cross_entropy(other, targets) - loss).double().cpu()
        here = usual if marked is None else usual & marked.cpu()[mask[0]]
        values = kl[usual].sum(), rise[usual].sum(), kl[~usual].sum(), kl[here].sum()
        sums[:, i] = [float(value) for value in values]
    return TokenSums(*sums), reference
