"""Read `h = A·x` of every adapted module while the subject runs, at the cost of a plain forward.

PEFT adds `scale · B(h)` to a module's output in several passes over it. While a `RowReader` is
open, each plain LoRA layer runs this faster forward instead:

1. `h = A·x` in the adapter's dtype, as PEFT computes it, while `x` is still in the cache.
2. Keep `h`. After the forward, all sites become rows at once, each in its gauge.
3. `out = base(x)`, then `out += scale · h·Bᵀ` in place, in one pass. If the base computes in 16
   bits and the adapter in 32, `h` and `B` are each split into a high and a low half, so that
   nothing is lost before the sum is rounded.

Other layers, such as DoRA's, run PEFT's own forward with a hook on `lora_A`.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from lorascope.errors import AdapterError
from lorascope.sites import Site
from lorascope.subject.load import Subject

_Keep = Callable[[Tensor], None]
Hooks = TypeVar("Hooks", bound="SiteHooks")


class SiteHooks:
    """A context in which every site of a subject is hooked. Leaving it restores the model."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._undo = ExitStack()

    def __enter__(self: Hooks) -> Hooks:
        with ExitStack() as undo:  # undone if one of them fails
            sites = zip(self.subject.layout.sites, self.subject.sites, strict=True)
            for index, (site, read) in enumerate(sites):
                layer = self.subject.causal.get_submodule(site.module)
                for remove in self._hook(index, layer, read):
                    undo.callback(remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _hook(self, index: int, layer: Any, read: nn.Module) -> Iterable[Callable[[], object]]:
        """Add hooks to one site, whose `lora_A` is `read`; yield what removes each of them."""
        raise NotImplementedError

    def _require_once(self, site: Site, outputs: Sequence[Tensor]) -> Tensor:
        """Return the only output of a site in a forward. torch skips hooks of compiled modules."""
        if len(outputs) != 1:
            raise AdapterError(
                f"lora_A of {site.module} ran {len(outputs)} times in one forward, expected 1; "
                "if the model was compiled, load it again"
            )
        return outputs[0]


class RowReader(SiteHooks):
    """A context in which `read` runs the subject and returns the rows of a batch.

    `own_forward=False` runs PEFT's forward everywhere, as a reference for the faster one.
    """

    def __init__(self, subject: Subject, *, own_forward: bool = True) -> None:
        super().__init__(subject)
        self.own_forward = own_forward
        self._kept: list[list[Tensor]] | None = None  # per site, while reading

    def _hook(self, index: int, layer: Any, read: nn.Module) -> Iterable[Callable[[], object]]:
        def keep(h: Any) -> None:
            if self._kept is not None:  # None while the model generates
                self._kept[index].append(h)

        if self.own_forward and is_plain(layer):
            yield replace_forward(layer, _fast_forward(layer, keep))
        else:
            yield read.register_forward_hook(lambda _module, _args, h: keep(h)).remove

    @torch.inference_mode()
    def read(self, token_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_in"]:
        """Run one batch of rollouts and return every row in float32, on the subject's device.

        Rollouts begin at position 0. A shorter one may be padded on the right with any token, whose
        rows are garbage; a causal model never looks ahead, so the others need no mask. Raises
        AdapterError unless each site ran exactly once, for every token.
        """
        self._kept = [[] for _ in self.subject.sites]
        try:
            self.subject.backbone(input_ids=token_ids.to(self.subject.device), use_cache=False)
            return self._rows(self._kept, token_ids.numel()).view(*token_ids.shape, -1)
        finally:
            self._kept = None

    def _rows(self, kept: list[list[Tensor]], n_tokens: int) -> Float[Tensor, "tok d_in"]:
        parts: list[Tensor] = []
        for site, mix, outputs in zip(
            self.subject.layout.sites, self.subject.mixes, kept, strict=True
        ):
            h = self._require_once(site, outputs).reshape(-1, site.rank)
            if len(h) != n_tokens:
                raise AdapterError(
                    f"{site.module} saw {len(h)} of {n_tokens} tokens, expected all; "
                    "--skip-unhookable leaves such modules out"
                )
            parts.append((h if mix is None else h.float() @ mix.T).to(self.subject.device))
        return torch.cat(parts, dim=1).float()


def replace_forward(layer: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Let a layer run another forward; return what undoes it."""
    before = layer.__dict__.get("forward")  # accelerate puts its own there
    layer.forward = forward
    if before is None:
        return lambda: layer.__dict__.pop("forward")
    return lambda: setattr(layer, "forward", before)


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer's output is exactly `base(x) + scale · B(A·x)`."""
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


def _fast_forward(layer: Any, keep: _Keep) -> Callable[..., Tensor]:
    """Return the forward of one layer: steps 1 to 3 of the module's docstring."""
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    dtype = layer.get_base_layer().weight.dtype
    split = dtype in (torch.bfloat16, torch.float16) and a.dtype == torch.float32
    read = _read_split(a, dtype) if split and a.is_cuda else lambda x: linear(x.to(a.dtype), a)
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
        add_product(out.view(-1, out.shape[-1]), left.to(dtype), right)
        return out

    return forward


def add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to `out`."""
    if len(right) == 1:
        out.addcmul_(left, right)  # twice as fast as a product with one column
    else:
        out.addmm_(left, right)


def _read_split(a: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return `x ↦ A·x` in float32 for 16-bit `x`, which is read once and never converted.

    `A` is split into three 16-bit parts that hold the 24 bits of a float32. Products are summed in
    float32.
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
    """Return 16-bit `high` and `low` whose sum is as close to a float32 `x` as possible."""
    high = x.to(dtype)
    return high, (x - high.float()).to(dtype)
