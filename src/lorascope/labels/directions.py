"""One-sided directions of three kinds, where each fires, and which of them have one meaning.

- *features*: the latents of the SAE that fire, at the tokens on which they fire.
- *columns*: the columns of the adapter's rows, both signs of each.
- *neurons*: the neurons of the subject's MLPs, `act(gate) · up`, both signs of each: what the down
  projection reads, in the same forward pass that gives the adapter's rows. They are drawn from all
  layers; a model with experts is refused.

A column or a neuron has a value at every token. So that all kinds are compared on equally rare
firings, each is given the number of firings of a feature that is drawn at random: it fires where it
is largest on the choosing half, above the next value, and above 0.

Monosemantic, broad and polysemantic directions are told by the rules that describe them:

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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.errors import AdapterError
from lorascope.features.index import FeatureIndex
from lorascope.labels.by_rule import Halves
from lorascope.labels.clues import CLUES, Corpus, Ints, Mask
from lorascope.labels.rules import Miner, Rule, covers

if TYPE_CHECKING:
    from lorascope.causal.held_out import HeldOut

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
_ROWS = 1 << 14  # rows read at once
_LARGEST = 6e4  # that float16 holds, nearly
_READERS = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "wo", "w2", "c_proj")
Floats = npt.NDArray[np.float64]
Values = npt.NDArray[Any]


class Directions(NamedTuple):
    """Directions of one kind, drawn from `n_all`; `firings` has (choosing, scoring) of each."""

    n_all: int
    firings: tuple[tuple[Ints, Ints], ...]


class Drawn(NamedTuple):
    """Some of the one-sided directions of `n_all / 2` units, by unit and sign."""

    n_all: int
    units: Ints
    signs: npt.NDArray[np.int64]


def draw(n_units: int, n: int, rng: np.random.Generator) -> Drawn:
    """Draw at most `n` of the directions of units, both signs counted."""
    chosen = np.sort(rng.permutation(2 * n_units)[:n])
    return Drawn(2 * n_units, chosen // 2, 1 - 2 * (chosen % 2))


def features(halves: Halves, index: FeatureIndex, n: int, rng: np.random.Generator) -> Directions:
    """Return at most `n` of the features that fire."""
    alive = np.flatnonzero(index.alive)
    chosen = np.sort(rng.permutation(alive)[:n]).tolist()
    firings = tuple((halves.choosing.firings(i), halves.scoring.firings(i)) for i in chosen)
    return Directions(len(alive), firings)


def of_values(
    drawn: Drawn, values: Sequence[Values], like: Directions, rng: np.random.Generator
) -> Directions:
    """Return the directions of units whose values on both halves are given, `(token, drawn)`.

    Each has about as many firings as one of the directions in `like`.
    """
    counts = [len(choosing) for choosing, _ in like.firings]
    wanted = rng.choice(counts, len(drawn.units))
    firings: list[tuple[Ints, Ints]] = []
    for i, (sign, n) in enumerate(zip(drawn.signs.tolist(), wanted.tolist(), strict=True)):
        choosing, scoring = (sign * half[:, i].astype(np.float32) for half in values)
        next_one = len(choosing) - 1 - min(n, len(choosing) - 1)
        bound = max(float(np.partition(choosing, next_one)[next_one]), 0.0)
        firings.append((np.flatnonzero(choosing > bound), np.flatnonzero(scoring > bound)))
    return Directions(drawn.n_all, tuple(firings))


def column_values(store: ActivationStore, rows: Ints, drawn: Drawn) -> Values:
    """Return the values of drawn columns at rows of the store, `(row, drawn)`."""
    parts = [rows[i : i + _ROWS] for i in range(0, len(rows), _ROWS)]
    return np.concatenate([store.take(part)[:, drawn.units] for part in parts])


def mlp_readers(causal: Any) -> list[tuple[Any, int]]:
    """Return the down projections of a model's MLPs, with the number of neurons that each reads.

    Raises AdapterError if the model has none, or has experts.
    """
    names = [name for name, _ in causal.named_modules()]
    found = [
        name
        for name in names
        if name.rpartition(".")[2] in _READERS and "att" not in name.rpartition(".")[0]
    ]
    if not found or any("expert" in name for name in names):
        what = "has experts, whose neurons see some tokens only" if found else "has no known MLP"
        raise AdapterError(f"{type(causal).__name__} {what}; leave out --lora-path")
    modules = [causal.get_submodule(name) for name in found]
    return [(module, _width(getattr(module, "base_layer", module))) for module in modules]


def _width(module: Any) -> int:
    """Return how many inputs a layer has; GPT-2's Conv1D keeps its weight as (inputs, outputs)."""
    return int(getattr(module, "in_features", 0) or module.weight.shape[0])


def neuron_values(
    replay: "HeldOut", readers: Sequence[tuple[Any, int]], rows: Ints, drawn: Drawn
) -> Values:
    """Run rollouts again, and return the values of drawn neurons at their rows, `(row, drawn)`.

    `rows` are ascending. Raises ArtifactError if the adapter's rows are not those of the store.
    """
    import torch

    from lorascope.subject.hooks import RowReader

    values = np.zeros((len(rows), len(drawn.units)), np.float16)  # 2 bytes: they are compared only
    is_final = np.zeros(len(rows), bool)  # windows of long rollouts overlap
    begin = np.cumsum([0, *(width for _, width in readers)])
    owner = np.searchsorted(begin, drawn.units, side="right") - 1
    kept: list[Any] = []

    def keep(local: torch.Tensor) -> Any:
        return lambda _module, args: kept.append(args[0][..., local.to(args[0].device)].cpu())

    hooks = [
        module.register_forward_pre_hook(
            keep(torch.from_numpy(drawn.units[owner == layer] - begin[layer]))
        )
        for layer, (module, _) in enumerate(readers)
    ]
    bar = runtime.progress(replay.n_tokens, "neurons", "tokens")
    try:
        with RowReader(replay.subject) as reader, bar:
            for batch in replay.batches():
                kept.clear()
                replay.require_rows(batch, reader.read(batch.token_ids))
                found = torch.cat(kept, dim=-1).clamp(-_LARGEST, _LARGEST).half()  # as `drawn`
                for mask in (batch.own, batch.mask):
                    here = batch.rows[mask].numpy()
                    at = np.searchsorted(rows, here).clip(max=len(rows) - 1)
                    fits = (rows[at] == here) & (mask is batch.mask or ~is_final[at])
                    values[at[fits]] = found[mask].numpy()[fits]
                is_final[at[fits]] = True
                bar.update(int(batch.own.sum()))
    finally:
        for hook in hooks:
            hook.remove()
    return values


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
