"""Completion scripts for bash, zsh and fish.

A script is static: it lists every command and flag, so completing never starts Python. bash and zsh
share one function (zsh reads it through bashcompinit). Where no flag or choice fits, the shell
completes file names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Flag:
    """A flag of a command; `choices` is empty where it takes no value or any value."""

    name: str
    help: str
    takes_value: bool
    choices: tuple[str, ...] = ()


def completion_script(
    shell: str, helps: Mapping[str, str], flags: Mapping[str, Sequence[Flag]]
) -> str:
    """Return the completion script of a shell, given each command's help sentence and flags."""
    if shell == "fish":
        return _fish(helps, flags)
    prefix = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return prefix + _bash(flags)


def _bash(flags: Mapping[str, Sequence[Flag]]) -> str:
    cases = []
    for command, some in flags.items():
        for flag in some:
            if flag.choices:
                cases.append(f"'{command} {flag.name}') words='{' '.join(flag.choices)}' ;;")
        names = " ".join(flag.name for flag in some)
        cases.append(f"'{command} '*) [[ $word == -* ]] && words='{names}' ;;")
    indented = "\n".join(f"      {case}" for case in cases)
    return f"""_lorascope() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words=
  if ((COMP_CWORD == 1)); then
    words='{" ".join(flags)}'
  else
    case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD - 1]}}" in
{indented}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _lorascope lorascope
"""


def _fish(helps: Mapping[str, str], flags: Mapping[str, Sequence[Flag]]) -> str:
    lines = [
        f"complete -c lorascope -n __fish_use_subcommand -f -a {name} -d {_quoted(sentence)}"
        for name, sentence in helps.items()
    ]
    for command, some in flags.items():
        for flag in some:
            value = f" -x -a '{' '.join(flag.choices)}'" if flag.choices else " -r"
            lines.append(
                f"complete -c lorascope -n '__fish_seen_subcommand_from {command}'"
                f" -l {flag.name.removeprefix('--')}{value if flag.takes_value else ''}"
                f" -d {_quoted(flag.help)}"
            )
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
