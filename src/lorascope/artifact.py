"""Files that stages leave behind: finished or absent, never half.

1. `building` makes `NAME.partial/` next to the final name, locks it, and records the settings.
2. The stage writes into that folder. Killed at any moment, it finds its finished pieces there
   when it runs again with the same settings.
3. `publish_directory` writes `manifest.json` last and keeps the files that it names, `publish_file`
   takes one file out; both seal, sync to disk and rename. What stands under the final name is
   therefore complete, and nothing else is there.

A manifest says what the artifact is (`kind`, `schema`), what decided it (`settings`, and the
digests of its `parents`), what its columns mean (`layout`) and what it holds (`files` with size
and SHA-256, `content`). It holds no time, host or absolute path: the same work, the same bytes.
Where it stands: `manifest.json` in a folder, the first line of an `.h5` file, the entry
`lorascope.json` of a `.pt` archive, `metadata.lorascope` of a JSON file, a comment in a page.

One file of every artifact carries a *seal*: the file itself, or `manifest.json` of a folder, which
has the checksums of the others. It is the text `lorascope-sha256:` and 64 digits, the SHA-256 of
the file with these digits as zeros. `check_files` finds every changed, missing and added byte.
"""

import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lorascope.arrayfile import read_header
from lorascope.errors import ArtifactError
from lorascope.version import __version__

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
HTML_MARK = b"<!-- lorascope "
SEAL = b"lorascope-sha256:"
EMPTY_SEAL = SEAL + b"0" * 64
_HUB_FILES = {"README.md", ".gitattributes"}  # that a model hub puts into every folder
_LARGEST_MANIFEST = 1 << 26  # bytes
_DAMAGED = (  # what reading a damaged file may raise
    OSError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    EOFError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_SETTINGS = "settings.json"
_LOCK = ".lock"
_SKEW = 60  # seconds by which clocks of machines that share a file system may differ


def canonical(value: Any) -> str:
    """Return the one JSON text of a value that digests and manifests are made of."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_manifest(
    kind: str,
    schema: int,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    layout: Mapping[str, Any] | None,
    content: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a manifest; see the module's text for the meaning of its fields."""
    return {
        "kind": kind,
        "schema": schema,
        "version": __version__,
        "settings": dict(settings),
        "parents": dict(parents),
        "layout": None if layout is None else dict(layout),
        "content": dict(content),
        "files": {},
    }


def with_seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest as it is written: an empty seal first, then its keys in sorted order.

    First, because the first seal in a file is the one that counts.
    """
    return {"seal": EMPTY_SEAL.decode(), **json.loads(canonical(manifest))}


def seal_file(path: Path) -> None:
    """Write the SHA-256 of a file into its seal. A file without an empty seal stays as it is."""
    with path.open("r+b") as file:
        if path.stat().st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0) as data:
            start = _find_seal(data)
            if start is None or data[start : start + 64] != b"0" * 64:
                return
            data[start : start + 64] = _digest_with_empty_seal(data, start)


def sealed(text: str) -> str:
    """Return the text of a file with the SHA-256 in its empty seal."""
    data = text.encode()
    start = _find_seal(data)
    assert start is not None, "with_seal put one there"
    digits = _digest_with_empty_seal(data, start)
    return (data[:start] + digits + data[start + 64 :]).decode()


def check_seal(path: Path) -> str | None:
    """Return how a sealed file was changed, or None when it is as it was written."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = _find_seal(data)
            if start is None:
                return f"{path.name} has no seal: it is damaged, or an older lorascope made it"
            if data[start : start + 64] != _digest_with_empty_seal(data, start):
                return f"{path.name} has other bytes than its seal says: it was changed or damaged"
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        return f"{path.name} cannot be read ({error})"
    return None


def _find_seal(data: mmap.mmap | bytes) -> int | None:
    """Return where the digits of the seal begin: at the very end, or else the first ones."""
    last = max(len(data) - len(EMPTY_SEAL), 0)
    found = last if data[last:].startswith(SEAL) else data.find(SEAL)
    start = found + len(SEAL)
    return start if found >= 0 and start + 64 <= len(data) else None


def _digest_with_empty_seal(data: mmap.mmap | bytes, start: int) -> bytes:
    hasher = hashlib.sha256()
    with memoryview(data) as view, view[:start] as before, view[start + 64 :] as after:
        hasher.update(before)
        hasher.update(b"0" * 64)
        hasher.update(after)
    return hasher.hexdigest().encode()


def write_manifest(folder: Path, manifest: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write `manifest.json` with the size and the SHA-256 of `files`, sealed."""
    table = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest_file(folder / name)}
        for name in files
    }
    text = json.dumps(with_seal({**manifest, "files": table}), indent=1, allow_nan=False)
    write_text(folder / MANIFEST, sealed(text + "\n"))


def check_files(path: Path) -> list[str]:
    """Return how the bytes of an artifact differ from what they were, a line each.

    Empty when all are as they were written. What they mean is not looked at.
    """
    if not path.is_dir():
        changed = check_seal(path)
        return [changed] if changed else []
    changed = check_seal(path / MANIFEST)
    manifest = read_manifest(path)
    if changed or manifest is None:
        return [changed or f"{MANIFEST} is no manifest of lorascope"]
    broken: list[str] = []
    folders: set[str] = set()
    for name, known in manifest["files"].items():
        file, pure = path / name, PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name:
            broken.append(f"{name!r} in the manifest is no name of a file in this folder")
            continue
        folders |= {parent.as_posix() for parent in pure.parents}
        if not file.is_file():
            broken.append(f"{name} is missing")
        elif file.stat().st_size != known.get("bytes"):
            size = file.stat().st_size
            broken.append(f"{name} has {size} bytes, the manifest says {known.get('bytes')}")
        elif digest_file(file) != known.get("sha256"):
            broken.append(f"{name} has another checksum than the manifest")
    allowed = {MANIFEST, *manifest["files"], *folders, *_HUB_FILES}
    found = {found.relative_to(path).as_posix() for found in path.rglob("*")}
    broken += [
        f"{name} is not in the manifest: it belongs to something else, remove it"
        for name in sorted(found - allowed)
    ]
    return broken


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return an artifact's manifest from its header, or None when lorascope did not make it.

    The seal is left out. Raises ArtifactError when the path does not exist.
    """
    if not path.exists():
        raise ArtifactError(
            f"{path} does not exist; check the path, or run the stage that makes it"
        )
    try:
        manifest = _manifest_of(path)
    except _DAMAGED:
        return None
    if not isinstance(manifest, dict):
        return None
    manifest = {key: value for key, value in manifest.items() if key != "seal"}
    return manifest if is_manifest(manifest) else None


def is_manifest(manifest: Mapping[str, Any]) -> bool:
    """Say whether the fields of a manifest are there and of their types."""
    objects = [manifest.get(key) for key in ("settings", "parents", "content", "files")]
    return (
        isinstance(manifest.get("kind"), str)
        and type(manifest.get("schema")) is int
        and isinstance(manifest.get("version"), str)
        and all(isinstance(value, dict) for value in objects)
        and all(isinstance(digest, str) for digest in manifest["parents"].values())
        and all(isinstance(known, dict) for known in manifest["files"].values())
        and isinstance(manifest.get("layout"), dict | None)
    )


def _manifest_of(path: Path) -> Any:
    """Return the JSON value that stands where a manifest does."""
    if path.is_dir():
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if path.suffix == ".h5":
        return read_header(path)
    if path.suffix == ".pt":
        with zipfile.ZipFile(path) as archive:
            (entry,) = [e for e in archive.infolist() if e.filename.endswith("/lorascope.json")]
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _LARGEST_MANIFEST:
                raise ValueError("no manifest is compressed or so large")
            return json.loads(archive.read(entry))
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))["metadata"]["lorascope"]
    if path.suffix == ".html":
        with path.open("rb") as file:
            head = file.read(_LARGEST_MANIFEST)
        start = head.index(HTML_MARK) + len(HTML_MARK)
        return json.loads(head[start : head.index(b" -->", start)])
    return None


