"""What each kind of report holds, as frozen dataclasses: the order of fields is that of the JSON.

`record_json` writes and reads them. KL, losses and surprises are in nats a token, intervals are
95 % over rollouts, and None is a number that is undefined.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from lorascope.record_json import Range

Count = Annotated[int, Range(0)]
Amount = Annotated[float, Range(0)]  # a KL, a loss or a size
Share = Annotated[float, Range(0, 1.001)]  # rounding may take a share slightly above 1
Interval = tuple[float, float] | None  # 95 %; None where it is undefined
AmountInterval = tuple[Amount, Amount] | None
Permille = Annotated[int, Range(0, 1000)]
TokenId = Annotated[int, Range(0, (1 << 31) - 1)]


N_SLICES = 16  # of the rollouts: enough for intervals; more would take more room


@dataclass(frozen=True, kw_only=True)
class ReportRecord:
    """Base of all reports: their kind and the number of their schema."""

    kind: ClassVar[str]
    schema: ClassVar[int] = 1
    oldest: ClassVar[int | None] = None  # schema that can be read, if older ones can


@dataclass(frozen=True, kw_only=True)
class Floor:
    """KL in nats a token of runs in which nothing should happen."""

    null: Amount
    rounding: Amount


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """KL(adapter ‖ run) in nats a token, and the share of the adapter's effect that it recovers."""

    kl: Amount
    recovered: float | None
    recovered_interval: Interval


@dataclass(frozen=True, kw_only=True)
class TokensRecovered(Recovered):
    """The same of a run's predictions, what it recovers of what no constant row does, and its loss.

    `conditional` is the share of KL(adapter ‖ constant run) that is recovered.
    """

    conditional: float | None
    conditional_interval: Interval
    ce: Amount
    ce_recovered: float | None
    ce_recovered_interval: Interval


@dataclass(frozen=True, kw_only=True)
class RunRecovered(TokensRecovered):
    """The same of one run over all predicted tokens, and over those that the model writes.

    `generated` is None if no token has the role think or answer. `l0` is the number of values that
    the written rows have a token; None for the closed loop, the adapter and the base.
    """

    l0: Amount | None
    generated: TokensRecovered | None


@dataclass(frozen=True, kw_only=True)
class RoleRecovered(Recovered):
    """The same of the SAE's run, over tokens of one role; `kl_zero` is KL of the run of share 0."""

    n_tokens: Count
    kl_zero: Amount


@dataclass(frozen=True, kw_only=True)
class GroupRecovered(Recovered):
    """The same with the SAE's reconstruction in the columns of one layer or projection only."""

    kl_zero: Amount


@dataclass(frozen=True, kw_only=True)
class SubsetRecovered(GroupRecovered):
    """The same in the columns of a subset of the sites, drawn at random or found as the worst."""

    how: Literal["drawn", "worst"]
    sites: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """How much of the adapter's effect each run recovers, on held-out rollouts.

    `closed_change` is how much the rows changed in the last of `closed_passes` passes of the closed
    loop, as a share of their norm. `seeds` are the runs of SAEs that differ in their seed only.
    `layers`, `projections` and `subsets` are empty unless they were asked for. `curve` is of
    schemas 2 and 3, and is not used.
    """

    zero_is: str
    n_rollouts: Count
    n_tokens: Count
    n_generated: Count
    floor: Floor
    closed_passes: Count
    closed_change: Amount
    runs: Mapping[str, RunRecovered]
    roles: Mapping[str, RoleRecovered]
    layers: Mapping[str, GroupRecovered]
    projections: Mapping[str, GroupRecovered]
    subsets: tuple[SubsetRecovered, ...]
    seeds: tuple[str, ...]
    rows_drift: Amount
    curve: Any = None


@dataclass(frozen=True, kw_only=True)
class ShiftExample:
    """The prediction at `row` in which a token's probability moves most.

    `position` is that of the row in its rollout, `before` is the text up to it, `actual` the token
    that follows in the rollout.
    """

    row: Count
    rollout: int
    position: Count
    before: str
    actual: str
    p_base: Share
    p_adapter: Share


@dataclass(frozen=True, kw_only=True)
class TokenBefore:
    """A token that stands before a shift, and the share of the shift that is made there."""

    token: str
    share: Share


