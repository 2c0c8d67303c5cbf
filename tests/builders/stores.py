"""Small activation stores of given or random rows."""

import json
from pathlib import Path

import h5py
import numpy as np

from lorascope.activations.shards import VOCABULARY, Vocabulary, write_shard
from lorascope.activations.store import KIND, SCHEMA, ActivationStore
from lorascope.artifact import Manifest, write_manifest
from lorascope.sites import PROJECTIONS, Site, SiteLayout
from lorascope.texts.roles import ROLES


def layout_of(n_layers: int = 2, adapter: str | None = "a" * 64, seed: int = 0) -> SiteLayout:
    """Make a layout of all seven projections with rank 1."""
    rng = np.random.default_rng(seed)
    sites = [
        Site(layer=i, projection=p, module=f"layers.{i}.{p}", scale=2.0, b_norms=(rng.uniform(),))
        for i in range(n_layers)
        for p in PROJECTIONS
    ]
    return SiteLayout.from_sites(sites, adapter)


def write_store(
    folder: Path,
    rows: np.ndarray | None = None,
    *,
    n_rollouts: int = 6,
    length: int = 40,
    layout: SiteLayout | None = None,
    seed: int = 0,
    rollouts_per_shard: int = 4,
    dtype: str = "float32",
    n_special: int = 1,
    token_ids: np.ndarray | None = None,
    roles: np.ndarray | None = None,
) -> ActivationStore:
    """Write a small store of given or random rows, and open it.

    Without `token_ids` (1 to 7) and `roles`, tokens are random and all of the role `think`, but
    for `n_special` special ones at each rollout's beginning.
    """
    layout = layout or layout_of()
    rng = np.random.default_rng(seed)
    if rows is None:
        rows = rng.standard_normal((n_rollouts * length, layout.d_in))
    rows = rows.astype(dtype)
    length = len(rows) // n_rollouts
    folder.mkdir(parents=True)
    words = ["<|end|>", "the", " é", " 7", "\n", " Wait", " wait", " 12"]
    special = np.zeros(len(words), bool)
    special[0] = True
    ids = rng.integers(1, len(words), len(rows)).astype(np.int32)
    if token_ids is not None:
        ids[:] = token_ids
    if roles is None:
        roles = np.full(len(rows), ROLES.index("think"), np.uint8)
    roles = roles.copy()
    for i in range(n_special):
        ids[i::length], roles[i::length] = 0, ROLES.index("special")
    Vocabulary.from_tokens([word.encode() for word in words], special).save(folder / VOCABULARY)
    for first in range(0, n_rollouts, rollouts_per_shard):
        n = min(rollouts_per_shard, n_rollouts - first)
        here = slice(first * length, (first + n) * length)
        write_shard(
            folder / f"shard-{first // rollouts_per_shard:05d}.h5",
            rows[here],
            ids[here],
            roles[here],
            [length] * n,
            list(range(first, first + n)),
        )
    manifest = Manifest(
        kind=KIND,
        schema=SCHEMA,
        settings={},
        parents={},
        layout=layout,
        content={"n_rows": len(rows)},
    )
    write_manifest(folder, manifest, [file.name for file in folder.glob("*.h5")])
    return ActivationStore.open(folder)


def planted_rows(n=1200, seed=0):
    """Rows of 14 columns made of 24 sparse directions; column scales spread over 10^4."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((24, 14))
    fires = (rng.random((n, 24)) < 0.1) * rng.uniform(0.5, 1.5, (n, 24))
    return (fires @ directions) * np.logspace(-2, 2, 14)


def write_published_store(
    folder, types, *, n_layers=3, lengths=((2, 5), (10, 7), (0, 4)), attribute=True
):
    """Write a folder as the published scripts do; values tell rollout, token, layer and type."""
    folder.mkdir(exist_ok=True)
    tokens = {}
    for rollout, n in lengths:
        values = np.zeros((n, n_layers, len(types)), np.float16)
        for t in range(n):
            for layer in range(n_layers):
                for i, name in enumerate(types):
                    values[t, layer, i] = (
                        rollout * 100 + t * 10 + layer + PROJECTIONS.index(name) / 8
                    )
        with h5py.File(folder / f"rollout_{rollout}.h5", "w") as file:
            file.create_dataset("activations", data=values, compression="gzip", compression_opts=1)
            file.attrs.update(
                num_tokens=n, num_layers=n_layers, projections=len(types), rollout_idx=rollout
            )
            if attribute:
                file.attrs["adapter_types"] = list(types)
        tokens[rollout] = ["<|im_start|>", *[f" w{t % 2}" for t in range(1, n)]]
    (folder / "rollout_tokens.json").write_text(json.dumps(tokens, indent=2))
    return folder
