"""How a stage makes its artifact: finished or absent, never half.

1. `building` makes `NAME.partial/` next to the final name, locks it, and records the identity.
2. The stage writes into that folder. Killed at any moment, it finds its finished pieces there
   when it runs again with the same settings.
3. `publish_directory` writes `manifest.json` last and keeps the files that it names, `publish_file`
   takes one file out; both seal, sync to disk and rename. What stands under the final name is
   therefore complete, and nothing else is there.

An object store renames nothing and locks nothing: there a folder is made under its final name, and
its manifest says that it is finished.

`built` is the skeleton that stages share: find the finished artifact, start the processes of the
job or join it, build and publish.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from lorascope import runtime
from lorascope.artifact import (
    MANIFEST,
    RECEIPT,
    Identity,
    Manifest,
    canonical,
    read_manifest,
    seal_file,
    sync,
    write_manifest,
    write_text,
)
from lorascope.config import Config
from lorascope.errors import ArtifactError
from lorascope.remote import RemotePath

log = logging.getLogger(__name__)

_SETTINGS = "settings.json"
_LOCK = ".lock"
_AT_URLS = "activations"  # the one kind that is written to URLs
_PATIENCE = 600  # seconds for which a process waits for rank 0
_SKEW = 60  # seconds by which clocks of machines that share a file system may differ


def is_made(out: Path, identity: Identity, *, overwrite: bool) -> bool:
    """Say whether `out` is already the artifact of this identity; False means: build it.

    Raises ArtifactError when something else stands there and `overwrite` is off, and when a folder
    that lorascope did not make stands there, whatever `overwrite` says.
    """
    if identity.kind != _AT_URLS:
        os.fspath(out)  # refuses a URL
    _require_replaceable(out)
    if overwrite or not (out.exists() or out.is_symlink()):
        return False
    if out.is_dir() and (not any(out.iterdir()) or _is_unfinished(out)):
        return False
    found = read_manifest(out)
    if found is None or found.kind != identity.kind:
        what = "exists and was not made by this stage"
    elif found.settings != identity.settings:
        before, now = found.settings, identity.settings
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        detail = ", ".join(f"{k} {before.get(k)} there, {now.get(k)} here" for k in keys[:3])
        what = f"exists with other settings ({detail})"
    elif found.parents != identity.parents:
        names = [n for n, digest in identity.parents.items() if found.parents.get(n) != digest]
        what = f"exists and was made from another {' and '.join(names) or 'input'}"
    else:
        if runtime.process_rank() == 0:  # other ranks may come while rank 0 still publishes
            _drop_remains(out, identity)
        return True
    raise ArtifactError(f"{out} {what}; give another output, or --overwrite to replace it")


def _drop_remains(out: Path, identity: Identity) -> None:
    """Remove the folder that a kill left between giving a file its name and dropping its folder."""
    path = unfinished(out)
    if isinstance(out, RemotePath):
        _remove_records(out)
        return
    if not path.is_dir() or _recorded(path) not in (None, _record(identity)):
        return
    with (path / _LOCK).open("w") as lock:
        if _take(lock):  # else another process is just about to, or nobody can tell
            shutil.rmtree(path)


def unfinished(out: Path) -> Path:
    """Return the folder in which an artifact is made."""
    if isinstance(out, RemotePath):
        return out
    return out.with_name(out.name + ".partial")


def _require_replaceable(out: Path) -> None:
    """Raise ArtifactError at a folder of somebody else's: replacing it would delete their files."""
    if not out.is_dir() or _is_unfinished(out):
        return
    if any(out.iterdir()) and read_manifest(out) is None:
        raise ArtifactError(
            f"{out} is a folder with files that lorascope did not make, and is never replaced; "
            "give another output"
        )


def _is_unfinished(out: Path) -> bool:
    """Say whether this is a folder on an object store that a stage began."""
    return isinstance(out, RemotePath) and not (out / MANIFEST).exists() and bool(_recorded(out))


def _remove_records(out: RemotePath) -> None:
    """Remove what a finished folder on an object store needs no more."""
    for file in out.rglob("*"):
        if file.name == _SETTINGS or file.suffix == RECEIPT:
            file.unlink()


class Job(NamedTuple):
    """The processes that make an artifact together: `command` runs with `config` in each."""

    n_workers: int
    command: str
    config: Config


@dataclass(frozen=True)
class Build:
    """A folder in which one artifact is being made."""

    out: Path
    path: Path

    def publish_directory(self, manifest: Manifest, files: Iterable[str]) -> Path:
        """Write the manifest with the checksums of `files`, and give the folder its name.

        Other files are dropped: checkpoints, and what a kill left half written.
        """
        names = {*files}
        write_manifest(self.path, manifest, names)
        if isinstance(self.out, RemotePath):
            _remove_records(self.out)
            return self.out
        for file in [path for path in self.path.rglob("*") if not path.is_dir()]:
            if file.relative_to(self.path).as_posix() not in (MANIFEST, *names):
                file.unlink()
        for folder in [path for path in self.path.rglob("*") if path.is_dir()][::-1]:
            if not any(folder.iterdir()):
                folder.rmdir()
        sync(self.path)
        _clear(self.out)
        self.path.rename(self.out)
        sync(self.out.parent)
        return self.out

    def publish_file(self, name: str) -> Path:
        """Seal the file `name` of the folder, give it the final name, and drop the folder."""
        seal_file(self.path / name)
        sync(self.path / name)
        if self.out.is_dir():
            _clear(self.out)
        (self.path / name).replace(self.out)
        sync(self.out.parent)
        shutil.rmtree(self.path, ignore_errors=True)  # what stays, `is_made` drops
        return self.out


