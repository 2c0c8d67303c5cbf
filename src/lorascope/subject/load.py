"""Load a base model with its PEFT LoRA adapter, and prove that it really loaded.

1. `find_base` finds the base model's files, `load_tokenizer` the tokenizer that goes with them.
2. `load_subject` loads the base: from safetensors, without code of its own, nothing left at random.
3. Its embeddings are resized where the adapter was trained with others (`embeddings`).
4. The adapter is put in and compared with its file, bit by bit (`attach`).
5. Every module is put in eval mode, and the places that can be read are found (`bottlenecks`).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorascope.errors import AdapterError, ConfigError
from lorascope.hub import find_folder, first_line
from lorascope.sites import SiteLayout
from lorascope.subject.adapter import (
    CONFIG,
    WEIGHTS,
    Adapter,
    inspect_adapter,
    variant_of,
)
from lorascope.subject.attach import attach
from lorascope.subject.bottlenecks import Bottleneck, find_bottlenecks, lay_out, probe
from lorascope.subject.embeddings import fit_embeddings
from lorascope.subject.inventory import unseen_of

__all__ = [
    "CONFIG",
    "DTYPES",
    "WEIGHTS",
    "Adapter",
    "Base",
    "Subject",
    "find_base",
    "inspect_adapter",
    "load_subject",
    "load_tokenizer",
]

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Base:
    """A base model's files; `name` is a hub id or a folder's last part, `digest` identifies it."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Subject:
    """A loaded base model with its adapter on, in eval mode.

    `sites[i]` is the `lora_A` module of site i of `layout`, and rows there are `h @ mixes[i].T`, or
    `h` itself where `mixes[i]` is None. `unhooked` names the adapted places that are active and
    have no rows, `unseen` what the adapter changes without a bottleneck, `quantized` the method by
    which the base is quantised. `device` is where token ids go. `tokenizer` is the adapter's own
    where its folder has one, else the base model's.
    """

    model: nn.Module
    tokenizer: Any
    layout: SiteLayout
    sites: tuple[nn.Module, ...]
    adapter: Adapter
    base: Base
    device: torch.device
    dtype: torch.dtype
    mixes: tuple[Tensor | None, ...]
    unhooked: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    quantized: str | None = None

    @property
    def causal(self) -> Any:
        """The causal language model inside PEFT's wrappers, its layers adapted."""
        return self.model.get_submodule("base_model.model")

    @cached_property
    def backbone(self) -> Callable[..., Any]:
        """The part to run: without the lm_head, unless the adapter sits on it."""
        return _backbone(self.causal, self.sites)

    @property
    def max_length(self) -> int | None:
        """Longest text in tokens that the model was made for, or None where it does not say."""
        return getattr(self.causal.config, "max_position_embeddings", None)


def find_base(adapter: Adapter, base_model: str | None) -> Base:
    """Find the base model asked for, else the one that the adapter names, in full or relatively."""
    named = base_model or adapter.config.get("base_model_name_or_path")
    if not named:
        raise AdapterError(
            f"{adapter.path / CONFIG} names no base model; give one with --base-model"
        )
    beside = adapter.path / str(named)
    place = str(beside.resolve()) if not base_model and beside.is_dir() else str(named)
    patterns = ["*.json", "*.safetensors", "*token*", "*.jinja", "merges.txt"]
    try:
        folder = find_folder(place, "base model", patterns)
    except AdapterError as error:
        raise AdapterError(f"{error}; --base-model names the base of {adapter.name}") from error
    if not (folder / "config.json").is_file():
        raise AdapterError(f"base model {place} has no config.json; give the folder of a model")
    return Base(folder.name if Path(place).exists() else place, folder, _digest_base(folder))


