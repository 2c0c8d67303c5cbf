"""What can be chosen about training, and which values are possible."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorascope.config import Config, flag_of, option
from lorascope.errors import ConfigError
from lorascope.sae.journal import require_trackers
from lorascope.sae.sweep import Variant, variants
from lorascope.sites import parse_adapter_types

Architecture = Literal["batchtopk", "topk", "jumprelu", "matryoshka"]

_SEEDS = 2**63  # torch's generators take no more


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Config):
    """Options that decide what is learned from a store."""

    architecture: Architecture = option(
        "batchtopk",
        help="what fires: the best of a batch, the best of each row, what beats a learned "
        "threshold, or batchtopk whose first latents have to do without the later ones",
    )
    expansion_factor: tuple[int, ...] | int = option((16,), help="latents per column")
    k: tuple[float, ...] | float = option(
        (50.0,), help="latents that fire for each token, on average"
    )
    signed: bool = option(
        False, help="let a latent fire either way; it is saved as two, of opposite directions"
    )
    batch_size: int = option(1024, help="tokens in a step")
    epochs: int | None = option(
        None, help="passes over the training tokens (default: 1 to 20, towards 4 million tokens)"
    )
    lr: tuple[str, ...] | str | float = option(
        ("auto",), help="peak learning rate of Adam, or auto: by the columns and the steps"
    )
    warmup: int = option(100, help="steps of rising learning rate, at most a tenth of all")
    seed: tuple[int, ...] | int = option(
        (42,), help="seed of the first weights; the first one also of the split and the shuffle"
    )
    normalize: Literal["effect", "std", "rms", "none"] = option(
        "std",
        help="unit of a column for the SAE: its standard deviation, its root mean square, what it "
        "writes (scale times norm of B), or its raw value",
    )
    roles: tuple[str, ...] = option((), help="roles of the tokens to learn from (default: all)")
    holdout: float = option(0.1, help="share of the tokens kept for the report, by rollout")
    dead_after: int = option(100_000, help="tokens without firing after which a latent is dead")
    auxk_alpha: float = option(1 / 8, help="weight of the loss that revives dead latents")
    precision: Literal["float32", "bfloat16"] = option(
        "float32", help="type of the encoder's product; weights and sums are float32 either way"
    )

    def check(self) -> None:
        """Raise ConfigError when a value is impossible whatever the store holds."""
        super().check()
        for name in ("k", "expansion_factor", "lr", "seed"):
            values = self.each(name)
            if name == "lr":
                values = tuple(v if v == "auto" else number(v) for v in values)
            if not values or len(set(values)) < len(values):
                raise ConfigError(
                    f"{flag_of(name)} is {' '.join(map(str, values)) or 'empty'}, "
                    "expected one value or several different ones"
                )
        for k in self.each("k"):
            if not 0 < k < math.inf:
                raise ConfigError(f"--k is {k:g}, expected more than 0, at most the latents")
        for lr in self.each("lr"):
            if lr != "auto" and not 0 < number(lr) < math.inf:
                raise ConfigError(f"--lr is {lr}, expected auto or a number above 0")
        for name, least in (("expansion_factor", 1), ("seed", 0)):
            if (value := min(self.each(name))) < least:
                raise ConfigError(f"{flag_of(name)} is {value}, expected {least} or more")
        if self.signed and self.architecture == "jumprelu":
            raise ConfigError("--signed is not for jumprelu; use another --architecture")
        for name, least in (("batch_size", 2), ("epochs", 1)):
            self.require(name, least)
        for name in ("warmup", "dead_after", "auxk_alpha"):
            self.require(name, 0)
        if self.auxk_alpha == math.inf:
            raise ConfigError("--auxk-alpha is inf, expected a finite number")
        if round((k := min(self.each("k"))) * self.batch_size) < 1:
            raise ConfigError(
                f"--k is {k:g}, which is no latent in a batch of {self.batch_size}; "
                "raise it, or --batch-size"
            )
        if (seed := max(self.each("seed"))) >= _SEEDS:
            raise ConfigError(f"--seed is {seed}, expected less than {_SEEDS}")
        if not 0 < self.holdout < 1:
            raise ConfigError(f"--holdout is {self.holdout}, expected between 0 and 1")

    def each(self, name: str) -> tuple[Any, ...]:
        """Return the values of an option that takes several; one value is a tuple here as well."""
        return getattr(self, name)

    def room(self, d_in: int) -> None:
        """Raise ConfigError where more latents are to fire than there are."""
        for factor in self.each("expansion_factor"):
            if (k := max(self.each("k"))) > factor * d_in:
                raise ConfigError(
                    f"--k is {k:g}, expected at most {factor * d_in}: the SAE has "
                    f"{factor} x {d_in} latents"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions):
    """Options of `train`."""

    data_dir: Path = option(
        Path("activations_all_adapters"), help="activation store to train on", identity=False
    )
    output: Path | None = option(
        None,
        help="SAE to write: a file ending in .pt, else a folder that SAELens reads too "
        "(default: trained_sae_adapters_INITIALS.pt)",
        identity=False,
    )
    adapter_types: tuple[str, ...] = option(
        (), help="projections whose columns to use, such as gate_proj, g-u-d or mlp (default: all)"
    )
    seeds: int = option(
        1, help="train with so many seeds, from --seed on, and give each latent its stability"
    )
    buffer_rows: int | None = option(
        None, help="rows shuffled together where the store is larger (default: what 2 GB hold)"
    )
    device: str = option("auto", help="auto, cpu or cuda", identity=False)
    track: tuple[str, ...] = option(
        (), help="also log to wandb or tensorboard (pip install lorascope[track])", identity=False
    )
    checkpoint_every: float = option(60.0, help="seconds between checkpoints", identity=False)
    resume: bool = option(True, help="go on from a checkpoint, if there is one", identity=False)
    overwrite: bool = option(False, help="replace an output of other settings", identity=False)

    def check(self) -> None:
        """Raise ConfigError when a value is impossible whatever the store holds."""
        super().check()
        self.require("seeds", 1)
        self.require("buffer_rows", 1)
        self.require("checkpoint_every", 0)
        require_trackers(self.track)
        if self.seeds > 1 and len(self.each("seed")) > 1:
            raise ConfigError("--seeds counts on from one --seed; give one of the two lists")

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the SAE, but for those of a variant; in one spelling."""
        types = list(parse_adapter_types(self.adapter_types))
        own = {"k", "expansion_factor", "lr", "seed", "seeds"}
        shared = {name: value for name, value in super().settings().items() if name not in own}
        return shared | {"adapter_types": types, "data_seed": self.each("seed")[0]}

    def variants(self) -> list[Variant]:
        """Return the SAEs that this run trains."""
        seeds = self.each("seed")
        if self.seeds > 1:
            seeds = tuple(range(seeds[0], seeds[0] + self.seeds))
        return variants(self.each("k"), self.each("expansion_factor"), self.each("lr"), seeds)


def number(text: str) -> float:
    """Return a number that a user wrote, NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
