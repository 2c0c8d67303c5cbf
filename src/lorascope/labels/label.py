"""Say in words what each feature responds to, and measure how far to believe it.

1. Read whole rollouts of the store, drawn at random. One half of them chooses a short rule for each
   feature, or the tokens that it promotes; the other half scores it (`by_rule`).
2. A label is unclear if the interval of its balanced accuracy begins below 0.7.
3. With `--llm-model`, a language model says what it sees, and a judge tests it (`explain`). Its
   label replaces the rule unless only the rule is clear.
4. Labels by hand replace others.

In: feature index, activation store, SAE. Out: `labels.json`. No forward pass, and no network unless
you name a server. `labels.answers.jsonl` beside it keeps the server's answers.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.artifact import Identity, digest_file, read_manifest
from lorascope.causal.report_records import AblationReport, DirectReport, TokenFall
from lorascope.causal.study import format_number, read_report, reports_beside
from lorascope.config import Config, option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import (
    BY_HAND,
    BY_HAND_FILE,
    FILE,
    KIND,
    KINDS,
    SCHEMA,
    Label,
    read_by_hand,
    rounded,
    with_hand_labels,
    write_labels,
)
from lorascope.features.published_json import digest_of_index, read_index
from lorascope.labels.by_rule import LEAST_SHARE, label_features, read_halves
from lorascope.labels.chat import Chat
from lorascope.labels.explain import explain
from lorascope.labels.score import CHANCE, mean_over_features, rivals_of
from lorascope.stage import Build, built

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

log = logging.getLogger(__name__)
R = TypeVar("R", AblationReport, DirectReport)


@dataclass(frozen=True, kw_only=True)
class LabelOptions(Config):
    """Options that `run` shares."""

    label_tokens: int = option(
        300_000,
        help="tokens of whole rollouts to read: one half chooses labels, the other scores",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class IndexOptions(LabelOptions):
    """Options that `study` shares: an index, with the store and the SAE that it is of."""

    input: Path = option(
        help="feature index: features.h5, or JSON that collect wrote", identity=False
    )
    data_dir: Path | None = option(
        None, help="activation store of the index; default: activations beside it", identity=False
    )
    sae: Path | None = option(None, help="SAE of the index; default: sae beside it", identity=False)

    def open_index(self) -> "tuple[FeatureIndex, ActivationStore, SAE]":
        """Return the three. Raises ArtifactError if they do not belong together."""
        from lorascope.sae.model import load_sae

        source = self.input.expanduser()
        index = read_index(source)
        store = ActivationStore.open(self.data_dir or source.parent / "activations")
        sae = load_sae(self.sae or source.parent / "sae", store)
        for name, digest, path in (
            ("activations", store.digest, store.path),
            ("sae", sae.digest, "the SAE"),
        ):
            known = index.manifest.parents.get(name)
            if known != digest:
                found = "does not say" if known is None else "was made from another one:"
                raise ArtifactError(
                    f"{source} {found} {name} {'' if known is None else known[:12]}, {path} is "
                    f"{digest[:12]}; give the --data-dir and --sae that it was collected from"
                )
        return index, store, sae


@dataclass(frozen=True, kw_only=True)
class LabelConfig(IndexOptions):
    """Options of `label`."""

    effects: tuple[Path, ...] = option(
        (),
        help="reports of direct and ablate; default: effects/direct.json and effects/ablation.json "
        "beside the index",
        identity=False,
    )
    by_hand: Path | None = option(
        None,
        help="labels that the page exported; they replace others; default: hand-labels.json beside "
        "the index",
        identity=False,
    )
    llm_base_url: str | None = option(
        None,
        help="server with the OpenAI protocol, such as http://localhost:8000/v1; default: "
        "OPENAI_BASE_URL. The key is OPENAI_API_KEY",
        identity=False,
    )
    llm_model: str | None = option(
        None, help="model on the server that describes features; default: rules alone"
    )
    judge_model: str | None = option(
        None,
        help="model on the server that tests the descriptions; default: --llm-model, which then "
        "grades itself",
    )
    features: tuple[int, ...] = option(
        (), help="numbers of the features that the model describes; default: all that fire"
    )
    llm_parallel: int = option(
        8, help="questions to ask at the same time", identity=False, at_least=1
    )
    output: Path | None = option(
        None,
        help="JSON file to write; default: labels.json beside the index",
        identity=False,
        suffix=".json",
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace an output of other settings", identity=False)

    def check(self) -> None:
        """Refuse options of a model without one."""
        super().check()
        if self.llm_model is None and (self.llm_base_url or self.judge_model or self.features):
            raise ConfigError(
                "--llm-base-url, --judge-model and --features need --llm-model; add it"
            )


def run(config: LabelConfig) -> Path:
    """Say in words what each feature responds to, and return the file of the labels (JSON).

    Scores are balanced accuracies on rollouts that chose no label; 0.5 is chance. Finished labels
    of the same settings are kept. Raises ArtifactError if inputs do not belong together.
    """
    index, store, sae = config.open_index()
    inputs = _inputs(config)
    direct = read_effects(inputs["direct"], sae, DirectReport) if "direct" in inputs else None
    falls: dict[int, tuple[TokenFall, ...]] = {}
    if "ablation" in inputs:
        removals = read_effects(inputs["ablation"], sae, AblationReport).features or ()
        falls = {one.feature: one.falls for one in removals if one.falls}
        if not falls and any(one.is_removed and one.kl > 0 for one in removals):
            log.warning(
                "%s has no tokens that fall, so picked_effect stays empty: it is of an older "
                "version; run lorascope ablate again with --overwrite",
                inputs["ablation"],
            )
    by_hand = {}
    if "by_hand" in inputs:
        by_hand = read_by_hand(inputs["by_hand"], sae.digest, len(index))
    out = config.output or config.input.expanduser().with_name(FILE)
    identity = identity_of(config)

    def make(build: Build) -> None:
        on_device = sae.to(runtime.pick_device(config.device))
        halves = read_halves(sae.narrow(store), on_device, index, config.label_tokens)
        shares = {i: {one.token_id: one.share for one in some} for i, some in falls.items()}
        labels = label_features(halves, index, direct, shares)
        if config.llm_model is not None:
            labels = ask_model(
                labels, index, direct, falls, config, out.with_suffix(".answers.jsonl")
            )
        labels = with_hand_labels(labels, by_hand)
        content = {"n_features": len(index), **halves.sizes(), **summarize(labels)}
        manifest = identity.manifest(None, content)
        write_labels(build.path / FILE, labels, manifest)
        build.publish_file(FILE)
        log.info("\n%s", table(content))

    return built(out, identity, make, overwrite=config.overwrite)


def identity_of(config: LabelConfig) -> Identity:
    """Return what decides the labels. Raises ArtifactError if a file is missing."""
    parents = {"features": digest_of_index(config.input.expanduser())}
    parents |= {name: digest_file(path) for name, path in _inputs(config).items()}
    return Identity(kind=KIND, schema=SCHEMA, settings=config.settings(), parents=parents)


def _inputs(config: LabelConfig) -> dict[str, Path]:
    """Return the reports and the labels by hand: those given, or those found."""
    source = config.input.expanduser()
    if config.by_hand is not None and not config.by_hand.is_file():
        raise ArtifactError(f"{config.by_hand} does not exist; give a file, or leave out --by-hand")
    by_hand = config.by_hand or source.with_name(BY_HAND_FILE)
    found = {"by_hand": by_hand} if by_hand.is_file() else {}
    if not config.effects:
        index = read_manifest(source)
        assert index is not None, "it names its store and its SAE"
        return found | reports_beside(source, index, ("direct", "ablation"))
    for path in config.effects:
        manifest = read_manifest(path)
        kind = None if manifest is None else manifest.kind
        if kind not in ("direct", "ablation") or kind in found:
            raise ConfigError(
                f"--effects has {path} of kind {kind}, expected one report of direct and one of "
                "ablate at most"
            )
        found[kind] = path
    return found


def ask_model(
    labels: Mapping[int, Label],
    index: FeatureIndex,
    direct: DirectReport | None,
    falls: Mapping[int, tuple[TokenFall, ...]],
    config: LabelConfig,
    cache: Path,
) -> dict[int, Label]:
    """Return the labels with those of the model that `config` names. `cache` keeps its answers."""
    url = config.llm_base_url or os.environ.get("OPENAI_BASE_URL")
    if not url or config.llm_model is None:
        raise ConfigError(
            "--llm-model needs a server; give --llm-base-url, such as http://localhost:8000/v1"
        )
    explainer = Chat(url, config.llm_model, cache, config.llm_parallel)
    judge = explainer
    if config.judge_model not in (None, config.llm_model):
        judge = Chat(url, config.judge_model, cache, config.llm_parallel)
    else:
        log.warning("%s grades its own labels; give another --judge-model", config.llm_model)
    written = {} if direct is None else _written(direct)
    asked = sorted(config.features or labels)
    if unknown := [latent for latent in asked if latent not in labels]:
        raise ConfigError(
            f"--features has {unknown[0]}, expected features that fire, below {len(index)}"
        )
    known = {i: some for i, some in falls.items() if i in labels}
    merged = explain(
        labels,
        index,
        explainer,
        judge,
        asked,
        written,
        {i: [fall.token for fall in some] for i, some in known.items()},
        rivals_of(known, {i: label.category for i, label in labels.items()}),
    )
    for chat in {id(chat): chat for chat in (explainer, judge)}.values():
        log.info("%s", chat.describe_usage())
    return merged


def _written(direct: DirectReport) -> dict[int, tuple[list[str], list[str]]]:
    """Return the tokens that features promote and suppress, where their effect is direct."""
    return {
        effect.feature: (
            [token.token for token in effect.promoted],
            [token.token for token in effect.suppressed],
        )
        for effect in direct.features
        if effect.share >= LEAST_SHARE
    }


def summarize(labels: Mapping[int, Label]) -> dict[str, Any]:
    """Return the figures of all labels, for the manifest. Without a score, a feature has 0.5."""
    by_rule = [label for label in labels.values() if label.author != BY_HAND]
    scores = np.array([0.5 if (s := x.balanced_accuracy) is None else s for x in by_rule])
    shuffled = [label.shuffled for label in by_rule if label.shuffled is not None]
    return {
        "n_labels": len(labels),
        "n_by_hand": len(labels) - len(by_rule),
        "n_by_kind": {kind: sum(x.kind == kind for x in labels.values()) for kind in KINDS},
        "balanced_accuracy": rounded(float(scores.mean())) if len(scores) else None,
        "share_above_0.85": rounded(float((scores >= 0.85).mean())) if len(scores) else None,
        "shuffled": rounded(float(np.mean(shuffled))) if shuffled else None,
        "chance": 0.5,
        **{name: _mean([getattr(x, name) for x in by_rule]) for name in ("clarity", "purity")},
        "purity_chance": _mean([label.covered for label in by_rule]),
        **_picks(by_rule),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of those that are known."""
    known = [value for value in values if value is not None]
    return rounded(float(np.mean(known))) if known else None


