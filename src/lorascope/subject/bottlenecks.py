"""Find a loaded model's bottlenecks: the modules `h = A·x` through which all of a LoRA passes.

1. Look at every LoRA layer. It has no rows if its `A` is not multiplied with each token's input:
   LoRA on embeddings, parameters, routed experts, convolutions.
2. Run the others once, on three tokens. A layer that is never called, or not called for exactly
   these tokens, has no rows either. Only a forward shows that; the module's class does not.
3. The remaining layers are the sites. Each gets its name, its scale and its gauge.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.errors import AdapterError, ConfigError
from lorascope.sites import Site, SiteLayout, name_modules
from lorascope.subject.adapter import Adapter, is_routed, lora_kind, lora_tensors
from lorascope.subject.gauge import svd_gauge

GAUGES = ("auto", "svd", "raw")
_N_PROBED = 3


@dataclass(frozen=True)
class Bottleneck:
    """One LoRA layer with rows: `read` is its `lora_A` module, `a` and `b` its matrices."""

    path: str
    read: nn.Module
    a: Tensor
    b: Tensor
    scale: float


def find_bottlenecks(causal: nn.Module, name: str) -> tuple[list[Bottleneck], dict[str, str]]:
    """Return the layers of adapter `name` that may have rows, and why the others have none."""
    bottlenecks: list[Bottleneck] = []
    unhooked: dict[str, str] = {}
    for path, layer in causal.named_modules():
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict) or name not in scaling:
            continue
        if getattr(layer, "merged", False):
            raise AdapterError(f"{path} is merged into the base: its lora_A never runs")
        target, reason = _unhookable_reason(path, layer, name)
        if reason:
            unhooked[target] = reason
            continue
        read = causal.get_submodule(f"{path}.lora_A.{name}")
        write = causal.get_submodule(f"{path}.lora_B.{name}")
        bottlenecks.append(
            Bottleneck(path, read, _matrix(read), _matrix(write), float(scaling[name]))
        )
    return bottlenecks, unhooked


def probe(
    bottlenecks: Sequence[Bottleneck], run: Callable[..., Any], device: torch.device
) -> dict[str, str]:
    """Run the model once on three tokens; return why layers gave no row per token, by path."""
    shapes: dict[str, list[tuple[int, ...]]] = {layer.path: [] for layer in bottlenecks}

    def record_shape(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: shapes[path].append(tuple(output.shape))

    handles = [layer.read.register_forward_hook(record_shape(layer.path)) for layer in bottlenecks]
    try:
        with torch.inference_mode():
            run(input_ids=torch.arange(_N_PROBED, device=device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {path: reason for path, calls in shapes.items() if (reason := _no_row_reason(calls))}


def make_layout(
    bottlenecks: Sequence[Bottleneck], adapter: Adapter, gauge: str
) -> tuple[SiteLayout, tuple[nn.Module, ...], tuple[Tensor | None, ...]]:
    """Return the layout, and for each of its sites the module to read and the mix (None: raw).

    `gauge` is `raw`, `svd`, or `auto`: svd where the rank is above 1. A rank-1 row is determined
    up to its scale anyway.
    """
    if gauge not in GAUGES:
        raise ConfigError(f"--gauge is {gauge}, expected one of {', '.join(GAUGES)}")
    # Name the modules of the whole file, so that names do not depend on which can be read.
    named = name_modules([*lora_tensors(adapter.shapes), *(layer.path for layer in bottlenecks)])
    kind = lora_kind(adapter.config)
    parts: list[tuple[Site, nn.Module, Tensor | None]] = []
    for layer in bottlenecks:
        mix, norms = None, layer.b.norm(dim=0)
        rank = layer.a.shape[0]
        is_svd = gauge == "svd" or (gauge == "auto" and rank > 1)
        if is_svd:
            exact, written = svd_gauge(layer.a, layer.b, layer.scale)
            norms = written / abs(layer.scale) if layer.scale else written
            mix = exact.to(_device_of(layer.read), torch.float32)
        site = Site(
            layer=named[layer.path][0],
            projection=named[layer.path][1],
            rank=rank,
            module=layer.path,
            scale=layer.scale,
            b_norms=tuple(norms.tolist()),
            lora_kind=kind,
            gauge="svd" if is_svd else "raw",
        )
        parts.append((site, layer.read, mix))
    parts.sort(key=lambda part: part[0].order)
    layout = SiteLayout(tuple(site for site, _, _ in parts), adapter.digest)
    return layout, tuple(read for _, read, _ in parts), tuple(mix for _, _, mix in parts)


def _unhookable_reason(path: str, layer: nn.Module, name: str) -> tuple[str, str | None]:
    """Return what a layer adapts, and why it has no rows by its kind, or None."""
    parameter = getattr(layer, "parameter_name", None)
    if parameter is not None:
        return f"{_unwrapped(path)}.{parameter}", "LoRA on a parameter"
    if name in layer.get_submodule("lora_embedding_A"):  # type: ignore[operator]  # a ParameterDict
        return path, "LoRA on an embedding"
    if is_routed(path):
        return path, "an expert that sees only tokens routed to it"
    weight = layer.get_submodule(f"lora_A.{name}").weight
    return path, None if isinstance(weight, Tensor) and weight.ndim == 2 else "a convolution"


def _unwrapped(path: str) -> str:
    while path.endswith(".base_layer"):  # PEFT nests one wrapper for each parameter of a module
        path = path.removesuffix(".base_layer")
    return path


def _no_row_reason(calls: list[tuple[int, ...]]) -> str | None:
    if len(calls) != 1:
        return f"called {len(calls)} times in a forward" if calls else "never called"
    # A layer may see the batch flattened: (tokens, rank) holds the same rows as (1, tokens, rank).
    n_seen = math.prod(calls[0][:-1])
    return None if n_seen == _N_PROBED else f"called for {n_seen} of {_N_PROBED} tokens"


def _matrix(module: nn.Module) -> Tensor:
    """Return the whole matrix of a LoRA factor, in float64 on the CPU."""
    whole = getattr(module, "weight_as_blockdiagonal_matrix", None)  # BD-LoRA stores blocks only
    weight = whole() if whole else module.get_parameter("weight")
    return weight.detach().cpu().double()


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
