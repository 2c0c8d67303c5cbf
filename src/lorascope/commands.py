"""The table of the commands: one for each stage, and where its module and its options are."""

import ast
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from lorascope.config import Config


@dataclass(frozen=True)
class Command:
    """A stage on the command line: the module of its `run`, and its config class, in `lorascope`.

    Both are imported only when they are needed: many stages import torch, their options need not.
    """

    module: str
    options: str
    help: str
    example: str

    def config_class(self) -> type[Config]:
        """Import and return the config class."""
        module, _, name = self.options.rpartition(".")
        return getattr(importlib.import_module(f"lorascope.{module}"), name)

    def description(self) -> str:
        """Return the docstring of the module, read without importing it."""
        spec = importlib.util.find_spec(f"lorascope.{self.module}")
        assert spec is not None and spec.origin is not None, self.module
        return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""

    def run(self, options: Config) -> Path:
        """Run the stage."""
        return importlib.import_module(f"lorascope.{self.module}").run(options)


COMMANDS = {
    "demo": Command(
        "demo.demo",
        "demo.demo.DemoConfig",
        "run every stage on the model that comes with lorascope; needs no network and no GPU",
        "lorascope demo --open",
    ),
    "run": Command(
        "pipeline",
        "pipeline.RunConfig",
        "run every stage on your adapter and texts, up to the page",
        "lorascope run --lora-path my-adapter --dataset texts.jsonl",
    ),
    "generate": Command(
        "activations.generate",
        "activations.generate.GenerateConfig",
        "run model and adapter on texts and save the activations",
        "lorascope generate --lora-path my-adapter --dataset texts.jsonl --num-examples 1000",
    ),
    "train": Command(
        "sae.train",
        "sae.settings.TrainConfig",
        "train a sparse autoencoder (SAE) on saved activations",
        "lorascope train --data-dir activations_all_adapters --expansion-factor 16 --k 50",
    ),
    "collect": Command(
        "features.collect",
        "features.collect.CollectConfig",
        "find the strongest examples of every feature",
        "lorascope collect --sae trained_sae_adapters_g-u-d-q-k-v-o.pt --top-k 10",
    ),
    "label": Command(
        "labels.label",
        "labels.label.LabelConfig",
        "say in words what each feature responds to, and score these labels",
        "lorascope label --input out/features.h5",
    ),
    "study": Command(
        "labels.published_study",
        "labels.published_study.StudyConfig",
        "say how many features, columns and neurons have one meaning, and what features do",
        "lorascope study --input out/features.h5 --lora-path my-adapter",
    ),
    "dashboard": Command(
        "dashboard.render",
        "dashboard.render.DashboardConfig",
        "write the features as one self-contained HTML page",
        "lorascope dashboard --input features.h5 --output page.html",
    ),
    "report": Command(
        "dashboard.report",
        "dashboard.report.ReportConfig",
        "say what the adapter learned, as text to send and as JSON",
        "lorascope report --input lorascope-output",
    ),
    "export": Command(
        "features.export",
        "features.export.ExportConfig",
        "write the features as published JSON or as a CSV table",
        "lorascope export --input features.h5 --output features.csv",
    ),
    "evaluate": Command(
        "causal.evaluate",
        "causal.effect_options.EvaluateConfig",
        "measure how much of the adapter's effect the SAE explains",
        "lorascope evaluate --lora-path my-adapter --data-dir out/activations --sae out/sae",
    ),
    "ablate": Command(
        "causal.ablate",
        "causal.effect_options.AblateConfig",
        "measure what removing layers, projections, sites and features changes",
        "lorascope ablate --lora-path my-adapter --data-dir out/activations --sae out/sae",
    ),
    "attribute": Command(
        "causal.attribute",
        "causal.effect_options.AttributeConfig",
        "find the features that caused each predicted token",
        "lorascope attribute --lora-path my-adapter --data-dir out/activations "
        "--sae out/sae --rollouts-of out/features.h5",
    ),
    "direct": Command(
        "causal.direct",
        "causal.effect_options.DirectConfig",
        "list the tokens that each feature promotes and suppresses, from weights alone",
        "lorascope direct --lora-path my-adapter --sae out/sae",
    ),
    "audit": Command(
        "audit.audit",
        "audit.audit_options.AuditConfig",
        "say what to know of an adapter before using it; needs no texts and no SAE",
        "lorascope audit --lora-path stranger/adapter",
    ),
    "compare": Command(
        "compare.compare",
        "compare.compare_options.CompareConfig",
        "say what differs between adapters of one base, or between checkpoints",
        "lorascope compare adapter-1 adapter-2 --null adapter-1-seed-2 adapter-1-seed-3 "
        "--dataset texts.jsonl",
    ),
    "steer": Command(
        "causal.steer",
        "causal.effect_options.SteerConfig",
        "let the model write with features added, removed or clamped",
        "lorascope steer --lora-path my-adapter --data-dir out/activations --sae out/sae "
        "--features 12 --doses 0.5 1 2",
    ),
    "edit": Command(
        "causal.edit",
        "causal.effect_options.EditConfig",
        "remove features from the adapter itself, or scale them",
        "lorascope edit --lora-path my-adapter --data-dir out/activations --sae out/sae "
        "--features 12 --output without-12",
    ),
}
