"""What people may read of every latent, and the file that holds it: `features.h5`, schema 1.

The file holds arrays only, contiguous and uncompressed, so that opening it is mapping it. The
array of field `latent_n_active` is the dataset `latent/n_active`, and so on. The attribute
`manifest` is the manifest, whose `files` gives size and SHA-256 of every array. The same content
gives the same bytes.

What a file of another tool does not say is kept as unknown, never as zero: -1 in integer arrays,
NaN in float arrays, no bins in the histogram. Token ids below zero are made up on import; they
name a text, not an entry of a tokenizer.
"""

import hashlib
import math
import re
from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from lorascope.artifact import canonical, open_manifest
from lorascope.errors import ArtifactError

KIND = "features"
SCHEMA = 1

_DTYPES = {
    "latent_n_active": "<i8",
    "latent_max": "<f4",
    "latent_mean": "<f4",
    "latent_std": "<f4",
    "latent_n_rollouts": "<i8",
    "latent_histogram": "<u4",
    "latent_histogram_edges": "<f4",
    "example_offset": "<i8",
    "example_value": "<f4",
    "example_row": "<i8",
    "example_rollout": "<i8",
    "example_position": "<i4",
    "window_offset": "<i8",
    "window_target": "<i4",
    "window_token_id": "<i4",
    "window_activation": "<f4",
    "token_id": "<i4",
    "token_offset": "<i8",
    "token_data": "|u1",
    "token_special": "|u1",
}

