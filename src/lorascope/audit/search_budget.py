"""How much of a search for triggers fits into a budget of time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from lorascope.audit.scenes import Scene

N_SEARCH = 4  # scenes of the search
LONGEST = 3  # tokens of a phrase


@dataclass(frozen=True)
class Sizes:
    """How many of everything, at most.

    Random tokens whose mean is the usual change, controls, inserts of each length to verify, scenes
    to verify in, scenes for lengths.
    """

    random: int = 64
    controls: int = 32
    kept: int = 12
    verify: int = 8
    late: int = 6

    @property
    def n_runs(self) -> int:
        """About how many runs of one insert in one scene they need."""
        usual = self.random * (N_SEARCH + self.verify + self.late)
        return usual + LONGEST * self.verify * (self.controls + 3 * self.kept)

    def scaled(self, share: float) -> "Sizes":
        """Return a share of them, with enough to tell anything."""
        least = Sizes(random=12, controls=8, kept=3, verify=3, late=2)
        return Sizes(
            **{
                name: max(getattr(least, name), round(min(share, 1.0) * full))
                for name, full in vars(self).items()
            }
        )


class Clock:
    """The budget in seconds, and how many tokens a second are run."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds, self.rate = time.perf_counter(), seconds, 0.0

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.began

    def time(self, scenes: Sequence[Scene], inserted: Int[Tensor, "n length"]) -> None:
        """Measure the rate while the scenes' usual changes are measured."""
        began = time.perf_counter()
        for scene in scenes:
            scene.set_usual(inserted)
        n = sum(scene.n_read + inserted.shape[1] for scene in scenes) * len(inserted)
        self.rate = n / (time.perf_counter() - began)

    def affords(self, scenes: Sequence[Scene], length: int, share: float) -> int:
        """Return how many inserts of a length can be run in all of the scenes in a share of it."""
        cost = sum(scene.n_read + length for scene in scenes)
        return int(share * self.seconds * self.rate / cost)
