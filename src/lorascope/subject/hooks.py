"""Read `h = A·x` of every adapted module while the subject runs, at the cost of a bare forward.

PEFT adds `scale · B(h)` to a module's output in several passes over it. For the time of a reading,
each plain LoRA layer runs instead:

1. `out = base(x)`, and `h = A·x` in the adapter's own type, as PEFT computes it.
2. `h`, in the gauge of its site, is kept: one line per column, turned into rows at the end.
3. `out += scale · h·Bᵀ` in place, in one pass. Where the base computes in 16 bits and the adapter
   is kept in 32, `h` and `B` are each split into a high and a low half, so that nothing is lost
   before the sum is rounded.

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
        self._fired = [0] * len(subject.sites)
        self._columns: Tensor | None = None
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "RowReader":
        start = 0
        for index, (site, module) in enumerate(
            zip(self.subject.layout.sites, self.subject.sites, strict=True)
        ):
            keep = self._keeper(index, slice(start, start + site.rank))
            layer = self.subject.causal.get_submodule(site.module)
            if self.own_forward and _is_plain(layer):
                self._replace(layer, _forward(layer, keep))
            else:
                handle = module.register_forward_hook(lambda _m, _args, h, keep=keep: keep(h))
                self._undo.append(handle.remove)
            start += site.rank
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

    def _keeper(self, index: int, columns: slice) -> _Keep:
        mix = self.subject.mixes[index]

        def keep(h: Tensor) -> None:
            if self._columns is None:
                return  # a forward of somebody else's: the model writes a text
            self._fired[index] += 1
            flat = h.reshape(-1, h.shape[-1])
            if flat.shape[0] != self._columns.shape[1]:
                site = self.subject.layout.sites[index]
                raise AdapterError(
                    f"{site.module} saw {flat.shape[0]} of {self._columns.shape[1]} tokens: it "
                    "has no row for each; --skip-unhookable leaves such modules out"
                )
            mixed = flat if mix is None else flat.float() @ mix.T
            self._columns[columns] = mixed.T

        return keep

    @torch.inference_mode()
    def read(self, token_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_in"]:
        """Run one batch of texts and return every row in float32, on the subject's device.

        Texts begin at place 0; what comes after a shorter one's end may be any token, and its rows
        are garbage. A causal model never looks ahead, so that a text's own rows need no mask.
        Raises AdapterError unless each site ran exactly once, for every token.
        """
        d_in = self.subject.layout.d_in
        self._columns = torch.empty(d_in, token_ids.numel(), device=self.subject.device)
        self._fired = [0] * len(self._fired)
        self.subject.backbone(input_ids=token_ids.to(self.subject.device), use_cache=False)
        for site, count in zip(self.subject.layout.sites, self._fired, strict=True):
            if count != 1:
                raise AdapterError(
                    f"lora_A of {site.module} ran {count} times in one forward, expected once"
                )
        columns, self._columns = self._columns, None
        return columns.T.reshape(*token_ids.shape, d_in)


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
    scale = float(layer.scaling[name])
    dtype = layer.get_base_layer().weight.dtype
    split = dtype in (torch.bfloat16, torch.float16) and a.dtype == torch.float32
    read = _read_in_parts(a, dtype) if split and a.is_cuda else _read_plainly(a)
    right = b.T.contiguous()
    if split:
        high, low = _halves(right, dtype)
        right = torch.cat([high, high, low])

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = layer.base_layer(x, *args, **kwargs)
        h = read(x)
        keep(h)
        left = h.reshape(-1, h.shape[-1])
        if split:
            high, low = _halves(left, dtype)
            left = torch.cat([high, low, high], dim=1)
        out.view(-1, out.shape[-1]).addmm_(left.to(out.dtype), right.to(out.dtype), alpha=scale)
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
