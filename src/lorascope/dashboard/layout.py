"""Places of latents on a map: latents whose decoder rows are near stand near one another.

1. `_graph`: the nearest decoder rows of each latent (`near/decoder`) make a graph. With the
   distance `1 - cosine`, an edge weighs `exp(-(distance - nearest) / mean distance beyond it)`, so
   that a latent in a sparse place holds to its neighbours as firmly as one in a dense place; the
   weights a and b that the two ends give are joined to `a + b - ab`.
2. `_start`: two vectors near the first eigenvectors of the graph (Belkin & Niyogi 2003, without
   the constant one), by subspace iteration with Chebyshev filters, replaced by their ranks. What
   is connected starts in one place; the pieces of a graph in pieces start apart.
3. `_settle`: in each epoch every latent is drawn to its neighbours and pushed off by `_REPELLERS`
   random latents, with steps that shrink to 0. These are attraction and repulsion of UMAP (McInnes,
   Healy & Melville 2018, section 3.2) for the curve `1 / (1 + distance**2)`, that is a = b = 1.
   Here all latents move at once, by the mean over their edges instead of by one edge after another:
   that is what NumPy does fast, and it depends on no order of the edges.
4. `_framed`: the points fill the unit square, a few of the outermost on its border.

Who is beside whom means something, how far clusters are from one another does not. The draws are
seeded: an index has one map on a machine.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope.features.index import FeatureIndex

Floats = npt.NDArray[np.float32]

_ROUNDS = 20
_DEGREE = 20  # of the filter's polynomial
_FIRST, _LAST = 0.1, 0.0003  # what each filter stops is this far below 1: wide, then narrow
_WIDTH = 10.0  # of the start, in units of the curve
_EPOCHS = 500
_REPELLERS = 5
_LONGEST = 4.0  # part of a step along an axis, as in UMAP's own code
_OUTSIDE = 0.001  # share of the points that the frame does not wait for, on each side


class _Graph(NamedTuple):
    """Both directions of every edge, by ascending head; nodes alone have an edge of weight 0."""

    start: npt.NDArray[np.int64]  # (node,), first edge of each head
    head: npt.NDArray[np.int64]  # (edge,)
    tail: npt.NDArray[np.int64]
    share: Floats  # (edge,), weights over the sum of their head's

    def sum(self, values: Floats) -> Floats:
        """Return the sum of a value over the edges of each head, `(node,)`."""
        return np.add.reduceat(values, self.start)


def layout(index: FeatureIndex) -> Floats:
    """Return the place of every latent on a map, `(latent, 2)`, both numbers from 0 to 1.

    NaN for latents without an example, and for all where the index knows no neighbours.
    """
    places = np.full((len(index), 2), np.nan, dtype=np.float32)
    rng = np.random.default_rng(0)
    # In random order, so that the node that stands a few places further on is a random one.
    nodes = rng.permutation(np.flatnonzero(index.n_examples))
    graph = _graph(index, nodes)
    if graph is not None:
        places[nodes] = _framed(_settle(graph, _start(graph, rng), rng))
    return places


def _graph(index: FeatureIndex, nodes: npt.NDArray[np.int64]) -> _Graph | None:
    """Return the graph of the latents `nodes`, or None when it has no edge."""
    n = len(nodes)
    node_of = np.full(len(index) + 1, -1)  # the last entry is that of neighbour -1, nobody
    node_of[nodes] = np.arange(n)
    tail = node_of[index.near_decoder[nodes]]
    distance = 1 - index.near_cosine[nodes].astype(np.float64)
    known = (tail >= 0) & np.isfinite(distance)
    if not known.any():
        return None
    n_known = np.maximum(known.sum(axis=1, keepdims=True), 1)
    nearest = np.where(known, distance, np.inf).min(axis=1, keepdims=True)
    beyond = np.where(known, distance - nearest, 0)
    scale = np.maximum(beyond.sum(axis=1, keepdims=True) / n_known, 1e-6)
    # log(1 - weight): of both directions the sum is that of the joined weight
    loss = np.log1p(-np.minimum(np.exp(-beyond / scale), 0.999))[known]
    one, other = np.nonzero(known)[0], tail[known]
    pair, at = np.unique(np.concatenate([one * n + other, other * n + one]), return_inverse=True)
    weight = -np.expm1(np.bincount(at, np.concatenate([loss, loss])))
    head, tail = np.divmod(pair, n)
    alone = np.setdiff1d(np.arange(n), head)
    order = np.argsort(np.concatenate([head, alone]), kind="stable")
    head, tail = np.concatenate([head, alone])[order], np.concatenate([tail, alone])[order]
    weight = np.concatenate([weight, np.zeros(len(alone))]).astype(np.float32)[order]
    start = np.searchsorted(head, np.arange(n))
    total = np.maximum(np.add.reduceat(weight, start), np.float32(1e-6))
    return _Graph(start, head, tail, (weight / total[head]).astype(np.float32))


def _start(graph: _Graph, rng: np.random.Generator) -> Floats:
    """Return a first place for each node, `(2, node)`."""
    n = len(graph.start)

    def shifted(y: Floats, stop: np.float32) -> Floats:
        """Apply the lazy walk, its spectrum from 0 to `stop` mapped to -1 to 1."""
        walked = np.stack([graph.sum(graph.share * row[graph.tail]) for row in y])
        return (walked + y) / stop - y

    y = rng.standard_normal((2, n), dtype=np.float32)
    for stop in (1 - np.geomspace(_FIRST, _LAST, _ROUNDS)).astype(np.float32):
        before, y = y, shifted(y, stop)
        for _ in range(_DEGREE - 1):
            before, y = y, 2 * shifted(y, stop) - before
        y -= y.mean(axis=1, keepdims=True)
        y = (np.linalg.qr(y.T)[0].T * n**0.5).astype(np.float32)
    ranks = np.argsort(np.argsort(y, axis=1, kind="stable"), axis=1)
    jitter = 0.05 * rng.standard_normal((2, n))
    return (_WIDTH * (2 * ranks / (n - 1) - 1) + jitter).astype(np.float32)


def _settle(graph: _Graph, start: Floats, rng: np.random.Generator) -> Floats:
    """Return the places after all epochs, `(2, node)`."""
    x, y = start
    for epoch in range(_EPOCHS):
        dx, dy = x[graph.tail] - x[graph.head], y[graph.tail] - y[graph.head]
        pull = 2 * graph.share / (1 + dx * dx + dy * dy)
        move_x, move_y = graph.sum(pull * dx), graph.sum(pull * dy)
        for away in rng.integers(1, len(x), _REPELLERS):
            dx, dy = x - np.roll(x, away), y - np.roll(y, away)
            square = dx * dx + dy * dy
            push = 2 / ((np.float32(0.001) + square) * (1 + square))
            move_x += np.clip(push * dx, -_LONGEST, _LONGEST)
            move_y += np.clip(push * dy, -_LONGEST, _LONGEST)
        step = np.float32(1 - epoch / _EPOCHS)
        x = x + step * np.clip(move_x, -_LONGEST, _LONGEST)
        y = y + step * np.clip(move_y, -_LONGEST, _LONGEST)
    return np.stack([x, y])


def _framed(y: Floats) -> Floats:
    """Return places within the unit square, `(node, 2)`, both axes in one scale."""
    low, high = np.quantile(y, [_OUTSIDE, 1 - _OUTSIDE], axis=1)
    width = max(float((high - low).max()), 1e-6)
    middle = (low + high)[:, None] / 2
    return np.clip((y - middle) / width + 0.5, 0, 1).T.astype(np.float32)
