"""Attach an adapter to its base model, and prove that it is really loaded.

1. Compare the config's keys with those that the installed PEFT knows. PEFT silently drops others.
2. Add fresh LoRA modules to the base, and compare the tensors they need with those in the file, by
   name and shape. PEFT alone would leave a missing tensor at its random initialisation.
3. Mend tensor names that a wrapper, an older PEFT or a manual edit changed (`_match_names`), and
   log it. This counts only if the mended names are exactly the needed ones.
4. After loading, every tensor must equal the file's, bit by bit, in the dtype that the model keeps.

`fit_prefix` comes before, and then `embeddings.resize_embeddings`.
"""

import dataclasses
import logging
import re
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from safetensors.torch import save
from torch import Tensor, nn

from lorascope.errors import AdapterError, first_line
from lorascope.subject.adapter import (
    CONFIG,
    Adapter,
    base_path,
    by_pattern,
    changes_outside_lora,
    lora_kind,
    lora_tensors,
    unsupported_reason,
)

log = logging.getLogger(__name__)

# Initialisations that move a part of the base weights into A and B.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PREFIX = "base_model.model."
_IN_LAYERS = re.compile(r"((?:.*?\.)??)(\w+)\.\d+\.")
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_PARAMETERS = "lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta"


def attach(base: nn.Module, adapter: Adapter, base_name: str) -> PeftModel:
    """Return the base with the adapter attached, loaded as `PeftModel.from_pretrained` does.

    Raises AdapterError unless the file holds exactly what the model needs.
    """
    unsupported = unsupported_reason(adapter.config)
    if unsupported:
        raise AdapterError(f"adapter {adapter.name} has no rows to read: {unsupported}")
    config = _peft_config(adapter)
    _warn_if_base_changes(base, adapter)
    model = _add_lora_modules(base, config, adapter, base_name)
    _move_lora_out_of_offload(model, adapter)
    tensors = _match_tensors(model, adapter.tensors(), adapter, base_name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(model, dict(tensors))
    _require_equal(model, tensors, adapter)
    _fix_dora_norms(model)
    return model


def fit_prefix(base: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter under the base's names, if these differ from its own by one prefix.

    Examples are adapters of `model.language_model.layers` (a model that also sees images) or of
    `layers` (a bare backbone) on `model.layers`. PEFT would leave them at their random start.
    Returns the adapter as it is if its names fit, or if not exactly one prefix gives modules of
    the base with fitting shapes.
    """
    parts, modules = lora_tensors(adapter.shapes), dict(base.named_modules())
    starts = {match.groups() for path in parts if (match := _IN_LAYERS.match(path))}
    is_whole = adapter.config.get("target_parameters") or adapter.config.get("use_bdlora")
    if len(starts) != 1 or is_whole or all(path in modules for path in parts):
        return adapter
    ((old, layers),) = starts

    def renamed(path: str, new: str) -> str:
        return new + path.removeprefix(old) if path.startswith(old) else path

    candidates = [
        path.removesuffix(layers) for path in modules if f".{path}".endswith(f".{layers}")
    ]
    fitting = [
        new
        for new in candidates
        if all(_fits(modules.get(renamed(path, new)), adapter, parts[path]) for path in parts)
    ]
    if len(fitting) != 1:
        return adapter
    (new,) = fitting
    log.info("%s was trained on %s: read as %s", adapter.name, old + layers, new + layers)
    names = {name: _PREFIX + renamed(base_path(name), new) for name in adapter.shapes}
    config = dict(adapter.config)
    for key in ("rank_pattern", "alpha_pattern"):
        if patterns := config.get(key):
            default = config.get("r" if key == "rank_pattern" else "lora_alpha", 8)
            values = {path: by_pattern(patterns, path, default) for path in parts}
            config[key] = {re.escape(renamed(path, new)): value for path, value in values.items()}
    config["target_modules"] = sorted(renamed(path, new) for path in parts)
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        config.pop(key, None)
    return dataclasses.replace(
        adapter,
        config=config,
        shapes={names[name]: shape for name, shape in adapter.shapes.items()},
        converted=save({names[name]: tensor for name, tensor in adapter.tensors().items()}),
    )


def _fits(module: nn.Module | None, adapter: Adapter, parts: dict[str, str]) -> bool:
    """Return whether a module of the base has the shape of a LoRA."""
    if module is None or "lora_A" not in parts or "lora_B" not in parts:
        return module is not None
    a, b = adapter.shapes[parts["lora_A"]], adapter.shapes[parts["lora_B"]]
    sizes: list[Any] = [getattr(module, f"{side}_features", None) for side in ("in", "out")]
    if None in sizes:
        weight = getattr(module, "weight", None)
        sizes = list(weight.shape) if isinstance(weight, Tensor) else []
    return len(a) != 2 or sorted(sizes) == sorted((a[1], b[0]))


def _peft_config(adapter: Adapter) -> LoraConfig:
    """Return the file's config as PEFT's. Keys that PEFT does not know must be empty."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    data = {key: value for key, value in adapter.config.items() if key != "runtime_config"}
    unknown = sorted(data.keys() - known)
    made_with = f"PEFT {adapter.config.get('peft_version') or 'of an unnamed version'}"
    not_empty = [key for key in unknown if not _is_empty(data[key])]
    if not_empty:
        raise AdapterError(
            f"{adapter.path / CONFIG} sets {', '.join(not_empty)}, which the installed PEFT "
            f"{peft.__version__} does not know; install {made_with}, which made the adapter"
        )
    if unknown:
        log.info("ignored %s of %s: empty, and unknown to PEFT", ", ".join(unknown), CONFIG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(**{key: data[key] for key in data.keys() - set(unknown)})
    except Exception as error:  # PEFT raises anything at values that it does not expect
        raise AdapterError(
            f"PEFT {peft.__version__} rejects {adapter.path / CONFIG}, which was made with "
            f"{made_with} ({first_line(error)})"
        ) from error
    config.inference_mode = True
    return config


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def changes_base(adapter: Adapter) -> bool:
    """Return whether an adapter changes weights of its base, or trained some of them itself."""
    init = str(adapter.config.get("init_lora_weights"))
    return init.lower().startswith(_BASE_CHANGING_INITS) or bool(changes_outside_lora(adapter))


def _warn_if_base_changes(base: nn.Module, adapter: Adapter) -> None:
    init = str(adapter.config.get("init_lora_weights"))
    if not init.lower().startswith(_BASE_CHANGING_INITS):
        return
    how = f"was initialised with {init}, which changes the base weights"
    if any(parameter.is_meta for parameter in base.parameters()):
        raise AdapterError(
            f"adapter {adapter.name} {how}, and the base is offloaded; keep it on devices with "
            "a different --device-map"
        )
    log.warning("%s %s: rows are valid for the base that PEFT reconstructs", adapter.name, how)


def _add_lora_modules(
    base: nn.Module, config: LoraConfig, adapter: Adapter, base_name: str
) -> PeftModel:
    devices = sorted({p.device.index or 0 for p in base.parameters() if p.is_cuda})
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            torch.manual_seed(0)  # some initialisations change the base
            warnings.simplefilter("ignore")
            return PeftModel(base, config)  # type: ignore[arg-type]  # PEFT accepts any nn.Module
    except Exception as error:  # PEFT raises anything at values that it does not expect
        raise AdapterError(
            f"adapter {adapter.name} does not fit base model {base_name}: {first_line(error)}"
        ) from error


def _move_lora_out_of_offload(model: PeftModel, adapter: Adapter) -> None:
    """Keep the LoRA of offloaded modules on the device where these modules run: it is small."""
    for path, layer in model.named_modules():
        modules = [getattr(layer, part, None) for part in _PARTS]
        meta = [
            part
            for part in modules
            if isinstance(part, nn.Module) and any(p.is_meta for p in part.parameters())
        ]
        if not meta:
            continue
        hook = getattr(layer.get_base_layer(), "_hf_hook", None)  # accelerate's
        plain = lora_kind(adapter.config) == "lora" and not hasattr(layer, "parameter_name")
        if hook is None or not plain:
            raise AdapterError(
                f"{path} is offloaded, but this kind of LoRA needs its base weight in memory; keep "
                "it on a device with a different --device-map"
            )
        for part in meta:
            part.to_empty(device=hook.execution_device)


def _match_tensors(
    model: PeftModel, tensors: dict[str, Tensor], adapter: Adapter, base_name: str
) -> dict[str, Tensor]:
    """Return the file's tensors under the names that the model needs, or raise AdapterError."""
    expected, allowed = _state_of(model), _state_of(model, embeddings=True)
    names = _match_names(tensors, expected, allowed)
    if names is None:
        fused = _fuse_experts(model, tensors)
        if expected.keys() <= fused.keys() <= allowed.keys():
            log.info("%s was made for separate experts; PEFT fused them", adapter.name)
            return fused
        missing, extra = sorted(expected.keys() - tensors), sorted(tensors.keys() - allowed)
        listed = ", ".join((missing or extra)[:5])
        in_part = len(expected) - len(missing)
        half = (
            f"; only {in_part} of the {len(expected)} tensors that the model needs are in the file"
            + (f", and {len(extra)} of the file match nothing ({extra[0]})" if extra else "")
            + ": a program that does not check would apply a part of it"
            if missing and in_part
            else ""
        )
        raise AdapterError(
            f"adapter {adapter.name} {'lacks' if missing else 'has unknown'} "
            f"{len(missing or extra)} tensors ({listed}){half}; likely causes: a different base "
            "model, a custom adapter name, a wrapper's prefix"
        )
    changed = [(old, new) for old, new in names.items() if old != new]
    if changed:
        log.info(
            "renamed %d tensors of %s, such as %s to %s", len(changed), adapter.name, *changed[0]
        )
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    renamed = _in_current_layout(model, renamed, adapter)
    wrong = sorted(name for name in renamed if renamed[name].shape != allowed[name].shape)
    if wrong:
        name = wrong[0]
        raise AdapterError(
            f"adapter {adapter.name} does not belong to base {base_name}: {name} is "
            f"{tuple(renamed[name].shape)} in the file, {tuple(allowed[name].shape)} in the model "
            f"({len(wrong)} such tensors)"
        )
    return renamed


def _in_current_layout(
    model: PeftModel, tensors: dict[str, Tensor], adapter: Adapter
) -> dict[str, Tensor]:
    """Return the tensors with LoRA on fused experts as PEFT keeps it since 0.19.

    Before, `A` had the width of the parameter's second axis and `B` that of the third; now `B` and
    `A` do. Where both are as wide, only the version tells, and PEFT would load the transpose.
    """
    made_with = str(adapter.config.get("peft_version") or "")
    version = tuple(int(number) for number in re.findall(r"\d+", made_with)[:2])
    tensors, layers = dict(tensors), dict[str, Any](model.named_modules())
    for path, layer in layers.items():
        to_a, to_b = (f"{path}.lora_{part}.weight" for part in "AB")
        if getattr(layer, "num_experts", 1) == 1 or not {to_a, to_b} <= tensors.keys():
            continue
        if getattr(layer.get_base_layer(), "is_transposed", False):
            continue  # its layout never changed
        a, b, n = tensors[to_a], tensors[to_b], layer.num_experts
        widths, is_old = (layer.in_features, layer.out_features), version < (0, 19)
        if widths[0] != widths[1]:
            is_old = (a.shape[1], b.shape[0]) == widths[::-1]
        elif not version:
            raise AdapterError(
                f"{path} of {adapter.name} has LoRA on fused experts, whose layout PEFT 0.19 "
                f"changed; {CONFIG} does not say which PEFT made it: add its peft_version"
            )
        if is_old:
            log.info("%s: turned LoRA on fused experts into the layout since PEFT 0.19", path)
            tensors[to_a] = b.reshape(len(b), -1, n).permute(2, 1, 0).flatten(0, 1).contiguous()
            tensors[to_b] = a.reshape(n, -1, a.shape[1]).permute(2, 1, 0).flatten(1).contiguous()
    return tensors


def _fuse_experts(model: PeftModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with experts fused, as current transformers keeps them in one tensor."""
    config: Any = model.peft_config["default"]
    try:
        return convert_peft_adapter_state_dict_for_transformers(model, config, dict(tensors))
    except ValueError:  # PEFT converts no such names
        return tensors


def _require_equal(model: PeftModel, tensors: dict[str, Tensor], adapter: Adapter) -> None:
    for name, loaded in _state_of(model, embeddings=True).items():
        if name not in tensors:
            continue
        if loaded.is_meta:
            raise AdapterError(
                f"{name} is in an offloaded module, where it cannot be loaded; keep the module "
                "on a device with a different --device-map"
            )
        if not tensors[name].isfinite().all():
            raise AdapterError(f"{name} of {adapter.name} is not finite: the adapter is damaged")
        if not torch.equal(loaded.cpu(), tensors[name].to(loaded.dtype)):
            raise AdapterError(f"after loading, {name} differs from the file of {adapter.name}")
    written = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if written and not any(tensor.any() for tensor in written):
        log.warning("every lora_B of %s is zero: the adapter has no effect", adapter.name)


def _fix_dora_norms(model: PeftModel) -> None:
    """Cache DoRA's `‖W + scale·B·A‖`, which is constant in eval mode.

    PEFT computes it in every forward by passing the identity through `lora_A`, where our hooks
    would read it as tokens.
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
            dora.get_lora_weight = lambda dora=dora, **_: dora.constant_norm  # unused
            dora.get_weight_norm = lambda dora=dora, **_: dora.constant_norm


def _state_of(model: PeftModel, *, embeddings: bool = False) -> dict[str, Tensor]:
    """Return the adapter's tensors as PEFT would save them, with or without the embeddings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model_state_dict(model, save_embedding_layers=embeddings)


def _match_names(
    file_names: Iterable[str], needed: Collection[str], allowed: Collection[str]
) -> dict[str, str] | None:
    """Return the model's name of every name in the file, or None if they do not fit.

    Names are compared without what wrappers, PEFT and adapters' own names add to them. `allowed`
    are names that a file may have but need not: saved embeddings.
    """
    file_names, known = list(file_names), {*needed, *allowed}
    # Older PEFT deletes every `.lora` from the names of an adapter called "lora".
    deleted = "" if any(".lora_" in name for name in file_names) else ".lora"
    targets = {_key(name).replace(deleted, ""): name for name in known}
    names = [targets.get(_key(name), "") for name in file_names]
    fits = set(needed) <= set(names) <= known and len(set(names)) == len(names)
    return dict(zip(file_names, names, strict=True)) if fits else None


def _key(name: str) -> str:
    """Return a tensor's name without prefixes, wrappers and the adapter's own name."""
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", base_path(name))
    name = re.sub(r"(\.lora_[AB])\.[^.]+(\.(?:weight|bias))$", r"\1\2", name)
    return re.sub(rf"(\.(?:{_PARAMETERS}))\.[^.]+(?:\.weight)?$", r"\1", name)
