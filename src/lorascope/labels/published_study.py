"""Repeat the published study's tables: how many directions have one meaning, and what features do.

1. *Classes*: features of the SAE, columns of the adapter's rows and neurons of the model, each
   described by a rule that one half of the rollouts chooses and the other half tests (`directions`,
   `classes`). Nobody judges. The published study had a language model grade its own descriptions.
2. *Groups* of features that fire together, with their share of all firings and, with a report of
   `ablate`, of the sum of all effects (`groups`).

In: feature index, activation store, SAE; labels and a report of `ablate` if they are beside the
index; for neurons, the adapter. Out: a report (JSON) and its picture (.png and .svg); the table
goes to stderr. [Labels](labels.md) has the definitions.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.artifact import Manifest, digest_file
from lorascope.causal.effect_options import ReportOptions, require_json_name
from lorascope.causal.report_records import AblationReport
from lorascope.causal.study import Made, is_of_index, report_at
from lorascope.config import option
from lorascope.errors import ConfigError, DatasetError
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import BY_HAND, BY_RULE, FILE
from lorascope.features.published_json import digest_of_index
from lorascope.labels import classes, directions
from lorascope.labels.by_rule import Halves, read_halves
from lorascope.labels.groups import effect_intervals, groups_of
from lorascope.labels.label import IndexOptions, read_effects
from lorascope.labels.rules import Miner
from lorascope.labels.score import Estimate
from lorascope.labels.study_report import (
    GroupShare,
    Judged,
    KindShares,
    StudyReport,
    draw_study,
    table,
)

_N_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class StudyConfig(ReportOptions, IndexOptions):
    """Options of `study`."""

    lora_path: str | None = option(
        None,
        help="adapter: a folder or a hub id; default: none, and no neurons",
        identity=False,
        path=True,
    )
    effects: tuple[Path, ...] = option(
        (), help="report of ablate; default: effects/ablation.json beside the index", identity=False
    )
    directions: int = option(
        500, help="directions of each kind to score, drawn at random", at_least=1
    )
    seed: int = option(0, help="seed of what is drawn, and of the bootstrap", at_least=0)
    output: Path | None = option(
        None, help="JSON file to write; default: study.json beside the index", identity=False
    )

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        if self.output is not None:
            require_json_name(self.output)
        if len(self.effects) > 1:
            raise ConfigError(f"--effects has {len(self.effects)} reports, expected one of ablate")


def run(config: StudyConfig) -> Path:
    """Write the report unless it is finished already, and return its file."""
    index, store, sae = config.open_index()
    source = config.input.expanduser()
    path = next(iter(config.effects), source.parent / "effects" / "ablation.json")
    if not config.effects and not (path.is_file() and is_of_index(path, index.manifest)):
        path = None
    ablation = None if path is None else read_effects(path, sae, AblationReport)
    parents = {"features": digest_of_index(source)}
    parents |= {} if index.labels is None else {"labels": digest_file(source.with_name(FILE))}
    parents |= {} if path is None else {"ablation": digest_file(path)}
    out = config.output or source.with_name("study.json")

    def make() -> Made:
        on_device = sae.to(runtime.pick_device(config.device))
        halves = read_halves(sae.narrow(store), on_device, index, config.label_tokens)
        if len(np.unique(halves.scoring.corpus.rollout)) < 2 or not index.alive.any():
            raise DatasetError(
                f"{source} has too few rollouts or no feature that fires, expected four rollouts "
                "or more; collect more, or raise --label-tokens"
            )
        kinds = _kinds(config, store, sae.narrow(store), halves, index)
        scoring = halves.scoring.corpus
        report = StudyReport(
            n_rollouts_scoring=len(np.unique(scoring.rollout)),
            n_tokens_scoring=len(scoring),
            groups=_shares(index, halves, ablation, config),
            by_model=_judged(index),
            **measure(kinds, halves, config.seed),
        )
        names = {key: index.content.get(key) for key in ("adapter_name", "sae_name")}
        return Made(report, sae.layout, {**names, **halves.sizes()})

    def draw(report: StudyReport, manifest: Manifest) -> None:
        for suffix in (".png", ".svg"):
            draw_study(report, manifest, out.with_suffix(suffix))

    return report_at(
        out,
        StudyReport,
        settings={**config.settings(), "neurons": config.lora_path is not None},
        parents=parents,
        overwrite=config.overwrite,
        make=make,
        table=table,
        draw=draw,
    )


def _kinds(
    config: StudyConfig,
    whole: ActivationStore,
    store: ActivationStore,
    halves: Halves,
    index: FeatureIndex,
) -> dict[str, directions.Directions]:
    """Draw directions of each kind, and find where they fire."""
    rng = np.random.default_rng(config.seed)
    features = directions.features(halves, index, config.directions, rng)
    drawn = directions.draw(store.d_in, config.directions, rng)
    values = [directions.column_values(store, half.row, drawn) for half in halves]
    columns = directions.of_values(drawn, values, features, rng)
    kinds = {"features": features, "columns": columns}
    if config.lora_path is not None:
        from lorascope.causal.held_out import HeldOut, fitting_tokens, load_subject_of

        subject = load_subject_of(whole, config, device=config.device, dtype=config.dtype)
        readers = directions.mlp_readers(subject.causal)
        drawn = directions.draw(sum(width for _, width in readers), config.directions, rng)
        values = []
        for half in halves:
            rollouts = np.unique(whole.rollout_of(half.row))
            replay = HeldOut(subject, whole, rollouts, fitting_tokens(subject))
            values.append(directions.neuron_values(replay, readers, half.row, drawn))
        kinds["neurons"] = directions.of_values(drawn, values, features, rng)
    return kinds


def measure(
    kinds: dict[str, directions.Directions], halves: Halves, seed: int
) -> dict[str, KindShares]:
    """Return the classes of each kind; all are compared on the same draws of rollouts."""
    miner, found = Miner(halves.choosing.corpus), dict[str, KindShares]()
    weights = _draws(len(np.unique(halves.scoring.corpus.rollout)), seed)
    best: classes.Floats | None = None
    for name, some in kinds.items():
        counts, of_others = classes.count(some, halves, miner, name)
        own = classes.shares(counts, weights)
        best = own.monosemantic if best is None else best  # features come first
        shuffled = classes.shares(of_others, weights[:1])
        n_tokens = len(halves.scoring.corpus)
        found[name] = KindShares(
            n_all=some.n_all,
            n_drawn=len(some.firings),
            n_scored=len(counts.fired),
            density=float(np.mean([len(scoring) for _, scoring in some.firings])) / n_tokens,
            **{what: estimate(draws) for what, draws in own._asdict().items()},
            below_features=estimate(best - own.monosemantic),
            shuffled=float(shuffled.monosemantic[0]),
            shuffled_accuracy=float(shuffled.balanced_accuracy[0]),
        )
    return found


def _draws(n: int, seed: int) -> classes.Floats:
    """Return how often each rollout counts, `(1 + draw, rollout)`; once each in the first row."""
    times = np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), size=_N_DRAWS)
    return np.concatenate([np.ones((1, n)), times.astype(np.float64)])


def estimate(draws: classes.Floats) -> Estimate:
    """Return the first value, and an interval from the percentiles of the others around it."""
    value = float(draws[0])
    low, high = np.percentile(draws[1:], (2.5, 97.5)).tolist()
    return Estimate(value, min(low, value), max(high, value))


def _shares(
    index: FeatureIndex, halves: Halves, ablation: AblationReport | None, config: StudyConfig
) -> tuple[GroupShare, ...]:
    """Return the groups, those of most firings first."""
    found = groups_of(index)
    group = np.zeros(len(index), np.int64)
    for i, one in enumerate(found):
        group[list(one.latents)] = i
    n_rollouts = 1 + max(int(half.corpus.rollout.max()) for half in halves)
    fired = np.zeros((len(found), n_rollouts))
    for half in halves:
        latent = np.repeat(np.arange(len(index)), np.diff(half.offset))
        np.add.at(fired, (group[latent], half.corpus.rollout[half.rows]), 1)
    totals = fired @ _draws(n_rollouts, config.seed).T
    parts = totals / totals.sum(0).clip(min=1)
    nats = np.zeros(len(index))
    if ablation is not None:
        for removal in ablation.features or ():
            nats[removal.feature] = ablation.nats(removal)[0]
    whole = nats.sum()
    intervals = [None] * len(found) if ablation is None else effect_intervals(found, ablation)
    shares = [
        GroupShare(
            name=one.name,
            features=one.latents,
            firings=estimate(parts[i]),
            effect=float(nats[list(one.latents)].sum() / whole) if whole else None,
            effect_interval=intervals[i],
        )
        for i, one in enumerate(found)
    ]
    return tuple(sorted(shares, key=lambda one: -one.firings.value))


def _judged(index: FeatureIndex) -> Judged | None:
    """Return what a judge said of the labels that a language model wrote, if there are any."""
    labels = () if index.labels is None else index.labels.features.values()
    scored = [one for one in labels if one.author not in (BY_RULE, BY_HAND)]
    scores = [one.balanced_accuracy for one in scored if one.balanced_accuracy is not None]
    if not scores:
        return None
    shuffled = [one.shuffled for one in scored if one.shuffled is not None]
    return Judged(
        n_labels=len(scored),
        described=float(np.mean([score >= classes.DESCRIBED for score in scores])),
        balanced_accuracy=float(np.mean(scores)),
        shuffled=float(np.mean(shuffled)) if shuffled else None,
    )
