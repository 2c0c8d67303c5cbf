"""Read a store with an SAE and keep the strongest examples and the statistics of every latent.

1. Cut the store into spans of whole rollouts (`spans`). Encode each span once, and save its counts,
   its strongest firings and a sample of its firings to one file (`accumulators`), so that finished
   work is kept. Any number of processes share the spans.
   Firings at special tokens and template headers are counted and kept apart from those at text.
2. Merge the accumulators in the order of the spans.
3. Add the windows of examples and samples and some whole rollouts (`examples`), and the latents,
   tokens and sites near each latent (`neighbours`).
4. Write `features.h5`, or JSON of the published schema if the output ends in `.json`.

In: activation store, SAE. Out: a feature index.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorascope import runtime
from lorascope.activations.store import ActivationStore, default_name
from lorascope.artifact import Identity, read_manifest
from lorascope.config import Config, option
from lorascope.errors import ConfigError, DatasetError
from lorascope.features.accumulators import Accumulator, histogram_edges, lowest_threshold, scan
from lorascope.features.arrays import KIND, SCHEMA
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import write_published
from lorascope.features.spans import Span, cut_spans
from lorascope.features.topk import Firings
from lorascope.sites import parse_adapter_types
from lorascope.stage import Build, Job, built
from lorascope.texts.roles import ROLES, SPECIAL
from lorascope.texts.tokens import pack_tokens

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

log = logging.getLogger(__name__)

CONTEXT_REACH = 5  # tokens on each side that make up a firing's context


@dataclass(frozen=True, kw_only=True)
class CollectOptions(Config):
    """Options that decide which examples are kept."""

    top_k: int = option(10, help="examples kept per feature", at_least=1)
    context_window: int = option(10, help="tokens shown on each side of an example", at_least=0)
    max_per_rollout: int = option(
        3,
        help="largest number of a feature's examples from one rollout; 0 for no limit",
        at_least=0,
    )
    same_context: Literal["collapse", "keep"] = option(
        "collapse",
        help="a feature's examples with the same token and five tokens on each side: collapse "
        "them into the strongest, or keep all",
    )
    samples: int = option(
        2,
        help="random examples from each fifth of a feature's firings, by value",
        at_least=0,
    )
    rollout_tokens: int = option(
        20_000,
        help="tokens of the rollouts that are kept whole, with the features of every token",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class CollectConfig(CollectOptions):
    """Options of `collect`."""

    sae: Path = option(
        Path("trained_sae_adapters_g-u-d-q-k-v-o.pt"), help="SAE to use", identity=False
    )
    data_dir: Path | None = option(
        None,
        help="activation store to read, a folder or a URL; default: that of the SAE, by name",
        identity=False,
    )
    output: Path | None = option(
        None,
        help="file to write, .h5 or .json; default: sae_features_data_{SAE's name}.json",
        identity=False,
    )
    roles: tuple[str, ...] = option(
        ROLES, help="read only tokens with these roles; special: special tokens, template headers"
    )
    max_rollouts: int | None = option(
        None, help="read only the first rollouts; default: all", at_least=1
    )
    batch_size: int = option(
        2048,
        help="tokens encoded at once; affects speed only",
        identity=False,
        at_least=1,
    )
    num_gpus: int | None = option(
        None, help="GPUs to use, one process each; default: all", identity=False
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace an output of other settings", identity=False)

    def check(self) -> None:
        """Check the output's suffix."""
        super().check()
        if self.output is not None and self.output.suffix not in (".h5", ".json"):
            raise ConfigError(f"--output is {self.output}, expected a .h5 or .json file")


