"""Load a base model with its PEFT LoRA adapter, and prove that it really loaded.

1. `load_tokenizer` finds the tokenizer that goes with adapter and base (`base`).
2. `load_subject` loads the base from safetensors, or from a GGUF file, whose quantised weights it
   widens: no custom code, no tensor left random, rotary positions as its config says (`rotary`).
3. Embeddings are resized if the adapter was trained with a different number (`attach`).
4. The adapter is attached and compared with its file, bit by bit (`attach`).
5. Every module is set to eval mode, and the sites that can be read are found (`bottlenecks`).
"""

import contextlib
import copy
import importlib.util
import io
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from lorascope import runtime
from lorascope.errors import AdapterError, first_line
from lorascope.hub import read_json_object
from lorascope.sites import SiteLayout
from lorascope.subject.adapter import CONFIG, Adapter, changes_outside_lora, lora_kind
from lorascope.subject.attach import attach, changes_base, fit_prefix
from lorascope.subject.base import Base
from lorascope.subject.bottlenecks import Bottleneck, find_bottlenecks, make_layout, probe
from lorascope.subject.embeddings import n_embeddings, resize_embeddings
from lorascope.subject.rotary import forget_lengths, length_class, require_rotary

log = logging.getLogger(__name__)

_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "tekken.json")
_OWN_HINT = "; without tokenizer_config.json there, the base model's tokenizer is used"
_GGUF_HINT = "; is it damaged, or no causal language model?"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A loaded base model with its adapter on, in eval mode.

    `sites[i]` is the `lora_A` module of site i of `layout`. Its rows are `h @ mixes[i].T`, or `h`
    if `mixes[i]` is None. `unhooked` names adapted modules that are active but have no rows,
    `unseen` what the adapter changes outside LoRA, `quantized` the base's quantisation method.
    Token ids go to `device`. `tokenizer` is the adapter's own if its folder has one, else the base
    model's.
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
        """The part to run: without the lm_head, unless the adapter is on it."""
        return _backbone(self.causal, self.sites)

    @cached_property
    def length_class(self) -> Callable[[int], int]:
        """A function from a text's length to a number; only texts of one number share a batch."""
        return length_class(self.causal)

    @property
    def max_length(self) -> int | None:
        """The model's context in tokens, or None if its config does not say."""
        return getattr(self.causal.config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(adapter: Adapter, base: Base) -> Any:
    """Return the adapter's own tokenizer if its folder has one, else the base model's."""
    own = (adapter.path / "tokenizer_config.json").is_file()
    files = {"pretrained_model_name_or_path": str(adapter.path)} if own else base.source
    source = adapter.path if own else base.location
    missing = "its vocabulary, such as tokenizer.json, is missing" + _OWN_HINT * own
    try:
        tokenizer = AutoTokenizer.from_pretrained(**files, use_fast=True, trust_remote_code=False)
        tokenizer("a b")  # some settings are wrong only now
    except Exception as error:  # transformers raises anything at files of any content
        reason = first_line(error) + _GGUF_HINT * (base.gguf is not None and not own)
        alone = (source / "tokenizer.model").is_file() and not (source / "tokenizer.json").is_file()
        if alone and importlib.util.find_spec("sentencepiece") is None:
            reason = (
                "it has a tokenizer.model alone, which needs the packages sentencepiece and "
                "protobuf; install them, or add a tokenizer.json"
            )
        elif source.is_dir() and not any(any(source.glob(name)) for name in _VOCABULARIES):
            reason = missing
        raise AdapterError(f"no tokenizer in {source} ({reason})") from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        raise AdapterError(f"no tokenizer in {source} ({missing})")
    if not getattr(tokenizer, "is_fast", False):
        raise AdapterError(
            f"the tokenizer of {source} is slow; lorascope needs a fast one for offsets"
        )
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
    causal: Any = None,
) -> Subject:
    """Load base and adapter, and check both as the module's docstring says.

    `dtype` is `auto` (float32 on the CPU, else the checkpoint's) or a key of `DTYPES`. `device_map`
    spreads the model over devices as transformers does; `device` then only decides the `auto`
    dtype. Raises AdapterError if some of the adapter's LoRA cannot be read. With `skip_unhookable`,
    that LoRA stays active and is listed in `unhooked`. `causal` is the base's model if it is loaded
    already; it becomes the subject's.
    """
    quantized = None if base.gguf else _quantization(base.path)
    if quantized and device_map is None:  # a quantised model cannot move after loading
        device_map = {"": str(device)}
    if causal is None:
        causal = _load_base(base, device, dtype, device_map)
    adapter = fit_prefix(causal, adapter)
    resize_embeddings(causal, adapter, tokenizer)
    model = attach(causal, adapter, base.name)
    if device_map is None:
        model.to(device)
    model.eval().requires_grad_(False)  # a graph for them would take as much memory as they do
    forget_lengths(causal)
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise AdapterError(
            f"module {training[0]} stays in training mode, where dropout changes rows"
        )
    quantized = "gguf" if base.gguf else quantized
    return find_sites(model, tokenizer, adapter, base, gauge, skip_unhookable, quantized)


