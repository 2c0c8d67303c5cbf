"""Build the site from the pages of the repository: `python docs/make_site.py`, or `make docs`.

1. Copy the pages into `build/pages`, where they keep their paths, so that their links lead to the
   same pages as in a repository browser. README.md is the first page. A notebook becomes a page
   with its stored outputs, and the public names of lorascope become a page of reference. The JSON
   schemas of the reports become files.
2. Sphinx makes HTML in `build/site`. A warning, such as a link that leads nowhere, is an error.
3. Check that no page asks another host for anything.

The gallery shows the demo's page if `make demo` has made it.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lorascope
from lorascope.commands import COMMANDS
from lorascope.inspection import KINDS, report_schema

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
DEMO = "demo-output/dashboard.html"
PAGES = {  # the navigation; README.md comes first
    "Start": {
        "Your own adapter": "docs/guide-your-adapter.md",
        "Notebook: from an adapter to a page": "examples/notebooks/adapter_to_page.ipynb",
        "Notebook: from a page to a claim": "examples/notebooks/page_to_claim.ipynb",
        "Gallery": "docs/gallery.md",
        "A real model: SmolLM2": "docs/examples/smollm2.md",
    },
    "How to": {
        "Give texts": "docs/texts.md",
        "Look into results from Python": "docs/drill-down.md",
        "Keep rows during training": "docs/during-training.md",
        "Know what works with what": "docs/compatibility.md",
        "Plan a large run": "docs/scale.md",
        "Know what can go wrong": "docs/limits.md",
    },
    "Concepts": {
        "A tour: one token": "docs/tour.md",
        "Metrics": "docs/metrics.md",
        "Training": "docs/training.md",
        "Labels": "docs/labels.md",
        "Audit": "docs/audit.md",
        "Compare": "docs/compare.md",
        "Causal evidence": "docs/causal.md",
        "Glossary": "docs/glossary.md",
    },
    "Reference": {
        "Python": "docs/python.md",
        "Commands": "docs/commands.md",
        "File formats": "docs/formats.md",
        "Benchmarks": "benchmarks/results.md",
        "Contributing": "CONTRIBUTING.md",
    },
}
OTHERS = ("src/lorascope/demo/subject/README.md", "examples/smollm2/README.md")
FILES = (
    "examples/slurm.sh",
    "examples/kubernetes.yaml",
    "docs/images",
    "docs/examples/smollm2.html",
)
REFERENCE = (
    ("A run and its page", "run RunConfig show render DashboardConfig"),
    ("Results", "Study dashboard.overview.Overview dashboard.overview.TopFeature "
     "causal.report_records.FeatureRemoval causal.report_records.DirectEffect "
     "causal.report_records.SteeringReport causal.report_records.Answer"),
    ("Stages", "generate GenerateConfig train TrainConfig collect CollectConfig label LabelConfig"),
    ("What features do", "evaluate EvaluateConfig ablate AblateConfig attribute AttributeConfig "
     "direct DirectConfig steer SteerConfig edit EditConfig Patch"),
    ("Features", "FeatureIndex features.feature.Feature features.feature.Example "
     "features.feature.FeatureStats features.label_file.Label"),
    ("Activations and SAEs", "ActivationStore callbacks.RowLogger SAE load_sae SiteLayout "
     "sites.Site"),
    ("Reports", "report_schema"),
    ("Errors", "LorascopeError errors.ConfigError errors.AdapterError errors.DatasetError "
     "errors.ArtifactError errors.NumberError errors.ServerError errors.WorkerError "
     "errors.Interrupted"),
)  # fmt: skip


def build() -> None:
    """Build the site, from nothing. Raises SystemExit if it has a fault."""
    from sphinx.cmd.build import main as sphinx

    pages, out = BUILD / "pages", BUILD / "site"
    for folder in (pages, out, BUILD / "doctrees"):
        shutil.rmtree(folder, ignore_errors=True)
    write_pages(pages)
    conf = str(ROOT / "docs" / "conf")
    words = ["-W", "--keep-going", "-q", "-c", conf, "-d", str(BUILD / "doctrees")]
    if code := sphinx([*words, str(pages), str(out)]):
        sys.exit(code)
    if requests := list(other_hosts(out)):
        sys.exit("the site asks other hosts: " + ", ".join(requests))


def write_pages(folder: Path) -> None:
    """Write the sources of all pages."""
    paths = [path for section in PAGES.values() for path in section.values()]
    for path in (*paths, *OTHERS):
        source, made = ROOT / path, (folder / path).with_suffix(".md")
        made.parent.mkdir(parents=True, exist_ok=True)
        if path == "docs/python.md":
            made.write_text(reference(), encoding="utf-8")
        elif source.suffix == ".ipynb":
            made.write_text(notebook_page(source), encoding="utf-8")
        else:
            orphan = "---\norphan: true\n---\n" if path in OTHERS else ""
            made.write_text(orphan + _linked(source.read_text("utf-8")), encoding="utf-8")
    for path in FILES:
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copyfile
        copy(ROOT / path, folder / path)
    write_schemas(folder / "docs")
    if (ROOT / DEMO).exists():
        shutil.copyfile(ROOT / DEMO, folder / "docs" / "examples" / "demo.html")
        gallery = folder / "docs" / "gallery.md"
        text = gallery.read_text(encoding="utf-8")
        gallery.write_text(text.replace(f"`{DEMO}`", "[the page](examples/demo.html)"), "utf-8")
    index = _linked((ROOT / "README.md").read_text(encoding="utf-8"))
    trees = [
        f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n"
        + "\n".join(f"{title} <{path.rpartition('.')[0]}>" for title, path in section.items())
        + "\n```"
        for caption, section in PAGES.items()
    ]
    (folder / "index.md").write_text("\n\n".join([index, *trees]) + "\n", encoding="utf-8")


def write_schemas(docs: Path) -> None:
    """Write the JSON schema of each kind of report, and link to it where the formats name them."""
    (docs / "schemas").mkdir()
    for kind in KINDS:
        text = json.dumps(report_schema(kind), indent=1, ensure_ascii=False) + "\n"
        (docs / "schemas" / f"{kind}.json").write_text(text, encoding="utf-8")
    formats, words = docs / "formats.md", "`lorascope schema KIND`"
    links = ", ".join(f"[{kind}](schemas/{kind}.json)" for kind in KINDS)
    text = formats.read_text(encoding="utf-8")
    assert words in text
    formats.write_text(text.replace(words, f"{words} ({links})"), encoding="utf-8")


def _linked(text: str) -> str:
    """Return a page whose links to notebooks lead to the pages made of them."""
    return text.replace(".ipynb)", ".md)")


def notebook_page(path: Path) -> str:
    """Return a notebook as a page: its text, its code, and what is stored of its outputs."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(_linked(source))
            continue
        parts.append(_fenced("python", source))
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text/html" in data:
                parts.append(_fenced("{raw} html", "".join(data["text/html"])))
            elif text := "".join(data.get("text/plain", output.get("text", ""))):
                parts.append(_fenced("text", text))
    parts.append(f"This page is the notebook `{path.relative_to(ROOT).as_posix()}`.")
    return "\n\n".join(parts) + "\n"


