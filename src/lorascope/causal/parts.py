"""The parts that an adapter can be taken apart into: sites, projections, layers, MLP, attention."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from lorascope.sites import PROJECTIONS, SiteLayout

_BLOCKS = {"mlp": PROJECTIONS[:3], "attention": PROJECTIONS[3:]}


@dataclass(frozen=True)
class Part:
    """Some sites of a layout: which columns are theirs, `(d_in,)`, and which sites, `(n_sites,)`.

    `kind` is `site`, `projection`, `layer` or `block`. Layer -1 holds what is outside any layer.
    """

    kind: str
    name: str
    columns: Bool[Tensor, "d_in"]
    sites: Bool[Tensor, "site"]


def parts_of(layout: SiteLayout) -> list[Part]:
    """Return all parts, in column order: sites, projections, layers, then MLP and attention.

    The last two are there where the layout has sites of both, by their usual names.
    """
    ranks = torch.tensor([site.rank for site in layout.sites])

    def part(kind: str, name: str, members: list[bool]) -> Part:
        sites = torch.tensor(members)
        return Part(kind, name, sites.repeat_interleave(ranks), sites)

    blocks = {
        block: [site.projection in names for site in layout.sites]
        for block, names in _BLOCKS.items()
    }
    both = all(any(members) for members in blocks.values())
    return [
        *(part("site", one.name, [site is one for site in layout.sites]) for one in layout.sites),
        *(
            part("projection", name, [site.projection == name for site in layout.sites])
            for name in layout.adapter_types
        ),
        *(
            part("layer", str(layer), [site.layer == layer for site in layout.sites])
            for layer in sorted({site.layer for site in layout.sites})
        ),
        *(part("block", name, members) for name, members in blocks.items() if both),
    ]
