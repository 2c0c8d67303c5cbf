"""Training logs as tests compare them."""

from pathlib import Path

from lorascope.sae.training_log import CLOCK_FIELDS, read_training_log


def timeless(path: Path) -> list[dict[str, float]]:
    """Return the lines of a training log without the fields that a clock decides."""
    return [
        {name: value for name, value in line.items() if name not in CLOCK_FIELDS}
        for line in read_training_log(path)
    ]
