"""The labels of features: `labels.json`, which stands beside `features.h5`.

`metadata.lorascope` is the manifest, `features` maps each latent's number to its label. The index
whose features they are is a parent. The page exports labels by hand as `hand-labels.json`.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from lorascope.artifact import Manifest, check_seal, open_manifest, read_manifest, sealed_json
from lorascope.errors import ArtifactError
from lorascope.record_json import Range, from_json, to_json
from lorascope.texts.tokens import visible

log = logging.getLogger(__name__)

KIND = "labels"
SCHEMA = 2  # 1 had no scores of strengths and of removals
FILE = "labels.json"
Kind = Literal["token", "context", "position", "output", "unclear"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BY_HAND, BY_RULE = "person", "rule"
BY_HAND_FILE = "hand-labels.json"
_BY_HAND_FORMAT = "lorascope labels 1"
_LONGEST_NAME, _LONGEST_NOTE = 200, 20_000  # characters of a label by hand

Share = Annotated[float, Range(0, 1)]
Gini = Annotated[float, Range(-1, 1)]
Count = Annotated[int, Range(0)]


@dataclass(frozen=True, kw_only=True)
class RulePart:
    """One condition of a rule: a clue by name, or a stream and values of which it has one."""

    of: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Output:
    """The tokens that the feature promotes, and how well they tell where it fires.

    `share` is the share of its effect that goes to the output directly. `balanced_accuracy` is of
    the guess that it fires where one of these tokens comes next, over all tokens of the corpus.
    """

    tokens: tuple[str, ...]
    share: Share
    balanced_accuracy: Share | None
    interval: tuple[Share, Share] | None


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a feature is, in words, and how well these words tell where it fires.

    `author` is `rule`, `person` or the name of a model. All scores are of held-out rollouts and of
    what the author wrote; None where they are undefined or nobody measured them. `same_token` and
    `near` are the balanced accuracies against hard cases alone: the same tokens where the feature
    does not fire, and tokens at which its neighbours fire. `shuffled` is the mean balanced accuracy
    of other features' rules on this feature. `n_fired` counts its firings there. A model's label is
    scored by another model, `judge`, on excerpts that are half firings; `picked_output` says
    whether it found the promoted tokens among those of other features.

    `clarity` and `purity` say how well the feature's values rank the tokens that a rule covers;
    `covered` is the share of these, which is the purity of a random order. `picked_effect` is how
    often the label finds the feature's removal among five, `picked_effect_shuffled` how often
    labels of others do; a judge picks once.
    """

    name: str
    sentence: str
    kind: Kind
    category: str
    author: str
    balanced_accuracy: Share | None
    interval: tuple[Share, Share] | None
    precision: Share | None
    recall: Share | None
    same_token: Share | None
    near: Share | None
    shuffled: Share | None
    n_fired: Count
    rule: tuple[tuple[RulePart, ...], ...]
    output: Output | None = None
    judge: str | None = None
    picked_output: bool | None = None
    clarity: Gini | None = None
    clarity_interval: tuple[Gini, Gini] | None = None
    purity: Share | None = None
    purity_interval: tuple[Share, Share] | None = None
    covered: Share | None = None
    picked_effect: Share | None = None
    picked_effect_shuffled: Share | None = None


def rounded(value: Any) -> Any:
    """Return a number, or a label or a tuple with its numbers, with four decimals."""
    if isinstance(value, Label | Output):
        return replace(value, **{name: rounded(part) for name, part in vars(value).items()})
    if isinstance(value, tuple):
        return tuple(map(rounded, value))
    return round(value, 4) if isinstance(value, float) else value


@dataclass(frozen=True)
class Labels:
    """Labels by latent, and the manifest of their file."""

    features: Mapping[int, Label]
    manifest: Manifest


@dataclass(frozen=True)
class LabelFile:
    """The labels of features, by the feature's number. A feature that is missing has none."""

    features: Mapping[str, Label]


def write_labels(path: Path, features: Mapping[int, Label], manifest: Manifest) -> None:
    """Write the file, sealed, not atomically."""
    labels = {str(latent): to_json(features[latent]) for latent in sorted(features)}
    path.write_text(sealed_json(manifest, {"features": labels}), encoding="utf-8")