def open_manifest(path: Path, kind: str, schema: int, oldest: int = 1) -> dict[str, Any]:
    """Return the manifest of an artifact of `kind` with a schema from `oldest` to `schema`.

    Raises ArtifactError when the path is missing, or is something else.
    """
    manifest = read_manifest(path)
    if manifest is None or manifest["kind"] != kind:
        foreign = "was not made by lorascope, or is damaged"
        found = f"holds {manifest['kind']}" if manifest else foreign
        raise ArtifactError(f"{path} {found}, expected {kind}")
    if manifest["schema"] > schema:
        raise ArtifactError(
            f"{path} has schema {manifest['schema']} of {kind}, this version reads up to {schema}: "
            "install a newer lorascope"
        )
    if manifest["schema"] < oldest:
        raise ArtifactError(
            f"{path} has schema {manifest['schema']} of {kind}, this version reads {oldest}: "
            "an older lorascope made it; make it again"
        )
    return manifest


def is_made(
    out: Path,
    kind: str,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    overwrite: bool,
) -> bool:
    """Say whether `out` is already what these settings make; False means: build it.

    Raises ArtifactError when something else stands there and `overwrite` is off, and when a folder
    that lorascope did not make stands there, whatever `overwrite` says.
    """
    _require_replaceable(out)
    if overwrite or not (out.exists() or out.is_symlink()):
        return False
    if out.is_dir() and not any(out.iterdir()):
        return False
    found = read_manifest(out)
    if found is None or found["kind"] != kind:
        what = "exists and was not made by this stage"
    elif found["settings"] != dict(settings):
        before, now = found["settings"], dict(settings)
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        detail = ", ".join(f"{k} {before.get(k)} there, {now.get(k)} here" for k in keys[:3])
        what = f"exists with other settings ({detail})"
    elif found["parents"] != dict(parents):
        names = [n for n in parents if found["parents"].get(n) != parents[n]]
        what = f"exists and was made from another {' and '.join(names) or 'input'}"
    else:
        _drop_remains(out, kind, settings=settings, parents=parents)
        return True
    raise ArtifactError(f"{out} {what}; give another output, or --overwrite to replace it")


