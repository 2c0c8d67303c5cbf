"""The pages that people read: their links lead somewhere, and lines fit a screen."""

import json
import re
from pathlib import Path

import make_site
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def text_of(page: Path) -> str:
    """Return a page, or what is written between the code of a notebook."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page):
    text = text_of(page)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists():
            missing.append(target)
        elif anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor not in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}:
                missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_prose_of_the_pages_has_at_most_120_columns(page):
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)
    prose = [
        line
        for line in text.splitlines()
        if not line.startswith(("|", "    ", "![")) and "](http" not in line
    ]
    assert [line for line in prose if len(line) > 120] == []


def test_every_test_that_the_docs_name_exists():
    folder = Path(__file__).parent
    named = set()
    for page in (folder.parent / "docs").glob("*.md"):
        named |= set(re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text(encoding="utf-8")))
    assert ("test_file_systems.py", "test_every_stage_and_reader_works_there") in named
    files = {name: (folder / name).read_text(encoding="utf-8") for name, _ in named}
    assert [pair for pair in sorted(named) if f"def {pair[1]}(" not in files[pair[0]]] == []


def test_the_lowest_versions_are_written_where_users_look():
    page = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for name, version in (("transformers", "transformers"), ("PEFT", "peft"), ("datasets",) * 2):
        bound = re.search(rf'"{version}>=([\d.]+)"', project)
        assert bound and f"| {name} | {bound[1]} |" in page


def test_the_site_has_every_page_once_and_every_public_name():
    named = [path for section in make_site.PAGES.values() for path in section.values()]
    assert len(set(named)) == len(named)
    known = {page.relative_to(ROOT).as_posix() for page in [*PAGES, *NOTEBOOKS]}
    assert known - {"README.md"} <= set(named)
    assert ".. autofunction:: lorascope.load_sae" in make_site.reference()


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://a.test/x.js"></script>',
        '<link rel="stylesheet" href="//a.test/x.css">',
        '<img src="http://a.test/x.png">',
        "@import 'https://a.test/x.css';",
        "@font-face { src: url(https://a.test/x.woff2) }",
    ],
)
def test_a_site_that_asks_another_host_is_refused(tmp_path, text):
    file = tmp_path / ("x.html" if text.startswith("<") else "x.css")
    file.write_text(text, encoding="utf-8")
    (tmp_path / "y.html").write_text('<a href="https://a.test/"><img src="z.png">', "utf-8")
    (found,) = make_site.other_hosts(tmp_path)
    assert found.startswith(file.name)
    assert "//a.test/x" in found


def test_a_notebook_becomes_a_page_with_its_code_and_outputs():
    page = make_site.notebook_page(NOTEBOOKS[0])
    assert "```python\nfrom pathlib import Path" in page
    assert "```{raw} html\n<p" in page
    assert ".ipynb)" not in page
