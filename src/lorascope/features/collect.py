"""Read a store with an SAE and keep the best examples of every latent.

1. Scan: encode the rows in order; count, sum and histogram every latent's firings on eligible
   tokens, and keep its `top_k` strongest.
2. Windows: encode once more the rows around the examples, and look up each example's latent there.
   A row's code depends on nothing but the row, so these are the values that were scanned.
3. Write `features.h5`, or JSON in the published schema when the output's name ends so.

In: activation store, SAE. Out: a feature index.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorascope import runtime
from lorascope.activations.generate import default_name
from lorascope.activations.store import ActivationStore
from lorascope.artifact import building, is_made, make_manifest, read_manifest
from lorascope.config import Config, option
from lorascope.errors import ConfigError, DatasetError
from lorascope.features.arrays import KIND, SCHEMA
from lorascope.features.display import pack_tokens
from lorascope.features.export import write_published
from lorascope.features.index import FeatureIndex
from lorascope.features.topk import TopExamples
from lorascope.sites import SiteLayout, parse_adapter_types

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

log = logging.getLogger(__name__)

N_BINS = 40  # four to an octave, from the threshold up: a factor of 1,024


@dataclass(frozen=True, kw_only=True)
class CollectOptions(Config):
    """Options that say which examples are kept."""

    top_k: int = option(10, help="examples kept for each feature")
    context_window: int = option(10, help="tokens shown on each side of an example")

    def check(self) -> None:
        """Refuse impossible numbers."""
        super().check()
        self.require("top_k", 1)
        self.require("context_window", 0)


@dataclass(frozen=True, kw_only=True)
class CollectConfig(CollectOptions):
    """Options of `collect`."""

    model_path: Path = option(
        Path("trained_sae_adapters_g-u-d-q-k-v-o.pt"), help="SAE to read with", identity=False
    )
    data_dir: Path | None = option(
        None,
        help="activation store to read; default: the published name for the SAE's adapter types",
        identity=False,
    )
    output_path: Path | None = option(
        None,
        help="file to make, .h5 or .json; default: sae_features_data_{SAE's name}.json",
        identity=False,
    )
    max_rollouts: int | None = option(None, help="rollouts to read from the start; default: all")
    batch_size: int = option(
        2048, help="tokens encoded at once; changes speed only", identity=False
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace an output of other settings", identity=False)

    def check(self) -> None:
        """Refuse impossible numbers and an output that is neither kind of file."""
        super().check()
        self.require("max_rollouts", 1)
        self.require("batch_size", 1)
        if self.output_path is not None and self.output_path.suffix not in (".h5", ".json"):
            raise ConfigError(f"--output-path is {self.output_path}, expected a .h5 or .json file")


def run(config: CollectConfig) -> Path:
    """Make a feature index, or find the finished one, and return its file."""
    from lorascope.sae.model import load_sae

    data_dir = config.data_dir or _published_store(config.model_path)
    store = ActivationStore.open(data_dir)
    sae = load_sae(config.model_path, store)
    store = sae.narrow(store)
    out = config.output_path or Path(f"sae_features_data_{config.model_path.stem}.json")
    settings = config.settings()
    parents = {"activations": store.digest, "sae": sae.digest}
    if is_made(out, KIND, settings=settings, parents=parents, overwrite=config.overwrite):
        log.info("%s is already made with these settings", out)
        return out
    n_rollouts = min(config.max_rollouts or store.n_rollouts, store.n_rollouts)
    n_rows = int(store.rollout_start[n_rollouts])
    n_eligible = int(store.eligible[:n_rows].sum())
    if not n_eligible:
        raise DatasetError(f"{data_dir} has no token that counts: all {n_rows} are special")
    log.info("%d tokens of %d rollouts, %d latents", n_rows, n_rollouts, sae.d_sae)
    sae = sae.to(runtime.pick_device(config.device))
    with building(
        out, KIND, settings=settings, parents=parents, overwrite=config.overwrite
    ) as build:
        top = TopExamples(sae.d_sae, config.top_k)
        latents = _scan(store, sae, n_rows, config.batch_size, top)
        examples = _with_windows(store, sae, top, config)
        report = sae.manifest["content"].get("report", {})
        manifest = make_manifest(
            KIND,
            SCHEMA,
            settings=settings,
            parents=parents,
            layout=store.layout.to_json(),
            content={
                **{
                    key: store.content[key]
                    for key in ("adapter_name", "base_model", "dataset")
                    if key in store.content
                },
                "sae_name": config.model_path.name,
                "sae_config": sae.manifest["content"].get("config", {}),
                "adapter_types": list(store.layout.adapter_types),
                "fvu": report.get("fvu"),
                "l0": report.get("l0"),
                "n_tokens": n_rows,
                "n_eligible": n_eligible,
                "n_rollouts": n_rollouts,
                "n_features": sae.d_sae,
                "n_alive": int((latents["latent_n_active"] > 0).sum()),
                "top_k": config.top_k,
                "context_window": config.context_window,
            },
        )
        index = FeatureIndex.of(manifest, {**latents, **examples})
        if out.suffix == ".json":
            write_published(index, build.path / "features.json", index.manifest)
            build.publish_file("features.json")
        else:
            index.save(build.path / "features.h5")
            build.publish_file("features.h5")
    log.info("%d of %d features fire", manifest["content"]["n_alive"], sae.d_sae)
    return out


def _published_store(model_path: Path) -> Path:
    """Return the published name of the store that an SAE was trained on, by its own name."""
    manifest = read_manifest(model_path)
    if manifest is not None:
        types = SiteLayout.from_json(manifest["layout"]).adapter_types
    else:
        _, found, initials = model_path.stem.rpartition("adapters_")
        types = parse_adapter_types([initials if found else "all"])
    return Path(default_name(types))


def _scan(
    store: ActivationStore, sae: "SAE", n_rows: int, batch_size: int, top: TopExamples
) -> dict[str, npt.NDArray[Any]]:
    """Encode rows `[0, n_rows)`, feed `top`, and return the arrays of `latent_*`."""
    d_sae = sae.d_sae
    n_active = np.zeros(d_sae, np.int64)
    n_in_rollouts = np.zeros(d_sae, np.int64)
    last_rollout = np.full(d_sae, -1, np.int64)
    sums = np.zeros((2, d_sae))
    largest = np.zeros(d_sae, np.float32)
    edges = _edges(sae)
    histogram = np.zeros(d_sae * N_BINS, np.int64)
    eligible = store.eligible
    with runtime.progress(n_rows, "collect", "tokens") as bar:
        for start in range(0, n_rows, batch_size):
            stop = min(start + batch_size, n_rows)
            rows, latents, values = _encode(sae, store.rows(start, stop))
            rows += start
            counts = eligible[rows]
            rows, latents, values = rows[counts], latents[counts], values[counts]
            top.add(latents, values, rows)
            n_active += np.bincount(latents, minlength=d_sae)
            sums[0] += np.bincount(latents, values, minlength=d_sae)
            sums[1] += np.bincount(latents, values.astype(np.float64) ** 2, minlength=d_sae)
            np.maximum.at(largest, latents, values)
            bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, N_BINS - 1)
            histogram += np.bincount(latents * N_BINS + bins, minlength=d_sae * N_BINS)
            pairs = np.unique(store.rollout_of(rows) * d_sae + latents)
            rollouts, fired = np.divmod(pairs, d_sae)
            n_in_rollouts += np.bincount(fired[rollouts != last_rollout[fired]], minlength=d_sae)
            np.maximum.at(last_rollout, fired, rollouts)
            bar.update(stop - start)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums[0] / n_active
        deviation = np.sqrt(np.maximum(sums[1] / n_active - mean**2, 0))
    return {
        "latent_n_active": n_active,
        "latent_max": largest,
        "latent_mean": np.nan_to_num(mean).astype(np.float32),
        "latent_std": np.nan_to_num(deviation).astype(np.float32),
        "latent_n_rollouts": n_in_rollouts,
        "latent_histogram": histogram.reshape(d_sae, N_BINS).astype(np.uint32),
        "latent_histogram_edges": edges,
    }


def _with_windows(
    store: ActivationStore, sae: "SAE", top: TopExamples, config: CollectConfig
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of `example_*`, `window_*` and `token_*`."""
    offset, value, row = top.sorted()
    rollout = store.rollout_of(row)
    begin = np.maximum(row - config.context_window, store.rollout_start[rollout])
    end = np.minimum(row + config.context_window + 1, store.rollout_start[rollout + 1])
    window_offset = np.concatenate([[0], np.cumsum(end - begin)]).astype(np.int64)
    n_pairs = int(window_offset[-1])
    owner = np.repeat(np.arange(len(row)), end - begin)
    rows = np.arange(n_pairs) - window_offset[owner] + begin[owner]  # row of each window token
    latents = np.repeat(np.repeat(np.arange(sae.d_sae), np.diff(offset)), end - begin)
    activation = np.zeros(n_pairs, np.float32)
    order = np.argsort(rows, kind="stable")
    needed = np.unique(rows)
    with runtime.progress(len(needed), "contexts", "tokens") as bar:
        for start in range(0, len(needed), config.batch_size):
            chunk = needed[start : start + config.batch_size]
            local, fired, values = _encode(sae, store.take(chunk))
            first, last = np.searchsorted(rows, [chunk[0], chunk[-1] + 1], sorter=order)
            here = order[first:last]
            wanted = np.searchsorted(chunk, rows[here]) * sae.d_sae + latents[here]
            known = local * sae.d_sae + fired  # ascending: encode goes row by row, latent by latent
            at = np.minimum(np.searchsorted(known, wanted), max(len(known) - 1, 0))
            if len(known):
                activation[here] = np.where(known[at] == wanted, values[at], 0)
            bar.update(len(chunk))
    token_ids = store.token_ids[rows]
    used = np.unique(token_ids)
    token_offset, token_data = pack_tokens([store.vocabulary[i] for i in used])
    return {
        "example_offset": offset,
        "example_value": value,
        "example_row": row,
        "example_rollout": store.rollout_id[rollout],
        "example_position": (row - store.rollout_start[rollout]).astype(np.int32),
        "window_offset": window_offset,
        "window_target": (row - begin).astype(np.int32),
        "window_token_id": token_ids,
        "window_activation": activation,
        "token_id": used,
        "token_offset": token_offset,
        "token_data": token_data,
        "token_special": store.vocabulary.special[used].astype(np.uint8),
    }


def _encode(
    sae: "SAE", rows: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return row index, latent and value of every firing, row by row, latents ascending."""
    import torch

    code = sae.encode(torch.from_numpy(np.array(rows)).to(sae.b_enc.device))
    counts = np.diff(code.offsets.cpu().numpy())
    index = np.repeat(np.arange(len(counts)), counts)
    return index, code.latents.cpu().numpy(), code.values.cpu().numpy()


def _edges(sae: "SAE") -> npt.NDArray[np.float32]:
    """Return the histogram's edges: from the threshold up, four bins to an octave."""
    assert sae.threshold is not None, "load_sae calibrates it"
    lowest = max(float(sae.threshold.min()), 1e-6)
    return (lowest * 2.0 ** (np.arange(N_BINS + 1) / 4)).astype(np.float32)
