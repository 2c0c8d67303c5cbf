"""Write docs/glossary.md from the page's glossary: `python docs/make_glossary.py`."""

from pathlib import Path

from lorascope.dashboard.render import read_glossary

HEAD = """# Glossary

`python docs/make_glossary.py` writes this file from `src/lorascope/dashboard/assets/glossary.json`,
which the page's help (key `?`) shows too. Change the words there.
"""


def page() -> str:
    """Return the glossary as Markdown, one line a term."""
    sections = [
        "\n".join([f"## {subject}\n", *(f"- **{term}**: {text}" for term, text in entries.items())])
        for subject, entries in read_glossary().items()
    ]
    return "\n\n".join([HEAD.rstrip(), *sections]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("glossary.md").write_text(page(), encoding="utf-8")
