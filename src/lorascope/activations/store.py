"""The activation store: one row of `A·x` per token, with the token's id, role and rollout.

A store is a folder. `manifest.json` lists its files with sizes and checksums. Each
`shard-00000.h5` holds contiguous `activations (n_rows, d_in)`, which any process, forked or
spawned, reads through a memory map. `vocabulary.h5` holds the bytes of every token, and
`tokenizer/` the tokenizer's files, so that later stages need neither a model nor a hub.
`docs/formats.md` lists the guarantees.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from lorascope.activations.published import open_published
from lorascope.activations.shards import VOCABULARY, Rows, Shard, Vocabulary, open_shard
from lorascope.artifact import MANIFEST, open_manifest
from lorascope.errors import ArtifactError
from lorascope.remote import RemotePath, as_path
from lorascope.sites import PROJECTIONS, SiteLayout, join_initials
from lorascope.texts.roles import ROLES, SPECIAL

KIND = "activations"
SCHEMA = 2
_SHARD = re.compile(r"shard-\d+\.h5")
_OPENED_TOGETHER = 16  # shards on an object store, each with a wait
_Rows = npt.NDArray[np.int64]  # row numbers


@dataclass(frozen=True)
class ActivationStore:
    """Rows of one adapter over one corpus, addressed by row number.

    `columns` is None for all columns in order, or holds the columns of a selection.
    """

    path: Path
    layout: SiteLayout
    digest: str
    content: Mapping[str, Any]
    shards: tuple[Shard, ...] = field(repr=False)
    vocabulary: Vocabulary = field(repr=False)
    columns: npt.NDArray[np.int64] | None = None

    @classmethod
    def open(cls, path: Path | str) -> "ActivationStore":
        """Open a store of lorascope or of the published scripts, reading no activations.

        Raises ArtifactError if the folder is missing, is not a store, or lacks a shard.
        """
        path = as_path(path)
        if not path.exists():
            raise ArtifactError(
                f"activation store {path} does not exist; make it with lorascope generate"
            )
        if not (path / MANIFEST).exists() and path.is_dir():
            if isinstance(path, RemotePath):
                raise ArtifactError(
                    f"{path} has no {MANIFEST}: it is not a finished store; complete it with "
                    "lorascope generate, or copy a folder of the published scripts to a disk"
                )
            return cls(path, **open_published(path))
        manifest = open_manifest(path, KIND, SCHEMA, oldest=SCHEMA)
        layout = manifest.columns
        shards = sorted(item for item in manifest.files.items() if _SHARD.fullmatch(item[0]))

        def opened(item: tuple[str, Mapping[str, Any]]) -> Shard:
            return open_shard(path / item[0], item[1], layout.d_in)

        if isinstance(path, RemotePath):
            with ThreadPoolExecutor(_OPENED_TOGETHER) as pool:
                found = tuple(pool.map(opened, shards))
        else:
            found = tuple(map(opened, shards))
        return cls(
            path=path,
            layout=layout,
            digest=manifest.digest,
            content=manifest.content,
            shards=found,
            vocabulary=Vocabulary.load(path / VOCABULARY),
        )

    @cached_property
    def first_row(self) -> npt.NDArray[np.int64]:
        """Row at which each shard begins, and the number of rows: `(n_shards + 1,)`."""
        return np.concatenate([[0], np.cumsum([s.n_rows for s in self.shards])]).astype(np.int64)

    @property
    def n_rows(self) -> int:
        """Number of tokens, special ones included."""
        return int(self.first_row[-1])

    @property
    def d_in(self) -> int:
        """Number of columns."""
        return self.layout.d_in

    @property
    def n_rollouts(self) -> int:
        """Number of rollouts."""
        return len(self.rollout_id)

    @cached_property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """Token ids, `(n_rows,)`."""
        return self.token_ids_of(0, self.n_rows)

    @cached_property
    def roles(self) -> npt.NDArray[np.uint8]:
        """Index into `ROLES` of each token, `(n_rows,)`; see `roles_of`."""
        return self.roles_of(0, self.n_rows)

    @cached_property
    def rollout_id(self) -> npt.NDArray[np.int64]:
        """Number of each rollout in its dataset, `(n_rollouts,)`, in row order."""
        return _joined([s.rollout_id for s in self.shards], np.int64)

    @cached_property
    def rollout_start(self) -> npt.NDArray[np.int64]:
        """First row of each rollout, and the number of rows: `(n_rollouts + 1,)`."""
        starts = [
            s.rollout_start[:-1] + r for s, r in zip(self.shards, self.first_row, strict=False)
        ]
        return np.concatenate([*starts, [self.n_rows]]).astype(np.int64)

    def rollout_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the index (not the id) of the rollout that holds each row."""
        return np.searchsorted(self.rollout_start, rows, side="right") - 1

    @cached_property
    def eligible(self) -> npt.NDArray[np.bool_]:
        """Rows of text, `(n_rows,)`: all except special tokens and template headers."""
        return self.roles != SPECIAL

    def token_ids_of(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Return the token ids of rows `[start, stop)`, without reading the others."""
        return np.array(self._between("token_ids", start, stop, np.int32))

    def roles_of(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return the roles of rows `[start, stop)`, without reading the others.

        A token with a special id has the role `special`, whatever is stored. Raises ArtifactError
        for a token that is not in the vocabulary.
        """
        ids = self.token_ids_of(start, stop)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.vocabulary):
            raise ArtifactError(
                f"{self.path} has token ids that are not in its vocabulary; see lorascope verify"
            )
        roles = self._between("role", start, stop, np.uint8)
        return np.where(self.vocabulary.special[ids], np.uint8(SPECIAL), roles)

    def _between(self, name: str, start: int, stop: int, dtype: Any) -> npt.NDArray[Any]:
        """Return rows `[start, stop)` of an array of the shards, a view if one shard has them."""
        first = int(np.searchsorted(self.first_row, start, side="right")) - 1
        last = max(int(np.searchsorted(self.first_row, stop)), first + 1)
        pairs = zip(self.shards[first:last], self.first_row[first:last].tolist(), strict=True)
        return _joined(
            [s.read(name)[max(start - begin, 0) : stop - begin] for s, begin in pairs], dtype
        )

    def select(self, adapter_types: Sequence[str]) -> "ActivationStore":
        """Return the same store with the columns of the named projections only."""
        layout, columns = self.layout.select(adapter_types)
        if layout == self.layout:
            return self
        return replace(self, layout=layout, columns=columns)

    def rows(self, start: SupportsIndex, stop: SupportsIndex) -> Rows:
        """Return rows `[start, stop)`, `(stop - start, d_in)`, in the stored dtype."""
        values = self._between("activations", int(start), int(stop), self.dtype)
        return values if self.columns is None else values[:, self.columns]

    def take(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Return the given rows, in the given order, `(len(rows), d_in)`, in the stored dtype."""
        if isinstance(self.path, RemotePath):
            rising, inverse = np.unique(rows, return_inverse=True)
            values = np.empty((len(rising), self.d_in), self.dtype)
            self.read_into(values, rising)
            return values[inverse]
        out = np.empty((len(rows), self.d_in), self.dtype)
        for shard, here, local in self._by_shard(rows):
            values = shard.read("activations")
            if self.columns is None and here[-1] - here[0] + 1 == len(here):
                into = out[here[0] : here[-1] + 1]
                np.take(values, local, axis=0, out=into, mode="clip")  # raise would buffer
            else:
                taken = np.take(values, local, axis=0)
                out[here] = taken if self.columns is None else taken[:, self.columns]
        return out

    def read_into(self, out: Rows, rows: npt.NDArray[np.int64]) -> None:
        """Copy rows, given in rising order, to contiguous `out (len(rows), d_in)`.

        `take` maps files, which is the faster way to rows that are in memory. This reads them: no
        other rows come from the disk, and none count as memory of the process.
        """
        for shard, here, local in self._by_shard(rows):
            into = out[here[0] : here[-1] + 1]
            if self.columns is None:
                shard.read_rows(local, into)
            else:
                d_stored = shard.read("activations").shape[1]
                stored = np.empty((len(local), d_stored), self.dtype)
                shard.read_rows(local, stored)
                into[:] = stored[:, self.columns]

    def take_token_ids(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return the token ids of the given rows, in the given order, `(len(rows),)`."""
        out = np.empty(len(rows), np.int32)
        for shard, here, local in self._by_shard(rows):
            out[here] = shard.read("token_ids")[local]
        return out

    def _by_shard(self, rows: _Rows) -> Iterator[tuple[Shard, _Rows, _Rows]]:
        """Yield the shards that hold rows, which of the rows, and their numbers in the shard."""
        shard_of = np.searchsorted(self.first_row, rows, side="right") - 1
        for index in np.unique(shard_of):
            here = np.flatnonzero(shard_of == index)
            yield self.shards[index], here, rows[here] - self.first_row[index]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the stored activations."""
        return self.shards[0].read("activations").dtype if self.shards else np.dtype(np.float16)

    def blocks(self, size: int) -> Iterator[tuple[int, Rows]]:
        """Yield `(first row, rows)` over the whole store, `size` rows at a time."""
        for start in range(0, self.n_rows, size):
            yield start, self.rows(start, min(start + size, self.n_rows))


def default_name(adapter_types: tuple[str, ...]) -> str:
    """Return the published folder name of a store with these projections."""
    if set(adapter_types) == set(PROJECTIONS):
        return "activations_all_adapters"
    if adapter_types == PROJECTIONS[:3]:
        return "activations"
    return f"activations_{join_initials(adapter_types)}"


def check_contents(path: Path) -> list[str]:
    """Return what is wrong with the values in a store of lorascope, one line each."""
    store = ActivationStore.open(path)
    broken: list[str] = []
    for shard in store.shards:
        ids, roles = shard.read("token_ids"), shard.read("role")
        bad = ~np.isfinite(shard.read("activations")).all(axis=1)
        if bad.any():
            broken.append(f"{shard.path.name}: row {int(np.flatnonzero(bad)[0])} is not finite")
        if ((ids < 0) | (ids >= len(store.vocabulary))).any():
            broken.append(f"{shard.path.name}: a token id is not in the vocabulary")
        if (roles >= len(ROLES)).any():
            broken.append(f"{shard.path.name}: a role is none of {', '.join(ROLES)}")
    return broken


def _joined(parts: list[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    """Return arrays in one, without a copy if there is only one."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
