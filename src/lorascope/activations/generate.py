"""Run the adapted model over texts and keep what every adapted module reads of every token.

1. Records are rendered and tokenised once; unusable ones are counted and left out.
2. Rollouts are cut into units of `ROLLOUTS_PER_SHARD`, fixed by their order alone.
3. Inside a unit rollouts are sorted by length and run in right-padded batches of at most
   `batch_tokens` places, without the lm_head; rows go back into the rollouts' order.
4. Each unit becomes one shard, written beside its name and renamed; a re-run skips finished ones.
5. The manifest, written last, lists the shards with their checksums.

In: adapter, base model, dataset. Out: an activation store (a folder).
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorascope import runtime
from lorascope.activations.store import KIND, SCHEMA, VOCABULARY, Rows, Vocabulary, write_shard
from lorascope.artifact import (
    building,
    digest_file,
    is_made,
    make_manifest,
    replacing,
    require_space,
    write_text,
)
from lorascope.config import Config, option
from lorascope.errors import DatasetError, NumberError
from lorascope.sites import PROJECTIONS, SiteLayout, initials_of, parse_adapter_types
from lorascope.subject.rollouts import (
    ROLES,
    Rollout,
    form_of,
    read_records,
    render,
    special_ids,
    token_bytes,
    tokenize,
)

if TYPE_CHECKING:
    from lorascope.subject.hooks import RowReader

log = logging.getLogger(__name__)

ROLLOUTS_PER_SHARD = 64


@dataclass(frozen=True, kw_only=True)
class SubjectOptions(Config):
    """Options that say which model is studied on which texts."""

    lora_path: str | None = option(
        None, help="adapter: a folder or a hub id", identity=False, path=True
    )
    base_model: str | None = option(
        None,
        help="base model: a folder or a hub id; default: the one that the adapter names",
        identity=False,
        path=True,
    )
    dataset: str = option(
        "simplescaling/s1K-1.1",
        help="texts: a .json, .jsonl, .parquet or .txt file, or a hub id",
        identity=False,
        path=True,
    )
    split: str = option("train", help="split of a hub data set", identity=False)
    num_examples: int | None = option(
        1000, help="records to take from the start of the dataset", identity=False
    )
    template: Literal["auto", "s1", "chat", "text"] = option(
        "auto", help="how a record becomes a text; auto goes by its fields"
    )
    max_length: int | None = option(
        None, help="longest text in tokens, the rest is cut; default: the model's context"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="type in which the model computes; auto: float32 on the CPU"
    )
    batch_tokens: int = option(
        4096, help="places in one batch, padding included; changes rows by rounding only"
    )
    num_gpus: int | None = option(None, help="GPUs to use; default: what is there", identity=False)

    def check(self) -> None:
        """Refuse impossible numbers."""
        super().check()
        self.require("num_examples", 1)
        self.require("max_length", 2, unit=" tokens")
        self.require("batch_tokens", 1)
        self.require("num_gpus", 0)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SubjectOptions):
    """Options of `generate`."""

    adapter_types: tuple[str, ...] = option(
        (), help="projections to keep: names, initials, mlp, attention or all"
    )
    store_dtype: Literal["float16", "float32"] = option(
        "float16", help="type in which activations are stored; what does not fit is an error"
    )
    output_dir: Path | None = option(
        None, help="folder to make; default: activations_all_adapters and such", identity=False
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace an output of other settings", identity=False)


def default_name(adapter_types: tuple[str, ...]) -> str:
    """Return the published folder name of a store with these projections."""
    if set(adapter_types) == set(PROJECTIONS):
        return "activations_all_adapters"
    if adapter_types == PROJECTIONS[:3]:
        return "activations"
    return f"activations_{initials_of(adapter_types)}"


def run(config: GenerateConfig) -> Path:
    """Make an activation store, or find the finished one, and return its folder."""
    from lorascope.subject.load import (
        find_base,
        inspect_adapter,
        load_subject,
        load_tokenizer,
    )

    adapter = inspect_adapter(config.lora_path)
    base = find_base(adapter, config.base_model)
    wanted = parse_adapter_types(config.adapter_types)
    targets = _target_types(adapter.shapes)
    types = wanted or targets
    out = config.output_dir or Path(default_name(types))
    tokenizer = load_tokenizer(adapter, base)
    rollouts, counts = load_rollouts(config, tokenizer)
    settings = config.settings()
    parents = {
        "adapter": adapter.digest,
        "base_model": base.digest,
        "dataset": _digest_rollouts(rollouts),
    }
    if is_made(out, KIND, settings=settings, parents=parents, overwrite=config.overwrite):
        log.info("%s is already made with these settings", out)
        return out
    device = runtime.pick_device(config.device, config.num_gpus)
    subject = load_subject(adapter, base, tokenizer, device, config.dtype)
    layout, columns = subject.layout.select(types)
    rollouts, n_cut = _cut(rollouts, config.max_length or subject.max_length)
    n_rows = sum(len(rollout.token_ids) for rollout in rollouts)
    item = np.dtype(config.store_dtype).itemsize
    require_space(out.parent, int(n_rows * (layout.d_in * item + 9) * 1.05) + (1 << 24))
    log.info(
        "%d rollouts, %d tokens, %d columns (%s) of %s on %s in %s",
        len(rollouts),
        n_rows,
        layout.d_in,
        layout.initials,
        adapter.name,
        device,
        str(subject.dtype).removeprefix("torch."),
    )
    with building(
        out, KIND, settings=settings, parents=parents, overwrite=config.overwrite
    ) as build:
        from lorascope.subject.hooks import RowReader

        vocabulary = _vocabulary(tokenizer, rollouts)
        with RowReader(subject) as reader, runtime.progress(n_rows, "generate", "tokens") as bar:
            checked = False
            for first in range(0, len(rollouts), ROLLOUTS_PER_SHARD):
                unit = rollouts[first : first + ROLLOUTS_PER_SHARD]
                shard = build.path / f"shard-{first // ROLLOUTS_PER_SHARD:05d}.h5"
                if not shard.exists():
                    if not checked:
                        _require_repeatable(reader, unit[0])
                        checked = True
                    rows = _read_unit(reader, unit, config, columns, layout)
                    _write(shard, rows, unit)
                bar.update(sum(len(rollout.token_ids) for rollout in unit))
        vocabulary.save(build.path / VOCABULARY)
        _save_tokenizer(tokenizer, build.path / "tokenizer")
        content = {
            "n_rows": n_rows,
            "n_rollouts": len(rollouts),
            "d_in": layout.d_in,
            "adapter_types": list(layout.adapter_types),
            "roles": list(ROLES),
            "store_dtype": config.store_dtype,
            "compute_dtype": str(subject.dtype).removeprefix("torch."),
            "adapter_name": adapter.name,
            "base_model": base.name,
            "dataset": Path(config.dataset).name
            if Path(config.dataset).exists()
            else config.dataset,
            "rollouts_per_shard": ROLLOUTS_PER_SHARD,
            "dropped": {**counts, "cut_to_length": n_cut},
        }
        manifest = make_manifest(
            KIND,
            SCHEMA,
            settings=settings,
            parents=parents,
            layout=layout.to_json(),
            content=content,
            files=_files_of(build.path),
        )
        build.publish_directory(manifest)
    return out


def load_rollouts(config: SubjectOptions, tokenizer: Any) -> tuple[list[Rollout], dict[str, int]]:
    """Return the usable rollouts of a dataset in its order, and how many were left out, and why.

    Raises DatasetError when none is usable.
    """
    records = read_records(config.dataset, config.split, config.num_examples)
    rollouts: list[Rollout] = []
    counts = {"empty": 0}
    template = config.template
    if template == "auto":
        template = form_of(records[0][1], f"record {records[0][0]} of {config.dataset}")
    with runtime.progress(len(records), "tokenize", "texts") as bar:
        for number, record in records:
            where = f"record {number} of {config.dataset}"
            text, spans = render(record, template, tokenizer, where)
            bar.update(1)
            if not text.strip():
                counts["empty"] += 1
                continue
            token_ids, roles = tokenize(text, spans, tokenizer)
            rollouts.append(Rollout(number, token_ids, roles))
    if counts["empty"]:
        log.warning("left out %d empty of %d records", counts["empty"], len(records))
    if not rollouts:
        raise DatasetError(f"dataset {config.dataset}: all {len(records)} records are empty")
    return rollouts, counts


def _target_types(shapes: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return the projections that an adapter's file holds, in column order."""
    names = [name.split(".lora_A", 1)[0].rsplit(".", 1)[-1] for name in shapes if ".lora_A" in name]
    return parse_adapter_types(sorted(set(names)))


