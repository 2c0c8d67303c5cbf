"""Say of two adapters how they differ, of which kind each feature is, and whether it is news.

- *only in* an adapter: the other's part writes less than a tenth of what both parts write.
- *news*: to take the feature's parts away from both adapters lowers KL(first ‖ second), with all of
  its 95 % interval over texts above chance (what other features would contribute where this one
  fires) and above the level, which is the most that a feature lowers KL(first ‖ second seed).
- *changed*: in both, and news. *shared*: in both, and no news.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorascope.causal.effects import bootstrap_interval, sum_by
from lorascope.compare.compare_options import CompareConfig
from lorascope.compare.compare_records import (
    PRESENT,
    AdapterRecord,
    FeatureDifference,
    FeatureKind,
    PairDifference,
    RoleDifference,
    Step,
)
from lorascope.compare.differences import Contributions, Differences, Pair, Predictions
from lorascope.compare.joint import Member
from lorascope.texts.roles import ROLES

N_REPORTED = 60  # features of a pair, those of largest contribution
_CHANCE = 95  # percentile of what other features would contribute


class Judge:
    """Says of pairs what their features explain."""

    def __init__(
        self, config: CompareConfig, differences: Differences, found: Predictions, seed: int
    ) -> None:
        self.config, self.differences, self.found, self.seed = config, differences, found, seed
        store = differences.held_out.store
        self.owner = np.array(
            [differences.number[i] for i in store.rollout_of(found.rows).tolist()]
        )
        self.role = differences.held_out.role_of(found.rows)
        self.counts = self._sums(np.ones(len(found.rows)))

    def _sums(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return sum_by(self.owner, values, self.differences.n_rollouts)

    def _mean(self, sums: npt.NDArray[np.float64]) -> float:
        return float(sums.sum()) / float(self.counts.sum())

    def _interval(self, sums: npt.NDArray[np.float64]) -> tuple[float, float] | None:
        return bootstrap_interval(sums, self.counts, self.seed)

    def _amounts(self, sums: npt.NDArray[np.float64]) -> tuple[float, float] | None:
        edges = self._interval(sums)
        return None if edges is None else (max(edges[0], 0.0), max(edges[1], 0.0))

    def adapter(self, member: Member) -> AdapterRecord:
        """Return what an adapter is, and how far it is from the base."""
        subject, name = self.differences.subjects[member.name], member.name
        sums = self._sums(self.found.to_base[name])
        return AdapterRecord(
            name=name,
            folder=Path(member.given).name,
            digest=member.adapter.digest,
            n_columns=subject.layout.d_in,
            ranks=tuple(sorted({site.rank for site in subject.layout.sites})),
            kl_base=self._mean(sums),
            kl_base_interval=self._amounts(sums),
            floor=self._mean(self._sums(self.found.floor[name])),
            step=member.step,
            loss=member.loss,
        )

    def pair(self, pair: Pair, level: float, seeds: float | None) -> PairDifference:
        """Return the difference of a pair. `level` is what the strongest feature of seeds loses."""
        d, found = self.differences, self.found
        floor = max(self._mean(self._sums(found.floor[name])) for name in pair)
        level = max(level, floor)
        kl = self._sums(found.pairs[pair])
        parts = d.contributions(pair, self.config.steps, self.seed)
        total = parts.of_latent.sum(1)
        order = np.argsort(-total, kind="stable")
        tested = order[total[order] > 0][: self.config.verify]
        prefixes = [2**i for i in range(12) if 2**i < len(tested)] + [len(tested)]
        sets = [*(tested[i : i + 1] for i in range(len(tested))), *(tested[:n] for n in prefixes)]
        lost = d.removals(pair, sets) if len(tested) else np.zeros((0, d.n_rollouts))
        removed = dict(zip(tested.tolist(), lost, strict=False))
        reported = order[total[order] != 0][:N_REPORTED].tolist()
        features = tuple(
            self._feature(pair, latent, parts, removed.get(latent), level)
            for latent in dict.fromkeys([*tested.tolist(), *reported])
        )
        news = [one.feature for one in features if one.is_news]
        without = None
        if news:
            without = max(self._mean(kl - d.removals(pair, [np.array(news)])[0]), 0.0)
        fired = np.flatnonzero(d.n_fired).tolist()
        kinds = [self._kind(pair, latent, latent in news) for latent in fired]
        return PairDifference(
            first=pair[0],
            second=pair[1],
            kl=self._mean(kl),
            kl_interval=self._amounts(kl),
            kl_reverse=self._mean(self._sums(found.reverse[pair])),
            roles={
                ROLES[role]: RoleDifference(
                    n_tokens=int((self.role == role).sum()),
                    kl=float(found.pairs[pair][self.role == role].mean()),
                )
                for role in np.unique(self.role).tolist()
            },
            contributions=self._mean(total),
            bias=self._mean(parts.bias),
            unexplained=self._mean(parts.unexplained),
            level=level,
            seeds=seeds,
            n_kinds={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            n_news=len(news),
            without_news=without,
            steps=tuple(
                Step(n_features=n, kl=max(self._mean(kl - one), 0.0))
                for n, one in zip(prefixes, lost[len(tested) :], strict=False)
            ),
            shifts=found.shifts[pair].strongest(d.held_out) if found.shifts[pair].total else (),
            features=features,
        )

    def _feature(
        self,
        pair: Pair,
        latent: int,
        parts: Contributions,
        removed: npt.NDArray[np.float64] | None,
        level: float,
    ) -> FeatureDifference:
        contribution = parts.of_latent[latent]
        chance = float(np.percentile(parts.controls[latent], _CHANCE)) / float(self.counts.sum())
        interval = None if removed is None else self._interval(removed)
        least = max(chance, level)
        is_news = self._mean(contribution) > least and interval is not None and interval[0] > least
        return FeatureDifference(
            feature=latent,
            kind=self._kind(pair, latent, is_news),
            share=self._share(pair, latent),
            cosine=float(self.differences.writes.cosine(*pair)[latent]),
            contribution=self._mean(contribution),
            contribution_interval=self._interval(contribution),
            chance=chance,
            removed=None if removed is None else self._mean(removed),
            removed_interval=interval,
            is_news=is_news,
        )

    def _share(self, pair: Pair, latent: int) -> float:
        one, other = (float(self.differences.writes.size(name)[latent]) for name in pair)
        return other / (one + other) if one + other else 0.5

    def _kind(self, pair: Pair, latent: int, is_news: bool) -> FeatureKind:
        share = self._share(pair, latent)
        if share < PRESENT:
            return "only in the first"
        if share > 1 - PRESENT:
            return "only in the second"
        return "changed" if is_news else "shared"
