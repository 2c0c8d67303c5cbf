"""The command line: `lorascope COMMAND [options]`, one command for each stage.

stdout carries the path of the result and nothing else; logs and progress go to stderr. There are no
colours. Exit codes: 0 done, 2 the input is wrong (one line; `--debug` shows the traceback), 130 and
143 interrupted (finished work is kept), 141 the reader of stdout is gone (`| head`), 1 a bug in
lorascope.
"""

import argparse
import errno
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lorascope import config, runtime
from lorascope.commands import COMMANDS
from lorascope.completion import SHELLS, completion_script
from lorascope.errors import ConfigError, Interrupted, LorascopeError, first_line
from lorascope.remote import as_path
from lorascope.version import __version__

log = logging.getLogger("lorascope")


_COMMON = {
    "--quiet": "show warnings and errors only, and no progress",
    "--verbose": "show debug messages too",
    "--debug": "show debug messages, and the traceback of an error",
}


_SECTIONS = {  # of the overview
    "start here": "demo run audit compare",
    "one stage at a time": "generate train collect label study dashboard report export",
    "evidence": "evaluate ablate attribute direct steer edit",
}
_TOOLS = {
    "info": "describe an adapter or any file that lorascope made",
    "verify": "check files that lorascope made for damage; exit code 1 names what is broken",
    "schema": "print the JSON schema of a kind of file, for programs that read it",
    "completion": "print a completion script for bash, zsh or fish",
}


# options that decide how much memory a command needs
_SPINS = "5000"  # of a waiting OpenMP thread, some microseconds
_MEMORY = ("expansion_factor", "batch_size", "batch_tokens", "max_length", "top_k", "top")


