"""Files that stages leave behind: finished or absent, never half.

1. `building` makes `NAME.partial/` beside the final name, locks it, and records the settings.
2. The stage writes into that folder. Killed at any moment, it finds its finished pieces there
   when it runs again with the same settings.
3. `publish_directory` writes `manifest.json` last and keeps the files that it names, `publish_file`
   takes one file out; both sync to disk and rename. What stands under the final name is therefore
   complete, and nothing else is there.

A manifest says what the artifact is (`kind`, `schema`), what decided it (`settings`, and the
digests of its `parents`), what its columns mean (`layout`) and what it holds (`files` with size
and SHA-256, `content`). It holds no time, host or absolute path: the same work, the same bytes.
Where it stands: `manifest.json` in a folder, the attribute `manifest` of an HDF5 file, the entry
`lorascope.json` of a `.pt` archive, `metadata.lorascope` of a JSON file, a comment in a page.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorascope.errors import ArtifactError
from lorascope.version import __version__

MANIFEST = "manifest.json"
HTML_MARK = b"<!-- lorascope "
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
    files: Mapping[str, Any] | None = None,
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
        "files": dict(files or {}),
    }


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return an artifact's manifest from its header, or None when lorascope did not make it.

    Raises ArtifactError when the path does not exist.
    """
    if not path.exists():
        raise ArtifactError(
            f"{path} does not exist; check the path, or run the stage that makes it"
        )
    try:
        text = _manifest_text(path)
        manifest = json.loads(text) if text else None
    except (OSError, ValueError, KeyError, RecursionError, zipfile.BadZipFile):
        return None
    ours = isinstance(manifest, dict) and {"kind", "schema", "settings"} <= manifest.keys()
    return manifest if ours else None


def _manifest_text(path: Path) -> str | None:
    if path.is_dir():
        file = path / MANIFEST
        return file.read_text(encoding="utf-8") if file.is_file() else None
    if path.suffix == ".h5":
        import h5py

        with h5py.File(path, "r") as file:
            text = file.attrs.get("manifest")
            return text if isinstance(text, str) else None
    if path.suffix == ".pt":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/lorascope.json")]
            return archive.read(names[0]).decode() if names else None
    if path.suffix == ".json":
        data = json.loads(path.read_text(encoding="utf-8"))
        metadata = data.get("metadata") if isinstance(data, dict) else None
        ours = metadata.get("lorascope") if isinstance(metadata, dict) else None
        return None if ours is None else canonical(ours)
    if path.suffix == ".html":
        with path.open("rb") as file:
            head = file.read(1 << 24)
        start = head.find(HTML_MARK)
        end = head.find(b" -->", start)
        return head[start + len(HTML_MARK) : end].decode() if start >= 0 else None
    return None


def open_manifest(path: Path, kind: str, schema: int) -> dict[str, Any]:
    """Return the manifest of an artifact that must be of `kind` and of a schema that we read."""
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

    def publish_directory(self, manifest: Mapping[str, Any]) -> Path:
        """Write the manifest, drop every file that it does not name, and give the folder its name.

        Dropped are checkpoints, and what a kill left half written under a name of its own.
        """
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for file in [path for path in self.path.rglob("*") if path.is_file()]:
            if file.relative_to(self.path).as_posix() not in (MANIFEST, *manifest["files"]):
                file.unlink()
        _sync(self.path)
        _clear(self.out)
        self.path.rename(self.out)
        _sync(self.out.parent)
        return self.out

    def publish_file(self, name: str) -> Path:
        """Give the file `name` of the folder the final name, and drop the folder."""
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
        except FileNotFoundError:
            continue
        return {key: data[key] for key in ("kind", "settings", "parents")}
    return None


def write_text(path: Path, text: str) -> None:
    """Write a whole file atomically: beside its name, synced, then renamed."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield the name to write a file under; it is then synced and takes the name `path`."""
    beside = path.with_name(path.name + ".tmp")
    yield beside
    _sync(beside)
    beside.replace(path)


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
