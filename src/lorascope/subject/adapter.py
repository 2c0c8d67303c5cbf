"""Read an adapter's files: its JSON config, and the header and values of its safetensors file.

Nothing here needs PEFT or the base model, nor torch, unless the weights are a pickle. Pickles and
MLX adapters are converted in memory (`adapter_files`). `inspect_adapter` rejects files that hold no
LoRA or empty tensors.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.artifact import require_content
from lorascope.errors import AdapterError
from lorascope.hub import find_folder, read_json_object
from lorascope.sites import in_column_order, name_modules
from lorascope.subject.adapter_files import (
    MLX,
    PICKLE,
    READABLE,
    WEIGHTS,
    TensorFile,
    from_mlx,
    unpickle,
)

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
_HOW = (
    "no adapter given: pass --lora-path FOLDER_OR_HUB_ID, or set lora_path = ... in "
    "lorascope.toml (examples/lorascope.toml names the shipped demo adapter)"
)
# Kinds of LoRA by the config key that turns them on: name, and why lorascope does not support it,
# which is None if `h = A·x` can be read and `scale·B·h` is what the site writes.
_LORA_KINDS: dict[str, tuple[str, str | None]] = {
    "use_dora": ("dora", None),
    "use_bdlora": ("bdlora", None),
    "velora_config": ("velora", None),
    "alora_invocation_tokens": ("alora", "its A reads only the tokens after the invocation"),
    "enable_lora": ("merged", "its B is a grouped convolution, as PEFT 0.2 wrote it"),
    "use_qalora": ("qalora", "its A reads pooled inputs, outside of any module"),
    "arrow_config": ("arrow", "it routes every token between several adapters"),
    "monteclora_config": ("monteclora", "its A is used outside of any module"),
    "kasa_config": ("kasa", "it scales between A and B, and truncates the base"),
}
# Models that lorascope does not study, by the class of the base and by paths of adapted modules.
_OTHER_CLASSES = re.compile(r"For(?!CausalLM|ConditionalGeneration|ImageTextToText)\w+$")
_DIFFUSION = re.compile(r"(?:^|\.)(?:to_[qkv]|to_out|unet|transformer_blocks)(?:\.|$)")
_ENCODER = re.compile(r"^(?!.*vision)(?:.*\.)?encoder\.(?:layers?|block)\.\d")
_DECODER = re.compile(r"(?:^|\.)decoder\.(?:layers?|block)\.\d")
# The types of what is read from a config here. PEFT checks the rest.
_VALUES: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type"), ((str,), "a text")),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "use_bdlora"), ((dict,), "an object")),
    **dict.fromkeys(("target_parameters", "modules_to_save"), ((list,), "a list")),
    "target_modules": ((str, list), "a text or a list"),
    "trainable_token_indices": ((list, dict), "a list or an object"),
}
# What torch.compile, FSDP and activation checkpointing add to tensor names.
WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_LEADING = re.compile(r"^(?:base_model\.model\.|module\.)+")
_LORA = re.compile(r"^(?P<module>.+?)\.(?P<part>lora_[A-Za-z_]+)(?:\.(?P<rest>.+))?$")
# Older PEFT deletes every `.lora` from the names of an adapter called "lora".
_CALLED_LORA = re.compile(
    r"^(?P<module>.+?)_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(?:\.(?P<rest>\w+))?$"
)
_ROUTED = re.compile(r"(?:^|[._])(?<!shared_)experts?\.\d+(?:\.|$)")


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from its files: `shapes` by tensor name, `digest` over both files.

    `converted` is a safetensors file in memory, if the adapter's own file is another one.
    """

    path: Path
    name: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    digest: str
    converted: bytes | None = field(default=None, repr=False)

    def open(self) -> "TensorFile":
        """Return the tensors to read one by one."""
        return TensorFile(self.path / WEIGHTS if self.converted is None else self.converted)

    def tensors(self) -> "dict[str, Tensor]":
        """Return all tensors, on the CPU."""
        import safetensors.torch

        if self.converted is None:
            return safetensors.torch.load_file(self.path / WEIGHTS)
        return safetensors.torch.load(self.converted)


