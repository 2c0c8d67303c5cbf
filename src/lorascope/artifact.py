"""What every file of lorascope says of itself, and how damage to it is found.

A manifest says what the artifact is (`kind`, `schema`), what decided it (`settings`, and the
digests of its `parents`), what its columns mean (`layout`) and what it holds (`files` with size
and SHA-256, `content`). It holds no time, host or absolute path: the same work, the same bytes.
Where it stands: `manifest.json` in a folder, the first line of an `.h5` file, the entry
`lorascope.json` of a `.pt` archive, `metadata.lorascope` of a JSON file, a comment in a page or in
Markdown.

One file of every artifact carries a *seal*: the file itself, or `manifest.json` of a folder, which
has the checksums of the others. It is the text `lorascope-sha256:` and 64 digits, the SHA-256 of
the file with these digits as zeros. `check_files` finds every changed, missing and added byte.

`stage` has how an artifact is made.
"""

import errno
import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from mmap import mmap
from pathlib import Path, PurePosixPath
from typing import Any

from lorascope.arrayfile import mapped, read_header
from lorascope.errors import ArtifactError, LorascopeError
from lorascope.remote import RemotePath, uploaded
from lorascope.sites import SiteLayout
from lorascope.version import __version__

MANIFEST = "manifest.json"
RECEIPT = ".sha256"  # beside an object until its store is finished
HTML_MARK = b"<!-- lorascope "
SEAL = b"lorascope-sha256:"
EMPTY_SEAL = SEAL + b"0" * 64
BLOCK = 4096  # bytes that `digest_in_part` reads at a time
_BLOCK_EVERY = 1 << 23
_LFS = b"version https://git-lfs"
_LARGEST_POINTER = 1024  # bytes
_HUB_FILES = {"README.md", ".gitattributes"}  # that a model hub puts into every folder
_LARGEST_MANIFEST = 1 << 26  # bytes
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # that fsync gives where there is none
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


def digest_in_part(path: Path, parts: Sequence[tuple[int, int]] = ()) -> str:
    """Return a digest of a file that is too large to read: of its size and of blocks of it.

    Of each part `(begin, end)`, in bytes, or of the whole file if none is given, it reads the first
    and the last block, and in between one for every 8 MiB.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for begin, end in parts or [(0, size)]:
            last = max(end - BLOCK, begin)
            n = 2 + (end - begin) // _BLOCK_EVERY
            for start in sorted({begin + (last - begin) * i // (n - 1) for i in range(n)}):
                file.seek(start)
                digest.update(file.read(min(BLOCK, end - start)))
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What decides an artifact: the same identity gives the same bytes."""

    kind: str
    schema: int
    settings: Mapping[str, Any]
    parents: Mapping[str, str]  # digests of the artifacts that it was made from, by name

    def manifest(self, layout: SiteLayout | None, content: Mapping[str, Any]) -> "Manifest":
        """Return the manifest of the finished artifact; its files are added when it is written."""
        return Manifest(**vars(self), layout=layout, content=content)


@dataclass(frozen=True, kw_only=True)
class Manifest(Identity):
    """What an artifact says of itself; see the module's text."""

    layout: SiteLayout | None
    content: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    version: str = __version__

    @property
    def identity(self) -> Identity:
        """What decided the artifact."""
        return Identity(
            kind=self.kind, schema=self.schema, settings=self.settings, parents=self.parents
        )

    @property
    def columns(self) -> SiteLayout:
        """The layout. Raises ArtifactError if there is none, though the artifact has rows."""
        if self.layout is None:
            raise ArtifactError(f"the manifest of kind {self.kind} has no layout: it is damaged")
        return self.layout

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest: what other artifacts name this one by."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values, without its seal."""
        layout = None if self.layout is None else self.layout.to_json()
        return {**vars(self), "layout": layout}

    def to_sealed_json(self) -> dict[str, Any]:
        """Return the manifest as it is written: an empty seal first, then its keys in sorted order.

        First, because the first seal in a file is the one that counts.
        """
        return {"seal": EMPTY_SEAL.decode(), **json.loads(canonical(self.to_json()))}

    @classmethod
    def from_json(cls, data: Any) -> "Manifest":
        """Read what `to_json` or `to_sealed_json` made. Raises ValueError at anything else."""
        if not isinstance(data, dict):
            raise ValueError("a manifest is a JSON object")
        values = {known.name: data[known.name] for known in fields(cls) if known.name in data}
        objects = [values.get(key) for key in ("settings", "parents", "content", "files")]
        if not (
            isinstance(values.get("kind"), str)
            and type(values.get("schema")) is int
            and isinstance(values.get("version"), str)
            and all(isinstance(value, dict) for value in objects)
            and all(isinstance(digest, str) for digest in values["parents"].values())
            and all(isinstance(known, dict) for known in values["files"].values())
            and isinstance(values.get("layout"), dict | None)
        ):
            raise ValueError("a field of the manifest is missing or has another type")
        layout = values.pop("layout", None)
        try:
            return cls(**values, layout=None if layout is None else SiteLayout.from_json(layout))
        except ArtifactError as error:
            raise ValueError(str(error)) from error


