"""Find a short rule for each feature, by description length.

A *condition* is a clue, or a stream with a set of values (`clues`). A *term* is up to three
conditions that all hold; a *rule* is up to three terms of which one holds.

1. Tokens are weighed as in an exercise: the feature's firings as at most `_EVIDENCE` examples, and
   the other tokens as 19 times as many, so one token of 20 fires. The cost of a rule is the bits to
   write it, plus the bits to say which examples fire, given the rule: with `a` firing and `b` other
   examples on one side of the rule, `(a + b) · H(a / (a + b))`. To write a condition takes the bits
   to choose it and its values, and half the logarithm of the number of firings, as for any number
   that is fitted (Schwarz 1978). A rule is therefore only as long as the evidence pays for.
2. The best set of values of a stream is found by sorting its values by their share of firings: it
   is a prefix of that order (Breiman et al. 1984).
3. Terms grow by beam search: every condition alone, then each of the best `_BEAM` with every other,
   on samples of the tokens that they cover. The best `_BEAM` of all are compared on all tokens.
4. While the rule leaves firings over, the best term for them is added, if that lowers the cost.

Rule learners of other packages (imodels, interpret, scikit-learn's trees) take a dense table of
fixed columns; the values of a stream, tens of thousands, are weighed here without such a table, and
the counts that all features share are made once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope.labels.clues import CLUES, NOTHING, STREAMS, Corpus, Ints, Mask

_EVIDENCE = 200.0
_OTHERS = 19.0  # other examples for each firing
_BEAM = 4
_MAX_CONDITIONS = 3
_MAX_TERMS = 3
_MAX_VALUES = 12
_LEFT_OVER = 0.1  # of the firings: fewer get no term of their own
_N_FIRINGS = 1500  # of a feature that are looked at, at most
_N_OTHERS = 4000  # tokens that a condition holds for that are looked at
_BITS_CHOICE = float(np.log2(len(CLUES) + len(STREAMS)))


class Condition(NamedTuple):
    """That a clue holds, by its index, or that a stream has one of some values; the other is -1."""

    clue: int = -1
    stream: int = -1
    values: tuple[int, ...] = ()


Term = tuple[Condition, ...]
Rule = tuple[Term, ...]


class _Node(NamedTuple):
    """A term in the search: the firings and the others that it covers, and what each weighs."""

    term: Term
    cost: float
    bits: float  # to write the term
    firings: Ints
    firing_weight: float
    others: Ints  # every token, for the empty term
    other_weight: float


class _Step(NamedTuple):
    """A condition that may be added; cost, bits and weight of covered others are of the result."""

    cost: float
    bits: float
    wrong: float
    condition: Condition
    node: _Node


class Miner:
    """Finds the rules of features on the tokens of a corpus."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._rng = np.random.default_rng(0)
        self._n_texts = len(corpus.texts)
        self._bits_value = float(np.log2(self._n_texts))
        self._fires = np.zeros(len(corpus), bool)
        self._bits_condition = _BITS_CHOICE
        self._slot = np.zeros(self._n_texts, np.int64)
        self._n_by_clue = corpus.by_clue.sum(1, dtype=np.int64)
        self._by_clue = [self._thinned(np.flatnonzero(holds)) for holds in corpus.by_clue]
        self._n_by_value = [
            np.bincount(values, minlength=self._n_texts) for values in corpus.values
        ]
        self._order = [np.argsort(values, kind="stable") for values in corpus.values]
        self._begin = [np.concatenate([[0], np.cumsum(n)]) for n in self._n_by_value]

    def rule_of(self, firings: Ints) -> Rule:
        """Return the rule of a feature that fires at these tokens; empty if none pays."""
        n_others = len(self.corpus) - len(firings)
        if not len(firings) or not n_others:
            return ()
        self._fires[firings] = True
        evidence = min(_EVIDENCE, len(firings))
        self._bits_condition = _BITS_CHOICE + float(np.log2(evidence)) / 2
        n_odds = _OTHERS * evidence
        some = np.sort(self._thinned(firings, _N_FIRINGS))
        rule: Rule = ()
        cost, left = float(_bits(evidence, n_odds)), some
        while len(rule) < _MAX_TERMS and len(left) > _LEFT_OVER * len(some):
            term = self._best_term(left, firings, evidence / len(some), n_odds / n_others)
            covered = covers(self.corpus, (*rule, term))
            n_hit = covered[some].sum() * evidence / len(some)
            n_wrong = (covered.sum() - covered[firings].sum()) * n_odds / n_others
            errors = float(_bits_given(n_hit, n_wrong, evidence, n_odds))
            longer = errors + sum(map(self._bits_of, (*rule, term)))
            if not term or longer >= cost:
                break
            rule, cost, left = (*rule, term), longer, some[~covered[some]]
        self._fires[firings] = False
        return rule

    def _bits_of(self, term: Term) -> float:
        n_values = sum(len(condition.values) for condition in term)
        return len(term) * self._bits_condition + n_values * self._bits_value

    def _best_term(self, left: Ints, firings: Ints, firing_weight: float, weight: float) -> Term:
        """Return the best term for the firings that are left, all `firings` apart from others."""
        n_left = len(left) * firing_weight
        n_others = (len(self.corpus) - len(firings)) * weight
        cost = float(_bits(n_left, n_others))
        root = _Node((), cost, 0.0, left, firing_weight, firings, weight)
        nodes, frontier, seen = [root], [root], set[Term]()
        for _ in range(_MAX_CONDITIONS):
            steps = [step for node in frontier for step in self._steps(node, n_left, n_others)]
            steps.sort(key=lambda step: step.cost)
            frontier = []
            for step in steps:
                term = tuple(sorted((*step.node.term, step.condition)))
                if len(frontier) == _BEAM:
                    break
                if term in seen or (step.node.term and step.cost > step.node.cost):
                    continue
                seen.add(term)
                frontier.append(self._grown(step, term))
            nodes += frontier
        # Costs of longer terms come from samples of tokens: the best ones are measured exactly.
        nodes.sort(key=lambda node: node.cost)
        exact = []
        for node in nodes[:_BEAM]:
            covered = covers(self.corpus, (node.term,))
            hit = covered[left].sum() * firing_weight
            wrong = (covered.sum() - covered[firings].sum()) * weight
            errors = cost if node is root else float(_bits_given(hit, wrong, n_left, n_others))
            exact.append((errors + node.bits, node.term))
        return min(exact)[1]

    def _steps(self, node: _Node, n_left: float, n_others: float) -> Iterator[_Step]:
        """Yield the best conditions that may be added to a node."""
        corpus, is_root = self.corpus, not node.term
        hit = corpus.holds[node.firings].sum(0, dtype=np.int64) * node.firing_weight
        n_wrong = corpus.holds[node.others].sum(0, dtype=np.int64)  # at the root: of all firings
        wrong = (self._n_by_clue - n_wrong if is_root else n_wrong) * node.other_weight
        bits = node.bits + self._bits_condition
        costs = _bits_given(hit, wrong, n_left, n_others) + bits
        for i in np.argsort(costs, kind="stable")[: 2 * _BEAM].tolist():
            yield _Step(float(costs[i]), bits, float(wrong[i]), Condition(clue=i), node)
        for stream, values in enumerate(corpus.values):
            found, n_hit = np.unique(values[node.firings], return_counts=True)
            n_hit, found = n_hit[found != NOTHING], found[found != NOTHING]
            if not len(found):
                continue
            self._slot[found] = np.arange(1, len(found) + 1)
            n_wrong = np.bincount(self._slot[values[node.others]], minlength=len(found) + 1)[1:]
            self._slot[found] = 0
            if is_root:
                n_wrong = self._n_by_value[stream][found] - n_wrong
            hit, wrong = n_hit * node.firing_weight, n_wrong * node.other_weight
            order = np.lexsort((found, -hit, -hit / (hit + wrong)))[:_MAX_VALUES]
            bits_each = bits + np.arange(1, len(order) + 1) * self._bits_value
            hits, wrongs = np.cumsum(hit[order]), np.cumsum(wrong[order])
            costs = _bits_given(hits, wrongs, n_left, n_others) + bits_each
            n = int(costs.argmin()) + 1
            condition = Condition(stream=stream, values=tuple(sorted(found[order[:n]].tolist())))
            found_bits, wrong_weight = float(bits_each[n - 1]), float(wrongs[n - 1])
            yield _Step(float(costs[n - 1]), found_bits, wrong_weight, condition, node)

    def _grown(self, step: _Step, term: Term) -> _Node:
        """Return the node of a step, with the tokens that it covers, or a sample of the others."""
        condition, node = step.condition, step.node
        firings = node.firings[self._holds(condition, node.firings)]
        if node.term:
            others = node.others[self._holds(condition, node.others)]
        else:
            if condition.stream < 0:
                rows = self._by_clue[condition.clue]
            else:
                order, begin = self._order[condition.stream], self._begin[condition.stream]
                rows = np.concatenate(
                    [order[begin[value] : begin[value + 1]] for value in condition.values]
                )
                rows = self._thinned(rows)
            others = rows[~self._fires[rows]]
        weight = step.wrong / max(len(others), 1)
        return _Node(term, step.cost, step.bits, firings, node.firing_weight, others, weight)

    def _holds(self, condition: Condition, rows: Ints) -> Mask:
        if condition.stream < 0:
            return self.corpus.holds[rows, condition.clue] > 0
        return np.isin(self.corpus.values[condition.stream][rows], condition.values)

    def _thinned(self, rows: Ints, n: int = _N_OTHERS) -> Ints:
        """Return the rows, or a random sample of `n` of them."""
        return rows if len(rows) <= n else self._rng.choice(rows, n, replace=False)


