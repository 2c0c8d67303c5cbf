"""The records of a feature: its examples, its statistics, and what else is known of it.

A notebook shows them as HTML without scripts, in its own colours. Labels and tokens are hostile:
they are escaped, and what cannot be seen is written as an escape, so that it cannot turn the text
around it.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorascope.features.label_file import Label
from lorascope.texts.tokens import visible

_N_EXAMPLES = 5  # in a notebook
_N_SITES = 2
_PLAIN = ' class="tex2jax_ignore mathjax_ignore"'  # a "$" is no formula
_CELL = ' style="text-align: left; vertical-align: top"'
_MARK = ' style="background: #ffd75e; color: #000"'
_SHOWN = 300  # characters of a text


@dataclass(frozen=True, kw_only=True)
class Example:
    """One token on which a latent fires, and the tokens around it in the same rollout.

    `row` is its row in the store, `rollout` the rollout's id, `position` its position there, and
    `target` its index in `token_ids` and `activations`, `(window,)` each. `tokens` has the window's
    texts for display. `n_alike` counts the tokens of the store with the same context. `quantile` is
    the fifth of the latent's firings that a sample was drawn from, 4 for the strongest. Integers
    that are unknown or do not apply are -1.
    """

    value: float
    row: int
    rollout: int
    position: int
    target: int
    token_ids: Sequence[int] | npt.NDArray[np.int32]
    activations: Sequence[float] | npt.NDArray[np.float32]
    tokens: tuple[str, ...] = ()
    n_alike: int = -1
    quantile: int = -1


@dataclass(frozen=True, kw_only=True)
class FeatureStats:
    """Statistics of one latent over all tokens of text; None for what the file does not contain.

    `density` is the share of these tokens on which it fires; `n_special` counts its firings at
    special tokens and template headers. `mean`, `std` and `histogram` `(n_bins,)` are over its
    firings at text. `by_role` has the density among the tokens of each role, `by_position` in each
    tenth of the rollouts. `stability` is the mean cosine with the most similar latent in SAEs of
    other seeds.
    """

    n_examples: int
    n_active: int | None
    n_special: int | None
    n_rollouts: int | None
    density: float | None
    max: float | None
    mean: float | None
    std: float | None
    histogram: npt.NDArray[np.uint32]
    by_role: Mapping[str, float]
    by_position: tuple[float, ...]
    stability: float | None

    @property
    def is_template(self) -> bool:
        """Whether more than half of its firings are at special tokens and template headers."""
        return (self.n_special or 0) > (self.n_active or 0)


@dataclass(frozen=True, kw_only=True, repr=False)
class Feature:
    """The record of one latent.

    `examples` are sorted from the strongest down. `samples` are random firings from each fifth by
    value, strongest fifth first. `at_special` are the strongest examples at special tokens and
    template headers, which the others leave out. `fingerprint` maps a site's module name to its
    share of the effect. `similar` has the latents with the nearest decoder rows and their cosines,
    `cofiring` those that fire on the same tokens and their Jaccard indices. `tokens` has the
    rankings `mean` (mean value on the token), `lift` (how many times more often than elsewhere it
    fires on the token), `before` and `after` (share of the firings next to the token). `label` is
    None if the feature has none.
    """

    latent: int
    stats: FeatureStats
    examples: tuple[Example, ...]
    samples: tuple[Example, ...]
    at_special: tuple[Example, ...]
    fingerprint: Mapping[str, float]
    similar: tuple[tuple[int, float], ...]
    cofiring: tuple[tuple[int, float], ...]
    tokens: Mapping[str, tuple[tuple[str, float], ...]]
    label: Label | None = None

    @property
    def strongest(self) -> tuple[Example, ...]:
        """Its examples, first those at the kind of token, text or special, of most firings."""
        if self.stats.is_template:
            return (*self.at_special, *self.examples)
        return (*self.examples, *self.at_special)

    def __repr__(self) -> str:
        return f"Feature({'; '.join([str(self.latent), *self._facts()])})"

    def _facts(self) -> list[str]:
        stats, label = self.stats, self.label
        facts = [] if label is None else [label.name]
        if label is not None and label.balanced_accuracy is not None:
            facts.append(f"balanced accuracy {label.balanced_accuracy:.2f}")
        if stats.n_active is not None:
            share = f" ({percentage(stats.density)})" if stats.density is not None else ""
            facts.append(f"fires at {stats.n_active:,} tokens of text{share}")
        if stats.n_special:
            facts.append(f"at {stats.n_special:,} special tokens")
        sites = sorted(self.fingerprint.items(), key=lambda item: -item[1])[:_N_SITES]
        facts += [f"{percentage(share)} of its effect at {name}" for name, share in sites if share]
        return facts

    def _repr_html_(self) -> str:
        """Return its label, its statistics and its strongest examples, for a notebook."""
        shown = self.strongest[:_N_EXAMPLES]
        return sentence_html(f"Feature {self.latent}", *self._facts()) + table_html(
            ("value", "rollout", "position", "example"),
            [(f"{one.value:.3g}", str(one.rollout), str(one.position)) for one in shown],
            [passage_html(one.tokens, one.target) for one in shown],
        )


def escape_html(text: str) -> str:
    """Return text as ASCII that means the same in HTML."""
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def percentage(share: float | None) -> str:
    """Return a share as a percentage of three digits; "" if it is unknown."""
    return "" if share is None else f"{100 * share:.3g} %"


def sentence_html(title: str, *parts: str) -> str:
    """Return a line with a title and what is known."""
    return f"<p{_PLAIN}><b>{_text(title)}</b>: {_text('; '.join(parts))}</p>"


def passage_html(tokens: Sequence[str], target: int) -> str:
    """Return a window of tokens with the one at `target` marked."""
    before, after = "".join(tokens[:target]), "".join(tokens[target + 1 :])
    token = f"<mark{_MARK}>{_text(tokens[target])}</mark>" if tokens else ""
    return f"<bdi>{_text(before[-_SHOWN:])}{token}{_text(after[:_SHOWN])}</bdi>"


def table_html(names: Iterable[str], rows: Iterable[Sequence[str]], passages: Iterable[str]) -> str:
    """Return a table: `names` over the columns, texts in `rows`, HTML in the last column."""
    head = "".join(f"<th{_CELL}>{_text(name)}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(f"<td{_CELL}>{cell}</td>" for cell in (*map(_text, row), passage))
        + "</tr>"
        for row, passage in zip(rows, passages, strict=True)
    )
    return f"<table{_PLAIN}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(text: str) -> str:
    return escape_html(visible(text[:_SHOWN]))
