"""Reports of effects as columns of the page, next to those of the feature index.

A page takes at most one report of each kind: `evaluation` (how much of the adapter the SAE
recovers), `ablation` (the effect of removing each feature), `direct` (the tokens that it promotes)
and `attribution` (at each token of the complete rollouts, how far adapter and base differ, what
both predict, and the features behind it). Several attributions of one target become one report.
`causal.report_records` checks each report by itself. Here it is compared with the index: both must
be of the same SAE and, for attributions, of the same store, and every feature, token and position
must exist.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.artifact import Manifest, digest_file
from lorascope.causal.report_records import (
    AblationReport,
    AttributedRollout,
    AttributionReport,
    DirectReport,
    EvaluationReport,
)
from lorascope.causal.study import read_report
from lorascope.errors import ArtifactError
from lorascope.features.index import FeatureIndex

KINDS = (EvaluationReport, AblationReport, DirectReport, AttributionReport)
SIDES = ("promoted", "suppressed")
TARGET = ("adapter", "base", "features", "bias", "unexplained", "special", "other_columns")
TEXT_COLUMNS = {
    "kl": "<b2",  # of each token; empty if the rollout was not attributed
    "rise": "<b2",  # empty too if no token is explained
    "likely_count": "|u1",  # likely tokens of each token's prediction; empty if not reported
    "likely_token": "<u4",  # index into the token table + 1, or 0 for the token itself
    "likely_base": "|u1",  # percent
    "likely_change": "|i1",  # from the base to the adapter
    "target_token": "<u4",
    "target_parts": "<f4",  # of each target, in the order of TARGET
    "behind_count": "<u4",
    "behind_latent": "<u4",
    "behind_value": "<b2",
    "behind_source": "<u4",
    "behind_removal": "<b2",
}
_EFFECTS = {  # column of the page -> field of `FeatureRemoval`
    "effect_kl": "kl",
    "effect_each": "kl_each",
    "effect_here": "share_here",
    "effect_ce": "ce_rise",
    "effect_control": "kl_control",
    "effect_pull": "pull",
    "effect_p": "p",
    "effect_fired": "n_fired",
}
_MOST_TOKENS = 1000  # that the page shows on each side of a feature
_LIKELY = 0.05  # probability from which the page names a token that either model predicts
_DIFFERS = 0.01  # nats; smallest KL of a prediction of which it names them
_COLOURED = 0.001  # nats; assets/attribution.js has the same

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Reports:
    """The reports of a page, each None if it was not given, and the digests of their manifests."""

    n_features: int
    evaluation: EvaluationReport | None = None
    ablation: AblationReport | None = None
    direct: DirectReport | None = None
    attribution: AttributionReport | None = None
    parents: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, paths: Sequence[Path], index: FeatureIndex, source: Path) -> "Reports":
        """Read reports for the page of an index, which was read from `source`.

        Raises ArtifactError at a damaged report, one of another SAE or store, one of a kind that
        the page does not show, and at a second report of the same kind.
        """
        reports: dict[str, Any] = {}
        parents: dict[str, str] = {}
        for path in paths:
            report, manifest = read_report(path, KINDS)
            _require_parents(path, manifest, index, source)
            problem = next(_mismatches(report, index), None)
            if problem is not None:
                raise ArtifactError(
                    f"{path}: {problem}; make the report again, from the SAE and the store of "
                    f"{source}"
                )
            name, earlier = f"effects {report.kind}", reports.get(report.kind)
            if earlier is not None:
                if not isinstance(report, AttributionReport) or earlier.target != report.target:
                    raise ArtifactError(
                        f"{path} is a second report of kind {report.kind}; give only one of them, "
                        "or several attributions of the same --target"
                    )
                report = _joined(earlier, report)
                name += f" {sum(other.startswith(name) for other in parents) + 1}"
            reports[report.kind] = report
            parents[name] = digest_file(path)
        return cls(len(index), **reports, parents=parents)

    def about(self) -> dict[str, Any]:
        """Return what the page says of the reports."""
        facts: dict[str, Any] = {}
        if self.ablation is not None and self.ablation.features is not None:
            facts["ablation"] = {
                "n_rollouts": self.ablation.n_rollouts,
                "n_tokens": self.ablation.n_tokens,
                "whole": self.ablation.without_adapter.kl,
                "floor": self.ablation.floor.rounding,
                "n_judged": sum(one.p is not None for one in self.ablation.features),
            }
        if self.direct is not None:
            facts["direct"] = {"n": self.direct.n_tokens}
        if self.attribution is not None:
            facts["attribution"] = {
                "target": self.attribution.target,
                "unit": self.attribution.unit,
                "steps": self.attribution.steps,
                "gap": self.attribution.completeness.gap,
                "parts": list(TARGET),
                "rollouts": [one.rollout for one in self.attribution.rollouts if one.targets],
            }
        return facts

    def effects(self) -> Arrays:
        """Return what is known of each feature, a float32 column each; NaN: not measured.

        That is the effect of removing it, and the share of its effect that is written directly.
        """
        columns: Arrays = {}
        if self.ablation is not None and self.ablation.features is not None:
            removals = self.ablation.features
            known = {
                name: [getattr(one, key) for one in removals] for name, key in _EFFECTS.items()
            }
            for name, key in (("effect_{}", "kl_interval"), ("effect_excess_{}", "pull_excess")):
                edges = [getattr(one, key) or (None, None) for one in removals]
                known[name.format("low")] = [low for low, _ in edges]
                known[name.format("high")] = [high for _, high in edges]
            whole, _ = self.ablation.nats(self.ablation.without_adapter)
            known["effect_share"] = [
                self.ablation.nats(one)[0] / whole if one.is_removed and whole else None
                for one in removals
            ]
            for name, values in known.items():
                columns[name] = np.full(self.n_features, np.nan, np.float32)
                columns[name][[one.feature for one in removals]] = _floats(values)
        if self.direct is not None:
            columns["direct_share"] = _floats([feature.share for feature in self.direct.features])
        return columns

    def tokens(self, side: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Return token ids (-1: none) and scores of one side, `(feature, n)`."""
        assert self.direct is not None
        ids = np.full((self.n_features, self.direct.n_tokens), -1, np.int32)
        scores = np.zeros(ids.shape, np.float32)
        for latent, feature in enumerate(self.direct.features):
            tokens = getattr(feature, side)
            ids[latent, : len(tokens)] = [token.token_id for token in tokens]
            scores[latent, : len(tokens)] = [token.z for token in tokens]
        return ids, scores

    @cached_property
    def vocabulary(self) -> dict[int, bytes]:
        """The bytes of the tokens that are promoted, suppressed or predicted, by id."""
        named = [one.vocabulary for one in (self.direct, self.attribution) if one is not None]
        return {int(i): bytes.fromhex(raw) for some in named for i, raw in (some or {}).items()}

    @cached_property
    def _rollouts(self) -> dict[int, AttributedRollout]:
        assert self.attribution is not None
        return {rollout.rollout: rollout for rollout in self.attribution.rollouts}

    def text(self, rollout: int) -> Arrays:
        """Return the columns of a complete rollout, by name; empty if it was not attributed.

        `likely_token` has token ids, and `likely_count` says whose they are.
        """
        attributed = self._rollouts.get(rollout)
        if attributed is None:
            return {name: np.zeros(0) for name in TEXT_COLUMNS}
        targets = attributed.targets
        causes = [cause for target in targets for cause in target.behind]
        columns: dict[str, Any] = {
            "kl": _floats(attributed.kl) if targets else _coarse(_floats(attributed.kl)),
            "rise": _floats(attributed.rise if targets else ()),
            **_likely_columns(attributed),
            "target_token": [target.token for target in targets],
            "target_parts": [getattr(target, name) for target in targets for name in TARGET],
            "behind_count": [len(target.behind) for target in targets],
            "behind_latent": [cause.feature for cause in causes],
            "behind_value": _floats([cause.contribution for cause in causes]),
            "behind_source": [cause.source for cause in causes],
            "behind_removal": _floats([cause.removal for cause in causes]),
        }
        return {name: np.asarray(values) for name, values in columns.items()}


