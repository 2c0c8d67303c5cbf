"""Paths on an object store: `s3://bucket/folder`, or any other URL that fsspec opens.

A `RemotePath` is used like any `Path` where lorascope reads a store or writes one. The package for
its scheme (`s3fs` for s3) is installed by the user, and finds keys where it always does. Nothing
is opened at a URL that the user did not give.
"""

import io
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lorascope.errors import ArtifactError, ConfigError, first_line

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])", re.IGNORECASE)
_LIKE_A_URL = re.compile(r"[^/]+://")
_BUFFER = 8 << 20  # bytes of a file that is read in order


def as_path(name: Path | str) -> Path:
    """Return a path, which is a `RemotePath` for a URL. `Path` merges slashes, so one is enough.

    Raises ConfigError for what would be a folder with the name of a URL, such as `s3://`.
    """
    found = _URL.match(str(name))
    if found is None:
        if _LIKE_A_URL.match(str(name)):
            raise ConfigError(
                f"{name} is no URL of a folder, expected one such as s3://bucket/store"
            )
        return Path(name)
    if found[1].lower() == "file":
        return Path("/", str(name)[found.end() :])
    return RemotePath(str(name))


class RemotePath(type(Path())):
    """A file or a folder on an object store. Every other use than those below is refused."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def __fspath__(self) -> str:
        raise ConfigError(
            f"{self} is a URL, expected a local path: URLs are for activation stores, the rows "
            "that generate writes"
        )

    @property
    def files(self) -> Any:
        """The file system of fsspec."""
        import fsspec

        scheme = self.parts[0].removesuffix(":")
        try:
            return fsspec.filesystem(scheme, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot open {self}: {error}") from error

    def exists(self, **_: Any) -> bool:
        """Say whether there is an object of this name, or one in a folder of this name."""
        with self._errors():
            return self.files.exists(str(self))

    def is_file(self, **_: Any) -> bool:
        """Say whether there is an object of this name."""
        with self._errors():
            return self.files.isfile(str(self))

    def is_dir(self, **_: Any) -> bool:
        """Say whether there is an object in a folder of this name."""
        with self._errors():
            return self.files.isdir(str(self))

    def is_symlink(self) -> bool:
        """Say no: object stores have no links."""
        return False

    def stat(self, **_: Any) -> Any:
        """Return `st_size` in bytes and `st_mtime` in seconds."""
        with self._errors():
            facts = self.files.info(str(self))
        times = [fact.timestamp() for fact in facts.values() if isinstance(fact, datetime)]
        return SimpleNamespace(st_size=facts["size"], st_mtime=max(times, default=0.0))

    def open(  # type: ignore[override]
        self, mode: str = "r", buffering: int = -1, encoding: str | None = None, **_: Any
    ) -> Any:
        """Open an object to read it in order. `replacing` is the way to write one."""
        if "r" not in mode or "+" in mode:
            raise ConfigError(f"{self} cannot be changed in place")
        size = buffering if buffering > 0 else _BUFFER
        with self._errors():
            file = io.BufferedReader(self.files.open(str(self), "rb", block_size=size), size)
        return file if "b" in mode else io.TextIOWrapper(file, encoding)

    def iterdir(self) -> Generator["RemotePath"]:
        """Yield what is in the folder."""
        with self._errors():
            return self._named(self.files.ls(str(self), detail=False))

    def glob(self, pattern: str, **_: Any) -> Iterator["RemotePath"]:  # type: ignore[override]
        """Yield what matches a pattern in the folder."""
        with self._errors():
            return self._named(self.files.glob(f"{self}/{pattern}"))

    def rglob(self, pattern: str, **_: Any) -> Iterator["RemotePath"]:  # type: ignore[override]
        """Yield every object below the folder that matches."""
        with self._errors():
            found = self._named(self.files.find(str(self)))
            return (path for path in found if path.match(pattern))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        with self._errors():
            if not missing_ok or self.files.exists(str(self)):
                self.files.rm_file(str(self))

    def put(self, file: Path) -> None:
        """Copy a local file there. It appears whole, or not at all."""
        with self._errors("write", may_be_missing=False):
            self.files.put_file(str(file), str(self))

    def ranges(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return bytes `[start, stop)` of the object for every span, read at the same time."""
        wanted = [(start, stop) for start, stop in spans if start < stop]
        with self._errors(may_be_missing=False):
            found = self.files.cat_ranges(
                [str(self)] * len(wanted),
                [start for start, _ in wanted],
                [stop for _, stop in wanted],
                on_error="raise",
            )
        parts = iter(found)
        read = [next(parts) if start < stop else b"" for start, stop in spans]
        if [len(part) for part in read] != [stop - start for start, stop in spans]:
            raise ArtifactError(f"{self} is damaged: it ends before its last row")
        return read

    def _named(self, names: Iterable[str]) -> Generator["RemotePath"]:
        """Return paths from the names of fsspec, which have no scheme."""
        return (RemotePath(f"{self.parts[0]}//{name.lstrip('/')}") for name in sorted(names))

    @contextmanager
    def _errors(self, verb: str = "read", *, may_be_missing: bool = True) -> Generator[None]:
        """Raise what the packages raise as one line, and what may be missing as it is."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:  # botocore's and aiohttp's are no OSErrors
            if may_be_missing and isinstance(error, FileNotFoundError):
                raise
            found = f"{type(error).__name__}: {first_line(error)}"
            raise ArtifactError(
                f"cannot {verb} {self}: {found}; check the URL, the keys and the network"
            ) from error


@contextmanager
def uploaded(path: Path) -> Generator[Path]:
    """Yield a local name to write a file or folder under, which is then copied to a `RemotePath`.

    For a local path, yield the path itself.
    """
    if not isinstance(path, RemotePath):
        yield path
        return
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="lorascope-") as folder:
        local = Path(folder, path.name)
        yield local
        for file in local.rglob("*") if local.is_dir() else [local]:
            if file.is_file():
                (path / file.relative_to(local)).put(file)
