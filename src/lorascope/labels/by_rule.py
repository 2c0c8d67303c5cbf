"""Label features by rules: one half of some rollouts chooses them, the other half scores them.

1. `read_halves` reads whole rollouts of the store, drawn at random, and encodes them: it is then
   known of every token which features fire there.
2. `label_features` finds a short rule for each feature on one half (`rules`), and compares the
   tokens that it covers on the other half with the firings (`score`). The rules of other features,
   scored in the same way, show what a wrong label gets.
3. With a report of `direct`, the tokens that a feature promotes describe its output. They are
   scored by how well the next token tells where the feature fires and, with a report of `ablate`,
   by how often they find the feature's removal among others (`score`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.errors import DatasetError
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import BY_RULE, Kind, Label, Output, rounded
from lorascope.labels.clues import CLUES, Corpus, Ints, Mask, read_clues
from lorascope.labels.rules import Miner, Rule, covers
from lorascope.labels.score import (
    Falls,
    Score,
    against,
    against_same_token,
    draw_rollouts,
    pick_removals,
    rank,
    score,
)
from lorascope.labels.wording import kind_of, name_of, parts_of, quoted, sentence_of, shortened
from lorascope.texts.roles import ROLES, has_role
from lorascope.texts.tokens import visible

if TYPE_CHECKING:
    from lorascope.causal.report_records import DirectReport, ScoredToken
    from lorascope.sae.model import SAE

LEAST_SHARE = 0.1  # of a feature's effect that goes to the output directly
_ROWS = 1 << 14  # rows encoded at once
_N_SHUFFLED = 8  # other features whose rules are tried on each feature
_N_NEAR = 5  # neighbours of each kind
_N_PROMOTED = 5
_LEAST_Z = 3.0  # of a promoted token
_MOSTLY = 0.6  # of a feature's firings are in its category
_CATEGORIES = {  # by the clue that most firings have; the first that fits
    "template": "template",
    "number": "digit",
    "operator": "operator",
    "line break": "line break",
    "punctuation": "punctuation",
    "symbol": "symbol",
    "name": "in a name",
    "word": "word",
}


class Half(NamedTuple):
    """Tokens of one half of the rollouts, and each feature's firings among them.

    Feature i fires at the tokens `rows[offset[i]:offset[i + 1]]`, in ascending order, with `value`
    of the same slice. `next_id` `(token,)` is the id of the token that follows in the rollout, -1
    for the last one, `row` `(token,)` the token's row in the store.
    """

    corpus: Corpus
    offset: Ints
    rows: Ints
    next_id: npt.NDArray[np.int32]
    row: Ints
    value: npt.NDArray[np.float32]

    def firings(self, latent: int) -> Ints:
        """Return the tokens on which a feature fires."""
        return self.rows[self.offset[latent] : self.offset[latent + 1]]

    def values(self, latent: int) -> npt.NDArray[np.float32]:
        """Return how strongly a feature fires at `firings`."""
        return self.value[self.offset[latent] : self.offset[latent + 1]]


class Halves(NamedTuple):
    """Rollouts that choose labels, and rollouts that score them."""

    choosing: Half
    scoring: Half

    def sizes(self) -> dict[str, int]:
        """Return how many rollouts and tokens each half has, for the manifest."""
        return {
            f"n_{what}_{half}": n
            for half, part in zip(("choosing", "scoring"), self, strict=True)
            for what, n in (
                ("rollouts", len(np.unique(part.corpus.rollout))),
                ("tokens", len(part.corpus)),
            )
        }


def read_halves(store: ActivationStore, sae: "SAE", index: FeatureIndex, n_tokens: int) -> Halves:
    """Read rollouts of at most `n_tokens` tokens, at least two, and encode them.

    The rollouts and the roles are those that the index was collected from.
    """
    n_rollouts = index.content.get("n_rollouts", store.n_rollouts)
    order = np.random.default_rng(0).permutation(n_rollouts)
    lengths = np.diff(store.rollout_start)
    n = int(np.searchsorted(np.cumsum(lengths[order]), n_tokens, side="right"))
    order = order[: max(n, 2)]
    if len(order) < 2:
        raise DatasetError(f"{store.path} has one rollout: labels need two, one to check the other")
    rollouts = np.sort(order)
    rows = np.concatenate(
        [np.arange(*store.rollout_start[rollout : rollout + 2]) for rollout in rollouts]
    )
    token_ids, roles = store.take_token_ids(rows), store.roles[rows]
    rollout = np.repeat(np.arange(len(rollouts)), lengths[rollouts])
    spelling = {i: store.vocabulary[i] for i in np.unique(token_ids).tolist()}
    corpus = read_clues(token_ids, roles, rollout, spelling)
    next_id = np.append(token_ids[1:], -1)
    next_id[np.flatnonzero(np.diff(rollout))] = -1
    row, latent, value = _fired(store, sae, rows)
    read = has_role(roles, index.manifest.settings.get("roles", ROLES))
    chooses = np.zeros(len(rollouts), bool)
    chooses[np.searchsorted(rollouts, order[::2])] = True

    def half(tokens: Mask) -> Half:
        here = tokens[row]
        new_row = np.cumsum(tokens) - 1
        counts = np.bincount(latent[here], minlength=sae.d_sae)
        offset = np.concatenate([[0], np.cumsum(counts)])
        where = np.flatnonzero(tokens)
        return Half(
            corpus.take(where), offset, new_row[row[here]], next_id[where], rows[where], value[here]
        )

    return Halves(half(read & chooses[rollout]), half(read & ~chooses[rollout]))


def _fired(
    store: ActivationStore, sae: "SAE", rows: Ints
) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Return the firings at some rows of the store, by latent: index into them, latent, value."""
    import torch

    parts: list[tuple[npt.NDArray[Any], ...]] = []
    with runtime.progress(len(rows), "label", "tokens") as bar:
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS]
            code = sae.encode(torch.from_numpy(store.take(chunk)).to(sae.b_enc.device))
            row = np.repeat(np.arange(len(chunk)) + start, code.l0.cpu().numpy())
            latents, values = code.latents.cpu().numpy(), code.values.float().cpu().numpy()
            parts.append((row.astype(np.int32), latents.astype(np.int32), values))
            bar.update(len(chunk))
    row, latent, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(latent, kind="stable")
    return row[order].astype(np.int64), latent[order].astype(np.int64), value[order]


