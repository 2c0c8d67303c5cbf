"""The pages that people read: their links lead somewhere, and lines fit a screen."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_of_the_pages_has_at_most_120_columns(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
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
