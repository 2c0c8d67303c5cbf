"""Run the adapted model over rollouts and store `A·x` of every adapted module for every token.

1. Render and tokenise the records once. Unusable records are counted and left out. With `sample`,
   the model generates the rollouts itself, work unit by work unit.
2. Cut the rollouts into work units: `ROLLOUTS_PER_SHARD` consecutive ones each. They depend on the
   options and the dataset only, never on the machines that do the work.
3. Every process of the job claims the next free work unit (runtime.claim_work_units) and reads its
   rows in batches (capture.py). It writes them as one shard under a temporary name, and renames it
   while the next work unit computes. A finished shard is never computed again.
4. Rank 0 waits for the last shard and writes the manifest with the checksums of all files.

In: adapter, base model, dataset. Out: an activation store (a folder).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lorascope import runtime
from lorascope.activations.shards import VOCABULARY, Vocabulary, count_rows, write_shard
from lorascope.activations.store import KIND, SCHEMA, default_name
from lorascope.artifact import Identity, errors_of_the_system, replacing, write_text
from lorascope.config import option
from lorascope.errors import ConfigError, LorascopeError
from lorascope.remote import RemotePath, uploaded
from lorascope.sites import SiteLayout, parse_adapter_types
from lorascope.stage import Build, Job, built, require_space, unfinished
from lorascope.subject.adapter import inspect_adapter, ranks_by_projection
from lorascope.subject.options import SubjectOptions
from lorascope.texts.roles import ROLES
from lorascope.texts.rollouts import Rollout, load_rollouts
from lorascope.texts.tokens import special_ids, token_bytes

if TYPE_CHECKING:
    from lorascope.activations.capture import Capture, Pending
    from lorascope.subject.base import Base
    from lorascope.subject.load import Subject

log = logging.getLogger(__name__)

ROLLOUTS_PER_SHARD = 64
_IN_FLIGHT = 2  # work units whose rows may be in memory while the next one computes


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SubjectOptions):
    """Options of `generate`."""

    adapter_types: tuple[str, ...] = option(
        (), help="projections to store: names, initials, mlp, attention or all"
    )
    store_dtype: Literal["float16", "float32"] = option(
        "float16", help="dtype of stored activations; a column that does not fit is an error"
    )
    output: Path | None = option(
        None,
        help="folder or URL to write; default: activations_all_adapters or similar",
        identity=False,
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(
        False, help="replace an output that has other settings", identity=False
    )


@dataclass(frozen=True)
class Corpus:
    """The rollouts of a store, or prompts that the model will continue.

    `counts` is the number of records left out, by reason. `longest` is the most tokens that the
    model runs on at once, `n_longer` the number of rollouts that are longer.
    """

    rollouts: list[Rollout]
    counts: dict[str, int]
    longest: int | None
    n_longer: int

    @property
    def n_tokens(self) -> int:
        """Number of tokens, without those that the model will generate."""
        return sum(len(rollout.token_ids) for rollout in self.rollouts)


def run(
    config: GenerateConfig,
    plan: "Callable[[Base, int], None] | None" = None,
    load: "Callable[..., Subject] | None" = None,
) -> Path:
    """Run the adapted model on texts, and return the folder of its activations, a store.

    A finished store of the same settings is kept, and an interrupted one is continued. Raises
    AdapterError, DatasetError or NumberError if the adapter, the texts or a value cannot be used.
    `plan` gets the base and the number of tokens before any model is loaded, and may raise. `load`
    is used instead of `load_subject`, as for several adapters on one base (`SharedBase.load`).
    """
    from lorascope.activations.capture import compare_likelihood
    from lorascope.subject.base import find_base, other_base
    from lorascope.subject.load import load_subject, load_tokenizer
    from lorascope.subject.sampling import log_ignored_settings

    adapter = inspect_adapter(config.lora_path, config.adapter_name)
    base = find_base(adapter, config.base_model, config.base_revision)
    if named := other_base(adapter, base):
        log.warning(
            "%s names the base model %s, and is studied on %s: rows are right only if these are "
            "the same weights",
            adapter.name,
            named,
            base.name,
        )
    available = ranks_by_projection(adapter)
    types = parse_adapter_types(config.adapter_types, available) or tuple(available)
    out = config.output or Path(default_name(types))
    tokenizer = load_tokenizer(adapter, base)
    rollouts, counts = load_corpus(config, tokenizer)
    if plan is not None:
        plan(base, _n_expected(config, sum(len(rollout.token_ids) for rollout in rollouts)))
    parents = {
        "adapter": adapter.digest,
        "base_weights": base.digest,
        "dataset": digest_rollouts(rollouts),
    }
    identity = Identity(kind=KIND, schema=SCHEMA, settings=config.settings(), parents=parents)

    def make(build: Build) -> None:
        subject = (load or load_subject)(
            adapter,
            base,
            tokenizer,
            runtime.pick_device(config.device, config.num_gpus),
            config.dtype,
            gauge=config.gauge,
            skip_unhookable=config.skip_unhookable,
            device_map=config.device_map,
        )
        if config.sample is not None:
            log_ignored_settings(base)
        corpus = fit_to_context(rollouts, counts, config, subject.max_length)
        if config.sample is None and runtime.process_rank() == 0:
            compare_likelihood(subject, corpus.rollouts)
        make_store(build, identity, config, subject, corpus)

    n_workers = 1 if config.device_map else runtime.n_workers(config.device, config.num_gpus)
    job = Job(n_workers, "generate", config)
    return built(out, identity, make, overwrite=config.overwrite, job=job)


def make_store(
    build: Build,
    identity: Identity,
    config: GenerateConfig,
    subject: "Subject",
    corpus: Corpus,
    own_forward: bool | None = None,
) -> bool:
    """Do steps 3 and 4: read the corpus with a subject that is loaded, and publish the store.

    `own_forward` is that of `RowReader`; None checks the rows first. Returns the one that was used.
    """
    available = subject.layout.adapter_types
    types = parse_adapter_types(config.adapter_types, available) or available
    layout, columns = subject.layout.select(types)
    _require_space(config, layout, corpus, build.out)
    log.info(
        "%d rollouts, %d tokens, %d columns (%s) of %s, base %s, on %s in %s",
        len(corpus.rollouts),
        corpus.n_tokens,
        layout.d_in,
        layout.initials,
        subject.adapter.name,
        subject.base.name,
        subject.device,
        str(subject.dtype).removeprefix("torch."),
    )
    n_rows, used = _make_shards(config, subject, corpus, build.path, columns, own_forward)
    if runtime.process_rank() > 0:
        return used
    with uploaded(build.path / VOCABULARY) as file:
        _vocabulary(subject).save(file)
    with uploaded(build.path / "tokenizer") as folder:
        _save_tokenizer(subject.tokenizer, folder)
    files = [*build.path.glob("*.h5"), *(build.path / "tokenizer").rglob("*")]
    names = [file.relative_to(build.path).as_posix() for file in files if file.is_file()]
    content = _content(config, subject, corpus, layout, n_rows)
    build.publish_directory(identity.manifest(layout, content), names)
    return used


def load_corpus(config: SubjectOptions, tokenizer: Any) -> tuple[list[Rollout], dict[str, int]]:
    """Return the dataset's rollouts, or prompts to continue, and counts of what was left out.

    Raises DatasetError if nothing is usable, ConfigError if `sample` asks for more rollouts than
    there are prompts, at temperature 0, where a prompt's continuation is always the same.
    """
    rollouts, counts = load_rollouts(
        dataset=config.dataset,
        split=config.split,
        limit=config.num_examples,
        template=config.template,
        columns=config.columns,
        duplicates=config.duplicates,
        prompts=config.sample is not None,
        tokenizer=tokenizer,
    )
    if config.sample is None:
        return rollouts, counts
    if config.sample > len(rollouts) and config.temperature == 0:
        raise ConfigError(
            f"--sample is {config.sample}, but there are {len(rollouts)} prompts, and "
            "--temperature 0 always continues a prompt in the same way; use a temperature above 0"
        )
    return [rollouts[i % len(rollouts)] for i in range(config.sample)], counts


def fit_to_context(
    rollouts: list[Rollout],
    counts: dict[str, int],
    config: SubjectOptions,
    context: int | None,
) -> Corpus:
    """Return the corpus for a model with this context.

    Longer rollouts are cut, unless `long_texts` asks for windows.
    """
    longest = config.max_length or context
    if context and longest and longest > context:
        raise ConfigError(
            f"--max-length is {longest} tokens, more than the model's context of {context}; "
            "--long-texts window reads longer texts in parts"
        )
    n_longer = sum(len(rollout.token_ids) > longest for rollout in rollouts) if longest else 0
    if n_longer and config.long_texts == "truncate":
        rollouts = [Rollout(r.id, r.token_ids[:longest], r.roles[:longest]) for r in rollouts]
        log.warning(
            "cut %d of %d rollouts to %d tokens; --long-texts window keeps the rest",
            n_longer,
            len(rollouts),
            longest,
        )
    elif n_longer:
        log.info("%d of %d rollouts are read in windows of %d", n_longer, len(rollouts), longest)
    return Corpus(rollouts, counts, longest, n_longer)


def digest_rollouts(rollouts: list[Rollout]) -> str:
    """Return the SHA-256 of rollouts: their ids, tokens and roles, in order."""
    digest = hashlib.sha256()
    for rollout in rollouts:
        digest.update(np.array([rollout.id, len(rollout.token_ids)], np.int64).tobytes())
        digest.update(rollout.token_ids.tobytes())
        digest.update(rollout.roles.tobytes())
    return digest.hexdigest()


def _make_shards(
    config: GenerateConfig,
    subject: "Subject",
    corpus: Corpus,
    folder: Path,
    columns: npt.NDArray[np.int64],
    own_forward: bool | None,
) -> tuple[int, bool]:
    """Make shards until all exist, whichever process made them.

    Returns the number of rows, which rank 0 counts, and the `own_forward` that was used.
    """
    from lorascope.activations.capture import Capture
    from lorascope.subject.hooks import RowReader

    n_work_units = -(-len(corpus.rollouts) // ROLLOUTS_PER_SHARD)
    paths = [folder / f"shard-{i:05d}.h5" for i in range(n_work_units)]
    bar = runtime.progress(_n_expected(config, corpus.n_tokens), "generate", "tokens")
    n_rows, capture = 0, None
    writing: list[Future[None]] = []

    def count(work_unit: int) -> None:
        nonlocal n_rows
        if runtime.process_rank() > 0:
            return  # only rank 0 counts, and it may rename the folder at any moment
        n = count_rows(paths[work_unit])
        n_rows += n
        bar.update(n)

    def raise_failed() -> None:
        for future in [future for future in writing if future.done()]:
            future.result()
            writing.remove(future)

    own = RowReader(subject, own_forward=own_forward is not False)
    with own as reader, bar, ThreadPoolExecutor(1) as writer:
        locks = None if isinstance(folder, RemotePath) else folder / ".claims"
        for work_unit in runtime.claim_work_units(paths, locks, count, raise_failed):
            with _errors_with_rank(work_unit):
                rollouts = _rollouts(config, subject, corpus, work_unit)
                if capture is None:
                    capture = Capture(
                        reader,
                        columns,
                        store_dtype=config.store_dtype,
                        batch_tokens=config.batch_tokens,
                        longest=corpus.longest,
                    )
                    if own_forward is None:
                        middle = sorted(rollouts, key=lambda rollout: len(rollout.token_ids))
                        capture.check(middle[len(middle) // 2])
                        capture.check_neighbours(rollouts)
                pending = capture.run(rollouts)
            while len(writing) >= _IN_FLIGHT:
                writing.pop(0).result()
            path = paths[work_unit]
            writing.append(writer.submit(_write, path, capture, pending, work_unit))
    return n_rows, reader.own_forward


def _rollouts(
    config: GenerateConfig, subject: "Subject", corpus: Corpus, work_unit: int
) -> list[Rollout]:
    """Return the rollouts of a work unit, which the model generates first with `sample`."""
    first = work_unit * ROLLOUTS_PER_SHARD
    prompts = corpus.rollouts[first : first + ROLLOUTS_PER_SHARD]
    if config.sample is None:
        return prompts
    from lorascope.subject.sampling import sample_rollouts

    return sample_rollouts(
        subject,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=(config.sample_seed, work_unit),
    )


def _write(path: Path, capture: "Capture", pending: "Pending", work_unit: int) -> None:
    with _errors_with_rank(work_unit):
        rows, rollouts = capture.finish(pending), pending.rollouts
        with replacing(path) as temporary:
            write_shard(
                temporary,
                rows,
                np.concatenate([rollout.token_ids for rollout in rollouts]),
                np.concatenate([rollout.roles for rollout in rollouts]),
                [len(rollout.token_ids) for rollout in rollouts],
                [rollout.id for rollout in rollouts],
            )


@contextmanager
def _errors_with_rank(work_unit: int) -> Generator[None]:
    """In a job of several processes, prefix errors with the rank and its work unit."""
    try:
        yield
    except LorascopeError as error:
        if runtime.world_size() > 1:
            error.args = (f"rank {runtime.process_rank()}, work unit {work_unit}: {error}",)
        raise


def _n_expected(config: GenerateConfig, n_tokens: int) -> int:
    """Return the number of rows to expect: at most, if the model generates the rollouts."""
    return n_tokens + (config.sample or 0) * config.max_new_tokens


def _require_space(config: GenerateConfig, layout: SiteLayout, corpus: Corpus, out: Path) -> None:
    """Log what the store will take; raise ArtifactError unless missing shards fit on the disk."""
    row = layout.d_in * np.dtype(config.store_dtype).itemsize + 9
    existing = sum(shard.stat().st_size for shard in unfinished(out).glob("shard-*.h5"))
    expected = _n_expected(config, corpus.n_tokens)
    log.info("%s tokens to read, %.2f GB on disk", f"{expected:,}", expected * row / 1e9)
    needed = int(expected * row * 1.05) + (1 << 24)
    require_space(out.parent, max(needed - existing, 0))


def _content(
    config: GenerateConfig, subject: "Subject", corpus: Corpus, layout: SiteLayout, n_rows: int
) -> dict[str, Any]:
    """Return what the manifest says about the store, besides its settings."""
    from lorascope.subject.base import other_base
    from lorascope.subject.sampling import end_ids

    named = other_base(subject.adapter, subject.base)
    if named and Path(named).is_absolute():  # of the machine that trained it
        named = Path(named).name
    dataset = Path(config.dataset)
    return {
        "n_rows": n_rows,
        "n_rollouts": len(corpus.rollouts),
        "d_in": layout.d_in,
        "adapter_types": list(layout.adapter_types),
        "roles": list(ROLES),
        "store_dtype": config.store_dtype,
        "compute_dtype": str(subject.dtype).removeprefix("torch."),
        "quantized": subject.quantized,
        "adapter_name": subject.adapter.name,
        "base_model": subject.base.name + (f" (the adapter names {named})" if named else ""),
        "base_commit": subject.base.commit,
        "dataset": dataset.name if dataset.exists() else config.dataset,
        "rollouts_per_shard": ROLLOUTS_PER_SHARD,
        "dropped": corpus.counts,
        "longest": corpus.longest,
        "longer": {"n": corpus.n_longer, "how": config.long_texts},
        "end_ids": end_ids(subject) if config.sample else None,
        "unhooked": list(subject.unhooked),
        "unseen": list(subject.unseen),
    }


def _vocabulary(subject: "Subject") -> Vocabulary:
    tokens = token_bytes(subject.tokenizer, subject.causal.config.get_text_config().vocab_size)
    special = np.zeros(len(tokens), bool)
    special[special_ids(subject.tokenizer)] = True
    return Vocabulary.from_tokens(tokens, special)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer's files without what transformers adds about this machine's cache."""
    with errors_of_the_system(folder):
        tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    options = json.loads(file.read_text(encoding="utf-8"))
    for key in ("local_files_only", "is_local", "name_or_path"):
        options.pop(key, None)
    write_text(file, json.dumps(options, indent=2, ensure_ascii=False) + "\n")
