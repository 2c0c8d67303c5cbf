"""Find the places of a live model where a LoRA's whole influence passes: `h = A·x`.

1. Every LoRA layer is looked at. One whose `A` no forward multiplies with each token's input
   (embeddings, parameters, routed experts, convolutions) has no rows.
2. The rest run once, on three tokens: what is never called, or called for other tokens than these,
   has no rows either. A module's class does not say that; a forward does.
3. What remains are the sites. Each gets its name, its scale and, where asked for, its gauge.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorascope.errors import AdapterError, ConfigError
from lorascope.sites import Site, SiteLayout, name_modules
from lorascope.subject.adapter import Adapter, is_routed, lora_tensors, variant_of
from lorascope.subject.gauge import svd_gauge

GAUGES = ("auto", "svd", "raw")
_N_PROBED = 3


@dataclass(frozen=True)
class Bottleneck:
    """One LoRA layer that multiplies: `read` is its `lora_A` module, `a` and `b` its matrices."""

    path: str
    read: nn.Module
    a: Tensor
    b: Tensor
    scale: float


def find_bottlenecks(causal: nn.Module, name: str) -> tuple[list[Bottleneck], dict[str, str]]:
    """Return the LoRA layers of adapter `name` that multiply, and the others with their reasons."""
    found: list[Bottleneck] = []
    unhooked: dict[str, str] = {}
    for path, layer in causal.named_modules():
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict) or name not in scaling:
            continue
        if getattr(layer, "merged", False):
            raise AdapterError(f"{path} is merged into the base: its lora_A never runs")
        where, reason = _why_unhookable(path, layer, name)
        if reason:
            unhooked[where] = reason
            continue
        read = causal.get_submodule(f"{path}.lora_A.{name}")
        write = causal.get_submodule(f"{path}.lora_B.{name}")
        found.append(Bottleneck(path, read, _matrix(read), _matrix(write), float(scaling[name])))
    return found, unhooked


def probe(
    found: Sequence[Bottleneck], run: Callable[..., Any], device: torch.device
) -> dict[str, str]:
    """Run the model once on three tokens; return the layers that gave no row for each of them."""
    shapes: dict[str, list[tuple[int, ...]]] = {layer.path: [] for layer in found}

    def note(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: shapes[path].append(tuple(output.shape))

    handles = [layer.read.register_forward_hook(note(layer.path)) for layer in found]
    try:
        with torch.inference_mode():
            run(input_ids=torch.arange(_N_PROBED, device=device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {path: reason for path, called in shapes.items() if (reason := _why_no_row_each(called))}


def lay_out(
    found: Sequence[Bottleneck], adapter: Adapter, gauge: str
) -> tuple[SiteLayout, tuple[nn.Module, ...], tuple[Tensor | None, ...]]:
    """Return the sites in column order, the module to read at each, and its mix (None: raw).

    `gauge` is `raw`, `svd`, or `auto`: svd where the rank is more than 1, since a rank-1 row is
    determined up to its unit.
    """
    if gauge not in GAUGES:
        raise ConfigError(f"--gauge is {gauge}, expected one of {', '.join(GAUGES)}")
    # Names are those that the whole file gives, so that they do not depend on what can be read.
    named = name_modules([*lora_tensors(adapter.shapes), *(layer.path for layer in found)])
    variant = variant_of(adapter.config)
    parts: list[tuple[Site, nn.Module, Tensor | None]] = []
    for layer in found:
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
            variant=variant,
            gauge="svd" if is_svd else "raw",
        )
        parts.append((site, layer.read, mix))
    parts.sort(key=lambda part: part[0].order)
    layout = SiteLayout(tuple(site for site, _, _ in parts), adapter.digest)
    return layout, tuple(read for _, read, _ in parts), tuple(mix for _, _, mix in parts)


def _why_unhookable(path: str, layer: nn.Module, name: str) -> tuple[str, str | None]:
    """Return the place's name and why it has no rows, by what kind of layer it is."""
    parameter = getattr(layer, "parameter_name", None)
    if parameter is not None:
        return f"{_unwrapped(path)}.{parameter}", "LoRA on a parameter"
    if name in layer.get_submodule("lora_embedding_A"):  # type: ignore[operator]  # a ParameterDict
        return path, "LoRA on an embedding"
    if is_routed(path):
        return path, "an expert that only routed tokens reach"
    weight = layer.get_submodule(f"lora_A.{name}").weight
    return path, None if isinstance(weight, Tensor) and weight.ndim == 2 else "a convolution"


def _unwrapped(path: str) -> str:
    while path.endswith(".base_layer"):  # PEFT nests one wrapper for each parameter of a module
        path = path.removesuffix(".base_layer")
    return path


def _why_no_row_each(called: list[tuple[int, ...]]) -> str | None:
    if len(called) != 1:
        return f"called {len(called)} times in a forward" if called else "never called"
    # a layer may see the batch flattened: (tokens, rank) holds the same rows as (1, tokens, rank)
    n_seen = 1
    for size in called[0][:-1]:
        n_seen *= size
    return None if n_seen == _N_PROBED else f"called for {n_seen} of {_N_PROBED} tokens"


def _matrix(module: nn.Module) -> Tensor:
    """Return what a LoRA factor multiplies with, whole, in float64 on the CPU."""
    whole = getattr(module, "weight_as_blockdiagonal_matrix", None)  # BD-LoRA keeps its blocks
    weight = whole() if whole else module.get_parameter("weight")
    return weight.detach().cpu().double()


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
