"""Give a base model as many embeddings as its adapter was trained with.

An adapter trained with added tokens has a tokenizer with more tokens than the base has embeddings,
and may hold the trained embeddings itself:

1. If the adapter's file holds embeddings, or LoRA on them, their number decides, up or down.
2. Otherwise the adapter's tokenizer and trained tokens decide, upwards only: a base may have more
   embeddings than its tokenizer has tokens.
3. New embeddings are the mean of the old ones, until the adapter's own replace them. transformers
   would draw them at random.
"""

import logging
from typing import Any

import torch
from torch import nn

from lorascope.errors import AdapterError
from lorascope.subject.adapter import Adapter, base_path, lora_tensors

log = logging.getLogger(__name__)


def n_embeddings(model: Any, adapter: Adapter, tokenizer: Any) -> int | None:
    """Return how many embeddings the adapter needs, or None if it needs those of the model."""
    paths, saved = _embeddings(model, adapter)
    old = len(model.get_submodule(paths[0]).get_parameter("weight"))
    held = {path: adapter.shapes[name][0] for path, name in saved.items()}
    modules = lora_tensors(adapter.shapes)
    for path in paths:
        for part, axis in (("lora_embedding_A", 1), ("lora_B", 0)):
            if name := modules.get(path, {}).get(part):
                held.setdefault(path, adapter.shapes[name][axis])
    if len(set(held.values())) > 1:
        sizes = ", ".join(f"{rows} for {path}" for path, rows in held.items())
        raise AdapterError(f"adapter {adapter.name} holds embeddings of several sizes: {sizes}")
    known = {*_trained_tokens(adapter), old - 1}
    if (adapter.path / "tokenizer_config.json").is_file():
        known |= set(tokenizer.get_vocab().values())
    wanted = max(held.values(), default=max(known) + 1)
    return None if wanted == old else wanted


def _trained_tokens(adapter: Adapter) -> set[int]:
    trained = adapter.config.get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    return {int(index) for indices in lists for index in indices}


def _embeddings(model: Any, adapter: Adapter) -> tuple[list[str], dict[str, str]]:
    """Return the paths of the model's embeddings, and the file's names of whole ones by path."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = {id(module): path for path, module in reversed(list(model.named_modules()))}
    paths = [found[id(end)] for end in ends if end is not None]
    return paths, _saved_embeddings(adapter, paths)


def resize_embeddings(model: Any, adapter: Adapter, tokenizer: Any) -> None:
    """Resize the embeddings of a transformers model in place, if the adapter needs it."""
    wanted = n_embeddings(model, adapter, tokenizer)
    if wanted is None:
        return
    paths, saved = _embeddings(model, adapter)
    weights = [model.get_submodule(path).get_parameter("weight") for path in paths]
    old, tokens = len(weights[0]), _trained_tokens(adapter)
    if any(weight.is_meta for weight in weights):
        raise AdapterError(
            f"adapter {adapter.name} needs {wanted} embeddings, the base has {old}, and offloaded "
            "embeddings cannot be resized; keep them on a device with a different --device-map"
        )
    tied = len({weight.data_ptr() for weight in weights}) == 1
    with torch.random.fork_rng([]):  # transformers draws values that are replaced below
        model.resize_token_embeddings(wanted, mean_resizing=False)
    for path in paths:
        _fill_with_mean(model.get_submodule(path), old)
    replaced = {*saved, *(paths[:1] if set(range(old, wanted)) <= tokens else [])}
    missing = [path for path in paths if path not in replaced]
    log.info("resized %d embeddings to %d for %s", old, wanted, adapter.name)
    if wanted > old and missing and not (tied and replaced):
        log.warning(
            "%s has no values for %d new embeddings of %s: they are the mean of the old ones",
            adapter.name,
            wanted - old,
            " and ".join(missing),
        )


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


def _fill_with_mean(module: nn.Module, old: int) -> None:
    """Set embeddings (and biases) from index `old` on to the mean of those before."""
    for parameter in module.parameters(recurse=False):
        if parameter.shape[0] > old:
            mean = parameter.data[:old].float().mean(dim=0)
            parameter.data[old:] = mean.to(parameter.dtype)