def inspect_adapter(lora_path: str | None, adapter_name: str | None = None) -> Adapter:
    """Read an adapter's config and tensor header. Raises AdapterError if it is not a valid LoRA.

    PEFT saves several adapters of one model as sub-folders; `adapter_name` chooses one.
    """
    if not lora_path:
        raise AdapterError(_HOW)
    path, name = _find_adapter(lora_path, adapter_name)
    require_content(path, AdapterError)
    if not (path / CONFIG).is_file():
        what = "it holds a full model" if (path / "config.json").exists() else "it has no " + CONFIG
        raise AdapterError(
            f"{path} is not a PEFT adapter ({what}); give the folder that PEFT saved"
        )
    config, file, converted = read_json_object(path / CONFIG), path / WEIGHTS, None
    if "peft_type" not in config and "lora_parameters" in config:
        file = path / MLX
        config, converted = from_mlx(config, file)
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterError(f"{path} is an adapter of type {kind}, expected LORA")
    if not file.is_file():
        file = path / PICKLE
        if not file.is_file():
            raise AdapterError(f"{path} holds no weights; save the adapter as {WEIGHTS}")
        converted = unpickle(file)
    _check_values(path / CONFIG, config)
    held = TensorFile(file if converted is None else converted)
    shapes, dtypes = held.shapes, held.dtypes
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise AdapterError(
            f"{file} holds empty tensors ({empty[0]}): it was saved from sharded "
            "weights; gather them before saving"
        )
    modules = lora_tensors(shapes)
    if not any({"lora_A", "lora_embedding_A"} & parts.keys() for parts in modules.values()):
        raise AdapterError(f"{file} holds no lora_A tensor: it is not a LoRA adapter")
    for parts in modules.values():
        a, b = (shapes.get(parts.get(part, ""), ()) for part in ("lora_A", "lora_B"))
        if len(a) == len(b) == 2 and a[0] != b[1] and not config.get("use_bdlora"):
            why = "is it damaged?"
            if a[1] == b[0]:
                why = (
                    "A and B are transposed, as MLX saves them: transpose them, or give the folder "
                    "that MLX wrote"
                )
            raise AdapterError(
                f"{file} holds {parts['lora_A']} of shape {a} and {parts['lora_B']} of shape {b}, "
                f"expected the same rank in both; {why}"
            )
    for tensor in (tensor for parts in modules.values() for tensor in parts.values()):
        if dtypes[tensor] not in READABLE:
            raise AdapterError(
                f"{tensor} of {file} is of type {dtypes[tensor]}, expected one of "
                f"{', '.join(READABLE)}; save the adapter in one of these"
            )
    digest = hashlib.sha256()  # of both files
    for part in (file, path / CONFIG):
        with part.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return Adapter(path, name, config, shapes, digest.hexdigest(), converted)


def _check_values(file: Path, config: dict[str, Any]) -> None:
    """Raise AdapterError unless the values that are read here are of their types."""
    for name, (kinds, expected) in _VALUES.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise AdapterError(f"{file}: {name} is {json.dumps(value)[:80]}, expected {expected}")
    ranks = {"r": config.get("r", 8), **(config.get("rank_pattern") or {})}
    for name, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise AdapterError(f"{file}: the rank of {name} is {rank}, expected 1 or more")
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise AdapterError(f"{file}: alpha of {name} is {alpha}, expected a number")
    trained = config.get("trainable_token_indices") or []
    for tokens in trained.values() if isinstance(trained, dict) else [trained]:
        if not isinstance(tokens, list) or any(type(i) is not int or i < 0 for i in tokens):
            raise AdapterError(f"{file}: trainable_token_indices has {tokens}, expected token ids")
    for pattern in [*ranks, *alphas]:
        try:
            re.compile(rf"(.*\.)?({pattern})$")  # as PEFT does
        except re.error as error:
            raise AdapterError(f"{file}: {pattern!r} is no pattern of names ({error})") from error


