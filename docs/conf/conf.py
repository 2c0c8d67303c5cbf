"""Sphinx's settings for the site that `docs/make_site.py` builds."""

import functools
import inspect
import operator
import re
import shutil
import types
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import numpy.typing as npt
from docutils import nodes
from sphinx.addnodes import download_reference
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.osutil import relative_uri

import lorascope

project, author, release = "lorascope", "", lorascope.__version__
project_copyright = ""
html_title = "lorascope"
html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
pygments_style, pygments_dark_style = "default", "github-dark"
smartquotes = False  # "--depth" is an option
highlight_language = "text"  # of indented blocks

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
default_role = "literal"  # `name` in a docstring is code
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 60
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
templates_path: list[str] = []


class Files(SphinxPostTransform):
    """Turn links to other files, such as a page or a picture, into links to copies beside the page.

    Sphinx would offer them for download, under other names.
    """

    default_priority = 5

    def run(self, **_: Any) -> None:
        """Replace the links of one page."""
        for node in list(self.document.findall(download_reference)):
            source = Path(self.env.srcdir, self.env.docname).parent / node["reftarget"]
            name = source.resolve().relative_to(Path(self.env.srcdir).resolve())
            made = Path(self.app.outdir, name)
            made.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, made)
            here = self.app.builder.get_target_uri(self.env.docname)
            link = nodes.reference(
                "", "", refuri=relative_uri(here, name.as_posix()), internal=True
            )
            link += node.children
            node.replace_self(link)


def to_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape what means something else in reStructuredText, outside of code."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([*|_]\b|[*|])", r"\\\1", part) for part in parts[::2]]
        lines[i] = "".join(parts)


class NDArray:
    """The name under which arrays are shown: `NDArray[int64]`."""


class ArrayLike:
    """The name of what NumPy makes arrays of."""


def shorten(annotation: Any) -> Any:
    """Return a type in which NumPy's types have the names by which code calls them."""
    if annotation == npt.ArrayLike:
        return ArrayLike
    if get_origin(annotation) is np.ndarray:
        return types.GenericAlias(NDArray, get_args(get_args(annotation)[1]))
    if isinstance(annotation, types.GenericAlias):
        return types.GenericAlias(annotation.__origin__, tuple(map(shorten, annotation.__args__)))
    if isinstance(annotation, types.UnionType):
        return functools.reduce(operator.or_, map(shorten, annotation.__args__))
    return annotation


def shorten_all(app: Sphinx) -> None:
    """Shorten the types of the methods and properties of public classes."""
    public = [getattr(lorascope, name) for name in lorascope.__all__]
    for owner in filter(inspect.isclass, public):
        for member in vars(owner).values():
            function = getattr(member, "fget", None) or getattr(member, "func", None) or member
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function):
                function = inspect.unwrap(function)
                for name, annotation in function.__annotations__.items():
                    function.__annotations__[name] = shorten(annotation)


def setup(app: Sphinx) -> None:
    """Add the steps above."""
    app.add_post_transform(Files)
    app.connect("builder-inited", shorten_all)
    app.connect("env-updated", lambda app, env: env.dlfiles.clear())
    app.connect("autodoc-process-docstring", to_rst)