@contextmanager
def building(out: Path, identity: Identity, *, overwrite: bool) -> Generator[Build]:
    """Open the folder `OUT.partial` for an artifact, with what an earlier run finished there.

    Raises ArtifactError when another process writes it, or when it holds unfinished work of
    other settings and `overwrite` is off.
    """
    _require_replaceable(out)
    path, record = unfinished(out), _record(identity)
    if isinstance(out, RemotePath):
        _begin_remote(out, record, overwrite=overwrite)
        try:
            yield Build(out, out)
        except BaseException:
            if {file.name for file in out.rglob("*")} <= {_SETTINGS}:
                (out / _SETTINGS).unlink()
            raise
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / _LOCK).open("w")
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}; choose another output"
        ) from error
    with lock:
        if (taken := _take(lock)) is False:
            raise ArtifactError(
                f"another process is writing {out}; wait for it, or give another output"
            )
        if taken is None:
            log.warning(
                "the file system of %s has no locks: start no other command with this output", out
            )
        if _recorded(path) not in (None, record):
            _require_overwrite(path, overwrite=overwrite)
            for child in path.iterdir():
                if child.name != _LOCK:
                    _clear(child)
        write_text(path / _SETTINGS, canonical(record))
        try:
            yield Build(out, path)
        except BaseException:
            if path.is_dir() and {child.name for child in path.iterdir()} <= {_LOCK, _SETTINGS}:
                shutil.rmtree(path)  # nothing was finished, so nothing is left behind
            raise


def _require_overwrite(path: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise ArtifactError(
            f"{path} holds unfinished work of other settings; give another output, "
            "or --overwrite to drop it"
        )


def _begin_remote(out: RemotePath, record: dict[str, Any], *, overwrite: bool) -> None:
    """Begin or continue a folder on an object store. What `overwrite` replaces is removed first."""
    log.warning("%s has no locks: start no other command with this output", out)
    is_finished = (out / MANIFEST).exists()
    if is_finished or _recorded(out) not in (None, record):
        _require_overwrite(out, overwrite=overwrite)
        (out / MANIFEST).unlink(missing_ok=True)
        for file in out.rglob("*"):
            file.unlink()
    write_text(out / _SETTINGS, canonical(record))


def _take(lock: IO[str]) -> bool | None:
    """Lock a file; say False if another process has it, None if the file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in runtime.NO_LOCKS:
            raise
        return None
    return True


def built(
    out: Path,
    identity: Identity,
    make: Callable[[Build], Any],
    *,
    overwrite: bool,
    job: Job | None = None,
) -> Path:
    """Return `out`, the skeleton of a stage.

    A finished `out` of this identity stays as it is. Otherwise `make` gets the folder to work in,
    and publishes from it. With a `job` of several processes, `make` runs in each of them, and rank
    0 alone publishes. Raises what `is_made`, `building` and `runtime.launch` raise.
    """
    if is_made(out, identity, overwrite=overwrite):
        log.info("%s already exists with these settings", out)
    elif job is not None and job.n_workers > 1:
        runtime.launch(*job)
    elif runtime.process_rank() == 0:
        with building(out, identity, overwrite=overwrite) as build:
            make(build)
    elif build := join(out, identity):
        make(build)
    return out


def join(out: Path, identity: Identity) -> Build | None:
    """Return the folder that another process of this job opened with `building`.

    None means that the artifact was finished meanwhile. Raises ArtifactError when neither is seen
    within ten minutes.
    """
    build, record = Build(out, unfinished(out)), _record(identity)
    begun, begun_at = time.monotonic(), time.time()
    while time.monotonic() - begun < _PATIENCE:
        if _recorded(build.path) == record:
            return build
        last = out / MANIFEST if out.is_dir() else out
        if last.exists() and last.stat().st_mtime >= begun_at - _SKEW:
            return None
        time.sleep(0.05)
    raise ArtifactError(
        f"{build.path} was not made by rank 0 within {_PATIENCE} s; the output must be on a file "
        "system that all machines of the job share"
    )


def _record(identity: Identity) -> dict[str, Any]:
    """Return what an unfinished folder says that it is to become."""
    return {
        "kind": identity.kind,
        "settings": dict(identity.settings),
        "parents": dict(identity.parents),
    }


def _recorded(path: Path) -> dict[str, Any] | None:
    """Return what an unfinished folder is to become; its manifest says it once it is written."""
    for name in (_SETTINGS,) if isinstance(path, RemotePath) else (_SETTINGS, MANIFEST):
        try:
            data = json.loads((path / name).read_text(encoding="utf-8"))
            return {key: data[key] for key in ("kind", "settings", "parents")}
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError):
            return {}  # damaged: it is the work of nobody
    return None


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise ArtifactError unless the disk of `folder` has room for `n_bytes` more; a URL has."""
    if isinstance(folder, RemotePath):
        return
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise ArtifactError(
            f"{existing} has {free / 1e9:.1f} GB free, this needs {n_bytes / 1e9:.1f} GB; "
            "choose another output or fewer texts"
        )


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
