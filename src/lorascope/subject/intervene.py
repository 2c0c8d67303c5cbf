"""Run the subject with its rows read, replaced or changed, at the place where rows are read.

The write point is the read point: the output of each site's `lora_A`. While a `RowEditor` is open:

1. `h = A·x` of a site becomes row values in the site's gauge, `r = h·mixᵀ`, as for the store.
2. The edit says what stands there instead. No edit, or the same values: `h` is left as it is, to
   the last bit. Else `h = r'` in the raw gauge and `h = r'·backᵀ` in the svd gauge, `unmix` of the
   mix, so that a row of zeros writes exactly nothing.
3. The rest of the network goes on from there, later sites included: they read what the edit left.

PEFT's own forward runs, not the faster one of `hooks`, so that what is measured is the model that
users run. A site that does not run exactly once for every token is an error, never a run without
its edit: hooks on a module that was compiled before are passed over in silence by torch.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.subject.gauge import unmix
from lorascope.subject.load import Subject

__all__ = ["Edit", "Outcome", "RowEditor"]

_SITES = 1_000_003  # more than a model has: each seed and site has a generator of its own

Edit = Callable[[slice, Tensor], Tensor | None]
"""`(columns, values) -> values`: what is written at a site for what was read there, `(batch, seq,
rank)` in float32; `columns` are the site's in the row. None leaves the site as it is."""


class Outcome(NamedTuple):
    """One forward: logits `(batch, seq, vocab)`, rows as read `(batch, seq, d_in)`, the cache."""

    logits: Tensor
    rows: Float[Tensor, "batch seq d_in"]
    cache: Any


class RowEditor:
    """A context in which `run` runs the subject under an edit, and `base` without the adapter.

    What was changed in the model is undone on leaving, also when a forward raised. `seed` draws
    the directions of `push`.
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
        self._read: list[list[Tensor]] | None = None  # of each site, while running
        self._shape: tuple[int, ...] = ()
        self._edit: Edit | None = None
        self._push: Tensor | None = None

    def __enter__(self) -> "RowEditor":
        try:
            for index, (site, read) in enumerate(
                zip(self.subject.layout.sites, self.subject.sites, strict=True)
            ):
                write = _writer_of(self.subject, site.module)
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
        """Run one batch of texts, the adapter on, its rows as `edit` says.

        Texts begin at place 0; what stands behind a shorter one's end may be any token. `push` is
        a control: it adds to what site i writes `push[:, i]` times as much, by Euclidean norm, in
        a random direction that is the same for every token. With `cache` (what a run before
        returned; True begins one) only the tokens that come next are given. Raises
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
        """Run one batch of texts without the adapter; return the logits."""
        with adapter_off(self.subject):
            out = self.subject.causal(input_ids=token_ids.to(self.subject.device), use_cache=False)
        return out.logits

    def _at_read(self, index: int) -> Callable[..., Tensor | None]:
        mix, back = self.subject.mixes[index], self._backs[index]
        columns, rank = self._columns[index], self.subject.layout.sites[index].rank

        def hook(_module: nn.Module, _args: Any, h: Tensor) -> Tensor | None:
            if self._read is None:
                return None  # the model is run by somebody else
            self._require_tokens(index, h.numel() // rank)
            flat = h.reshape(-1, rank)
            values = flat.float() if mix is None else flat.float() @ mix.T
            values = values.view(*self._shape, rank)
            self._read[index].append(values)
            wanted = None if self._edit is None else self._edit(columns, values)
            if wanted is None:
                return None
            wanted = wanted.to(h.device, torch.float32).expand_as(values).reshape(-1, rank)
            if back is None:
                return wanted.to(h.dtype).view_as(h)
            written = wanted @ back.T
            if not wanted.requires_grad:  # a gradient has to pass through the values
                same = (wanted == values.view(-1, rank)).all(-1, keepdim=True)
                written = torch.where(same, flat.float(), written)
            return written.to(h.dtype).view_as(h)

        return hook

    def _at_write(self, index: int) -> Callable[..., Tensor | None]:
        direction: list[Tensor] = []  # drawn when it is first needed

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
        expected = 1
        for size in self._shape:
            expected *= size
        if n_tokens != expected:
            raise AdapterError(
                f"{self.subject.layout.sites[index].module} saw {n_tokens} of {expected} tokens: "
                "it has no row for each, and an edit would miss some"
            )

    def _rows(self, read: list[list[Tensor]]) -> Tensor:
        for site, found in zip(self.subject.layout.sites, read, strict=True):
            if len(found) != 1:
                raise AdapterError(
                    f"lora_A of {site.module} ran {len(found)} times in one forward, expected "
                    "once; a model that was compiled is to be loaded anew"
                )
        return torch.cat([found[0].to(self.subject.device) for found in read], dim=-1)


@contextmanager
def adapter_off(subject: Subject) -> Generator[None]:
    """Run the base model itself within: LoRA, DoRA and trained modules of the adapter are off.

    PEFT marks an adapter's weights as trainable when it puts it back; their marks are kept here.
    """
    model: Any = subject.model
    marks = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, mark in marks:
            parameter.requires_grad_(mark)


def _writer_of(subject: Subject, path: str) -> nn.Module:
    layer = subject.causal.get_submodule(path)
    return layer.lora_B[layer.active_adapters[0]]