def label_features(
    halves: Halves,
    index: FeatureIndex,
    direct: "DirectReport | None" = None,
    falls: Mapping[int, Falls] | None = None,
) -> dict[int, Label]:
    """Return the labels by rule of all features that fire; `falls` are those of removals."""
    choosing, scoring = halves
    alive = np.flatnonzero(index.alive).tolist()
    miner = Miner(choosing.corpus)
    with runtime.progress(len(alive), "rules", "features") as bar:
        rules: dict[int, Rule] = {}
        for latent in alive:
            rules[latent] = miner.rule_of(choosing.firings(latent))
            bar.update()
    shuffled = _shuffled(scoring, rules)
    near = np.concatenate([index.near_decoder[:, :_N_NEAR], index.near_cofiring[:, :_N_NEAR]], 1)
    category = {i: _category(choosing, i) or _category(scoring, i) or "mixed" for i in alive}
    writes = {} if direct is None else {i: some for i in alive if (some := _promoted(direct, i))}
    picked = pick_removals(
        {i: [token.token_id for token in some] for i, some in writes.items()},
        {i: some for i, some in (falls or {}).items() if i in category},
        category,
    )
    labels: dict[int, Label] = {}
    draws = draw_rollouts(scoring.corpus)
    for latent in alive:
        rule, firings = rules[latent], scoring.firings(latent)
        covered = covers(scoring.corpus, rule)
        output, is_output = None, False
        if direct is not None and (promoted := writes.get(latent)):
            found = _score_next(scoring, latent, promoted)
            output = Output(
                tokens=tuple(visible(token.token) for token in promoted),
                share=min(direct.features[latent].share, 1.0),
                balanced_accuracy=found.balanced_accuracy,
                interval=found.interval,
            )
            chosen = score(choosing.corpus, covers(choosing.corpus, rule), choosing.firings(latent))
            is_output = not chosen.is_clear and _score_next(choosing, latent, promoted).is_clear
            if is_output:
                covered = _comes_next(scoring, promoted)
        neighbours = [scoring.firings(i) for i in near[latent].tolist() if i >= 0]
        found = score(scoring.corpus, covered, firings)
        name, sentence, kind = describe(
            rule, choosing.corpus.texts, found, output, is_output=is_output
        )
        if category[latent] == "template" and kind in ("token", "context"):
            kind = "position"
        label = Label(
            name=name,
            sentence=sentence,
            kind=kind,
            category=category[latent],
            author=BY_RULE,
            **found._asdict(),
            same_token=against_same_token(scoring.corpus, covered, firings),
            near=against(covered, firings, np.concatenate([*neighbours, firings[:0]])),
            shuffled=shuffled.get(latent),
            rule=() if is_output else parts_of(rule, choosing.corpus.texts),
            output=output,
            picked_effect=picked.own.get(latent),
            picked_effect_shuffled=picked.shuffled.get(latent),
            **rank(scoring.corpus, covered, firings, scoring.values(latent), draws)._asdict(),
        )
        labels[latent] = rounded(label)
    return labels


