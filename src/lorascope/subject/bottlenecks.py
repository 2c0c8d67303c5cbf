"""Find a loaded model's bottlenecks: the modules `h = A·x` through which all of a LoRA passes.

1. Look at every LoRA layer. It has no rows if its `A` is not multiplied with each token's input:
   LoRA on embeddings, parameters, routed experts, convolutions.
2. Run the others on three tokens. A layer that is never called, or not called for exactly these
   tokens, has no rows either. Only a forward shows that; the module's class does not. In a second
   run with another last token, the rows of the others must be the same: else the model is not
   causal, as an encoder or a prefix language model.
3. The remaining layers are the sites. Each gets its name, its scale and its gauge.

**The gauge** is the one factorisation of a LoRA's update that is well defined.
`A` and `B` are defined only up to an invertible matrix `M`: `(M·A, B·M⁻¹)` is the same adapter with
different rows. The singular value decomposition of the update, `scale·B·A = U·S·Vᵀ`, has no such
freedom. So in the svd gauge, rows are `h' = Vᵀ·x`:

1. `Aᵀ = Qa·Ra` and `B = Qb·Rb`, thin, in float64. No matrix is as large as the base weight.
2. `scale·Rb·Raᵀ = U'·S·V'ᵀ`, which is small. Then `U = Qb·U'` and `V = Qa·V'`.
3. Columns are sorted by falling `S`. The largest entry of each right singular vector is positive.
4. `mix = Vᵀ·A⁺ = V'ᵀ·(Raᵀ)⁺`, so that `h' = mix·h` can be computed from the model's `h = A·x`.

Directions that write nothing (`S` below 1e-10 of the largest) are zero in `mix` and `S`. If two
values of `S` are equal, their columns are defined only up to a rotation. Rounding errors of `h`
grow by at most the condition number of `A`, which is near 1 for trained adapters.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorascope.errors import AdapterError, first_line
from lorascope.sites import Site, SiteLayout, name_modules
from lorascope.subject.adapter import Adapter, is_routed, lora_kind, lora_tensors

_N_PROBED = 3
_ZERO = 1e-10
_TIE = 1e-9  # entries this close in magnitude are tied; the first of them decides the sign


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
    """Run the model on three tokens; return why layers gave no row per token, by path.

    Raises AdapterError if the model cannot read text alone, or if later tokens change rows.
    """
    ids = torch.arange(_N_PROBED, device=device)[None]
    rows = _record(bottlenecks, run, ids)
    others = _record(bottlenecks, run, torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1))
    reasons = {path: reason for path, calls in rows.items() if (reason := _no_row_reason(calls))}
    for path in rows.keys() - reasons.keys():
        before, after = (
            calls[path][0].reshape(_N_PROBED, -1)[:-1].double() for calls in (rows, others)
        )
        change = float((before - after).norm() / before.norm().clamp(min=1e-30))
        # A router may group the other tokens in another way, which changes rounding.
        if change > math.sqrt(torch.finfo(rows[path][0].dtype).eps):
            raise AdapterError(
                f"rows of a token change with later tokens (at {path}, by {change:.2g} of their "
                "norm): this is no causal language model, and a token has no row of its own"
            )
    return reasons


def _record(
    bottlenecks: Sequence[Bottleneck], run: Callable[..., Any], ids: Int[Tensor, "1 tok"]
) -> dict[str, list[Tensor]]:
    """Run the model on a text; return what each layer gave at each of its calls, by path."""
    rows: dict[str, list[Tensor]] = {layer.path: [] for layer in bottlenecks}

    def keep(path: str) -> Callable[..., None]:
        return lambda _module, _args, output: rows[path].append(output)

    handles = [layer.read.register_forward_hook(keep(layer.path)) for layer in bottlenecks]
    try:
        with torch.inference_mode():
            run(input_ids=ids, use_cache=False)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise AdapterError(
            f"this model cannot read text alone ({first_line(error)}); lorascope studies causal "
            "language models"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return rows


def make_layout(
    bottlenecks: Sequence[Bottleneck], adapter: Adapter, gauge: str
) -> tuple[SiteLayout, tuple[nn.Module, ...], tuple[Tensor | None, ...]]:
    """Return the layout, and for each of its sites the module to read and the mix (None: raw).

    `gauge` is `raw`, `svd`, or `auto`: svd where the rank is above 1. A rank-1 row is determined
    up to its scale anyway.
    """
    # Name the modules of the whole file, so that names do not depend on which can be read.
    named = name_modules([*lora_tensors(adapter.shapes), *(layer.path for layer in bottlenecks)])
    kind = lora_kind(adapter.config)
    parts: list[tuple[Site, nn.Module, Tensor | None]] = []
    for layer in bottlenecks:
        mix, norms = None, layer.b.norm(dim=0)
        rank = layer.a.shape[0]
        is_svd = {"raw": False, "svd": True, "auto": rank > 1}[gauge]
        if is_svd:
            exact, written = svd_gauge(layer.a, layer.b, layer.scale)
            norms = written / abs(layer.scale) if layer.scale else written
            mix = exact.to(next(layer.read.parameters()).device, torch.float32)
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
        # PEFT nests one wrapper for each parameter of a module.
        return re.sub(r"(\.base_layer)+$", "", path) + f".{parameter}", "LoRA on a parameter"
    if name in layer.get_submodule("lora_embedding_A"):  # type: ignore[operator]  # a ParameterDict
        return path, "LoRA on an embedding"
    if is_routed(path):
        return path, "an expert that sees only tokens routed to it"
    weight = layer.get_submodule(f"lora_A.{name}").weight
    return path, None if isinstance(weight, Tensor) and weight.ndim == 2 else "a convolution"


def _no_row_reason(calls: list[Tensor]) -> str | None:
    if len(calls) != 1:
        return f"called {len(calls)} times in a forward" if calls else "never called"
    # A layer may see the batch flattened: (tokens, rank) holds the same rows as (1, tokens, rank).
    n_seen = math.prod(calls[0].shape[:-1])
    return None if n_seen == _N_PROBED else f"called for {n_seen} of {_N_PROBED} tokens"


def _matrix(module: nn.Module) -> Tensor:
    """Return the whole matrix of a LoRA factor, in float64 on the CPU."""
    whole = getattr(module, "weight_as_blockdiagonal_matrix", None)  # BD-LoRA stores blocks only
    weight = whole() if whole else module.get_parameter("weight")
    return weight.detach().cpu().double()


def svd_gauge(
    a: Float[Tensor, "rank d_x"], b: Float[Tensor, "d_y rank"], scale: float
) -> tuple[Float[Tensor, "rank rank"], Float[Tensor, " rank"]]:
    """Return `mix` (rows are `h @ mix.T`) and `S`, both in float64 on the CPU.

    `S[i]` is the Euclidean norm of what a value of 1 in column i writes.
    """
    rank = a.shape[0]
    q_a, r_a = torch.linalg.qr(a.detach().cpu().double().T)
    _, r_b = torch.linalg.qr(b.detach().cpu().double())
    _, s, vh = torch.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    keep = s > _ZERO * s.max() if s.numel() else s > 0
    signs = _signs(q_a @ vh.T)
    rows = (signs * keep)[:, None] * (vh @ torch.linalg.pinv(r_a.T))
    mix = torch.zeros(rank, rank, dtype=torch.float64)
    values = torch.zeros(rank, dtype=torch.float64)
    mix[: len(rows)] = rows
    values[: len(rows)] = s * keep
    return mix, values


def unmix(mix: Float[Tensor, "rank rank"]) -> Float[Tensor, "rank rank"]:
    """Return the `back` with which `h = h' @ back.T`, up to directions that write nothing.

    `B @ back` is `B` in the gauge: it writes for `h'` what `B` writes for `h`.
    """
    return torch.linalg.pinv(mix.double()).to(mix.dtype)


def _signs(v: Float[Tensor, "d_x k"]) -> Float[Tensor, " k"]:
    """Return the sign of each column's largest entry; of tied entries, the first decides."""
    size = v.abs()
    first = (size >= (1 - _TIE) * size.max(dim=0).values).to(torch.int8).argmax(dim=0)
    return torch.where(v.gather(0, first[None])[0] < 0, -1.0, 1.0).double()
