"""Name the parts of an adapter, and measure many changes of one rollout in the same batch.

1. Each batch has one rollout, repeated. Copy 0 is unchanged and is the reference for the others: a
   kernel may sum in another order in a batch of another shape, so only copies of the same batch
   differ by their changes alone.
2. A `LiveChange` multiplies what each site reads by `keep` and pushes what it writes; later sites
   respond. A `HeldChange` is added to given rows, which are written at all sites.
3. Tokens before the first changed row are computed once, for all held changes: changes are sorted
   by it, and those of a batch start at the first of them, from a cache of the tokens before.
   Layers below the first live change run once, too: their output is the adapter's, or, where all
   sites there are removed, the base's.
4. For each change the sums over the rollout's tokens are kept: KL(reference ‖ change), the rise of
   the loss on the next token, and KL at marked tokens. For held changes, the tokens whose
   probability falls most are counted too, on the predictions that differ most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorascope.causal.effects import (
    kl_and_loss,
    largest_falls,
    log_probabilities,
)
from lorascope.causal.held_out import Batch, HeldOut
from lorascope.sae.model import SAE
from lorascope.sites import PROJECTIONS, SiteLayout
from lorascope.subject.intervene import Outcome, RowEditor, repeat_cache

_MOST_COPIES = 64  # of a rollout in one batch; more are not faster
_N_PREDICTIONS, _N_FALLS = 16, 3  # of a rollout that differ most, and tokens of each that fall
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
    """Add to the rows of some tokens, whose positions are in rising order."""

    positions: Int[Tensor, "changed"]
    added: Float[Tensor, "changed d_in"]

    @classmethod
    def removal(
        cls,
        sae: SAE,
        layout: SiteLayout,
        latent: int,
        positions: Int[Tensor, "changed"],
        values: Float[Tensor, "changed"],
    ) -> "HeldChange":
        """Return the change that subtracts `value · decoder row` from rows of a layout."""
        _, columns = layout.select(sae.layout.adapter_types)
        added = torch.zeros(len(positions), layout.d_in)
        added[:, columns] = -values[:, None] * sae.W_dec[latent].cpu()
        return cls(positions, added)


class TokenSums(NamedTuple):
    """Sums over a rollout's tokens for each change, `(n_changes,)`, in nats.

    `kl` and `ce` are over usual tokens, `special` is KL over special tokens, `here` is KL over the
    usual tokens at which a held change was made.
    """

    kl: npt.NDArray[np.float64]
    ce: npt.NDArray[np.float64]
    special: npt.NDArray[np.float64]
    here: npt.NDArray[np.float64]


def run_live(
    editor: RowEditor,
    held_out: HeldOut,
    batch: Batch,
    changes: Sequence[LiveChange],
    *,
    skip_layers: bool = True,
) -> tuple[TokenSums, float]:
    """Return the sums of live changes to one rollout, and the KL that the batch alone causes.

    That KL compares the reference with the same run in a batch of its own, over usual tokens.
    Without `skip_layers` every copy is computed from its first layer: the plain reference.
    """
    unchanged = LiveChange(torch.ones_like(changes[0].keep), torch.zeros_like(changes[0].push))
    removed = LiveChange(0 * unchanged.keep, unchanged.push)
    ends = [  # the adapter and the base
        _run_live(editor, batch, [one], keep_layers=skip_layers) for one in (unchanged, removed)
    ]
    n_layers = min(len(end.layers) for end in ends)
    starts, layers = [(0, 0)] * len(changes), torch.empty(0)
    if n_layers:
        starts = _starts(changes, held_out.subject.layout, n_layers)
        layers = torch.stack([torch.cat(end.layers) for end in ends])  # (end, layer, seq, d)
    order = sorted(range(len(changes)), key=lambda i: starts[i][0])
    size = n_changed_copies(held_out, batch.token_ids.shape[1])
    sums, null = np.zeros((4, len(changes))), 0.0
    for first in range(0, len(order), size):
        chunk = order[first : first + size]
        lowest, above = starts[chunk[0]][0], None
        if lowest:
            above = lowest, layers[[0, *(starts[i][1] for i in chunk)], lowest - 1]
        logits = _run_live(editor, batch, [unchanged, *(changes[i] for i in chunk)], above).logits
        if lowest and not _same(logits[:1], ends[0].logits):
            return run_live(editor, held_out, batch, changes, skip_layers=False)
        sums[:, chunk] = _compare(logits, held_out, batch, [None] * len(chunk))
        if not first:
            both = torch.cat([ends[0].logits, logits[:1]])
            null = float(_compare(both, held_out, batch, [None]).kl[0])
    return TokenSums(*sums), null


def _run_live(
    editor: RowEditor,
    batch: Batch,
    changes: Sequence[LiveChange],
    above: tuple[int, Tensor] | None = None,
    keep_layers: bool = False,
) -> Outcome:
    keep = torch.stack([change.keep for change in changes])[:, None]
    push = torch.stack([change.push for change in changes])
    return editor.run(
        batch.token_ids.expand(len(changes), -1),
        lambda columns, values: values * keep[..., columns].to(values.device),
        push=push if push.any() else None,
        above=above,
        keep_layers=keep_layers,
    )


def _starts(
    changes: Sequence[LiveChange], layout: SiteLayout, n_layers: int
) -> list[tuple[int, int]]:
    """Return the first layer to run of each change, and 1 if those below are the base's, else 0.

    A site outside any layer may be below all of them.
    """
    layer = torch.tensor([max(site.layer, 0) for site in layout.sites])
    ranks = torch.tensor([site.rank for site in layout.sites])
    keep = torch.stack([change.keep for change in changes])
    pushed = torch.stack([change.push for change in changes]) != 0
    of_column = layer.repeat_interleave(ranks)
    top = torch.tensor(n_layers - 1)
    firsts = [
        torch.minimum(
            torch.where(differs, of_column, top).amin(1), torch.where(pushed, layer, top).amin(1)
        ).tolist()
        for differs in (keep != 1, keep != 0)
    ]
    return [max((one, 0), (other, 1)) for one, other in zip(*firsts, strict=True)]


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether logits differ by rounding only: not if a layer reads more than the last."""
    allowed = torch.finfo(one.dtype).eps ** 0.5 * other.abs().max()
    return bool((one - other).abs().max() <= allowed)


