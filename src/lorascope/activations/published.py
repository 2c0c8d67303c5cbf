"""Read the folders that the published scripts write, as an activation store.

`rollout_<i>.h5` holds `activations (n_tokens, n_layers, n_adapters)`, gzipped, with the attributes
`num_tokens num_layers projections rollout_idx adapter_types`; `rollout_tokens.json` maps the
rollout's number to its token strings. `adapter_types` names the columns. Without this attribute,
three projections are gate, up, down, and seven are all of them. The files contain neither the
adapter, nor token ids, nor roles: token strings are numbered here, and special tokens are
recognised by their `<|...|>` form.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.activations.shards import Rows, Shard, Vocabulary
from lorascope.artifact import digest_file, digest_in_part, digest_of
from lorascope.errors import ArtifactError
from lorascope.sites import PROJECTIONS, Site, SiteLayout
from lorascope.texts.roles import ROLES

TOKENS = "rollout_tokens.json"
_FILE = re.compile(r"rollout_(\d+)\.h5")
_PROBE = Path(__file__).with_name("probe.py")
_MOST_COLUMNS = 1 << 20
_SPECIAL = re.compile(r"<\|[^|<>]*\|>|<(?:s|/s|pad|unk|bos|eos)>")


def open_published(path: Path) -> dict[str, Any]:
    """Return the fields of a store for a folder of `rollout_<i>.h5`, by the rollouts' numbers.

    Raises ArtifactError if the folder has no such file, or if the files contradict each other or
    `rollout_tokens.json`.
    """
    files = {
        int(match.group(1)): file
        for file in path.iterdir()
        if (match := _FILE.fullmatch(file.name))
    }
    numbers = sorted(files)
    if not files:
        raise ArtifactError(
            f"{path} is not an activation store: it has neither manifest.json nor "
            "rollout_<i>.h5 files"
        )
    stats = ((files[number], files[number].stat()) for number in numbers)
    headers = _probe(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats))
    _, n_layers, types = headers[0]
    for number, (_, n_other, others) in zip(numbers, headers, strict=True):
        if (n_other, others) != (n_layers, types):
            raise ArtifactError(
                f"{files[number]} has {n_other} layers of {', '.join(others)}, "
                f"{files[numbers[0]].name} has {n_layers} of {', '.join(types)}: they come from "
                "different captures"
            )
    layout = SiteLayout.from_sites(
        [Site(layer=i, projection=t) for i in range(n_layers) for t in types]
    )
    order = tuple(types.index(name) for name in layout.adapter_types)
    lengths = {number: n for number, (n, _, _) in zip(numbers, headers, strict=True)}
    texts = _read_tokens(path / TOKENS, lengths)
    known = sorted({text for tokens in texts.values() for text in tokens})
    ids = {text: i for i, text in enumerate(known)}
    special = np.array([_SPECIAL.fullmatch(text) is not None for text in known], bool)

    def shard(number: int) -> Shard:
        token_ids = np.array([ids[text] for text in texts[number]], np.int32)
        n = len(token_ids)
        return _RolloutFile(
            path=files[number],
            n_rows=n,
            rollout_start=np.array([0, n], np.int64),
            rollout_id=np.array([number]),
            order=order,
            shape=(n, n_layers, len(types)),
            token_ids=token_ids,
        )

    digests = [[files[number].name, digest_in_part(files[number])] for number in numbers]
    return {
        "layout": layout,
        "digest": digest_of([digest_file(path / TOKENS), *digests]),
        "content": {"published": True, "n_rollouts": len(files)},
        "shards": tuple(map(shard, numbers)),
        "vocabulary": Vocabulary.from_tokens(
            [t.encode("utf-8", "surrogatepass") for t in known], special
        ),
    }


@dataclass(frozen=True)
class _RolloutFile(Shard):
    """One file as a shard; its arrays are read when they are asked for."""

    order: tuple[int, ...]
    shape: tuple[int, int, int]
    token_ids: npt.NDArray[np.int32]

    def read(self, name: str) -> npt.NDArray[Any]:
        if name == "activations":
            return _read_rows(self.path, self.order, self.shape)
        if name == "token_ids":
            return self.token_ids
        return np.full(len(self.token_ids), ROLES.index("text"), np.uint8)

    def read_rows(self, rows: npt.NDArray[np.int64], out: Rows) -> None:
        out[:] = self.read("activations")[rows]


@lru_cache(maxsize=64)
def _read_rows(path: Path, order: tuple[int, ...], shape: tuple[int, int, int]) -> Rows:
    """Return the rows of one file, `(n_tokens, n_layers * n_adapters)`, if it still has `shape`."""
    import h5py

    with h5py.File(path, "r", locking=False) as file:
        data = file["activations"]
        values = data[()] if isinstance(data, h5py.Dataset) else np.zeros(0)
    if values.shape != shape:
        raise ArtifactError(f"{path} changed while it was read; run the command again")
    return values[:, :, list(order)].reshape(len(values), -1)


@lru_cache(maxsize=8)
def _probe(files: tuple[tuple[Path, int, int], ...]) -> list[tuple[int, int, list[str]]]:
    """Return what a child process finds in each file: see `_header`.

    `files` are paths with size and modification time, so that changed files are read again.
    Raises ArtifactError if the process dies.
    """
    paths = [path for path, _, _ in files]
    done = subprocess.run(
        [sys.executable, "-P", str(_PROBE)],
        input=json.dumps(list(map(str, paths))).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    lines = done.stdout.decode().splitlines()
    if done.returncode != 0 or len(lines) != len(paths):
        raise ArtifactError(
            f"{paths[min(len(lines), len(paths) - 1)]} is damaged: it crashes the HDF5 library "
            f"(exit code {done.returncode}); remove it from the folder, or capture it again"
        )
    return [_header(path, json.loads(line)) for path, line in zip(paths, lines, strict=True)]


def _header(file: Path, facts: dict[str, Any]) -> tuple[int, int, list[str]]:
    """Return the number of tokens, the number of layers and the adapter types of a file."""
    if "error" in facts:
        raise ArtifactError(f"{file} is damaged or not a published capture ({facts['error']})")
    n_tokens, n_layers, n_types = facts["shape"]
    types: list[str] | None = facts["adapter_types"]
    if types is None:
        types = list(PROJECTIONS[:n_types]) if n_types in (3, len(PROJECTIONS)) else []
    if len(types) != n_types or len(set(types)) != n_types:
        raise ArtifactError(
            f"{file} has {n_types} projections per layer, but names {len(types)} adapter types"
        )
    if n_layers * n_types > _MOST_COLUMNS:
        raise ArtifactError(f"{file} has {n_layers} layers, more than any model has; it is damaged")
    return n_tokens, n_layers, types


def _read_tokens(path: Path, lengths: dict[int, int]) -> dict[int, list[str]]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}; it belongs to the capture") from error
    texts: dict[int, list[str]] = {}
    for number, length in lengths.items():
        tokens = data.get(str(number)) if isinstance(data, dict) else None
        if not isinstance(tokens, list) or len(tokens) != length:
            count = f"{len(tokens)} tokens" if isinstance(tokens, list) else "nothing"
            raise ArtifactError(f"{path} has {count} for rollout {number}, the capture {length}")
        texts[number] = [str(token) for token in tokens]
    return texts
