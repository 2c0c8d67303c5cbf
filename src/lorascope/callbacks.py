"""Log the rows of a LoRA while it is trained: `RowLogger`, a callback of transformers' `Trainer`.

    trainer.add_callback(RowLogger("probes.jsonl", "rows", every=100))

Every 100 steps the model reads the same texts, and their rows become a store `rows/step-000100`,
the same as `lorascope generate` makes of a checkpoint: `info`, `verify` and every stage read it.
The training goes on as if nothing had looked at it (`subject.step_callback`).

1. The texts are read and tokenised once, when the training begins.
2. A store of a step gets its name when it is complete. A training that is killed keeps its stores.
3. A training that is resumed keeps the stores before, and those after that have the same weights.
4. All stores name the weights that the training began with, so that no stage takes a store of
   another training for one of these.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lorascope.activations.generate import (
    Corpus,
    GenerateConfig,
    digest_rollouts,
    fit_to_context,
    load_corpus,
    make_store,
)
from lorascope.activations.store import KIND, SCHEMA
from lorascope.artifact import Identity, read_manifest
from lorascope.errors import ArtifactError, ConfigError
from lorascope.sites import TRAINING
from lorascope.stage import Build, built
from lorascope.subject.step_callback import StepCallback

if TYPE_CHECKING:
    from lorascope.subject.load import Subject

__all__ = ["RowLogger"]

log = logging.getLogger(__name__)

_BATCH_TOKENS = 2048  # the rest of a GPU's memory is the training's


class RowLogger(StepCallback):
    """Keeps the rows of some texts during training, in a store for each recorded step.

    `dataset` names the texts, as `--dataset` does, and `output` the folder of the stores. The first
    and the last step are always recorded. `tokenizer` is the Trainer's own by default. `gauge` is
    `raw`, in which a column changes slowly from step to step; in `svd` columns may swap. `options`
    are others of `lorascope generate`: `num_examples`, `template`, `columns`, `max_length`,
    `adapter_types`, `store_dtype`, `batch_tokens` and so on. Raises ConfigError at impossible ones.
    """

    def __init__(
        self,
        dataset: str | Path,
        output: str | Path,
        *,
        every: int = 100,
        tokenizer: Any = None,
        gauge: str = "raw",
        **options: Any,
    ) -> None:
        if every < 1:
            raise ConfigError(f"every is {every}, expected 1 step or more")
        refused = {"sample", "output", "lora_path", "base_model", "overwrite"} & options.keys()
        if refused or options.keys() - GenerateConfig.names():
            name = min(refused or options.keys() - GenerateConfig.names())
            raise ConfigError(f"RowLogger has no option {name}; see its docstring")
        given = {"batch_tokens": _BATCH_TOKENS, **options, "gauge": gauge}
        self.config = GenerateConfig(dataset=str(dataset), **given)
        self.output = Path(output)
        self._corpus: Corpus | None = None
        self._dataset = self._training = ""
        self._own_forward: bool | None = None  # None until the rows of a step were checked
        super().__init__(every, tokenizer, gauge, skip_unhookable=self.config.skip_unhookable)

    def path(self, step: int) -> Path:
        """Return the folder of a step's store."""
        return self.output / f"step-{step:06d}"

    def prepare(self, subject: "Subject", *, is_resumed: bool) -> None:
        """Read the texts. Raises ArtifactError if the folder has stores of another training."""
        rollouts, counts = load_corpus(self.config, subject.tokenizer)
        self._dataset = digest_rollouts(rollouts)
        self._corpus = fit_to_context(rollouts, counts, self.config, subject.max_length)
        own, first = self._identity(subject), self.path(0)
        of_texts = {name: digest for name, digest in own.parents.items() if name != "adapter"}
        stores = {path: read_manifest(path) for path in self.output.glob("step-*[0-9]")}
        for path, found in sorted(stores.items()):
            if (
                found is None
                or found.settings != own.settings
                or not of_texts.items() <= found.parents.items()
            ):
                self._refuse(path, "of other texts or another model, or made with other options")
        begun = stores.get(first)
        self._training = TRAINING + subject.adapter.digest
        for found in stores.values() if is_resumed else ():
            if found is not None and found.columns.adapter:
                self._training = found.columns.adapter
        if stores and not is_resumed and (begun is None or begun.parents != own.parents):
            self._refuse(self.output, "with stores of a training that began with other weights")

    def _refuse(self, path: Path, what: str) -> NoReturn:
        raise ArtifactError(f"{path} is {what}; give another output, or remove it")

    def record(self, subject: "Subject", step: int) -> None:
        """Write the store of a step, unless one of the same weights is there."""
        out, identity, corpus = self.path(step), self._identity(subject), self._corpus
        assert corpus is not None, "prepare was called"
        found = read_manifest(out) if out.exists() else None
        if found is not None and found.identity == identity:
            log.info("%s exists already, with these weights", out)
            return

        def make(build: Build) -> None:
            layout = replace(subject.layout, adapter=self._training)
            self._own_forward = make_store(
                build,
                identity,
                self.config,
                replace(subject, layout=layout),
                corpus,
                self._own_forward,
            )

        # what stands there is of an earlier, longer run of a training that was resumed
        built(out, identity, make, overwrite=True)

    def _identity(self, subject: "Subject") -> Identity:
        base = {"base_weights": subject.base.digest} if subject.base.digest else {}
        return Identity(
            kind=KIND,
            schema=SCHEMA,
            settings=self.config.settings(),
            parents={
                "adapter": subject.adapter.digest,
                **base,
                "dataset": self._dataset,
            },
        )
