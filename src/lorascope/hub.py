"""Find folders on this machine or on the Hugging Face hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorascope.artifact import require_content
from lorascope.config import did_you_mean
from lorascope.errors import AdapterError, LorascopeError, first_line


def find_folder(
    name: str,
    what: str,
    patterns: list[str],
    *,
    revision: str | None = None,
    error_type: type[LorascopeError] = AdapterError,
) -> Path:
    """Return a local folder, or else the local copy of the hub repository of that name.

    `patterns` names the files to download, `revision` a branch, tag or commit. Raises `error_type`
    if a path does not exist (a path never becomes a hub request), is none of the folders that hold
    files, or the download fails.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        require_content(path, error_type)
        if (path / "snapshots").is_dir() or any(path.glob("models--*")):
            found = sorted(path.glob("snapshots/*")) or sorted(path.glob("models--*/snapshots/*"))
            example = f", such as {found[-1]}" if found else ""
            raise error_type(
                f"{what} folder {path} is a cache of the hub; give a hub id, or the folder of one "
                f"snapshot{example}"
            )
        return path
    if path.is_file():
        raise error_type(f"{what} {path} is a file; give its folder {path.parent}")
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") != 1
    if is_path or path.exists():
        raise error_type(f"{what} folder {name} does not exist{similar(path, Path.is_dir)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, revision=revision))
    except Exception as error:  # one of a dozen types that all mean: the download failed
        raise error_type(
            f"{what} {name} is not a folder here and cannot be downloaded from the hub "
            f"({_reason(error)}); check the name, the network and your login"
        ) from error


def read_json_object(file: Path, error_type: type[LorascopeError] = AdapterError) -> dict[str, Any]:
    """Return the object in a JSON file that others wrote, or raise `error_type`."""
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(
            f"{file} is damaged or not JSON ({first_line(error)}); download it again"
        ) from error
    if not isinstance(data, dict):
        raise error_type(f"{file} holds {type(data).__name__}, expected a JSON object")
    return data


def _reason(error: Exception) -> str:
    """Say in one line what an error of the hub's client means."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "it is gated: accept its terms on its page"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private"
    return first_line(error)


def similar(path: Path, fits: Callable[[Path], bool] = lambda _: True) -> str:
    """Return `; did you mean X?` for the nearest name beside a path, or an empty string."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return did_you_mean(path.name, [other.name for other in beside if fits(other)])
