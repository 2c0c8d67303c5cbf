"""The options of training, and the SAEs that one run trains.

`--k`, `--expansion-factor`, `--lr` and `--seed` take lists. One run trains every combination, a
*sweep*, over one pass of the data: all members see the same batches, split and shuffled by the
first seed; further seeds change the first weights only. If members differ by their seed alone,
each latent gets a stability (`metrics.py`).
"""

import itertools
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from lorascope.config import Config, flag_of, option
from lorascope.errors import ConfigError
from lorascope.texts.roles import ROLES

log = logging.getLogger(__name__)

Options = TypeVar("Options", bound="TrainOptions")
Architecture = Literal["batchtopk", "topk", "jumprelu", "matryoshka"]

# Defaults. On 448 columns they are those of the published study: 7,168 latents, 50 of which fire.
_MOST_PER_COLUMN, _MOST_LATENTS = 16, 16_384
_COLUMNS_PER_FIRING, _MOST_FIRING = 8, 50
_IN_LISTS = ("k", "expansion_factor", "lr", "seed")
_SEEDS = 2**63  # torch's generators accept smaller seeds only
_FIXED_BYTES = 1 << 28  # that training takes whatever the size of the dictionary


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Config):
    """Options that decide what is learned from a store."""

    architecture: Architecture = option(
        "batchtopk",
        help="which latents fire: the best of a batch (batchtopk), the best of each row (topk), "
        "those above a learned threshold (jumprelu), or batchtopk with nested prefixes of the "
        "dictionary that must reconstruct on their own (matryoshka)",
    )
    expansion_factor: tuple[int, ...] | int | None = option(
        None,
        help=f"latents per column of the store; default: {_MOST_PER_COLUMN}, or fewer if these are "
        f"more than {_MOST_LATENTS:,} latents",
        at_least=1,
    )
    k: tuple[float, ...] | float | None = option(
        None,
        help="latents that fire per token, on average; default: one for every "
        f"{_COLUMNS_PER_FIRING} columns, at most {_MOST_FIRING}",
    )
    batch_size: int = option(1024, help="tokens per step", at_least=2)
    epochs: int | None = option(
        None,
        help="passes over the training tokens (default: 1 to 20, to reach 4 million tokens)",
        at_least=1,
    )
    lr: tuple[str, ...] | str | float = option(
        ("auto",), help="peak learning rate of Adam, or auto: from the columns and the steps"
    )
    seed: tuple[int, ...] | int = option(
        (42,),
        help="seed of the first weights, the split and the shuffle; with several seeds the first "
        "one splits and shuffles, and each latent gets its stability across them",
        at_least=0,
    )
    normalize: Literal["std", "none"] = option(
        "std",
        help="what a column is divided by before training: its standard deviation (std) or nothing "
        "(none)",
    )
    roles: tuple[str, ...] = option(
        ROLES, help="roles of the tokens to train on; special: special tokens, template headers"
    )
    holdout: float = option(0.1, help="share of the tokens held out for the report, by rollout")
    dead_after: int = option(
        100_000, help="tokens without firing after which a latent is dead", at_least=0
    )
    auxk_alpha: float = option(
        1 / 8, help="weight of the loss that revives dead latents", at_least=0
    )
    max_fvu: float = option(
        1.0,
        help="write no SAE whose FVU on held-out rows is above this; above 1 it is worse than the "
        "mean row; inf writes any",
        identity=False,
        at_least=0,
    )

    def check(self) -> None:
        """Raise ConfigError if a value is impossible whatever the store holds."""
        super().check()
        for name in _IN_LISTS:
            values = self.values_of(name)
            if name == "lr":
                values = tuple(v if v == "auto" else parse_number(v) for v in values)
            if getattr(self, name) is not None and len(set(values)) < max(len(values), 1):
                raise ConfigError(
                    f"{flag_of(name)} is {' '.join(map(str, values)) or 'empty'}, "
                    "expected one value or several different ones"
                )
        for k in self.values_of("k"):
            if not 0 < k < math.inf:
                raise ConfigError(
                    f"--k is {k:g}, expected a number above 0 and at most the number of latents"
                )
        for lr in self.values_of("lr"):
            if lr != "auto" and not 0 < parse_number(lr) < math.inf:
                raise ConfigError(f"--lr is {lr}, expected auto or a number above 0")
        if self.auxk_alpha == math.inf:
            raise ConfigError("--auxk-alpha is inf, expected a finite number")
        if round((k := min(self.values_of("k"), default=1)) * self.batch_size) < 1:
            raise ConfigError(
                f"--k is {k:g}, less than one latent in a batch of {self.batch_size}; "
                "raise --k or --batch-size"
            )
        if (seed := max(self.values_of("seed"))) >= _SEEDS:
            raise ConfigError(f"--seed is {seed}, expected less than {_SEEDS}")
        if not 0 < self.holdout < 1:
            raise ConfigError(f"--holdout is {self.holdout}, expected between 0 and 1")

    def values_of(self, name: str) -> tuple[Any, ...]:
        """Return the values of an option that takes a list; none if it follows the columns."""
        values = getattr(self, name)
        return () if values is None else values

    def require_one_sae(self, command: str) -> None:
        """Raise ConfigError if an option has several values, which would train several SAEs."""
        for name in _IN_LISTS:
            if (n := len(self.values_of(name))) > 1:
                raise ConfigError(
                    f"{command} trains one SAE, {flag_of(name)} has {n} values; give one here, or "
                    "all of them to lorascope train"
                )

    def for_columns(self: Options, d_in: int) -> Options:
        """Return the options with those that follow the number of columns.

        Raises ConfigError if more latents should fire than there are.
        """
        k = self.k or max(1.0, min(d_in // _COLUMNS_PER_FIRING, _MOST_FIRING))
        factor = self.expansion_factor or max(1, min(_MOST_LATENTS // d_in, _MOST_PER_COLUMN))
        chosen = replace(self, k=k, expansion_factor=factor)
        for factor in chosen.values_of("expansion_factor"):
            if (largest := max(chosen.values_of("k"))) > factor * d_in:
                raise ConfigError(
                    f"--k is {largest:g}, expected at most {factor * d_in}: the SAE has "
                    f"{factor} x {d_in} latents"
                )
        return chosen

    def training_bytes(self, d_in: int) -> int:
        """Return about how many bytes training takes, with options that `for_columns` chose.

        Two matrices, their gradients and Adam's moments are eight matrices for each SAE of a sweep.
        Measured on a CPU (up to 3,584 columns): four more, and four scores for each latent and row
        of a batch.
        """
        n_seeds, n_other = len(self.values_of("seed")), len(self.values_of("k"))
        n_saes = n_seeds * n_other * len(self.values_of("lr"))
        n_latents = n_saes * d_in * sum(self.values_of("expansion_factor"))
        return 4 * n_latents * (12 * d_in + 4 * self.batch_size) + _FIXED_BYTES

    def require_memory(self, d_in: int, free: int | None) -> None:
        """Raise ConfigError if training surely needs more than `free` bytes, warn if it may."""
        needed = self.training_bytes(d_in)
        if free is None or needed <= free:
            return
        factors = self.values_of("expansion_factor")
        largest = max(factors)
        fitting = max(0, free - _FIXED_BYTES) * sum(factors) // (needed - _FIXED_BYTES)
        how = f"lower --expansion-factor to {fitting}, or " if fitting else ""
        text = (
            f"training {largest * d_in:,} latents on {d_in:,} columns needs about "
            f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; {how}keep fewer "
            "columns with --adapter-types"
        )
        if needed * 2 / 3 > free:
            raise ConfigError(text)
        log.warning("%s", text)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainOptions):
    """Options of `train`."""

    data_dir: Path = option(
        Path("activations_all_adapters"),
        help="activation store to train on, a folder or a URL",
        identity=False,
    )
    output: Path | None = option(
        None,
        help="SAE to write: a file if the name ends in .pt, else a folder that SAELens reads too "
        "(default: trained_sae_adapters_INITIALS.pt)",
        identity=False,
    )
    adapter_types: tuple[str, ...] = option(
        (), help="projections whose columns to use, such as gate_proj, g-u-d or mlp (default: all)"
    )
    buffer_rows: int | None = option(
        None,
        help="rows shuffled together if the store is larger (default: as many as fill 2 GiB)",
        at_least=1,
    )
    device: str = option("auto", help="auto, cpu or cuda", identity=False)
    checkpoint_every: float = option(
        60.0, help="seconds between checkpoints", identity=False, at_least=0
    )
    resume: bool = option(True, help="resume from a checkpoint if there is one", identity=False)
    overwrite: bool = option(
        False, help="replace an output that has other settings", identity=False
    )

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the SAE, without projections and those of a sweep member.

        Which projections a spelling means is known with the store only.
        """
        own = {"k", "expansion_factor", "lr", "seed", "adapter_types"}
        shared = {name: value for name, value in super().settings().items() if name not in own}
        # what former options would say: SAEs that were made with them are the same
        former = {"objective": "mse", "warmup": 100, "precision": "float32"}
        return shared | former | {"data_seed": self.values_of("seed")[0]}

    def sweep(self) -> list["SweepMember"]:
        """Return the SAEs of every combination, the seed varying fastest.

        Labels name the options with lists, such as `k8_seed1`.
        """
        lists = {
            short: self.values_of(name)
            for short, name in zip("k x lr seed".split(), _IN_LISTS, strict=True)
        }
        members = []
        for values in itertools.product(*lists.values()):
            words = [
                f"{short}{str(value).removesuffix('.0')}"
                for short, value in zip(lists, values, strict=True)
                if len(lists[short]) > 1
            ]
            members.append(SweepMember(*values, label="_".join(words)))
        return members


@dataclass(frozen=True)
class SweepMember:
    """One SAE of a run. `label` is its part of the file name; empty if the run has only one."""

    k: float
    expansion_factor: int
    lr: str
    seed: int
    label: str = ""

    @property
    def without_seed(self) -> tuple[float, int, str]:
        """What members share that differ by their seed alone."""
        return self.k, self.expansion_factor, self.lr

    def settings(self) -> dict[str, Any]:
        """Return the member's options as the artifact records them."""
        values = {name: getattr(self, name) for name in _IN_LISTS}
        return values | {"lr": self.lr if self.lr == "auto" else float(self.lr)}

    def path(self, output: Path) -> Path:
        """Return where this SAE is written: for the output `sae.pt`, `sae_k8_seed1.pt`."""
        suffix = ".pt" if output.suffix == ".pt" else ""
        stem = output.name.removesuffix(suffix)
        return output.with_name(f"{stem}_{self.label}{suffix}") if self.label else output


def parse_number(text: str) -> float:
    """Return the number that a user wrote, NaN if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
