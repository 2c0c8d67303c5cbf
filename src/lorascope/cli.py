"""The command line: `lorascope COMMAND --flags`, one command for each stage.

stdout carries the path of what was made and nothing else; logs and progress go to stderr. Exit
codes: 0 done, 2 the user's input is wrong (one line; `--debug` gives the traceback), 130 and 143
interrupted (finished work is kept), 1 a defect of lorascope.
"""

import argparse
import errno
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lorascope import config, runtime
from lorascope.errors import ArtifactError, ConfigError, Interrupted, LorascopeError
from lorascope.version import __version__

log = logging.getLogger("lorascope")


@dataclass(frozen=True)
class Command:
    """A stage as the command line knows it: its module is imported only when it is asked for."""

    module: str
    options: str
    help: str
    example: str

    def config_class(self) -> type[config.Config]:
        """Import the stage's module and return its config class."""
        return getattr(importlib.import_module(self.module), self.options)


COMMANDS = {
    "demo": Command(
        "lorascope.demo.demo",
        "DemoConfig",
        "take the shipped subject through everything, into a page",
        "lorascope demo --open",
    ),
    "run": Command(
        "lorascope.pipeline",
        "RunConfig",
        "take your adapter and texts through everything, into a page",
        "lorascope run --lora-path my-adapter --dataset texts.jsonl",
    ),
    "generate": Command(
        "lorascope.activations.generate",
        "GenerateConfig",
        "run model and adapter over texts: an activation store",
        "lorascope generate --lora-path my-adapter --dataset texts.jsonl --num-examples 1000",
    ),
    "train": Command(
        "lorascope.sae.train",
        "TrainConfig",
        "train a BatchTopK SAE on a store",
        "lorascope train --data-dir activations_all_adapters --expansion-factor 16 --k 50",
    ),
    "collect": Command(
        "lorascope.features.collect",
        "CollectConfig",
        "find every feature's strongest examples: a feature index",
        "lorascope collect --sae trained_sae_adapters_g-u-d-q-k-v-o.pt --top-k 10",
    ),
    "export": Command(
        "lorascope.features.export",
        "ExportConfig",
        "write a feature index as published JSON, as a table, or for Neuronpedia",
        "lorascope export --input features.h5 --format csv --output features.csv",
    ),
    "dashboard": Command(
        "lorascope.dashboard.render",
        "DashboardConfig",
        "make one self-contained HTML page of a feature index",
        "lorascope dashboard --input features.h5 --output page.html",
    ),
    "evaluate": Command(
        "lorascope.causal.evaluate",
        "EvaluateConfig",
        "measure how much of what the adapter does an SAE explains: a report",
        "lorascope evaluate --lora-path my-adapter --data-dir out/activations --sae out/sae",
    ),
    "ablate": Command(
        "lorascope.causal.ablate",
        "AblateConfig",
        "take layers, projections, sites and features out: what each does, as a report",
        "lorascope ablate --lora-path my-adapter --data-dir out/activations --sae out/sae",
    ),
    "direct": Command(
        "lorascope.causal.direct",
        "DirectConfig",
        "say which tokens each feature promotes and suppresses, from weights alone: a report",
        "lorascope direct --lora-path my-adapter --sae out/sae",
    ),
    "steer": Command(
        "lorascope.causal.steer",
        "SteerConfig",
        "let the model write with features added, removed or clamped: a dose curve and the texts",
        "lorascope steer --lora-path my-adapter --data-dir out/activations --sae out/sae "
        "--features 12 --doses 0.5 1 2",
    ),
    "edit": Command(
        "lorascope.causal.edit",
        "EditConfig",
        "take features out of an adapter, or scale them: a changed adapter, or a runtime patch",
        "lorascope edit --lora-path my-adapter --data-dir out/activations --sae out/sae "
        "--features 12 --output without-12",
    ),
    "attribute": Command(
        "lorascope.causal.attribute",
        "AttributeConfig",
        "say which features made the model predict each token: a report",
        "lorascope attribute --lora-path my-adapter --data-dir out/activations "
        "--sae out/sae --texts-of out/features.h5",
    ),
}
_LOOKS = {
    "info": "say what an artifact or an adapter is, from its files alone",
    "verify": "check an artifact's checksums and promises; exit 1 names what is broken",
}


_FOREIGN = "is no artifact of this version of lorascope, or its header is damaged"


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line and name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    sys.exit(call(sys.argv[1:] if argv is None else argv))


