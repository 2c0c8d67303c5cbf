"""Group features by where they fire together, and name each group from its features' labels.

1. Features that fire mostly at special tokens are one group. The others are the nodes of a graph.
   Two are connected if one is among the nearest of the other by co-firing, with the Jaccard index
   of the tokens on which they fire as weight.
2. Groups are the communities of that graph: those of highest modularity that Louvain's method
   finds (Blondel et al. 2008). Every feature gets one, and nobody chooses their number. (HDBSCAN
   would call many features noise, whose effect then has no group, and needs scikit-learn;
   networkx comes with torch.)
3. A group is named for the kind of token and the segment that most of its features have, and for
   the conditions of their rules that are most typical of it. Groups of one name are one.
   Features of communities with fewer than `_FEWEST` features are put together by kind and segment.

Decoder rows are left out: they say at which site a feature is written, not what it is about. On
the demo, the graph of co-firing has a modularity of 0.72 with its own communities, 0.49 with groups
by kind and segment, and 0.02 with the communities of nearest decoder rows.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import Label
from lorascope.labels.wording import SHORT
from lorascope.texts.roles import ROLES

ROLE_TEXT = {
    "special": "at special tokens and template headers",
    "think": "in think segments",
    "answer": "in answers",
    "user": "in users' messages",
    "system": "in system prompts",
    "text": "in plain text",
}
_KIND_TEXT = {  # by the category of a label
    "number": "numbers",
    "operator": "operators",
    "punctuation": "punctuation",
    "line break": "line breaks",
    "symbol": "symbols",
    "name": "names",
    "word": "words",
    "template": "template tokens",
    "mixed": "tokens",
}
_N_NEAR = 5  # neighbours by co-firing; ten take twice the time and raise the modularity by 0.007
_FEWEST = 5  # features of a community that is a group of its own
_MOST = 0.5  # share of a group's features from which a kind or a segment names it
_N_TYPICAL = 3  # conditions in a name


class FeatureGroup(NamedTuple):
    """Features that fire together, by latent, and what they have in common in words."""

    name: str
    latents: tuple[int, ...]


def groups_of(index: FeatureIndex) -> tuple[FeatureGroup, ...]:
    """Return the groups of all features that fire, those of most features first."""
    import networkx as nx

    alive = np.flatnonzero(index.alive).tolist()
    graph = nx.Graph()
    graph.add_nodes_from(latent for latent in alive if index.main_role[latent] != "special")
    near, shares = index.near_cofiring[:, :_N_NEAR], index.near_jaccard[:, :_N_NEAR]
    for latent in graph.nodes:
        pairs = zip(near[latent].tolist(), shares[latent].tolist(), strict=True)
        edges = [(latent, other, share) for other, share in pairs if graph.has_node(other)]
        graph.add_weighted_edges_from(edges)
    found = [sorted(group) for group in nx.community.louvain_communities(graph, seed=0)]
    found = [group for group in found if len(group) >= _FEWEST]
    rest = sorted({*alive}.difference(*found))
    labels = {} if index.labels is None else index.labels.features
    conditions = {latent: _conditions(label) for latent, label in labels.items()}
    total = Counter(one for some in conditions.values() for one in some)
    members: dict[str, list[int]] = {}
    for group in [*found, *([latent] for latent in rest)]:
        typical = _typical(conditions, total, group) if len(group) > 1 else ()
        members.setdefault(_name(index, group, typical), []).extend(group)
    named = [FeatureGroup(name, tuple(sorted(latents))) for name, latents in members.items()]
    return tuple(sorted(named, key=lambda one: (-len(one.latents), one.name)))


def where_of(role: str) -> str:
    """Return a segment in words that follow a noun."""
    return ROLE_TEXT.get(role, f"in {role}") if role else "elsewhere"


def _name(index: FeatureIndex, latents: Sequence[int], typical: Sequence[str] = ()) -> str:
    """Return the kind of token and the segment of most features, and what is typical."""
    labels = [label for i in latents if (label := index.label(i)) is not None]
    kind = _most([label.category for label in labels], "mixed") if labels else ""
    role = _most([index.main_role[i] for i in latents], "several segments")
    what = _KIND_TEXT.get(kind, kind) if role != "special" else ""
    name = f"{what} {where_of(role)}".strip()
    return name + (f": {', '.join(typical)}" if typical else "")


def _most(values: Sequence[str], otherwise: str) -> str:
    """Return the value that at least `_MOST` of them have."""
    value, n = min(Counter(values).items(), key=lambda item: (-item[1], item[0]))
    return value if n >= _MOST * len(values) else otherwise


def _typical(
    conditions: Mapping[int, set[str]], total: Mapping[str, int], group: Collection[int]
) -> list[str]:
    """Return the conditions that the rules of a group have more often than those of others.

    They are ranked by their part of the divergence of the group from all: p log(p / p of all).
    """
    known = [latent for latent in group if latent in conditions]
    here = Counter(one for latent in known for one in conditions[latent])

    def part(one: str) -> float:
        share = here[one] / len(known)
        return share * math.log(share * len(conditions) / total[one])

    best = sorted((one for one in here if part(one) > 0), key=lambda one: (-part(one), one))
    return best[:_N_TYPICAL]


def _conditions(label: Label) -> set[str]:
    """Return the conditions of a label's rule in words, one for each value."""
    parts = [part for term in label.rule for part in term]
    return {
        SHORT.get(part.of, "{}").format(f'"{value}"') if value else part.of
        for part in parts
        for value in part.values or ("",)
        if part.of not in ROLES  # the name says the segment already
    }
