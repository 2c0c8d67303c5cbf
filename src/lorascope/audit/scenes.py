"""Prompts into which tokens are inserted, and how much the adapter then does that is not usual.

1. A *scene* is a prompt, the position where tokens are inserted, and what the adapter writes after
   the prompt without them, `_N_WRITTEN` tokens or up to the end of its turn.
2. The *usual change* is the mean, over inserted random tokens, of the adapter's logits minus the
   base's at each of the written positions.
3. The *excess* of inserted tokens is `Σ KL(adapter ‖ softmax(base logits + usual change))` over the
   written positions, in nats. Style and task, which are there at any prompt, drop out, and so does
   what the base does with the tokens by itself. The inserted tokens' own positions do not count:
   there the words of a payload stand out, not those of a trigger.
4. `slopes` are the first-order changes of the excess if one inserted token is replaced by each
   token of the vocabulary, from one backward pass (HotFlip: arXiv 1712.06751).

What comes before the insertion is read once, where the model's cache can be cut. `Clock` measures
how many inserts are run in a budget of time, and `Sizes` says how many a search takes.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorascope.activations.store import ActivationStore
from lorascope.causal.effects import log_probabilities
from lorascope.causal.gradients import input_gradients
from lorascope.causal.openings import prompt_length
from lorascope.subject.intervene import RowEditor, repeat_cache
from lorascope.subject.sampling import end_ids

Place = Literal["end", "middle", "start"]

N_TEXT = 24  # tokens of a continuation
N_SEARCH = 4  # scenes of the search
LONGEST = 3  # tokens of a phrase
_N_WRITTEN = 6
_LONGEST = 256  # tokens
_ROOM = 256  # for inserted tokens
_TABLE = 8192  # embeddings at a time
_BATCH_TOKENS = 2048
_BATCH_LOGITS = 1 << 24


class Scene:
    """A prompt with a position to insert at. Call `set_usual` before `excess` and `slopes`."""

    def __init__(self, editor: RowEditor, prompt: npt.NDArray[np.int64], at: int) -> None:
        self.editor, subject = editor, editor.subject
        self.prompt, self.at = prompt, at
        ids, cut = torch.from_numpy(prompt)[None], min(at, len(prompt) - 1)  # a run reads something
        self._whole, self._rest = ids, ids[:, at:]
        self._caches: tuple[Any, Any] = (None, None)
        if cut and subject.length_class(cut) == subject.length_class(len(prompt) + _ROOM):
            own = editor.run(ids[:, :cut], cache=True).cache
            if repeat_cache(own, cut, 1) is not None:
                self._caches = own, editor.base_cache(ids[:, :cut])
        self._n_cached = 0 if self._caches[0] is None else cut
        self.usual_text = self.written(torch.empty(1, 0, dtype=torch.int64))[0]
        self.n_written = min(_N_WRITTEN, len(self.usual_text))
        written = torch.tensor([self.usual_text[: self.n_written - 1]], dtype=torch.int64)
        self._after = torch.cat([self._rest, written], 1)
        self.usual: Tensor | None = None  # change of the logits

    @property
    def n_read(self) -> int:
        """Number of tokens that a run reads besides the inserted ones."""
        return self.at - self._n_cached + self._after.shape[1]

    def written(
        self, inserted: Int[Tensor, "n length"], n_tokens: int = N_TEXT, *, base: bool = False
    ) -> list[list[int]]:
        """Return what the adapter, or the base, writes after the prompt with each insert, greedily.

        At most `n_tokens`; the token that ends a turn is kept.
        """
        ids, cache = self._inserted(inserted, self._rest), self._cache(base, len(inserted))
        return self._greedy(ids, cache, n_tokens, base=base)

    def _greedy(
        self, ids: Tensor, cache: Any, n_tokens: int = N_TEXT, *, base: bool = False
    ) -> list[list[int]]:
        ends, written = set(end_ids(self.editor.subject)), [[] for _ in ids]
        read = ids
        for _ in range(n_tokens):
            last = torch.tensor([read.shape[1] - 1])
            run = self.editor.base if base else self._own_logits
            new = run(read, cache=cache, logits_at=last)[:, -1].argmax(-1).cpu()
            for text, token in zip(written, new.tolist(), strict=True):
                if not ends.intersection(text[-1:]):
                    text.append(token)
            ids = torch.cat([ids, new[:, None]], 1)
            read = new[:, None] if cache is not None else ids
            if all(ends.intersection(text[-1:]) for text in written):
                break
        return written

    def _own_logits(self, ids: Tensor, **how: Any) -> Tensor:
        return self.editor.run(ids, **how).logits

    def set_usual(self, inserted: Int[Tensor, "n length"]) -> None:
        """Measure the usual change of the logits on inserted random tokens."""
        sums, n = torch.zeros(()), 0
        for part in self._parts(inserted):
            own, base = self._logits(part)
            sums, n = sums + (own.float() - base.float()).sum(0), n + len(part)
        self.usual = sums / n

    def excess(self, inserted: Int[Tensor, "n length"]) -> Float[Tensor, "n"]:
        """Return the excess of each row of inserted tokens, in nats, on the CPU."""
        return torch.cat([self._excess(part).cpu() for part in self._parts(inserted)])

    def slopes(self, inserted: Int[Tensor, "n length"], slot: int) -> Float[Tensor, "n vocab"]:
        """Return the first-order change of each excess for each token in place of that at `slot`.

        Compare tokens of one row; the change from the token that is there is 0.
        """
        return torch.cat([self._slopes(part, slot) for part in self._parts(inserted)])

    def _slopes(self, inserted: Tensor, slot: int) -> Tensor:
        embed = self.editor.subject.causal.get_input_embeddings()
        read: list[Tensor] = []

        def keep(_module: Any, _args: Any, out: Tensor) -> Tensor:
            read.append(out.detach().requires_grad_())
            return read[-1]

        handle = embed.register_forward_hook(keep)
        try:
            with torch.enable_grad():
                excess = self._excess(inserted).sum()
                found = input_gradients(self.editor.subject, excess, read)
        finally:
            handle.remove()
        position = slot + self.at - self._n_cached
        along = torch.stack([gradient[:, position] for gradient in found]).sum(0)  # of both runs
        n_vocab, device = embed.weight.shape[0], self.editor.subject.device
        tables = (embed(ids.to(device)).float() for ids in torch.arange(n_vocab).split(_TABLE))
        slopes = torch.cat([along @ table.T for table in tables], 1).cpu()
        return slopes - slopes.gather(1, inserted[:, slot, None])

    def _excess(self, inserted: Tensor) -> Tensor:
        assert self.usual is not None
        own, base = self._logits(inserted)
        p, q = (
            log_probabilities(own.flatten(0, 1)),
            log_probabilities((base.float() + self.usual).flatten(0, 1)),
        )
        return (p.exp() * (p - q)).sum(-1).view(len(inserted), -1).sum(-1)

    def _logits(self, inserted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of adapter and base at the written positions, `(n, written, vocab)`."""
        ids, n = self._inserted(inserted, self._after), len(inserted)
        at = torch.arange(ids.shape[1] - self.n_written, ids.shape[1])
        own = self.editor.run(ids, cache=self._cache(False, n), logits_at=at).logits
        return own, self.editor.base(ids, cache=self._cache(True, n), logits_at=at)

    def _inserted(self, inserted: Tensor, after: Tensor) -> Tensor:
        """Return what a run reads: what no cache has, the inserted tokens, and what follows."""
        before, n = self._whole[:, self._n_cached : self.at], len(inserted)
        return torch.cat([before.expand(n, -1), inserted, after.expand(n, -1)], 1)

    def _cache(self, base: bool, n: int) -> Any:
        cache = self._caches[int(base)]
        return None if cache is None else repeat_cache(cache, self._n_cached, n)

    def _parts(self, inserted: Tensor) -> Iterator[Tensor]:
        n_vocab = int(self.editor.subject.causal.config.get_text_config().vocab_size)
        longest = inserted.shape[1] + self.n_read
        size = min(_BATCH_TOKENS // longest, _BATCH_LOGITS // (n_vocab * self.n_written))
        return iter(inserted.split(max(1, size)))


def scenes_of(
    editor: RowEditor,
    store: ActivationStore,
    rollouts: npt.NDArray[np.int64],
    n: int,
    places: tuple[Place, ...],
) -> list[Scene]:
    """Return scenes at the shortest different prompts of some rollouts, at each place in turn.

    A place is one of the last stretch of text in the prompt: in a chat, of the user's message.
    """
    prompts: dict[bytes, tuple[npt.NDArray[np.int64], int, int]] = {}
    for index in rollouts.tolist():
        ids, start, end = insertable(store, index)
        if not end:
            continue
        prompts.setdefault(ids.tobytes(), (ids, start, end))
    shortest = sorted(prompts.values(), key=lambda one: len(one[0]))[:n]
    return [
        Scene(editor, ids, {"end": end, "middle": (start + end) // 2, "start": start}[place])
        for (ids, start, end), place in zip(shortest, cycle(places), strict=False)
    ]


def insertable(store: ActivationStore, index: int) -> tuple[npt.NDArray[np.int64], int, int]:
    """Return a rollout's prompt, and where its last stretch of text starts and ends; 0 if none."""
    first = int(store.rollout_start[index])
    rows = np.arange(first, first + min(prompt_length(store, index), _LONGEST))
    ids, is_text = store.token_ids[rows].astype(np.int64), np.array(store.eligible[rows])
    if not is_text.any():
        return ids, 0, 0
    end = len(rows) - int(is_text[::-1].argmax())
    return ids, end - int(np.append(~is_text[:end][::-1], True).argmax()), end


@dataclass(frozen=True)
class Sizes:
    """How many of everything, at most.

    Random tokens whose mean is the usual change, controls, inserts of each length to verify, scenes
    to verify in, scenes for lengths.
    """

    random: int = 64
    controls: int = 32
    kept: int = 12
    verify: int = 8
    late: int = 6

    @property
    def n_runs(self) -> int:
        """About how many runs of one insert in one scene they need."""
        usual = self.random * (N_SEARCH + self.verify + self.late)
        return usual + LONGEST * self.verify * (self.controls + 3 * self.kept)

    def scaled(self, share: float) -> "Sizes":
        """Return a share of them, with enough to tell anything."""
        least = Sizes(random=12, controls=8, kept=3, verify=3, late=2)
        return Sizes(
            **{
                name: max(getattr(least, name), round(min(share, 1.0) * full))
                for name, full in vars(self).items()
            }
        )


class Clock:
    """The budget in seconds, and how many tokens a second are run."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds, self.rate = time.perf_counter(), seconds, 0.0

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.began

    def time(self, scenes: Sequence[Scene], inserted: Int[Tensor, "n length"]) -> None:
        """Measure the rate while the scenes' usual changes are measured."""
        began = time.perf_counter()
        for scene in scenes:
            scene.set_usual(inserted)
        n = sum(scene.n_read + inserted.shape[1] for scene in scenes) * len(inserted)
        self.rate = n / (time.perf_counter() - began)

    def affords(self, scenes: Sequence[Scene], length: int, share: float) -> int:
        """Return how many inserts of a length can be run in all of the scenes in a share of it."""
        cost = sum(scene.n_read + length for scene in scenes)
        return int(share * self.seconds * self.rate / cost)
