"""The results of a run as a Python object: `Study`. It answers what the page shows.

Nothing is measured here. A study reads the index, the labels and the reports that other stages
made, and returns their records. With the model loaded, it calls what `steer` and `evaluate` call.
"""

import json
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.artifact import read_manifest
from lorascope.causal.effect_options import EffectOptions, SteerConfig
from lorascope.causal.report_records import Answer, DirectEffect, FeatureRemoval, SteeringReport
from lorascope.config import did_you_mean
from lorascope.dashboard.headline import percent
from lorascope.dashboard.overview import (
    ORDERS,
    Effects,
    Overview,
    TopFeature,
    effects_of,
    overview_of,
    ranked_features,
    top_feature,
)
from lorascope.dashboard.report import open_results
from lorascope.dashboard.reports import Reports
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.feature import Feature, passage_html, sentence_html, table_html
from lorascope.features.index import FeatureIndex
from lorascope.remote import as_path

if TYPE_CHECKING:
    from lorascope.causal.held_out import HeldOut
    from lorascope.sae.model import SAE

_N_SHOWN = 10  # features in a notebook
Prompts = str | Path | Sequence[str | Mapping[str, Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Study:
    """A run's features, and what was measured of them.

    `study[12]` is feature 12 with its label, statistics, examples, tokens and similar features;
    `len(study)` counts the features. `index` has the same as arrays, `reports` all records of
    `evaluate`, `ablate`, `direct` and `attribute`, each None if there is none. `data_dir` and `sae`
    are the store and the SAE, if they are known: `load` needs both.
    """

    index: FeatureIndex
    reports: Reports
    source: Path
    data_dir: Path | None = None
    sae: Path | None = None
    _loaded: "_Loaded | None" = field(default=None)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        effects: Sequence[Path | str] | None = None,
        data_dir: Path | str | None = None,
        sae: Path | str | None = None,
    ) -> "Study":
        """Open the folder of a run, or a feature index (`features.h5`, or a features JSON).

        Reports, store and SAE are found beside it under the names that `run` gives them, unless
        they are given; a report of another SAE is left out with a warning. Raises ArtifactError if
        there is no index, if a file is damaged, or if a given report is of another SAE.
        """
        given = None if effects is None else [Path(one) for one in effects]
        source, index, reports = open_results(as_path(path).expanduser(), given)
        return cls(
            index,
            reports,
            source,
            _beside(source, "activations", data_dir),
            _beside(source, "sae", sae),
        )

    def __len__(self) -> int:
        """Return the number of features, dead ones included."""
        return len(self.index)

    def __getitem__(self, feature: int) -> Feature:
        """Return a feature. Raises IndexError if it does not exist."""
        return self.index[feature]

    @cached_property
    def overview(self) -> Overview:
        """What the adapter learned: the page's first view, the same record as `report.json`."""
        return overview_of(self.index, self.reports)

    def top(self, by: str = "effect", n: int = _N_SHOWN) -> tuple[TopFeature, ...]:
        """Return the `n` first features in an order, first the largest; dead ones are left out.

        Orders are `effect` (of its removal, over all predictions), `effect_text` (over those of
        text), `specificity` (how far its pull exceeds that of controls), `activation` (its share of
        all activation), `density` (how often it fires) and `label` (the score of its label).
        Features for which the number is unknown are left out. Raises ConfigError at another order,
        or if its numbers were not measured.
        """
        if by not in ORDERS:
            hint = did_you_mean(by, ORDERS)
            raise ConfigError(f"no order is called {by}{hint}; there are {', '.join(ORDERS)}")
        ranked = ranked_features(self.index, self._effects, by)
        if ranked is None:
            command = "label" if by == "label" else "ablate --sae"
            raise ConfigError(
                f"{self.source} has no {by} of features beside it; lorascope {command} makes it, "
                "or ask for another order, such as activation"
            )
        return tuple(self.summary(latent) for latent in ranked[:n])

    def summary(self, feature: int) -> TopFeature:
        """Return a feature in one line: label, role, site, effect, verdict, strongest example."""
        self.index.require(feature)
        return top_feature(self.index, feature, self._effects)

    def search(self, text: str, n: int = _N_SHOWN) -> tuple[TopFeature, ...]:
        """Return the first features with a label or an example that contains `text`.

        Labels come first, then the features with the largest value on the text. Case is ignored.
        """
        return tuple(self.summary(latent) for latent in self.index.search(text)[:n])

    def effect(self, feature: int) -> FeatureRemoval | None:
        """Return what `ablate` measured of a feature, None if it did not."""
        self.index.require(feature)
        return self._removals.get(feature)

    def tokens(self, feature: int) -> DirectEffect | None:
        """Return the tokens that a feature promotes and suppresses, None without `direct`."""
        self.index.require(feature)
        return None if self.reports.direct is None else self.reports.direct.features[feature]

    @cached_property
    def _effects(self) -> Effects | None:
        return effects_of(self.reports.ablation, len(self))

    @cached_property
    def _removals(self) -> dict[int, FeatureRemoval]:
        ablation = self.reports.ablation
        return {one.feature: one for one in (ablation and ablation.features) or ()}

    def load(self, lora_path: Path | str, **options: Any) -> "Study":
        """Return this study with the model in memory, for `steer` and `answers`.

        `options` are those of `lorascope evaluate` that choose the model: `base_model`,
        `base_revision`, `adapter_name`, `dtype`, `device`, `batch_tokens`. Raises ArtifactError if
        adapter, base, store and SAE do not belong together.
        """
        from lorascope.activations.store import ActivationStore
        from lorascope.causal.held_out import open_held_out
        from lorascope.sae.model import load_sae

        if self.data_dir is None or self.sae is None:
            name = "store" if self.data_dir is None else "SAE"
            raise ArtifactError(
                f"{self.source} has no {name} beside it; give Study.open its data_dir and its sae"
            )
        known = EffectOptions.names() - {"lora_path", "data_dir", "overwrite"}
        if unknown := options.keys() - known:
            name = min(unknown)
            raise ConfigError(f"load has no option {name}{did_you_mean(name, known)}")
        config = EffectOptions(lora_path=str(lora_path), data_dir=self.data_dir, **options)
        sae = load_sae(self.sae, ActivationStore.open(self.data_dir))
        if self.index.manifest.parents.get("sae", sae.digest) != sae.digest:
            raise ArtifactError(
                f"{self.sae} is another SAE than that of {self.source}, so its features are "
                "others; give Study.open the right one as sae"
            )
        return replace(self, _loaded=_Loaded(open_held_out(config, sae), sae, config))

    def steer(
        self, features: int | Sequence[int], prompts: Prompts | None = None, **options: Any
    ) -> SteeringReport:
        """Let the model write with features added, removed or clamped; nothing is written to disk.

        `how="remove", doses=(1.0,)` writes with and without the features. `prompts` is a list, or
        the file of a dataset; by default they are held-out rollouts of the store, cut where the
        assistant begins. In a list, a text is what the user says (plain text if the tokenizer has
        no chat template), a dict is a record of a dataset. `options` are those of `lorascope
        steer`. Needs `load`. Raises ConfigError at impossible options.
        """
        from lorascope.causal.effect_options import require_features
        from lorascope.causal.steer import measure

        loaded = self._require_loaded()
        features = (features,) if isinstance(features, int) else tuple(features)
        if unknown := options.keys() - SteerConfig.names():
            name = min(unknown)
            hint = did_you_mean(name, SteerConfig.names())
            raise ConfigError(f"steer has no option {name}{hint}")
        with _dataset_of(prompts, loaded.held_out.subject.tokenizer) as (dataset, n):
            options = {**({} if n is None else {"num_prompts": n}), **options}
            config = SteerConfig(
                **{**vars(loaded.config), **options, "features": features, "prompts": dataset}
            )
            require_features(features, loaded.sae)
            return measure(loaded.held_out, loaded.sae, config)

    def answers(
        self, prompts: Prompts | None = None, n: int = 4, seed: int = 0
    ) -> tuple[Answer, ...]:
        """Let base and adapter continue the same prompts with the same noise, up to 96 tokens.

        `prompts` as in `steer`; the first `n` of a file or of the store. The `rollout` of an answer
        is the record's number, or the rollout's id in the store. Needs `load`, and raises
        AdapterError unless the adapter is plain LoRA.
        """
        from lorascope.causal.continuation import answers_of, read_prompts
        from lorascope.subject.intervene import RowEditor

        held_out = self._require_loaded().held_out
        with _dataset_of(prompts, held_out.subject.tokenizer) as (dataset, n_given):
            n = n if n_given is None else n_given
            given = None if dataset is None else read_prompts(dataset, n, held_out.subject)
        with RowEditor(held_out.subject) as editor:
            return answers_of(editor, held_out, n, seed, given)

    def _require_loaded(self) -> "_Loaded":
        if self._loaded is None:
            raise ConfigError(
                "no model is loaded; call study = study.load(lora_path, base_model=...) first"
            )
        return self._loaded

    def __repr__(self) -> str:
        known = [one.kind for one in vars(self.reports).values() if hasattr(one, "kind")]
        measured = ", ".join(known) or "no reports"
        return f"Study({self.source}; {len(self):,} features; {measured})"

    def _repr_html_(self) -> str:
        """Return the first sentences of the overview and its first features, for a notebook."""
        subject, *sentences = self.overview.headline
        shown = self.overview.features[:_N_SHOWN]
        names = ("feature", "label", "fires", "site", "effect", "verdict", "strongest example")
        rows = [
            (
                str(one.feature),
                one.name,
                one.role,
                one.site,
                "" if one.effect is None else percent(one.effect),
                one.verdict or "",
            )
            for one in shown
        ]
        passages = [passage_html((one.before, one.token, one.after), 1) for one in shown]
        lines = [sentence_html("Study", subject), *(sentence_html("", one) for one in sentences)]
        return "".join(lines) + table_html(names, rows, passages)


@dataclass(frozen=True)
class _Loaded:
    """The model with the rollouts that its SAE never saw, the SAE, and the options of both."""

    held_out: "HeldOut"
    sae: "SAE"
    config: EffectOptions


def _beside(source: Path, name: str, given: Path | str | None) -> Path | None:
    """Return a path that was given, or the artifact with this name beside the index."""
    if given is not None:
        return Path(given).expanduser()
    path = source.with_name(name)
    return path if path.is_dir() and read_manifest(path) is not None else None


@contextmanager
def _dataset_of(
    prompts: Prompts | None, tokenizer: Any
) -> Generator[tuple[str | None, int | None]]:
    """Yield the name of a dataset with these prompts, and their number if they are no file.

    Texts and records become a file for as long.
    """
    if prompts is None or isinstance(prompts, str | Path):
        yield None if prompts is None else str(prompts), None
        return
    key = "prompt" if getattr(tokenizer, "chat_template", None) else "text"
    records = [{key: one} if isinstance(one, str) else dict(one) for one in prompts]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.jsonl")
        file.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
        yield str(file), len(records)
