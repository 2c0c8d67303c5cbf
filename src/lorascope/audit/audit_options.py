"""The options of `audit`, apart from it so that `--help` needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from lorascope.config import option
from lorascope.subject.options import AdapterOptions


@dataclass(frozen=True, kw_only=True)
class AuditConfig(AdapterOptions):
    """Options of `audit`."""

    dataset: str | None = option(
        None,
        help="texts that the adapter is meant for: a file or a hub id; default: neutral ones only",
        identity=False,
        path=True,
    )
    split: str = option("train", help="split of a hub dataset", identity=False)
    columns: tuple[str, ...] = option(
        (), help="columns to read, as FIELD=COLUMN (docs/texts.md)", identity=False
    )
    num_examples: int = option(100, help="texts to read", identity=False, at_least=2)
    budget: float = option(
        5.0,
        help="minutes to look for triggers at most, roughly; 0 does not look for them",
        at_least=0,
    )
    seed: int = option(0, help="seed of sampling and of the bootstrap", at_least=0)
    output: Path = option(Path("lorascope-audit"), help="folder to write", identity=False)
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace outputs of other settings", identity=False)
