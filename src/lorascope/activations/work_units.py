"""The texts of a store, and the units of work that they are cut into.

A unit is `ROLLOUTS_PER_SHARD` rollouts that follow each other; it becomes one shard. Which rollouts
a unit has depends on the options and the dataset alone, never on the machines that do the work.
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
class Texts:
    """What the units are made of: rollouts, or prompts that the model is to continue.

    `counts` says what was left out, and why; `longest` is the most tokens the model is run on at
    once, `n_longer` how many rollouts have more.
    """

    rollouts: list[Rollout]
    counts: dict[str, int]
    longest: int | None
    n_longer: int

    @property
    def n_tokens(self) -> int:
        """Number of tokens; of prompts, those of the prompts alone."""
        return sum(len(rollout.token_ids) for rollout in self.rollouts)

    @property
    def n_units(self) -> int:
        """Number of units."""
        return -(-len(self.rollouts) // ROLLOUTS_PER_SHARD)

    def unit(self, number: int) -> list[Rollout]:
        """Return the rollouts of a unit."""
        first = number * ROLLOUTS_PER_SHARD
        return self.rollouts[first : first + ROLLOUTS_PER_SHARD]


def load_texts(config: SubjectOptions, tokenizer: Any) -> tuple[list[Rollout], dict[str, int]]:
    """Return the rollouts of the dataset, or the prompts to continue, and what was left out.

    Raises DatasetError when nothing usable is there, ConfigError when `sample` asks for more
    texts than there are prompts and each would be the same again.
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
            f"--sample is {config.sample}, but there are {len(prompts)} prompts, and at "
            "--temperature 0 each is always continued in the same way; give a temperature"
        )
    return [prompts[i % len(prompts)] for i in range(config.sample)], counts


def fit_texts(
    rollouts: list[Rollout],
    counts: dict[str, int],
    config: SubjectOptions,
    context: int | None,
) -> Texts:
    """Return the texts as a model of that context can take them.

    Longer ones are cut, unless `long_texts` asks for windows.
    """
    longest = config.max_length or context
    n_longer = sum(len(rollout.token_ids) > longest for rollout in rollouts) if longest else 0
    if n_longer and config.long_texts == "truncate":
        rollouts = [Rollout(r.id, r.token_ids[:longest], r.roles[:longest]) for r in rollouts]
        log.warning(
            "cut %d of %d rollouts to %d tokens; --long-texts window keeps the rest",
            *(n_longer, len(rollouts), longest),
        )
    elif n_longer:
        log.info("%d of %d rollouts are read in windows of %d", n_longer, len(rollouts), longest)
    return Texts(rollouts, counts, longest, n_longer)


def digest_rollouts(rollouts: list[Rollout]) -> str:
    """Return the SHA-256 of rollouts: their ids, tokens and roles, in order."""
    digest = hashlib.sha256()
    for rollout in rollouts:
        digest.update(np.array([rollout.id, len(rollout.token_ids)], np.int64).tobytes())
        digest.update(rollout.token_ids.tobytes())
        digest.update(rollout.roles.tobytes())
    return digest.hexdigest()
