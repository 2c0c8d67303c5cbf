"""The interval of a measured share, for the model cards and the benchmarks."""

import math


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the share `right / n` (Wilson 1927)."""
    z, share = 1.96, right / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + (z / n) ** 2 / 4)
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
