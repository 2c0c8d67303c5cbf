"""Say of two adapters how they differ, of which kind each feature is, and whether it is news.

- *only in* an adapter: the feature's removal changes the predictions of the other by less than a
  tenth of what it changes in both, and the other's part writes less. A feature that was not removed
  is judged by what its parts write alone.
- *news*: if the first adapter's part takes the place of the second's, KL(first ‖ second) falls by
  more than the level, which is the most that one feature explains of KL(first ‖ second seed), and
  by more than that of the seeds, with all of the 95 % interval over texts of the difference above
  0. Without a second seed, the interval of the fall is above chance: what 95 % of the other
  features would contribute where this one fires, if they wrote as much as its two parts differ.
- *changed*: in both, and news. *shared*: in both, and no news.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lorascope.causal.effects import Sums, bootstrap_interval, sum_by
from lorascope.causal.report_records import Interval
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
        self.null_pair: Pair | None = None
        self.null_kl: float | None = None
        self.level = 0.0
        store = differences.held_out.store
        self.owner = np.array(
            [differences.number[i] for i in store.rollout_of(found.rows).tolist()]
        )
        self.role = differences.held_out.role_of(found.rows)
        self.counts = self._sums(np.ones(len(found.rows)))
        self.floor = max(self._mean(self._sums(kl)) for kl in found.floor.values())

    def _sums(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the sums over what each text's model writes."""
        return sum_by(self.owner, values * self.found.written, self.differences.n_rollouts)

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

    def seeds(self, pair: Pair) -> PairDifference:
        """Return the difference of the first adapter and its second seed; it sets the level."""
        self.null_pair = pair
        found = self.pair(pair)
        sure = [
            one.explained or 0.0 for one in found.features if _is_above_0(one.explained_interval)
        ]
        self.level, self.null_kl = max(sure, default=0.0), found.kl
        return found

    def pair(self, pair: Pair) -> PairDifference:
        """Return the difference of a pair."""
        d, found = self.differences, self.found
        level = max(self.level, self.floor)
        kl = self._sums(found.pairs[pair])
        parts = d.contributions(pair, self.config.steps, self.seed)
        total = parts.of_latent.sum(1)
        order = np.argsort(-total, kind="stable")
        tested = order[total[order] > 0][: self.config.verify]
        prefixes = [2**i for i in range(12) if 2**i < len(tested)] + [len(tested)]
        singles = [tested[i : i + 1] for i in range(len(tested))]
        sets = [*singles, *(tested[:n] for n in prefixes)] if singles else []
        lost = d.exchanges(pair, sets)
        effects = [d.removals(name, singles) for name in pair]
        null = None
        if self.null_pair not in (None, pair):
            null = d.exchanges(self.null_pair, singles)
        reported = order[total[order] != 0][:N_REPORTED]
        features = [
            *(
                self._tested(
                    self._feature(pair, latent, parts),
                    lost[i],
                    (effects[0][i], effects[1][i]),
                    None if null is None else null[i],
                    level,
                )
                for i, latent in enumerate(tested.tolist())
            ),
            *(
                self._feature(pair, latent, parts)
                for latent in reported[~np.isin(reported, tested)].tolist()
            ),
        ]
        news = [one.feature for one in features if one.is_news]
        without = None
        if news:
            without = max(self._mean(kl - d.exchanges(pair, [np.array(news)])[0]), 0.0)
        kinds = {
            latent: kind_of(share := self._share(pair, latent), share)
            for latent in np.flatnonzero(d.n_fired).tolist()
        }
        kinds |= {one.feature: one.kind for one in features if d.n_fired[one.feature]}
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
            seeds=None if pair == self.null_pair else self.null_kl,
            n_kinds=dict(Counter(kinds.values())),
            n_news=len(news),
            without_news=without,
            steps=tuple(
                Step(n_features=n, kl=max(self._mean(kl - one), 0.0))
                for n, one in zip(prefixes, lost[len(tested) :], strict=False)
            ),
            shifts=found.shifts[pair].strongest(d.held_out) if found.shifts[pair].total else (),
            features=tuple(features),
        )

    def _feature(self, pair: Pair, latent: int, parts: Contributions) -> FeatureDifference:
        """Return what is known of a feature without removing it."""
        contribution, share = parts.of_latent[latent], self._share(pair, latent)
        return FeatureDifference(
            feature=latent,
            kind=kind_of(share, share),
            share=share,
            cosine=float(self.differences.writes.cosine(*pair)[latent]),
            contribution=self._mean(contribution),
            contribution_interval=self._interval(contribution),
            chance=float(np.percentile(parts.controls[latent], _CHANCE)) / float(self.counts.sum()),
            explained=None,
            explained_interval=None,
            seeds=None,
            excess_interval=None,
            effect_first=None,
            effect_second=None,
            is_news=False,
        )

    def _tested(
        self,
        feature: FeatureDifference,
        lost: Sums,
        effects: tuple[Sums, Sums],
        null: Sums | None,
        level: float,
    ) -> FeatureDifference:
        """Return a feature with what its exchange and its removal do, which decides its kind."""
        explained, interval, excess = self._mean(lost), self._interval(lost), None
        if null is not None:
            excess = self._interval(lost - null)
            is_news = explained > level and _is_above_0(excess)
        else:
            least = max(feature.chance, level)
            is_news = self.null_pair is None and interval is not None and interval[0] > least
        one, other = map(self._mean, effects)
        share = other / (one + other) if one + other > self.floor else feature.share
        kind = kind_of(share, feature.share)
        return replace(
            feature,
            kind="changed" if is_news and kind == "shared" else kind,
            explained=explained,
            explained_interval=interval,
            seeds=None if null is None else self._mean(null),
            excess_interval=excess,
            effect_first=one,
            effect_second=other,
            is_news=is_news,
        )

    def _share(self, pair: Pair, latent: int) -> float:
        one, other = (float(self.differences.writes.size(name)[latent]) for name in pair)
        return other / (one + other) if one + other else 0.5


def kind_of(effects: float, sizes: float) -> FeatureKind:
    """Return the kind of a feature from the second adapter's share of its effects and its sizes.

    An adapter that has a feature alone writes more of it, too. Where another part of an adapter
    has the last word, a feature has little effect in it, though it is there.
    """
    if effects < PRESENT and sizes <= 0.5:
        return "only in the first"
    return "only in the second" if effects > 1 - PRESENT and sizes >= 0.5 else "shared"


def _is_above_0(interval: Interval) -> bool:
    return interval is not None and interval[0] > 0
