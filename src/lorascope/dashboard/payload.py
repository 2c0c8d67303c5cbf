"""Encode a feature index as the data of the page.

1. The *core* is one JSON: where the index comes from, the statistics of all features as columns,
   and the token table. The header, the list, its filters and the map need nothing else.
2. Everything else about `BLOCK` consecutive features is one *block*, a pack of columns. The page
   decodes a block when it shows one of its features.
3. Each rollout that is in the page as a whole is one pack, with the codes of all its tokens.
4. Tokens are indices into the token table (token_table.py).
5. Reports of effects (reports.py), if there are any, add columns to all three.

packs.py writes packs.

Statistics, the values of examples and samples, and rows are the index's own bits. These numbers are
rounded: activations in windows (error at most 1/32767 of the largest in the feature's windows),
fingerprints (1/62 of the feature's largest share), positions on the map (1/131068 of its width);
and scores of neighbours and tokens, values in whole rollouts, KL and contributions (1/256 of the
number).
"""

import base64
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.artifact import Manifest, canonical
from lorascope.dashboard.facts import header
from lorascope.dashboard.layout import layout
from lorascope.dashboard.overview import overview_of
from lorascope.dashboard.packs import narrowest_type, pack, whole_type
from lorascope.dashboard.reports import SIDES, TEXT_COLUMNS, Reports
from lorascope.dashboard.token_table import TokenTable
from lorascope.features.arrays import RANKINGS, WINDOWS
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import KINDS, Label
from lorascope.labels.groups import FeatureGroup, groups_of
from lorascope.record_json import to_json
from lorascope.texts.tokens import pack_tokens

BLOCK = 128
UNKNOWN = 65535  # a site that is not known, a latent that is not on the map or in a group
_MAP_WIDTH = 65534  # of map coordinates
FULL_SCALE = 32767  # stands for the largest activation in a feature's windows
FULL_SHARE = 31  # stands for a feature's largest share in its fingerprint

# Column of a block -> its type and coding (packs.py); assets/data.js uses the same names. `value`
# to `length` have one entry per window: those of the block's examples, then of its samples, then of
# its examples at special tokens. Types of whole numbers are narrowed to what the index needs.
_COLUMNS = {
    "count": "<u4",  # examples of each feature of the block
    "sample_count": "<u4",
    "special_count": "<u4",
    "value": "<f4 falls",
    "peak": "<f4",  # activation of the target; empty if it always equals `value`
    "row": "<f8",
    "rollout": "<f8",  # empty if the core's spans say it; `position` too
    "position": "<i4",
    "n_repeats": "<f8",  # of examples
    "quantile": "|i1",  # of samples
    "target": "<u4",
    "length": "<u4",  # tokens in each window
    "token": "<u4 entry",  # index into the token table
    "activation": "<i2 sparse",  # share of the feature's `scale`, times FULL_SCALE; 0 at targets
    "scale": "<f4",
    "histogram": "<u4",  # all bins of the first feature, then of the next
    "by_role": "<f8",
    "by_position": "<f8",
    "fingerprint": "|u1 sparse",  # share of the feature's `fingerprint_max`, times FULL_SHARE
    "fingerprint_max": "<f4",
    "similar": "<u4",  # latent + 1, or 0 for none; `cofiring` too; rankings have token + 1
    "cosine": "<b2 falls",
    "cofiring": "<u4",
    "jaccard": "<b2 falls",
    **dict.fromkeys(RANKINGS, "<u4 entry"),
    **dict.fromkeys((f"{name}_score" for name in RANKINGS), "<b2 falls"),
}
_LABEL_COLUMNS = {"sentence": "|u1", "sentence_length": "<u4"}  # UTF-8, feature after feature
_LABEL_SCORES = (
    "balanced_accuracy precision recall same_token near shuffled clarity purity covered "
    "picked_effect picked_effect_shuffled"
).split()
_LABEL_EDGES = {"": "interval", "clarity_": "clarity_interval", "purity_": "purity_interval"}
_ROLLOUT_COLUMNS = {
    "token": "<u4 entry",
    "role": "|u1",
    "n_fired": "<u2",  # features that fire at each token
    "latent": "<u4",
    "value": "<b2",
}


