"""Numbers of an adapter's weights that do not depend on its scale, beside those of ordinary ones.

`population.json` has the range of each number over adapters that `benchmarks/audit.py` trains on
the demo's base, which do a task or write in a style and hide nothing. It is no verdict: adapters
of other models, ranks and data have other ranges.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from lorascope.audit.audit_records import Alignment, Compared, Weights

POPULATION = Path(__file__).parent / "population.json"


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
