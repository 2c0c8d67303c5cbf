"""The data inside the page.

1. The *core* is one JSON: what made the page, the statistics of every feature as columns, and the
   table of texts. It is all that the header, the list, its filters and the map need.
2. What else is known of `BLOCK` neighbouring features is one *block*, a pack of columns
   (packing.py). The page decodes a block when it shows one of its features.
3. A rollout that is kept whole is one block too, with the codes of all its tokens.
4. Tokens are indices into the table of texts (texttable.py).
5. Reports of effects (reports.py) add columns to all three, where they are given.

Statistics, the values of examples and samples, and rows are the index's own bits. Rounded are:
activations of the tokens around (by at most 1/32767 of the feature's largest in its windows),
shares of a fingerprint (1/62 of its largest), places on the map (1/131068 of its width); scores
of neighbours and of ranked and promoted tokens, values in kept texts, KL and contributions there
(1/256 of themselves).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.artifact import canonical, digest_of
from lorascope.dashboard.facts import facts
from lorascope.dashboard.layout import layout
from lorascope.dashboard.packing import SHARES, halved, narrowest, pack, scaled, text_of
from lorascope.dashboard.reports import SIDES, TEXT_COLUMNS, Reports
from lorascope.dashboard.token_table import TokenTable
from lorascope.features.arrays import RANKINGS
from lorascope.features.index import FeatureIndex

BLOCK = 64
NOWHERE = 65535  # a place on the map of a latent that is not on it; a site that is not known
_WIDTH = 65534  # of the map

# Column of a block -> its type; assets/data.js names them alike. `value` to `length` have an entry
# per window: those of the block's examples, then those of its samples.
_COLUMNS = {
    "count": "<u4",  # examples of each feature of the block
    "sample_count": "<u4",
    "value": "<f4",
    "peak": "<f4",  # activation of the target; nothing where it is `value`, as in our own files
    "row": "<f8",
    "rollout": "<f8",
    "position": "<i4",
    "n_alike": "<f8",  # of examples
    "quantile": "|i1",  # of samples
    "target": "<u4",
    "length": "<u4",  # tokens in each window
    "token": "<u4",  # index into the text table; "<u2" where that is enough
    "activation": "<i2",  # parts of the feature's `scale`
    "scale": "<f4",
    "histogram": "<u4",  # the features' bins behind one another
    "by_role": "<f8",
    "by_position": "<f8",
    "share": "|u1",  # fingerprint, parts of the feature's largest
    "largest_share": "<f4",
    "near": "<u4",  # 0 for none, else latent + 1; so `beside` and, for entries, the rankings
    "cosine": "<b2",
    "beside": "<u4",
    "jaccard": "<b2",
    **{f"{name}{part}": kind for name in RANKINGS for part, kind in (("", "<u4"), ("_", "<b2"))},
}
_TEXT_COLUMNS = {
    "token": "<u4",
    "role": "|u1",
    "count": "<u2",  # features that fire on each token
    "latent": "<u4",
    "value": "<b2",
}


@dataclass(frozen=True)
class Payload:
    """A feature index in the form that the page reads."""

    index: FeatureIndex
    title: str
    reports: Reports = Reports(0)

    @property
    def n_blocks(self) -> int:
        """Number of blocks of features; the last one may be short."""
        return -(-len(self.index) // BLOCK)

    @property
    def n_texts(self) -> int:
        """Number of rollouts that are kept whole."""
        return len(self.index.text_rollout)

    @cached_property
    def first_block(self) -> int:
        """The block of the first feature with an example, which the page shows first."""
        alive = np.flatnonzero(self.index.n_examples)
        return int(alive[0]) // BLOCK if len(alive) else 0

    def core(self) -> str:
        """Return the core as JSON that may stand inside a script element."""
        index, texts, content = self.index, self._texts, self.index.content
        place = layout(index)
        on_map = np.where(np.isnan(place), NOWHERE, np.rint(_WIDTH * np.nan_to_num(place)))
        columns = {
            "n_examples": ("<u4", index.n_examples),
            "n_active": (_signed(index.latent_n_active), index.latent_n_active),
            "n_rollouts": (_signed(index.latent_n_rollouts), index.latent_n_rollouts),
            "max": ("<f4", index.latent_max),
            "mean": ("<f4", index.latent_mean),
            "std": ("<f4", index.latent_std),
            "stability": ("<f4", index.latent_stability),
            "top_token": ("<u4", self._top_tokens()),
            "main_role": ("|u1", self._main_role()),
            "main_site": ("<u2", self._main_site()),
            "x": ("<u2", on_map[:, 0]),
            "y": ("<u2", on_map[:, 1]),
            "edges": ("<f4", index.latent_histogram_edges),
            "text_token_id": ("<i4", texts.token_ids),
            "text_flags": ("|u1", texts.flags),
            "kept_rollout": ("<f8", index.text_rollout),
            "kept_why": ("|u1", index.text_why),
            "kept_l0": ("<f4", index.text_l0),
            "kept_fvu": ("<f4", index.text_fvu),
            "kept_rarity": ("<f4", index.text_rarity),
            "kept_length": ("<u4", np.diff(index.text_offset)),
            **{
                name: ("<f4", values)
                for name, values in (self.reports.effects() | self.reports.shares()).items()
            },
        }
        data = {
            "title": self.title,
            "facts": facts(index),
            "key": self._key(),
            "n_features": len(index),
            "n_eligible": content.get("n_eligible"),
            "top_k": content.get("top_k", int(index.n_examples.max(initial=0))),
            "roles": _names(content.get("roles")),
            "n_by_role": _totals(content.get("n_by_role"), index.latent_by_role.shape[1]),
            "n_by_position": _totals(
                content.get("n_by_position"), index.latent_by_position.shape[1]
            ),
            "sites": self._sites,
            "block": BLOCK,
            "block_columns": list(self._columns.items()),
            "text_columns": list(self._text_columns.items()),
            "n_near": index.near_decoder.shape[1],
            "n_beside": index.near_cofiring.shape[1],
            "n_ranked": {name: getattr(index, f"ranked_{name}_id").shape[1] for name in RANKINGS},
            "columns": {
                name: {
                    "type": dtype,
                    "data": text_of(np.ascontiguousarray(values, dtype).tobytes()),
                }
                for name, (dtype, values) in columns.items()
            },
            "effects": self.reports.about(),
            "texts": texts.texts,
            "bytes": texts.bytes,
        }
        return escape_json(canonical(data))

    def block(self, number: int) -> str:
        """Return one block of features as base64 text."""
        index = self.index
        latents = slice(number * BLOCK, min((number + 1) * BLOCK, len(index)))
        e = slice(int(index.example_offset[latents.start]), int(index.example_offset[latents.stop]))
        s = slice(int(index.sample_offset[latents.start]), int(index.sample_offset[latents.stop]))
        n = len(index.example_value)
        runs = [e, slice(n + s.start, n + s.stop)]  # of windows

        def both(name: str) -> npt.NDArray[Any]:
            parts = getattr(index, f"example_{name}")[e], getattr(index, f"sample_{name}")[s]
            return np.concatenate(parts)

        lengths = np.concatenate([np.diff(index.window_offset[r.start : r.stop + 1]) for r in runs])
        target = np.concatenate([index.window_target[run] for run in runs])
        activation = np.concatenate(
            [
                index.window_activation[index.window_offset[r.start] : index.window_offset[r.stop]]
                for r in runs
            ]
        )
        counts = [
            np.diff(offset[latents.start : latents.stop + 1])
            for offset in (index.example_offset, index.sample_offset)
        ]
        owner = np.concatenate([np.repeat(np.arange(len(count)), count) for count in counts])
        of_token = np.repeat(owner, lengths)
        scale = np.zeros(len(counts[0]), dtype=np.float32)
        np.maximum.at(scale, of_token, np.abs(activation))
        value, peak = both("value"), activation[np.cumsum(lengths) - lengths + target]
        share = np.nan_to_num(index.latent_fingerprint[latents].astype(np.float32))
        largest = share.max(axis=1, initial=0, keepdims=True)
        values = {
            "count": counts[0],
            "sample_count": counts[1],
            "value": value,
            "peak": peak[:0] if np.array_equal(peak, value) else peak,
            "row": both("row"),
            "rollout": both("rollout"),
            "position": both("position"),
            "n_alike": index.example_n_alike[e],
            "quantile": index.sample_quantile[s],
            "target": target,
            "length": lengths,
            "token": np.concatenate([self._texts.of_windows(r.start, r.stop) for r in runs]),
            "activation": scaled(activation, scale[of_token]),
            "scale": scale,
            "histogram": index.latent_histogram[latents],
            "by_role": index.latent_by_role[latents],
            "by_position": index.latent_by_position[latents],
            "share": np.rint(SHARES * share / np.where(largest > 0, largest, 1)),
            "largest_share": largest,
            "near": index.near_decoder[latents] + 1,
            "cosine": halved(index.near_cosine[latents]),
            "beside": index.near_cofiring[latents] + 1,
            "jaccard": halved(index.near_jaccard[latents]),
        }
        for name in RANKINGS:
            ids = getattr(index, f"ranked_{name}_id")[latents]
            values[name] = np.where(ids == -1, 0, self._texts.of_ids(ids) + 1)
            values[f"{name}_"] = halved(getattr(index, f"ranked_{name}_score")[latents])
        for side, (ids, scores) in self._directed.items():
            values[side] = np.where(ids[latents] == -1, 0, self._texts.of_ids(ids[latents]) + 1)
            values[f"{side}_"] = halved(scores[latents])
        return pack(values, self._columns)

    def blocks(self) -> Iterator[tuple[int, str]]:
        """Yield every block of features but the first shown one."""
        for number in range(self.n_blocks):
            if number != self.first_block:
                yield number, self.block(number)

    def text(self, number: int) -> str:
        """Return one rollout that is kept whole, with all its codes, as base64 text."""
        index = self.index
        first, last = index.text_offset[number : number + 2].tolist()
        code = index.text_code_offset[first : last + 1]
        values = {
            "token": self._texts.of_text(number),
            "role": index.text_role[first:last],
            "count": np.diff(code),
            "latent": index.text_latent[code[0] : code[-1]],
            "value": halved(index.text_value[code[0] : code[-1]]),
        }
        if "attribution" in self.reports.found:
            values |= self.reports.text(int(index.text_rollout[number]), last - first)
        return pack(values, self._text_columns)

    def _key(self) -> str:
        """Return what labels are kept under: the SAE whose latents they name, or this index."""
        parents = self.index.manifest.get("parents") or {}
        sae = parents.get("sae") if isinstance(parents, Mapping) else None
        return sae if isinstance(sae, str) else digest_of(self.index.manifest)

    def _top_tokens(self) -> npt.NDArray[np.int64]:
        """Return the text of each feature's strongest token, `(d_sae,)`; 0 where it has none."""
        index, top = self.index, np.zeros(len(self.index), dtype=np.int64)
        alive = np.flatnonzero(index.n_examples)
        best = index.example_offset[alive]
        ids = index.window_token_id[index.window_offset[best] + index.window_target[best]]
        top[alive] = self._texts.of_ids(ids)
        for latent, e in zip(alive.tolist(), best.tolist(), strict=True):
            if e in self._texts.windows:
                top[latent] = self._texts.windows[e][index.window_target[e]]
        return top

    def _main_role(self) -> npt.NDArray[np.int64]:
        """Return the role in which each latent is densest, `(latent,)`; 255 where not known."""
        counts = self.index.latent_by_role
        totals = _totals(self.index.content.get("n_by_role"), counts.shape[1])
        if totals is None or not counts.shape[1]:
            return np.full(len(counts), 255)
        share = np.where(np.array(totals) > 0, counts / np.maximum(totals, 1), 0)
        return np.where(share.max(axis=1) > 0, share.argmax(axis=1), 255)

    def _main_site(self) -> npt.NDArray[np.int64]:
        """Return the site with the largest share of each latent's effect, or `NOWHERE`."""
        share = np.nan_to_num(self.index.latent_fingerprint.astype(np.float32))
        if self._sites is None or not share.shape[1]:
            return np.full(len(share), NOWHERE)
        return np.where(share.max(axis=1) > 0, share.argmax(axis=1), NOWHERE)

    @cached_property
    def _sites(self) -> list[list[Any]] | None:
        """Layer and projection of every site, where the manifest says them."""
        named = self.index.manifest.get("layout")
        sites = named.get("sites") if isinstance(named, Mapping) else None
        if not isinstance(sites, list) or len(sites) != self.index.latent_fingerprint.shape[1]:
            return None
        return [[site["layer"], site["projection"]] for site in sites] or None

    @cached_property
    def _columns(self) -> dict[str, str]:
        entry, latent = narrowest(len(self._texts.texts)), narrowest(len(self.index))
        narrow = dict.fromkeys(("token", *RANKINGS), entry)
        named = dict.fromkeys(self._directed, entry)
        scores = {f"{side}_": "<b2" for side in self._directed}
        return {**_COLUMNS, **narrow, "near": latent, "beside": latent, **named, **scores}

    @cached_property
    def _text_columns(self) -> dict[str, str]:
        entry, latent = narrowest(len(self._texts.texts)), narrowest(len(self.index))
        more = TEXT_COLUMNS if "attribution" in self.reports.found else {}
        return {**_TEXT_COLUMNS, "token": entry, "latent": latent, **more}

    @cached_property
    def _directed(self) -> dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        known = "direct" in self.reports.found
        return {side: self.reports.tokens(side) for side in SIDES} if known else {}

    @cached_property
    def _texts(self) -> TokenTable:
        return TokenTable.from_index(self.index, self.reports.vocabulary)


def escape_json(text: str) -> str:
    """Escape ASCII JSON so that no HTML parser finds a tag or a comment in it."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def manifest_comment(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as the text of an HTML comment; reading it as JSON gives it back."""
    return escape_json(canonical(manifest)).replace("--", "-\\u002d")


def _signed(counts: npt.NDArray[np.int64]) -> str:
    """Return the type of counts of which -1 is not known."""
    return "<i4" if counts.max(initial=0) < 1 << 31 else "<f8"


def _names(names: Any) -> list[str]:
    """Return the names of roles, none where they are not known."""
    return [str(name) for name in names] if isinstance(names, list) else []


def _totals(totals: Any, n: int) -> list[int] | None:
    """Return how many tokens there are of each kind, or None where that is not known."""
    known = isinstance(totals, list) and len(totals) == n and n
    return [int(total) for total in totals] if known else None
