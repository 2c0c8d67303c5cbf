"""The rows of several adapters of one base over the same tokens, as one store.

1. `find_members` finds the adapters and gives each a short name, in rising order: A, B, …, or the
   step of a checkpoint. Names of folders decide nothing, because they are a stranger's.
2. `generate` makes a store of each. `join` puts the stores side by side: a joint row has the
   columns of the first adapter, then those of the second, and so on.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorascope.activations.shards import VOCABULARY, write_shard
from lorascope.activations.store import KIND, SCHEMA, ActivationStore
from lorascope.artifact import Identity, Manifest, read_manifest, replacing
from lorascope.errors import AdapterError, ArtifactError, ConfigError
from lorascope.sites import SiteLayout
from lorascope.stage import Build, built, require_space
from lorascope.subject.adapter import CONFIG, Adapter, inspect_adapter
from lorascope.subject.base import Base, find_base

log = logging.getLogger(__name__)

_STATE = "trainer_state.json"
_LARGEST_STATE = 1 << 28  # bytes
_MOST = 26  # adapters with a letter


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of the adapters: its short name, what the user gave, and its files.

    `step` and `loss` are those of a checkpoint; the loss is the last that was logged up to there.
    """

    name: str
    given: str
    adapter: Adapter
    step: int | None = None
    loss: float | None = None


def find_members(
    adapters: tuple[str, ...], null: tuple[str, ...]
) -> tuple[list[Member], tuple[str, ...]]:
    """Return the adapters in order, and the names of those that are other seeds of the first.

    A single folder stands for the checkpoints in it. Raises ConfigError at fewer than two, and if
    two of the first and its seeds are the same.
    """
    if len(adapters) == 1 and null:
        raise ConfigError(
            f"{adapters[0]} is the only adapter before --null, which takes other seeds of the "
            "first; give two or more adapters, then --null"
        )
    if len(adapters) == 1:
        return _checkpoints(Path(adapters[0]).expanduser()), ()
    given = [*adapters, *null]
    if len(given) > _MOST:
        raise ConfigError(f"{len(given)} adapters are given, expected {_MOST} or fewer")
    members = [
        Member(name=chr(ord("A") + i), given=one, adapter=inspect_adapter(one))
        for i, one in enumerate(given)
    ]
    seeds = {members[0].adapter.digest: given[0]}
    for member in members[len(adapters) :]:
        if same := seeds.get(member.adapter.digest):
            raise ConfigError(
                f"--null {member.given} has the weights of {same}, expected another seed of the "
                f"training of {given[0]}; without one, drop it"
            )
        seeds[member.adapter.digest] = member.given
    return members, tuple(member.name for member in members[len(adapters) :])


def _checkpoints(folder: Path) -> list[Member]:
    """Return the checkpoints in a folder, by their steps."""
    steps = sorted(
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d{1,12})", path.name)) and path.is_dir()
    )
    steps = [(step, path) for step, path in steps if (path / CONFIG).is_file()]
    if len(steps) < 2:
        found = f"has {len(steps)} checkpoints (checkpoint-100, …)"
        if not folder.is_dir():
            found = "is not a folder on this machine"
        elif (folder / CONFIG).is_file():
            found = "is one adapter"
        raise ConfigError(
            f"{folder} {found}, expected two or more adapters, or one folder with two or more "
            "checkpoints"
        )
    width = len(str(steps[-1][0]))
    losses = _losses([folder, *(path for _, path in reversed(steps))])
    return [
        Member(
            name=f"{step:0{width}}",
            given=str(path),
            adapter=inspect_adapter(str(path)),
            step=step,
            loss=max(((at, loss) for at, loss in losses.items() if at <= step), default=(0, None))[
                1
            ],
        )
        for step, path in steps
    ]


