"""The texts about a feature that an author of labels sees, and those that a judge sees.

Whole rollouts of the index are split in two halves. The author sees examples of one half: the
strongest, and random ones from each fifth by strength, with the firing tokens marked. The judge
sees excerpts of the other half with one marked token each. Half of these are firings, drawn evenly
from the fifths. The others are silent tokens: the same token where the feature does not fire,
tokens where similar features fire, and random ones.

Marks that a text itself contains are replaced.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope.features.feature import Example
from lorascope.features.index import FeatureIndex
from lorascope.texts.tokens import display_texts

N_STRONGEST = 6  # examples that the author sees
N_TYPICAL = 6  # and samples of the fifths
N_EXCERPTS = 10  # in one question of detection; half of them firings
N_DRAWS = 2
_OPEN, _CLOSE = "«", "»"


class Excerpts(NamedTuple):
    """The texts about one feature: what its author sees, and draws of what the judge sees."""

    strongest: tuple[str, ...]
    typical: tuple[str, ...]
    draws: tuple[tuple[tuple[str, bool], ...], ...]  # excerpts and whether the feature fires


def is_held_out(rollout: int) -> bool:
    """Return whether a rollout is kept from the author of labels."""
    return rollout % 2 == 1


class HeldOutTexts:
    """The rollouts that an index keeps whole and that authors of labels do not see."""

    def __init__(self, index: FeatureIndex) -> None:
        self._index = index
        lengths = np.diff(index.text_offset)
        held_out = np.repeat([is_held_out(i) for i in index.text_rollout.tolist()], lengths)
        self._held_out = held_out.astype(bool)  # (text_token,)
        special = index.token_id[index.token_special != 0]
        self._is_special = np.isin(index.text_token_id, special)
        self._text_of = np.repeat(np.arange(len(lengths)), lengths)
        n_fired = np.diff(index.text_code_offset)
        order = np.argsort(index.text_latent, kind="stable")
        self._token_of_firing = np.repeat(np.arange(len(n_fired)), n_fired)[order]
        counts = np.bincount(index.text_latent, minlength=len(index))
        self._firing_offset = np.concatenate([[0], np.cumsum(counts)])
        self._reach = int(index.content.get("context_window") or 10)

    def excerpts(self, latent: int) -> Excerpts:
        """Return the excerpts of a latent; draws are empty if too few rollouts are held out."""
        feature = self._index[latent]
        rng = np.random.default_rng((0, latent))

        def shown(examples: Sequence[Example]) -> tuple[str, ...]:
            return tuple(_with_strengths(e, feature.stats.max) for e in examples)

        strongest, samples = feature.examples, feature.samples
        if feature.stats.is_template:
            strongest, samples = feature.at_special, ()
        seen = [e for e in strongest if not is_held_out(e.rollout)]
        typical = [e for e in samples if not is_held_out(e.rollout)]
        step = max(1, len(typical) // N_TYPICAL)
        firing = [e for e in (*samples, *strongest) if is_held_out(e.rollout)]
        usable = self._held_out & (feature.stats.is_template | ~self._is_special)
        silent = self._silent(latent, (*strongest, *samples), usable, rng)
        n = N_EXCERPTS // 2
        draws = []
        for draw in range(N_DRAWS):
            some = firing[draw::N_DRAWS][:n]
            others = silent[draw::N_DRAWS][: len(some)]
            both = [
                *((_excerpt(e.tokens, {e.target: ""}), True) for e in some),
                *((self._around(token), False) for token in others),
            ]
            if some and others:
                draws.append(tuple(both[i] for i in rng.permutation(len(both))))
        return Excerpts(
            strongest=shown(seen[:N_STRONGEST]),
            typical=shown(typical[::step][:N_TYPICAL]),
            draws=tuple(draws),
        )

    def _fires(self, latent: int) -> npt.NDArray[np.int64]:
        """Return the tokens of whole rollouts at which a latent fires."""
        return self._token_of_firing[slice(*self._firing_offset[latent : latent + 2].tolist())]

    def _silent(
        self,
        latent: int,
        firing: Sequence[Example],
        usable: npt.NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> list[int]:
        """Return silent ones of the usable tokens: near misses first, each kind in turn."""
        index = self._index
        usable[self._fires(latent)] = False
        ids = {int(e.token_ids[e.target]) for e in firing}
        of_near = np.zeros(len(usable), bool)
        for near in (index.near_decoder, index.near_cofiring):
            for other in near[latent, :3].tolist():
                if other >= 0:
                    of_near[self._fires(other)] = True
        kinds = [
            np.flatnonzero(usable & np.isin(index.text_token_id, list(ids))),
            np.flatnonzero(usable & of_near),
            np.flatnonzero(usable),
        ]
        wanted = N_DRAWS * N_EXCERPTS // 2
        drawn = [rng.permutation(kind)[:wanted].tolist() for kind in kinds]
        turns = [
            token for turn in range(wanted) for kind in drawn for token in kind[turn : turn + 1]
        ]
        return list(dict.fromkeys(turns))[:wanted]

    def _around(self, token: int) -> str:
        """Return the excerpt around a token of the whole rollouts, with this token marked."""
        index = self._index
        first, last = index.text_offset[self._text_of[token] : self._text_of[token] + 2].tolist()
        start, stop = max(first, token - self._reach), min(last, token + self._reach + 1)
        ids = index.text_token_id[start:stop].tolist()
        tokens = display_texts([index.token_bytes(i) for i in ids])
        return _excerpt(tokens, {token - start: ""})


def _with_strengths(example: Example, largest: float | None) -> str:
    """Return an example with its firing tokens marked, and their strength from 0 to 9."""
    scale = largest or max(1e-30, float(np.max(example.activations)))
    marks = {
        i: f"|{min(9, int(10 * value / scale))}"
        for i, value in enumerate(np.asarray(example.activations).tolist())
        if value > 0
    }
    return _excerpt(example.tokens, marks)


def _excerpt(tokens: Sequence[str], marks: Mapping[int, str]) -> str:
    """Return tokens as a text, with some of them marked. Marks in the text itself are replaced."""
    plain = [token.replace(_OPEN, "‹").replace(_CLOSE, "›") for token in tokens]
    return "".join(
        f"{_OPEN}{token}{marks[i]}{_CLOSE}" if i in marks else token
        for i, token in enumerate(plain)
    )
