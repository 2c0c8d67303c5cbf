"""Make a store and an SAE to collect features from: planted rows in rollouts, and a dictionary.

The rows come from `planted_rows.py`. A rollout has 1,000 to 7,000 tokens, like long reasoning
traces; its text is random words, and all tokens count. lorascope trains the SAE on other rows with
the same directions. A longer store repeats a million rows and multiplies each rollout by its own
factor between 0.9 and 1.1, so that no two rows are equal.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from planted_rows import planted

from lorascope.activations.shards import VOCABULARY, Vocabulary, write_shard
from lorascope.activations.store import KIND, SCHEMA, ActivationStore
from lorascope.artifact import MANIFEST, Manifest, write_manifest
from lorascope.sae.model import SAE, load_sae
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run as train
from lorascope.sites import PROJECTIONS, Site, SiteLayout
from lorascope.stage import require_space
from lorascope.texts.roles import ROLES

TRAINING = 400_000  # tokens
TRAINED = "training"  # the store that the SAE is trained on
REPEATED = 1_000_000
PER_SHARD = 16  # rollouts
SHORTEST, LONGEST = 1000, 7000
_WORDS = 4096


class Setup(NamedTuple):
    """Where store and SAE are, and what is in them."""

    store: ActivationStore
    sae: SAE
    sae_path: Path
    k: int


def make(
    folder: Path,
    n_tokens: int,
    d_sae: int,
    k: int,
    *,
    training: int = TRAINING,
    device: str = "cpu",
) -> Setup:
    """Make a store of `n_tokens` and an SAE of `training` tokens, or find them in the folder."""
    sae_path, collected = folder / f"sae-{d_sae}-{k}", _store(folder, n_tokens)
    layout = layout_of()
    if not (collected / MANIFEST).exists() or not (sae_path / MANIFEST).exists():
        rows = planted(training + n_tokens, layout.d_in, dtype=torch.float16).rows.numpy()
        _write(folder / TRAINED, layout, _rollouts(rows[:training], training, vary=False))
        _write(collected, layout, _rollouts(rows[training:], n_tokens, vary=False))
    config = TrainConfig(
        data_dir=folder / TRAINED,
        output=sae_path,
        expansion_factor=d_sae // layout.d_in,
        k=float(k),
        epochs=1,
        device=device,
    )
    train(config)
    return Setup(ActivationStore.open(collected), load_sae(sae_path), sae_path, k)


def make_long(folder: Path, n_tokens: int) -> ActivationStore:
    """Make a store of many tokens, or find it in the folder."""
    path = _store(folder, n_tokens)
    layout = layout_of()
    if not (path / MANIFEST).exists():
        require_space(folder, 2 * n_tokens * layout.d_in + (1 << 30))
        rows = planted(min(n_tokens, REPEATED), layout.d_in, dtype=torch.float16).rows.numpy()
        _write(path, layout, _rollouts(rows, n_tokens, vary=True))
    return ActivationStore.open(path)


def layout_of() -> SiteLayout:
    """Return 448 columns: rank 1 on seven projections of 64 layers."""
    sites = [Site(layer=i, projection=p, module=f"{i}.{p}") for i in range(64) for p in PROJECTIONS]
    return SiteLayout.from_sites(sites)


def texts(store: ActivationStore) -> list[list[str]]:
    """Return the text of every token, a list a rollout."""
    words = [store.vocabulary[i].decode() for i in range(len(store.vocabulary))]
    bounds = store.rollout_start.tolist()
    ids = store.token_ids.tolist()
    return [[words[i] for i in ids[a:b]] for a, b in itertools.pairwise(bounds)]


def _store(folder: Path, n_tokens: int) -> Path:
    return folder / f"store-{n_tokens}"


def _rollouts(rows: np.ndarray, n_tokens: int, *, vary: bool) -> Iterator[np.ndarray]:
    """Yield rollouts of the rows, which begin again where they end, up to `n_tokens`."""
    rng = np.random.default_rng(0)
    done = at = 0
    while done < n_tokens:
        at %= len(rows)
        length = min(int(rng.integers(SHORTEST, LONGEST)), len(rows) - at, n_tokens - done)
        rollout = rows[at : at + length]
        yield (rollout * np.float16(rng.uniform(0.9, 1.1))) if vary else rollout
        done, at = done + length, at + length


def _write(folder: Path, layout: SiteLayout, rollouts: Iterator[np.ndarray]) -> None:
    """Write a store of these rollouts; nothing is kept in memory but a shard."""
    if (folder / MANIFEST).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    n_rollouts, waiting = 0, []

    def shard() -> None:
        lengths = [len(rollout) for rollout in waiting]
        ids = rng.integers(0, _WORDS, sum(lengths)).astype(np.int32)
        roles = np.full(len(ids), ROLES.index("think"), np.uint8)
        numbers = list(range(n_rollouts - len(waiting), n_rollouts))
        file = folder / f"shard-{numbers[0] // PER_SHARD:05d}.h5"
        write_shard(file, np.concatenate(waiting), ids, roles, lengths, numbers)
        waiting.clear()

    for rollout in rollouts:
        waiting.append(rollout)
        n_rollouts += 1
        if len(waiting) == PER_SHARD:
            shard()
    if waiting:
        shard()
    words = [f" w{i}".encode() for i in range(_WORDS)]
    Vocabulary.from_tokens(words, np.zeros(_WORDS, bool)).save(folder / VOCABULARY)
    manifest = Manifest(
        kind=KIND, schema=SCHEMA, settings={}, parents={}, layout=layout, content={}
    )
    write_manifest(folder, manifest, [file.name for file in folder.glob("*.h5")])