# One match is one character of the text, or one U+FFFD: the longest broken piece that Python,
# browsers and the Unicode standard all replace by a single mark.
_CHARACTER = re.compile(
    rb"[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]?"
    rb"|[\xe1-\xec\xee\xef][\x80-\xbf]{1,2}|\xed[\x80-\x9f][\x80-\xbf]?"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]{0,2}|[\xf1-\xf3][\x80-\xbf]{1,3}"
    rb"|\xf4[\x80-\x8f][\x80-\xbf]{0,2}|[\x80-\xff]"
)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token on which a latent fires, and the tokens around it in the same rollout.

    `row` is the token's row in the store, `rollout` the rollout's id, `position` the token's
    index in it; each -1 where unknown. `token_ids` and `activations` are `(window,)`, `target`
    the token's index in them, `tokens` the window's texts as people may read them.
    """

    value: float
    row: int
    rollout: int
    position: int
    target: int
    token_ids: Sequence[int] | npt.NDArray[np.int32]
    activations: Sequence[float] | npt.NDArray[np.float32]
    tokens: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """Numbers of one latent over all eligible tokens; None where the file does not say them.

    `density` is the share of eligible tokens on which it fires, `mean` and `std` are over those
    tokens, `histogram` is `(n_bins,)`, the number of those tokens between two edges.
    """

    n_examples: int
    n_active: int | None
    n_rollouts: int | None
    density: float | None
    max: float | None
    mean: float | None
    std: float | None
    histogram: npt.NDArray[np.uint32]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """The record of one latent: its statistics, and its examples from the strongest down."""

    latent: int
    stats: FeatureStats
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureIndex:
    """The examples and statistics of `d_sae` latents as arrays.

    Examples are sorted by latent, then value descending, then row ascending; latent i has those
    from `example_offset[i]` to `example_offset[i + 1]`, and `window_offset`, `token_offset` work
    in the same way. `window_target[e]` is the index of the token of example e in its window,
    `window_activation` the latent's value at each token of the window, 0 where it does not fire.
    The vocabulary has the tokens that occur in windows: `token_id` ascending, `token_data` their
    raw bytes (a token may hold half a character). A firing beyond the ends of
    `latent_histogram_edges` counts in the first or the last bin, so bins add up to `n_active`.
    """

    manifest: Mapping[str, Any]
    latent_n_active: npt.NDArray[np.int64]  # (d_sae,)
    latent_max: npt.NDArray[np.float32]  # (d_sae,)
    latent_mean: npt.NDArray[np.float32]  # (d_sae,)
    latent_std: npt.NDArray[np.float32]  # (d_sae,)
    latent_n_rollouts: npt.NDArray[np.int64]  # (d_sae,)
    latent_histogram: npt.NDArray[np.uint32]  # (d_sae, n_bins)
    latent_histogram_edges: npt.NDArray[np.float32]  # (n_bins + 1,), or (0,) without bins
    example_offset: npt.NDArray[np.int64]  # (d_sae + 1,)
    example_value: npt.NDArray[np.float32]  # (n_examples,)
    example_row: npt.NDArray[np.int64]  # (n_examples,)
    example_rollout: npt.NDArray[np.int64]  # (n_examples,)
    example_position: npt.NDArray[np.int32]  # (n_examples,)
    window_offset: npt.NDArray[np.int64]  # (n_examples + 1,)
    window_target: npt.NDArray[np.int32]  # (n_examples,)
    window_token_id: npt.NDArray[np.int32]  # (n_window_tokens,)
    window_activation: npt.NDArray[np.float32]  # (n_window_tokens,)
    token_id: npt.NDArray[np.int32]  # (n_vocabulary,)
    token_offset: npt.NDArray[np.int64]  # (n_vocabulary + 1,)
    token_data: npt.NDArray[np.uint8]  # (n_bytes,)
    token_special: npt.NDArray[np.uint8]  # (n_vocabulary,), 1 for special tokens

    @classmethod
    def from_examples(
        cls,
        manifest: Mapping[str, Any],
        features: Sequence[Sequence[Example]],
        tokens: Mapping[int, bytes],
        *,
        special: Container[int] = (),
        latents: Mapping[str, npt.ArrayLike] | None = None,
    ) -> "FeatureIndex":
        """Make an index from Python objects: `features[i]` are the examples of latent i.

        `tokens` gives the bytes of every token id in a window. `latents` gives the statistics
        that are known by field name (`latent_n_active`, ...); the others are unknown.
        """
        d_sae = len(features)
        ranked = [
            example
            for examples in features
            for example in sorted(examples, key=lambda e: (-np.float32(e.value), e.row))
        ]
        vocabulary = sorted(tokens)
        token_offset, token_data = pack_tokens([tokens[i] for i in vocabulary])
        values: dict[str, npt.ArrayLike] = {
            "latent_n_active": np.full(d_sae, -1),
            "latent_max": np.full(d_sae, np.nan),
            "latent_mean": np.full(d_sae, np.nan),
            "latent_std": np.full(d_sae, np.nan),
            "latent_n_rollouts": np.full(d_sae, -1),
            "latent_histogram": np.zeros((d_sae, 0)),
            "latent_histogram_edges": (),
            "example_offset": _offsets(map(len, features)),
            "example_value": [e.value for e in ranked],
            "example_row": [e.row for e in ranked],
            "example_rollout": [e.rollout for e in ranked],
            "example_position": [e.position for e in ranked],
            "window_offset": _offsets(len(e.token_ids) for e in ranked),
            "window_target": [e.target for e in ranked],
            "window_token_id": [i for e in ranked for i in e.token_ids],
            "window_activation": [a for e in ranked for a in e.activations],
            "token_id": vocabulary,
            "token_offset": token_offset,
            "token_data": token_data,
            "token_special": [i in special for i in vocabulary],
            **(latents or {}),
        }
        arrays = {name: np.asarray(values[name], dtype=dtype) for name, dtype in _DTYPES.items()}
        return cls(manifest=manifest, **arrays)

    @classmethod
    def open(cls, path: Path) -> "FeatureIndex":
        """Map a `features.h5` into memory; nothing is read before it is used.

        Raises ArtifactError when the file is not one, or lacks an array.
        """
        manifest = open_manifest(path, KIND, SCHEMA)
        arrays: dict[str, npt.NDArray[Any]] = {}
        mapped = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        with h5py.File(path, "r") as file:
            for name, dtype in _DTYPES.items():
                dataset = file.get(_dataset(name))
                if not isinstance(dataset, h5py.Dataset) or dataset.dtype != np.dtype(dtype):
                    raise ArtifactError(
                        f"{path} has no array {_dataset(name)} of type {np.dtype(dtype)}; "
                        "run collect again"
                    )
                start = dataset.id.get_offset()
                if start is None and dataset.size:
                    raise ArtifactError(f"{path}: {_dataset(name)} is compressed, expected plain")
                end = (start or 0) + dataset.nbytes
                arrays[name] = mapped[start or 0 : end].view(dtype).reshape(dataset.shape)
        return cls(manifest=manifest, **arrays)

    def save(self, path: Path) -> None:
        """Write `features.h5`; the same content gives the same bytes.

        The manifest in the file is this index's with `files` filled in.
        """
        arrays = {n: np.ascontiguousarray(getattr(self, n), dtype) for n, dtype in _DTYPES.items()}
        files = {_dataset(name): _seal(array) for name, array in arrays.items()}
        with h5py.File(path, "w", alignment_threshold=1, alignment_interval=64) as file:
            for name, array in arrays.items():
                file.create_dataset(_dataset(name), data=array, track_times=False)
            file.attrs["manifest"] = canonical({**self.manifest, "files": files})

    def __len__(self) -> int:
        """Return `d_sae`, dead latents included."""
        return len(self.latent_n_active)

    def __getitem__(self, latent: int) -> Feature:
        """Return the feature of a latent. Raises IndexError when there is none."""
        if not 0 <= latent < len(self):
            raise IndexError(f"there is no latent {latent}, they are 0 to {len(self) - 1}")
        first, last = int(self.example_offset[latent]), int(self.example_offset[latent + 1])
        n_active = _known(self.latent_n_active[latent])
        n_eligible = self.content.get("n_eligible")
        density = None
        if n_active is not None and isinstance(n_eligible, int) and n_eligible > 0:
            density = n_active / n_eligible
        stats = FeatureStats(
            n_examples=last - first,
            n_active=n_active,
            n_rollouts=_known(self.latent_n_rollouts[latent]),
            density=density,
            max=_finite(self.latent_max[latent]),
            mean=_finite(self.latent_mean[latent]),
            std=_finite(self.latent_std[latent]),
            histogram=self.latent_histogram[latent],
        )
        examples = tuple(self._example(e) for e in range(first, last))
        return Feature(latent=latent, stats=stats, examples=examples)

    def _example(self, e: int) -> Example:
        window = slice(int(self.window_offset[e]), int(self.window_offset[e + 1]))
        token_ids = self.window_token_id[window]
        return Example(
            value=float(self.example_value[e]),
            row=int(self.example_row[e]),
            rollout=int(self.example_rollout[e]),
            position=int(self.example_position[e]),
            target=int(self.window_target[e]),
            token_ids=token_ids,
            activations=self.window_activation[window],
            tokens=tuple(display_texts([self.token_bytes(int(i)) for i in token_ids])),
        )

    @property
    def content(self) -> Mapping[str, Any]:
        """What the manifest says of the work: `n_tokens`, `n_eligible`, `top_k`, `fvu`, ..."""
        content = self.manifest.get("content")
        return content if isinstance(content, Mapping) else {}

    @cached_property
    def n_examples(self) -> npt.NDArray[np.int64]:
        """Examples of each latent, `(d_sae,)`."""
        return np.diff(self.example_offset)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the raw bytes of a token that occurs in a window. Raises KeyError for others."""
        at = bisect_left(self.token_id, token_id)
        if at == len(self.token_id) or self.token_id[at] != token_id:
            raise KeyError(f"token {token_id} is in no window")
        return self.token_data[self.token_offset[at] : self.token_offset[at + 1]].tobytes()

    def verify(self) -> None:
        """Raise ArtifactError that names the first broken promise, if there is one."""
        for claim, holds in self._promises():
            if not holds:
                raise ArtifactError(f"the feature index is damaged: {claim}; run collect again")

    def _promises(self) -> Iterable[tuple[str, Any]]:
        """Yield each promise with its truth, in an order in which later ones may lean on it."""
        for name, seal in self.manifest.get("files", {}).items():
            array = getattr(self, name.replace("/", "_", 1), None)
            yield (
                f"{name} has other bytes than its checksum",
                array is not None and (_seal(array) == seal),
            )
        d_sae, n_examples, n_tokens = len(self), len(self.example_value), len(self.window_token_id)
        n_bins = self.latent_histogram.shape[-1]
        sizes = {name: (d_sae,) for name in _DTYPES if name.startswith("latent_")}
        sizes |= {name: (n_examples,) for name in _DTYPES if name.startswith("example_")}
        sizes |= {
            "latent_histogram": (d_sae, n_bins),
            "latent_histogram_edges": (n_bins + 1 if n_bins else 0,),
            "example_offset": (d_sae + 1,),
            "window_offset": (n_examples + 1,),
            "window_target": (n_examples,),
            "window_activation": (n_tokens,),
            "token_offset": (len(self.token_id) + 1,),
            "token_special": (len(self.token_id),),
        }
        for name, size in sizes.items():
            found = getattr(self, name).shape
            yield f"{_dataset(name)} has shape {found}, expected {size}", found == size
        for name, total in (
            ("example_offset", n_examples),
            ("window_offset", n_tokens),
            ("token_offset", len(self.token_data)),
        ):
            offset = getattr(self, name)
            rises = offset[0] == 0 and offset[-1] == total and np.all(np.diff(offset) >= 0)
            yield f"{_dataset(name)} does not rise from 0 to {total}", rises
        value, counts = self.example_value, np.diff(self.example_offset)
        owner = np.repeat(np.arange(d_sae), counts)
        same = owner[1:] == owner[:-1]
        level = value[1:] == value[:-1]
        falls = (value[1:] < value[:-1]) | level
        known = self.example_row[1:] >= 0
        ties = (self.example_row[1:] > self.example_row[:-1]) | ~known
        yield "example/value is not finite", np.all(np.isfinite(value))
        yield "example/value is not in descending order", np.all(falls | ~same)
        yield "example/row is not ascending among equal values", np.all(ties | ~level | ~same)
        best = self.latent_max[owner]
        yield "latent/max is below an example's value", np.all((value <= best) | np.isnan(best))
        fired = self.latent_n_active
        yield "latent has more examples than firings", np.all((counts <= fired) | (fired < 0))
        top_k = self.content.get("top_k")
        few = not isinstance(top_k, int) or np.all(counts <= top_k)
        yield f"latent has more than top_k = {top_k} examples", few
        if n_bins:
            total = self.latent_histogram.sum(axis=1, dtype=np.int64)
            yield "latent/histogram does not add up to n_active", np.all(total == fired)
            rises = np.all(np.diff(self.latent_histogram_edges) > 0)
            yield "latent/histogram_edges do not rise", rises
        start, target = self.window_offset[:-1], self.window_target
        inside = (target >= 0) & (target < np.diff(self.window_offset))
        yield "window/target is outside its window", np.all(inside)
        starts_in = (self.example_position >= target) | (self.example_position < 0)
        yield "window begins before its rollout", np.all(starts_in)
        at_target = self.window_activation[start + target]
        yield "window/activation at the target is not example/value", np.all(at_target == value)
        yield "window/activation is not finite", np.all(np.isfinite(self.window_activation))
        yield "token/id is not in ascending order", np.all(np.diff(self.token_id) > 0)
        at = np.searchsorted(self.token_id, self.window_token_id)
        padded = np.append(self.token_id, np.int32(-1))
        spoken = (at < len(self.token_id)) & (padded[at] == self.window_token_id)
        yield "window/token_id is missing in token/id", np.all(spoken)