def _picks(labels: Sequence[Label]) -> dict[str, Any]:
    """Return how often labels find the removals of their features; nothing without removals."""
    picked = [label.picked_effect for label in labels if label.picked_effect is not None]
    if not picked:
        return {}
    mean, low, high = mean_over_features(picked)
    return {
        "n_picked_effect": len(picked),
        "picked_effect": rounded(mean),
        "picked_effect_interval": [rounded(low), rounded(high)],
        "picked_effect_shuffled": _mean([label.picked_effect_shuffled for label in labels]),
        "picked_effect_chance": CHANCE,
    }


def table(content: Mapping[str, Any]) -> str:
    """Return the summary as a table to read."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in content["n_by_kind"].items() if n)
    rows = {
        "labels": f"{content['n_labels']:,} ({kinds})",
        "by hand": f"{content['n_by_hand']:,}",
        "balanced accuracy": f"{content['balanced_accuracy'] or 0.5:.3f} on "
        f"{content['n_rollouts_scoring']:,} held-out rollouts",
        "0.85 or more": f"{content['share_above_0.85'] or 0:.0%} of the features",
        "shuffled labels": f"{content['shuffled'] or 0.5:.3f} (chance: 0.5)",
        "clarity": format_number(content["clarity"], ".3f"),
        "purity": f"{format_number(content['purity'], '.3f')} (chance: "
        f"{format_number(content['purity_chance'], '.3f')})",
    }
    if "picked_effect" in content:
        low, high = content["picked_effect_interval"]
        rows["removal picked"] = (
            f"{content['picked_effect']:.3f} ({low:.3f} to {high:.3f}) of "
            f"{content['n_picked_effect']:,} features, shuffled "
            f"{format_number(content['picked_effect_shuffled'], '.3f')} (chance: {CHANCE:.1f})"
        )
    return "\n".join(f"  {name:<18} {value}" for name, value in rows.items())


def read_effects(path: Path, sae: "SAE", record: type[R]) -> R:
    """Return a report of effects. Raises ArtifactError if it is of another SAE."""
    report, manifest = read_report(path, (record,))
    features = report.features or ()
    is_other = any(one.feature >= sae.d_sae for one in features)
    if isinstance(report, DirectReport):
        is_other = len(features) != sae.d_sae
    if manifest.parents.get("sae") != sae.digest or is_other:
        raise ArtifactError(f"{path} is of another SAE; make the report again with this one")
    return report
