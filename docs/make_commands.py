"""Write docs/commands.md from the commands themselves: `python docs/make_commands.py`."""

import dataclasses
import importlib
from pathlib import Path

from lorascope.cli import COMMANDS, Command
from lorascope.config import flag_of

HEAD = """# Commands

This page is made by `python docs/make_commands.py`; `lorascope COMMAND --help` says the same.
Every flag is also a key of `lorascope.toml` (`--top-k` is `top_k`) and a keyword of the config in
Python. Exit codes: 0 done, 2 your input is wrong (one line; `--debug` gives the traceback), 130 and
143 interrupted (finished work is kept), 1 a defect. stdout carries the path of what was made.

`lorascope info PATH` says what an artifact is, from its header alone. `lorascope verify PATH`
checks its checksums and promises; exit code 1 names what is broken.
"""


def section(name: str, command: Command) -> str:
    """Return one command's part of the page."""
    text = (importlib.import_module(command.module).__doc__ or "").strip()
    rows = ["| flag | default | |", "|---|---|---|"]
    for field in dataclasses.fields(command.config_class()):
        required = field.default is dataclasses.MISSING
        default = "required" if required else "" if field.default in (None, ()) else field.default
        rows.append(f"| `{flag_of(field.name)}` | {default} | {field.metadata['help']} |")
    return "\n".join([f"## {name}\n\n{text}\n\n    {command.example}\n", *rows]) + "\n"


def page() -> str:
    """Return the page as Markdown."""
    return "\n".join([HEAD, *(section(name, command) for name, command in COMMANDS.items())])


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(page(), encoding="utf-8")