def _cut(rollouts: list[Rollout], longest: int | None) -> tuple[list[Rollout], int]:
    if longest is None:
        return rollouts, 0
    cut = [Rollout(r.id, r.token_ids[:longest], r.roles[:longest]) for r in rollouts]
    n_cut = sum(len(rollout.token_ids) > longest for rollout in rollouts)
    if n_cut:
        log.warning("cut %d of %d rollouts to %d tokens", n_cut, len(rollouts), longest)
    return cut, n_cut


def _batches(unit: list[Rollout], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices of rollouts, longest first, that fit `batch_tokens` places when padded."""
    order = sorted(range(len(unit)), key=lambda i: (-len(unit[i].token_ids), i))
    while order:
        size = max(1, batch_tokens // len(unit[order[0]].token_ids))
        yield order[:size]
        order = order[size:]


def _read_batch(reader: "RowReader", rollouts: list[Rollout]) -> list[Rows]:
    """Run rollouts as one right-padded batch and return each one's rows in float32."""
    import torch

    lengths = [len(rollout.token_ids) for rollout in rollouts]
    ids = torch.zeros(len(rollouts), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, rollout in enumerate(rollouts):
        ids[i, : lengths[i]] = torch.from_numpy(rollout.token_ids.astype(np.int64))
        mask[i, : lengths[i]] = 1
    device = reader.subject.device
    with torch.inference_mode():
        rows = reader.read(ids.to(device), mask.to(device)).cpu().numpy()
    return [rows[i, :length] for i, length in enumerate(lengths)]


def _read_unit(
    reader: "RowReader",
    unit: list[Rollout],
    config: GenerateConfig,
    columns: Any,
    layout: SiteLayout,
) -> Rows:
    """Return the rows of a unit's rollouts, in their order, in the stored dtype."""
    ends = np.cumsum([len(rollout.token_ids) for rollout in unit])
    out = np.empty((int(ends[-1]), layout.d_in), config.store_dtype)
    largest = float(np.finfo(out.dtype).max)
    for batch in _batches(unit, config.batch_tokens):
        for index, rows in zip(batch, _read_batch(reader, [unit[i] for i in batch]), strict=True):
            chosen = rows[:, columns]
            bad = ~(np.abs(chosen) <= largest)  # catches NaN as well
            if bad.any():
                row, column = np.argwhere(bad)[0]
                raise NumberError(
                    f"site {layout.column_names[column]} reads {chosen[row, column]} at token "
                    f"{row} of rollout {unit[index].id}, which {out.dtype} cannot hold; "
                    "try --store-dtype float32"
                )
            start = int(ends[index]) - len(chosen)
            out[start : start + len(chosen)] = chosen
    return out


def _require_repeatable(reader: "RowReader", rollout: Rollout) -> None:
    """Raise NumberError unless the same batch gives the same rows twice: dropout would not."""
    twice = [_read_batch(reader, [rollout])[0] for _ in range(2)]
    if not np.array_equal(twice[0], twice[1], equal_nan=True):
        raise NumberError("the same text gives other rows on a second run: something is random")


def _write(shard: Path, rows: Rows, unit: list[Rollout]) -> None:
    with replacing(shard) as beside:
        write_shard(
            beside,
            rows,
            np.concatenate([rollout.token_ids for rollout in unit]),
            np.concatenate([rollout.roles for rollout in unit]),
            [len(rollout.token_ids) for rollout in unit],
            [rollout.id for rollout in unit],
        )


def _vocabulary(tokenizer: Any, rollouts: list[Rollout]) -> Vocabulary:
    highest = max(int(rollout.token_ids.max(initial=0)) for rollout in rollouts)
    tokens = token_bytes(tokenizer, highest + 1)
    special = np.zeros(len(tokens), bool)
    special[special_ids(tokenizer)] = True
    return Vocabulary.of(tokens, special)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer's files without what transformers notes of this machine and its cache."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    options = json.loads(file.read_text(encoding="utf-8"))
    for key in ("local_files_only", "is_local", "name_or_path"):
        options.pop(key, None)
    write_text(file, json.dumps(options, indent=2, ensure_ascii=False) + "\n")


def _digest_rollouts(rollouts: list[Rollout]) -> str:
    digest = hashlib.sha256()
    for rollout in rollouts:
        digest.update(np.array([rollout.id, len(rollout.token_ids)], np.int64).tobytes())
        digest.update(rollout.token_ids.tobytes())
        digest.update(rollout.roles.tobytes())
    return digest.hexdigest()


def _files_of(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted([*folder.glob("*.h5"), *(folder / "tokenizer").iterdir()])
    return {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": digest_file(file),
        }
        for file in files
    }
