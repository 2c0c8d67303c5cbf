"""Run the subject while its rows are read and changed.

Rows are written where they are read: at the output of each site's `lora_A`. While a `RowEditor` is
open:

1. `h = A·x` of a site becomes row values in the site's gauge, `r = h·mixᵀ`, as in the store.
2. The edit returns new values `r'`. Without an edit, or where `r' = r`, `h` keeps every bit.
   Otherwise `h = r'` in the raw gauge and `h = r'·backᵀ` in the svd gauge, where
   `back = unmix(mix)`. A row of zeros then writes exactly nothing.
3. The rest of the network continues from the new `h`: later sites read the effect of the edit.

This runs PEFT's own forward, not the faster one of `hooks`, because that is the model that users
run. If a site does not run exactly once for every token, that is an error and never a run without
its edit: torch silently skips hooks on a module that was compiled before.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.subject.bottlenecks import unmix
from lorascope.subject.load import Subject

__all__ = ["Edit", "Outcome", "RowEditor"]

_SITES = 1_000_003  # more than any model has, so that each seed and site has its own generator

Edit = Callable[[slice, Tensor], Tensor | None]
"""`(columns, values) -> new values` of one site, `(batch, seq, rank)` in float32. `columns` are the
site's columns in the row. None leaves the site unchanged."""


class Outcome(NamedTuple):
    """One forward: logits `(batch, seq, vocab)`, rows as read `(batch, seq, d_in)`, the cache."""

    logits: Tensor
    rows: Float[Tensor, "batch seq d_in"]
    cache: Any


class RowEditor:
    """A context in which `run` runs the subject with an edit, and `base` runs it without adapter.

    Leaving the context restores the model, also after an error. `seed` decides the directions of
    `push`.
    """

    def __init__(self, subject: Subject, *, seed: int = 0) -> None:
        self.subject = subject
        layout = subject.layout
        ends = torch.tensor([site.rank for site in layout.sites]).cumsum(0).tolist()
        self._columns = [
            slice(end - site.rank, end) for end, site in zip(ends, layout.sites, strict=True)
        ]
        self._backs = [None if mix is None else unmix(mix) for mix in subject.mixes]
        self._seed = seed
        self._handles: list[Any] = []
        self._read: list[list[Tensor]] | None = None  # per site, while running
        self._shape: tuple[int, ...] = ()
        self._edit: Edit | None = None
        self._push: Tensor | None = None

    def __enter__(self) -> "RowEditor":
        try:
            for index, (site, read) in enumerate(
                zip(self.subject.layout.sites, self.subject.sites, strict=True)
            ):
                write = _lora_b(self.subject, site.module)
                self._handles.append(read.register_forward_hook(self._at_read(index)))
                self._handles.append(write.register_forward_hook(self._at_write(index)))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def run(
        self,
        token_ids: Int[Tensor, "batch seq"],
        edit: Edit | None = None,
        *,
        push: Float[Tensor, "batch site"] | None = None,
        cache: Any = None,
    ) -> Outcome:
        """Run one batch of rollouts with the adapter on and its rows changed by `edit`.

        Rollouts begin at position 0; a shorter one may be padded on the right with any token.
        `push` is a control: it adds a random direction, the same for every token, to what site i
        writes, with `push[:, i]` times the Euclidean norm of what the site writes. With `cache`
        (True for a new one, or the cache of an earlier outcome) pass only the next tokens. Raises
        AdapterError unless each site ran exactly once, for every token.
        """
        self._read = [[] for _ in self.subject.sites]
        self._edit, self._push, self._shape = edit, push, tuple(token_ids.shape)
        try:
            out = self.subject.causal(
                input_ids=token_ids.to(self.subject.device),
                use_cache=cache is not None,
                **({} if cache in (None, True) else {"past_key_values": cache}),
            )
            return Outcome(out.logits, self._rows(self._read), out.get("past_key_values"))
        finally:
            self._read = self._edit = self._push = None

    def base(self, token_ids: Int[Tensor, "batch seq"]) -> Tensor:
        """Run one batch of rollouts without the adapter; return the logits."""
        with adapter_off(self.subject):
            out = self.subject.causal(input_ids=token_ids.to(self.subject.device), use_cache=False)
        return out.logits

    def _at_read(self, index: int) -> Callable[..., Tensor | None]:
        mix, back = self.subject.mixes[index], self._backs[index]
        columns, rank = self._columns[index], self.subject.layout.sites[index].rank

        def hook(_module: nn.Module, _args: Any, h: Tensor) -> Tensor | None:
            if self._read is None:
                return None  # not in `run`
            self._require_tokens(index, h.numel() // rank)
            flat = h.reshape(-1, rank)
            values = flat.float() if mix is None else flat.float() @ mix.T
            values = values.view(*self._shape, rank)
            self._read[index].append(values)
            new = None if self._edit is None else self._edit(columns, values)
            if new is None:
                return None
            new = new.to(h.device, torch.float32).expand_as(values).reshape(-1, rank)
            if back is None:
                return new.to(h.dtype).view_as(h)
            written = new @ back.T
            if not new.requires_grad:  # a gradient must flow through the values
                same = (new == values.view(-1, rank)).all(-1, keepdim=True)
                written = torch.where(same, flat.float(), written)
            return written.to(h.dtype).view_as(h)

        return hook

    def _at_write(self, index: int) -> Callable[..., Tensor | None]:
        direction: list[Tensor] = []  # drawn when first needed

        def hook(_module: nn.Module, _args: Any, out: Tensor) -> Tensor | None:
            if self._push is None or self._read is None:
                return None
            if not direction:
                generator = torch.Generator().manual_seed(self._seed * _SITES + index)
                drawn = torch.randn(out.shape[-1], generator=generator)
                direction.append((drawn / drawn.norm()).to(out.device, out.dtype))
            share = self._push[:, index].to(out.device, out.dtype)
            flat = out.view(*self._shape, -1)
            norm = flat.norm(dim=-1, keepdim=True)
            return (flat + share[:, None, None] * norm * direction[0]).view_as(out)

        return hook

    def _require_tokens(self, index: int, n_tokens: int) -> None:
        expected = math.prod(self._shape)
        if n_tokens != expected:
            raise AdapterError(
                f"{self.subject.layout.sites[index].module} saw {n_tokens} of {expected} tokens, "
                "expected all: an edit would miss some"
            )

    def _rows(self, read: list[list[Tensor]]) -> Tensor:
        for site, values in zip(self.subject.layout.sites, read, strict=True):
            if len(values) != 1:
                raise AdapterError(
                    f"lora_A of {site.module} ran {len(values)} times in one forward, expected 1; "
                    "if the model was compiled, load it again"
                )
        return torch.cat([values[0].to(self.subject.device) for values in read], dim=-1)


@contextmanager
def adapter_off(subject: Subject) -> Generator[None]:
    """Turn the adapter off in this block: LoRA, DoRA and trained modules.

    PEFT marks the adapter's weights as trainable when it turns it on again; this restores their
    `requires_grad`.
    """
    model: Any = subject.model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _lora_b(subject: Subject, path: str) -> nn.Module:
    layer = subject.causal.get_submodule(path)
    return layer.lora_B[layer.active_adapters[0]]
