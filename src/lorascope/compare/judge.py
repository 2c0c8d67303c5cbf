"""Say of two adapters how they differ, of which kind each feature is, and whether it is news.

- *only in* an adapter: the feature's removal changes the predictions of the other by less than a
  tenth of what it changes in both, and the other's part writes less. A feature that was not removed
  is judged by what its parts write alone.
- *news*: a feature explains by how much KL(first ‖ second) falls if the first adapter's part takes
  the place of the second's. With other seeds of the first, it is news in one of two cases:
  1. Some texts are *different*: KL(first ‖ second) a token is a quarter larger there than
     KL(first ‖ seed) at any text, of any seed. What the feature explains at these is above 0, with
     all of the 95 % interval over texts, and more than in seeds on average. So a feature need not
     be large: where the texts are news, all that explains them is.
  2. It explains more than the level, which is the most that one feature surely explains of
     KL(first ‖ seed), and more than itself in any seed, with all of the interval of the difference
     above 0. So a difference in one feature is found that is small beside those of the seeds.

  Without seeds, the interval of what it explains is above chance: what 95 % of the other features
  would contribute where this one fires, if they wrote as much as its two parts differ.
- *changed*: in both, and news. *shared*: in both, and no news.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from lorascope.compare.differences import (
    BASE,
    ITSELF,
    Contributions,
    Differences,
    Pair,
    Predictions,
)
from lorascope.compare.joint import Member
from lorascope.texts.roles import ROLES

N_REPORTED = 60  # features of a pair, those of largest contribution
_CHANCE = 95  # percentile of what other features would contribute
# Of the largest KL of a text between seeds. Of 12 seeds beside two others, one had 4 texts above
# that KL, which is enough for an interval above 0, and none had one above 1.25 times it.
_MARGIN = 1.25


class Judge:
    """Says of pairs what their features explain."""

    def __init__(
        self, config: CompareConfig, differences: Differences, found: Predictions, seed: int
    ) -> None:
        self.config, self.differences, self.found, self.seed = config, differences, found, seed
        self.null_pairs: Sequence[Pair] = ()
        self.null_kl: float | None = None
        self.level = 0.0
        self.text_level: float | None = None
        self.owner = differences.owners(found.rows)
        self.role = differences.held_out.role_of(found.rows)
        self.counts = self._sums(np.ones(len(found.rows)))
        self.floor = max(
            self._mean(self._sums(kl)) for pair, kl in found.kl.items() if pair[1] == ITSELF
        )

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
        sums = self._sums(self.found.kl[name, BASE])
        return AdapterRecord(
            name=name,
            folder=Path(member.given).name,
            digest=member.adapter.digest,
            n_columns=subject.layout.d_in,
            ranks=tuple(sorted({site.rank for site in subject.layout.sites})),
            kl_base=self._mean(sums),
            kl_base_interval=self._amounts(sums),
            floor=self._mean(self._sums(self.found.kl[name, ITSELF])),
            step=member.step,
            loss=member.loss,
        )

    def seeds(self, pairs: Sequence[Pair]) -> list[PairDifference]:
        """Return the differences of the first adapter and its other seeds; they set the levels."""
        self.null_pairs = pairs
        found = [self.pair(pair) for pair in pairs]
        sure = [
            feature.explained or 0.0
            for one in found
            for feature in one.features
            if _is_above_0(feature.explained_interval)
        ]
        self.level = max(sure, default=0.0)
        self.null_kl = max((one.kl for one in found), default=None)
        if pairs:
            largest = max(float(self._by_text(pair).max()) for pair in pairs)
            self.text_level = _MARGIN * max(largest, self.floor)
        return found

    def _by_text(self, pair: Pair) -> Sums:
        """Return KL a token of each text; 0 where nothing is predicted."""
        return self._sums(self.found.kl[pair]) / np.maximum(self.counts, 1)

    def pair(self, pair: Pair) -> PairDifference:
        """Return the difference of a pair."""
        d, found = self.differences, self.found
        kl = self._sums(found.kl[pair])
        parts = d.contributions(pair, self.config.steps, self.seed)
        total = parts.of_latent.sum(1)
        order = np.argsort(-total, kind="stable")
        tested = order[total[order] > 0][: self.config.verify]
        prefixes = [2**i for i in range(12) if 2**i < len(tested)] + [len(tested)]
        singles = [tested[i : i + 1] for i in range(len(tested))]
        sets = [*singles, *(tested[:n] for n in prefixes)] if singles else []
        lost = d.exchanges(pair, sets)
        effects = [d.removals(name, singles) for name in pair]
        nulls: list[Sums] = []
        different = np.zeros(len(kl), bool)
        if self.text_level is not None and pair not in self.null_pairs:
            nulls = [d.exchanges(one, singles) for one in self.null_pairs]
            different = self._by_text(pair) > self.text_level
        reported = order[total[order] != 0][:N_REPORTED]
        changed: dict[int, Any] = {
            latent: (lost[i], [self._mean(one[i]) for one in effects], [one[i] for one in nulls])
            for i, latent in enumerate(tested.tolist())
        }
        features = [
            self._feature(pair, latent, parts, different, *changed.get(latent, ()))
            for latent in dict.fromkeys([*changed, *reported.tolist()])
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
            kl_reverse=self._mean(self._sums(found.kl[pair[1], pair[0]])),
            roles={
                ROLES[role]: RoleDifference(
                    n_tokens=int((self.role == role).sum()),
                    kl=float(found.kl[pair][self.role == role].mean()),
                )
                for role in np.unique(self.role).tolist()
            },
            contributions=self._mean(total),
            bias=self._mean(parts.bias),
            unexplained=self._mean(parts.unexplained),
            level=max(self.level, self.floor),
            seeds=self.null_kl if nulls else None,
            text_level=self.text_level if nulls else None,
            n_different=int(different.sum()) if nulls else None,
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

    def _feature(
        self,
        pair: Pair,
        latent: int,
        parts: Contributions,
        different: npt.NDArray[np.bool_],
        lost: Sums | None = None,
        effects: Sequence[float] = (),
        nulls: Sequence[Sums] = (),
    ) -> FeatureDifference:
        """Return what is known of a feature; what its exchange and removal do decides its kind.

        `lost` is what its exchange takes from the pair's KL in each text, `nulls` what it takes
        from that of seeds, `effects` are KL(adapter ‖ without it) of both.
        """
        contribution, share = parts.of_latent[latent], self._share(pair, latent)
        kind, is_news, level = kind_of(share, share), False, max(self.level, self.floor)
        chance = float(np.percentile(parts.controls[latent], _CHANCE)) / float(self.counts.sum())
        explained = interval = seeds = excess = there = there_interval = seeds_there = None
        one = other = None
        if lost is not None:
            explained, interval = self._mean(lost), self._interval(lost)
            if nulls:
                most = max(nulls, key=np.sum)
                seeds, excess = self._mean(most), self._interval(lost - most)
                seeds_there = self._mean(np.mean(nulls, axis=0) * different)
                there = self._mean(lost * different)
                there_interval = self._interval(lost * different)
                is_news = (there > seeds_there and _is_above_0(there_interval)) or (
                    explained > level and _is_above_0(excess)
                )
            elif not self.null_pairs and interval is not None:
                is_news = interval[0] > max(chance, level)
            one, other = effects
            of_effects = other / (one + other) if one + other > self.floor else share
            kind = kind_of(of_effects, share)
        return FeatureDifference(
            feature=latent,
            kind="changed" if is_news and kind == "shared" else kind,
            share=share,
            cosine=float(self.differences.writes.cosine(*pair)[latent]),
            contribution=self._mean(contribution),
            contribution_interval=self._interval(contribution),
            chance=chance,
            explained=explained,
            explained_interval=interval,
            seeds=seeds,
            excess_interval=excess,
            at_different=there,
            at_different_interval=there_interval,
            seeds_at_different=seeds_there,
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
