"""Write docs/commands.md from the commands themselves: `python docs/make_commands.py`."""

from dataclasses import MISSING
from pathlib import Path

from lorascope.commands import COMMANDS, Command
from lorascope.config import ALIASES, default_text, flag_of, grouped_options

HEAD = """# Commands

`python docs/make_commands.py` writes this page; `lorascope COMMAND --help` says the same. Every
flag is also a key of `lorascope.toml` (`--top-k` is `top_k`) and a keyword of the config in Python.
Flags override `--config FILE`, which overrides `lorascope.toml` in the working directory. If you
give a flag twice, also under an alias, the last one wins.

Every command takes `--quiet` (warnings and errors only, no progress), `--verbose` (debug messages)
and `--debug` (tracebacks). stdout carries the path of the result, stderr the rest. Progress is a
bar on a terminal, and elsewhere one line every ten seconds. Exit codes: 0 done, 2 your input is
wrong (one line), 130 and 143 interrupted (finished work is kept), 1 a bug, or damage that
`verify` found.

`lorascope info PATH` describes an artifact, the folder of a run or an adapter. `lorascope verify
PATH` checks artifacts for damage; exit code 1 names what is broken. `lorascope schema KIND` prints
the JSON schema of a kind of file, and `lorascope schema` lists the kinds. `lorascope completion
bash`, `zsh` or `fish` prints a completion script; for bash:

    lorascope completion bash > ~/.local/share/bash-completion/completions/lorascope
"""


def section(name: str, command: Command) -> str:
    """Return one command's part of the page."""
    lines = [f"## {name}\n\n{command.description()}\n\n    {command.example}\n"]
    lines += ["| option | default | |", "|---|---|---|"]
    for group, fields in grouped_options(command.config_class()).items():
        lines.append(f"| **{group}** | | |")
        for field in fields:
            flags = [flag_of(word) for word in (field.name, *ALIASES.get(field.name, ()))]
            if field.metadata["positional"]:
                flags = [field.name.upper()]
            default = "required" if field.default is MISSING else default_text(field)
            names = ", ".join(f"`{flag}`" for flag in flags)
            lines.append(f"| {names} | {default} | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Return the page as Markdown."""
    return "\n".join([HEAD, *(section(name, command) for name, command in COMMANDS.items())])


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(page(), encoding="utf-8")
