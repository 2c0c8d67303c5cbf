"""Run every stage on the shipped subject model, offline, and make its page.

1. Unpack problems with reasoning traces in the s1 format. The subject was not trained on them;
   `examples/demo_problems.py` generated them.
2. `run` the shipped base model and adapter on them.

In: nothing. Out: a folder with `problems.jsonl` and what `run` makes.
"""

import gzip
import logging
import webbrowser
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lorascope import pipeline
from lorascope.config import option
from lorascope.depth import DepthOptions
from lorascope.errors import ConfigError

log = logging.getLogger(__name__)

SUBJECT = Path(__file__).parent / "subject"
PROBLEMS = Path(__file__).parent / "problems.jsonl.gz"
N_PROBLEMS = 2000


@dataclass(frozen=True, kw_only=True)
class DemoConfig(DepthOptions):
    """Options of `demo`."""

    output: Path = option(Path("demo-output"), help="folder to make", identity=False)
    num_examples: int = option(1000, help="problems to read, at most 2,000", at_least=1)
    open: bool = option(False, help="open the page in a browser", identity=False)
    overwrite: bool = option(False, help="replace outputs of other settings", identity=False)

    def check(self) -> None:
        """Check the ranges of the numbers."""
        super().check()
        if self.num_examples > N_PROBLEMS:
            raise ConfigError(
                f"--num-examples is {self.num_examples}, expected {N_PROBLEMS} or fewer"
            )


def run(config: DemoConfig) -> Path:
    """Make the demo's folder and return its page."""
    config.output.mkdir(parents=True, exist_ok=True)
    problems = config.output / "problems.jsonl"
    with gzip.open(PROBLEMS) as lines:
        problems.write_bytes(b"".join(islice(lines, config.num_examples)))
    page = pipeline.run(demo_run(problems, config))
    if config.open:
        webbrowser.open(page.resolve().as_uri())
    log.info("page: %s", page)
    return page


def demo_run(problems: Path, config: DemoConfig) -> pipeline.RunConfig:
    """Return the config of the demo's run.

    With k 3, eight latents a column recover more of the generated tokens than four, and sixteen no
    more than eight. Small batches and many passes fit them best (`docs/training.md`).
    """
    return pipeline.RunConfig.from_shared(
        config,
        lora_path=str(SUBJECT / "adapter"),
        base_model=str(SUBJECT / "base"),
        dataset=str(problems),
        expansion_factor=8,
        k=3,
        batch_size=512,
        epochs=60,
    )
