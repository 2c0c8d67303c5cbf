"""Write feature indexes as JSON of the published schema, and read such files of any tool.

`metadata` has n_features, top_k and, if lorascope wrote the file, the manifest under `lorascope`.
`features` maps each latent's number to its `examples` (activation_value, rollout_idx, token_idx,
token, tokens, target_position, activations) and its `stats` (n_examples, max_activation).
lorascope adds n_alike to the examples, more statistics, `special_examples` with the examples at
special tokens, and the `label` of a feature that has one; the rest of an index is not in the JSON.
Numbers are float32 values written in full, so reading them gives the same bits.

What a file does not contain is unknown in the index, not zero. Rows and token ids are always
unknown; each text gets a negative token id.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
import numpy.typing as npt

from lorascope import runtime
from lorascope.artifact import Identity, Manifest, check_seal, digest_file, read_manifest, seal_file
from lorascope.errors import ArtifactError
from lorascope.features.arrays import KIND, SCHEMA
from lorascope.features.feature import Example
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import labels_beside
from lorascope.features.published_records import (
    PublishedExample,
    PublishedFeature,
    PublishedMetadata,
    PublishedStats,
)
from lorascope.record_json import to_json

log = logging.getLogger(__name__)

_METADATA = ("context_window", "n_tokens", "n_eligible", "n_special", "n_rollouts", "fvu", "l0")
_NAMES = {  # of the same facts in other tools' files
    "model": "base_model",
    "adapter": "adapter_name",
    "lora_path": "adapter_name",
    "sae": "sae_name",
    "model_path": "sae_name",
    "corpus": "dataset",
}
_MAX_FEATURES = 1 << 24  # a larger id is a mistake that would allocate gigabytes
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_STATS = {  # key of `stats` -> field of `FeatureStats`, and of the index after `latent_`
    "max_activation": "max",
    "mean_activation": "mean",
    "std_activation": "std",
    "n_active": "n_active",
    "n_special": "n_special",
    "n_rollouts": "n_rollouts",
}


def to_published(index: FeatureIndex, manifest: Manifest) -> Iterator[str]:
    """Yield the JSON text in `len(index) + 2` pieces, one per feature, dead ones included."""
    content = index.content
    examples = index.n_examples
    special = map(index.token_bytes, index.token_id[index.token_special != 0].tolist())
    metadata = PublishedMetadata(
        lorascope=manifest.to_sealed_json(),
        n_features=len(index),
        top_k=content.get("top_k", int(examples.max(initial=0))),
        **{key: content[key] for key in _METADATA if key in content},
        special_tokens=tuple(sorted({i.decode(errors="replace") for i in special})),
        histogram_edges=tuple(index.latent_histogram_edges.tolist()),
    )
    yield '{"metadata": ' + _json_text(to_json(metadata)) + ',\n"features": {'
    for latent in range(len(index)):
        comma = ",\n" if latent else "\n"
        yield f'{comma}"{latent}": ' + _json_text(to_json(_published_feature(index, latent)))
    yield "\n}}\n"


def write_published(index: FeatureIndex, path: Path, manifest: Manifest) -> None:
    """Write the published JSON, not atomically. The same index gives the same bytes."""
    with (
        path.open("w", encoding="utf-8", newline="\n") as file,
        runtime.progress(len(index) + 2, "JSON", "pieces") as bar,
    ):
        for piece in to_published(index, manifest):
            file.write(piece)
            bar.update()
    seal_file(path)


def _published_feature(index: FeatureIndex, latent: int) -> PublishedFeature:
    known = index.stats(latent)
    return PublishedFeature(
        examples=tuple(map(_published_example, index.examples(latent))),
        special_examples=tuple(map(_published_example, index.examples(latent, "special"))),
        stats=PublishedStats(
            n_examples=known.n_examples,
            **{key: getattr(known, field) for key, field in _STATS.items()},
            histogram=tuple(known.histogram.tolist()) or None,
        ),
        label=index.label(latent),
    )


def _published_example(example: Example) -> PublishedExample:
    return PublishedExample(
        activation_value=example.value,
        rollout_idx=example.rollout,
        token_idx=example.position,
        token=example.tokens[example.target],
        tokens=tuple(example.tokens),
        target_position=example.target,
        activations=tuple(np.asarray(example.activations).tolist()),
        n_alike=example.n_alike,
    )


def _json_text(value: Any) -> str:
    """Return a value as compact JSON text; lone surrogates become U+FFFD."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text if text.isascii() else _well_formed(text)


