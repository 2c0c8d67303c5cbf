"""The shares of an adapter's effect that runs recover: sums over tokens, with their intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.causal.effects import (
    TokenRollouts,
    bootstrap_interval,
    complement,
    complement_interval,
    ratio_of_sums,
)
from lorascope.causal.held_out import HeldOut
from lorascope.causal.report_records import (
    CurvePoint,
    GroupRecovered,
    Recovered,
    RoleRecovered,
    RunRecovered,
    SubsetRecovered,
    TokensRecovered,
)
from lorascope.causal.splice import Compared

_ABOVE_FLOOR = 10.0  # times the floor: a smaller effect has no meaningful share


class Shares:
    """Sums over tokens, as shares with intervals.

    `values` has KL and CE of the measured `rows` for each run, in nats. A run is a name, or `(kind,
    group, how)`; `zero` is the run of share 0.
    """

    def __init__(
        self,
        held_out: HeldOut,
        rows: npt.NDArray[np.int64],
        values: Mapping[Any, Compared],
        zero: str,
        rounding: float,
        seed: int,
    ) -> None:
        _, rollout = np.unique(held_out.store.rollout_of(rows), return_inverse=True)
        self.tokens = TokenRollouts(rollout, int(rollout.max(initial=-1)) + 1)
        self.role = held_out.role_of(rows)
        self.generated = held_out.is_generated(rows)
        self.values, self.zero, self.rounding, self.seed = values, zero, rounding, seed

    def of_run(self, run: str, l0: float | None) -> RunRecovered:
        """Return what a run with `l0` values a token recovers, of all tokens and generated ones."""
        everything = np.ones(len(self.role), bool)
        generated = self._over(run, self.generated) if self.generated.any() else None
        return RunRecovered(**vars(self._over(run, everything)), generated=generated, l0=l0)

    def of_role(self, number: int) -> RoleRecovered:
        """Return what the SAE's run recovers over the tokens of one role."""
        where = self.role == number
        return RoleRecovered(
            **vars(self._recovered("sae", self.zero, where)),
            n_tokens=int(where.sum()),
            kl_zero=float(self.values[self.zero].kl[where].mean(dtype=np.float64)),
        )

    def of_group(self, kind: str, name: str) -> GroupRecovered:
        """Return what the SAE recovers of the columns of one group: of generated tokens, if any."""
        where = self.generated if self.generated.any() else ~self.generated
        share = self._recovered((kind, name, "sae"), (kind, name, "zero"), where)
        removed = self._recovered((kind, name, "zero"), self.zero, where).kl
        if removed <= _ABOVE_FLOOR * self.rounding:
            share = Recovered(kl=share.kl, recovered=None, recovered_interval=None)
        return GroupRecovered(**vars(share), kl_zero=removed)

    def of_subset(self, name: str, sites: tuple[str, ...]) -> SubsetRecovered:
        """Return the same of a subset of the sites."""
        how = "worst" if name == "worst" else "drawn"
        return SubsetRecovered(**vars(self.of_group("subsets", name)), how=how, sites=sites)

    def of_point(self, run: Any, l0: float) -> CurvePoint:
        """Return what a run with `l0` values a token recovers."""
        generated = self._recovered(run, self.zero, self.generated)
        everything = self._recovered(run, self.zero, np.ones(len(self.role), bool))
        return CurvePoint(
            **vars(everything), l0=l0, generated=generated if self.generated.any() else None
        )

    def _over(self, run: str, where: npt.NDArray[np.bool_]) -> TokensRecovered:
        ce, best, worst = (
            self.tokens.sums(self.values[name].ce, where) for name in (run, "adapter", self.zero)
        )
        conditional = self._recovered(run, "constant", where)
        return TokensRecovered(
            **vars(self._recovered(run, self.zero, where)),
            conditional=conditional.recovered,
            conditional_interval=conditional.recovered_interval,
            ce=float(ce.sum()) / int(where.sum()),
            ce_recovered=ratio_of_sums(worst - ce, worst - best),
            ce_recovered_interval=bootstrap_interval(worst - ce, worst - best, self.seed),
        )

    def _recovered(self, run: Any, reference: Any, where: npt.NDArray[np.bool_]) -> Recovered:
        kl, below = (self.tokens.sums(self.values[name].kl, where) for name in (run, reference))
        return Recovered(
            kl=float(kl.sum()) / int(where.sum()),
            recovered=complement(ratio_of_sums(kl, below)),
            recovered_interval=complement_interval(bootstrap_interval(kl, below, self.seed)),
        )
