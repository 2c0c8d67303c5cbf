"""Run every stage on an adapter and a dataset, into one folder.

In: adapter, base model, dataset. Out: a folder with `activations/`, `sae/`, `evaluation.json`,
`features.h5`, `labels.json`, `dashboard.html`, `report.json` and `report.md`, and `summary.json`.
`effects/` has the reports of what the features do, unless `--depth quick` leaves them out or every
`B` of the adapter is zero. Finished stages are skipped, so running the same command again continues
an interrupted run. A report that cannot be made, or does not fit in memory, is named in the log and
in `summary.json`, and the page is made without it. Labels are remade if the index or the reports
change.
"""

import json
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lorascope import runtime
from lorascope.activations import generate
from lorascope.activations.generate import GenerateConfig
from lorascope.artifact import read_manifest, write_text
from lorascope.causal.effect_options import EffectOptions, EvaluateConfig
from lorascope.config import Config, option
from lorascope.dashboard import render, report
from lorascope.dashboard.notebook import Page
from lorascope.dashboard.overview import Overview
from lorascope.dashboard.render import DashboardConfig
from lorascope.dashboard.report import ReportConfig
from lorascope.depth import RUNS_OF_EVALUATION, DepthOptions, effect_runs, fit, noted
from lorascope.errors import ArtifactError, ConfigError, LorascopeError, first_line
from lorascope.features import collect
from lorascope.features.collect import CollectConfig, CollectOptions
from lorascope.features.label_file import FILE as LABELS
from lorascope.labels import label
from lorascope.labels.label import LabelConfig, LabelOptions
from lorascope.record_json import to_json
from lorascope.run_summary import SUMMARY, as_table, summarize
from lorascope.sae.settings import TrainConfig, TrainOptions
from lorascope.sites import parse_adapter_types
from lorascope.subject.adapter import inspect_adapter, lora_tensors, ranks_by_projection
from lorascope.subject.options import SubjectOptions

if TYPE_CHECKING:
    import torch

    from lorascope.subject.base import Base

log = logging.getLogger(__name__)

_KINDS = ("evaluation", "ablation", "attribution")
_N_ANSWERS = 4
_EFFECTS = ("direct", "ablate", "attribute")  # stages that measure what features do
_OPTIONAL = ("evaluate", *_EFFECTS)  # stages that make a report for the page


@dataclass(frozen=True, kw_only=True)
class RunConfig(DepthOptions, LabelOptions, CollectOptions, TrainOptions, SubjectOptions):
    """Options of `run`: those of the stages, and the folder."""

    adapter_types: tuple[str, ...] = option(
        (), help="projections to keep: names, initials, mlp, attention or all"
    )
    output: Path = option(Path("lorascope-output"), help="folder to write", identity=False)
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace outputs of other settings", identity=False)


def run(config: RunConfig) -> Page:
    """Run every stage that is not finished yet, and return the page's path.

    A notebook shows the path with the first sentences of the report; `lorascope.show` shows the
    page.
    """
    if runtime.world_size() > 1:
        raise ConfigError(
            "lorascope run cannot be started by torchrun; start lorascope generate with it, then "
            "lorascope run without"
        )
    config.require_one_sae("run")
    out = config.output
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file, expected a folder; give another --output")
    device = runtime.pick_device(config.device)
    d_in, n_sites = _check_columns(config, device)
    seconds: dict[str, float] = {}
    stages = _stages(config)
    failed: dict[str, Exception] = {}
    for number, (name, (stage, options)) in enumerate(list(stages.items()), 1):
        if name not in stages:
            continue
        log.info("stage %d of %d: %s", number, len(stages), name)
        begun = time.perf_counter()
        try:
            if isinstance(options, GenerateConfig) and d_in:
                generate.run(options, partial(_log_estimate, config, device, d_in, n_sites))
            else:
                stage.run(_completed(config, options, stages, failed))
        except ArtifactError:
            raise  # a file that is in the way
        except Exception as error:
            if name not in _OPTIONAL:
                raise
            failed[name] = error
            if runtime.is_out_of_memory(error):
                failed[name] = LorascopeError(f"out of memory: {first_line(error)}")
            message = first_line(failed[name])
            log.error("%s failed: %s; the page is made without it", name, message)
        seconds[name] = round(time.perf_counter() - begun, 2)
        if name == "generate" and _writes_nothing(out):
            for effect in _EFFECTS:
                stages.pop(effect, None)
            log.info("every B of the adapter is zero: no effects of features are measured")
    messages = {name: first_line(error) for name, error in failed.items()}
    summary = summarize(out, messages, seconds)
    write_text(out / SUMMARY, json.dumps(to_json(summary), indent=1) + "\n")
    log.info("\n%s", as_table(summary))
    for error in failed.values():
        if not isinstance(error, LorascopeError):
            raise error  # a bug
    return Page(out / "dashboard.html")