def seal_file(path: Path) -> None:
    """Write the SHA-256 of a file into its seal. A file without an empty seal stays as it is."""
    with path.open("r+b") as file:
        if path.stat().st_size == 0:
            return
        with mapped(file) as data:
            start = _find_seal(data)
            if start is None or data[start : start + 64] != b"0" * 64:
                return
            digits = _digest_with_empty_seal(data, start)
        file.seek(start)
        file.write(digits)


def sealed(text: str) -> str:
    """Return the text of a file with the SHA-256 in its empty seal."""
    data = text.encode()
    start = _find_seal(data)
    assert start is not None, "to_sealed_json put one there"
    digits = _digest_with_empty_seal(data, start)
    return (data[:start] + digits + data[start + 64 :]).decode()


def sealed_json(manifest: Manifest, parts: Mapping[str, Any]) -> str:
    """Return the text of a JSON file of some parts with their manifest, sealed."""
    data = {"metadata": {"lorascope": manifest.to_sealed_json()}, **parts}
    return sealed(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def check_seal(path: Path) -> str | None:
    """Return how a sealed file was changed, or None when it is as it was written."""
    try:
        with path.open("rb") as file, mapped(file) as data:
            start = _find_seal(data)
            if start is None:
                return f"{path.name} has no seal: it is damaged, or an older lorascope made it"
            if data[start : start + 64] != _digest_with_empty_seal(data, start):
                return f"{path.name} has other bytes than its seal says: it was changed or damaged"
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        return f"{path.name} cannot be read ({error})"
    return None


def _find_seal(data: mmap | bytes) -> int | None:
    """Return where the digits of the seal begin: at the very end, or else the first ones."""
    last = max(len(data) - len(EMPTY_SEAL), 0)
    found = last if data[last:].startswith(SEAL) else data.find(SEAL)
    start = found + len(SEAL)
    return start if found >= 0 and start + 64 <= len(data) else None


def _digest_with_empty_seal(data: mmap | bytes, start: int) -> bytes:
    hasher = hashlib.sha256()
    with memoryview(data) as view, view[:start] as before, view[start + 64 :] as after:
        hasher.update(before)
        hasher.update(b"0" * 64)
        hasher.update(after)
    return hasher.hexdigest().encode()


def write_manifest(folder: Path, manifest: Manifest, files: Iterable[str]) -> None:
    """Write `manifest.json` with the size and the SHA-256 of `files`, sealed."""
    table = {name: _facts(folder / name) for name in files}
    values = replace(manifest, files=table).to_sealed_json()
    write_text(folder / MANIFEST, sealed(json.dumps(values, indent=1, allow_nan=False) + "\n"))


def _facts(path: Path) -> dict[str, Any]:
    """Return size and checksum of a file: of an object from its receipt, if it has one."""
    receipt = path.with_name(path.name + RECEIPT)
    has_receipt = isinstance(path, RemotePath) and receipt.exists()
    digest = receipt.read_text(encoding="ascii") if has_receipt else digest_file(path)
    return {"bytes": path.stat().st_size, "sha256": digest}


def check_files(path: Path) -> list[str]:
    """Return how the bytes of an artifact differ from what they were, a line each.

    Empty when all are as they were written. What they mean is not looked at.
    """
    if not path.is_dir():
        changed = check_seal(path)
        return [f"{changed}; make it again"] if changed else []
    changed = check_seal(path / MANIFEST)
    manifest = read_manifest(path)
    if changed or manifest is None:
        return [f"{changed or f'{MANIFEST} is no manifest of lorascope'}; make it again"]
    broken: list[str] = []
    folders: set[str] = set()
    for name, known in manifest.files.items():
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
    allowed = {MANIFEST, *manifest.files, *folders, *_HUB_FILES}
    found = {found.relative_to(path).as_posix() for found in path.rglob("*")}
    broken += [
        f"{name} is not in the manifest: it belongs to something else, remove it"
        for name in sorted(found - allowed)
    ]
    return broken


def read_manifest(path: Path) -> Manifest | None:
    """Return an artifact's manifest from its header, or None when lorascope did not make it.

    Raises ArtifactError when the path does not exist, or is a Git LFS pointer.
    """
    if not path.exists():
        raise ArtifactError(
            f"{path} does not exist; check the path, or run the stage that makes it"
        )
    try:
        return Manifest.from_json(_manifest_of(path))
    except _DAMAGED:
        require_content(path)
        return None


def require_content(path: Path, error_type: type[LorascopeError] = ArtifactError) -> None:
    """Raise `error_type` if a file, or one in a folder, is a Git LFS pointer to its content."""
    for file in path.iterdir() if path.is_dir() else [path]:
        if file.is_file() and file.stat().st_size < _LARGEST_POINTER:
            with file.open("rb") as stream:
                if stream.read(len(_LFS)) == _LFS:
                    raise error_type(
                        f"{file} is a Git LFS pointer, not the file itself; run git lfs pull in "
                        f"{file.parent}"
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
    if path.suffix in (".html", ".md"):
        with path.open("rb") as file:
            head = file.read(_LARGEST_MANIFEST)
        start = head.index(HTML_MARK) + len(HTML_MARK)
        return json.loads(head[start : head.index(b" -->", start)])
    return None


def open_manifest(path: Path, kind: str, schema: int, oldest: int = 1) -> Manifest:
    """Return the manifest of an artifact of `kind` with a schema from `oldest` to `schema`.

    Raises ArtifactError when the path is missing, or is something else.
    """
    manifest = read_manifest(path)
    if manifest is None or manifest.kind != kind:
        foreign = "was not made by lorascope, or is damaged"
        found = f"holds {manifest.kind}" if manifest else foreign
        raise ArtifactError(f"{path} {found}, expected {kind}")
    if manifest.schema > schema:
        raise ArtifactError(
            f"{path} has schema {manifest.schema} of {kind}, this version reads up to {schema}: "
            "install a newer lorascope"
        )
    if manifest.schema < oldest:
        raise ArtifactError(
            f"{path} has schema {manifest.schema} of {kind}, this version reads {oldest}: "
            "an older lorascope made it; make it again"
        )
    return manifest


def write_text(path: Path, text: str) -> None:
    """Write a whole file atomically: under another name, synced, then renamed."""
    writing = uploaded if isinstance(path, RemotePath) else replacing
    with writing(path) as sibling, sibling.open("w", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yield the name to write a file under; it is then synced and takes the name `path`.

    An object is then uploaded, and after it a receipt with its checksum: it need not be read again.
    """
    if isinstance(path, RemotePath):
        with uploaded(path) as local:
            yield local
            digest = digest_file(local)
        with uploaded(path.with_name(path.name + RECEIPT)) as local:
            local.write_text(digest, encoding="ascii")
        return
    sibling = path.with_name(path.name + ".tmp")
    with errors_of_the_system(path):
        yield sibling
    sync(sibling)
    sibling.replace(path)


@contextmanager
def errors_of_the_system(path: Path) -> Generator[None]:
    """Raise as an OSError what libraries in Rust raise as other types: a full disk, for example."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk.

    Some file systems cannot sync a folder (SMB, some of FUSE): there a power cut may undo the last
    rename, and nothing can be done about it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)
