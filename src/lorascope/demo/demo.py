"""Run every stage on the shipped subject model, offline, and make its page.

1. Write new problems with reasoning traces in the s1 format. The subject was not trained on them.
2. `run` the shipped base model and adapter on them.

In: nothing. Out: a folder with `problems.jsonl` and what `run` makes.
"""

import logging
import webbrowser
from dataclasses import dataclass
from pathlib import Path

from lorascope import pipeline
from lorascope.config import Config, option
from lorascope.demo.problems import write_jsonl

log = logging.getLogger(__name__)

SUBJECT = Path(__file__).parent / "subject"


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Options of `demo`."""

    output: Path = option(Path("demo-output"), help="folder to make", identity=False)
    num_examples: int = option(1000, help="problems to write, and rollouts to read")
    effect_texts: int = option(
        4, help="held-out rollouts on which to measure the features' effects; 0 to skip this"
    )
    open: bool = option(False, help="open the page in a browser", identity=False)
    overwrite: bool = option(False, help="replace outputs of other settings", identity=False)

    def check(self) -> None:
        """Check the ranges of the numbers."""
        self.require("num_examples", 1)
        self.require("effect_texts", 0)


def run(config: DemoConfig) -> Path:
    """Make the demo's folder and return its page."""
    config.output.mkdir(parents=True, exist_ok=True)
    problems = config.output / "problems.jsonl"
    write_jsonl(problems, config.num_examples, "demo")
    page = pipeline.run(demo_run(problems, config))
    if config.open:
        webbrowser.open(page.resolve().as_uri())
    log.info("page: %s", page)
    return page


def demo_run(problems: Path, config: DemoConfig) -> pipeline.RunConfig:
    """Return the config of the demo's run.

    Expansion factor 4 and k 3 gave the features that match known classes of tokens best
    (`examples/feature_meaning.py`, mean of four seeds), among factors 4 and 8 and k from 2 to 8.
    """
    return pipeline.RunConfig(
        lora_path=str(SUBJECT / "adapter"),
        base_model=str(SUBJECT / "base"),
        dataset=str(problems),
        num_examples=config.num_examples,
        expansion_factor=4,
        k=3,
        epochs=12,
        effect_texts=config.effect_texts,
        output=config.output,
        overwrite=config.overwrite,
    )
