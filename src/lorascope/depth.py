"""How much a run measures: `--depth`, and the number of texts that fit into its budget.

| depth | texts to evaluate | texts for effects | removal of parts, explained tokens | budget |
|---|---|---|---|---|
| quick | 20 | 0 | | |
| standard | 50 | 32 | on 4 of them | 30 minutes for effects, fewer texts if they take longer |
| full | 200 | 128 | on 32 of them, and projections step by step | none |

`--evaluate-texts` and `--effect-texts` say the numbers themselves, and then there is no budget.
The number that fits is kept in the run's folder: the same command continues with the same texts.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from lorascope.artifact import write_text
from lorascope.config import Config, option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.record_json import Range, from_json, to_json

log = logging.getLogger(__name__)

FILE = "texts.json"  # in the folder of effects
RUNS_OF_EVALUATION = 10  # of the model on each text
_RUNS_OF_FEATURES, _RUNS_OF_PART = 100, 3


class Plan(NamedTuple):
    """Texts of each kind of measurement; `minutes` is the budget of effects, None for any."""

    evaluate: int
    effects: int
    parts: int
    greedy: Literal["none", "projection"]
    minutes: int | None


DEPTHS = {
    "quick": Plan(20, 0, 4, "none", None),
    "standard": Plan(50, 32, 4, "none", 30),
    "full": Plan(200, 128, 32, "projection", None),
}


@dataclass(frozen=True, kw_only=True)
class PlannedTexts:
    """On how many texts the effects of features are measured, as an earlier run estimated."""

    effect_texts: Annotated[int, Range(0)]


@dataclass(frozen=True, kw_only=True)
class DepthOptions(Config):
    """Options that say how much is measured."""

    depth: Literal["quick", "standard", "full"] = option(
        "standard",
        help="how much to measure. quick: 20 texts, no effects of features; standard: 50 texts, "
        "effects on 32, or on fewer if the estimate is above 30 minutes; full: 200 texts, effects "
        "on 128 and of more parts, however long it takes",
    )
    evaluate_texts: int | None = option(
        None,
        help="held-out texts on which to measure how much of the adapter's effect the SAE "
        "recovers; 0: none; default: by --depth. The model runs about ten times on each",
        at_least=0,
    )
    effect_texts: int | None = option(
        None,
        help="held-out texts on which to measure what each feature does; 0: none; default: by "
        "--depth. The model runs about a hundred times on each, and three times for each adapted "
        "module on some",
        at_least=0,
    )

    @property
    def plan(self) -> Plan:
        """The plan of the depth, with the numbers that were given, which have no budget."""
        plan = DEPTHS[self.depth]
        if self.evaluate_texts is not None:
            plan = plan._replace(evaluate=self.evaluate_texts)
        if self.effect_texts is not None:
            plan = plan._replace(effects=self.effect_texts, minutes=None)
        return plan


def effect_runs(plan: Plan, n_sites: int) -> int:
    """Return about how often the model runs on a text, summed over the texts for effects."""
    return _RUNS_OF_FEATURES * plan.effects + _RUNS_OF_PART * n_sites * min(
        plan.effects, plan.parts
    )


def fit(plan: Plan, n_sites: int, seconds: float, folder: Path, *, again: bool = False) -> Plan:
    """Return the plan with as many texts for effects as its budget allows, and note it in `folder`.

    `seconds` is the time of one run on one text. What an earlier run noted is kept, unless `again`.
    """
    if plan.minutes is None:
        return plan
    n = None if again else _noted(plan, folder)
    if n is None:
        n = plan.effects
        while n and effect_runs(plan._replace(effects=n), n_sites) * seconds > 60 * plan.minutes:
            n -= 1
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, json.dumps(to_json(PlannedTexts(effect_texts=n))) + "\n")
    if n < plan.effects:
        log.warning(
            "effects are measured on %d texts instead of %d, which would take more than %d "
            "minutes; --effect-texts %d or --depth full measures all",
            n,
            plan.effects,
            plan.minutes,
            plan.effects,
        )
    return plan._replace(effects=n)


def noted(plan: Plan, folder: Path) -> Plan:
    """Return the plan with the number of texts that `fit` noted.

    Raises ConfigError if not one text fitted.
    """
    n = None if plan.minutes is None else _noted(plan, folder)
    if n == 0:
        raise ConfigError(
            f"one text takes more than {plan.minutes} minutes; --effect-texts 1 measures it"
        )
    return plan if n is None else plan._replace(effects=n)


def _noted(plan: Plan, folder: Path) -> int | None:
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        n = from_json(PlannedTexts, data, str(path)).effect_texts
    except (ValueError, ArtifactError):
        n = -1
    if not 0 <= n <= plan.effects:
        raise ConfigError(f"{path} has no number of texts from 0 to {plan.effects}; delete it")
    return n