def read_labels(path: Path) -> Labels:
    """Return the labels in a file.

    Raises ArtifactError if it is not one of labels, was changed, or holds what no label may.
    """
    by_hand = f'"{_BY_HAND_FORMAT}"'.encode()
    if read_manifest(path) is None and path.is_file() and by_hand in path.read_bytes()[:100]:
        raise ArtifactError(
            f"{path} holds labels that the page exported, expected {FILE}; run lorascope label "
            f"--by-hand {path}, and give the {FILE} that it writes"
        )
    manifest = open_manifest(path, KIND, SCHEMA)
    if damage := check_seal(path):
        raise ArtifactError(f"{path} is damaged ({damage}); run lorascope label again")
    data = json.loads(path.read_text(encoding="utf-8"))
    data.pop("metadata", None)
    features = from_json(LabelFile, data, str(path)).features
    n_features = manifest.content.get("n_features")
    for key, label in features.items():
        is_number = key.isascii() and key.isdecimal() and len(key) < 12
        if not (is_number and isinstance(n_features, int)):
            raise _damaged(path, f"names a feature {key[:40]!r}, which is not a number")
        if str(int(key)) != key or int(key) >= n_features:
            raise _damaged(path, f"has a label of feature {key} of {n_features}")
        if fault := next(_faults(label), None):
            raise _damaged(path, f"has a label of feature {key} {fault}")
    return Labels({int(key): label for key, label in features.items()}, manifest)


def labels_beside(source: Path, digest: str) -> Labels | None:
    """Return the labels next to an index, if they are of the index with this digest."""
    path = source.with_name(FILE)
    manifest = read_manifest(path) if path.is_file() else None
    if manifest is None or manifest.kind != KIND:
        return None
    if manifest.parents.get("features") != digest:
        log.warning("%s has labels of another index than %s: they are not shown", path, source)
        return None
    return read_labels(path)


class HandLabel(NamedTuple):
    """What a person wrote of a feature."""

    label: str
    note: str


def read_by_hand(path: Path, sae_digest: str, n_features: int) -> dict[int, HandLabel]:
    """Return what people wrote of features, from the file that the page exports.

    Raises ArtifactError if it is another file, or of another SAE.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _BY_HAND_FORMAT:
            raise ValueError("another format")
        items = [(key, entry) for key, entry in data["features"].items() if isinstance(entry, dict)]
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} has no labels by hand; give a file that the page wrote with Export labels"
        ) from error
    if data.get("sae") != sae_digest:
        raise ArtifactError(
            f"{path} has labels of another SAE ({str(data.get('sae'))[:12]}, expected "
            f"{sae_digest[:12]}), whose features have other numbers; give the labels of this one"
        )
    labels: dict[int, HandLabel] = {}
    for key, entry in items:
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < n_features):
            raise ArtifactError(
                f"{path} has a label of feature {visible(key[:40])}, the SAE has {n_features}; "
                "give the labels of this SAE"
            )
        label, note = (
            text if isinstance(text := entry.get(name), str) else "" for name in ("label", "note")
        )
        if label[:_LONGEST_NAME].strip():
            labels[int(key)] = HandLabel(label[:_LONGEST_NAME], note[:_LONGEST_NOTE])
    return labels


def with_hand_labels(
    labels: Mapping[int, Label], by_hand: Mapping[int, HandLabel]
) -> dict[int, Label]:
    """Return the labels, replaced by those by hand. Nobody measured these: they have no scores."""
    scores = "balanced_accuracy interval precision recall same_token near shuffled".split()
    unknown: dict[str, Any] = dict.fromkeys(scores)
    merged = dict(labels)
    for latent, hand in by_hand.items():
        name, before = " ".join(visible(hand.label).split()), labels.get(latent)
        merged[latent] = Label(
            name=name,
            sentence=visible(hand.note) or name,
            kind="context" if before is None or before.kind == "unclear" else before.kind,
            category="mixed" if before is None else before.category,
            author=BY_HAND,
            n_fired=0 if before is None else before.n_fired,
            rule=(),
            output=None if before is None else before.output,
            **unknown,
        )
    return merged


def _faults(label: Label) -> Iterator[str]:
    if not label.name or len(label.name.splitlines()) > 1:
        yield "whose name is not one line"
    scores = [
        (label.balanced_accuracy, label.interval),
        (label.clarity, label.clarity_interval),
        (label.purity, label.purity_interval),
    ]
    if label.output is not None:
        scores.append((label.output.balanced_accuracy, label.output.interval))
    for score, interval in scores:
        if (interval is None) != (score is None):
            yield "with a score that lacks its interval, or an interval without a score"
        if interval and score is not None and not interval[0] <= score <= interval[1]:
            yield "whose score is outside its interval"


def _damaged(path: Path, fault: str) -> ArtifactError:
    return ArtifactError(f"{path} {fault}; run lorascope label again")