@dataclass(frozen=True, kw_only=True)
class TokenShift:
    """How the adapter moves the probability of one token where tokens of one role are predicted.

    `share` is the part of all KL(adapter ‖ base) that this token's rise or fall makes, `n_main` in
    how many predictions it makes more than half of all rises or falls. `p_base` and `p_adapter` are
    its mean probabilities, weighted by KL. `after` are the tokens before those predictions of which
    it is one of the three largest rises or falls.
    """

    token_id: TokenId
    token: str
    side: Literal["rises", "falls"]
    role: str
    share: Share
    n_main: Count
    p_base: Share
    p_adapter: Share
    example: ShiftExample
    after: tuple[TokenBefore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How likely the special tokens are that open a segment of `role`, as a product.

    `p_base` and `p_adapter` are means over `n` segments, `text` is the most frequent opening.
    """

    role: str
    text: str
    n: Count
    p_base: Share
    p_adapter: Share


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What base and adapter write after one prompt: `same` first, then each its own text."""

    rollout: int
    prompt: str
    same: str
    base: str
    adapter: str


@dataclass(frozen=True, kw_only=True)
class AttendedToken:
    """A token that a head looks at, and its share of the attention in base and adapter."""

    position: Count
    token: str
    base: Share
    adapter: Share


@dataclass(frozen=True, kw_only=True)
class AttentionExample:
    """A token at which a head looks elsewhere: `before` is the text up to it.

    `gains` and `losses` are the tokens whose share of the attention changes most.
    """

    rollout: int
    position: Count
    before: str
    token: str
    gains: tuple[AttendedToken, ...]
    losses: tuple[AttendedToken, ...]


@dataclass(frozen=True, kw_only=True)
class HeadShift:
    """The share of a head's attention that moves, its KL(adapter ‖ base), and where most moves.

    Both are means over tokens; KL is in nats.
    """

    layer: Count
    head: Count
    moved: Share
    kl: Amount
    example: AttentionExample


@dataclass(frozen=True, kw_only=True)
class AttentionShift:
    """How attention differs between base and adapter, on the first tokens of some rollouts.

    `moved[i][head]` is of layer `layers[i]`; `heads` are those of the largest.
    """

    n_rollouts: Count
    n_tokens: Count
    layers: tuple[Count, ...]
    moved: tuple[tuple[Share, ...], ...]
    heads: tuple[HeadShift, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport(ReportRecord):
    """What `evaluate` measures. `reconstruction` has the metrics of `sae.metrics.evaluate`.

    `shifts` are the tokens whose probability the adapter moves most, strongest first. `openings`
    are of the segments that the model writes, `answers` of as many prompts as were asked for.
    `attention` is None if the model does not give its attention weights, or not for plain LoRA.
    """

    kind = "evaluation"
    schema = 4
    oldest = 2  # without `attention`
    reconstruction: Mapping[str, Any]
    faithfulness: Faithfulness
    shifts: tuple[TokenShift, ...] = ()
    openings: tuple[Opening, ...] = ()
    answers: tuple[Answer, ...] = ()
    attention: AttentionShift | None = None


@dataclass(frozen=True, kw_only=True)
class Removal:
    """KL(adapter ‖ without) and the rise of the loss, in nats a token."""

    kl: Amount
    kl_interval: AmountInterval
    ce_rise: float
    kl_special: Amount | None


@dataclass(frozen=True, kw_only=True)
class PartRemoval(Removal):
    """The removal of one part, its control, and the part alone."""

    kl_random: Amount
    alone: Recovered


@dataclass(frozen=True, kw_only=True)
class GreedyStep:
    """The part that is removed in one step, and the sum of all removals so far."""

    part: str
    kl: Amount
    ce_rise: float


Verdict = Literal["specific", "not distinguishable", "too few firings"]


@dataclass(frozen=True, kw_only=True)
class PartRollouts:
    """The rollouts from which parts were removed; `kl` is that of the whole adapter there."""

    n_rollouts: Count
    n_tokens: Count
    kl: Amount


@dataclass(frozen=True, kw_only=True)
class TokenFall:
    """A token that is less likely without a feature, and its share of the removal's KL."""

    token_id: TokenId
    token: str
    share: Share


@dataclass(frozen=True, kw_only=True)
class FeatureRemoval:
    """The removal of one feature, its controls, and whether it differs from them.

    A feature that was not removed has the estimate as its KL, and no rise of the loss. `kl_each` is
    KL for each token on which it fires, `share_here` the share of KL at these tokens, `kl_control`
    the median estimate of the controls. `pull` is by how much log p of the token that the adapter
    raises most falls at each firing, `p` and `pull_excess` compare it with the controls'. `falls`
    are the tokens of text that lose most without the feature, if it was removed, largest first.
    `spread` is the permille of its effect on all predictions in each of `N_SLICES` slices of the
    rollouts, or in each rollout if there are fewer; it is empty without an effect.
    """

    feature: Count
    n_fired: Count
    kl: Amount
    kl_interval: AmountInterval
    kl_each: Amount | None
    share_here: Share | None
    ce_rise: float | None
    kl_special: Amount | None
    kl_estimate: Amount
    kl_control: Amount
    verdict: Verdict
    pull: float | None
    pull_excess: Interval
    p: Share | None
    falls: tuple[TokenFall, ...] = ()
    spread: tuple[Permille, ...] = ()

    @property
    def is_removed(self) -> bool:
        """Whether its KL is that of a real removal."""
        return self.ce_rise is not None


@dataclass(frozen=True, kw_only=True)
class AblationReport(ReportRecord):
    """What `ablate` measures; the optional parts are missing where they were not asked for.

    Floors, `without_adapter` and `features` are of `n_rollouts`, parts and `greedy` of `parts_on`.
    `estimate_rank` is Spearman's correlation of estimated and real KL over removed features.
    """

    kind = "ablation"
    schema = 5
    oldest = 3  # without `falls`; 4 is without `spread`
    n_rollouts: Count
    n_tokens: Count
    n_special: Count
    floor: Floor
    without_adapter: Removal
    parts_on: PartRollouts
    sites: Mapping[str, PartRemoval]
    projections: Mapping[str, PartRemoval]
    layers: Mapping[str, PartRemoval]
    blocks: Mapping[str, PartRemoval] | None = None
    greedy: tuple[GreedyStep, ...] | None = None
    estimate_rank: float | None = None
    features: tuple[FeatureRemoval, ...] | None = None

    def nats(self, removal: Removal | FeatureRemoval) -> tuple[float, float]:
        """Return the sum of KL over all predictions, and over those of tokens of text."""
        at_text = removal.kl * self.n_tokens
        return at_text + (removal.kl_special or 0.0) * self.n_special, at_text


class Source(NamedTuple):
    """A token whose whole row contributes, by its position in the rollout."""

    position: Count
    contribution: float


class Cause(NamedTuple):
    """A feature behind a prediction; `source` is the position at which it contributes most."""

    feature: Count
    contribution: float
    source: Count
    removal: float


@dataclass(frozen=True, kw_only=True)
class ExplainedToken:
    """One prediction: its number with and without adapter, and the contributions to the change.

    `token` is the token's position in the rollout. The five contributions add up to
    `adapter - base`, except for what the quadrature misses.
    """

    token: Count
    text: str
    adapter: float
    base: float
    features: float
    bias: float
    unexplained: float
    special: float
    other_columns: float
    sources: tuple[Source, ...]
    behind: tuple[Cause, ...]


@dataclass(frozen=True, kw_only=True)
class Likely:
    """The likeliest tokens of each prediction, and their probabilities in base and adapter.

    `count` has the number of entries of each token of the rollout, 0 for the first. The entries are
    the three likeliest of each model, those of at least 0.01 in one of them and always the first,
    in descending order of the adapter's probability.
    """

    count: tuple[Annotated[int, Range(0, 6)], ...]
    token_id: tuple[TokenId, ...]
    base: tuple[Share, ...]
    adapter: tuple[Share, ...]


@dataclass(frozen=True, kw_only=True)
class AttributedRollout:
    """KL(adapter ‖ base) and the rise of log p at each token; None for the first, not predicted.

    `likely` is what both models predict, None in a report that does not say.
    """

    rollout: int
    kl: tuple[Amount | None, ...]
    rise: tuple[float | None, ...]
    targets: tuple[ExplainedToken, ...]
    likely: Likely | None = None


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """Contributions summed over targets, as shares of the summed effect; `gap` is what they miss.

    `gap` is `Σ|sum of contributions − effect| / Σ|effect|` over targets.
    """

    gap: Amount | None
    features: float | None
    bias: float | None
    unexplained: float | None
    special: float | None
    other_columns: float | None


@dataclass(frozen=True, kw_only=True)
class RemovalAgreement:
    """How one estimate compares with real removals."""

    rank: float
    pearson: float
    top: Share


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How contributions and first-order removals compare with real removals."""

    n_targets: Count
    n_pairs: Count
    contribution: RemovalAgreement
    removal: RemovalAgreement


@dataclass(frozen=True, kw_only=True)
class FeatureContributions:
    """The contributions of one feature over all targets: their sum, and the sum of their sizes."""

    feature: Count
    n_targets: Count
    sum: float
    size: Amount


TargetKind = Literal["kl", "logprob", "logit-difference"]


@dataclass(frozen=True, kw_only=True)
class AttributionReport(ReportRecord):
    """What `attribute` measures; `unit` is that of the target's numbers.

    `vocabulary` has the bytes of the tokens that are likely somewhere, in hexadecimal.
    """

    kind = "attribution"
    target: TargetKind
    unit: str
    steps: Count
    n_rollouts: Count
    n_tokens: Count
    n_targets: Count
    kl: Amount | None
    completeness: Completeness
    agreement: Agreement | None
    features: tuple[FeatureContributions, ...]
    rollouts: tuple[AttributedRollout, ...]
    vocabulary: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class ScoredToken:
    """A token, and how many standard deviations its logit is above the mean."""

    token_id: TokenId
    token: str
    z: float


@dataclass(frozen=True, kw_only=True)
class DirectEffect:
    """The share of a feature's effect that is written directly, and the tokens of largest score."""

    feature: Count
    share: Share
    promoted: tuple[ScoredToken, ...]
    suppressed: tuple[ScoredToken, ...]


@dataclass(frozen=True, kw_only=True)
class DirectReport(ReportRecord):
    """What `direct` computes; `vocabulary` has the bytes of all named tokens, in hexadecimal."""

    kind = "direct"
    unit: str
    n_tokens: Count
    writers: tuple[str, ...]
    indirect: tuple[str, ...]
    vocabulary: Mapping[str, str]
    features: tuple[DirectEffect, ...]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt and its rollout; None where it is not of the store."""

    rollout: int | None
    text: str


@dataclass(frozen=True, kw_only=True)
class SteeredText:
    """What was written after a prompt, which is given by its index in the list."""

    prompt: Count
    token_ids: tuple[TokenId, ...]
    text: str
    kl: Amount | None


@dataclass(frozen=True, kw_only=True)
class SteeringCondition:
    """One condition: no change, a dose of the features, or its control."""

    kind: Literal["none", "feature", "control"]
    dose: float
    n_tokens: Count
    length: Amount
    kl: Amount | None
    kl_interval: AmountInterval
    surprise_adapter: Amount | None
    surprise_adapter_interval: AmountInterval
    surprise_base: Amount | None
    repeats: Share | None
    differ: Share
    values: tuple[float, ...] | None
    texts: tuple[SteeredText, ...]


@dataclass(frozen=True, kw_only=True)
class SteeringReport(ReportRecord):
    """What `steer` measures; `unit` is each feature's largest value on the store."""

    kind = "steering"
    features: tuple[Count, ...]
    how: Literal["add", "remove", "clamp"]
    where: Literal["generated", "all"]
    unit: Mapping[str, Amount]
    prompts: tuple[Prompt, ...]
    arms: tuple[SteeringCondition, ...]


@dataclass(frozen=True, kw_only=True)
class EditedRun:
    """KL(adapter ‖ run) in nats a token."""

    kl: Amount
    interval: AmountInterval


@dataclass(frozen=True, kw_only=True)
class EditReport(ReportRecord):
    """What `edit` measures; `fold_error` is the share of the edit that weights miss."""

    kind = "edit"
    features: tuple[Count, ...]
    factor: float
    tokens: Literal["text", "all"]
    output: Literal["adapter", "patch"]
    fold_error: Amount | None
    fold_error_by_site: Mapping[str, Amount]
    n_sites: Count
    d_sae: Count
    n_rollouts: Count
    n_tokens: Count
    kl: Mapping[str, EditedRun]
    kl_patched_folded: Amount
    share_here: Share | None