def _drop_remains(
    out: Path, kind: str, *, settings: Mapping[str, Any], parents: Mapping[str, str]
) -> None:
    """Remove the folder that a kill left between giving a file its name and dropping its folder."""
    path = unfinished(out)
    identity = {"kind": kind, "settings": dict(settings), "parents": dict(parents)}
    if not path.is_dir() or _recorded(path) not in (None, identity):
        return
    with (path / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another process is just about to
        shutil.rmtree(path)


def unfinished(out: Path) -> Path:
    """Return the folder in which an artifact is made."""
    return out.with_name(out.name + ".partial")


def _require_replaceable(out: Path) -> None:
    """Raise ArtifactError at a folder of somebody else's: replacing it would delete their files."""
    if out.is_dir() and any(out.iterdir()) and read_manifest(out) is None:
        raise ArtifactError(
            f"{out} is a folder with files that lorascope did not make, and is never replaced; "
            "give another output"
        )


@dataclass(frozen=True)
class Build:
    """A folder in which one artifact is being made."""

    out: Path
    path: Path

    def publish_directory(self, manifest: Mapping[str, Any], files: Iterable[str]) -> Path:
        """Write the manifest with the checksums of `files`, and give the folder its name.

        Other files are dropped: checkpoints, and what a kill left half written.
        """
        names = {*files}
        write_manifest(self.path, manifest, names)
        for file in [path for path in self.path.rglob("*") if not path.is_dir()]:
            if file.relative_to(self.path).as_posix() not in (MANIFEST, *names):
                file.unlink()
        for folder in [path for path in self.path.rglob("*") if path.is_dir()][::-1]:
            if not any(folder.iterdir()):
                folder.rmdir()
        _sync(self.path)
        _clear(self.out)
        self.path.rename(self.out)
        _sync(self.out.parent)
        return self.out

    def publish_file(self, name: str) -> Path:
        """Seal the file `name` of the folder, give it the final name, and drop the folder."""
        seal_file(self.path / name)
        _sync(self.path / name)
        if self.out.is_dir():
            _clear(self.out)
        (self.path / name).replace(self.out)
        _sync(self.out.parent)
        shutil.rmtree(self.path)
        return self.out


@contextmanager
def building(
    out: Path,
    kind: str,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    overwrite: bool,
) -> Generator[Build]:
    """Open the folder `OUT.partial` for an artifact, with what an earlier run finished there.

    Raises ArtifactError when another process writes it, or when it holds unfinished work of
    other settings and `overwrite` is off.
    """
    _require_replaceable(out)
    path = unfinished(out)
    identity = {"kind": kind, "settings": dict(settings), "parents": dict(parents)}
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / _LOCK).open("w")
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}; choose another output"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(
                f"another process is writing {out}; wait for it, or give another output"
            ) from error
        if _recorded(path) not in (None, identity):
            if not overwrite:
                raise ArtifactError(
                    f"{path} holds unfinished work of other settings; give another output, "
                    "or --overwrite to drop it"
                )
            for child in path.iterdir():
                if child.name != _LOCK:
                    _clear(child)
        write_text(path / _SETTINGS, canonical(identity))
        try:
            yield Build(out, path)
        except BaseException:
            if path.is_dir() and {child.name for child in path.iterdir()} <= {_LOCK, _SETTINGS}:
                shutil.rmtree(path)  # nothing was finished, so nothing is left behind
            raise


