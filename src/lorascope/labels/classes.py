"""Tell monosemantic, broad and polysemantic directions by the rules that describe them.

1. A rule is found for each direction on the choosing half (`rules`), and compared with its firings
   on the scoring half: balanced accuracy, as labels have it.
2. The rule's firings are divided into *parts*: by the first term that covers them and, where the
   term lists tokens, by the kind of the token. `_ENOUGH` of the covered firings must be in the
   largest part, or else the direction needs several rules.
3. *Monosemantic*: balanced accuracy of `DESCRIBED` or more, one part, and the rule covers less than
   `BROAD` of all tokens. *Broad*: the same, but it covers more. *Polysemantic*: the others, which
   need several parts, or which no rule describes (*unclear*). Directions with fewer than
   `FEWEST` firings in one half are not scored.
4. Intervals resample the rollouts of the scoring half: rules and parts stay, shares are recomputed.
5. The same with rules of other directions shows what a wrong rule gets.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope import runtime
from lorascope.labels.by_rule import Halves
from lorascope.labels.clues import CLUES, Corpus, Ints, Mask
from lorascope.labels.directions import Directions
from lorascope.labels.rules import Miner, Rule, covers

DESCRIBED = 0.85  # balanced accuracy of a rule that describes a direction
BROAD = 0.1  # share of all tokens that a broad rule covers
FEWEST = 10  # firings in each half of a direction that is scored
_ENOUGH = 0.8  # of the covered firings are in the main part
_KINDS = (  # of tokens in a list: of different kinds, they are no single meaning
    ("template",),
    ("digit",),
    ("operator", "symbol"),
    ("punctuation", "line break"),
    ("word",),
)
Floats = npt.NDArray[np.float64]


class Counts(NamedTuple):
    """Of each direction in each rollout, `(direction, rollout)`.

    `fired` are its firings, `covered` the tokens of its rule, `hit` those that fire, `main` those
    of the main part. `tokens` `(rollout,)` are all.
    """

    fired: Floats
    covered: Floats
    hit: Floats
    main: Floats
    tokens: Floats


class Shares(NamedTuple):
    """What `shares` says of a set of directions, each `(draw,)`."""

    monosemantic: Floats
    broad: Floats
    polysemantic: Floats
    unclear: Floats
    balanced_accuracy: Floats


def count(directions: Directions, halves: Halves, miner: Miner, name: str) -> tuple[Counts, Counts]:
    """Find the rules of all directions that can be scored, and count where they hold.

    Return the counts with their own rules, and with those of other directions.
    """
    known = [pair for pair in directions.firings if min(map(len, pair)) >= FEWEST]
    corpus = halves.scoring.corpus
    rules: list[Rule] = []
    with runtime.progress(len(known), name, "directions") as bar:
        for choosing, _ in known:
            rules.append(miner.rule_of(choosing))
            bar.update()
    order = np.random.default_rng(1).permutation(len(known))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    own, wrong = [], []
    covered = [covers(corpus, rule) for rule in rules]
    for i, (_, firings) in enumerate(known):
        own.append(_of_rollouts(corpus, rules[i], covered[i], firings))
        wrong.append(_of_rollouts(corpus, rules[other[i]], covered[other[i]], firings))
    tokens = np.bincount(corpus.rollout).astype(np.float64)
    read = tokens > 0  # the others are rollouts of the choosing half

    def counts(some: list[list[Ints]]) -> Counts:
        stacked = np.array(some, np.float64).reshape(-1, 4, len(tokens))[..., read]
        fired, covered, hit, main = stacked.swapaxes(0, 1)
        return Counts(fired, covered, hit, main, tokens[read])

    return counts(own), counts(wrong)


def shares(counts: Counts, weights: Floats) -> Shares:
    """Return the shares of the classes if rollout r counts `weights[draw, r]` times."""
    fired, covered, hit, main = (some @ weights.T for some in counts[:4])
    tokens = weights @ counts.tokens
    with np.errstate(invalid="ignore", divide="ignore"):
        balanced = (hit / fired + 1 - (covered - hit) / (tokens - fired)) / 2
        described, single = balanced >= DESCRIBED, main >= _ENOUGH * hit
    wide = covered >= BROAD * tokens
    mono, broad = described & single & ~wide, described & single & wide
    classes = (mono, broad, ~(mono | broad), ~described, np.nan_to_num(balanced, nan=0.5))
    return Shares(*(some.mean(0) if len(some) else some.sum(0) for some in classes))


def _of_rollouts(corpus: Corpus, rule: Rule, covered: Mask, firings: Ints) -> list[Ints]:
    """Return the counts of one direction, each `(rollout,)`."""
    n = int(corpus.rollout.max()) + 1
    hits = firings[covered[firings]]
    part = _parts(corpus.take(hits), rule)
    main = hits[part == np.bincount(part, minlength=1).argmax()]
    rows = (firings, np.flatnonzero(covered), hits, main)
    return [np.bincount(corpus.rollout[some], minlength=n) for some in rows]


def _parts(hits: Corpus, rule: Rule) -> Ints:
    """Return the part of a rule that each of the firings which it covers belongs to."""
    number = {clue.name: i for i, clue in enumerate(CLUES)}
    columns = [[number[name] for name in names] for names in _KINDS]
    is_kind = [hits.by_clue[some].any(0) for some in columns]
    kind = np.argmax([*is_kind, np.ones(len(hits), bool)], axis=0) + 1  # the first; or another
    part = np.zeros(len(hits), np.int64)
    for i, term in reversed(list(enumerate(rule))):
        lists = any(one.stream == 0 and len(one.values) > 1 for one in term)
        here = covers(hits, (term,))
        part[here] = i * (len(_KINDS) + 2) + (kind[here] if lists else 0)
    return part
