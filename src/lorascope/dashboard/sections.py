"""Write a report that is made of sections: for the terminal, as Markdown and as a page.

All three show the same sentences and tables. The page runs no script, and every text of an adapter
or a corpus is escaped. Markdown and page are sealed (`artifact`) and name the report they show.
"""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorascope.artifact import HTML_MARK, Identity, Manifest, sealed, write_text
from lorascope.causal.study import format_table

_LONGEST = 60  # characters of a text in a cell
_HEAD = "\n<meta name=viewport"  # of the page
_MARKDOWN = re.compile(r"[\\`*_\[\]<>#|~$&@!]|:(?=//)|(?<=www)\.")  # signs; begins of links


@dataclass(frozen=True)
class Section:
    """A title, sentences, tables with a head each, and HTML for the page that is safe already.

    A `long` section is left out in the terminal.
    """

    title: str
    sentences: list[str] = field(default_factory=list)
    tables: list[tuple[Sequence[str], Sequence[Sequence[str]]]] = field(default_factory=list)
    figures: str = ""
    long: bool = False


@dataclass(frozen=True)
class Document:
    """A report of sections; `features` is the page to which numbers of features lead."""

    title: str
    sections: Sequence[Section]
    features: str = ""

    def as_text(self) -> str:
        """Return it for the terminal: sentences, and tables with aligned columns."""
        lines: list[str] = []
        for one in self.sections:
            if one.long:
                continue
            lines += ["", one.title, *(f"  {sentence}" for sentence in one.sentences)]
            for head, rows in one.tables:
                lines += [f"  {line}" for line in format_table(head, rows)]
        return "\n".join(lines[1:])

    def as_markdown(self, lead: Sequence[str] = ()) -> str:
        """Return it as Markdown, in which text of the corpus is escaped; `lead` comes first."""
        parts = [f"# {self.title}", *lead]
        for one in self.sections:
            parts += [f"## {one.title}", *map(plain, one.sentences)]
            for head, rows in one.tables:
                lines = [
                    head,
                    ["---"] * len(head),
                    *([plain(cell) for cell in row] for row in rows),
                ]
                parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
        return "\n\n".join(parts) + "\n"

    def as_html(self) -> str:
        """Return it as one page."""
        parts = []
        if self.features:
            parts.append(f'<p><a href="{html.escape(self.features)}">All features</a></p>')
        for one in self.sections:
            parts.append(f"<h2>{as_shown(one.title)}</h2>")
            parts += [f"<p>{as_shown(sentence)}</p>" for sentence in one.sentences]
            for head, rows in one.tables:
                to = self.features if head[0] == "feature" else ""
                cells = ["".join(f"<th scope=col>{as_shown(cell)}</th>" for cell in head)]
                cells += [_cells(row, to) for row in rows]
                body = "".join(f"<tr>{row}</tr>" for row in cells)
                parts.append(f"<div class=table tabindex=0><table>{body}</table></div>")
            parts.append(one.figures)
        page = _PAGE.replace("TITLE", html.escape(self.title))
        return page.replace("BODY", "\n".join(parts))

    def write(self, path: Path, report: Manifest) -> None:
        """Write the Markdown and the page next to the JSON file of their report."""
        for suffix, text in ((".md", self.as_markdown()), (".html", self.as_html())):
            write_sealed(path.with_suffix(suffix), text, report)


def plain(text: str) -> str:
    """Return text on one line that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split("\n")))


def write_sealed(path: Path, text: str, report: Manifest) -> None:
    """Write a text with a manifest in a comment: after the title, before any text of a corpus."""
    parents = {report.kind: report.digest}
    shown = Identity(kind=report.kind, schema=report.schema, settings={}, parents=parents)
    values = json.dumps(shown.manifest(None, {}).to_sealed_json())
    before, mark, after = text.partition(_HEAD if _HEAD in text else "\n\n")
    write_text(path, sealed(f"{before}\n{HTML_MARK.decode()}{values} -->{mark}{after}"))


def _cells(row: Sequence[str], features: str) -> str:
    first, *others = map(as_shown, row)
    if features:
        first = f'<a href="{html.escape(features)}#/feature/{int(row[0])}">{first}</a>'
    return "".join(f"<td>{cell}</td>" for cell in (first, *others))


def as_shown(text: str) -> str:
    """Return text as HTML, isolated from the direction of the text around it."""
    return f"<bdi>{html.escape(text)}</bdi>"


def in_cell(text: str) -> str:
    """Return text on one line, not too long for a cell."""
    text = text.replace("\n", "⏎")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


_PAGE = """<!doctype html>
<html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'">
<title>TITLE</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem }
h2 { margin: 2rem 0 .5rem; font-size: 1.2rem }
h3 { margin: 1rem 0 .3rem; font-size: 1rem }
p { margin: .4rem 0; max-width: 45rem }
.table { overflow-x: auto; margin: .8rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid color-mix(in srgb, currentColor 20%, transparent) }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: none;
  font: .9rem/1.7 ui-monospace, monospace }
.text span { background: rgb(230 110 20 / calc(var(--d) * 70%)) }
.small { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 9rem; font-size: .8rem; line-height: 1.3 }
figure span { display: block; opacity: .7 }
figure path { stroke: currentColor; opacity: .4 }
figure text { font-size: 10px; fill: currentColor; opacity: .7 }
polyline { fill: none; stroke: #c2600a; stroke-width: 1.5 }
circle { fill: #c2600a; stroke: #c2600a }
.off { fill: Canvas }
</style>
<main><h1>TITLE</h1>
BODY
</main></html>
"""
