"""The examples and statistics of every latent: `FeatureIndex`. It returns them as a `Feature`.

Files of other tools may lack some of them. What is missing is unknown, never zero: -1 in integer
arrays, NaN in float arrays, an axis of length 0 if nothing is known. Negative token ids are
assigned on import: each stands for a text, not for an entry of a tokenizer. In a list of ranked
tokens, -1 means that there are no more.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorascope.arrayfile import Arrays
from lorascope.artifact import Manifest
from lorascope.features.arrays import (
    RANKINGS,
    WINDOWS,
    complete_arrays,
    map_arrays,
    save_arrays,
    verify_arrays,
)
from lorascope.features.feature import Example, Feature, FeatureStats
from lorascope.features.label_file import Label, Labels, labels_beside
from lorascope.remote import as_path
from lorascope.texts.tokens import display_texts, pack_tokens

if TYPE_CHECKING:
    import pandas as pd

_ONLY = {"example": ("n_alike",), "sample": ("quantile",)}  # fields of an `Example`


@dataclass(frozen=True, eq=False, repr=False)
class FeatureIndex:
    """The examples and statistics of all latents as arrays; `arrays.FIELDS` has types and axes.

    Latent i has the examples from `example_offset[i]` to `example_offset[i + 1]`, by descending
    value, then row; other offsets work in the same way. Samples are sorted by descending quantile,
    then row. `special_*` are the strongest examples at special tokens; examples, samples and
    statistics are of text alone. Windows are those of examples, samples and examples at special
    tokens, in this order: `window_target` is the index of the example's token in its window,
    `window_activation` the latent's value at each token, 0 where it does not fire.
    `text_*` are the rollouts that are kept whole, with the code of every token.
    The vocabulary has the tokens that occur in the index: `token_id` ascending, `token_data` their
    raw bytes (a token may be part of a character). A firing outside `latent_histogram_edges` counts
    in the first or last bin, so the bins add up to `n_active`.
    """

    manifest: Manifest
    arrays: Arrays  # by name, such as `latent_max`, which is also an attribute
    labels: Labels | None = None

    def __getattr__(self, name: str) -> npt.NDArray[Any]:
        """Return an array by its name."""
        arrays = self.__dict__.get("arrays", {})
        if name not in arrays:
            raise AttributeError(f"a feature index has no {name}")
        return arrays[name]

    @classmethod
    def from_arrays(cls, manifest: Manifest, arrays: Mapping[str, npt.ArrayLike]) -> "FeatureIndex":
        """Make an index from arrays by field name; arrays that are not given are unknown."""
        return cls(manifest, complete_arrays(arrays))

    @classmethod
    def from_examples(
        cls,
        manifest: Manifest,
        features: Sequence[Sequence[Example]],
        tokens: Mapping[int, bytes],
        *,
        samples: Sequence[Sequence[Example]] = (),
        at_special: Sequence[Sequence[Example]] = (),
        special: Container[int] = (),
        latents: Mapping[str, npt.ArrayLike] | None = None,
    ) -> "FeatureIndex":
        """Make an index from Python objects: `features[i]` has the examples of latent i.

        `samples[i]` has its samples, `at_special[i]` its examples at special tokens. `tokens` maps
        every token id in a window to its bytes, `special` has the ids of special tokens. `latents`
        has other arrays that are known, by field name (`latent_n_active`, ...).
        """

        def order(example: Example) -> tuple[int, float, int]:
            strength = float(np.float32(example.value)) if example.quantile < 0 else 0.0
            return -example.quantile, -strength, example.row

        windows: list[Example] = []
        values: dict[str, npt.ArrayLike] = {}
        for part, given in zip(WINDOWS, (features, samples, at_special), strict=True):
            lists = given or [()] * len(features)
            ordered = [example for of_latent in lists for example in sorted(of_latent, key=order)]
            values[f"{part}_offset"] = _offsets(map(len, lists))
            for field in ("value", "row", "rollout", "position", *_ONLY.get(part, ())):
                values[f"{part}_{field}"] = [getattr(example, field) for example in ordered]
            windows += ordered
        vocabulary = sorted(tokens)
        token_offset, token_data = pack_tokens([tokens[i] for i in vocabulary])
        values |= {
            "window_offset": _offsets(len(e.token_ids) for e in windows),
            "window_target": [e.target for e in windows],
            "window_token_id": [i for e in windows for i in e.token_ids],
            "window_activation": [a for e in windows for a in e.activations],
            "token_id": vocabulary,
            "token_offset": token_offset,
            "token_data": token_data,
            "token_special": [i in special for i in vocabulary],
        }
        return cls.from_arrays(manifest, {**values, **(latents or {})})

    @classmethod
    def open(cls, path: Path | str) -> "FeatureIndex":
        """Map a `features.h5` into memory; arrays are read when they are used.

        Labels next to it are read too. Raises ArtifactError if the file is not a feature index or
        lacks an array, and if its labels are damaged.
        """
        path = as_path(path)
        manifest, arrays = map_arrays(path)
        return cls(manifest, arrays, labels_beside(path, manifest.digest))

    def save(self, path: Path) -> None:
        """Write `features.h5`; the same content gives the same bytes."""
        save_arrays(path, self.arrays, self.manifest)

    def verify(self) -> None:
        """Raise ArtifactError that names the first broken promise of the format, if any."""
        verify_arrays(self.manifest, self.arrays)

    def __len__(self) -> int:
        """Return the number of latents, dead ones included."""
        return len(self.latent_n_active)

    def __getitem__(self, latent: int) -> Feature:
        """Return the feature of a latent. Raises IndexError if the latent does not exist."""
        self.require(latent)
        share = self.latent_fingerprint[latent].astype(float).tolist()
        return Feature(
            latent=latent,
            stats=self.stats(latent),
            examples=self.examples(latent),
            samples=self.examples(latent, "sample"),
            at_special=self.examples(latent, "special"),
            fingerprint=dict(zip(self._modules, share, strict=False)),
            similar=_pairs(self.near_decoder[latent], self.near_cosine[latent]),
            cofiring=_pairs(self.near_cofiring[latent], self.near_jaccard[latent]),
            tokens={name: self.ranked_tokens(latent, name) for name in RANKINGS},
            label=self.label(latent),
        )

    def require(self, latent: int) -> None:
        """Raise IndexError if a latent does not exist."""
        if not 0 <= latent < len(self):
            raise IndexError(f"latent {latent} does not exist, expected 0 to {len(self) - 1}")

    def __repr__(self) -> str:
        facts = [f"{len(self):,} features, {int(self.alive.sum()):,} of them fire"]
        counts = {name: self.content.get(f"n_{name}") for name in ("tokens", "rollouts")}
        known = [f"{n:,} {name}" for name, n in counts.items() if isinstance(n, int)]
        return f"FeatureIndex({'; '.join(facts + [', '.join(known)] * bool(known))})"

    def label(self, latent: int) -> Label | None:
        """Return the label of a latent, or None."""
        return None if self.labels is None else self.labels.features.get(latent)

    def examples(self, latent: int, part: str = "example") -> tuple[Example, ...]:
        """Return the examples of a latent in one of `WINDOWS`, strongest first."""
        earlier = WINDOWS[: WINDOWS.index(part)]
        before = sum(len(getattr(self, f"{name}_value")) for name in earlier)
        first, last = getattr(self, f"{part}_offset")[latent : latent + 2].tolist()
        return tuple(
            Example(
                value=float(getattr(self, f"{part}_value")[e]),
                **{
                    field: int(getattr(self, f"{part}_{field}")[e])
                    for field in ("row", "rollout", "position", *_ONLY.get(part, ()))
                },
                **self._window(before + e),
            )
            for e in range(first, last)
        )

    def stats(self, latent: int) -> FeatureStats:
        """Return the statistics of a latent."""
        n_active = _int_or_none(self.latent_n_active[latent])
        n_eligible = self.content.get("n_eligible")
        density = None
        if n_active is not None and isinstance(n_eligible, int) and n_eligible > 0:
            density = n_active / n_eligible
        by_role, by_position = (
            _shares(getattr(self, f"latent_{name}")[latent], self.totals(name))
            for name in ("by_role", "by_position")
        )
        return FeatureStats(
            n_examples=int(self.n_examples[latent]),
            n_active=n_active,
            n_special=_int_or_none(self.latent_n_special[latent]),
            n_rollouts=_int_or_none(self.latent_n_rollouts[latent]),
            density=density,
            max=_float_or_none(self.latent_max[latent]),
            mean=_float_or_none(self.latent_mean[latent]),
            std=_float_or_none(self.latent_std[latent]),
            histogram=self.latent_histogram[latent],
            by_role=dict(zip(self.roles, by_role, strict=False)),
            by_position=by_position,
            stability=_float_or_none(self.latent_stability[latent]),
        )

    def _window(self, w: int) -> dict[str, Any]:
        window = slice(*self.window_offset[w : w + 2].tolist())
        token_ids = self.window_token_id[window]
        return {
            "target": int(self.window_target[w]),
            "token_ids": token_ids,
            "activations": self.window_activation[window],
            "tokens": tuple(display_texts([self.token_bytes(i) for i in token_ids.tolist()])),
        }

    @property
    def content(self) -> Mapping[str, Any]:
        """Contents of the manifest: `n_tokens`, `n_eligible`, `top_k`, `fvu`, ..."""
        return self.manifest.content

    @cached_property
    def n_examples(self) -> npt.NDArray[np.int64]:
        """Number of examples of each latent, `(latent,)`, without those at special tokens."""
        return np.diff(self.example_offset)

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Latents with an example, at text or at special tokens, `(latent,)`."""
        return (self.n_examples > 0) | (np.diff(self.special_offset) > 0)

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the roles; empty if unknown."""
        names = self.content.get("roles")
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def totals(self, name: str) -> list[int] | None:
        """Return the tokens of each kind of "by_role" or "by_position"; None if unknown."""
        totals, n = self.content.get(f"n_{name}"), getattr(self, f"latent_{name}").shape[1]
        if isinstance(totals, list) and len(totals) == n > 0:
            return [int(total) for total in totals]
        return None

    @cached_property
    def main_role(self) -> tuple[str, ...]:
        """The role in which each latent is densest; "" if it is unknown.

        It is `special` for latents with most firings at special tokens, and for no others.
        """
        found, totals = np.full(len(self), "", object), self.totals("by_role")
        if totals is not None:
            share = np.where(np.array(totals) > 0, self.latent_by_role / np.maximum(totals, 1), 0)
            share[:, [role == "special" for role in self.roles]] = 0
            fires = share.max(1) > 0
            found[fires] = np.array(self.roles, object)[share[fires].argmax(1)]
        found[self.is_template] = "special"
        return tuple(found)

    @cached_property
    def main_site(self) -> npt.NDArray[np.int64]:
        """The site with most of what each latent writes, `(latent,)`; -1 if it is unknown."""
        share = np.nan_to_num(self.latent_fingerprint.astype(np.float32))
        if not share.shape[1] or share.shape[1] != len(self._modules):
            return np.full(len(self), -1)
        return np.where(share.max(1) > 0, share.argmax(1), -1)

    @property
    def is_template(self) -> npt.NDArray[np.bool_]:
        """Latents with more than half of their firings at special tokens, `(latent,)`."""
        return self.latent_n_special > np.maximum(self.latent_n_active, 0)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the raw bytes of a token. Raises KeyError if the index does not contain it."""
        cached = self._bytes.get(token_id)
        if cached is None:
            at = bisect_left(self.token_id, token_id)
            if at == len(self.token_id) or self.token_id[at] != token_id:
                raise KeyError(f"token {token_id} is not in the index")
            cached = self.token_data[self.token_offset[at] : self.token_offset[at + 1]].tobytes()
            self._bytes[token_id] = cached
        return cached

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {}  # a cache for `token_bytes`

    @cached_property
    def _modules(self) -> tuple[str, ...]:
        layout = self.manifest.layout
        return () if layout is None else tuple(site.path for site in layout.sites)

    def ranked_tokens(self, latent: int, ranking: str) -> tuple[tuple[str, float], ...]:
        """Return the tokens of one of `RANKINGS` with their scores, best first."""
        ids = getattr(self, f"ranked_{ranking}_id")[latent].tolist()
        scores = getattr(self, f"ranked_{ranking}_score")[latent].tolist()
        return tuple(
            (self.token_bytes(token_id).decode(errors="replace"), score)
            for token_id, score in zip(ids, scores, strict=True)
            if token_id != -1
        )

    def search(self, text: str) -> list[int]:
        """Return the latents with a label or a window that contains `text`, ignoring case.

        Labels come first, windows are sorted by the largest value on a token of the match, so
        latents that fire only around the text come last. Ties go to the lower latent. An empty text
        returns every latent.
        """
        wanted = text.lower().encode("utf-8", "surrogatepass")
        if not wanted:
            return list(range(len(self)))
        raw = [self.token_bytes(int(i)) for i in self.token_id]
        lowered = [token.decode("utf-8", "surrogateescape").lower() for token in raw]
        folded = [token.encode("utf-8", "surrogateescape") for token in lowered]
        at = np.searchsorted(self.token_id, self.window_token_id).tolist()
        counts = [np.diff(getattr(self, f"{part}_offset")) for part in WINDOWS]
        latents = np.concatenate([np.repeat(np.arange(len(self)), n) for n in counts])  # by window
        best: dict[int, float] = {}
        for latent, (first, last) in zip(
            latents.tolist(), pairwise(self.window_offset.tolist()), strict=True
        ):
            pieces = [folded[i] for i in at[first:last]]
            window = b"".join(pieces)
            if wanted not in window:
                continue
            ends = list(accumulate(map(len, pieces)))
            for match in re.finditer(re.escape(wanted), window):
                begin = first + bisect_right(ends, match.start())
                end = first + bisect_right(ends, match.end() - 1)
                value = float(self.window_activation[begin : end + 1].max())
                best[latent] = max(best.get(latent, 0.0), value)
        for latent, label in ({} if self.labels is None else self.labels.features).items():
            if text.lower() in f"{label.name}\n{label.sentence}".lower():
                best[latent] = math.inf
        return sorted(best, key=lambda latent: (-best[latent], latent))

    def table(self) -> "pd.DataFrame":
        """Return the statistics as a pandas table, one line per latent; unknown is missing."""
        import pandas as pd

        content = self.content
        n_eligible = content.get("n_eligible")
        n_active = np.where(self.latent_n_active < 0, np.nan, self.latent_n_active)
        n_rollouts = np.where(self.latent_n_rollouts < 0, np.nan, self.latent_n_rollouts)
        columns = {
            "n_active": n_active,
            "n_special": np.where(self.latent_n_special < 0, np.nan, self.latent_n_special),
            "density": n_active / n_eligible if n_eligible else np.full(len(self), np.nan),
            "l0_share": n_active / max(np.nansum(n_active), 1.0),
            "n_rollouts": n_rollouts,
            "rollout_share": n_rollouts / (content.get("n_rollouts") or np.nan),
            "max": self.latent_max,
            "mean": self.latent_mean,
            "std": self.latent_std,
            "n_examples": self.n_examples,
            "stability": self.latent_stability,
        }
        totals = self.totals("by_role") or ()
        for role, counts, total in zip(self.roles, self.latent_by_role.T, totals, strict=False):
            if total:
                columns[f"density_{role}"] = counts / total
        if self.latent_fingerprint.shape[1] == len(self._modules) > 0:
            strongest = self.latent_fingerprint.argmax(1)
            columns["site"] = np.array(self._modules)[strongest]
            columns["site_share"] = self.latent_fingerprint.max(1).astype(np.float32)
        if self.labels is not None:
            labels = [self.label(latent) for latent in range(len(self))]
            keys = {"label": "name", "label_kind": "kind", "label_author": "author"}
            for name, key in keys.items():
                columns[name] = ["" if label is None else getattr(label, key) for label in labels]
            scores = {"score": "balanced_accuracy", "clarity": "clarity", "purity": "purity"}
            for name, key in scores.items():
                values = [None if label is None else getattr(label, key) for label in labels]
                columns[f"label_{name}"] = np.array(values, float)
        for ranking in ("mean", "lift"):
            tokens = [self.ranked_tokens(latent, ranking) for latent in range(len(self))]
            columns[f"tokens_{ranking}"] = [" | ".join(text for text, _ in row) for row in tokens]
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self), name="feature"))


def _offsets(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.array(list(accumulate(lengths, initial=0)), dtype=np.int64)


def _pairs(
    ids: npt.NDArray[np.int32], scores: npt.NDArray[np.float32]
) -> tuple[tuple[int, float], ...]:
    return tuple((int(i), float(s)) for i, s in zip(ids, scores, strict=True) if i >= 0)


def _shares(counts: npt.NDArray[np.int64], totals: Sequence[int] | None) -> tuple[float, ...]:
    if totals is None:
        return ()
    return tuple(int(n) / total if total else 0.0 for n, total in zip(counts, totals, strict=True))


def _int_or_none(number: np.integer[Any]) -> int | None:
    return int(number) if number >= 0 else None


def _float_or_none(number: np.floating[Any]) -> float | None:
    return float(number) if math.isfinite(number) else None
