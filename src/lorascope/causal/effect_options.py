"""The options of the commands that study effects: evaluate, ablate, attribute, direct, steer, edit.

They are apart from the commands so that `--help` and the shell's completion need no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorascope.causal.report_records import TargetKind
from lorascope.config import option, require_temperature
from lorascope.errors import ConfigError
from lorascope.subject.options import AdapterOptions

if TYPE_CHECKING:
    from lorascope.sae.model import SAE


@dataclass(frozen=True, kw_only=True)
class ReportOptions(AdapterOptions):
    """Options of every command that loads the subject and writes a report."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="type in which the model computes; auto: float32 on the CPU"
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(
        False, help="replace an output that was made with other settings", identity=False
    )


@dataclass(frozen=True, kw_only=True)
class EffectOptions(ReportOptions):
    """Options of every command that runs the subject on the rollouts of a store."""

    data_dir: Path = option(
        Path("activations_all_adapters"),
        help="activation store whose rollouts to run",
        identity=False,
    )
    max_rollouts: int | None = option(
        None, help="largest number of held-out rollouts to run; default: all", at_least=1
    )
    batch_tokens: int | None = option(
        None,
        help="tokens in one batch, padding included; changes results by rounding only; "
        "default: as many as keep the logits below 512 MB, at most 2048",
        identity=False,
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class SeededEffectOptions(EffectOptions):
    """Options of the commands that draw random numbers."""

    seed: int = option(
        0, help="seed of random directions, of sampling and of the bootstrap", at_least=0
    )


def sae_option() -> Any:
    """Return the option that names the SAE under study."""
    return option(
        Path("trained_sae_adapters_g-u-d-q-k-v-o.pt"), help="SAE to study", identity=False
    )


def output_option(name: str) -> Any:
    """Return the option that names the report."""
    return option(Path(name), help="report to write", identity=False, suffix=".json")


def require_features(features: Sequence[int], sae: "SAE | None" = None) -> None:
    """Raise ConfigError unless `--features` are different numbers, and of `sae` if it is given."""
    if min(features, default=0) < 0 or len(set(features)) < len(features):
        raise ConfigError("--features must be different numbers, from 0")
    if sae is not None and max(features, default=0) >= sae.d_sae:
        raise ConfigError(
            f"--features names {max(features)}, the SAE has features 0 to {sae.d_sae - 1}"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SeededEffectOptions):
    """Options of `evaluate`."""

    sae: Path = sae_option()
    against: tuple[Path, ...] = option(
        (),
        help="other SAEs of the same columns to compare with, such as one of another seed",
        identity=False,
    )
    by_site: bool = option(
        False, help="also rebuild each layer and each projection alone, two runs for each"
    )
    subsets: int = option(
        0,
        help="random subsets of the sites to rebuild alone, and steps of the search for the "
        "subset that loses most; two runs for each subset, and about four for each step",
        at_least=0,
    )
    answers: int = option(
        0,
        help="held-out prompts that base and adapter both continue by up to 96 tokens, with the "
        "same noise, to be read side by side; plain LoRA only",
        at_least=0,
    )
    output: Path | None = option(
        None,
        help="report to write; default: evaluation_{SAE's name}.json",
        identity=False,
        suffix=".json",
    )

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the report, and one of older versions with its default."""
        return super().settings() | {"curve": []}


@dataclass(frozen=True, kw_only=True)
class AblateConfig(SeededEffectOptions):
    """Options of `ablate`."""

    sae: Path | None = option(
        None,
        help="SAE whose features to remove too, and whose held-out rollouts to run",
        identity=False,
    )
    features: tuple[int, ...] = option(
        (), help="numbers of the features to remove; default: all that fire"
    )
    verify: int = option(
        64,
        help="features to really remove: those of largest estimated effect; the others keep their "
        "estimate; those of --features are all removed",
        at_least=0,
    )
    part_rollouts: int | None = option(
        None,
        help="largest number of the rollouts on which to remove parts of the adapter, three runs "
        "for each part and rollout; default: all",
        at_least=1,
    )
    greedy: Literal["none", "projection", "layer", "site"] = option(
        "projection", help="kind of part to remove step by step; n parts take n²/2 runs"
    )
    output: Path = output_option("ablation.json")

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        if self.features and self.sae is None:
            raise ConfigError("--features are those of an SAE; name it with --sae")
        require_features(self.features)


@dataclass(frozen=True, kw_only=True)
class AttributeConfig(EffectOptions):
    """Options of `attribute`."""

    sae: Path = sae_option()
    target: TargetKind = option(
        "kl",
        help="number of a prediction to explain: KL from the base, the token's log-probability, or "
        "its logit minus that of the base's likeliest other token",
    )
    rollouts: tuple[int, ...] = option(
        (), help="ids of the rollouts to read; default: held-out ones"
    )
    rollouts_of: Path | None = option(
        None,
        help="feature index whose complete rollouts to compare, all of them, and to explain, "
        "the first --max-rollouts of them",
        identity=False,
    )
    tokens: int = option(
        10, help="tokens to explain in each rollout: those of highest KL", at_least=1
    )
    positions: tuple[int, ...] = option(
        (),
        help="positions in the rollout, from 0, of the tokens to explain instead; needs exactly "
        "one of --rollouts",
    )
    steps: int = option(
        16,
        help="points between base and adapter where gradients are taken; more are more exact",
        at_least=1,
    )
    top: int = option(10, help="features to name for each token", at_least=1)
    check_rollouts: int = option(
        2,
        help="rollouts in which every feature is really removed, for comparison",
        at_least=0,
    )
    output: Path = output_option("attribution.json")

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        if self.rollouts and self.rollouts_of is not None:
            raise ConfigError(
                "--rollouts and --rollouts-of both say which rollouts to read; give one of them"
            )
        if self.positions and len(self.rollouts) != 1:
            raise ConfigError(
                f"--positions needs one rollout, --rollouts names {len(self.rollouts)}; name one"
            )
        if min(self.positions, default=1) < 1:
            raise ConfigError("--positions must be 1 or more: the first token is not predicted")


@dataclass(frozen=True, kw_only=True)
class DirectConfig(ReportOptions):
    """Options of `direct`."""

    sae: Path = sae_option()
    top: int = option(10, help="tokens to name on each side: promoted, and suppressed", at_least=1)
    output: Path = output_option("direct.json")


@dataclass(frozen=True, kw_only=True)
class SteerConfig(SeededEffectOptions):
    """Options of `steer`."""

    sae: Path = sae_option()
    features: tuple[int, ...] = option(help="numbers of the features to steer, together")
    how: Literal["add", "remove", "clamp"] = option(
        "add",
        help="what a dose does: add to the row, remove from it, or raise the value to a minimum",
    )
    doses: tuple[float, ...] = option(
        (0.5, 1.0, 2.0, 4.0),
        help="in units of each feature's largest value on the store; for remove, as a share of its "
        "value",
    )
    where: Literal["generated", "all"] = option(
        "generated", help="tokens to change: those written and the prompt's last one, or all"
    )
    prompts: str | None = option(
        None,
        help="dataset whose prompts to continue; default: the store's held-out rollouts, cut where "
        "the assistant begins",
        identity=False,
        path=True,
    )
    num_prompts: int = option(8, help="prompts to continue", at_least=1)
    samples: int = option(1, help="continuations of each prompt", at_least=1)
    max_new_tokens: int = option(64, help="longest continuation in tokens", at_least=1)
    temperature: float = option(0.0, help="sampling temperature; 0 takes the likeliest token")
    output: Path = output_option("steering.json")

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        require_temperature(self.temperature)
        if not self.features:
            raise ConfigError("--features names no feature; give the numbers of those to steer")
        require_features(self.features)
        if not self.doses or not all(map(math.isfinite, self.doses)):
            raise ConfigError("--doses must be finite numbers")
        if self.samples > 1 and not self.temperature:
            raise ConfigError("--samples above 1 are all the same at --temperature 0; raise it")


@dataclass(frozen=True, kw_only=True)
class EditConfig(SeededEffectOptions):
    """Options of `edit`."""

    sae: Path = sae_option()
    features: tuple[int, ...] = option(help="numbers of the features to edit, together")
    factor: float = option(
        0.0, help="factor that multiplies them: 0 removes them, 1 changes nothing, 2 doubles them"
    )
    tokens: Literal["text", "all"] = option(
        "text", help="tokens to edit: text only, or special tokens and template headers too"
    )
    tolerance: float = option(
        0.05,
        help="largest share of the edit that weights may miss; above it the output is a runtime "
        "patch. 0: always a patch, unless weights miss nothing",
        at_least=0,
    )
    output: Path = option(Path("edited-adapter"), help="folder to write", identity=False)

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        if not self.features:
            raise ConfigError("--features names no feature; give the numbers of those to edit")
        require_features(self.features)
        if not math.isfinite(self.factor):
            raise ConfigError(f"--factor is {self.factor}, expected a finite number")
