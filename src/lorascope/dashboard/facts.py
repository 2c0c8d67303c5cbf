"""What made the page, in words for its header."""

from typing import Any

import numpy as np

from lorascope.features.index import FeatureIndex


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


def _fact(value: Any) -> str | None:
    """Return a value of a manifest for people, or None when it is not a single value."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) and value else None
