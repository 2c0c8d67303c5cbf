"""lorascope shows what a LoRA learned.

Every command is a function of its config: `generate(GenerateConfig(...))` is `lorascope generate`
with flags. Names are imported on first use, so `import lorascope` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lorascope.version import __version__ as __version__

if TYPE_CHECKING:
    from lorascope.activations.generate import GenerateConfig
    from lorascope.activations.generate import run as generate
    from lorascope.activations.store import ActivationStore
    from lorascope.causal.ablate import AblateConfig
    from lorascope.causal.ablate import run as ablate
    from lorascope.causal.attribute import AttributeConfig
    from lorascope.causal.attribute import run as attribute
    from lorascope.causal.direct import DirectConfig
    from lorascope.causal.direct import run as direct
    from lorascope.causal.edit import EditConfig
    from lorascope.causal.edit import run as edit
    from lorascope.causal.evaluate import EvaluateConfig
    from lorascope.causal.evaluate import run as evaluate
    from lorascope.causal.patch import Patch
    from lorascope.causal.steer import SteerConfig
    from lorascope.causal.steer import run as steer
    from lorascope.dashboard.notebook import show
    from lorascope.dashboard.render import DashboardConfig
    from lorascope.dashboard.render import run as render
    from lorascope.errors import LorascopeError
    from lorascope.features.collect import CollectConfig
    from lorascope.features.collect import run as collect
    from lorascope.features.index import FeatureIndex
    from lorascope.inspection import report_schema
    from lorascope.labels.label import LabelConfig
    from lorascope.labels.label import run as label
    from lorascope.pipeline import RunConfig, run
    from lorascope.results import Study
    from lorascope.sae.model import SAE, load_sae
    from lorascope.sae.settings import TrainConfig
    from lorascope.sae.train import run as train
    from lorascope.sites import SiteLayout

__all__ = [
    "SAE",
    "AblateConfig",
    "ActivationStore",
    "AttributeConfig",
    "CollectConfig",
    "DashboardConfig",
    "DirectConfig",
    "EditConfig",
    "EvaluateConfig",
    "FeatureIndex",
    "GenerateConfig",
    "LabelConfig",
    "LorascopeError",
    "Patch",
    "RunConfig",
    "SiteLayout",
    "SteerConfig",
    "Study",
    "TrainConfig",
    "ablate",
    "attribute",
    "collect",
    "direct",
    "edit",
    "evaluate",
    "generate",
    "label",
    "load_sae",
    "render",
    "report_schema",
    "run",
    "show",
    "steer",
    "train",
]

_HOMES = {  # of what is neither a stage nor its config: `commands.COMMANDS` has those of stages
    "SAE": "sae.model",
    "ActivationStore": "activations.store",
    "FeatureIndex": "features.index",
    "LorascopeError": "errors",
    "Patch": "causal.patch",
    "SiteLayout": "sites",
    "Study": "results",
    "load_sae": "sae.model",
    "report_schema": "inspection",
    "show": "dashboard.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module lorascope has no {name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"lorascope.{_HOMES[name]}"), name)
    from lorascope.commands import COMMANDS

    command = COMMANDS["dashboard" if name == "render" else name.removesuffix("Config").lower()]
    if name.endswith("Config"):
        return command.config_class()
    return importlib.import_module(f"lorascope.{command.module}").run
