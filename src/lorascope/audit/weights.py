"""What an adapter's weights alone say: how much is written where, and which sites meet.

1. The size of a site is `‖scale·B·A‖`. Shares are of squared sizes, which add up over sites.
2. The effective rank of an update is `exp(H)`, with H the entropy of its squared singular values as
   shares (Roy and Vetterli 2007): 1 for a single direction, the rank for equal ones.
3. A site that writes into the residual stream may write what a later site reads: the cosine of a
   column of B of the first with a row of A of the second, both without the norm between them.
   Random directions have cosines of about `1 / sqrt(d_model)`, of which the largest of n pairs is
   about `sqrt(2 ln n)`.

No model runs: only the adapter's file is read, in float64.
"""

import math
from collections import defaultdict

import numpy as np

from lorascope.audit.audit_records import Meeting, UpdatePart, Weights
from lorascope.subject.adapter import Adapter
from lorascope.subject.inventory import Matrix, SiteSize, factors, inventory

_WRITERS = ("o_proj", "down_proj")  # of the usual seven, those whose output is added to the stream
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STAGE = {name: 0 if name in _ORDER[:3] else _ORDER.index(name) - 2 for name in _ORDER}
_STAGE["up_proj"] = _STAGE["gate_proj"]  # both read the same stream
_N_MEETINGS = 5


def read_weights(adapter: Adapter) -> Weights:
    """Return what the weights of an adapter say; sites without readable A and B are left out."""
    sites = inventory(adapter).sites
    matrices = factors(adapter, [site.module for site in sites])
    ranks = {site.module: _effective_rank(*matrices[site.module]) for site in sites}
    total = sum(site.effect**2 for site in sites)

    def parts(key: str) -> tuple[UpdatePart, ...]:
        groups: dict[str, list[SiteSize]] = defaultdict(list)
        for site in sites:
            groups[str(getattr(site, key))].append(site)
        return tuple(
            UpdatePart(
                name=name,
                n_sites=len(some),
                share=sum(site.effect**2 for site in some) / total if total else 0.0,
                largest=max(site.effect for site in some),
                effective_rank=float(np.mean([ranks[site.module] for site in some])),
            )
            for name, some in groups.items()
        )

    n_pairs, expected, meetings = _meetings(sites, matrices)
    return Weights(
        n_sites=len(sites),
        n_silent=sum(site.effect == 0 for site in sites),
        norm=math.sqrt(total),
        projections=parts("projection"),
        layers=parts("layer"),
        n_pairs=n_pairs,
        expected_cosine=expected,
        meetings=meetings,
    )


def _effective_rank(a: Matrix, b: Matrix) -> float:
    """Return the effective rank of `B·A`; 0 if it is zero. A is (rank, d_x), B is (d_y, rank)."""
    values = np.linalg.svd(np.linalg.qr(b)[1] @ np.linalg.qr(a.T)[1].T, compute_uv=False) ** 2
    if not values.sum():
        return 0.0
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _meetings(
    sites: tuple[SiteSize, ...],
    matrices: dict[str, tuple[Matrix, Matrix]],
) -> tuple[int, float | None, tuple[Meeting, ...]]:
    """Return the number of pairs, the largest cosine that chance explains, and the largest ones."""
    usual = [site for site in sites if site.projection in _STAGE and site.layer >= 0]
    writers = [site for site in usual if site.projection in _WRITERS and site.b_norm]
    widths = {site.d_y for site in writers}
    if len(widths) != 1:
        return 0, None, ()
    width = widths.pop()
    readers = [s for s in usual if s.projection not in _WRITERS and s.d_x == width and s.a_norm]
    found: list[tuple[float, SiteSize, SiteSize]] = []
    n_pairs = 0
    for writer in writers:
        written = _unit(matrices[writer.module][1].T)
        for reader in readers:
            if (reader.layer, _STAGE[reader.projection]) > (
                writer.layer,
                _STAGE[writer.projection],
            ):
                cosines = np.abs(_unit(matrices[reader.module][0]) @ written.T)
                n_pairs += cosines.size
                found.append((float(cosines.max()), writer, reader))
    found.sort(key=lambda one: -one[0])
    expected = math.sqrt(2 * math.log(n_pairs) / width) if n_pairs > 1 else None
    return (
        n_pairs,
        expected,
        tuple(
            Meeting(
                writer=f"{writer.layer}.{writer.projection}",
                reader=f"{reader.layer}.{reader.projection}",
                cosine=min(cosine, 1.0),
            )
            for cosine, writer, reader in found[:_N_MEETINGS]
        ),
    )


def _unit(rows: Matrix) -> Matrix:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