def _likely_columns(rollout: AttributedRollout) -> Arrays:
    """Return what both models predict where they differ.

    Tokens below `_LIKELY` are left out, except for the first of each model. Probabilities are
    rounded to percents, so that they take little room.
    """
    likely = rollout.likely
    if likely is None:
        return {name: np.zeros(0) for name in TEXT_COLUMNS if name.startswith("likely")}
    p = np.array([likely.base, likely.adapter])
    owner = np.repeat(np.arange(len(likely.count)), likely.count)
    kept = p.max(axis=0) >= _LIKELY
    for side in p:
        order = np.lexsort((-side, owner))
        kept[order[np.flatnonzero(np.diff(owner[order], prepend=-1))]] = True
    kept &= (_floats(rollout.kl) >= _DIFFERS)[owner]
    base, adapter = np.rint(100 * p[:, kept])
    return {
        "likely_count": np.bincount(owner[kept], minlength=len(likely.count)),
        "likely_token": np.array(likely.token_id, np.int32)[kept],
        "likely_base": base,
        "likely_change": adapter - base,
    }


def _joined(one: AttributionReport, other: AttributionReport) -> AttributionReport:
    """Return the rollouts and explained tokens of both reports as one; the second one's win."""
    rollouts = {rollout.rollout: rollout for rollout in one.rollouts}
    for rollout in other.rollouts:
        earlier = rollouts.get(rollout.rollout, rollout)
        targets = {target.token: target for target in (*earlier.targets, *rollout.targets)}
        rollouts[rollout.rollout] = replace(
            rollout,
            targets=tuple(targets[token] for token in sorted(targets)),
            likely=rollout.likely or earlier.likely,
        )
    gaps = [gap for each in (one, other) if (gap := each.completeness.gap) is not None]
    return replace(
        one,
        completeness=replace(one.completeness, gap=max(gaps, default=None)),
        rollouts=tuple(rollouts.values()),
        vocabulary={**(one.vocabulary or {}), **(other.vocabulary or {})},
    )


