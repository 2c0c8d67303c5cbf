"""Group features by where they fire together, and name each group from its features' labels.

1. Features that fire mostly at special tokens are one group. The others are the nodes of a graph.
   Two are connected if one is among the nearest of the other by co-firing, with the Jaccard index
   of the tokens on which they fire as weight.
2. Groups are the communities of that graph: those of high modularity that Louvain's method finds
   (Blondel et al. 2008). Every feature gets one, and nobody chooses their number. (HDBSCAN would
   call many features noise, whose effect then has no group, and needs scikit-learn.)
   a. Each node begins as a community. In a *round*, every node finds the neighbouring community
      that gains most, and half of the nodes that would gain, drawn at random, move at once. (If all
      did, two neighbours would change places for ever.) Later rounds look only at nodes that
      wanted to move or whose neighbours did.
   b. If few want to move, the communities become the nodes of the next graph, until none merge.
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
import numpy.typing as npt

from lorascope.causal.report_records import N_SLICES, AblationReport, Interval
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import Label
from lorascope.labels.clues import Ints
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
_WHOLE = 1 << 20  # a Jaccard index of 1, as a weight: sums of whole numbers have no order
_MOST_ROUNDS = 100
_MOVES = 0.5  # share of the nodes that would gain which move in a round
_FEW = 1e-3  # share of the nodes that want to move in the last round
_FEWEST = 5  # features of a community that is a group of its own
_MOST = 0.5  # share of a group's features from which a kind or a segment names it
_N_TYPICAL = 3  # conditions in a name


class FeatureGroup(NamedTuple):
    """Features that fire together, by latent, and what they have in common in words."""

    name: str
    latents: tuple[int, ...]


def effect_intervals(
    groups: Sequence[FeatureGroup], ablation: AblationReport
) -> tuple[Interval, ...]:
    """Return the 95 % interval of each group's share of the sum of all effects.

    Slices of the rollouts are resampled. None where the report is too old to have them.
    """
    from lorascope.causal.effects import bootstrap_interval

    n = min(N_SLICES, ablation.n_rollouts)
    found = {one.feature: one for one in ablation.features or () if ablation.nats(one)[0] > 0}
    if not found or any(len(one.spread) != n for one in found.values()):
        return (None,) * len(groups)
    sums = {i: ablation.nats(one)[0] * np.array(one.spread) for i, one in found.items()}
    nothing, whole = np.zeros(n), np.sum(list(sums.values()), axis=0)
    return tuple(
        bootstrap_interval(sum((sums.get(i, nothing) for i in group.latents), nothing), whole)
        for group in groups
    )


def groups_of(index: FeatureIndex) -> tuple[FeatureGroup, ...]:
    """Return the groups of all features that fire, those of most features first."""
    alive = np.flatnonzero(index.alive).tolist()
    nodes = np.array([i for i in alive if index.main_role[i] != "special"], np.int64)
    node = np.full(len(index), -1)
    node[nodes] = np.arange(len(nodes))
    near = index.near_cofiring[nodes, :_N_NEAR]
    target = np.where(near < 0, -1, node[near])
    source = np.broadcast_to(np.arange(len(nodes))[:, None], near.shape)
    known = target >= 0
    shares = index.near_jaccard[nodes, :_N_NEAR][known]
    community = communities(len(nodes), source[known], target[known], shares)
    order = np.argsort(community, kind="stable")
    bounds = np.flatnonzero(np.diff(community[order])) + 1
    found = [group.tolist() for group in np.split(nodes[order], bounds)]
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


def communities(n: int, one: Ints, other: Ints, weight: npt.ArrayLike) -> Ints:
    """Return the community of each of `n` nodes, `(n,)`, numbered from 0.

    Edges connect `one` with `other`; one that is given both ways counts once. Weights are from 0
    to 1. Equal graphs give equal communities.
    """
    key, first = np.unique(np.minimum(one, other) * n + np.maximum(one, other), return_index=True)
    whole = np.rint(np.asarray(weight, float)[first] * _WHOLE).clip(1).astype(np.int64)
    pairs = np.concatenate([key, key % n * n + key // n]) if n else key
    order = np.argsort(pairs, kind="stable")
    pairs, whole = pairs[order], np.concatenate([whole, whole])[order]
    community, rng = np.arange(n), np.random.default_rng(0)
    while n:
        source, target = pairs // n, pairs % n
        merged = np.unique(_moved(n, source, target, whole, rng), return_inverse=True)[1]
        community, n_before, n = merged[community], n, int(merged.max()) + 1
        if n == n_before:
            break
        pairs, at = np.unique(merged[source] * n + merged[target], return_inverse=True)
        whole = np.bincount(at, whole).astype(np.int64)
    return community


def _moved(n: int, source: Ints, target: Ints, weight: Ints, rng: np.random.Generator) -> Ints:
    """Return the communities of a graph after rounds of moves, `(n,)`; loops stay inside."""
    degree = np.bincount(source, weight, n)
    total, size, own = degree.sum(), degree, np.arange(n)
    is_loop = source == target
    source, target, weight = source[~is_loop], target[~is_loop], weight[~is_loop]
    looks = np.ones(n, bool)
    for _ in range(_MOST_ROUNDS):
        some = looks[source]
        if not some.any():
            break
        pair = source[some] * n + own[target[some]]
        order = np.argsort(pair)
        begins, pair = _begins(pair[order]), pair[order]
        links = np.add.reduceat(weight[some][order], begins)
        node, to = pair[begins] // n, pair[begins] % n
        is_own = to == own[node]
        gain = links - degree[node] * (size[to] - degree[node] * is_own) / total
        stay = degree * (degree - size[own]) / total  # with no link to its own community
        stay[node[is_own]] = gain[is_own]
        best = np.maximum.reduceat(gain, begins_of := _begins(node))
        top = np.flatnonzero(gain == np.repeat(best, np.diff(begins_of, append=len(node))))
        top = top[_begins(node[top])]  # of equals the first
        wants = top[
            gain[top] > stay[node[top]] + 1e-3
        ]  # more than rounding of sums of whole weights
        if len(wants) <= _FEW * n:
            break
        moves = wants[rng.random(len(wants)) < _MOVES]
        own[node[moves]] = to[moves]
        size = np.bincount(own, degree, n)
        has_moved, looks = np.zeros(n, bool), np.zeros(n, bool)
        has_moved[node[moves]] = looks[node[wants]] = True
        looks[target[has_moved[source]]] = True
    return own


def _begins(values: Ints) -> Ints:
    """Return where runs of equal values begin."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1]))


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
