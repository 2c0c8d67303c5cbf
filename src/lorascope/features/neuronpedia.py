"""Batches of features as SAEDashboard writes them, for import to Neuronpedia: a folder.

1. `batch-0.json`, `batch-1.json`, ... hold 128 features each that have examples: `model_id`,
   `layer`, `sae_set`, `sae_id_suffix`, `features`.
2. `skipped_indexes.json` names the features without any.
3. `manifest.json` is ours; importers read the names that begin with `batch-`.

A feature has `frac_nonzero` (its density), the histogram as bars (`freq_hist_data_bar_values` are
the middles of the bins, as many as heights) and `activations`: windows with their `tokens`, their
`values`, and `qualifying_token_index`, the token that the example is about. The strongest examples
come first, in the bin that SAEDashboard gives to its top activations (`bin_min` and `bin_contains`
-1, `bin_max` the largest value); then the samples of each fifth of the firings, from `bin_min` to
`bin_max` among the samples, which hold the share `bin_contains` of all tokens.

What a dictionary over the scalars of an adapter has not got stays empty: logits, alignment with
neurons, correlated neurons. `layer` is 0, for it reads all layers. Values have six digits.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.artifact import (
    building,
    is_made,
    make_manifest,
)
from lorascope.features.feature import Example, Feature
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import well_formed
from lorascope.runtime import progress

log = logging.getLogger(__name__)

KIND = "neuronpedia"
SCHEMA = 1
BATCH = 128  # features in a file, as many as SAEDashboard's own default
SKIPPED = "skipped_indexes.json"
_EMPTY = (
    *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values"),
    *("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("decoder_weights_dist", "vector"),
)


def export(
    index: FeatureIndex,
    out: Path,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    overwrite: bool,
) -> Path:
    """Make the folder, or find the finished one, and return it. One feature is in memory at once.

    Raises ArtifactError when something else stands there and `overwrite` is off.
    """
    identity = {"settings": settings, "parents": parents, "overwrite": overwrite}
    if is_made(out, KIND, **identity):
        log.info("%s is already made with these settings", out)
        return out
    alive = np.flatnonzero(index.n_examples > 0).tolist()
    source = _source(index)
    with (
        building(out, KIND, **identity) as build,
        progress(len(alive), "export", "features") as bar,
    ):
        names = [SKIPPED]
        skipped = np.flatnonzero(index.n_examples == 0).tolist()
        record = {**source, "layer": str(source["layer"]), "skipped_indexes": skipped}
        (build.path / SKIPPED).write_text(_text(record) + "\n", encoding="utf-8", newline="\n")
        for number, start in enumerate(range(0, len(alive), BATCH)):
            names.append(f"batch-{number}.json")
            with (build.path / names[-1]).open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(to_batch(index, alive[start : start + BATCH]))
            bar.update(min(BATCH, len(alive) - start))
        manifest = make_manifest(
            KIND,
            SCHEMA,
            settings=settings,
            parents=parents,
            layout=index.manifest.get("layout"),
            content={"n_features": len(index), "n_alive": len(alive)},
        )
        return build.publish_directory(manifest, names)


def to_batch(index: FeatureIndex, latents: Sequence[int]) -> Iterator[str]:
    """Yield the text of one batch, one feature at a time."""
    head = _text({**_source(index), "sae_id_suffix": None, "features": []})
    yield head.removesuffix("]}")
    for number, latent in enumerate(latents):
        yield (",\n" if number else "\n") + _text(to_feature(index, index[latent]))
    yield "\n]}\n"


def to_feature(index: FeatureIndex, feature: Feature) -> dict[str, Any]:
    """Return a feature's record in a batch, as JSON values."""
    content = index.content
    n_rollouts, n_tokens = content.get("n_rollouts") or 0, content.get("n_tokens") or 0
    heights = feature.stats.histogram.tolist()
    edges = index.latent_histogram_edges.astype(float)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist() if heights else []
    density = feature.stats.density or 0.0
    return {
        "feature_index": feature.latent,
        **{name: [] for name in _EMPTY},
        "frac_nonzero": _six(density),
        "freq_hist_data_bar_values": [_six(value) for value in middles],
        "freq_hist_data_bar_heights": heights,
        "n_prompts_total": n_rollouts,
        "n_tokens_in_prompt": round(n_tokens / n_rollouts) if n_rollouts else 0,
        "dataset": _last(content.get("dataset")),
        "activations": list(_activations(feature, density)),
    }


def _source(index: FeatureIndex) -> dict[str, Any]:
    """Return what every file says of the dictionary."""
    content = index.content
    return {
        "model_id": _last(content.get("base_model")),
        "layer": 0,
        "sae_set": Path(_last(content.get("sae_name"))).stem,
    }


def _activations(feature: Feature, density: float) -> Iterator[dict[str, Any]]:
    largest = max((example.value for example in feature.examples), default=0.0)
    for example in feature.examples:
        yield _activation(example, -1, largest, -1)
    fifths = groupby(feature.samples, key=lambda sample: sample.quantile)
    for _, samples in fifths:
        drawn = list(samples)
        values = [sample.value for sample in drawn]
        for sample in drawn:
            yield _activation(sample, min(values), max(values), density / 5)


def _activation(example: Example, low: float, high: float, share: float) -> dict[str, Any]:
    return {
        "bin_min": _six(low),
        "bin_max": _six(high),
        "bin_contains": _six(share),
        "tokens": example.tokens,
        "values": [_six(float(value)) for value in example.activations],
        "qualifying_token_index": example.target,
    }


def _last(name: Any) -> str:
    """Return the last part of a path or of a hub id; "" where nothing is known."""
    return str(name or "").rstrip("/").rpartition("/")[2]


def _six(value: float) -> float:
    return float(f"{value:.6g}")


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text if text.isascii() else well_formed(text)
