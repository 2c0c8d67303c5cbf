"""Take an adapter and a dataset through every stage into one folder.

In: adapter, base model, dataset. Out: a folder with `activations/`, `sae/`, `features.h5`,
`dashboard.html` and `summary.json`; with `--effect-texts` also `effects/`, the reports of what the
features do, which the page then shows. Finished stages are skipped, so a re-run continues.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorascope import runtime
from lorascope.activations.generate import GenerateConfig
from lorascope.artifact import read_manifest, write_text
from lorascope.config import flag_of, option
from lorascope.dashboard.render import DashboardConfig
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.collect import CollectConfig, CollectOptions
from lorascope.sae.settings import TrainConfig, TrainOptions
from lorascope.sites import parse_adapter_types
from lorascope.subject.options import SubjectOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunConfig(CollectOptions, TrainOptions, SubjectOptions):
    """Options of `run`: those of the stages, and where the folder stands."""

    adapter_types: tuple[str, ...] = option(
        (), help="projections to keep: names, initials, mlp, attention or all"
    )
    effect_texts: int = option(
        0,
        help="held-out texts on which to measure what each feature does, and whole texts of the "
        "page of which to explain tokens; 0: none. It runs the model once for each feature of each",
    )
    output: Path = option(Path("lorascope-output"), help="folder to make", identity=False)
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace outputs of other settings", identity=False)

    def check(self) -> None:
        """Refuse impossible numbers."""
        super().check()
        self.require("effect_texts", 0)


def run(config: RunConfig) -> Path:
    """Make the folder, or what is missing in it, and return the page."""
    from lorascope.activations import generate
    from lorascope.dashboard import render
    from lorascope.features import collect
    from lorascope.sae import train

    if runtime.world_size() > 1:
        raise ConfigError(
            "run starts the processes it needs; under torchrun use lorascope generate, then run"
        )
    out = config.output
    for name in ("k", "expansion_factor", "lr", "seed"):
        if (n := len(config.values_of(name))) > 1:
            raise ConfigError(
                f"run trains one SAE, {flag_of(name)} has {n} values; "
                "give one here, or all of them to lorascope train"
            )
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file, expected a folder; give another --output")
    _require_room(config)
    store, sae = out / "activations", out / "sae"
    index, page = out / "features.h5", out / "dashboard.html"
    stages: dict[str, Callable[[], Path]] = {
        "generate": lambda: generate.run(GenerateConfig.from_shared(config, output=store)),
        "train": lambda: train.run(
            TrainConfig.from_shared(config, data_dir=store, output=sae, adapter_types=())
        ),
        "collect": lambda: collect.run(
            CollectConfig.from_shared(
                config,
                data_dir=store,
                sae=sae,
                output=index,
                batch_size=2048,
            )
        ),
        **_effects(config),
        "dashboard": lambda: render.run(
            DashboardConfig.from_shared(config, input=index, output=page, effects=_reports(config))
        ),
    }
    seconds: dict[str, float] = {}
    for name, stage in stages.items():
        begun = time.perf_counter()
        stage()
        seconds[name] = round(time.perf_counter() - begun, 2)
    summary = summarize(store, sae, index, page)
    write_text(out / "summary.json", json.dumps({**summary, "seconds": seconds}, indent=1) + "\n")
    log.info("\n%s", table(summary, seconds))
    return page


def _reports(config: RunConfig) -> tuple[Path, ...]:
    """Return the files of the reports of effects, none where they are not asked for."""
    names = ("direct", "ablation", "attribution") if config.effect_texts else ()
    return tuple(config.output / "effects" / f"{name}.json" for name in names)


def _effects(config: RunConfig) -> dict[str, Callable[[], Path]]:
    """Return the stages that make the reports of effects, none where they are not asked for."""
    if not config.effect_texts:
        return {}
    from lorascope.causal import ablate, attribute, direct

    out = config.output
    direct_json, ablation_json, attribution_json = _reports(config)
    given: dict[str, Any] = {
        "data_dir": out / "activations",
        "sae": out / "sae",
        "max_rollouts": config.effect_texts,
        "batch_tokens": None,
    }
    return {
        "direct": lambda: direct.run(
            direct.DirectConfig.from_shared(config, sae=out / "sae", output=direct_json)
        ),
        "ablate": lambda: ablate.run(
            ablate.AblateConfig.from_shared(
                config, output=ablation_json, greedy="none", seed=0, **given
            )
        ),
        "attribute": lambda: attribute.run(
            attribute.AttributeConfig.from_shared(
                config,
                rollouts_of=out / "features.h5",
                output=attribution_json,
                check_rollouts=1,
                **given,
            )
        ),
    }


def _require_room(config: RunConfig) -> None:
    """Raise ConfigError where k is more than the latents will be, before any work is done."""
    from lorascope.subject.adapter import inspect_adapter, ranks_by_projection

    ranks = ranks_by_projection(inspect_adapter(config.lora_path, config.adapter_name))
    types = parse_adapter_types(config.adapter_types) or tuple(ranks)
    if d_in := sum(ranks.get(name, 0) for name in types):
        config.require_enough_latents(d_in)


def summarize(store: Path, sae: Path, index: Path, page: Path) -> dict[str, Any]:
    """Return the numbers that a run ends with, from the manifests of its artifacts."""
    made = [(read_manifest(path) or {})["content"] for path in (store, sae, index)]
    report = made[1]["report"]
    return {
        "rollouts": made[0]["n_rollouts"],
        "tokens": made[0]["n_rows"],
        "columns": made[0]["d_in"],
        "features": made[2]["n_features"],
        "features_alive": made[2]["n_alive"],
        "fvu": report["fvu"],
        "l0": report["l0"],
        "page": page.name,
        "page_bytes": page.stat().st_size,
    }


def table(summary: dict[str, Any], seconds: dict[str, float]) -> str:
    """Return the closing table as text."""
    rows = [
        ("rollouts", f"{summary['rollouts']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        ("columns", f"{summary['columns']:,}"),
        ("features alive", f"{summary['features_alive']:,} of {summary['features']:,}"),
        ("FVU (held out)", f"{summary['fvu']:.4f}"),
        ("L0 (held out)", f"{summary['l0']:.2f}"),
        *((f"seconds, {name}", f"{value:.1f}") for name, value in seconds.items()),
        ("page", f"{summary['page_bytes'] / 1e6:.1f} MB"),
    ]
    return "\n".join(f"  {name:<20} {value:>16}" for name, value in rows)