def run_held(
    editor: RowEditor,
    held_out: HeldOut,
    batch: Batch,
    rows: Tensor,
    changes: Sequence[HeldChange],
    falls: Sequence[dict[int, float]] = (),
) -> TokenSums:
    """Return the sums of held changes to one rollout; `rows` are the adapter's own.

    `falls` has a dictionary for each change; the KL in nats of tokens that fall is added there, by
    token id.
    """
    sums = np.zeros((4, len(changes)))
    runs = held_runs(editor, held_out, batch.token_ids, rows, changes, with_reference=True)
    for chunk, start, logits in runs:
        at = [changes[i].positions for i in chunk]
        sums[:, chunk] = _compare(
            logits, held_out, batch, at, start, [falls[i] for i in chunk] if falls else ()
        )
    return TokenSums(*sums)


def held_runs(
    editor: RowEditor,
    held_out: HeldOut,
    token_ids: Int[Tensor, "1 seq"],
    rows: Float[Tensor, "seq d_in"],
    changes: Sequence[HeldChange],
    *,
    with_reference: bool = False,
    logits_at: Int[Tensor, "kept"] | None = None,
) -> Iterator[tuple[list[int], int, Float[Tensor, "copy after vocab"]]]:
    """Run batches of changes; yield their indices, the first position that ran, and the logits.

    The logits are those of `logits_at`, in rising order, from that position on; default: of all.
    `with_reference`, copy 0 of each batch is unchanged.
    """
    n = token_ids.shape[1]
    firsts = [int(change.positions[0]) if len(change.positions) else 0 for change in changes]
    order = sorted(range(len(changes)), key=lambda i: firsts[i])
    unchanged = [HeldChange(torch.zeros(0, dtype=torch.long), rows[:0])] * with_reference
    cache = None
    if max(firsts, default=0) > 0:
        cache = editor.run(
            token_ids, held=rows[None], cache=True, logits_at=torch.zeros(1, dtype=torch.long)
        ).cache
    while order:
        start = firsts[order[0]]
        size = n_changed_copies(held_out, n - start)
        chunk, order = order[:size], order[size:]
        copies = [*unchanged, *(changes[i] for i in chunk)]
        prefix = repeat_cache(cache, start, len(copies)) if start else None
        start = 0 if prefix is None else start
        given = rows[start:].repeat(len(copies), 1, 1)
        for copy, change in zip(given, copies, strict=True):
            copy[change.positions.to(rows.device) - start] += change.added.to(rows.device)
        at = None if logits_at is None else logits_at[logits_at >= start] - start
        ids = token_ids[:, start:].expand(len(copies), -1)
        yield chunk, start, editor.run(ids, held=given, cache=prefix, logits_at=at).logits


def n_changed_copies(held_out: HeldOut, n_tokens: int) -> int:
    """Return how many changed copies fit in a batch with the reference, at least 1."""
    return max(1, min(_MOST_COPIES, held_out.batch_tokens // n_tokens) - 1)


def _compare(
    logits: Tensor,
    held_out: HeldOut,
    batch: Batch,
    changed: Sequence[Tensor | None],
    start: int = 0,
    falls: Sequence[dict[int, float]] = (),
) -> TokenSums:
    """Compare copies 1 and later with copy 0, from position `start` on.

    `changed` are the positions of each change's own tokens. Tokens that fall are added to `falls`.
    """
    mask = batch.mask[0, start:]
    targets = batch.targets[0, start:][mask].to(logits.device)
    measured = batch.rows[0, start:][mask].numpy()
    usual = held_out.is_usual(measured)
    at = mask.to(logits.device)
    reference = log_probabilities(logits[0, at])
    _, loss = kl_and_loss(reference, logits[0, at], targets)
    sums = np.zeros((4, len(changed)))
    for i, positions in enumerate(changed):
        kl, rise = kl_and_loss(reference, logits[i + 1, at], targets)
        kl, rise = kl.double().cpu(), (rise - loss).double().cpu()
        if falls:
            n = min(_N_PREDICTIONS, int(usual.sum()))
            most = torch.where(usual, kl, -1.0).topk(n).indices.to(logits.device)
            found = largest_falls(reference[most], logits[i + 1, at][most], _N_FALLS)
            for term, token in zip(*(part.flatten().tolist() for part in found), strict=True):
                falls[i][token] = falls[i].get(token, 0.0) + term
        here = usual
        if positions is not None:
            here = torch.zeros_like(batch.mask[0]).index_fill_(0, positions.cpu(), True)
            here = usual & here[start:][mask]
        values = kl[usual].sum(), rise[usual].sum(), kl[~usual].sum(), kl[here].sum()
        sums[:, i] = [float(value) for value in values]
    return TokenSums(*sums)
