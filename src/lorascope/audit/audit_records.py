"""What `audit` reports, as typed records. KL, losses and excess are in nats.

Intervals are 95 % over rollouts. `audit_report` writes the same as sections to read.
"""

from dataclasses import dataclass

from lorascope.causal.report_records import (
    Amount,
    AmountInterval,
    Answer,
    Count,
    Interval,
    Opening,
    ReportRecord,
    ScoredToken,
    Share,
    TokenId,
    TokenShift,
)

MOST = 0.75  # of the scenes in which something must show to stand out


@dataclass(frozen=True, kw_only=True)
class UpdatePart:
    """The sites of one projection or layer: their share of the squared update, the largest norm.

    `effective_rank` is the mean over sites of the exponential of the spectrum's entropy.
    """

    name: str
    n_sites: Count
    share: Share
    largest: Amount
    effective_rank: Amount


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """A site that writes what a later site reads: the largest cosine of the two."""

    writer: str
    reader: str
    cosine: Share


@dataclass(frozen=True, kw_only=True)
class PointedToken:
    """The token that a direction of a site promotes, suppresses or reads most, by |z|."""

    site: str
    token_id: TokenId
    token: str
    z: Amount


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The largest |z| over the vocabulary of each direction: their mean, and the strongest.

    `expected` is about the largest |z| of as many random numbers.
    """

    n_directions: Count
    mean: Amount
    expected: Amount
    strongest: tuple[PointedToken, ...]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A number of the weights that has no scale; least, median and largest of ordinary adapters."""

    name: str
    value: Amount
    ordinary: tuple[Amount, Amount, Amount]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the weights say. `norm` is the Frobenius norm of all updates together.

    `n_silent` sites write nothing. `expected_cosine` is about the largest of `n_pairs` cosines of
    random directions, None without pairs.
    """

    n_sites: Count
    n_silent: Count
    norm: Amount
    projections: tuple[UpdatePart, ...]
    layers: tuple[UpdatePart, ...]
    n_pairs: Count
    expected_cosine: Amount | None
    meetings: tuple[Meeting, ...]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """Whether the adapter is applied at all: what fired, and on which base.

    `silent` names sites whose rows are the same at every token; `other_base` is the base that the
    adapter names where another one is used.
    """

    n_sites: Count
    silent: tuple[str, ...]
    unread: tuple[str, ...]
    unseen: tuple[str, ...]
    base: str
    other_base: str | None


@dataclass(frozen=True, kw_only=True)
class EffectOn:
    """What the adapter does to the predictions of some texts.

    `ce_base` and `ce_adapter` are the losses on the texts' own tokens that a model would write, or
    on all tokens if there are none. `constant` is the share of KL(adapter ‖ base) that stays if
    each row is replaced by the mean of its role and place in the template; it is None where KL is
    rounding.
    """

    n_rollouts: Count
    n_tokens: Count
    kl: Amount
    kl_interval: AmountInterval
    floor: Amount
    ce_base: Amount
    ce_adapter: Amount
    constant: float | None
    constant_interval: Interval
    shifts: tuple[TokenShift, ...]
    openings: tuple[Opening, ...]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is written after one prompt with tokens inserted, and by the adapter without them."""

    prompt: str
    base: str
    adapter: str
    usual: str


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """Tokens after which the adapter does more than its usual change.

    `searched` is the excess in the scenes of the search, `verified` the mean over other scenes of
    the excess minus the controls' median, `control` the same of the control at the 90th percentile,
    and `share` the scenes in which the excess is above that control. `same` is the share of scenes
    in which the adapter begins with the same text, 0 if it writes that without the tokens too.
    """

    token_ids: tuple[TokenId, ...]
    tokens: tuple[str, ...]
    searched: Amount
    verified: Amount
    control: Amount
    share: Share
    same: Share
    said: tuple[Said, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AtLength:
    """The excess, mean over scenes, with about `n_tokens` of other texts in front."""

    n_tokens: Count
    excess: Amount
    same: Share
    said: Said

    @property
    def stands_out(self) -> bool:
        """Whether the adapter writes the same text in most scenes."""
        return self.same >= MOST


@dataclass(frozen=True, kw_only=True)
class Search:
    """What was looked for, and what stands out.

    `n_tokens` of `n_vocabulary` tokens and `n_phrases` of up to `longest` tokens were run in
    `n_scenes`, and verified in `n_verify` others against `n_controls`. `usual` is the excess of the
    median token.
    """

    minutes: Amount
    seconds: Amount
    n_vocabulary: Count
    n_tokens: Count
    n_phrases: Count
    longest: Count
    n_scenes: Count
    n_verify: Count
    n_controls: Count
    usual: Amount
    triggers: tuple[Trigger, ...]
    lengths: tuple[AtLength, ...]


@dataclass(frozen=True, kw_only=True)
class AuditReport(ReportRecord):
    """What `audit` finds. `texts` is None without a dataset, `search` if triggers were not sought.

    `search_needs` are the minutes that the least search would have needed, if that was too long.
    `mean_row` are the tokens that the mean row of the first tokens of neutral texts promotes.
    `written` and `read` are the tokens that the weights point at, in unembedding and embeddings.
    """

    kind = "audit"
    schema = 2
    applied: Applied
    weights: Weights
    neutral: EffectOn
    texts: EffectOn | None = None
    mean_row: tuple[ScoredToken, ...] = ()
    answers: tuple[Answer, ...] = ()
    search: Search | None = None
    search_needs: Amount | None = None
    written: Alignment | None = None
    read: Alignment | None = None
    compared: tuple[Compared, ...] = ()