def built(
    out: Path,
    kind: str,
    make: Callable[[Build], Any],
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    overwrite: bool,
) -> Path:
    """Return `out`, the skeleton of a stage that runs in one process.

    A finished `out` with these settings and parents stays as it is. Otherwise `make` gets the
    folder to work in, and publishes from it. Raises what `is_made` and `building` raise.
    """
    identity = {"settings": settings, "parents": parents, "overwrite": overwrite}
    if is_made(out, kind, **identity):
        log.info("%s already exists with these settings", out)
    else:
        with building(out, kind, **identity) as build:
            make(build)
    return out


def join(
    out: Path,
    kind: str,
    *,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    patience: float = 600,
) -> Build | None:
    """Return the folder that another process of this job opened with `building`.

    None means that the artifact was finished meanwhile. Raises ArtifactError when neither is seen
    within `patience` seconds.
    """
    build = Build(out, unfinished(out))
    identity = {"kind": kind, "settings": dict(settings), "parents": dict(parents)}
    begun, begun_at = time.monotonic(), time.time()
    while time.monotonic() - begun < patience:
        if _recorded(build.path) == identity:
            return build
        last = out / MANIFEST if out.is_dir() else out
        if last.exists() and last.stat().st_mtime >= begun_at - _SKEW:
            return None
        time.sleep(0.05)
    raise ArtifactError(
        f"{build.path} was not made by rank 0 within {patience:g} s; the output must be on a file "
        "system that all machines of the job share"
    )


def _recorded(path: Path) -> dict[str, Any] | None:
    """Return what an unfinished folder is to become; its manifest says it once it is written."""
    for name in (_SETTINGS, MANIFEST):
        try:
            data = json.loads((path / name).read_text(encoding="utf-8"))
            return {key: data[key] for key in ("kind", "settings", "parents")}
        except FileNotFoundError:
            continue
        except (ValueError, TypeError, KeyError):
            return {}  # damaged: it is the work of nobody
    return None


def write_text(path: Path, text: str) -> None:
    """Write a whole file atomically: under another name, synced, then renamed."""
    with replacing(path) as sibling, sibling.open("w", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield the name to write a file under; it is then synced and takes the name `path`."""
    sibling = path.with_name(path.name + ".tmp")
    yield sibling
    _sync(sibling)
    sibling.replace(path)


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise ArtifactError unless the disk of `folder` has room for `n_bytes` more."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < n_bytes:
        raise ArtifactError(
            f"{place} has {free / 1e9:.1f} GB free, this needs {n_bytes / 1e9:.1f} GB; "
            "choose another output or fewer texts"
        )


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
