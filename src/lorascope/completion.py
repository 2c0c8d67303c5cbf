"""Completion scripts for bash, zsh and fish.

A script is static: it lists every command and flag, so completing never starts Python. bash and zsh
share one function (zsh reads it through bashcompinit). Where no flag or choice fits, the shell
completes file names.
"""

from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterator, Mapping

SHELLS = ("bash", "zsh", "fish")


def completion_script(
    shell: str, helps: Mapping[str, str], parsers: Mapping[str, ArgumentParser]
) -> str:
    """Return the completion script of a shell, given each command's help sentence and parser."""
    if shell == "fish":
        return _fish(helps, parsers)
    prefix = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return prefix + _bash(parsers)


def _flags(parser: ArgumentParser) -> Iterator[tuple[str, Action, str]]:
    """Yield each flag of `--help`, its action, and its choices, empty where it has none."""
    for action in parser._actions:
        metavar = str(action.metavar)
        choices = metavar[1:-1].replace(",", " ") if metavar.startswith("{") else ""
        for flag in action.option_strings if action.help != SUPPRESS else ():
            if flag.startswith("--"):
                yield flag, action, choices


def _bash(parsers: Mapping[str, ArgumentParser]) -> str:
    cases = []
    for command, parser in parsers.items():
        for flag, _, choices in _flags(parser):
            if choices:
                cases.append(f"'{command} {flag}') words='{choices}' ;;")
        names = " ".join(flag for flag, *_ in _flags(parser))
        cases.append(f"'{command} '*) [[ $word == -* ]] && words='{names}' ;;")
    indented = "\n".join(f"      {case}" for case in cases)
    return f"""_lorascope() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words=
  if ((COMP_CWORD == 1)); then
    words='{" ".join(parsers)}'
  else
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD - 1]}}" in
{indented}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _lorascope lorascope
"""


def _fish(helps: Mapping[str, str], parsers: Mapping[str, ArgumentParser]) -> str:
    lines = [
        f"complete -c lorascope -n __fish_use_subcommand -f -a {name} -d {_quoted(sentence)}"
        for name, sentence in helps.items()
    ]
    for command, parser in parsers.items():
        for flag, action, choices in _flags(parser):
            value = f" -x -a '{choices}'" if choices else " -r"
            lines.append(
                f"complete -c lorascope -n '__fish_seen_subcommand_from {command}'"
                f" -l {flag.removeprefix('--')}{'' if action.nargs == 0 else value}"
                f" -d {_quoted(action.help or '')}"
            )
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
