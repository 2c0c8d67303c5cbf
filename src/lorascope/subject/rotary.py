"""Rotary positions: the frequencies that a config states, and those that follow a text's length.

1. `require_rotary` compares the built model's frequencies with theta and scaling in `config.json`:
   transformers silently takes its defaults where a newer version saved the settings.
2. Two kinds of scaling depend on a text's length `n`: LongRoPE has a second set of frequencies for
   texts longer than the original context, and dynamic NTK has its own for each `n` above it.
   `length_class` numbers the sets. All texts of a batch must be of one class, because transformers
   takes the frequencies of the longest. The same holds for a cache: where the next token would
   change the class, the text is read again from its start.
3. Dynamic NTK in transformers also keeps the frequencies of an earlier, longer text.
   `forget_lengths` resets them before each forward.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.hub import read_json_object

_SAME_KIND = {"mrope": "default", "su": "longrope"}  # names that older configs use
_SUFFIX = "inv_freq"


def require_rotary(model: nn.Module, folder: Path) -> None:
    """Raise AdapterError unless the model has each set of frequencies that its config states."""
    config = read_json_object(folder / "config.json")
    text = config.get("text_config") or config
    built = [(kind, value) for *_, kind, value in _frequencies(model) if not value.is_meta]
    for stated in _stated(text) if built else ():
        if not any(_agree(stated, kind, frequencies) for kind, frequencies in built):
            raise AdapterError(
                f"base model {folder} was saved by transformers "
                f"{config.get('transformers_version', 'of an unnamed version')} with the rotary "
                f"settings {json.dumps(stated)[:200]}, which the installed transformers "
                f"{transformers.__version__} does not apply: rows would be wrong; install "
                "the version that saved it, or a newer one"
            )


def _stated(text: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the settings in a config, in the layout of transformers 5: several by layer type."""
    parameters = text.get("rope_parameters")
    if not isinstance(parameters, dict):
        parameters = {"rope_theta": text.get("rope_theta"), **(text.get("rope_scaling") or {})}
    nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    used = text.get("layer_types") or list(nested)
    return [nested[name] for name in nested if name in used] if nested else [parameters]


def _agree(stated: dict[str, Any], kind: str | None, built: Tensor) -> bool:
    """Return whether frequencies are of the stated kind and follow from the stated theta.

    For kinds with a formula of their own, only bounds or the kind itself are compared.
    """
    named = stated.get("rope_type") or stated.get("type") or "default"
    named = _SAME_KIND.get(named, named)
    if kind is not None and _SAME_KIND.get(kind, kind) != named:
        return False
    theta = stated.get("rope_theta")
    factor = float(stated.get("factor") or 1)
    if theta is None or "alpha" in stated:  # alpha is another rule for theta
        return True
    exponents = torch.arange(len(built), dtype=torch.float64) / len(built)
    share = built.double().cpu().sort(descending=True).values * float(theta) ** exponents
    low, high = {
        "default": (1.0, 1.0),
        "dynamic": (1.0, 1.0),  # up to the original context
        "linear": (1 / factor, 1 / factor),
        "llama3": (1 / factor, 1.0),
        "yarn": (1 / factor, 1.0),
    }.get(named, (0.0, float("inf")))
    return bool((share > 0.99 * low).all() and (share < 1.01 * high).all())


def _frequencies(model: nn.Module) -> Iterator[tuple[Any, str, str | None, Tensor]]:
    """Yield each set of frequencies: its module, its name's prefix, its kind if named, values."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for name, value in module.named_buffers(recurse=False):
            prefix = name.removesuffix(_SUFFIX)
            if name.endswith(_SUFFIX) and not prefix.endswith("original_"):
                kind = kinds.get(prefix[:-1]) if isinstance(kinds, dict) else kinds
                yield module, prefix, kind, value


def length_class(model: nn.Module) -> Callable[[int], int]:
    """Return a function from a text's length to the number of its set of frequencies."""
    switches, growing = set(), set()
    for module, prefix, kind, _ in _frequencies(model):
        if kind == "longrope":
            switches.add(_original_context(module.config, prefix[:-1]))
        elif kind is not None and "dynamic" in kind:
            growing.add(int(module.original_max_seq_len))

    def number(n: int) -> int:
        if any(n > limit for limit in growing):
            return n
        return sum(n > limit for limit in switches)

    return number


def _original_context(config: Any, layer_type: str) -> int:
    """Return the longest text that LongRoPE reads with its short factors."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(layer_type, parameters)
    name = "original_max_position_embeddings"
    found = parameters.get(name) or getattr(config, name, None) or config.max_position_embeddings
    return int(found)


def forget_lengths(model: nn.Module) -> None:
    """Let each forward of a dynamic NTK begin with the original frequencies."""
    for module, prefix, kind, _ in list(_frequencies(model)):
        if kind is not None and "dynamic" in kind:
            module.register_forward_pre_hook(partial(_reset, prefix))


def _reset(prefix: str, module: Any, _args: Any) -> None:
    device = getattr(module, f"{prefix}{_SUFFIX}").device
    original = getattr(module, f"{prefix}original_{_SUFFIX}").to(device)
    setattr(module, f"{prefix}{_SUFFIX}", original)
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