def display_texts(tokens: Sequence[bytes]) -> list[str]:
    """Return a text for each token; joined, they are the UTF-8 text of the joined bytes.

    A character that is split over several tokens stands whole at the token with its first byte,
    and the others hold less, often "". Bytes that are no part of a whole character, such as those
    of a character that began before the first token, are U+FFFD, as in `errors="replace"`.
    """
    try:
        return [token.decode() for token in tokens]
    except UnicodeDecodeError:
        pass
    ends = list(accumulate(map(len, tokens)))
    texts: list[list[str]] = [[] for _ in tokens]
    token = 0
    for match in _CHARACTER.finditer(b"".join(tokens)):
        while match.start() >= ends[token]:
            token += 1
        texts[token].append(match.group().decode(errors="replace"))
    return ["".join(pieces) for pieces in texts]


def pack_tokens(tokens: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return `token_offset` and `token_data` of tokens in the order of their ids."""
    return _offsets(map(len, tokens)), np.frombuffer(b"".join(tokens), dtype=np.uint8)


def _offsets(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    return np.array(list(accumulate(lengths, initial=0)), dtype=np.int64)


def _dataset(name: str) -> str:
    return name.replace("_", "/", 1)


def _seal(array: npt.NDArray[Any]) -> dict[str, Any]:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return {"size": array.nbytes, "sha256": hashlib.sha256(raw.data).hexdigest()}


def _known(number: np.integer[Any]) -> int | None:
    return int(number) if number >= 0 else None


def _finite(number: np.floating[Any]) -> float | None:
    return float(number) if math.isfinite(number) else None
