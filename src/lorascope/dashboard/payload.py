"""The data inside the page.

1. The *core* is one JSON: what made the page, the statistics of every feature as columns, and the
   table of texts. It is all that the list and the header need.
2. The examples of `BLOCK` neighbouring features are one *block*: columns behind one another,
   compressed (zlib) and base64. The page decodes a block when it shows one of its features.
3. A column is little endian. In a block, a header of one uint32 per column gives its length in
   items, and every column begins at a multiple of 8 bytes.
4. A window's tokens are indices into the text table. The table has an entry per vocabulary token,
   and more for tokens whose text depends on their neighbours (pieces of a split character).

Nothing is rounded: float32 columns carry the index's own bits.
"""

import base64
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.artifact import canonical
from lorascope.features.display import display_texts
from lorascope.features.index import FeatureIndex

BLOCK = 64
_LEVEL = 7  # of zlib; 9 takes ten times as long for 3 % (measured on 62,350 examples)

# Column of a block -> its type; `Payload.block` makes them, assets/data.js names them alike.
_COLUMNS = {
    "count": "<u4",  # examples of each feature of the block
    "value": "<f4",
    "row": "<f8",
    "rollout": "<f8",
    "position": "<i4",
    "target": "<u4",
    "length": "<u4",  # tokens in each example's window
    "token": "<u4",  # index into the text table; "<u2" where that is enough
    "activation": "<f4",
    "histogram": "<u4",  # the features' bins behind one another
}

_SPECIAL, _PARTIAL = 1, 2