def _coarse(kl: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return KL with four significant bits, and 0 where the page has no colour: it takes less room.

    The error is at most 1/16 of the number, or `_COLOURED`.
    """
    mantissa, exponent = np.frexp(kl)
    return np.where(kl < _COLOURED, 0, np.ldexp(np.rint(16 * mantissa) / 16, exponent))


def _floats(values: Sequence[float | None]) -> npt.NDArray[np.float32]:
    """Return numbers as float32; None becomes NaN."""
    return np.array(values, np.float64).astype(np.float32)


def _mismatches(report: Any, index: FeatureIndex) -> Iterator[str]:
    """Yield what a report says that the index contradicts."""
    if isinstance(report, AblationReport):
        latents = [removal.feature for removal in report.features or ()]
        yield from _unknown_features(latents, index)
        if len(set(latents)) < len(latents):
            yield "a feature is there twice"
    elif isinstance(report, DirectReport):
        yield from _direct_mismatches(report, index)
    elif isinstance(report, EvaluationReport):
        if missing := {"sae", "constant"} - report.faithfulness.runs.keys():
            yield f"it lacks the run {min(missing)}"
    else:
        yield from _attribution_mismatches(report, index)


def _unknown_features(latents: Sequence[int], index: FeatureIndex) -> Iterator[str]:
    if max(latents, default=-1) >= len(index):
        yield f"it names feature {max(latents)}, the index has {len(index)}"


def _direct_mismatches(report: DirectReport, index: FeatureIndex) -> Iterator[str]:
    if [feature.feature for feature in report.features] != list(range(len(index))):
        yield f"it has {len(report.features)} features, the index has {len(index)}"
    if not 1 <= report.n_tokens <= _MOST_TOKENS:
        yield f"n_tokens is {report.n_tokens}, expected 1 to {_MOST_TOKENS}"
    yield from _vocabulary_mismatches(report.vocabulary, index)
    known = {int(key) for key in report.vocabulary}
    for feature in report.features:
        for tokens in (feature.promoted, feature.suppressed):
            if len(tokens) > report.n_tokens:
                yield (
                    f"feature {feature.feature} names {len(tokens)} tokens, expected at most "
                    f"{report.n_tokens}"
                )
            if not known.issuperset(token.token_id for token in tokens):
                yield f"feature {feature.feature} names a token that is not in its vocabulary"


def _vocabulary_mismatches(vocabulary: Mapping[str, str], index: FeatureIndex) -> Iterator[str]:
    for key, raw in vocabulary.items():
        if not re.fullmatch("[0-9]{1,10}", key) or not re.fullmatch("(?:[0-9a-f]{2})*", raw):
            yield f"vocabulary has {key!a}: {raw[:20]!a}, expected a token id and hexadecimal bytes"
        elif int(key) in index.token_id and index.token_bytes(int(key)) != bytes.fromhex(raw):
            yield f"token {key} is another one in the index"


def _attribution_mismatches(report: AttributionReport, index: FeatureIndex) -> Iterator[str]:
    lengths = dict(
        zip(index.text_rollout.tolist(), np.diff(index.text_offset).tolist(), strict=True)
    )
    rollouts = [rollout.rollout for rollout in report.rollouts]
    if len(set(rollouts)) < len(rollouts):
        yield "a rollout is there twice"
    vocabulary = report.vocabulary or {}
    yield from _vocabulary_mismatches(vocabulary, index)
    known = {int(key) for key in vocabulary}
    for rollout in report.rollouts:
        name, n = f"rollout {rollout.rollout}", len(rollout.kl)
        if {n, len(rollout.rise), lengths.get(rollout.rollout, n)} != {n}:
            yield f"it has {n} tokens of {name}, the index has {lengths.get(rollout.rollout)}"
        tokens = [target.token for target in rollout.targets]
        causes = [cause for target in rollout.targets for cause in target.behind]
        if max([*tokens, *(cause.source for cause in causes)], default=-1) >= n:
            yield f"a position is outside of {name}, which has {n} tokens"
        if len(set(tokens)) < len(tokens):
            yield f"a token of {name} is explained twice"
        yield from _unknown_features([cause.feature for cause in causes], index)
        if (likely := rollout.likely) is None:
            continue
        sizes = {len(likely.token_id), len(likely.base), len(likely.adapter), sum(likely.count)}
        if len(likely.count) != n or len(sizes) > 1:
            yield f"likely tokens of {name} do not fit its {n} tokens"
        if not known.issuperset(likely.token_id):
            yield f"{name} has a likely token that is not in the vocabulary"


def _require_parents(path: Path, manifest: Manifest, index: FeatureIndex, source: Path) -> None:
    """Raise ArtifactError at a report of another SAE, or of another store that the index names."""
    of_index, of_report = index.manifest.parents, manifest.parents
    if of_report.get("sae") is None or of_index.get("sae") != of_report["sae"]:
        raise ArtifactError(
            f"{path} was made with another SAE than {source}, so feature numbers do not match; "
            "make both from the same SAE"
        )
    if manifest.kind != AttributionReport.kind or "activations" not in of_index:
        return
    if of_index["activations"] != of_report.get("activations"):
        raise ArtifactError(
            f"{path} is of another activation store than {source}, so its rollouts are others; "
            "make both from the same store"
        )