def read_index(source: Path) -> FeatureIndex:
    """Return the index of a `features.h5` or a features JSON, with the labels next to it.

    The file's suffix says which it is. Raises ArtifactError if it is neither, or if a `features.h5`
    is not as it was written.
    """
    if source.is_dir():
        raise ArtifactError(f"{source} is a folder, expected a features.h5 or a features JSON")
    if source.suffix != ".h5":
        index = read_published(source)
        return replace(index, labels=labels_beside(source, digest_of_index(source)))
    index = FeatureIndex.open(source)
    if damage := check_seal(source):
        raise ArtifactError(f"{source} is damaged ({damage}); run collect again")
    return index


def digest_of_index(source: Path) -> str:
    """Return what other artifacts name an index by: of a file of other tools, its SHA-256."""
    manifest = read_manifest(source)
    return digest_file(source) if manifest is None else manifest.digest


def read_published(path: Path) -> FeatureIndex:
    """Read a JSON of the published schema, written by lorascope or by another tool.

    Examples are sorted by value. The manifest is the one in the file, or a new one with the
    contents of `metadata`. Raises ArtifactError that names the first fault.
    """
    try:
        return _index_of(*_load(path), path)
    except _UnexpectedError as fault:
        raise ArtifactError(
            f"{path} {fault}; expected the features JSON that collect writes"
        ) from None


class _UnexpectedError(Exception):
    """What the published schema does not allow, as the end of a sentence about the file."""


def _index_of(metadata: dict[str, Any], features: dict[str, Any], path: Path) -> FeatureIndex:
    ids = {key: _feature_id(key) for key in features}
    declared = metadata.get("n_features")
    n_features = max([declared if _is_int(declared) else 0, *(i + 1 for i in ids.values())])
    if n_features > _MAX_FEATURES:
        raise _UnexpectedError(f"has {n_features} features, expected at most {_MAX_FEATURES}")
    examples: list[list[Example]] = [[] for _ in range(n_features)]
    at_special: list[list[Example]] = [[] for _ in range(n_features)]
    stats: list[Mapping[str, Any]] = [{} for _ in range(n_features)]
    vocabulary: dict[str, int] = {}  # text -> its id: -1, -2, ... in order of appearance
    for key, record in features.items():
        where = f"feature {key}"
        if not isinstance(record, dict) or not isinstance(record.get("examples"), list):
            raise _UnexpectedError(f"{where} has no list of examples")
        if not isinstance(record.get("special_examples", []), list):
            raise _UnexpectedError(f"{where} has special_examples that are not a list")
        for kind, into in (("example", examples), ("special_example", at_special)):
            for number, example in enumerate(record.get(f"{kind}s", [])):
                name = f"{where}, {kind} {number}"
                into[ids[key]].append(_read_example(name, example, vocabulary))
        if isinstance(record.get("stats"), dict):
            stats[ids[key]] = record["stats"]
    _report_mismatch(path, [*examples, *at_special])
    special = metadata.get("special_tokens")
    special = {str(text) for text in special} if isinstance(special, list) else set()
    return FeatureIndex.from_examples(
        _manifest(metadata),
        examples,
        {token_id: text.encode() for text, token_id in vocabulary.items()},
        at_special=at_special,
        special={token_id for text, token_id in vocabulary.items() if text in special},
        latents=_latents(stats, metadata.get("histogram_edges")),
    )


