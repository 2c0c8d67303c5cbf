"""Show pages in notebooks.

1. The page is the text of a frame (`srcdoc`). The notebook then contains it: it needs no server, no
   network and no path that the notebook's editor could open (Jupyter, VS Code, Colab).
2. The frame is sandboxed. Its scripts run in an origin of their own, and can read neither the
   notebook nor what the notebook's server would tell it. The page may save files that the user
   asks for; labels given by hand last until the frame is closed, unless they are exported.
"""

import webbrowser
from pathlib import Path, PosixPath

from lorascope import runtime
from lorascope.artifact import read_manifest
from lorascope.dashboard.overview import Overview
from lorascope.dashboard.render import KIND
from lorascope.errors import ArtifactError, LorascopeError
from lorascope.features.feature import escape_html, sentence_html


class Page(PosixPath):
    """The path of a page, which a notebook shows with the first sentences of the page's report."""

    def _repr_html_(self) -> str | None:
        from lorascope.causal.study import read_report

        try:
            overview, _ = read_report(Path(self).with_name("report.json"), (Overview,))
        except LorascopeError:
            return None  # a path of anything else is shown as a path
        sentences = "".join(f"<li>{escape_html(one)}</li>" for one in overview.headline)
        return (
            sentence_html(self.name, str(self))
            + f'<ul class="tex2jax_ignore mathjax_ignore">{sentences}</ul>'
        )


def show(page: Path | str, *, height: int = 800) -> None:
    """Show a page in the notebook's cell, `height` pixels high; elsewhere, in a browser.

    `page` is what `run` or `render` returned, or a folder with `dashboard.html`. The notebook grows
    by the size of the page. Raises ArtifactError if it is no page.
    """
    path = Path(page).expanduser()
    path = path / "dashboard.html" if path.is_dir() else path
    manifest = read_manifest(path)
    if manifest is None or manifest.kind != KIND:
        raise ArtifactError(f"{path} is not a page; give the HTML file of lorascope dashboard")
    if not runtime.in_notebook():
        webbrowser.open(path.resolve().as_uri())
        return
    from IPython.display import display

    shown = {"text/html": frame(path.read_text(encoding="utf-8"), height), "text/plain": str(path)}
    display(shown, raw=True)


def frame(page: str, height: int) -> str:
    """Return a sandboxed frame with the text of a page."""
    content = page.replace("&", "&amp;").replace('"', "&quot;")
    return (
        '<iframe title="lorascope" sandbox="allow-scripts allow-downloads" '
        f'referrerpolicy="no-referrer" srcdoc="{content}" '
        f'style="width: 100%; height: {height:d}px; border: 1px solid #8888">'
        "</iframe>"
    )
