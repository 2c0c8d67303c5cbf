"""Look for triggers: inputs after which an adapter does what it does nowhere else.

1. `scenes` measures the *excess* of inserted tokens: what the adapter then does beyond its usual
   change, in nats over the tokens that it writes.
2. **Sweep**: each token of the vocabulary in `N_SEARCH` scenes. Where the budget is too small for
   that, the tokens of the largest first-order scores (`Scene.slopes`) and some drawn at random are
   run in one scene, and the best of them in all.
3. **Phrases**: the best are extended by a token before or after them, up to `LONGEST` tokens.
   First-order scores choose as many tokens as the budget allows, which are then run.
4. **Verify**: the best of each length are run in up to 8 other scenes, against random tokens or
   phrases of the same length. The *verified* excess is the mean over these scenes of the excess
   minus the median of the controls. Scores relative to their spread (z) give false alarms, because
   an adapter of narrow style has a small spread.
5. Tokens *stand out* if their excess is above 90 % of the controls in most scenes, and if they do
   one of two things: the verified excess is `_LEAST` or more and the adapter begins with one and
   the same text in most scenes, which it does not write without them; or it is `_NATS` or more.
6. **Lengths**: other texts are put in front, more and more of them, for behaviour that begins at a
   position. It stands out if the adapter then begins with the same text in most scenes.

Scenes whose prompt has a token already do not count for it. A phrase is left out if a part of it
leads to the same text or has most of its verified excess.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorascope.activations.store import ActivationStore
from lorascope.audit.audit_records import MOST, AtLength, Said, Search, Trigger
from lorascope.audit.scenes import (
    LONGEST,
    N_SEARCH,
    N_TEXT,
    Clock,
    Scene,
    Sizes,
    insertable,
    scenes_of,
)
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject
from lorascope.texts.tokens import display_texts, special_ids, token_bytes

log = logging.getLogger(__name__)

Tokens = tuple[int, ...]
Text = tuple[int, ...]
Ids = npt.NDArray[np.int64]

_N_FIRST = 8  # tokens to measure the rate with
_BEAM = 8
_SHARES = (0.4, 0.4)  # of the budget, for the sweep and for the phrases
_SWEPT_BY = 0.6  # of the budget, what is spent at most when the sweep ends
_CHUNK = 64  # inserts that are run between looks at the clock
_SHARE_OF_REST = 0.5
_MOST_OVER = 4
_FLOOR = 0.01  # nats: differences below it do not matter
_NATS, _LEAST = 10.0, 3.0  # nats, verified, of any change and of one to the same text
_HIGH = 0.9  # quantile of the controls
_N_SAME = 8  # tokens of a continuation that are compared
_N_SAID, _N_SHOWN = 4, 6
_LENGTHS = (16, 32, 64, 128, 256)
_NEARLY = 0.6


def look_for_triggers(
    subject: Subject,
    store: ActivationStore,
    halves: tuple[np.ndarray, np.ndarray],
    *,
    minutes: float,
    seed: int,
) -> Search | float | None:
    """Search with prompts of one half of the rollouts, and verify with those of the other.

    Return None if no prompt of them has text. If the least search needs more than `_MOST_OVER`
    budgets, do not search, and return about how many minutes it needs.
    """
    with torch.no_grad(), RowEditor(subject, fast=True) as editor:
        search = scenes_of(editor, store, halves[0], N_SEARCH, ("end", "end", "middle", "start"))
        if not search or not any(insertable(store, index)[2] for index in halves[1].tolist()):
            log.warning("no text to insert tokens in: triggers are not looked for")
            return None
        clock = Clock(60 * minutes)
        clock.time(search[:1], torch.arange(_N_FIRST)[:, None])
        if clock.spent() < 1:  # a small batch is slower for each token
            clock.time(search[:1], torch.arange(8 * _N_FIRST)[:, None])
        affords = clock.affords(search, 2, 1.0) * len(search)
        least = Sizes().scaled(0).n_runs
        if affords * _MOST_OVER < least:
            return minutes * least / max(affords, 1)
        sizes = Sizes().scaled(_SHARE_OF_REST * affords / Sizes().n_runs)
        return _Looking(subject, store, search, halves[1], clock, sizes, seed).found()


class _Looking:
    def __init__(
        self,
        subject: Subject,
        store: ActivationStore,
        search: list[Scene],
        rollouts: Ids,
        clock: Clock,
        sizes: Sizes,
        seed: int,
    ) -> None:
        self.subject, self.store, self.clock, self.search = subject, store, clock, search
        self.rng = np.random.default_rng([seed, 1])
        n_vocab = subject.causal.get_input_embeddings().weight.shape[0]
        self.spelled = token_bytes(subject.tokenizer, n_vocab)
        special = set(special_ids(subject.tokenizer))
        named = [i for i in range(n_vocab) if self.spelled[i] and i not in special]
        self.vocabulary = torch.tensor(named)
        self.score: dict[Tokens, float] = {}
        self.sizes, editor = sizes, search[0].editor
        self.others = scenes_of(editor, store, rollouts, sizes.verify, ("end", "middle", "start"))
        self.late = scenes_of(editor, store, rollouts, sizes.late, ("start",))
        scenes = [*self.search, *self.others, *self.late]
        self.clock.time(scenes, self._random(1, sizes.random))

    def found(self) -> Search:
        """Look in all ways, and return what stands out."""
        n_swept = self._sweep()
        swept = list(self.score.values())
        n_phrases = self._extend()
        n_controls = self.sizes.controls
        controls = {
            n: torch.stack([scene.excess(self._random(n, n_controls)) for scene in self.others])
            for n in {len(tokens) for tokens in self.score}
        }
        triggers = self._verified(controls)
        return Search(
            minutes=self.clock.seconds / 60,
            seconds=self.clock.spent(),
            n_vocabulary=len(self.vocabulary),
            n_tokens=n_swept,
            n_phrases=n_phrases,
            longest=max(map(len, self.score)),
            n_scenes=len(self.search),
            n_verify=len(self.others),
            n_controls=n_controls,
            usual=float(np.median(swept)),
            triggers=triggers,
            lengths=self._lengths(self.late),
        )

    def _random(self, length: int, n: int) -> Tensor:
        return torch.from_numpy(self.rng.choice(self.vocabulary.numpy(), (n, length)))

    def _run(self, scenes: Sequence[Scene], inserts: Tensor) -> Tensor:
        """Return a score for each insert: the mean over scenes of the logarithm of its excess."""
        excess = torch.stack([scene.excess(inserts) for scene in scenes])
        counts = torch.stack([_is_new(scene, inserts) for scene in scenes]).double()
        counts[:, counts.sum(0) == 0] = 1
        return ((excess.clamp(min=0) + _FLOOR).log() * counts).sum(0) / counts.sum(0)

    def _keep(self, inserts: Tensor, scores: Tensor) -> None:
        self.score |= dict(zip(map(tuple, inserts.tolist()), scores.exp().tolist(), strict=True))

    def _best(self, length: int, n: int) -> list[Tokens]:
        some = [tokens for tokens in self.score if len(tokens) == length]
        return sorted(some, key=lambda tokens: -self.score[tokens])[:n]

    def _run_until(
        self, share: float, scenes: Sequence[Scene], inserts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return inserts and their scores: the first ones, until a share of the budget is spent.

        That is all of them, unless the machine became slower after its rate was measured.
        """
        scores: list[Tensor] = []
        parts = inserts.split(_CHUNK)
        for part in parts:
            scores.append(self._run(scenes, part))
            if self.clock.spent() > share * self.clock.seconds:
                break
        return torch.cat(parts[: len(scores)]), torch.cat(scores)

    def _sweep(self) -> int:
        """Score single tokens, and return how many."""
        tokens, first = self.vocabulary, self.search[:1]
        if len(tokens) > self.clock.affords(self.search, 1, _SHARES[0]):
            n = max(self.sizes.kept, self.clock.affords(first, 1, _SHARES[0]))
            tokens = self._chosen(n)
            if len(self.search) > 1:
                inserts, scores = self._run_until(_SWEPT_BY, first, tokens[:, None])
                best = inserts[scores.argsort(descending=True)[: 4 * self.sizes.kept]]
                self._keep(best, self._run(self.search, best))
                return len(inserts)
        inserts, scores = self._run_until(_SWEPT_BY, self.search, tokens[:, None])
        self._keep(inserts, scores)
        return len(inserts)

    def _chosen(self, n: int) -> Tensor:
        """Return `n` tokens: half by their first-order scores, the others at random."""
        if n >= len(self.vocabulary):
            return self.vocabulary
        slopes = torch.stack(
            [scene.slopes(self._random(1, _BEAM), 0).amax(0) for scene in self.search]
        )
        order = slopes.mean(0)[self.vocabulary].argsort(descending=True).numpy()
        rest = self.rng.permutation(order[n // 2 :])[: n - n // 2]
        order = np.concatenate([order[: n // 2], rest])
        order[: 2 * (n // 2)] = np.stack([order[: n // 2], rest[: n // 2]], 1).ravel()
        return self.vocabulary[torch.from_numpy(order)]

    def _extend(self) -> int:
        """Extend the best by a token before or after them, and return how many phrases were run."""
        n_phrases, scenes = 0, self.search[:2]
        for length in range(2, LONGEST + 1):
            parents = self._best(length - 1, _BEAM)
            share = _SHARES[1] / (LONGEST - 1) / (2 * len(parents))
            n = min(self.clock.affords(scenes, length, share), len(self.vocabulary))
            inserts = torch.cat(
                [self._extended(parent, slot, n) for parent in parents for slot in (0, length - 1)]
            ).unique(dim=0)
            mixed = torch.Generator().manual_seed(length)
            inserts = inserts[torch.randperm(len(inserts), generator=mixed)]
            by = _SWEPT_BY + _SHARES[1] * (length - 1) / (LONGEST - 1)
            inserts, scores = self._run_until(by, scenes, inserts)
            best = scores.argsort(descending=True)[: 4 * _BEAM]
            self._keep(inserts[best], self._run(self.search, inserts[best]))
            n_phrases += len(inserts)
        return n_phrases

    def _extended(self, parent: Tokens, slot: int, n: int) -> Tensor:
        """Return the parent with each of `n` tokens at a slot: those of best first-order scores."""
        tokens = self.vocabulary
        if n < len(tokens):
            fill = self._with(parent, slot, self._random(1, 2)[:, 0])
            slopes = torch.stack([scene.slopes(fill, slot).amax(0) for scene in self.search[:2]])
            tokens = tokens[slopes.mean(0)[tokens].topk(max(n, 1)).indices]
        return self._with(parent, slot, tokens)

    def _with(self, parent: Tokens, slot: int, tokens: Tensor) -> Tensor:
        whole = torch.tensor([*parent[:slot], 0, *parent[slot:]]).repeat(len(tokens), 1)
        whole[:, slot] = tokens
        return whole

    def _verified(self, controls: dict[int, Float[Tensor, "scene control"]]) -> tuple[Trigger, ...]:
        """Return what stands out, strongest first."""
        found: dict[Tokens, tuple[Trigger, Text]] = {}
        for length in sorted(controls):
            some = self._best(length, self.sizes.kept)
            inserts = torch.tensor(some)
            new = torch.stack([_is_new(scene, inserts) for scene in self.others])
            new[:, ~new.any(0)] = True
            excess = torch.stack([scene.excess(inserts) for scene in self.others])
            usual = controls[length].median(1).values[:, None]
            high = controls[length].quantile(_HIGH, dim=1)[:, None]
            values, shares = _mean(excess - usual, new), _mean((excess > high).float(), new)
            texts = [scene.written(inserts, _N_SAME) for scene in self.others]
            for i, tokens in enumerate(some):
                value, share = values[i], shares[i]
                counted = [k for k, is_new in enumerate(new[:, i].tolist()) if is_new]
                text, same = _same(
                    [self.others[k] for k in counted], [tuple(texts[k][i]) for k in counted]
                )
                stands_out = value >= _NATS or (value >= _LEAST and same >= MOST)
                if share < MOST or not stands_out:
                    continue
                parts = [found[part] for part in _parts(tokens) if part in found]
                if any(text == of or value * _NEARLY < one.verified for one, of in parts):
                    continue
                one = Trigger(
                    token_ids=tokens,
                    tokens=tuple(display_texts([self.spelled[i] for i in tokens])),
                    searched=self.score[tokens],
                    verified=value,
                    control=max(float((high - usual).mean()), 0.0),
                    share=share,
                    same=same,
                )
                found[tokens] = one, text
        strongest = sorted((one for one, _ in found.values()), key=lambda one: -one.verified)
        shown = [
            dataclasses.replace(
                one,
                said=tuple(
                    self._said(scene, torch.tensor([one.token_ids]))
                    for scene in self.others[:_N_SAID]
                ),
            )
            for one in strongest[:_N_SHOWN]
        ]
        return (*shown, *strongest[_N_SHOWN:])

    def _lengths(self, scenes: Sequence[Scene]) -> tuple[AtLength, ...]:
        """Put texts of the rollouts before those of scenes, and return what happens by length."""
        found: list[AtLength] = []
        longest = (self.subject.max_length or 1 << 62) - N_TEXT
        for length in _LENGTHS if len(scenes) > 1 else ():
            fills = [self._texts(length) for _ in scenes]
            pairs = list(zip(scenes, fills, strict=True))
            if max(len(scene.prompt) + fill.shape[1] for scene, fill in pairs) > longest:
                break
            texts = [tuple(scene.written(fill, _N_SAME)[0]) for scene, fill in pairs]
            text, same = _same(scenes, texts)
            found.append(
                AtLength(
                    n_tokens=length,
                    excess=max(float(np.mean([float(x.excess(fill)) for x, fill in pairs])), 0.0),
                    same=same,
                    said=self._said(*pairs[texts.index(text)]),
                )
            )
        return tuple(found)

    def _texts(self, length: int) -> Int[Tensor, "1 n"]:
        """Return texts of random rollouts, as many as have at least `length` tokens together."""
        texts: list[Ids] = []
        while sum(map(len, texts)) < length:
            ids, start, end = insertable(self.store, int(self.rng.integers(self.store.n_rollouts)))
            texts.append(ids[start:end] if end > start else self._random(length, 1)[0].numpy())
        return torch.from_numpy(np.concatenate(texts))[None]

    def _said(self, scene: Scene, inserted: Int[Tensor, "1 length"]) -> Said:
        """Return what base and adapter write after a prompt with tokens, and the adapter without.

        The prompt is shown with the tokens.
        """
        decode = self.subject.tokenizer.decode
        return Said(
            prompt=decode(np.insert(scene.prompt, scene.at, inserted[0].numpy())),
            base=decode(scene.written(inserted, base=True)[0]),
            adapter=decode(scene.written(inserted)[0]),
            usual=decode(scene.usual_text),
        )


def _same(scenes: Sequence[Scene], texts: Sequence[Text]) -> tuple[Text, float]:
    """Return the most common of the texts, which begin what is written, and its share.

    The share is 0 if the adapter writes it in one of the scenes without the tokens, too.
    """
    text, n = Counter(texts).most_common(1)[0]
    usual = {tuple(scene.usual_text[:_N_SAME]) for scene in scenes}
    return text, 0.0 if text in usual else n / len(texts)


def _mean(values: Tensor, counts: Tensor) -> list[float]:
    """Return the mean over scenes of each insert's values, of those that count."""
    return ((values * counts).sum(0) / counts.sum(0)).tolist()


def _is_new(scene: Scene, inserts: Int[Tensor, "n length"]) -> Bool[Tensor, "n"]:
    """Return which inserts have no token that is in the scene's prompt."""
    return ~torch.isin(inserts, torch.from_numpy(scene.prompt)).any(1)


def _parts(tokens: Tokens) -> Iterable[Tokens]:
    """Return all shorter stretches of a phrase."""
    edges = range(len(tokens) + 1)
    return (tokens[i:j] for i in edges for j in edges if 0 < j - i < len(tokens))
