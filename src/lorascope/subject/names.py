"""Match the tensor names in an adapter's file with those that the model needs.

A file that was saved out of a wrapper, by an older PEFT or by hand has other names for the same
tensors. A repair counts only when the repaired names are exactly the needed ones: a guess that
leaves one tensor over is no repair.
"""

import re
from collections.abc import Callable, Collection, Iterable
from itertools import combinations

from lorascope.subject.adapter import WRAPPERS

_PREFIX = "base_model.model."
_Repair = Callable[[list[str], Collection[str]], list[str]]


def match_names(
    found: Iterable[str], needed: Collection[str], allowed: Collection[str]
) -> tuple[dict[str, str], list[str]] | None:
    """Return the needed name of every found one, and the repairs that it took; None if none fits.

    `allowed` are names that a file may have and need not: saved embeddings.
    """
    found = list(found)
    targets = set(needed) | set(allowed)
    for n_repairs in range(len(_REPAIRS) + 1):
        for chosen in combinations(_REPAIRS, n_repairs):
            names = found
            for repair in chosen:
                names = _REPAIRS[repair](names, needed)
            unique = set(names)
            if set(needed) <= unique <= targets and len(unique) == len(names):
                return dict(zip(found, names, strict=True)), list(chosen)
    return None


def _without_wrappers(names: list[str], _needed: Collection[str]) -> list[str]:
    leading = re.compile(rf"^({re.escape(_PREFIX)})?(?:module\.)+")
    return [leading.sub(r"\1", WRAPPERS.sub("", name)) for name in names]


def _with_one_prefix(names: list[str], _needed: Collection[str]) -> list[str]:
    leading = re.compile(rf"^(?:{re.escape(_PREFIX)})*")
    return [leading.sub(_PREFIX, name, count=1) for name in names]


def _without_adapter_name(names: list[str], _needed: Collection[str]) -> list[str]:
    in_parameter = "lora_embedding_A|lora_embedding_B|lora_magnitude_vector|trainable_tokens_delta"
    for pattern, kept in (
        (r"\.modules_to_save\.[^.]+\.", "."),
        (r"(\.lora_[AB])\.[^.]+(\.(?:weight|bias))$", r"\1\2"),
        (rf"(\.(?:{in_parameter}))\.[^.]+(?:\.weight)?$", r"\1"),
    ):
        names = [re.sub(pattern, kept, name) for name in names]
    return names


def _with_lora(names: list[str], needed: Collection[str]) -> list[str]:
    """Undo what older PEFT does to an adapter that is called "lora": it deletes every `.lora`."""
    undamaged = {tensor.replace(".lora", ""): tensor for tensor in needed}
    if len(undamaged) < len(needed):
        return names
    return [undamaged.get(name, name) for name in names]


_REPAIRS: dict[str, _Repair] = {
    "without the names of wrappers (DDP, torch.compile)": _without_wrappers,
    f"with the prefix {_PREFIX} once": _with_one_prefix,
    "without the adapter's own name": _without_adapter_name,
    'with the lora_ that PEFT took out of an adapter called "lora"': _with_lora,
}
