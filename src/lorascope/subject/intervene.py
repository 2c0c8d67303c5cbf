"""Run the subject while its rows are read and changed.

Rows are written where they are read: at the output of each site's `lora_A`. While a `RowEditor` is
open:

1. `h = A·x` of a site becomes row values in the site's gauge, `r = h·mixᵀ`, as in the store.
2. The edit returns new values `r'`. Without an edit, or where `r' = r`, `h` keeps every bit.
   Otherwise `h = r'` in the raw gauge and `h = r'·backᵀ` in the svd gauge, where
   `back = unmix(mix)`. A row of zeros then writes exactly nothing.
3. The rest of the network continues from the new `h`: later sites read the effect of the edit.

By default this runs PEFT's own forward. With `fast`, plain LoRA layers run
`out = base(x) + r'·(scale·B·back)ᵀ` in one pass instead, and held rows are written without
computing `A·x` at all; the results differ by rounding only. If a site does not run exactly
once for every token, that is an error and never a run without its edit: torch silently skips hooks
on a module that was compiled before.
"""

import inspect
import math
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lorascope.errors import AdapterError
from lorascope.subject.bottlenecks import unmix
from lorascope.subject.hooks import SiteHooks, add_product, is_plain, replace_forward
from lorascope.subject.load import Subject

_SITES = 1_000_003  # more than any model has, so that each seed and site has its own generator

Edit = Callable[[slice, Tensor], Tensor | None]
"""`(columns, values) -> new values` of one site, `(batch, seq, rank)` in float32. `columns` are the
site's columns in the row. None leaves the site unchanged."""


class Outcome(NamedTuple):
    """One forward: logits `(batch, seq, vocab)`, rows as read `(batch, seq, d_in)`, the cache.

    `layers` are the outputs of the decoder layers, `(batch, seq, d)` each, if they were kept.
    """

    logits: Tensor
    rows: Float[Tensor, "batch seq d_in"]
    cache: Any
    layers: list[Tensor]


@dataclass
class _Run:
    """What a forward changes, and what it has read so far."""

    shape: tuple[int, ...]
    edit: Edit | None
    push: Tensor | None
    held: tuple[Tensor, ...] | None  # per site
    above: tuple[int, Tensor] | None
    lean: bool
    read: list[list[Tensor]]  # per site
    layers: list[Tensor] | None