def run(config: CollectConfig) -> Path:
    """Keep the best examples of every latent, and return the path of the feature index.

    The file is `features.h5`, or JSON in the published schema if the output's name ends in .json. A
    finished index of the same settings is kept. Raises ArtifactError if store and SAE do not belong
    together.
    """
    from lorascope.sae.model import load_sae

    data_dir = config.data_dir or _published_store(config.sae)
    store = ActivationStore.open(data_dir)
    sae = load_sae(config.sae, store)
    store = sae.narrow(store)
    out = config.output or Path(f"sae_features_data_{config.sae.stem}.json")
    parents = {"activations": store.digest, "sae": sae.digest}
    identity = Identity(kind=KIND, schema=SCHEMA, settings=config.settings(), parents=parents)

    def make(build: Build) -> None:
        n_rollouts = min(config.max_rollouts or store.n_rollouts, store.n_rollouts)
        n_rows = int(store.rollout_start[n_rollouts])
        spans = cut_spans(store, n_rollouts, sae.d_sae, config.roles)
        if not any(span.read.any() for span in spans):
            raise DatasetError(
                f"{data_dir} has no token to read: none of its {n_rows} tokens has the role "
                f"{' or '.join(config.roles)}; read another store or give other --roles"
            )
        log.info("%d tokens of %d rollouts, %d latents", n_rows, n_rollouts, sae.d_sae)
        on_device = sae.to(runtime.pick_device(config.device, config.num_gpus))
        accumulator = _gather(build, spans, on_device, config)
        if runtime.process_rank() > 0:
            return
        arrays = _arrays(store, spans, on_device, accumulator, config)
        manifest = identity.manifest(store.layout, _content(store, sae, accumulator, config))
        index = FeatureIndex.from_arrays(manifest, arrays)
        name = "features" + out.suffix
        if out.suffix == ".json":
            write_published(index, build.path / name, manifest)
        else:
            index.save(build.path / name)
        build.publish_file(name)
        log.info("%d of %d features fire", manifest.content["n_alive"], sae.d_sae)

    job = Job(runtime.n_workers(config.device, config.num_gpus), "collect", config)
    return built(out, identity, make, overwrite=config.overwrite, job=job)


def _published_store(model_path: Path) -> Path:
    """Return the published name of the store that an SAE was trained on."""
    manifest = read_manifest(model_path)
    if manifest is not None:
        types = manifest.columns.adapter_types
    else:
        _, marker, initials = model_path.stem.rpartition("adapters_")
        types = parse_adapter_types([initials if marker else "all"])
    return Path(default_name(types))


def _gather(build: Build, spans: list[Span], sae: "SAE", config: CollectConfig) -> Accumulator:
    """Scan spans until all have been scanned by some process; rank 0 returns them merged."""
    store = spans[0].store
    per_rollout = config.max_per_rollout or None
    accumulator = Accumulator.empty(sae.d_sae, len(store.vocabulary), config.top_k, per_rollout)
    paths = [build.path / f"accumulator-{i:06d}.safetensors" for i in range(len(spans))]
    own = accumulator.successor()  # of this process: its cut-offs shorten the work on later spans
    bar = runtime.progress(sum(span.n_rows for span in spans), "collect", "tokens")
    scanned_here: set[int] = set()

    def see_finished(work_unit: int) -> None:
        if work_unit not in scanned_here:
            bar.update(spans[work_unit].n_rows)

    with bar:
        for work_unit in runtime.claim_work_units(
            paths, build.path / ".claims", see_finished, lambda: None
        ):
            current = own.successor()
            scanned_here.add(work_unit)
            for n_rows in scan(
                spans[work_unit],
                sae,
                current,
                config.batch_size,
                collapse=config.same_context == "collapse",
                reach=min(CONTEXT_REACH, config.context_window),
            ):
                bar.update(n_rows)
            current.save(paths[work_unit])
            own.merge_kept(current)
    if runtime.process_rank() == 0:
        for path in paths:
            accumulator.load(path, store)
    return accumulator