def _well_formed(text: str) -> str:
    """Replace lone surrogates, which JSON can express and UTF-8 cannot, with U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not a JSON number")

    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=no_constant)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        detail = str(error).splitlines()[0]
        raise ArtifactError(f"{path} is not JSON ({detail}); give a features file") from error
    if not isinstance(data, dict) or not isinstance(data.get("features"), dict):
        raise _UnexpectedError('has no object "features"')
    metadata = data.get("metadata", {})
    if not isinstance(metadata, dict):
        raise _UnexpectedError('has a "metadata" that is not an object')
    return metadata, data["features"]


def _feature_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= 12):
        raise _UnexpectedError(f"names a feature {key[:40]!r}, which is not a number")
    return int(key)


def _read_example(where: str, data: Any, vocabulary: dict[str, int]) -> Example:
    if not isinstance(data, dict):
        raise _UnexpectedError(f"{where} is not an object")
    for key in ("activation_value", "tokens", "activations", "target_position"):
        if key not in data:
            raise _UnexpectedError(f"{where} has no {key}")
    tokens, activations, target = data["tokens"], data["activations"], data["target_position"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise _UnexpectedError(f"{where} has tokens that are not a list of texts")
    if not isinstance(activations, list) or len(activations) != len(tokens):
        count = len(activations) if isinstance(activations, list) else "no"
        raise _UnexpectedError(f"{where} has {len(tokens)} tokens and {count} activations")
    if not _is_int(target) or not 0 <= target < len(tokens):
        raise _UnexpectedError(f"{where} has target_position {target!r} among {len(tokens)} tokens")
    texts = [token if token.isascii() else _well_formed(token) for token in tokens]
    return Example(
        value=_float32(f"{where} has activation_value", data["activation_value"]),
        row=-1,
        rollout=_integer(where, data, "rollout_idx"),
        position=_integer(where, data, "token_idx"),
        target=target,
        token_ids=[vocabulary.setdefault(text, -1 - len(vocabulary)) for text in texts],
        activations=[_float32(f"{where} has activation", value) for value in activations],
        n_alike=_integer(where, data, "n_alike"),
    )


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(where: str, data: Mapping[str, Any], key: str) -> int:
    """Return an integer, or -1 if the file does not have it."""
    value = data.get(key)
    if value is None:
        return -1
    if not _is_int(value) or not -1 <= value < 1 << 31:
        raise _UnexpectedError(f"{where} has {key} {value!r}, which is not an index")
    return value


def _float32(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _UnexpectedError(f"{what} {str(value)[:40]!r}, which is not a number")
    if not abs(value) <= _FLOAT32_MAX:
        raise _UnexpectedError(f"{what} beyond float32")
    return float(value)


def _report_mismatch(path: Path, features: list[list[Example]]) -> None:
    n_different = sum(
        abs(e.value - e.activations[e.target]) > 1e-3 * abs(e.value)
        for examples in features
        for e in examples
    )
    if n_different:
        log.warning(
            "%s: in %d examples activation_value differs from the token's activation; "
            "both are shown unchanged",
            path,
            n_different,
        )


def _manifest(metadata: Mapping[str, Any]) -> Manifest:
    try:
        return replace(Manifest.from_json(metadata.get("lorascope")), files={})
    except ValueError:  # another tool's file
        content = {
            _NAMES.get(k, k): v
            for k, v in metadata.items()
            if isinstance(v, (str, int, float, bool))
        }
        return Identity(kind=KIND, schema=SCHEMA, settings={}, parents={}).manifest(None, content)


def _latents(stats: list[Mapping[str, Any]], edges: Any) -> dict[str, npt.NDArray[Any]]:
    """Return the statistics in the file; a value of the wrong type counts as unknown."""
    latents: dict[str, npt.NDArray[Any]] = {}
    for key, field in _STATS.items():
        values = [record.get(key) for record in stats]
        if key.startswith("n_"):
            known = [v if isinstance(v, int) and 0 <= v < 1 << 62 else -1 for v in values]
            latents[f"latent_{field}"] = np.array(known, dtype=np.int64)
        else:
            real = [float(v) if isinstance(v, (int, float)) else np.nan for v in values]
            with np.errstate(over="ignore"):
                latents[f"latent_{field}"] = np.array(real, dtype=np.float32)
    histogram = [record.get("histogram") for record in stats]
    try:
        bins = np.array(histogram, dtype=np.uint32)
        bounds = np.array(edges, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        return latents
    if bins.ndim == 2 and bins.shape[1] and bounds.shape == (bins.shape[1] + 1,):
        latents["latent_histogram"] = bins
        latents["latent_histogram_edges"] = bounds
    return latents
