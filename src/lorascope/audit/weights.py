"""What an adapter's weights say: how much is written where, which sites meet, and tokens.

1. The size of a site is `‖scale·B·A‖`. Shares are of squared sizes, which add up over sites.
2. The effective rank of an update is `exp(H)`, with H the entropy of its squared singular values as
   shares (Roy and Vetterli 2007): 1 for a single direction, the rank for equal ones.
3. A site that writes into the residual stream may write what a later site reads: the cosine of a
   column of B of the first with a row of A of the second, both without the norm between them.
   Random directions have cosines of about `1 / sqrt(d_model)`, of which the largest of n pairs is
   about `sqrt(2 ln n)`.
4. A site that writes into the stream has a direction for each column of B. Final norm and
   unembedding turn it into logits, which are standardised over the vocabulary: the token of the
   largest |z| is the one that the direction promotes or suppresses most. A site that reads the
   stream has a direction for each row of A, whose products with the embeddings are standardised in
   the same way, without the gains of norms before it. Of V random numbers the largest |z| is about
   `sqrt(2 ln 2V)`. The gauge is that of the rows (`bottlenecks`). Of more than `_N_DIRECTIONS`
   directions of a kind, those of the largest norm are read.
5. `population.json` has the range of each of these numbers that does not depend on scale, over
   adapters that `benchmarks/audit.py` trains on the demo's base, which do a task or write in a
   style and hide nothing. It is no verdict: adapters of other models, ranks and data have other
   ranges.

For 1 to 3, no model is needed: only the adapter's file is read, in float64.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from lorascope.audit.audit_records import (
    Alignment,
    Compared,
    Meeting,
    PointedToken,
    UpdatePart,
    Weights,
)
from lorascope.causal.direct import standardise
from lorascope.errors import AdapterError
from lorascope.subject.adapter import Adapter
from lorascope.subject.inventory import Matrix, SiteSize, factors, inventory
from lorascope.subject.load import Subject
from lorascope.subject.unembedding import Unembedding, residual_writes
from lorascope.texts.tokens import token_bytes

POPULATION = Path(__file__).parent / "population.json"
_WRITERS = ("o_proj", "down_proj")  # of the usual seven, those whose output is added to the stream
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STAGE = {name: 0 if name in _ORDER[:3] else _ORDER.index(name) - 2 for name in _ORDER}
_STAGE["up_proj"] = _STAGE["gate_proj"]  # both read the same stream
_N_MEETINGS = 5
_N_DIRECTIONS = 256
_N_SHOWN = 5

Scores = Callable[[Tensor], Tensor]
Named = tuple[str, Float[Tensor, "d_model"]]


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


def read_alignments(subject: Subject) -> tuple[Alignment | None, Alignment | None]:
    """Return the alignment of what is written and of what is read; None where there is nothing."""
    writes = residual_writes(subject, subject.layout)
    written = [(one.name, column) for one in writes for column in one.matrix.T]
    writers = {one.name for one in writes}
    try:
        head = Unembedding(subject)
        of_written = _aligned(subject, written, head.logits)
    except AdapterError:
        of_written = None
    embed = subject.causal.get_input_embeddings()
    table = getattr(embed, "base_layer", embed).weight.detach()
    read = [
        (site.name, row)
        for site, module, mix in zip(
            subject.layout.sites, subject.sites, subject.mixes, strict=True
        )
        if site.name not in writers
        and (weight := getattr(module, "weight", None)) is not None
        and weight.shape[1] == table.shape[1]
        for row in (weight if mix is None else mix.to(weight) @ weight).detach().float().cpu()
    ]
    of_read = _aligned(subject, read, lambda some: (some.to(table) @ table.T).float().cpu())
    return of_written, of_read


def _aligned(subject: Subject, directions: list[Named], scores_of: Scores) -> Alignment | None:
    directions = [one for one in directions if one[1].any()]
    directions = sorted(directions, key=lambda one: -float(one[1].norm()))[:_N_DIRECTIONS]
    found: list[tuple[float, str, int]] = []
    n_vocab = 0
    for name, direction in directions:
        z = standardise(scores_of(direction[None]))[0].abs()
        n_vocab, best = len(z), int(z.argmax())
        found.append((float(z[best]), name, best))
    if not found:
        return None
    spelled = token_bytes(subject.tokenizer, n_vocab)
    return Alignment(
        n_directions=len(found),
        mean=sum(z for z, _, _ in found) / len(found),
        expected=math.sqrt(2 * math.log(2 * n_vocab)),
        strongest=tuple(
            PointedToken(site=name, token_id=i, token=spelled[i].decode(errors="replace"), z=z)
            for z, name, i in sorted(found, reverse=True)[:_N_SHOWN]
        ),
    )


def statistics(
    weights: Weights, written: Alignment | None, read: Alignment | None
) -> Mapping[str, float]:
    """Return the numbers that can be had.

    Concentration is the largest share of a layer (or projection) times their number, 1 where all
    have the same. The others are ratios to what chance explains.
    """
    found: dict[str, float] = {}
    for name, parts in (("layers", weights.layers), ("projections", weights.projections)):
        if len(parts) > 1:
            found[f"concentration over {name}"] = max(p.share for p in parts) * len(parts)
    if weights.meetings and weights.expected_cosine:
        cosine = weights.meetings[0].cosine
        found["largest cosine of what is written and read"] = cosine / weights.expected_cosine
    for name, one in (("written, in the unembedding", written), ("read, in the embeddings", read)):
        if one is not None:
            found[f"tokens {name}: mean of the largest |z|"] = one.mean / one.expected
    return found


def compare(found: Mapping[str, float]) -> tuple[Compared, ...]:
    """Return the numbers with the ranges of ordinary adapters."""
    known = json.loads(POPULATION.read_text(encoding="utf-8"))["statistics"]
    return tuple(
        Compared(name=name, value=value, ordinary=tuple(known[name]))
        for name, value in found.items()
        if name in known
    )
