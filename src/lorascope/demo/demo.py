"""Take the shipped subject through everything, offline, into a page.

1. Write fresh problems with their reasoning traces, in the s1 form, none of which the subject was
   trained on.
2. `run` the shipped base model and adapter over them.

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
    num_examples: int = option(1000, help="problems to write and read")
    effect_texts: int = option(
        4, help="texts on which to measure what the features do; 0: leave that out"
    )
    open: bool = option(False, help="open the page in a browser", identity=False)
    overwrite: bool = option(False, help="replace outputs of other settings", identity=False)

    def check(self) -> None:
        """Refuse impossible numbers."""
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
    log.info("the page: %s", page)
    return page


def demo_run(problems: Path, config: DemoConfig) -> pipeline.RunConfig:
    """Return the run that the demo makes.

    Four latents a column and three to a token gave the features that match the known classes of
    tokens best (`meaning`), on average over four seeds, of those tried: 4 or 8, and 2 to 8.
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
