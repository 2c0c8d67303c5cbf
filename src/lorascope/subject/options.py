"""The options that say which model is studied, and on which texts."""

from dataclasses import dataclass
from typing import Literal

from lorascope.config import Config, option


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(Config):
    """Options that say which adapter of which base model is meant."""

    lora_path: str | None = option(
        None, help="adapter: a folder or a hub id", identity=False, path=True
    )
    adapter_name: str | None = option(
        None, help="which adapter, where the folder holds several", identity=False
    )
    base_model: str | None = option(
        None,
        help="base model: a folder or a hub id; default: the one that the adapter names",
        identity=False,
        path=True,
    )


@dataclass(frozen=True, kw_only=True)
class SubjectOptions(AdapterOptions):
    """Options that say which model is studied on which texts."""

    skip_unhookable: bool = option(
        False, help="go on without the parts of the adapter that have no A·x for each token"
    )
    gauge: Literal["auto", "svd", "raw"] = option(
        "auto",
        help="columns of a site: raw ones as trained, or svd, which do not change when A and B are "
        "mixed; auto: svd where the rank is above 1",
    )
    dataset: str = option(
        "simplescaling/s1K-1.1",
        help="texts: a .json, .jsonl, .parquet, .csv or .txt file (.gz and .zst too), or a hub id",
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
    duplicates: Literal["drop", "keep"] = option(
        "drop", help="what to do with a text whose tokens were all seen before, in this order"
    )
    max_length: int | None = option(
        None, help="longest text in tokens that the model is run on; default: the model's context"
    )
    long_texts: Literal["truncate", "window"] = option(
        "truncate",
        help="what to do with longer texts: cut them, or read them in windows that overlap by half",
    )
    sample: int | None = option(
        None, help="rollouts that the model writes itself, from the records' prompts in turn"
    )
    max_new_tokens: int = option(512, help="longest continuation in tokens that it writes")
    temperature: float = option(0.0, help="of what it writes; 0 takes the likeliest token")
    sample_seed: int = option(0, help="seed of what it writes")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="type in which the model computes; auto: float32 on the CPU"
    )
    batch_tokens: int | None = option(
        None,
        help="places in one batch, padding included; changes rows by rounding only; default: what "
        "fits into a GPU's memory, 2048 on the CPU",
    )
    num_gpus: int | None = option(
        None, help="GPUs to use, one process each; default: all that are there", identity=False
    )
    device_map: str | None = option(
        None,
        help="spread one model over several devices: auto, balanced or sequential",
        identity=False,
    )

    def check(self) -> None:
        """Refuse impossible numbers."""
        super().check()
        self.require("num_examples", 1)
        self.require("max_length", 2, unit=" tokens")
        self.require("batch_tokens", 1)
        self.require("num_gpus", 0)
        self.require("sample", 1)
        self.require("max_new_tokens", 1)
        self.require("temperature", 0)
        self.require("sample_seed", 0)