@dataclass(frozen=True)
class Payload:
    """A feature index, encoded for the page."""

    index: FeatureIndex
    title: str
    reports: Reports = Reports(0)

    @property
    def n_blocks(self) -> int:
        """Number of blocks; the last one may be shorter."""
        return -(-len(self.index) // BLOCK)

    @property
    def n_rollouts(self) -> int:
        """Number of rollouts that are in the page as a whole."""
        return len(self.index.text_rollout)

    @cached_property
    def first_block(self) -> int:
        """Block of the feature that is first in the list, which the page shows first.

        Where effects were measured, that is the specific one of the largest effect (filters.js).
        """
        index, ablation = self.index, self.reports.ablation
        ranked = () if ablation is None else ablation.features or ()
        kept = index.alive & (index.latent_n_special <= np.maximum(index.latent_n_active, 0))
        best = max(
            (one for one in ranked if kept[one.feature]),
            key=lambda one: (one.verdict == "specific", one.kl, -one.feature),
            default=None,
        )
        alive = np.flatnonzero(index.alive)
        first = best.feature if best is not None else int(alive[0]) if len(alive) else 0
        return first // BLOCK

    def core(self) -> str:
        """Return the core as JSON that is safe inside a script element."""
        index, table, content = self.index, self._token_table, self.index.content
        label_core, label_columns = None, {}
        if index.labels is not None:
            label_core, label_columns = _label_core([index.label(i) for i in range(len(index))])
        positions = layout(index)
        on_map = np.where(
            np.isnan(positions), UNKNOWN, np.rint(_MAP_WIDTH * np.nan_to_num(positions))
        )
        columns = {
            "n_examples": (whole_type(index.n_examples), index.n_examples),
            "n_active": (_count_type(index.latent_n_active), index.latent_n_active),
            "n_special": (_count_type(index.latent_n_special), index.latent_n_special),
            "special_max": ("<f4", self._special_max()),
            "n_rollouts": (_count_type(index.latent_n_rollouts), index.latent_n_rollouts),
            "max": ("<f4", index.latent_max),
            "mean": ("<f4", index.latent_mean),
            "std": ("<f4", index.latent_std),
            "stability": ("<f4", index.latent_stability),
            "top_token": (self._token_type, self._top_tokens()),
            "main_role": ("|u1", self._main_role()),
            "main_site": ("<u2", np.where(index.main_site < 0, UNKNOWN, index.main_site)),
            "group": ("<u2", self._group_of()),
            "x": ("<u2", on_map[:, 0]),
            "y": ("<u2", on_map[:, 1]),
            "edges": ("<f4", index.latent_histogram_edges),
            "site_order": ("<u2", self._site_order),
            "span_start": (whole_type(self._spans[0]), self._spans[0]),
            "span_rollout": (whole_type(self._spans[1]), self._spans[1]),
            "token_id": (_count_type(table.token_ids), table.token_ids),
            "token_flags": ("|u1", table.flags),
            "kept_rollout": ("<f8", index.text_rollout),
            "kept_why": ("|u1", index.text_why),
            "kept_l0": ("<f4", index.text_l0),
            "kept_fvu": ("<f4", index.text_fvu),
            "kept_rarity": ("<f4", index.text_rarity),
            "kept_length": ("<u4", np.diff(index.text_offset)),
            **label_columns,
            **{name: ("<f4", values) for name, values in self.reports.effects().items()},
        }
        data = {
            "title": self.title,
            "facts": [[one.name, one.value, one.meaning] for one in header(index, self.reports)],
            "labels_key": index.manifest.parents.get("sae") or index.manifest.digest,
            "labels": label_core,
            "n_features": len(index),
            "n_eligible": content.get("n_eligible"),
            "n_special": content.get("n_special"),
            "top_k": content.get("top_k", int(index.n_examples.max(initial=0))),
            "roles": list(index.roles),
            "n_by_role": index.totals("by_role"),
            "n_by_position": index.totals("by_position"),
            "sites": self._sites,
            "block": BLOCK,
            "block_columns": list(self._columns.items()),
            "rollout_columns": list(self._rollout_columns.items()),
            "n_similar": index.near_decoder.shape[1],
            "n_cofiring": index.near_cofiring.shape[1],
            "n_ranked": {name: getattr(index, f"ranked_{name}_id").shape[1] for name in RANKINGS},
            "columns": {
                name: {
                    "type": dtype,
                    "data": base64.b64encode(np.asarray(values, dtype).tobytes()).decode("ascii"),
                }
                for name, (dtype, values) in columns.items()
            },
            "effects": self.reports.about(),
            "groups": [group.name for group in self._groups],
            "overview": to_json(overview_of(index, self.reports, self._groups)),
            "token_texts": table.texts,
            "token_bytes": table.bytes,
        }
        return escape_json(canonical(data))

    def block(self, number: int) -> str:
        """Return one block of features as a pack."""
        index = self.index
        latents = slice(number * BLOCK, min((number + 1) * BLOCK, len(index)))
        offset_of = {part: getattr(index, f"{part}_offset") for part in WINDOWS}
        runs, windows, before = {}, [], 0  # of each part: its examples, and their windows
        for part, offset in offset_of.items():
            first, last = offset[[latents.start, latents.stop]].tolist()
            runs[part] = slice(first, last)
            windows.append(slice(before + first, before + last))
            before += int(offset[-1])

        def joined(name: str) -> npt.NDArray[Any]:
            return np.concatenate(
                [getattr(index, f"{part}_{name}")[run] for part, run in runs.items()]
            )

        offsets = [index.window_offset[run.start : run.stop + 1] for run in windows]
        lengths = np.concatenate([np.diff(offset) for offset in offsets])
        target = np.concatenate([index.window_target[run] for run in windows])
        activation = np.concatenate(
            [index.window_activation[offset[0] : offset[-1]] for offset in offsets]
        )
        counts = [
            np.diff(offset[latents.start : latents.stop + 1]) for offset in offset_of.values()
        ]
        owner = np.concatenate([np.repeat(np.arange(len(count)), count) for count in counts])
        of_token = np.repeat(owner, lengths)
        scale = np.zeros(len(counts[0]), dtype=np.float32)
        np.maximum.at(scale, of_token, np.abs(activation))
        at_target = np.cumsum(lengths) - lengths + target
        value, peak = joined("value"), activation[at_target]
        activation[at_target] = 0  # the page takes it from `peak`, or from `value`
        share = np.nan_to_num(index.latent_fingerprint[latents].astype(np.float32))
        largest = share.max(axis=1, initial=0, keepdims=True)
        values = {
            "count": counts[0],
            "sample_count": counts[1],
            "special_count": counts[2],
            "value": value,
            "peak": peak[:0] if np.array_equal(peak, value) else peak,
            "row": joined("row"),
            "rollout": joined("rollout")[: 0 if len(self._spans[0]) else None],
            "position": joined("position")[: 0 if len(self._spans[0]) else None],
            "n_repeats": index.example_n_alike[runs["example"]],
            "quantile": index.sample_quantile[runs["sample"]],
            "target": target,
            "length": lengths,
            "token": np.concatenate(
                [self._token_table.entries_of("window", run.start, run.stop) for run in windows]
            ),
            "activation": to_scaled_int16(activation, scale[of_token]),
            "scale": scale,
            "histogram": index.latent_histogram[latents],
            "by_role": index.latent_by_role[latents],
            "by_position": index.latent_by_position[latents],
            "fingerprint": np.rint(FULL_SHARE * share / np.where(largest > 0, largest, 1))[
                :, self._site_order
            ],
            "fingerprint_max": largest,
            "similar": index.near_decoder[latents] + 1,
            "cosine": index.near_cosine[latents],
            "cofiring": index.near_cofiring[latents] + 1,
            "jaccard": index.near_jaccard[latents],
        }
        rankings = {
            name: (getattr(index, f"ranked_{name}_id"), getattr(index, f"ranked_{name}_score"))
            for name in RANKINGS
        }
        for name, (ids, scores) in (rankings | self._direct_tokens).items():
            entries = self._token_table.entries_of_ids(ids[latents]) + 1
            values[name] = np.where(ids[latents] == -1, 0, entries)
            values[f"{name}_score"] = scores[latents]
        if index.labels is not None:
            labels = map(index.label, range(latents.start, latents.stop))
            texts = [label.sentence.encode() if label else b"" for label in labels]
            offset, values["sentence"] = pack_tokens(texts)
            values["sentence_length"] = np.diff(offset)
        return pack(values, self._columns)

    def rollout(self, number: int) -> str:
        """Return one whole rollout, with the codes of all its tokens, as a pack."""
        index = self.index
        first, last = index.text_offset[number : number + 2].tolist()
        code = index.text_code_offset[first : last + 1]
        values = {
            "token": self._token_table.entries_of("text", number, number + 1),
            "role": index.text_role[first:last],
            "n_fired": np.diff(code),
            "latent": index.text_latent[code[0] : code[-1]],
            "value": index.text_value[code[0] : code[-1]],
        }
        if self.reports.attribution is not None:
            values |= self.reports.text(int(index.text_rollout[number]))
            entries = self._token_table.entries_of_ids(values["likely_token"].astype(np.int32))
            counts = values["likely_count"].astype(int)
            itself = np.repeat(values["token"][: len(counts)], counts)
            values["likely_token"] = np.where(entries == itself, 0, entries + 1)
        return pack(values, self._rollout_columns)

    def _top_tokens(self) -> npt.NDArray[np.int64]:
        """Return the token-table entry of each latent's strongest token, `(latent,)`; 0: none.

        It is a special token for template features and latents without another example.
        """
        index, top = self.index, np.zeros(len(self.index), dtype=np.int64)
        alive = np.flatnonzero(index.alive)
        before = len(index.example_value) + len(index.sample_value)
        at_special = index.is_template & (np.diff(index.special_offset) > 0)
        at_text = (index.n_examples > 0) & ~at_special
        best = np.where(at_text, index.example_offset[:-1], before + index.special_offset[:-1])
        best = best[alive]
        ids = index.window_token_id[index.window_offset[best] + index.window_target[best]]
        top[alive] = self._token_table.entries_of_ids(ids)
        own = self._token_table.own["window"]
        for latent, e in zip(alive.tolist(), best.tolist(), strict=True):
            if e in own:
                top[latent] = own[e][index.window_target[e]]
        return top

    @cached_property
    def _groups(self) -> tuple[FeatureGroup, ...]:
        return groups_of(self.index)

    def _group_of(self) -> npt.NDArray[np.int64]:
        """Return the number of each latent's group, `(latent,)`."""
        numbers = np.full(len(self.index), UNKNOWN)
        for number, group in enumerate(self._groups):
            numbers[list(group.latents)] = number
        return numbers

    def _special_max(self) -> npt.NDArray[np.float32]:
        """Return each latent's largest value at a special token, `(latent,)`; 0: none."""
        index, largest = self.index, np.zeros(len(self.index), np.float32)
        fires = np.flatnonzero(np.diff(index.special_offset))
        largest[fires] = index.special_value[index.special_offset[fires]]
        return largest

    def _main_role(self) -> list[int]:
        """Return the number of the role in which each latent is densest; 255: unknown."""
        index = self.index
        roles = index.roles if index.totals("by_role") else ()
        number = {role: i for i, role in enumerate(roles)}
        return [number.get(role, 255) for role in index.main_role]

    @cached_property
    def _sites(self) -> list[list[Any]] | None:
        """Layer and projection of every site, if the manifest names them."""
        layout = self.index.manifest.layout
        if layout is None or len(layout.sites) != self.index.latent_fingerprint.shape[1]:
            return None
        return [
            [site.layer, f"{site.adapter} {site.projection}".strip()] for site in layout.sites
        ] or None

    @cached_property
    def _site_order(self) -> npt.NDArray[np.int64]:
        """Return the sites projection by projection, as fingerprints have them.

        Layers that are neighbours have similar shares.
        """
        projections = [projection for _, projection in self._sites or ()]
        if not projections:
            return np.arange(self.index.latent_fingerprint.shape[1])
        return np.argsort([projections.index(name) for name in projections], kind="stable")

    @cached_property
    def _spans(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return first rows and numbers of the rollouts that windows are of, in order of rows.

        Both are empty where rows do not say the rollout, or where nearly every window has its own.
        """
        index = self.index
        row, rollout, position = (
            np.concatenate([getattr(index, f"{part}_{name}") for part in WINDOWS])
            for name in ("row", "rollout", "position")
        )
        start, first = np.unique(row - position, return_index=True)
        at = np.searchsorted(start, row, side="right") - 1
        said = np.array_equal(start[at] + position, row)
        if said and np.array_equal(rollout[first][at], rollout) and 4 * len(start) <= len(row):
            return start, rollout[first]
        return np.zeros(0), np.zeros(0)

    @property
    def _token_type(self) -> str:
        return narrowest_type(len(self._token_table.texts))

    @cached_property
    def _columns(self) -> dict[str, str]:
        """Column of a block -> type, with the narrowest types for this index."""
        index = self.index
        whole = {
            "row": [getattr(index, f"{part}_row") for part in WINDOWS],
            "n_repeats": [index.example_n_alike],
            "histogram": [index.latent_histogram],
            "by_role": [index.latent_by_role],
            "by_position": [index.latent_by_position],
            "length": [np.diff(index.window_offset)],
            "target": [index.window_target],
        }
        return {
            **_COLUMNS,
            **{
                name: whole_type(np.concatenate([part.ravel() for part in parts]))
                + " sparse" * (name in ("histogram", "by_role"))
                for name, parts in whole.items()
            },
            **dict.fromkeys(
                ("token", *RANKINGS, *self._direct_tokens), f"{self._token_type} entry"
            ),
            **dict.fromkeys(("similar", "cofiring"), narrowest_type(len(index))),
            **dict.fromkeys((f"{side}_score" for side in self._direct_tokens), "<b2"),
            **({} if self.index.labels is None else _LABEL_COLUMNS),
        }

    @cached_property
    def _rollout_columns(self) -> dict[str, str]:
        """Column of a whole rollout -> type."""
        attribution = {} if self.reports.attribution is None else TEXT_COLUMNS
        entry = f"{self._token_type} entry"
        types = {"token": entry, "latent": f"{narrowest_type(len(self.index))} entry"}
        if attribution:
            types["likely_token"] = entry
        return {**_ROLLOUT_COLUMNS, **attribution, **types}

    @cached_property
    def _direct_tokens(self) -> dict[str, tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Side -> token ids and scores of the direct effect; empty without such a report."""
        if self.reports.direct is None:
            return {}
        return {side: self.reports.tokens(side) for side in SIDES}

    @cached_property
    def _token_table(self) -> TokenTable:
        return TokenTable(self.index, self.reports.vocabulary)


def _label_core(
    labels: Sequence[Label | None],
) -> tuple[dict[str, list[str]], dict[str, tuple[str, npt.NDArray[Any]]]]:
    """Return the names of all features with the words that numbers stand for, and the columns.

    A feature without a label has the name "" and the kind 0.
    """
    known = [label for label in labels if label is not None]
    words = {"kind": ["", *KINDS]}
    for key in ("category", "author", "judge"):
        counts = Counter(getattr(label, key) or "" for label in known)
        words[key] = [word for word, _ in counts.most_common()]
    columns: dict[str, tuple[str, npt.NDArray[Any]]] = {}
    for key, values in words.items():
        number = {value: i for i, value in enumerate(values)}
        of_label = [number[getattr(label, key) or ""] if label else 0 for label in labels]
        columns[f"label_{key}"] = ("<u2", np.array(of_label))
    for key in _LABEL_SCORES:
        scores = [getattr(label, key) if label else None for label in labels]
        columns[f"label_{key}"] = ("<f4", np.array(scores, float))
    for name, key in _LABEL_EDGES.items():
        edges = [(label and getattr(label, key)) or (None, None) for label in labels]
        low, high = np.array(edges, float).reshape(-1, 2).T
        columns |= {f"label_{name}low": ("<f4", low), f"label_{name}high": ("<f4", high)}
    core = {
        "names": [label.name if label else "" for label in labels],
        "kinds": list(KINDS),
        "categories": words["category"],
        "authors": words["author"],
        "judges": words["judge"],
    }
    return core, columns


def to_scaled_int16(values: npt.NDArray[Any], scale: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    """Return `FULL_SCALE * values / scale`, rounded; the error is at most `scale / FULL_SCALE`.

    Only 0 becomes 0, so that every firing stays visible. `scale` broadcasts.
    """
    share = values / np.where(scale > 0, scale, 1)
    rounded = np.rint(FULL_SCALE * share)
    return np.where((rounded == 0) & (values != 0), np.sign(values), rounded).astype(np.int16)


def escape_json(text: str) -> str:
    """Return ASCII JSON escaped so that no HTML parser finds a tag or a comment in it."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def manifest_comment(manifest: Manifest) -> str:
    """Return a manifest as the text of an HTML comment, which is still JSON."""
    return escape_json(json.dumps(manifest.to_sealed_json())).replace("--", "-\\u002d")


def _count_type(counts: npt.NDArray[Any]) -> str:
    """Return the type of counts in which -1 stands for unknown."""
    if counts.min(initial=0) >= 0:
        return whole_type(counts)
    return "<i4" if counts.max(initial=0) < 1 << 31 else "<f8"
