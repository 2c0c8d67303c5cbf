"""The options of `compare`, apart from it so that `--help` needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from lorascope.config import option
from lorascope.errors import ConfigError
from lorascope.sae.settings import TrainOptions
from lorascope.subject.options import ReadingOptions


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TrainOptions, ReadingOptions):
    """Options of `compare`."""

    adapters: tuple[str, ...] = option(
        help="adapters of one base, each a folder or a hub id; or one folder of checkpoints",
        identity=False,
        path=True,
        positional=True,
    )
    null: tuple[str, ...] = option(
        (),
        help="other seeds of the first adapter, two or more if you can: what differs between them "
        "is no news",
        identity=False,
        path=True,
    )
    holdout: float = option(
        0.2, help="share of the tokens held out for the report, by rollout; half of it is measured"
    )
    max_rollouts: int = option(100, help="held-out rollouts to measure, at most", at_least=1)
    verify: int = option(
        40,
        help="features of each pair that are really exchanged, those of largest contribution",
        at_least=1,
    )
    steps: int = option(4, help="points on the path from one adapter to the other", at_least=1)
    output: Path = option(Path("lorascope-compare"), help="folder to write", identity=False)
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace outputs of other settings", identity=False)

    def check(self) -> None:
        """Refuse no adapter, and what would train several dictionaries."""
        super().check()
        if not self.adapters:
            raise ConfigError("no adapter is given; name two or more, or a folder of checkpoints")
        self.require_one_sae("compare")