def _arrays(
    store: ActivationStore,
    spans: list[Span],
    sae: "SAE",
    accumulator: Accumulator,
    config: CollectConfig,
) -> dict[str, Any]:
    """Return all arrays of the index."""
    from lorascope.features import neighbours
    from lorascope.features.examples import (
        count_equal_contexts,
        firing_arrays,
        rollout_arrays,
        sample_arrays,
        window_arrays,
    )

    statistics, reach = accumulator.statistics, min(CONTEXT_REACH, config.context_window)
    examples, special = accumulator.top.sorted(), accumulator.special.sorted()
    n_special = statistics.by_role[:, SPECIAL]
    samples, arrays_of_samples = sample_arrays(store, accumulator.sample, examples, config.samples)
    rows, _ = neighbours.effect_rows(sae)
    near_decoder, near_cosine = neighbours.nearest_rows(rows, statistics.n_active + n_special > 0)
    near_cofiring, near_jaccard = neighbours.cofiring(accumulator.sample, statistics.n_active)
    largest = np.zeros(sae.d_sae, np.float32)
    np.maximum.at(largest, examples.latent, examples.value)
    arrays = {
        "latent_n_active": statistics.n_active,
        "latent_n_special": n_special,
        "latent_max": largest,
        "latent_mean": statistics.mean,
        "latent_std": statistics.std,
        "latent_n_rollouts": statistics.n_rollouts,
        "latent_by_role": statistics.by_role,
        "latent_by_position": statistics.by_position,
        "latent_histogram": statistics.histogram,
        "latent_histogram_edges": histogram_edges(lowest_threshold(sae)),
        "latent_fingerprint": neighbours.fingerprint(rows, sae.layout),
        "near_decoder": near_decoder,
        "near_cosine": near_cosine,
        "near_cofiring": near_cofiring,
        "near_jaccard": near_jaccard,
        **neighbours.ranked_tokens(store, accumulator.sample, accumulator.n_by_token),
        **firing_arrays(store, examples, sae.d_sae, "example"),
        "example_n_alike": count_equal_contexts(examples, spans, reach),
        **arrays_of_samples,
        **firing_arrays(store, special, sae.d_sae, "special"),
        **window_arrays(
            store, sae, Firings.concatenate([examples, samples, special]), config.context_window
        ),
        **rollout_arrays(store, sae, accumulator, config.rollout_tokens, config.roles),
    }
    if sae.stability is not None:
        arrays["latent_stability"] = sae.stability.numpy()
    return {**arrays, **_vocabulary(store, arrays)}


def _vocabulary(store: ActivationStore, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays `token_*` of the tokens that occur in the others."""
    used = np.unique(
        np.concatenate([np.unique(ids) for name, ids in arrays.items() if name.endswith("_id")])
    )
    used = used[used >= 0]
    offset, data = pack_tokens([store.vocabulary[i] for i in used])
    return {
        "token_id": used,
        "token_offset": offset,
        "token_data": data,
        "token_special": store.vocabulary.special[used],
    }


def _content(
    store: ActivationStore, sae: "SAE", accumulator: Accumulator, config: CollectConfig
) -> dict[str, Any]:
    """Return what the manifest records about the result, in addition to the settings."""
    from lorascope.features.neighbours import effect_rows

    report = sae.manifest.content.get("report", {})
    n_active = accumulator.statistics.n_active
    n_special = accumulator.statistics.by_role[:, SPECIAL]
    known = ("adapter_name", "base_model", "dataset")
    return {
        **{key: store.content[key] for key in known if key in store.content},
        "sae_name": config.sae.name,
        "sae_config": sae.manifest.content.get("config", {}),
        "adapter_types": list(store.layout.adapter_types),
        "fvu": report.get("fvu"),
        "l0": report.get("l0"),
        "fvu_text": report.get("text", {}).get("fvu"),
        "l0_text": report.get("text", {}).get("l0"),
        "n_tokens": int(store.rollout_start[len(accumulator.rollouts)]),
        "n_eligible": accumulator.n_eligible,
        "n_special": int(accumulator.n_by_role[SPECIAL]),
        "n_rollouts": len(accumulator.rollouts),
        "n_features": sae.d_sae,
        "n_alive": int((n_active + n_special > 0).sum()),
        "n_template": int((n_special > n_active).sum()),
        "top_k": config.top_k,
        "context_window": config.context_window,
        "n_sampled": accumulator.sample.n,
        "effect_units": effect_rows(sae)[1],
        "roles": list(ROLES),
        "n_by_role": accumulator.n_by_role.tolist(),
        "n_by_position": accumulator.n_by_position.tolist(),
    }
