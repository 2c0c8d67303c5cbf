"""Counts and sums of every latent's firings, over a stream, in memory that does not grow with it.

A sum adds each latent's values in the order of their rows, whatever the batches they come in: the
same rows give the same bits.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.features.topk import Firings
from lorascope.texts.rollouts import ROLES

N_BINS = 40  # four to an octave, from the lowest threshold up: a factor of 1,024
N_TENTHS = 10
_MANTISSA = 21  # bits of a float32 below those that tell the quarter of the octave
_LOWEST = 1e-6  # where the histogram begins at the latest


@dataclass(frozen=True)
class FiringStatistics:
    """What is counted. Arrays are changed in place."""

    n_active: npt.NDArray[np.int64]  # (latent,)
    total: npt.NDArray[np.float64]
    square: npt.NDArray[np.float64]
    n_rollouts: npt.NDArray[np.int64]
    by_role: npt.NDArray[np.int64]  # (latent, role)
    by_position: npt.NDArray[np.int64]  # (latent, 10)
    histogram: npt.NDArray[np.int64]  # (latent, N_BINS)

    @classmethod
    def empty(cls, d_sae: int) -> "FiringStatistics":
        """Return statistics of no firings."""

        def zeros(*width: int) -> npt.NDArray[np.int64]:
            return np.zeros((d_sae, *width), np.int64)

        sums = np.zeros(d_sae), np.zeros(d_sae)
        return cls(zeros(), *sums, zeros(), zeros(len(ROLES)), zeros(N_TENTHS), zeros(N_BINS))

    def add(
        self,
        firings: Firings,
        roles: npt.NDArray[np.integer[Any]],
        tenths: npt.NDArray[np.integer[Any]],
        lowest: float,
    ) -> None:
        """Count firings whose tokens have these roles and lie in these tenths of their rollouts."""
        latent = firings.latent
        value = firings.value.astype(np.float64)
        np.add.at(self.n_active, latent, 1)
        np.add.at(self.total, latent, value)
        np.add.at(self.square, latent, value**2)
        np.add.at(self.by_role.reshape(-1), latent * len(ROLES) + roles, 1)
        np.add.at(self.by_position.reshape(-1), latent * N_TENTHS + tenths, 1)
        bins = (firings.value.view(np.int32) >> _MANTISSA) - _first_bin(lowest)
        bins = np.clip(bins, 0, N_BINS - 1)
        np.add.at(self.histogram.reshape(-1), latent * N_BINS + bins, 1)

    def merge(self, later: "FiringStatistics") -> None:
        """Add the statistics of the rows that follow."""
        for field in fields(self):
            mine = getattr(self, field.name)
            mine += getattr(later, field.name)

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """Mean value where a latent fires, `(latent,)`; 0 for one that never does."""
        return self._mean().astype(np.float32)

    @property
    def std(self) -> npt.NDArray[np.float32]:
        """Standard deviation of the values, `(latent,)`."""
        square = self.square / np.maximum(self.n_active, 1)
        return np.sqrt(np.maximum(square - self._mean() ** 2, 0)).astype(np.float32)

    def _mean(self) -> npt.NDArray[np.float64]:
        return self.total / np.maximum(self.n_active, 1)


def histogram_edges(lowest: float) -> npt.NDArray[np.float32]:
    """Return the bins' edges, `(N_BINS + 1,)`: 2**e times 1, 1.25, 1.5 and 1.75.

    These are the float32 numbers whose last bits are zero, so that a value's bin is in its bits.
    """
    bits = (_first_bin(lowest) + np.arange(N_BINS + 1, dtype=np.int32)) << _MANTISSA
    return bits.astype(np.int32).view(np.float32)


def _first_bin(lowest: float) -> int:
    return int(np.float32(max(lowest, _LOWEST)).view(np.int32)) >> _MANTISSA