def find_sites(
    model: Any,
    tokenizer: Any,
    adapter: Adapter,
    base: Base,
    gauge: str,
    skip_unhookable: bool,
    quantized: str | None,
) -> Subject:
    """Do step 5 with a model whose modules are in eval mode: return it as a subject."""
    causal = model.get_submodule("base_model.model")
    embeddings = causal.get_input_embeddings()
    input_device = _device_of_inputs(embeddings)
    name = str(model.active_adapter)
    bottlenecks, unhooked = find_bottlenecks(causal, name)
    backbone = _backbone(causal, [layer.read for layer in bottlenecks])
    unhooked |= probe(bottlenecks, backbone, input_device)
    bottlenecks = _readable(bottlenecks, unhooked, adapter, skip_unhookable)
    layout, sites, mixes = make_layout(bottlenecks, adapter, gauge)
    unseen = changes_outside_lora(adapter)
    if unseen:
        log.info("%s also changes the model outside LoRA: %s", adapter.name, _shown(unseen, ", "))
    return Subject(
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        sites=sites,
        adapter=adapter,
        base=base,
        device=input_device,
        dtype=next(p.dtype for p in embeddings.parameters() if p.is_floating_point()),
        mixes=mixes,
        unhooked=tuple(unhooked),
        unseen=unseen,
        quantized=quantized,
    )


class SharedBase:
    """Loads several adapters of one base, whose weights are in memory once where that is possible.

    Each subject has modules of its own, with the same base weights in them. An adapter that changes
    weights of the base, or the number of its embeddings, gets a base of its own; so does every
    adapter of a quantised base, and with a device map.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._causal: Any = None

    def load(
        self,
        adapter: Adapter,
        base: Base,
        tokenizer: Any,
        device: torch.device,
        dtype: str,
        *,
        device_map: str | dict[str, Any] | None = None,
        **options: Any,
    ) -> Subject:
        """Load as `load_subject` does."""
        given: dict[str, Any] = {"device_map": device_map, **options}
        quantized = None if base.gguf else _quantization(base.path)
        if quantized or device_map is not None or changes_base(adapter):
            return load_subject(adapter, base, tokenizer, device, dtype, **given)
        if self._key != (key := (base.digest, str(device), dtype)):
            self._key, self._causal = key, _load_base(base, device, dtype, None).to(device)
        if n_embeddings(self._causal, adapter, tokenizer) is not None:
            return load_subject(adapter, base, tokenizer, device, dtype, **given)
        tensors = itertools.chain(self._causal.parameters(), self._causal.buffers())
        twin = copy.deepcopy(self._causal, {id(tensor): tensor for tensor in tensors})
        return load_subject(adapter, base, tokenizer, device, dtype, causal=twin, **given)


def _load_base(
    base: Base, device: torch.device, dtype: str, device_map: str | dict[str, Any] | None
) -> Any:
    """Return the base model, with every tensor loaded from its files."""
    if (base.path / CONFIG).is_file():  # transformers would silently load that adapter too
        raise AdapterError(f"base model {base.path} is an adapter; give a full model")
    wanted = {"auto": torch.float32 if device.type == "cpu" else "auto", **DTYPES}[dtype]
    options: dict[str, Any] = {"use_safetensors": True}
    if base.gguf:  # packed weights cannot carry a LoRA
        options = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    quiet: Any = contextlib.nullcontext()
    if not runtime.shows_bars():
        disable_progress_bar()
        # The bar of widening a GGUF cannot be turned off.
        quiet = contextlib.redirect_stderr(io.StringIO()) if base.gguf else quiet
    try:
        with quiet:
            loaded: Any = base.model_class().from_pretrained(
                **base.source,
                dtype=wanted,
                device_map=device_map,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # transformers raises anything at files of any content
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs custom code (auto_map), which lorascope does not run"
        reason += _GGUF_HINT * (base.gguf is not None)
        raise AdapterError(f"base model {base.location} cannot be loaded ({reason})") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise AdapterError(
            f"base model {base.location} lacks {len(missing)} tensors ({', '.join(missing[:5])}); "
            "give a complete checkpoint"
        )
    if not base.gguf:
        require_rotary(model, base.path)
    # The rest of generation_config.json, such as repetition_penalty, would act on sampled texts.
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    model.generation_config = GenerationConfig(eos_token_id=ends)
    return model


def _readable(
    bottlenecks: list[Bottleneck], unhooked: dict[str, str], adapter: Adapter, skip: bool
) -> list[Bottleneck]:
    """Return the layers that have rows. Raises AdapterError if others exist, unless `skip`."""
    if unhooked:
        shown = _shown([f"{path}: {reason}" for path, reason in unhooked.items()], "; ")
        text = f"{len(unhooked)} LoRA modules without a row per token ({shown})"
        if not skip:
            raise AdapterError(
                f"adapter {adapter.name} has {text}; --skip-unhookable continues without them"
            )
        log.warning("%s: continuing without %s", adapter.name, text)
    readable = [layer for layer in bottlenecks if layer.path not in unhooked]
    if not readable:
        raise AdapterError(
            f"adapter {adapter.name} adapts no module of this base model that has rows"
        )
    if lora_kind(adapter.config).startswith("dora"):
        log.warning(
            "%d sites of %s are DoRA: their output is rescaled, not base + scale·B·A·x",
            len(readable),
            adapter.name,
        )
    return readable


def _shown(names: Sequence[str], separator: str) -> str:
    """Return the first five of some names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return separator.join(names[:5]) + more


def _backbone(causal: Any, sites: Iterable[nn.Module]) -> Callable[..., Any]:
    backbone = getattr(causal, str(causal.base_model_prefix), causal)
    inside = set(backbone.modules())
    return backbone if all(site in inside for site in sites) else causal


def _device_of_inputs(embeddings: nn.Module) -> torch.device:
    """Return where token ids go: the embeddings' device, or where offloaded embeddings run."""
    for module in embeddings.modules():
        device: Any = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(embeddings.parameters()).device


def _quantization(folder: Path) -> str | None:
    """Return the quantisation method in a base model's config, or None."""
    config = read_json_object(folder / "config.json")
    nested = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in nested:
        quantization = part.get("quantization_config")
        if isinstance(quantization, dict):
            return str(quantization.get("quant_method", "unnamed"))
    return None