def call(argv: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    arguments = list(argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    above = [runtime.LogHandler()]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=above, force=True)
    quiet = logging.ERROR if runtime.process_rank() else logging.INFO  # one voice for a job
    log.setLevel(logging.DEBUG if debug else quiet)
    try:
        with runtime.interruptible():
            return _dispatch(arguments)
    except LorascopeError as error:
        if debug:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        print(
            "interrupted; finished work is kept; run the command again to continue", file=sys.stderr
        )
        return stop.exit_code
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""  # h5py does not say it
        what = os.strerror(error.errno).lower()
        print(f"ArtifactError: {where}{what}; finished work is kept", file=sys.stderr)
        return LorascopeError.exit_code


def call_stage(name: str, argv: Sequence[str] | None = None) -> None:
    """Run one command under another program's name and exit: for the published scripts."""
    main([name, *(sys.argv[1:] if argv is None else argv)])


def _dispatch(arguments: list[str]) -> int:
    parser = _top_parser()
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return 0
    if arguments[0] == "--version":
        print(f"lorascope {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name in _LOOKS:
        return _look(name, rest)
    if name == runtime.WORKER:
        stage = COMMANDS[rest[0]]
        values = stage.config_class().from_json(json.loads(rest[1]))
        importlib.import_module(stage.module).run(values)
        return 0
    if name not in COMMANDS:
        known = [*COMMANDS, *_LOOKS]
        hint = config.did_you_mean(name, known)
        raise ConfigError(f"unknown command {name}{hint}; there are {', '.join(known)}")
    return _run_stage(name, COMMANDS[name], rest)


def _run_stage(name: str, command: Command, arguments: list[str]) -> int:
    parser = stage_parser(name, command)
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [action.option_strings[0] for action in parser._actions if action.option_strings]
        word = unknown[0].partition("=")[0]
        hint = config.did_you_mean(word, known)
        raise ConfigError(f"unknown argument {word}{hint}; see lorascope {name} --help")
    files = [file for file in [Path(config.CONFIG_FILE)] if file.is_file()]
    files += [Path(flags.config)] if flags.config else []
    config_class = command.config_class()
    values = config.load_config(config_class, vars(flags), files, every_key=_every_key)
    module = importlib.import_module(command.module)
    made = module.run(values)
    if runtime.prints_result():
        print(made)
    return 0


def _top_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lorascope",
        description="Shows what a LoRA learned.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="lorascope COMMAND --help lists a command's flags.\n\n  lorascope demo",
    )
    parser.add_argument("--version", action="version", version=f"lorascope {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.help, add_help=False)
    for name, sentence in _LOOKS.items():
        commands.add_parser(name, help=sentence, add_help=False)
    return parser


def stage_parser(name: str, command: Command) -> argparse.ArgumentParser:
    """Return the parser of a command, its flags made from its config."""
    config_class = command.config_class()
    module = importlib.import_module(command.module)
    parser = _Parser(
        prog=f"lorascope {name}",
        description=(module.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example:\n  {command.example}",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with options")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    config.add_flags(parser, config_class)
    return parser


def _every_key() -> set[str]:
    """Return every option of every command: one lorascope.toml serves them all."""
    return {key for command in COMMANDS.values() for key in command.config_class().names()}


def _look(name: str, arguments: list[str]) -> int:
    parser = _Parser(prog=f"lorascope {name}", description=_LOOKS[name].capitalize() + ".")
    what = "a store, an SAE, a feature index or a page"
    if name == "info":
        what += "; or an adapter: a folder or a hub id"
        parser.add_argument("--json", action="store_true", help="print an adapter as JSON")
        parser.add_argument("--adapter-name", help="which adapter of a folder that holds several")
    parser.add_argument("path", help=what)
    flags = parser.parse_args(arguments)
    path = Path(flags.path).expanduser()
    if name == "info" and _is_adapter(path):
        return _show_adapter(flags.path, flags.adapter_name, as_json=flags.json)
    if name == "info":
        print(json.dumps(_summary_of(path), indent=1, ensure_ascii=False))
        return 0
    broken = verify(path)
    for line in broken:
        print(f"{path}: {line}", file=sys.stderr)
    if not broken:
        print(path)
    return 1 if broken else 0


def _is_adapter(path: Path) -> bool:
    """Say whether a path is to be read as an adapter: a folder with its files, or a hub id."""
    if path.is_dir():
        files = ("adapter_config.json", "*/adapter_config.json", "adapter_model.*")
        is_artifact = (path / "manifest.json").exists()
        return not is_artifact and any(any(path.glob(file)) for file in files)
    is_file = path.exists() or path.suffix in (".h5", ".pt", ".json", ".html", ".safetensors")
    return not is_file and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) is not None


def _show_adapter(lora_path: str, adapter_name: str | None, *, as_json: bool) -> int:
    """Print what an adapter's files hold: a table, or JSON."""
    from lorascope.subject.adapter import inspect_adapter
    from lorascope.subject.inventory import describe, to_json

    adapter = inspect_adapter(lora_path, adapter_name)
    text = json.dumps(to_json(adapter), indent=1, ensure_ascii=False) if as_json else ""
    print(text or describe(adapter))
    return 0


def _summary_of(path: Path) -> dict[str, Any]:
    from lorascope.artifact import read_manifest
    from lorascope.sites import SiteLayout

    manifest = read_manifest(path)
    if manifest is None:
        raise ArtifactError(f"{path} {_FOREIGN}")
    columns: dict[str, Any] = {"adapter": None, "sites": 0, "d_in": 0}
    if manifest["layout"] is not None:
        layout = SiteLayout.from_json(manifest["layout"])
        columns = {"adapter": layout.adapter, "sites": len(layout.sites), "d_in": layout.d_in}
    summary = {key: manifest[key] for key in ("kind", "schema", "version", "settings", "parents")}
    return {**summary, "columns": columns, "content": manifest["content"]}


def verify(path: Path) -> list[str]:
    """Return what is broken in an artifact, a line each: first its bytes, then what they mean."""
    from lorascope.artifact import check_files, read_manifest

    manifest = read_manifest(path)
    if manifest is None:
        return [_FOREIGN]
    if broken := check_files(path):
        return broken
    kind = manifest["kind"]
    try:
        if kind == "activations":
            from lorascope.activations.store import check_contents

            return check_contents(path)
        if kind == "features" and path.suffix == ".h5":
            from lorascope.features import invariants
            from lorascope.features.index import FeatureIndex

            invariants.verify(FeatureIndex.open(path))
        elif kind == "features":
            from lorascope.features.published_json import read_published

            read_published(path)
        elif kind == "sae":
            from lorascope.sae.model import load_sae

            load_sae(path)
        elif kind in ("evaluation", "ablation", "attribution", "direct", "steering"):
            from lorascope.causal.study import open_report

            open_report(path)
    except LorascopeError as error:
        return [str(error)]
    return []
