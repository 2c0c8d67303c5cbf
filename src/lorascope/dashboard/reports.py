"""Reports of what features do, as columns of the page beside those of the feature index.

A page takes at most one of each kind: `ablation` (what is gone without a feature), `direct` (tokens
that it promotes) and `attribution` (how far adapter and base are apart at each token of the whole
texts, and the features behind). Reports come from files that somebody gave: what they say of
features and tokens is compared with the index before any of it is used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.artifact import digest_of, open_manifest
from lorascope.causal.study import open_report
from lorascope.dashboard.packing import to_half_bits
from lorascope.errors import ArtifactError
from lorascope.features.index import FeatureIndex

KINDS = ("ablation", "direct", "attribution")
SIDES = ("promoted", "suppressed")
_EFFECTS = {  # column of the core -> key in an entry of `ablation`; `kl_interval` stands apart
    "effect_kl": "kl",
    "effect_each": "kl_each",
    "effect_here": "share_here",
    "effect_ce": "ce_rise",
    "effect_random": "kl_random",
    "effect_fired": "n_fired",
}
_ANY_SIGN = ("ce_rise",)
_MAY_LACK = ("kl_each", "share_here")
_SCHEMA = 1  # of each kind
_LARGEST = 1e30  # of any number: float32 holds it
_MOST = 1000  # tokens that a feature may promote
_TARGETS = ("kl", "logprob", "logit-difference")
TARGET = ("adapter", "base", "features", "bias", "unexplained", "special", "other_columns")
TEXT_COLUMNS = {
    "kl": "<b2",  # of each token; nothing where the text was not attributed
    "rise": "<b2",
    "target_token": "<u4",
    "target_parts": "<f4",  # of each target, in the order of TARGET
    "behind_count": "<u4",
    "behind_latent": "<u4",
    "behind_value": "<b2",
    "behind_source": "<u4",
    "behind_removal": "<b2",
}
_BROKEN = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Reports:
    """The reports of a page by kind; none of them need be there."""

    n_features: int
    found: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, paths: Sequence[Path], index: FeatureIndex, source: Path) -> "Reports":
        """Read reports for the page of an index, which was read from `source`.

        Raises ArtifactError at a report that is damaged, of another SAE, of a kind that a page does
        not show, or of a kind that another one is of.
        """
        found: dict[str, Mapping[str, Any]] = {}
        for path in paths:
            data = open_report(path)
            manifest = data["metadata"]["lorascope"]
            kind = manifest["kind"]
            if kind not in KINDS:
                raise ArtifactError(
                    f"{path} is a report of kind {kind}, of which a page shows nothing; it takes "
                    f"{', '.join(KINDS)}"
                )
            if kind in found:
                raise ArtifactError(f"{path} is a second report of kind {kind}; give one of them")
            open_manifest(path, kind, _SCHEMA)
            _require_parents(path, manifest, index, source)
            found[kind] = data
            try:
                cls(len(index), {kind: data})._check(kind, index)
            except _BROKEN as error:
                raise ArtifactError(
                    f"{path} does not hold what a report of kind {kind} does ({error}); make it "
                    "anew, from the same SAE and store"
                ) from error
        return cls(len(index), found)

    @property
    def parents(self) -> dict[str, str]:
        """Digests of the reports, by what a page records them under."""
        return {
            f"effects {kind}": digest_of(data["metadata"]["lorascope"])
            for kind, data in self.found.items()
        }

    def _check(self, kind: str, index: FeatureIndex) -> None:
        """Make every column once: whatever is not as promised raises here, not half-way."""
        self.about()
        if kind == "ablation":
            self.effects()
        elif kind == "direct":
            self.shares()
            for side in SIDES:
                self.tokens(side)
            for i, raw in self.vocabulary.items():
                if i in index.token_id and index.token_bytes(i) != raw:
                    raise ValueError(f"token {i} is another one in the index")
        else:
            lengths = dict(
                zip(index.text_rollout.tolist(), np.diff(index.text_offset).tolist(), strict=True)
            )
            for rollout in self._texts:
                self.text(rollout, lengths.get(rollout))

    def about(self) -> dict[str, Any]:
        """Return what the core says of the reports."""
        said: dict[str, Any] = {}
        if self.found.get("ablation", {}).get("features") is not None:
            data = self.found["ablation"]
            said["ablation"] = {
                "n_rollouts": int(data["n_rollouts"]),
                "n_tokens": int(data["n_tokens"]),
                "whole": _real(data["without_adapter"]["kl"], least=0),
                "floor": _real(data["floor"]["rounding"], least=0),
            }
        if "direct" in self.found:
            said["direct"] = {"n": self._n_tokens}
        if "attribution" in self.found:
            data = self.found["attribution"]
            gap = data["completeness"]["gap"]
            if data["target"] not in _TARGETS:
                raise ValueError(f"its target is {data['target']!r}")
            said["attribution"] = {
                "target": data["target"],
                "unit": str(data["unit"]),
                "steps": int(data["steps"]),
                "gap": None if gap is None else _real(gap, least=0),
                "parts": list(TARGET),
            }
        return said

    def effects(self) -> Arrays:
        """Return what is gone without each feature, a float32 column each; NaN: not measured."""
        entries = self.found.get("ablation", {}).get("features")
        if entries is None:
            return {}
        names = (*_EFFECTS, "effect_low", "effect_high")
        columns = {name: np.full(self.n_features, np.nan, np.float32) for name in names}
        for one in entries:
            latent = self._latent(one["feature"])
            if not np.isnan(columns["effect_kl"][latent]):
                raise ValueError(f"feature {latent} is there twice")
            for name, key in _EFFECTS.items():
                if one[key] is None and key in _MAY_LACK:
                    continue
                columns[name][latent] = _real(one[key], least=None if key in _ANY_SIGN else 0)
            if one["kl_interval"] is not None:
                low, high = one["kl_interval"]
                columns["effect_low"][latent] = _real(low, least=0)
                columns["effect_high"][latent] = _real(high, least=0)
        return columns

    def shares(self) -> Arrays:
        """Return the share of each feature's effect that is written directly."""
        if "direct" not in self.found:
            return {}
        entries = self.found["direct"]["features"]
        if [self._latent(one["feature"]) for one in entries] != list(range(self.n_features)):
            raise ValueError(f"it has {len(entries)} features, the index {self.n_features}")
        share = [_real(one["share"], least=0, most=1.001) for one in entries]
        return {"direct_share": np.array(share, np.float32)}

    @property
    def _n_tokens(self) -> int:
        n = self.found["direct"]["n_tokens"]
        if type(n) is not int or not 1 <= n <= _MOST:
            raise ValueError(f"it names {n!r} tokens of each feature")
        return n

    def tokens(self, side: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return token ids (-1: none) and scores of a side, `(feature, n)`."""
        n = self._n_tokens
        ids = np.full((self.n_features, n), -1, np.int32)
        scores = np.zeros((self.n_features, n), np.float32)
        for one in self.found["direct"]["features"]:
            latent, named = self._latent(one["feature"]), one[side]
            if len(named) > n:
                raise ValueError(f"feature {latent} names {len(named)} tokens, expected {n}")
            for i, token in enumerate(named):
                ids[latent, i], scores[latent, i] = _token(token["token_id"]), _real(token["z"])
        known = {-1, *self.vocabulary}
        if not known.issuperset(ids.ravel().tolist()):
            raise ValueError("a token is not in its vocabulary")
        return ids, scores

    @cached_property
    def vocabulary(self) -> dict[int, bytes]:
        """The bytes of the tokens that are promoted or suppressed, by id."""
        named = self.found.get("direct", {}).get("vocabulary", {})
        return {_token(int(i)): bytes.fromhex(raw) for i, raw in named.items()}

    @cached_property
    def _texts(self) -> dict[int, Mapping[str, Any]]:
        texts = self.found.get("attribution", {}).get("rollouts", [])
        found = {int(text["rollout"]): text for text in texts}
        if len(found) < len(texts):
            raise ValueError("a rollout is there twice")
        return found

    def text(self, rollout: int, n_tokens: int | None) -> Arrays:
        """Return the columns of a whole text, by the names in TEXT_COLUMNS; empty if not known.

        `n_tokens` are those of the index; None where it has not got the text.
        """
        text = self._texts.get(rollout)
        if text is None:
            return {name: np.zeros(0) for name in TEXT_COLUMNS}
        n = len(text["kl"])
        if n_tokens not in (None, n) or len(text["rise"]) != n:
            raise ValueError(f"it has {n} tokens of rollout {rollout}, the index {n_tokens}")
        targets = text["targets"]
        behind = [pair for one in targets for pair in one["behind"]]
        places = [one["token"] for one in targets] + [pair[2] for pair in behind]
        if not all(type(place) is int and 0 <= place < n for place in places):
            raise ValueError(f"a place is outside of rollout {rollout}")
        if len({one["token"] for one in targets}) < len(targets):
            raise ValueError(f"a token of rollout {rollout} is explained twice")
        columns: dict[str, Any] = {
            "kl": _halves(text["kl"], least=0),
            "rise": _halves(text["rise"]),
            "target_token": [one["token"] for one in targets],
            "target_parts": [_real(one[name]) for one in targets for name in TARGET],
            "behind_count": [len(one["behind"]) for one in targets],
            "behind_latent": [self._latent(pair[0]) for pair in behind],
            "behind_value": _halves([pair[1] for pair in behind]),
            "behind_source": [pair[2] for pair in behind],
            "behind_removal": _halves([pair[3] for pair in behind]),
        }
        return {name: np.asarray(values) for name, values in columns.items()}

    def _latent(self, number: Any) -> int:
        if type(number) is not int or not 0 <= number < self.n_features:
            raise ValueError(f"it names feature {number!r}, the index has {self.n_features}")
        return number


def _token(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 1 << 31:
        raise ValueError(f"{number!r} is no token id")
    return number


def _real(value: Any, least: float | None = None, most: float = _LARGEST) -> float:
    """Return a number of a report as it is: no text, no truth value, within what is possible."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    low = -most if least is None else least
    if not low <= value <= most:
        raise ValueError(f"{value!r} is not from {low:g} to {most:g}")
    return float(value)


def _halves(values: Sequence[Any], least: float | None = None) -> npt.NDArray[np.uint16]:
    """Return numbers in two bytes each; None becomes NaN."""
    numbers = [np.nan if v is None else _real(v, least) for v in values]
    return to_half_bits(np.array(numbers, np.float32))


def _require_parents(
    path: Path, manifest: Mapping[str, Any], index: FeatureIndex, source: Path
) -> None:
    """Raise ArtifactError at a report of another SAE, or of another store that the index names."""
    mine, its = index.manifest.get("parents") or {}, manifest.get("parents")
    its = its if isinstance(its, Mapping) else {}
    if its.get("sae") is None or mine.get("sae") != its["sae"]:
        raise ArtifactError(
            f"{path} is of another SAE than {source}, so its features are not these; make both "
            "from the same"
        )
    if manifest["kind"] != "attribution" or "activations" not in mine:
        return
    if mine["activations"] != its.get("activations"):
        raise ArtifactError(
            f"{path} is of another activation store than {source}, so its texts are not these; "
            "make both from the same"
        )
