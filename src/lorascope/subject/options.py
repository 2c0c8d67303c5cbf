"""The options that choose the model to study, and its rollouts."""

from dataclasses import dataclass
from typing import Literal

from lorascope.config import Config, option, require_temperature
from lorascope.texts.conversations import parse_columns


@dataclass(frozen=True, kw_only=True)
class BaseOptions(Config):
    """Options that choose the base model."""

    base_model: str | None = option(
        None,
        help="base model: a folder, a GGUF file or a hub id; default: the one that the adapter "
        "names",
        identity=False,
        path=True,
    )
    base_revision: str | None = option(
        None,
        help="branch, tag or commit of a base model on the hub; default: the one that the adapter "
        "names",
        identity=False,
    )


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(BaseOptions):
    """Options that choose the adapter and its base model."""

    lora_path: str | None = option(
        None, help="adapter: a folder or a hub id", identity=False, path=True
    )
    adapter_name: str | None = option(
        None, help="adapter to use, if the folder holds several", identity=False
    )


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(BaseOptions):
    """Options that choose the base model and the texts, and how texts are read."""

    skip_unhookable: bool = option(
        False, help="continue without the parts of the adapter that have no A·x for each token"
    )
    gauge: Literal["auto", "svd", "raw"] = option(
        "auto",
        help="columns of a site: raw (rows of A as trained) or svd (independent of how the update "
        "is split into A and B); auto: svd where the rank is above 1",
    )
    dataset: str = option(
        "simplescaling/s1K-1.1",
        help="dataset: a .json, .jsonl, .parquet, .csv or .txt file (also .gz, .zst), or a hub id",
        identity=False,
        path=True,
    )
    split: str = option("train", help="split of a hub dataset", identity=False)
    num_examples: int | None = option(
        1000,
        help="number of records to read, from the start of the dataset",
        identity=False,
        at_least=1,
    )
    template: Literal["auto", "s1", "chat", "text"] = option(
        "auto", help="how a record becomes a rollout; auto decides by its fields"
    )
    columns: tuple[str, ...] = option(
        (),
        help="columns to read, as FIELD=COLUMN, such as text=body or question=q answer=a; "
        "default: the fields of docs/texts.md under their own names",
        identity=False,
    )
    duplicates: Literal["drop", "keep"] = option(
        "drop", help="what to do with a rollout whose tokens equal those of an earlier one"
    )
    max_length: int | None = option(
        None,
        help="longest rollout in tokens; default: the model's context",
        at_least=2,
    )
    long_texts: Literal["truncate", "window"] = option(
        "truncate",
        help="for longer rollouts: cut them, or read them in windows that overlap by half",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="dtype of the model; auto: float32 on the CPU, else the checkpoint's"
    )
    batch_tokens: int | None = option(
        None,
        help="tokens in one batch, padding included; changes rows by rounding only; default: what "
        "fits into the GPU's memory, 2048 on the CPU",
        at_least=1,
    )
    num_gpus: int | None = option(
        None,
        help="number of GPUs, one process each; default: all available",
        identity=False,
        at_least=0,
    )
    device_map: str | None = option(
        None,
        help="spread one model over several devices: auto, balanced or sequential",
        identity=False,
    )

    def check(self) -> None:
        """Raise ConfigError if a column is not given as FIELD=COLUMN."""
        super().check()
        parse_columns(self.columns)


@dataclass(frozen=True, kw_only=True)
class SubjectOptions(ReadingOptions, AdapterOptions):
    """Options that choose the adapter, its base model and its rollouts, and how to run them."""

    sample: int | None = option(
        None,
        help="rollouts that the model generates itself, from the records' prompts in turn",
        at_least=1,
    )
    max_new_tokens: int = option(512, help="longest continuation in tokens", at_least=1)
    temperature: float = option(
        0.0,
        help="sampling temperature; 0 takes the likeliest token; of the base's "
        "generation_config.json, only end-of-text tokens are used",
    )
    sample_seed: int = option(0, help="seed of the sampling", at_least=0)

    def check(self) -> None:
        """Raise ConfigError if the temperature is out of range."""
        super().check()
        require_temperature(self.temperature)
