"""Write batches of features as SAEDashboard does, as a folder to import to Neuronpedia.

1. `batch-0.json`, `batch-1.json`, ... have `model_id`, `layer`, `sae_set`, `sae_id_suffix` and
   `features`: 128 features each, without those that have no examples.
2. `skipped_indexes.json` lists the features without examples.
3. `manifest.json` is lorascope's. Importers only read files that begin with `batch-`.

A feature has `frac_nonzero` (its density), the histogram (`freq_hist_data_bar_values` are the
middles of the bins) and `activations`: windows with their `tokens`, `values`, and
`qualifying_token_index`, the index of the example's token. The strongest examples come first, in
the bin that SAEDashboard uses for top activations (`bin_min` and `bin_contains` are -1, `bin_max`
is the largest value). Then come the samples of each fifth of the firings: `bin_min` and `bin_max`
are their smallest and largest value, `bin_contains` is the fifth's share of all tokens.

Fields that do not apply to a dictionary of adapter columns are empty: logits, neuron alignment,
correlated neurons. `layer` is 0, because the dictionary reads all layers. Values have six digits.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.artifact import Build, built, make_manifest
from lorascope.features.feature import Example, Feature
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import json_text
from lorascope.runtime import progress

log = logging.getLogger(__name__)

KIND = "neuronpedia"
SCHEMA = 1
BATCH = 128  # features per file, SAEDashboard's default
SKIPPED = "skipped_indexes.json"
_EMPTY = """
    neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
    correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson
    correlated_features_indices correlated_features_l1 correlated_features_pearson
    neg_str neg_values pos_str pos_values
    logits_hist_data_bar_heights logits_hist_data_bar_values
    decoder_weights_dist vector
""".split()


def export(
    index: FeatureIndex,
    out: Path,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    overwrite: bool,
) -> Path:
    """Make the folder, or find the finished one, and return it. One feature is in memory at a time.

    Raises ArtifactError if the folder exists with other contents and `overwrite` is off.
    """
    alive = np.flatnonzero(index.n_examples > 0).tolist()
    source = _source(index)

    def make(build: Build) -> None:
        names = [SKIPPED]
        skipped = np.flatnonzero(index.n_examples == 0).tolist()
        record = {**source, "layer": str(source["layer"]), "skipped_indexes": skipped}
        (build.path / SKIPPED).write_text(json_text(record) + "\n", encoding="utf-8", newline="\n")
        with progress(len(alive), "export", "features") as bar:
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
        build.publish_directory(manifest, names)

    return built(out, KIND, make, settings=settings, parents=parents, overwrite=overwrite)


def to_batch(index: FeatureIndex, latents: Sequence[int]) -> Iterator[str]:
    """Yield the text of one batch, one feature at a time."""
    head = json_text({**_source(index), "sae_id_suffix": None, "features": []})
    yield head.removesuffix("]}")
    for number, latent in enumerate(latents):
        yield (",\n" if number else "\n") + json_text(to_feature(index, index[latent]))
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
        "frac_nonzero": _six_digits(density),
        "freq_hist_data_bar_values": [_six_digits(value) for value in middles],
        "freq_hist_data_bar_heights": heights,
        "n_prompts_total": n_rollouts,
        "n_tokens_in_prompt": round(n_tokens / n_rollouts) if n_rollouts else 0,
        "dataset": _last_part(content.get("dataset")),
        "activations": list(_activations(feature, density)),
    }


def _source(index: FeatureIndex) -> dict[str, Any]:
    """Return the fields about the dictionary that every file has."""
    content = index.content
    return {
        "model_id": _last_part(content.get("base_model")),
        "layer": 0,
        "sae_set": Path(_last_part(content.get("sae_name"))).stem,
    }


def _activations(feature: Feature, density: float) -> Iterator[dict[str, Any]]:
    largest = max((example.value for example in feature.examples), default=0.0)
    for example in feature.examples:
        yield _activation(example, -1, largest, -1)
    for _, group in groupby(feature.samples, key=lambda sample: sample.quantile):
        samples = list(group)
        values = [sample.value for sample in samples]
        for sample in samples:
            yield _activation(sample, min(values), max(values), density / 5)


def _activation(example: Example, low: float, high: float, share: float) -> dict[str, Any]:
    return {
        "bin_min": _six_digits(low),
        "bin_max": _six_digits(high),
        "bin_contains": _six_digits(share),
        "tokens": example.tokens,
        "values": [_six_digits(float(value)) for value in example.activations],
        "qualifying_token_index": example.target,
    }


def _last_part(name: Any) -> str:
    """Return the last part of a path or of a hub id; "" if there is none."""
    return str(name or "").rstrip("/").rpartition("/")[2]


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")