def _losses(folders: list[Path]) -> dict[int, float]:
    """Return the loss by step from the first `trainer_state.json` that has any."""
    for folder in folders:
        path = folder / _STATE
        if not path.is_file() or path.stat().st_size > _LARGEST_STATE:
            continue
        try:
            history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            pairs = [(one["step"], one["loss"]) for one in history if "loss" in one]
        except (ValueError, LookupError, TypeError) as error:
            log.warning("%s has no losses that can be read (%s)", path, type(error).__name__)
            continue
        numbers = {
            step: float(loss)
            for step, loss in pairs
            if type(step) is int and isinstance(loss, int | float) and math.isfinite(loss)
        }
        if numbers:
            return numbers
    return {}


def find_shared_base(
    members: list[Member], base_model: str | None, base_revision: str | None
) -> Base:
    """Return the base of all members. Raises AdapterError if they have several."""
    first, *others = (
        (member, find_base(member.adapter, base_model, base_revision)) for member in members
    )
    for member, base in others:
        if base.digest != first[1].digest:
            raise AdapterError(
                f"{first[0].given} is an adapter of {first[1].name}, {member.given} of "
                f"{base.name}, or of other weights of it: compare takes adapters of one base; if "
                "these are the same weights, name them with --base-model"
            )
    return first[1]


def join(stores: Mapping[str, ActivationStore], out: Path, *, overwrite: bool) -> Path:
    """Make the store of joint rows, and return its folder.

    Raises ArtifactError if the stores have other tokens.
    """
    manifests = {name: _manifest(store) for name, store in stores.items()}
    (first, own), *others = manifests.items()
    for name, manifest in others:
        if manifest.parents["dataset"] != own.parents["dataset"]:
            raise ArtifactError(
                f"{stores[name].path} and {stores[first].path} have other tokens: the adapters' "
                "tokenizers or chat templates differ; compare takes adapters that read the same"
            )
    layout = SiteLayout.joint({name: store.layout for name, store in stores.items()})
    identity = Identity(
        kind=KIND,
        schema=SCHEMA,
        settings={**own.settings, "joint": list(stores)},
        parents={
            **{key: own.parents[key] for key in ("base_weights", "dataset")},
            **{f"rows {name}": store.digest for name, store in stores.items()},
        },
    )

    def make(build: Build) -> None:
        store = stores[first]
        row = sum(one.d_in * one.dtype.itemsize for one in stores.values()) + 9
        require_space(out.parent, int(1.05 * row * store.n_rows) + (1 << 24))
        for number, shard in enumerate(store.shards):
            path = build.path / shard.path.name
            if path.exists():
                continue
            begin, end = store.first_row[number : number + 2].tolist()
            rows = np.concatenate([one.rows(begin, end) for one in stores.values()], axis=1)
            with replacing(path) as temporary:
                write_shard(
                    temporary,
                    rows,
                    shard.read("token_ids"),
                    shard.read("role"),
                    np.diff(shard.rollout_start).tolist(),
                    shard.rollout_id.tolist(),
                )
        for name in ("tokenizer", VOCABULARY):
            source, copy = store.path / name, build.path / name
            if source.is_dir():
                shutil.copytree(source, copy, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, copy)
        files = [*build.path.glob("*.h5"), *(build.path / "tokenizer").rglob("*")]
        names = [file.relative_to(build.path).as_posix() for file in files if file.is_file()]
        content = _content(manifests, layout)
        build.publish_directory(identity.manifest(layout, content), names)

    return built(out, identity, make, overwrite=overwrite)


def _manifest(store: ActivationStore) -> Manifest:
    manifest = read_manifest(store.path)
    assert manifest is not None, "generate has made it"
    return manifest


def _content(manifests: Mapping[str, Manifest], layout: SiteLayout) -> dict[str, Any]:
    """Return what the joint store's manifest says: as the first store's, and of all where it adds.

    Names of adapters are those of their folders.
    """
    contents = {name: manifest.content for name, manifest in manifests.items()}
    first = next(iter(contents.values()))
    return {
        **first,
        "d_in": layout.d_in,
        "adapter_types": list(layout.adapter_types),
        "adapter_name": ", ".join(
            f"{name}: {one['adapter_name']}" for name, one in contents.items()
        ),
        **{
            key: [f"{name}:{part}" for name, one in contents.items() for part in one[key]]
            for key in ("unhooked", "unseen")
        },
    }
