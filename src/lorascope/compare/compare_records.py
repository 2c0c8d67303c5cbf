"""What `compare` reports, as typed records. KL is in nats a token, intervals are 95 %."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lorascope.causal.report_records import (
    Amount,
    AmountInterval,
    Count,
    Interval,
    ReportRecord,
    Share,
    TokenShift,
)

PRESENT = 0.1  # share of the larger part, or of both, from which a part counts as there

FeatureKind = Literal["shared", "changed", "only in the first", "only in the second"]


@dataclass(frozen=True, kw_only=True)
class AdapterRecord:
    """One of the adapters. `folder` is the last part of what the user gave.

    `kl_base` is KL(adapter ‖ base), `floor` KL of the adapter and itself with its rows changed by
    one rounding step.
    """

    name: str
    folder: str
    digest: str
    n_columns: Count
    ranks: tuple[Count, ...]
    kl_base: Amount
    kl_base_interval: AmountInterval
    floor: Amount
    step: Count | None = None
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class RoleDifference:
    """The difference where tokens of one role are predicted."""

    n_tokens: Count
    kl: Amount


@dataclass(frozen=True, kw_only=True)
class FeatureDifference:
    """What one feature has to do with the difference of a pair.

    `share` is the second part's share of the sizes of what both parts write, `cosine` that of what
    they write. `contribution` is its part of KL(first ‖ second), `chance` what 95 % of the features
    would contribute at most, if they fired where this one does and wrote as much as its parts
    differ. The others are None if it was not tested: `explained` is what the KL loses when the
    first's part takes the place of the second's, `seeds` the most that KL(first ‖ another seed)
    loses, `excess_interval` that of the difference of the two; `at_different` is the part of
    `explained` that is of texts that differ more than seeds do, and `seeds_at_different` the mean
    over seeds of the same; `effect_first` and `effect_second` are KL(adapter ‖ without it).
    """

    feature: Count
    kind: FeatureKind
    share: Share
    cosine: float
    contribution: float
    contribution_interval: Interval
    chance: float
    explained: float | None
    explained_interval: Interval
    seeds: float | None
    excess_interval: Interval
    at_different: float | None
    at_different_interval: Interval
    seeds_at_different: float | None
    effect_first: Amount | None
    effect_second: Amount | None
    is_news: bool


@dataclass(frozen=True, kw_only=True)
class Step:
    """KL(first ‖ second) after the exchange of the features of largest contribution."""

    n_features: Count
    kl: Amount


@dataclass(frozen=True, kw_only=True)
class PairDifference:
    """The difference of two adapters: KL(first ‖ second).

    `contributions` of features, `bias` and `unexplained` add up to `kl` up to the error of the
    path. `level` is the most that one feature surely explains of KL(first ‖ another seed), or
    without other seeds the floor. `seeds` is the largest such KL, `text_level` the KL a token above
    which a text differs more than seeds do, and `n_different` counts such texts; None without
    seeds. `n_kinds` counts features that fire. `without_news` is the KL that stays after the
    exchange of all news.
    """

    first: str
    second: str
    kl: Amount
    kl_interval: AmountInterval
    kl_reverse: Amount
    roles: Mapping[str, RoleDifference]
    contributions: float
    bias: float
    unexplained: float
    level: Amount
    seeds: Amount | None
    text_level: Amount | None
    n_different: Count | None
    n_kinds: Mapping[str, Count]
    n_news: Count
    without_news: Amount | None
    steps: tuple[Step, ...]
    shifts: tuple[TokenShift, ...]
    features: tuple[FeatureDifference, ...]


@dataclass(frozen=True, kw_only=True)
class JointExample:
    """A token at which a feature fires, the text around it, and what each adapter's row adds.

    `parts` are the products of each adapter's row, less the dictionary's bias, with the encoder.
    """

    rollout: int
    value: float
    before: str
    token: str
    after: str
    parts: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class JointFeature:
    """A feature of the joint dictionary. `sizes` is what each part writes at its mean value.

    `born`, `peak` and `died` are steps of checkpoints: the first and the last at which the part is
    there (`PRESENT` of its largest), and the largest. `died` is None if it is there in the end.
    """

    feature: Count
    label: str
    n_fired: Count
    mean: Amount
    sizes: Mapping[str, Amount]
    examples: tuple[JointExample, ...]
    born: Count | None = None
    peak: Count | None = None
    died: Count | None = None


@dataclass(frozen=True, kw_only=True)
class DifferentText:
    """The beginning of a text and the KL of the first pair at the prediction of each token."""

    rollout: int
    tokens: tuple[str, ...]
    kl: tuple[Amount | None, ...]


@dataclass(frozen=True, kw_only=True)
class ComparisonReport(ReportRecord):
    """What `compare` finds. `nulls` names the adapters that are other seeds of the first.

    `n_tokens` counts predictions of what a model writes; all means are over these, but `roles` has
    the others too. `fvu` and `l0` are those of the joint dictionary on held-out rows.
    """

    kind = "comparison"
    # 1 removed features from both adapters, where this exchanges them; 2 had one seed at most.
    schema = 3
    base: str
    nulls: tuple[str, ...]
    adapters: tuple[AdapterRecord, ...]
    n_rollouts: Count
    n_tokens: Count
    n_features: Count
    n_fired: Count
    fvu: float | None
    l0: float | None
    pairs: tuple[PairDifference, ...]
    features: tuple[JointFeature, ...]
    texts: tuple[DifferentText, ...]