def covers(corpus: Corpus, rule: Rule) -> Mask:
    """Return which tokens a rule covers, `(token,)`. An empty rule covers none."""
    covered = np.zeros(len(corpus), bool)
    for term in rule:
        here = np.ones(len(corpus), bool)
        for condition in term:
            if condition.stream < 0:
                here &= corpus.by_clue[condition.clue]
            else:
                wanted = np.zeros(len(corpus.texts), bool)
                wanted[list(condition.values)] = True
                here &= wanted[corpus.values[condition.stream]]
        covered |= here
    return covered


def _bits_given(hit: npt.ArrayLike, wrong: npt.ArrayLike, n_firings: float, n_others: float) -> Any:
    """Return the bits to say which examples fire, given a rule that covers some of each kind.

    A rule that covers a smaller share of the firings than of the others explains nothing.
    """
    hit, wrong = np.asarray(hit, float), np.asarray(wrong, float)
    bits = _bits(hit, wrong) + _bits(n_firings - hit, n_others - wrong)
    return np.where(hit * n_others > wrong * n_firings, bits, np.inf)


def _bits(firings: npt.ArrayLike, others: npt.ArrayLike) -> Any:
    """Return the bits to say which of so many examples fire."""
    a, b = np.maximum(np.asarray(firings, float), 0), np.maximum(np.asarray(others, float), 0)
    return _x_log_x(a + b) - _x_log_x(a) - _x_log_x(b)


def _x_log_x(x: Any) -> Any:
    return x * np.log2(np.where(x > 0, x, 1))
