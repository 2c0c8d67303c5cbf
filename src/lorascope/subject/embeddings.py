"""Give the base model as many embeddings as the adapter was trained with.

An adapter that was trained with added tokens brings a tokenizer with more tokens than the base has
embeddings, and may hold the trained embeddings itself. The base is resized before the adapter is
put in, so that both fit:

1. Where the file holds embeddings, or LoRA on them, their number decides, also downwards.
2. Else the adapter's own tokenizer and its trained tokens decide, and only upwards: a base may
   well have more embeddings than its tokenizer has tokens.
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


def fit_embeddings(model: Any, adapter: Adapter, tokenizer: Any) -> None:
    """Resize the embeddings of a transformers model in place where the adapter needs it."""
    paths = _paths(model)
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
            "embeddings cannot be resized; keep them on a device with another --device-map"
        )
    with torch.random.fork_rng([]):  # transformers draws values that are replaced below
        model.resize_token_embeddings(wanted, mean_resizing=False)
    for path in paths:
        _fill(model.get_submodule(path), old)
    replaced = set(_saved(adapter, paths))
    if set(range(old, wanted)) <= set(_trained_tokens(adapter)):
        replaced.add(paths[0])
    missing = [path for path in paths if path not in replaced]
    tied = len({_weight(model.get_submodule(path)).data_ptr() for path in paths}) == 1
    if wanted > old and missing and not (tied and len(missing) < len(paths)):
        log.warning(
            "resized %d embeddings to %d for %s, which holds none for %s: the new ones are the "
            "mean of the old ones",
            *(old, wanted, adapter.name, " and ".join(missing)),
        )
    else:
        log.info("resized %d embeddings to %d for %s", old, wanted, adapter.name)


def _paths(model: Any) -> list[str]:
    """Return the paths of the input and the output embeddings, as far as the model has them."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    paths = {id(module): path for path, module in reversed(list(model.named_modules()))}
    return [paths[id(end)] for end in ends if end is not None]


def _rows_in_file(adapter: Adapter, paths: list[str]) -> dict[str, int]:
    """Return how many embeddings the file tells of, by the path of the module it tells it of."""
    rows = {path: adapter.shapes[name][0] for path, name in _saved(adapter, paths).items()}
    modules = lora_tensors(adapter.shapes)
    for path in paths:
        parts = modules.get(path, {})
        if "lora_embedding_A" in parts:
            rows.setdefault(path, adapter.shapes[parts["lora_embedding_A"]][1])
        elif "lora_B" in parts:
            rows.setdefault(path, adapter.shapes[parts["lora_B"]][0])
    return rows


def _saved(adapter: Adapter, paths: list[str]) -> dict[str, str]:
    """Return the tensors of the file that are whole embeddings, by the path of their module."""
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
    """Return how many embeddings the adapter's own tokenizer and trained tokens ask for."""
    highest = -1
    if (adapter.path / "tokenizer_config.json").is_file():
        highest = max(tokenizer.get_vocab().values())
    return max([highest, *_trained_tokens(adapter)]) + 1


def _trained_tokens(adapter: Adapter) -> list[int]:
    trained = adapter.config.get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    return [int(index) for indices in lists for index in indices]


def _fill(module: nn.Module, old: int) -> None:
    """Set the embeddings after the first `old` ones to the mean of these, and biases likewise."""
    for parameter in module.parameters(recurse=False):
        if parameter.shape[0] > old:
            mean = parameter.data[:old].float().mean(dim=0)
            parameter.data[old:] = mean.to(parameter.dtype)


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")
