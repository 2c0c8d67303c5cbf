"""What a features JSON of the published schema has in it, as lorascope writes it.

Other tools write less; `published_json` reads that too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from lorascope.features.label_file import Count, Label
from lorascope.record_json import Range

Known = Annotated[int, Range(-1)]  # -1 is unknown
Amount = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True)
class PublishedExample:
    """A token on which the feature fires, `token` at `target_position` of `tokens`.

    `activations` has the feature's value at each of `tokens`, `activation_value` at the token.
    `rollout_idx` is the rollout's id, `token_idx` the token's position there, `n_alike` how many
    tokens have the same context; each is -1 if it is unknown.
    """

    activation_value: float
    rollout_idx: Known
    token_idx: Known
    token: str
    tokens: tuple[str, ...]
    target_position: Count
    activations: tuple[float, ...]
    n_alike: Known = -1


@dataclass(frozen=True, kw_only=True)
class PublishedStats:
    """Statistics of a feature's firings at text; what is unknown is missing.

    `n_special` counts firings at special tokens, `histogram` the values between the edges that
    `metadata` gives.
    """

    n_examples: Count
    max_activation: float | None = None
    mean_activation: float | None = None
    std_activation: Amount | None = None
    n_active: Count | None = None
    n_special: Count | None = None
    n_rollouts: Count | None = None
    histogram: tuple[Count, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedFeature:
    """A feature; `special_examples` are those at special tokens."""

    examples: tuple[PublishedExample, ...]
    special_examples: tuple[PublishedExample, ...] = ()
    stats: PublishedStats
    label: Label | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedMetadata:
    """What the features are of. `fvu` and `l0` are those of the SAE on the corpus."""

    lorascope: Any
    n_features: Count
    top_k: Count
    context_window: Count | None = None
    n_tokens: Count | None = None
    n_eligible: Count | None = None
    n_special: Count | None = None
    n_rollouts: Count | None = None
    fvu: Amount | None = None
    l0: Amount | None = None
    special_tokens: tuple[str, ...]
    histogram_edges: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class PublishedFeatures:
    """The features of an SAE, by their number."""

    metadata: PublishedMetadata
    features: Mapping[str, PublishedFeature]
