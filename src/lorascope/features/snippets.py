"""Small pieces of HTML for notebooks, without scripts, in the notebook's own colours.

Labels and tokens are hostile: they are escaped, and what cannot be seen is written as an escape, so
that it cannot turn the text around it.
"""

import html
from collections.abc import Iterable, Sequence

from lorascope.texts.tokens import visible

_PLAIN = ' class="tex2jax_ignore mathjax_ignore"'  # a "$" is no formula
_CELL = ' style="text-align: left; vertical-align: top"'
_MARK = ' style="background: #ffd75e; color: #000"'
_SHOWN = 300  # characters of a text


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
