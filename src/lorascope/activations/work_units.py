"""The corpus of a store, and the work units that it is cut into.

A work unit is `ROLLOUTS_PER_SHARD` consecutive rollouts, and becomes one shard. Its rollouts depend
on the options and the dataset only, never on the machines that do the work.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorascope.errors import ConfigError
from lorascope.subject.options import SubjectOptions
from lorascope.texts.rollouts import Rollout, load_prompts, load_rollouts

log = logging.getLogger(__name__)

ROLLOUTS_PER_SHARD = 64


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

    @property
    def n_work_units(self) -> int:
        """Number of work units."""
        return -(-len(self.rollouts) // ROLLOUTS_PER_SHARD)

    def work_unit(self, number: int) -> list[Rollout]:
        """Return the rollouts of a work unit."""
        first = number * ROLLOUTS_PER_SHARD
        return self.rollouts[first : first + ROLLOUTS_PER_SHARD]


def load_corpus(config: SubjectOptions, tokenizer: Any) -> tuple[list[Rollout], dict[str, int]]:
    """Return the dataset's rollouts, or prompts to continue, and counts of what was left out.

    Raises DatasetError if nothing is usable, ConfigError if `sample` asks for more rollouts than
    there are prompts, at temperature 0, where a prompt's continuation is always the same.
    """
    source: dict[str, Any] = {
        "dataset": config.dataset,
        "split": config.split,
        "limit": config.num_examples,
        "template": config.template,
        "tokenizer": tokenizer,
    }
    if config.sample is None:
        return load_rollouts(**source, duplicates=config.duplicates)
    prompts, counts = load_prompts(**source)
    if config.sample > len(prompts) and config.temperature == 0:
        raise ConfigError(
            f"--sample is {config.sample}, but there are {len(prompts)} prompts, and "
            "--temperature 0 always continues a prompt in the same way; use a temperature above 0"
        )
    return [prompts[i % len(prompts)] for i in range(config.sample)], counts


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
