"""Read `h = A·x` of every adapted module while the subject runs, at the cost of a bare forward.

PEFT adds `scale · B(h)` to a module's output in several passes over it. For the time of a reading,
each plain LoRA layer runs instead:

1. `h = A·x` in the adapter's own type, as PEFT computes it, while `x` is still in the cache.
2. `h` is kept as it is; after the forward all sites become rows at once, each in its gauge.
3. `out = base(x)`, and `out += scale · h·Bᵀ` in place, in one pass. Where the base computes in 16
   bits and the adapter is kept in 32, `h` and `B` are each split into a high and a low half, so
   that nothing is lost before the sum is rounded.

Layers that do more than this (DoRA and its like) run PEFT's own forward, with a hook on `lora_A`.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.subject.load import Subject

_Keep = Callable[[Tensor], None]


class RowReader:
    """A context in which `read` runs the subject and returns the rows of a batch.

    `own_forward` off runs PEFT's forward everywhere: the reference that the other must agree with.
    What was changed in the model is undone on leaving, also when a forward raised.
    """

    def __init__(self, subject: Subject, *, own_forward: bool = True) -> None:
        self.subject = subject
        self.own_forward = own_forward
        self._kept: list[list[Tensor]] | None = None  # of each site, while reading
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "RowReader":
        for index, (site, module) in enumerate(
            zip(self.subject.layout.sites, self.subject.sites, strict=True)
        ):
            layer = self.subject.causal.get_submodule(site.module)
            keep = self._keeper(index)
            if self.own_forward and _is_plain(layer):
                self._replace(layer, _forward(layer, keep))
            else:
                handle = module.register_forward_hook(lambda _m, _args, h, keep=keep: keep(h))
                self._undo.append(handle.remove)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _replace(self, layer: nn.Module, forward: Callable[..., Tensor]) -> None:
        before = layer.__dict__.get("forward")  # accelerate puts its own there
        layer.forward = forward
        self._undo.append(
            (lambda: layer.__dict__.pop("forward"))
            if before is None
            else (lambda: setattr(layer, "forward", before))
        )

    def _keeper(self, index: int) -> _Keep:
        def keep(h: Tensor) -> None:
            if self._kept is not None:  # else the model writes a text
                self._kept[index].append(h)

        return keep

    @torch.inference_mode()
    def read(self, token_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_in"]:
        """Run one batch of texts and return every row in float32, on the subject's device.

        Texts begin at place 0; what comes after a shorter one's end may be any token, and its rows
        are garbage. A causal model never looks ahead, so that a text's own rows need no mask.
        Raises AdapterError unless each site ran exactly once, for every token.
        """
        self._kept = [[] for _ in self.subject.sites]
        try:
            self.subject.backbone(input_ids=token_ids.to(self.subject.device), use_cache=False)
            return self._rows(self._kept, token_ids.numel()).view(*token_ids.shape, -1)
        finally:
            self._kept = None

    def _rows(self, kept: list[list[Tensor]], n_tokens: int) -> Float[Tensor, "place d_in"]:
        parts: list[Tensor] = []
        for site, mix, found in zip(
            self.subject.layout.sites, self.subject.mixes, kept, strict=True
        ):
            if len(found) != 1:
                raise AdapterError(
                    f"lora_A of {site.module} ran {len(found)} times in one forward, expected once"
                )
            h = found[0].reshape(-1, site.rank)
            if len(h) != n_tokens:
                raise AdapterError(
                    f"{site.module} saw {len(h)} of {n_tokens} tokens: it has no row for each; "
                    "--skip-unhookable leaves such modules out"
                )
            parts.append((h if mix is None else h.float() @ mix.T).to(self.subject.device))
        return torch.cat(parts, dim=1).float()


def _is_plain(layer: nn.Module) -> bool:
    """Say whether a layer's output is `base(x) + scale · B(A·x)` and nothing else."""
    if type(layer) is not LoraLinear or layer.disable_adapters or layer.merged:
        return False
    name = layer.active_adapters[0]
    return (
        len(layer.active_adapters) == 1
        and not layer.use_dora[name]
        and name not in layer.lora_variant
        and layer.lora_B[name].bias is None
        and layer.lora_A[name].bias is None
    )


def _forward(layer: Any, keep: _Keep) -> Callable[..., Tensor]:
    """Return steps 1 to 3 of the module's text for one layer."""
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    dtype = layer.get_base_layer().weight.dtype
    split = dtype in (torch.bfloat16, torch.float16) and a.dtype == torch.float32
    read = _read_in_parts(a, dtype) if split and a.is_cuda else _read_plainly(a)
    right = b.T * float(layer.scaling[name])
    if split:
        high, low = _halves(right, dtype)
        right = torch.cat([high, high, low])
    right = right.to(dtype).contiguous()

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = read(x)
        keep(h)
        out = layer.base_layer(x, *args, **kwargs)
        left = h.reshape(-1, h.shape[-1])
        if split:
            high, low = _halves(left, dtype)
            left = torch.cat([high, low, high], dim=1)
        flat = out.view(-1, out.shape[-1])
        if len(right) == 1:
            flat.addcmul_(left.to(dtype), right)  # half the time of a product with one column
        else:
            flat.addmm_(left.to(dtype), right)
        return out

    return forward


def _read_plainly(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: nn.functional.linear(x.to(a.dtype), a)


def _read_in_parts(a: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return `x ↦ A·x` in float32 for 16-bit `x`, which is read once and never widened.

    Three 16-bit parts hold the 24 bits of a float32; products are summed in float32.
    """
    parts, rest = [], a
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    stacked = torch.cat(parts).T.contiguous()  # (d, 3 * rank)

    def read(x: Tensor) -> Tensor:
        flat = torch.mm(x.reshape(-1, x.shape[-1]), stacked, out_dtype=torch.float32)
        return flat.view(*x.shape[:-1], 3, -1).sum(-2)

    return read


def _halves(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `high + low`, each of 16 bits, as near to a float32 `x` as two such numbers come."""
    high = x.to(dtype)
    return high, (x - high.float()).to(dtype)