def _stages(config: RunConfig) -> dict[str, tuple[ModuleType, Config]]:
    """Return the stages in order, each with its options."""
    from lorascope.sae import train

    out = config.output
    store, sae, index = out / "activations", out / "sae", out / "features.h5"
    page, text = out / "dashboard.html", out / "report.json"
    read: dict[str, Any] = {"data_dir": store, "sae": sae}
    stages: dict[str, tuple[ModuleType, Config]] = {}

    def add(name: str, stage: ModuleType, options: type[Config], **given: Any) -> None:
        stages[name] = stage, options.from_shared(config, **given)

    add("generate", generate, GenerateConfig, output=store)
    add("train", train, TrainConfig, data_dir=store, output=sae, adapter_types=())
    add("collect", collect, CollectConfig, output=index, batch_size=2048, **read)
    plan = config.plan
    if plan.evaluate:
        from lorascope.causal import evaluate

        add(
            "evaluate",
            evaluate,
            evaluate.EvaluateConfig,
            output=out / "evaluation.json",
            max_rollouts=plan.evaluate,
            answers=_N_ANSWERS,
            batch_tokens=None,
            seed=0,
            **read,
        )
    if plan.effects:
        from lorascope.causal import ablate, attribute, direct

        effects = out / "effects"
        texts = {**read, "batch_tokens": None}
        add("direct", direct, direct.DirectConfig, sae=sae, output=effects / "direct.json")
        add(
            "ablate",
            ablate,
            ablate.AblateConfig,
            output=effects / "ablation.json",
            max_rollouts=plan.effects,
            part_rollouts=plan.parts,
            greedy=plan.greedy,
            seed=0,
            **texts,
        )
        add(
            "attribute",
            attribute,
            attribute.AttributeConfig,
            output=effects / "attribution.json",
            rollouts_of=index,
            max_rollouts=min(plan.effects, plan.parts),
            check_rollouts=1,
            **texts,
        )
    add("label", label, LabelConfig, input=index, output=out / LABELS, **read)
    for name, stage, options, source, made in (
        ("dashboard", render, DashboardConfig, index, page),
        ("report", report, ReportConfig, out, text),
    ):
        overwrite = config.overwrite or _is_own(made)
        add(name, stage, options, input=source, output=made, overwrite=overwrite)
    return stages


def _writes_nothing(out: Path) -> bool:
    """Return whether no row of the adapter has an effect."""
    store = read_manifest(out / "activations")
    return store is not None and store.layout is not None and store.layout.writes_nothing


def _is_own(path: Path) -> bool:
    """Return whether a file is a page or a report of an earlier run, which may be replaced."""
    own = read_manifest(path) if path.is_file() else None
    return own is not None and own.kind in (render.KIND, Overview.kind)


def _completed(
    config: RunConfig,
    options: Config,
    stages: Mapping[str, tuple[ModuleType, Any]],
    failed: Collection[str],
) -> Config:
    """Return the options of a stage with what is known once the stages before it have run."""
    if isinstance(options, LabelConfig) and options.output is not None:
        own = read_manifest(options.output) if options.output.is_file() else None
        if own is not None and own.kind == label.KIND:
            identity = label.identity_of(options)
            parents = dict(identity.parents)
            if is_before := own.schema < label.SCHEMA:  # neither removals nor all settings
                parents.pop("ablation", None)
                is_before = own.settings.items() <= identity.settings.items()
            is_old = own.parents != parents or is_before
            return replace(options, overwrite=options.overwrite or is_old)
    if isinstance(options, DashboardConfig):
        made = [stages[name][1] for name in _OPTIONAL if name in stages and name not in failed]
        return replace(options, effects=tuple(one.output for one in made))
    if isinstance(options, EvaluateConfig):
        return _deeper(options, config.evaluate_texts is None)
    if isinstance(options, EffectOptions):
        n = noted(config.plan, config.output / "effects").effects
        options = replace(options, max_rollouts=min(n, options.max_rollouts or n))
        return _deeper(options, config.effect_texts is None)
    return options