def _fenced(kind: str, text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{kind}\n{text}\n{fence}"


def reference() -> str:
    """Return the page of the Python interface: every public name, and the records they return."""
    listed = [name for _, names in REFERENCE for name in names.split()]
    if missing := set(lorascope.__all__) - set(listed):
        sys.exit(f"docs/make_site.py: REFERENCE lacks {', '.join(sorted(missing))}")
    lines = ["# Python", "", (lorascope.__doc__ or "").partition("\n")[2].strip(), ""]
    for title, names in REFERENCE:
        lines += [f"## {title}", ""]
        for name in names.split():
            lines += [_documented(name), ""]
    return "\n".join(lines)


def _documented(name: str) -> str:
    """Return a directive for one name, and for a config the command whose options it has."""
    home, _, own = f"lorascope.{name}".rpartition(".")
    named: Any = getattr(lorascope, name, None)
    kind = "function" if name.islower() and "." not in name else "class"
    if own.endswith("Error") or own == "Interrupted":
        kind = "exception"
    lines = [f"```{{eval-rst}}\n.. auto{kind}:: {home}.{own}"]
    command = next((key for key, one in COMMANDS.items() if named is one.config_class()), None)
    if command:
        lines += ["   :no-members:", "```", ""]
        link = f"[`lorascope {command}`](commands.md#{command})"
        lines.append(f"Its fields are the options of {link}, which describes each.")
        return "\n".join(lines)
    if own == "SAE":
        lines.append("   :exclude-members: publish, sealed, tensors")
    return "\n".join([*lines, "```"])


class _Requests(HTMLParser):
    """The addresses that a browser loads when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of one element; links that a reader may follow are none."""
        if tag != "a":
            given = dict(attrs)
            if tag == "link" and given.get("rel") in ("canonical", "author", "license"):
                return
            self.found += [given.get(key) or "" for key in ("src", "href", "data", "poster")]


def other_hosts(folder: Path) -> Iterator[str]:
    """Yield what the pages, styles and scripts of a site would load from other hosts."""
    for file in sorted(folder.rglob("*")):
        if file.suffix == ".html":
            parsed = _Requests()
            parsed.feed(file.read_text(encoding="utf-8"))
            found = parsed.found
        elif file.suffix == ".css":
            text = file.read_text(encoding="utf-8")
            found = re.findall(r"""(?:url\(|@import)\s*['"]?([^'")\s]+)""", text)
        else:
            continue
        for address in found:
            if re.match(r"(https?:)?//", address):
                yield f"{file.relative_to(folder)}: {address}"


if __name__ == "__main__":
    build()
