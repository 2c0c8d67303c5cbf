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

from lorascope.artifact import digest_of, read_manifest
from lorascope.causal.effects import open_report
from lorascope.dashboard.packing import halved
from lorascope.errors import ArtifactError
from lorascope.features.index import FeatureIndex

KINDS = ("ablation", "direct", "attribution")
SIDES = ("promoted", "suppressed")
_EFFECTS = {  # column of the core -> where an entry of `ablation` has it
    "effect_kl": lambda one: one["kl"],
    "effect_low": lambda one: (one["kl_interval"] or (None, None))[0],
    "effect_high": lambda one: (one["kl_interval"] or (None, None))[1],
    "effect_each": lambda one: one["kl_each"],
    "effect_here": lambda one: one["share_here"],
    "effect_ce": lambda one: one["ce_rise"],
    "effect_random": lambda one: one["kl_random"],
    "effect_fired": lambda one: one["n_fired"],
}
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
            for parent in ("sae", "activations") if kind == "attribution" else ("sae",):
                mine = (index.manifest.get("parents") or {}).get(parent)
                its = manifest["parents"].get(parent)
                if mine != its:
                    what = "SAE" if parent == "sae" else "activation store"
                    raise ArtifactError(
                        f"{path} is of another {what} than {source}, so its features are not "
                        "these; make both from the same"
                    )
            found[kind] = data
        reports = cls(len(index), found)
        for path, kind in zip(paths, found, strict=True):
            try:
                reports._check(kind)
            except _BROKEN as error:
                raise ArtifactError(
                    f"{path} does not hold what a report of kind {kind} does ({error}); make it "
                    "anew"
                ) from error
        return reports

    @staticmethod
    def parents(paths: Sequence[Path]) -> dict[str, str]:
        """Return what a page records of its reports: digests by file name."""
        return {f"effects {path.name}": digest_of(read_manifest(path)) for path in paths}

    def _check(self, kind: str) -> None:
        """Make every column once: whatever is not as promised raises here, not half-way."""
        if kind == "ablation":
            for values in self.effects().values():
                if np.isinf(values).any():
                    raise ValueError("an effect is not finite")
        elif kind == "direct":
            self.shares()
            for side in SIDES:
                self.tokens(side)
        else:
            for rollout in self._texts:
                self.text(rollout, None)

    def about(self) -> dict[str, Any]:
        """Return what the core says of the reports."""
        said: dict[str, Any] = {}
        if "ablation" in self.found and self.found["ablation"].get("features") is not None:
            data = self.found["ablation"]
            said["ablation"] = {
                "n_rollouts": int(data["n_rollouts"]),
                "n_tokens": int(data["n_tokens"]),
                "whole": float(data["without_adapter"]["kl"]),
                "floor": float(data["floor"]["rounding"]),
            }
        if "direct" in self.found:
            said["direct"] = {"n": int(self.found["direct"]["n_tokens"])}
        if "attribution" in self.found:
            data = self.found["attribution"]
            said["attribution"] = {
                "target": str(data["target"]),
                "unit": str(data["unit"]),
                "steps": int(data["steps"]),
                "gap": data["completeness"]["gap"],
                "parts": list(TARGET),
            }
        return said

    def effects(self) -> Arrays:
        """Return what is gone without each feature, a float32 column each; NaN: not measured."""
        entries = self.found.get("ablation", {}).get("features")
        if entries is None:
            return {}
        columns = {name: np.full(self.n_features, np.nan, np.float32) for name in _EFFECTS}
        for one in entries:
            for name, pick in _EFFECTS.items():
                value = pick(one)
                columns[name][self._latent(one["feature"])] = np.nan if value is None else value
        return columns

    def shares(self) -> Arrays:
        """Return the share of each feature's effect that is written directly."""
        if "direct" not in self.found:
            return {}
        share = np.full(self.n_features, np.nan, np.float32)
        for one in self.found["direct"]["features"]:
            share[self._latent(one["feature"])] = one["share"]
        return {"direct_share": share}

    def tokens(self, side: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return token ids (-1: none) and scores of a side, `(feature, n)`."""
        n = int(self.found["direct"]["n_tokens"])
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
        return {int(text["rollout"]): text for text in texts}

    def text(self, rollout: int, n_tokens: int | None) -> Arrays:
        """Return the columns of a whole text, by the names in TEXT_COLUMNS; empty if not known.

        `n_tokens` are those of the index; None checks the report alone.
        """
        text = self._texts.get(rollout)
        if text is None:
            return {name: np.zeros(0) for name in TEXT_COLUMNS}
        n = len(text["kl"])
        if n_tokens not in (None, n) or len(text["rise"]) != n:
            raise ArtifactError(
                f"the attribution has {n} tokens of rollout {rollout}, the feature index "
                f"{n_tokens}; make both from the same store"
            )
        targets = text["targets"]
        behind = [pair for one in targets for pair in one["behind"]]
        places = [one["token"] for one in targets] + [pair[2] for pair in behind]
        if not all(type(place) is int and 0 <= place < n for place in places):
            raise ValueError(f"a place is outside of rollout {rollout}")
        columns: dict[str, Any] = {
            "kl": _halves(text["kl"]),
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


def _real(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite")
    return number


def _halves(values: Sequence[Any]) -> npt.NDArray[np.uint16]:
    """Return numbers in two bytes each; None becomes NaN."""
    return halved(np.array([np.nan if v is None else _real(v) for v in values], np.float32))