def _deeper(options: EffectOptions, by_depth: bool) -> EffectOptions:
    """Return options that replace a report of fewer texts, if the number follows from the depth."""
    out: Path | None = getattr(options, "output", None)
    own = read_manifest(out) if by_depth and out is not None and out.is_file() else None
    if own is None or own.kind not in _KINDS or options.overwrite:
        return options
    n, wanted = own.settings.get("max_rollouts"), options.max_rollouts
    is_less = isinstance(n, int) and wanted is not None and n < wanted
    same = {name for name, value in options.settings().items() if own.settings.get(name) == value}
    is_same = options.settings().keys() - same <= {"max_rollouts", "part_rollouts", "greedy"}
    return replace(options, overwrite=is_less and is_same)


def _check_columns(config: RunConfig, device: "torch.device") -> tuple[int, int]:
    """Return the numbers of columns of the run and of adapted modules.

    Raises ConfigError, before any work is done, if training has too many latents or too few.
    """
    adapter = inspect_adapter(config.lora_path, config.adapter_name)
    ranks = ranks_by_projection(adapter)
    types = parse_adapter_types(config.adapter_types, ranks) or tuple(ranks)
    if d_in := sum(ranks.get(name, 0) for name in types):
        config.for_columns(d_in).require_memory(d_in, runtime.free_memory(device))
    return d_in, sum("lora_A" in parts for parts in lora_tensors(adapter.shapes).values())


def _log_estimate(
    config: RunConfig,
    device: "torch.device",
    d_in: int,
    n_sites: int,
    base: "Base",
    n_tokens: int,
) -> None:
    """Log about how much memory and time the stages will take, and warn if the model is too large.

    Time is that of the large products, at a speed that is measured now; small models, whose time is
    spent elsewhere, take longer.
    """
    from lorascope.sae.train import auto_epochs

    options = config.for_columns(d_in)
    n_latents = max(options.values_of("expansion_factor")) * d_in
    is_wide = config.dtype == "float32" or (config.dtype == "auto" and device.type == "cpu")
    model, sae = base.n_parameters * (4 if is_wide else 2), 2 * 4 * d_in * n_latents
    speed = runtime.measure_speed(device)
    reading, encoding = 2 * base.n_parameters / speed, 2 * d_in * n_latents / speed  # of a token
    text = n_tokens / (config.sample or config.num_examples or 1)
    trained = n_tokens * (config.epochs or auto_epochs(n_tokens))
    plan = fit(
        config.plan, n_sites, reading * text, config.output / "effects", again=config.overwrite
    )
    rows = {
        "generate": (model, reading * n_tokens),
        "train": (options.training_bytes(d_in), 4 * encoding * trained),
        "collect": (2 * sae + 30_000 * n_latents, 2 * encoding * n_tokens),
        "evaluate": (model + sae, RUNS_OF_EVALUATION * reading * text * plan.evaluate),
        "effects": (model + sae, reading * text * effect_runs(plan, n_sites)),
    }
    free = runtime.free_memory(device)
    log.info(
        "depth %s: about %s, for %s tokens, %s columns and %s latents on %s (%.0f GFLOP/s)%s",
        config.depth,
        ", ".join(
            f"{name} {max(seconds / 60, 0.1):.1f} min and {n_bytes / 1e9:.1f} GB"
            for name, (n_bytes, seconds) in rows.items()
            if seconds
        ),
        f"{n_tokens:,}",
        f"{d_in:,}",
        f"{n_latents:,}",
        device,
        speed / 1e9,
        "" if free is None else f"; {free / 1e9:.1f} GB of memory are free",
    )
    if free is not None and model > free and config.device_map is None:
        log.warning(
            "the model needs about %.1f GB: use --dtype bfloat16, a smaller base, or --device-map "
            "auto, which spreads it",
            model / 1e9,
        )
