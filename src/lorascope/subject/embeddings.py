"""Resize the base model's embeddings to the number that the adapter was trained with.

An adapter trained with added tokens has a tokenizer with more tokens than the base has embeddings,
and may hold the trained embeddings itself. The base is resized before the adapter is attached:

1. If the adapter's file holds embeddings, or LoRA on them, their number decides, up or down.
2. Otherwise the adapter's tokenizer and trained tokens decide, upwards only: a base may have more
   embeddings than its tokenizer has tokens.
3. New embeddings are the mean of the old ones, until the adapter's own replace them. transformers
   would draw them at random.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.subject.adapter import Adapter, base_path, lora_tensors

log = logging.getLogger(__name__)


def resize_embeddings(model: Any, adapter: Adapter, tokenizer: Any) -> None:
    """Resize the embeddings of a transformers model in place, if the adapter needs it."""
    paths = _embedding_paths(model)
    held = _rows_in_file(adapter, paths)
    old = int(_weight(model.get_input_embeddings()).shape[0])
    wanted = max(held.values()) if held else max(old, _n_tokens(adapter, tokenizer))
    if len(set(held.values())) > 1:
        sizes = ", ".join(f"{rows} for {path}" for path, rows in held.items())
        raise AdapterError(f"adapter {adapter.name} holds embeddings of several sizes: {sizes}")
    if wanted == old:
        return
    if any(_weight(model.get_submodule(path)).is_meta for path in paths):
        raise AdapterError(
            f"adapter {adapter.name} needs {wanted} embeddings, the base has {old}, and offloaded "
            "embeddings cannot be resized; keep them on a device with a different --device-map"
        )
    with torch.random.fork_rng([]):  # transformers draws values that are replaced below
        model.resize_token_embeddings(wanted, mean_resizing=False)
    for path in paths:
        _fill_with_mean(model.get_submodule(path), old)
    replaced = set(_saved_embeddings(adapter, paths))
    if set(range(old, wanted)) <= set(_trained_tokens(adapter)):
        replaced.add(paths[0])
    missing = [path for path in paths if path not in replaced]
    tied = len({_weight(model.get_submodule(path)).data_ptr() for path in paths}) == 1
    if wanted > old and missing and not (tied and len(missing) < len(paths)):
        log.warning(
            "resized %d embeddings to %d for %s, which has no values for %s: the new ones are "
            "the mean of the old ones",
            old,
            wanted,
            adapter.name,
            " and ".join(missing),
        )
    else:
        log.info("resized %d embeddings to %d for %s", old, wanted, adapter.name)


def _embedding_paths(model: Any) -> list[str]:
    """Return the paths of the input and output embeddings that the model has."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    return [paths[id(end)] for end in ends if end is not None]


def _rows_in_file(adapter: Adapter, paths: list[str]) -> dict[str, int]:
    """Return the number of embeddings that the adapter's file holds, by module path."""
    rows = {
        path: adapter.shapes[name][0] for path, name in _saved_embeddings(adapter, paths).items()
    }
    modules = lora_tensors(adapter.shapes)
    for path in paths:
        parts = modules.get(path, {})
        if "lora_embedding_A" in parts:
            rows.setdefault(path, adapter.shapes[parts["lora_embedding_A"]][1])
        elif "lora_B" in parts:
            rows.setdefault(path, adapter.shapes[parts["lora_B"]][0])
    return rows


def _saved_embeddings(adapter: Adapter, paths: list[str]) -> dict[str, str]:
    """Return the names of the file's whole embedding tensors, by module path."""
    saved: dict[str, str] = {}
    for name in adapter.shapes:
        module = base_path(name).removesuffix(".weight")
        for path in paths:
            inside = module.removeprefix(path).lstrip(".").partition(".")[0]
            whole = ("", "base_layer", "modules_to_save", "token_adapter")
            is_weight = name.endswith(".weight") and ".lora_" not in name
            if is_weight and module.startswith(path) and inside in whole:
                saved[path] = name
    return saved


def _n_tokens(adapter: Adapter, tokenizer: Any) -> int:
    """Return the number of embeddings that the adapter's tokenizer and trained tokens need."""
    highest = -1
    if (adapter.path / "tokenizer_config.json").is_file():
        highest = max(tokenizer.get_vocab().values())
    return max([highest, *_trained_tokens(adapter)]) + 1


def _trained_tokens(adapter: Adapter) -> list[int]:
    trained = adapter.config.get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    return [int(index) for indices in lists for index in indices]


def _fill_with_mean(module: nn.Module, old: int) -> None:
    """Set embeddings (and biases) from index `old` on to the mean of those before."""
    for parameter in module.parameters(recurse=False):
        if parameter.shape[0] > old:
            mean = parameter.data[:old].float().mean(dim=0)
            parameter.data[old:] = mean.to(parameter.dtype)


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")
