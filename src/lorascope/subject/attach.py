"""Put an adapter into its base model, and prove that it is really there.

1. The config's keys are compared with those that the installed PEFT knows: PEFT drops the others
   without a word.
2. Fresh LoRA modules are put into the base, and the tensors that they need are compared with those
   in the file, by name and shape. PEFT alone would leave a missing tensor at its random start.
   Names that a known damage explains are repaired, and that is said.
3. After loading, every tensor equals the file's, bit by bit, in the type that the model keeps.
"""

import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.hub import first_line
from lorascope.subject.adapter import (
    CONFIG,
    WEIGHTS,
    Adapter,
    variant_of,
    why_refused,
)
from lorascope.subject.names import match_names

log = logging.getLogger(__name__)

# Initialisations that take from the base what they put into A and B.
_ALTERING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def attach(base: nn.Module, adapter: Adapter, base_name: str) -> PeftModel:
    """Return the base with the adapter in it, loaded as `PeftModel.from_pretrained` does.

    Raises AdapterError unless the file holds exactly what the model needs.
    """
    refused = why_refused(adapter.config)
    if refused:
        raise AdapterError(f"adapter {adapter.name} has no rows to read: {refused}")
    config = _config_of(adapter)
    _warn_of_altered_base(base, adapter)
    model = _wrap(base, config, adapter, base_name)
    _move_out_of_offload(model, adapter)
    tensors = _fit(model, load_file(adapter.path / WEIGHTS), adapter, base_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(model, dict(tensors))
    _require_equal(model, tensors, adapter)
    _fix_dora_norms(model)
    return model


def _config_of(adapter: Adapter) -> LoraConfig:
    """Make PEFT's config of the file's; a key that PEFT does not know must say nothing."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    unsaid = {"runtime_config", "peft_version"} - (known - {"runtime_config"})
    data = {key: value for key, value in adapter.config.items() if key not in unsaid}
    unknown = sorted(data.keys() - known)
    made_with = f"PEFT {adapter.config.get('peft_version') or 'of an unnamed version'}"
    said = [key for key in unknown if not _is_empty(data[key])]
    if said:
        raise AdapterError(
            f"{adapter.path / CONFIG} sets {', '.join(said)}, which the installed PEFT "
            f"{peft.__version__} does not know; it was made with {made_with}; install that"
        )
    if unknown:
        log.info("left out %s of %s, empty and unknown to PEFT", ", ".join(unknown), CONFIG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(**{key: data[key] for key in data.keys() - set(unknown)})
    except (TypeError, ValueError, ImportError) as error:
        raise AdapterError(
            f"PEFT {peft.__version__} refuses {adapter.path / CONFIG}, which was made with "
            f"{made_with} ({first_line(error)})"
        ) from error
    config.inference_mode = True
    return config


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _is_altering(adapter: Adapter) -> bool:
    return str(adapter.config.get("init_lora_weights")).lower().startswith(_ALTERING)


def _warn_of_altered_base(base: nn.Module, adapter: Adapter) -> None:
    if not _is_altering(adapter):
        return
    how = f"was initialised with {adapter.config['init_lora_weights']}, which alters the base"
    if any(parameter.is_meta for parameter in base.parameters()):
        raise AdapterError(
            f"adapter {adapter.name} {how}, and the base is offloaded; keep it on devices with "
            "another --device-map"
        )
    log.warning("%s %s: rows hold for the base that PEFT reconstructs", adapter.name, how)


def _wrap(base: nn.Module, config: LoraConfig, adapter: Adapter, base_name: str) -> PeftModel:
    try:
        with _fixed_randomness(base), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel(base, config)  # type: ignore[arg-type]  # any nn.Module will do
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise AdapterError(
            f"adapter {adapter.name} does not fit base model {base_name}: {first_line(error)}"
        ) from error


@contextmanager
def _fixed_randomness(base: nn.Module) -> Iterator[None]:
    """Seed what PEFT draws, for this block only: some initialisations alter the base with it."""
    devices = sorted({p.device.index or 0 for p in base.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def _move_out_of_offload(model: PeftModel, adapter: Adapter) -> None:
    """Keep the LoRA of offloaded modules on the device that these run on: it is small."""
    for path, layer in model.named_modules():
        held = [getattr(layer, part, None) for part in _PARTS]
        meta = [
            part
            for part in held
            if isinstance(part, nn.Module) and any(p.is_meta for p in part.parameters())
        ]
        if not meta:
            continue
        hook = getattr(layer.get_base_layer(), "_hf_hook", None)  # accelerate's
        plain = variant_of(adapter.config) == "lora" and not hasattr(layer, "parameter_name")
        if hook is None or not plain:
            raise AdapterError(
                f"{path} is offloaded, and this kind of LoRA needs its base weight at hand; keep "
                "it on a device with another --device-map"
            )
        for part in meta:
            part.to_empty(device=hook.execution_device)


def _fit(
    model: PeftModel, tensors: dict[str, Tensor], adapter: Adapter, base_name: str
) -> dict[str, Tensor]:
    """Return the file's tensors under the names that the model needs, or raise AdapterError."""
    expected = {name: tuple(tensor.shape) for name, tensor in _state_of(model).items()}
    state = _state_of(model, embeddings=True)
    allowed = {name: tuple(tensor.shape) for name, tensor in state.items()}
    match = match_names(tensors, expected, allowed)
    if match is None:
        fused = _fuse_experts(model, tensors)
        if set(expected) <= set(fused) <= set(allowed):
            log.info("%s was made for experts of their own; PEFT fused them", adapter.name)
            return fused
        raise _mismatch(set(tensors), set(expected), set(allowed), adapter)
    names, repairs = match
    if repairs:
        log.info("renamed %d tensors of %s %s", len(names), adapter.name, ", ".join(repairs))
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    wrong = sorted(name for name in renamed if tuple(renamed[name].shape) != allowed[name])
    if wrong:
        name = wrong[0]
        raise AdapterError(
            f"adapter {adapter.name} is for another base than {base_name}: {name} is "
            f"{tuple(renamed[name].shape)} in the file, {allowed[name]} in the model "
            f"({len(wrong)} such tensors)"
        )
    return renamed


def _fuse_experts(model: PeftModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what PEFT makes of an adapter whose experts transformers now keeps in one tensor."""
    module = "peft.utils.transformers_weight_conversion"
    if importlib.util.find_spec(module) is None:  # an older PEFT
        return tensors
    convert = importlib.import_module(module).convert_peft_adapter_state_dict_for_transformers
    try:
        return convert(model, model.peft_config["default"], dict(tensors), "default")
    except ValueError:  # the names are of no form that PEFT converts: they stay as they are
        return tensors


def _mismatch(
    found: set[str], expected: set[str], allowed: set[str], adapter: Adapter
) -> AdapterError:
    missing, extra = sorted(expected - found), sorted(found - allowed)
    kind, names = ("lacks", missing) if missing else ("has unknown", extra)
    task = adapter.config.get("task_type")
    cause = "another base model, a custom adapter name or a wrapper's prefix are likely causes"
    if task not in (None, "CAUSAL_LM"):
        cause = f"it was trained for the task {task}, lorascope loads causal language models"
    return AdapterError(
        f"adapter {adapter.name} {kind} {len(names)} tensors ({', '.join(names[:5])}); {cause}"
    )


def _require_equal(model: PeftModel, tensors: dict[str, Tensor], adapter: Adapter) -> None:
    for name, loaded in _state_of(model, embeddings=True).items():
        if name not in tensors:
            continue
        if loaded.is_meta:
            raise AdapterError(
                f"{name} lies in an offloaded module, where it cannot be loaded; keep the module "
                "on a device with another --device-map"
            )
        if not tensors[name].isfinite().all():
            raise AdapterError(f"{name} of {adapter.name} is not finite: the adapter is damaged")
        if not torch.equal(loaded.cpu(), tensors[name].to(loaded.dtype)):
            raise AdapterError(f"after loading, {name} differs from the file of {adapter.name}")
    written = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if written and not any(tensor.any() for tensor in written):
        log.warning("every lora_B of %s is zero: the adapter has no effect", adapter.name)


def _fix_dora_norms(model: PeftModel) -> None:
    """Let DoRA keep `‖W + scale·B·A‖`, which is constant in eval mode.

    PEFT computes it anew in every forward by sending the identity through `lora_A`, whose hooks
    would take that for texts.
    """
    layers: Any = model.modules()
    for layer in layers:
        norms = getattr(layer, "lora_magnitude_vector", {})
        for name in norms:
            dora = norms[name]
            is_matrix = name in layer.lora_A and layer.lora_A[name].weight.ndim == 2
            if not is_matrix or not hasattr(dora, "get_lora_weight"):
                continue
            read, write = layer.lora_A[name], layer.lora_B[name]
            whole = dequantize_module_weight(layer.get_base_layer()).to(read.weight.dtype)
            with torch.no_grad():
                product = dora.get_lora_weight(lora_A=read, lora_B=write)
                norm = dora.get_weight_norm(whole, product, layer.scaling[name])
            dora.register_buffer("constant_norm", norm, persistent=False)
            dora.get_lora_weight = lambda dora=dora, **_: dora.constant_norm  # not looked at
            dora.get_weight_norm = lambda dora=dora, **_: dora.constant_norm


def _state_of(model: PeftModel, *, embeddings: bool = False) -> dict[str, Tensor]:
    """Return the adapter's tensors as PEFT would save them, with or without the embeddings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model_state_dict(model, save_embedding_layers=embeddings)