@dataclass(frozen=True)
class Payload:
    """A feature index in the form that the page reads."""

    index: FeatureIndex
    title: str

    @property
    def n_blocks(self) -> int:
        """Number of blocks; the last one may be short."""
        return -(-len(self.index) // BLOCK)

    @cached_property
    def first_block(self) -> int:
        """The block of the first feature with an example, which the page shows first."""
        alive = np.flatnonzero(self.index.n_examples)
        return int(alive[0]) // BLOCK if len(alive) else 0

    def core(self) -> str:
        """Return the core as JSON that may stand inside a script element."""
        index = self.index
        texts = self._texts
        columns = {
            "n_examples": ("<u4", index.n_examples),
            "n_active": ("<f8", index.latent_n_active),
            "n_rollouts": ("<f8", index.latent_n_rollouts),
            "max": ("<f4", index.latent_max),
            "mean": ("<f4", index.latent_mean),
            "std": ("<f4", index.latent_std),
            "top_token": ("<u4", self._top_tokens()),
            "edges": ("<f4", index.latent_histogram_edges),
            "text_token_id": ("<i4", texts.token_id),
            "text_flags": ("|u1", texts.flags),
        }
        content = index.content
        data = {
            "title": self.title,
            "facts": facts(index),
            "n_features": len(index),
            "n_eligible": content.get("n_eligible"),
            "top_k": content.get("top_k", int(index.n_examples.max(initial=0))),
            "block": BLOCK,
            "block_columns": list(self._columns.items()),
            "columns": {
                name: {
                    "type": dtype,
                    "data": _base64(np.ascontiguousarray(values, dtype).tobytes()),
                }
                for name, (dtype, values) in columns.items()
            },
            "texts": texts.texts,
            "bytes": texts.bytes,
        }
        return escape_json(canonical(data))

    def block(self, number: int) -> str:
        """Return one block as base64 text."""
        index = self.index
        first, last = number * BLOCK, min((number + 1) * BLOCK, len(index))
        e = slice(int(index.example_offset[first]), int(index.example_offset[last]))
        w = slice(int(index.window_offset[e.start]), int(index.window_offset[e.stop]))
        values = {
            "count": index.n_examples[first:last],
            "value": index.example_value[e],
            "row": index.example_row[e],
            "rollout": index.example_rollout[e],
            "position": index.example_position[e],
            "target": index.window_target[e],
            "length": np.diff(index.window_offset[e.start : e.stop + 1]),
            "token": self._texts.of_windows(index, e, w),
            "activation": index.window_activation[w],
            "histogram": index.latent_histogram[first:last].reshape(-1),
        }
        header = np.array([len(values[name]) for name in _COLUMNS], dtype="<u4").tobytes()
        pieces = [header]
        for name, dtype in self._columns.items():
            pieces.append(bytes(-len(pieces[-1]) % 8))
            pieces.append(np.ascontiguousarray(values[name], dtype).tobytes())
        return _base64(zlib.compress(b"".join(pieces), _LEVEL))

    def blocks(self) -> Iterator[tuple[int, str]]:
        """Yield every block but the first shown one."""
        for number in range(self.n_blocks):
            if number != self.first_block:
                yield number, self.block(number)

    def _top_tokens(self) -> npt.NDArray[np.int64]:
        """Return the text of each feature's strongest token, `(d_sae,)`; 0 where it has none."""
        index, top = self.index, np.zeros(len(self.index), dtype=np.int64)
        alive = np.flatnonzero(index.n_examples)
        best = index.example_offset[alive]
        ids = index.window_token_id[index.window_offset[best] + index.window_target[best]]
        top[alive] = np.searchsorted(index.token_id, ids)
        for latent, e in zip(alive.tolist(), best.tolist(), strict=True):
            if e in self._texts.dependent:
                top[latent] = self._texts.dependent[e][index.window_target[e]]
        return top

    @cached_property
    def _columns(self) -> dict[str, str]:
        narrow = {"token": "<u2"} if len(self._texts.texts) <= 1 << 16 else {}
        return _COLUMNS | narrow

    @cached_property
    def _texts(self) -> "_TextTable":
        return _TextTable.of(self.index)


@dataclass(frozen=True)
class _TextTable:
    """What each token of each window looks like."""

    texts: list[str]
    token_id: npt.NDArray[np.int64]  # (n_texts,)
    flags: npt.NDArray[np.uint8]  # (n_texts,), _SPECIAL | _PARTIAL
    bytes: dict[str, str]  # entry -> bytes in hexadecimal, where they are not the text's own
    dependent: dict[int, list[int]]  # example -> entries, where they are not the vocabulary's own

    @classmethod
    def of(cls, index: FeatureIndex) -> "_TextTable":
        """Build the table in the order of the vocabulary, then of the examples."""
        raw = [index.token_bytes(int(i)) for i in index.token_id]
        partial = np.array([not _is_text(token) for token in raw], dtype=bool)
        texts = [token.decode(errors="replace") for token in raw]
        token = list(range(len(raw)))  # entry -> vocabulary
        entry = {(v, text): v for v, text in enumerate(texts)}
        dependent: dict[int, list[int]] = {}
        at = np.searchsorted(index.token_id, index.window_token_id)
        broken = np.flatnonzero(partial[at]) if raw else np.zeros(0, dtype=np.int64)
        owners = np.searchsorted(index.window_offset, broken, side="right") - 1
        for e in np.unique(owners).tolist():
            window = at[index.window_offset[e] : index.window_offset[e + 1]].tolist()
            entries = []
            for pair in zip(window, display_texts([raw[v] for v in window]), strict=True):
                if pair not in entry:
                    entry[pair] = len(texts)
                    token.append(pair[0])
                    texts.append(pair[1])
                entries.append(entry[pair])
            dependent[e] = entries
        owner = np.array(token, dtype=np.int64)
        flags = _SPECIAL * (index.token_special[owner] != 0) + _PARTIAL * partial[owner]
        return cls(
            texts,
            index.token_id[owner].astype(np.int64),
            flags.astype(np.uint8),
            {str(i): raw[v].hex(" ") for i, v in enumerate(token) if partial[v]},
            dependent,
        )

    def of_windows(self, index: FeatureIndex, e: slice, w: slice) -> npt.NDArray[np.int64]:
        """Return the entries of the tokens of examples `e`, whose windows are `w`."""
        entries = np.searchsorted(index.token_id, index.window_token_id[w])
        for example in range(e.start, e.stop) if self.dependent else ():
            if example in self.dependent:
                start = int(index.window_offset[example]) - w.start
                own = self.dependent[example]
                entries[start : start + len(own)] = own
        return entries


def facts(index: FeatureIndex) -> list[list[str]]:
    """Return what made the index, as [label, value, definition], without what is not known."""
    manifest, content = index.manifest, index.content
    settings = manifest.get("settings") or {}
    parents = manifest.get("parents") or {}
    layout = manifest.get("layout") or {}
    n_alive = int(np.count_nonzero(index.n_examples))

    def said(*keys: str) -> str | None:
        values = (source.get(key) for key in keys for source in (content, settings))
        return next((_fact(value) for value in values if _fact(value)), None)

    def with_digest(name: str | None, digest: Any) -> str | None:
        short = digest[:12] if isinstance(digest, str) else None
        return " · ".join(part for part in (name, short) if part) or None

    sites = layout.get("sites") or []
    ranks = [site["rank"] for site in sites if isinstance(site, dict) and "rank" in site]
    columns = f"{sum(ranks):,} at {len(ranks):,} sites" if ranks else None
    rows = [
        ["Model", said("base_model", "model"), "the subject model, without the adapter"],
        [
            "Adapter",
            with_digest(said("adapter_name", "adapter", "lora_path"), layout.get("adapter")),
            "the LoRA whose inner activations were read, and its digest",
        ],
        [
            "SAE",
            with_digest(said("sae_name", "sae", "model_path"), parents.get("sae")),
            "the dictionary that names the features, and its digest",
        ],
        ["Corpus", said("dataset", "corpus"), "the texts that were read"],
        ["Columns", columns, "scalars that the adapter computes for each token"],
        ["Rollouts", said("n_rollouts"), "texts that were read"],
        ["Tokens", said("n_tokens"), "tokens in those texts"],
        [
            "Eligible tokens",
            said("n_eligible"),
            "tokens that may be examples; special tokens may not",
        ],
        ["Features", f"{n_alive:,} of {len(index):,}", "features with an example, of all"],
        [
            "FVU",
            said("fvu"),
            "fraction of the activations' variance that the SAE leaves unexplained",
        ],
        ["L0", said("l0"), "features that fire on a token, on average"],
        ["lorascope", _fact(manifest.get("version")), "version that wrote the feature index"],
    ]
    return [[label, value, note] for label, value, note in rows if label and value and note]


def escape_json(text: str) -> str:
    """Escape ASCII JSON so that no HTML parser finds a tag or a comment in it."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def manifest_comment(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as the text of an HTML comment; reading it as JSON gives it back."""
    return escape_json(canonical(manifest)).replace("--", "-\\u002d")


def _fact(value: Any) -> str | None:
    """Return a value of a manifest for people, or None when it is not a single value."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) and value else None


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