def describe(
    rule: Rule, texts: Sequence[str], found: Score, output: Output | None, *, is_output: bool
) -> tuple[str, str, Kind]:
    """Return name, sentence and kind of a label with this score.

    With `is_output`, what the feature promotes describes it better than the rule.
    """
    name, words, kind = name_of(rule, texts), sentence_of(rule, texts), kind_of(rule)
    sentence = f"Fires on {words}."
    if is_output and output:
        name, kind = f"before {quoted(output.tokens, 3)}", "output"
        sentence = f"Fires before the tokens that it promotes, mostly on {words}."
    if found.balanced_accuracy is None:
        name, kind = f"unclear: too rare, {name}" if rule else "unclear: too rare", "unclear"
        sentence = f"Unclear: it does not fire on the held-out texts. On others: {words}."
    elif not found.is_clear:
        name, kind = f"unclear: mostly {name}" if rule else "unclear", "unclear"
        sentence = f"Unclear: fires mostly on {words}." if rule else f"Unclear: {words}."
    if output:
        sentence += f" Promotes {quoted(output.tokens, _N_PROMOTED, 'and')}."
    return shortened(name), sentence, kind


def _shuffled(half: Half, rules: Mapping[int, Rule]) -> dict[int, float]:
    """Return for each feature the mean balanced accuracy of the rules of some other features."""
    latents = [latent for latent in rules if 0 < len(half.firings(latent)) < len(half.corpus)]
    order = np.random.default_rng(1).permutation(latents).tolist()
    n = len(order)
    shifts = range(1, min(_N_SHUFFLED, n - 1) + 1)
    totals = dict.fromkeys(latents, 0.0)
    for i, author in enumerate(order if shifts else []):
        covered = covers(half.corpus, rules[author])
        n_covered = int(covered.sum())
        for shift in shifts:
            latent = order[(i + shift) % n]
            firings = half.firings(latent)
            n_hit = int(covered[firings].sum())
            wrong = (n_covered - n_hit) / (len(half.corpus) - len(firings))
            totals[latent] += (n_hit / len(firings) + 1 - wrong) / 2
    return {latent: total / len(shifts) for latent, total in totals.items() if shifts}


def _category(half: Half, latent: int) -> str:
    """Return what most firings are by their tokens; empty without firings."""
    firings = half.firings(latent)
    if not len(firings):
        return ""
    share = half.corpus.holds[firings].mean(0)
    number = {clue.name: i for i, clue in enumerate(CLUES)}
    fits = (name for name, clue in _CATEGORIES.items() if share[number[clue]] >= _MOSTLY)
    return next(fits, "mixed")


def _promoted(direct: "DirectReport", latent: int) -> "tuple[ScoredToken, ...]":
    """Return the tokens that a feature promotes most, far above the others."""
    effect = direct.features[latent]
    promoted = effect.promoted[:_N_PROMOTED] if effect.share >= LEAST_SHARE else ()
    return tuple(token for token in promoted if token.z >= _LEAST_Z)


def _comes_next(half: Half, promoted: "tuple[ScoredToken, ...]") -> Mask:
    """Return the tokens that one of these follows."""
    return np.isin(half.next_id, [token.token_id for token in promoted])


def _score_next(half: Half, latent: int, promoted: "tuple[ScoredToken, ...]") -> Score:
    """Return how well the next token tells where a feature fires."""
    return score(half.corpus, _comes_next(half, promoted), half.firings(latent))