def load_tokenizer(adapter: Adapter, base: Base) -> Any:
    """Return the adapter's own tokenizer where its folder has one, else the base model's."""
    own = (adapter.path / "tokenizer_config.json").is_file()
    source = str(adapter.path if own else base.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise AdapterError(f"no tokenizer in {source} ({first_line(error)})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise AdapterError(f"the tokenizer of {source} has no fast form, which offsets need")
    return tokenizer


def load_subject(
    adapter: Adapter,
    base: Base,
    tokenizer: Any,
    device: torch.device,
    dtype: str,
    *,
    gauge: str = "auto",
    skip_unhookable: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> Subject:
    """Load base and adapter, and check everything that the module's text names.

    `dtype` is `auto` (float32 on the CPU, else what the checkpoint says) or a key of `DTYPES`.
    `device_map` spreads the model over devices as transformers does, and `device` then only
    decides the `auto` dtype. Raises AdapterError where the adapter has LoRA that cannot be read,
    unless `skip_unhookable`: that LoRA is then active and listed in `unhooked`.
    """
    quantized = _quantization(base.path)
    if quantized and device_map is None:  # a quantised model cannot be moved after loading
        device_map = {"": str(device)}
    causal = _load_base(base, device, dtype, device_map)
    fit_embeddings(causal, adapter, tokenizer)
    model = attach(causal, adapter, base.name)
    if device_map is None:
        model.to(device)
    model.eval()
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise AdapterError(
            f"module {training[0]} stays in training mode: dropout would change rows"
        )
    embeddings = causal.get_input_embeddings()
    place = _place_of(embeddings)
    name = str(model.active_adapter)
    found, unhooked = find_bottlenecks(causal, name)
    unhooked |= probe(found, _backbone(causal, [layer.read for layer in found]), place)
    found = _readable(found, unhooked, adapter, skip_unhookable)
    layout, sites, mixes = lay_out(found, adapter, gauge)
    unseen = unseen_of(adapter)
    if unseen:
        more = f" and {len(unseen) - 5} more" if len(unseen) > 5 else ""
        log.info("%s changes more than rows show: %s%s", adapter.name, ", ".join(unseen[:5]), more)
    return Subject(
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        sites=sites,
        adapter=adapter,
        base=base,
        device=place,
        dtype=next(p.dtype for p in embeddings.parameters() if p.is_floating_point()),
        mixes=mixes,
        unhooked=tuple(unhooked),
        unseen=unseen,
        quantized=quantized,
    )


def _load_base(
    base: Base, device: torch.device, dtype: str, device_map: str | dict[str, Any] | None
) -> Any:
    """Return the base model, every tensor of it from its files."""
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype is {dtype}, expected auto, {', '.join(DTYPES)}")
    if (base.path / CONFIG).is_file():  # transformers would load that adapter as well, silently
        raise AdapterError(f"base model {base.path} is itself an adapter; give a full model")
    wanted = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else "auto")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=wanted,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own (auto_map), which lorascope does not run"
        raise AdapterError(f"base model {base.path} cannot be loaded ({reason})") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise AdapterError(
            f"base model {base.path} lacks {len(missing)} tensors ({', '.join(missing[:5])}); "
            "give a complete checkpoint"
        )
    return model


def _readable(
    found: list[Bottleneck], unhooked: dict[str, str], adapter: Adapter, skip: bool
) -> list[Bottleneck]:
    """Return the layers that have rows. Raises AdapterError where others are not to be skipped."""
    if unhooked:
        shown = [f"{path}: {reason}" for path, reason in list(unhooked.items())[:5]]
        more = f" and {len(unhooked) - 5} more" if len(unhooked) > 5 else ""
        text = f"{len(unhooked)} LoRA modules without a row per token ({'; '.join(shown)}{more})"
        if not skip:
            raise AdapterError(
                f"adapter {adapter.name} has {text}; --skip-unhookable leaves them unread"
            )
        log.warning("%s: left unread %s", adapter.name, text)
    readable = [layer for layer in found if layer.path not in unhooked]
    if not readable:
        raise AdapterError(f"adapter {adapter.name} adapts no module of this base model")
    variant = variant_of(adapter.config)
    if variant.startswith("dora"):
        log.warning(
            "%d sites of %s are DoRA: their output is rescaled, not base + scale·B·A·x",
            *(len(readable), adapter.name),
        )
    return readable


def _backbone(causal: Any, sites: Iterable[nn.Module]) -> Callable[..., Any]:
    backbone = getattr(causal, str(causal.base_model_prefix), causal)
    inside = set(backbone.modules())
    return backbone if all(site in inside for site in sites) else causal


def _place_of(embeddings: nn.Module) -> torch.device:
    """Return where token ids go: the embeddings' device, or where offloaded ones are brought to."""
    hooks = [getattr(module, "_hf_hook", None) for module in embeddings.modules()]
    for hook in hooks:
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)  # type: ignore[union-attr]  # not None
    return next(embeddings.parameters()).device


def _quantization(folder: Path) -> str | None:
    """Return the method by which a base model's config says that it is quantised."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{folder / 'config.json'} is not JSON: {error}") from error
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in nested:
        found = part.get("quantization_config")
        if isinstance(found, dict):
            return str(found.get("quant_method", "unnamed"))
    return None


def _digest_base(folder: Path) -> str:
    """Identify a base model by its config and the headers' sizes: its weights may be 60 GB."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()