class RowEditor(SiteHooks):
    """A context in which `run` runs the subject with an edit, and `base` runs it without adapter.

    `seed` decides the directions of `push`. `fast` leaves PEFT's forward; the runs that are
    compared must then all be fast.
    """

    def __init__(self, subject: Subject, *, seed: int = 0, fast: bool = False) -> None:
        super().__init__(subject)
        self.fast = fast
        self._backs = [None if mix is None else unmix(mix) for mix in subject.mixes]
        self._seed = seed
        self._run: _Run | None = None
        self._directions: dict[int, Tensor] = {}  # of pushes, by site
        takes = inspect.signature(subject.causal.forward).parameters
        self._keeps_logits = "logits_to_keep" in takes

    def __enter__(self) -> "RowEditor":
        super().__enter__()
        for index, layer in enumerate(_decoder_layers(self.subject) if self.fast else []):
            self._undo.callback(replace_forward(layer, self._layer_forward(index, layer)))
        return self

    def _hook(self, index: int, layer: Any, read: nn.Module) -> Iterable[Callable[[], object]]:
        if self.fast and is_plain(layer):
            yield replace_forward(layer, self._fast_forward(index, layer))
        else:
            write = layer.lora_B[layer.active_adapters[0]]
            yield read.register_forward_hook(self._at_read(index)).remove
            yield write.register_forward_hook(self._at_write(index)).remove

    def run(
        self,
        token_ids: Int[Tensor, "batch seq"],
        edit: Edit | None = None,
        *,
        held: Float[Tensor, "batch seq d_in"] | None = None,
        push: Float[Tensor, "batch site"] | None = None,
        cache: Any = None,
        logits_at: Int[Tensor, "kept"] | None = None,
        keep_layers: bool = False,
        above: tuple[int, Float[Tensor, "batch seq d"]] | None = None,
        lean: bool = False,
    ) -> Outcome:
        """Run one batch of rollouts with the adapter on and its rows changed by `edit`.

        `held` are rows to write as they are, instead of an edit; they are the outcome's rows then.
        `logits_at` are the positions whose logits to return; default: all.

        `above` (fast only) is a decoder layer and its input: those below do not run, and the
        outcome has no rows of theirs. `keep_layers` keeps the outputs that such inputs are. `lean`
        (fast only) keeps no more of each decoder layer than its input for the backward pass, which
        runs the layer again.

        Rollouts begin at position 0; a shorter one may be padded on the right with any token.
        `push` is a control: it adds a random direction, the same for every token, to what site i
        writes, with `push[:, i]` times the Euclidean norm of what the site writes. With `cache`
        (True for a new one, or the cache of an earlier outcome) pass only the next tokens. Raises
        AdapterError unless each site ran exactly once, for every token.
        """
        assert edit is None or held is None
        split = None
        if held is not None:
            held = held.to(self.subject.device, torch.float32)
            split = held.split([site.rank for site in self.subject.layout.sites], dim=-1)
            edit = lambda columns, _, rows=held: rows[..., columns]  # noqa: E731
        run = self._run = _Run(
            shape=tuple(token_ids.shape),
            edit=edit,
            push=push,
            held=split,
            above=above,
            lean=lean and torch.is_grad_enabled(),
            read=[[] for _ in self.subject.sites],
            layers=[] if keep_layers else None,
        )
        try:
            logits, cache = self._forward(token_ids, cache, logits_at)
            rows = self._rows(run)
            return Outcome(logits, rows if held is None else held, cache, run.layers or [])
        finally:
            self._run = None

    def _forward(
        self, token_ids: Tensor, cache: Any = None, logits_at: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Return the logits, as `run` does, and the cache."""
        given: dict[str, Any] = {} if cache in (None, True) else {"past_key_values": cache}
        if logits_at is not None and self._keeps_logits:
            given["logits_to_keep"] = logits_at.to(self.subject.device)
        out = self.subject.causal(
            input_ids=token_ids.to(self.subject.device), use_cache=cache is not None, **given
        )
        logits = out.logits
        if logits_at is not None and not self._keeps_logits:
            logits = logits[:, logits_at.to(logits.device)]
        return logits, out.get("past_key_values")

    def base(
        self,
        token_ids: Int[Tensor, "batch seq"],
        *,
        cache: Any = None,
        logits_at: Int[Tensor, "kept"] | None = None,
    ) -> Tensor:
        """Run one batch of rollouts without the adapter; return the logits, as `run` does.

        `cache` is one of the base's own (`base_cache`).
        """
        with adapter_off(self.subject):
            return self._forward(token_ids, cache, logits_at)[0]

    def base_cache(self, token_ids: Int[Tensor, "batch seq"]) -> Any:
        """Return the cache of a run without the adapter."""
        with adapter_off(self.subject):
            return self._forward(token_ids, cache=True)[1]

    def _fast_forward(self, index: int, layer: Any) -> Callable[..., Tensor]:
        """Return the forward of a plain layer: read, edit and write its row in few passes."""
        name, own, columns = (
            layer.active_adapters[0],
            layer.forward,
            self.subject.layout.slices[index],
        )
        mix, back = self.subject.mixes[index], self._backs[index]
        a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        read = a if mix is None else mix.to(a) @ a
        write = b.T * float(layer.scaling[name])
        write = write.contiguous() if back is None else back.T.to(write) @ write

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if (run := self._run) is None:
                return own(x, *args, **kwargs)
            self._require_tokens(run, index, x.numel() // x.shape[-1])
            out = layer.base_layer(x, *args, **kwargs)
            if run.held is not None:
                values = run.held[index].to(x.device)
                run.read[index].append(values)
            else:
                values = nn.functional.linear(x.to(read.dtype), read).float()
                values = values.view(*run.shape, -1)
                run.read[index].append(values)
                new = None if run.edit is None else run.edit(columns, values)
                values = values if new is None else new.to(x.device, torch.float32)
            left = values.expand(*run.shape, -1).reshape(-1, len(write)).to(write.dtype)
            flat = out.view(-1, out.shape[-1])
            if out.dtype != write.dtype:
                flat = (flat + left @ write).to(out.dtype)
            elif torch.is_grad_enabled():  # the gradient of an in-place sum would copy the output
                flat = torch.addmm(flat, left, write)
            else:
                add_product(flat, left, write)
            out = flat.view_as(out)
            self._push(run, index, out, lambda at: left.view(*run.shape, -1)[at] @ write)
            return out

        return forward

    def _layer_forward(self, index: int, layer: Any) -> Callable[..., Any]:
        """Return the forward of a decoder layer that can be left out and whose output is kept."""
        own = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if (run := self._run) is None:
                return own(*args, **kwargs)
            if run.above is not None and index < run.above[0]:
                return run.above[1]
            if run.lean:
                return self._checkpointed(run, own, *args, **kwargs)
            out = own(*args, **kwargs)
            if run.layers is not None and isinstance(out, Tensor):
                run.layers.append(out)
            return out

        return forward

    def _checkpointed(self, run: _Run, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer, and once more for its backward pass, with what changes it now."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._run is not None:
                return own(*args, **kwargs)
            self._run = replace(run, read=[[] for _ in self.subject.sites])
            try:
                return own(*args, **kwargs)
            finally:
                self._run = None

        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _at_read(self, index: int) -> Callable[..., Tensor | None]:
        mix, back = self.subject.mixes[index], self._backs[index]
        layout = self.subject.layout
        columns, rank = layout.slices[index], layout.sites[index].rank

        def hook(_module: nn.Module, _args: Any, h: Tensor) -> Tensor | None:
            if (run := self._run) is None:
                return None
            self._require_tokens(run, index, h.numel() // rank)
            flat = h.reshape(-1, rank)
            values = flat.float() if mix is None else flat.float() @ mix.T
            values = values.view(*run.shape, rank)
            run.read[index].append(values)
            new = None if run.edit is None else run.edit(columns, values)
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

    def _at_write(self, index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, out: Tensor) -> None:
            if (run := self._run) is not None:
                self._push(run, index, out, lambda at: out.view(*run.shape, -1)[at])

        return hook

    def _push(
        self, run: _Run, index: int, out: Tensor, written: Callable[[Tensor], Tensor]
    ) -> None:
        """Add the pushes at a site to `out`; `written` returns what the site writes in copies."""
        if run.push is None or not len(at := run.push[:, index].nonzero()[:, 0]):
            return
        own = written(at)
        if index not in self._directions:
            generator = torch.Generator().manual_seed(self._seed * _SITES + index)
            one = torch.randn(own.shape[-1], generator=generator)
            self._directions[index] = (one / one.norm()).to(own.device, own.dtype)
        share = run.push[at, index].to(own.device, own.dtype)[:, None, None]
        added = share * own.norm(dim=-1, keepdim=True) * self._directions[index]
        out.view(*run.shape, -1).index_add_(0, at.to(out.device), added.to(out.dtype))

    def _require_tokens(self, run: _Run, index: int, n_tokens: int) -> None:
        expected = math.prod(run.shape)
        if n_tokens != expected:
            raise AdapterError(
                f"{self.subject.layout.sites[index].module} saw {n_tokens} of {expected} tokens, "
                "expected all: an edit would miss some"
            )

    def _rows(self, run: _Run) -> Tensor:
        lowest = -1 if run.above is None else run.above[0]
        ran = [
            self._require_once(site, values).to(self.subject.device)
            for site, values in zip(self.subject.layout.sites, run.read, strict=True)
            if not 0 <= site.layer < lowest
        ]
        return torch.cat(ran, dim=-1)


@contextmanager
def adapter_off(subject: Subject) -> Generator[None]:
    """Turn the adapter off in this block: LoRA, DoRA and trained modules.

    PEFT marks the adapter's weights as trainable when it turns it on again; this restores their
    `requires_grad`. Its own `disable_adapter` first looks up the state of all layers, which takes
    longer than a short text.
    """
    model: Any = subject.model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        model.base_model.enable_adapter_layers()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _decoder_layers(subject: Subject) -> list[nn.Module]:
    """Return the decoder layers that the layout counts; none if they are in several lists."""
    paths = {
        (site.module[: match.start()], site.layer)
        for site in subject.layout.sites
        if site.layer >= 0
        for match in [re.search(rf"\.{site.layer}\.", site.module)]
        if match
    }
    stacks = {path for path, _ in paths}
    if len(stacks) != 1:
        return []
    stack = subject.causal.get_submodule(stacks.pop())
    return list(stack) if isinstance(stack, nn.ModuleList) else []


def repeat_cache(cache: Any, n_tokens: int, copies: int) -> Any:
    """Return the cache of the first tokens of one rollout for some copies of it.

    None if the model's cache cannot be cut, as with sliding windows and recurrent layers.
    """
    layers = getattr(cache, "layers", None)
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return None
    new = DynamicCache()
    for index, layer in enumerate(layers):
        keys, values = (
            x[:, :, :n_tokens].expand(copies, -1, -1, -1) for x in (layer.keys, layer.values)
        )
        new.update(keys, values, index)
    return new