# errors of the file system that a user can mend: no room, no right, a path that cannot be
_OF_THE_USER = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_OF_THE_USER += (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
_OF_THE_USER += (errno.EFBIG, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENOLCK)  # of disks


class _Parser(argparse.ArgumentParser):
    """An argparse parser with one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def print_help(self, file: object = None) -> None:
        _print(self.format_help().rstrip())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    OpenMP's threads, of which torch starts one per core, wait for some microseconds and then sleep,
    unless the environment says how they are to wait. Spinning on, they take from other programs
    the time that they wait for; asleep at once, they make an idle machine a quarter slower.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    sys.exit(call(sys.argv[1:] if argv is None else argv))


def call(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    arguments = [argument for argument in argv if argument not in _COMMON]
    debug = "--debug" in argv
    try:
        _set_up_logging(argv)
        with runtime.interruptible():
            return _dispatch(arguments)
    except LorascopeError as error:
        if debug:
            raise
        print(f"{type(error).__name__}: {_one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        print("interrupted: finished work is kept; run again to continue", file=sys.stderr)
        return stop.exit_code
    except OSError as error:
        if debug or error.errno not in _OF_THE_USER:
            raise
        where = f"{error.filename}: " if error.filename else ""  # h5py does not say it
        what = os.strerror(error.errno or 0).lower()
        print(f"ArtifactError: {where}{what}; finished work is kept", file=sys.stderr)
        return LorascopeError.exit_code
    except Exception as error:
        if not debug and _fails_at_import(error):
            print(
                f"ConfigError: a library cannot be imported ({_one_line(str(error))[:200]}); an "
                "environment variable that it reads may be wrong, or its installation damaged",
                file=sys.stderr,
            )
            return LorascopeError.exit_code
        is_memory = isinstance(error, MemoryError | RuntimeError)
        if debug or not is_memory or not runtime.is_out_of_memory(error):
            raise
        stages = [COMMANDS[word] for word in arguments[:2] if word in COMMANDS]  # after --worker
        names = {name for stage in stages for name in stage.config_class().names()}
        flags = [config.flag_of(name) for name in _MEMORY if name in names]
        print(
            f"ConfigError: out of memory ({first_line(error)}); lower "
            f"{' or '.join(flags) or 'the size of the input'}; finished work is kept",
            file=sys.stderr,
        )
        return LorascopeError.exit_code


def _set_up_logging(argv: Sequence[str]) -> None:
    if "--quiet" in argv and {"--verbose", "--debug"} & {*argv}:
        raise ConfigError("--quiet and --verbose were both given; give one of them")
    verbose = "--verbose" in argv or "--debug" in argv
    quiet = "--quiet" in argv or runtime.process_rank() > 0  # rank 0 speaks for the job
    handlers = [runtime.LogHandler()]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=handlers, force=True)
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def _fails_at_import(error: BaseException) -> bool:
    """Return whether an error is that of a library while Python imports it."""
    package = Path(__file__).parent
    at_import = {
        Path(frame.filename).is_relative_to(package)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.name == "<module>"
    }
    return False in at_import


def _one_line(text: str) -> str:
    """Return a message on one line, whatever names it repeats, and without control characters."""
    return "".join(sign if sign.isprintable() else "�" for sign in " ".join(text.splitlines()))


def _print(text: str) -> None:
    """Print to stdout; when its reader is gone (`| head`), exit as if SIGPIPE had ended us."""
    try:
        # a path may have bytes that are no text
        print(text.encode(errors="backslashreplace").decode(), flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def call_stage(name: str) -> None:
    """Run one command with the arguments of this program: for the published scripts."""
    main([name, *sys.argv[1:]])


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        _print(_overview())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        _print(f"lorascope {__version__}")
    elif name == "info":
        _show_info(rest)
    elif name == "verify":
        return _show_verify(rest)
    elif name == "schema":
        _show_schema(rest)
    elif name == "completion":
        _show_completion(rest)
    elif name == runtime.WORKER:
        stage = COMMANDS[rest[0]]
        values = stage.config_class().from_json(json.loads(rest[1]))
        stage.run(values)
    elif name in COMMANDS:
        _run_stage(name, rest)
    else:
        known = [*COMMANDS, *_TOOLS]
        hint = config.did_you_mean(name, known)
        raise ConfigError(f"unknown command {name}{hint}; there are {', '.join(known)}")
    return 0


def _run_stage(name: str, arguments: list[str]) -> None:
    parser = stage_parser(name)
    flags, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        hint = config.did_you_mean(word, known)
        raise ConfigError(f"unknown argument {word}{hint}; see lorascope {name} --help")
    files = [file for file in [Path(config.CONFIG_FILE)] if file.is_file()]
    files += [Path(flags.config)] if flags.config else []
    options = config.load_config(COMMANDS[name].config_class(), vars(flags), files)
    log.debug("options: %s", json.dumps(options.to_json()))
    result = COMMANDS[name].run(options)
    if runtime.prints_result():
        _print(str(result))


def _overview() -> str:
    """Return the text of `lorascope --help`."""
    sections = {
        section: {name: COMMANDS[name].help for name in names.split()}
        for section, names in _SECTIONS.items()
    }
    sections["look at files"] = _TOOLS
    lines = ["usage: lorascope COMMAND [options]", "", "Show what a LoRA learned."]
    for section, helps in sections.items():
        lines += ["", f"{section}:", *(f"  {name:<11} {text}" for name, text in helps.items())]
    lines += ["", "lorascope COMMAND --help lists the options of a command.", "Try: lorascope demo"]
    return "\n".join(lines)


def stage_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command, with a flag for every option of its config."""
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"lorascope {name}",
        description=command.description(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example:\n  {command.example}",
        allow_abbrev=False,
        add_help=False,
    )
    config.add_flags(parser, command.config_class())
    common = parser.add_argument_group("all commands")
    common.add_argument("-h", "--help", action="help", help="show this help")
    common.add_argument("--config", metavar="FILE", help="TOML file with options")
    _add_common(common)
    return parser


def _add_common(parser: "argparse._ActionsContainer") -> None:
    """Add the flags that `call` takes out of every command line, so that `--help` lists them."""
    for flag, text in _COMMON.items():
        parser.add_argument(flag, action="store_true", help=text)


def _tool_parser(name: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"lorascope {name}", description=_TOOLS[name].capitalize() + ".")
    _add_common(parser)
    if name == "completion":
        parser.add_argument("shell", choices=SHELLS)
        return parser
    if name == "schema":
        parser.add_argument(
            "kind", nargs="?", help="such as evaluation, labels or summary; default: list them"
        )
        return parser
    path = "a store, an SAE, a feature index, a report or a page"
    if name == "info":
        path += "; the folder of a run; or an adapter: a folder or a hub id"
        parser.add_argument("--json", action="store_true", help="print everything, as JSON")
        parser.add_argument("--adapter-name", help="which adapter of a folder that holds several")
        parser.add_argument("path", help=path)
    else:
        parser.add_argument(
            "path", nargs="+", help=f"{path}; or the folder of a run, for all of it"
        )
    return parser


def _show_info(arguments: list[str]) -> None:
    from lorascope.inspection import describe

    flags = _tool_parser("info").parse_args(arguments)
    _print(describe(flags.path, flags.adapter_name, as_json=flags.json))


def _show_verify(arguments: list[str]) -> int:
    from lorascope.inspection import artifacts_in, verify

    code = 0
    for word in _tool_parser("verify").parse_args(arguments).path:
        for path in artifacts_in(as_path(word).expanduser()):
            problems = verify(path)
            for problem in problems:
                print(f"{path}: {problem}", file=sys.stderr)
            if not problems:
                _print(f"{path}: ok")
            code = code or bool(problems)
    return int(code)


def _show_schema(arguments: list[str]) -> None:
    from lorascope.inspection import KINDS, report_schema

    kind = _tool_parser("schema").parse_args(arguments).kind
    if kind is None:
        _print("\n".join(f"{kind:<13} {file}" for kind, file in KINDS.items()))
        return
    _print(json.dumps(report_schema(kind), indent=1, ensure_ascii=False))


def _show_completion(arguments: list[str]) -> None:
    shell = _tool_parser("completion").parse_args(arguments).shell
    parsers = {name: stage_parser(name) for name in COMMANDS}
    parsers |= {name: _tool_parser(name) for name in _TOOLS}
    helps = {name: command.help for name, command in COMMANDS.items()} | _TOOLS
    _print(completion_script(shell, helps, parsers).rstrip())