def lora_tensors(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the LoRA tensors' names by module path and part: `lora_A`, `lora_B`, `lora_B.bias`...

    Module paths are those of the base model, without prefixes of PEFT or wrappers. Parts do not
    contain the adapter's name. Both are the same for damaged names that `attach` can repair.
    """
    names = list(names)
    called_lora = not any(".lora_" in name for name in names)
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        match = (_CALLED_LORA if called_lora else _LORA).match(name)
        if match:
            part = ("lora_" if called_lora else "") + match["part"]
            part += ".bias" if (match["rest"] or "").endswith("bias") else ""
            modules.setdefault(base_path(match["module"]), {})[part] = name
    return modules


def base_path(name: str) -> str:
    """Return a name without the prefixes of PEFT and of wrappers around the model."""
    return _LEADING.sub("", WRAPPERS.sub("", name))


def unreadable_reason(adapter: Adapter, module: str, parts: dict[str, str]) -> str | None:
    """Return why a module gives no row `A·x` per token, or None if it does."""
    config = adapter.config
    if "lora_embedding_A" in parts:
        return "LoRA on an embedding: its A is looked up, not multiplied"
    if is_routed(module):
        return "an expert: only tokens routed to it reach it"
    targets = [str(target) for target in config.get("target_parameters") or []]
    holders = [target.rpartition(".")[0] for target in targets]
    listed = config.get("target_modules")
    is_listed = isinstance(listed, list) and any(f".{module}".endswith(f".{t}") for t in listed)
    inside = module.removesuffix(".base_layer")
    if (
        inside != module
        or any(holder and f".{inside}".endswith(f".{holder}") for holder in holders)
        or ("" in holders and not is_listed)
    ):
        return "LoRA on a parameter (target_parameters): its A is folded into the weight"
    if any(len(adapter.shapes[parts[part]]) != 2 for part in ("lora_A", "lora_B") if part in parts):
        return "LoRA on a convolution"
    return None


def is_routed(module: str) -> bool:
    """Return whether a path is one of several experts, which sees only tokens routed to it."""
    return bool(_ROUTED.search(module))


def ranks_by_projection(adapter: Adapter) -> dict[str, int]:
    """Return the number of columns of every readable projection: ranks summed over layers."""
    modules = lora_tensors(adapter.shapes)
    names = name_modules(modules)
    ranks: dict[str, int] = {}
    for module, parts in modules.items():
        if "lora_A" in parts and not unreadable_reason(adapter, module, parts):
            projection = names[module][1]
            rank = adapter.shapes[parts["lora_A"]][0]
            ranks[projection] = ranks.get(projection, 0) + rank
    return {name: ranks[name] for name in in_column_order(ranks)}


def scale_of(config: dict[str, Any], module: str) -> float:
    """Return the factor of `B(A(x))` in a module: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    rank = by_pattern(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def lora_kind(config: dict[str, Any]) -> str:
    """Return the kind of LoRA that a config asks for: `lora` if plain, else such as `dora`."""
    kinds = [name for key, (name, _) in _LORA_KINDS.items() if config.get(key)]
    kinds += ["mica"] if config.get("init_lora_weights") == "mica" else []
    return "+".join(kinds) or "lora"


def unsupported_reason(config: dict[str, Any]) -> str | None:
    """Return why lorascope does not support this kind of LoRA, or None if it does."""
    reasons = [
        f"it is {name} ({key}): {why}"
        for key, (name, why) in _LORA_KINDS.items()
        if why and config.get(key)
    ]
    return reasons[0] if reasons else None


def other_purpose(adapter: Adapter) -> str | None:
    """Return what an adapter was made for, if that is no causal language model, by its files."""
    task, mapping = adapter.config.get("task_type"), adapter.config.get("auto_mapping")
    if task and task not in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        return f"the task {task}"
    base_class = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    if _OTHER_CLASSES.search(base_class):
        return base_class
    modules = list(lora_tensors(adapter.shapes))
    if any(map(_DIFFUSION.search, modules)):
        return "a diffusion model"
    encodes = [bool(_ENCODER.match(module)) for module in modules]
    if any(encodes) and any(map(_DECODER.search, modules)):
        return "a sequence-to-sequence model"
    return "an encoder" if modules and all(encodes) else None


def changes_outside_lora(adapter: Adapter) -> tuple[str, ...]:
    """Name what an adapter changes besides LoRA: trained modules, tokens, embeddings, biases.

    Rows do not show these changes, so rows explain only a part of such a fine-tune.
    """
    modules = lora_tensors(adapter.shapes)
    lora = {name for parts in modules.values() for name in parts.values()}
    saved = [str(name) for name in adapter.config.get("modules_to_save") or []]
    changes: dict[str, None] = {}  # a set that keeps its order
    n_biases = 0
    for name in sorted(adapter.shapes.keys() - lora):
        path, _, last = base_path(name).rpartition(".")
        trained = _trained_module(path, saved)
        if last == "trainable_tokens_delta" or "trainable_tokens_delta." in f"{path}.":
            module = path.partition(".token_adapter")[0]
            changes[f"{adapter.shapes[name][0]} trained tokens of {module}"] = None
        elif trained:
            changes[f"trained module {trained}"] = None
        elif last == "bias":
            n_biases += 1
        else:
            changes[f"saved weights of {path.removesuffix('.base_layer')}"] = None
    if n_biases:
        changes[f"biases of {n_biases} modules"] = None
    n_lora_biases = sum("lora_B.bias" in parts for parts in modules.values())
    if n_lora_biases:
        changes[f"lora_B biases of {n_lora_biases} modules"] = None
    return tuple(changes)


def _trained_module(path: str, saved: list[str]) -> str | None:
    """Return the module of `modules_to_save` that holds a tensor. PEFT compares path endings."""
    parts = path.split(".")
    above = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((module for module in above if module.endswith(tuple(saved))), None)


def _find_adapter(lora_path: str, adapter_name: str | None) -> tuple[Path, str]:
    """Return the folder with the adapter's files, and the adapter's display name."""
    tokenizer = ["*token*", "*.jinja", "vocab*", "merges.txt"]
    patterns = [CONFIG, WEIGHTS, PICKLE, MLX, f"*/{CONFIG}", *tokenizer]
    path = find_folder(lora_path, "adapter", patterns)
    chosen = _choose(path, adapter_name)
    if not chosen:
        return path, Path(lora_path).name
    if not (path / chosen / WEIGHTS).is_file():  # from the hub, only the configs were downloaded
        path = find_folder(lora_path, "adapter", [*patterns, f"{chosen}/*"])
    return path / chosen, f"{Path(lora_path).name}/{chosen}"


def _choose(path: Path, adapter_name: str | None) -> str:
    """Return the sub-folder of the chosen adapter, or "" for the folder itself."""
    names = sorted(file.parent.name for file in path.glob(f"*/{CONFIG}"))
    known = {name: name for name in names}
    if (path / CONFIG).is_file():  # a trainer's checkpoints next to the final adapter do not count
        others = [
            name for name in names if name != "default" and not name.startswith("checkpoint-")
        ]
        known = {"default": "", **{name: name for name in others}}
    if adapter_name in known:
        return known[adapter_name]
    if adapter_name and (path / adapter_name / CONFIG).is_file():
        return adapter_name
    if adapter_name:
        raise AdapterError(
            f"{path} holds no adapter {adapter_name}; it has {', '.join(known) or 'none'}"
        )
    if len(known) > 1:
        raise AdapterError(
            f"{path} holds {len(known)} adapters ({', '.join(known)}); "
            "choose one with --adapter-name"
        )
    return next(iter(known.values()), "")


def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the module's path, or `default`.

    The rule is PEFT's: a pattern is a regular expression that must match the path from its start,
    or from after a dot, to its end.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
