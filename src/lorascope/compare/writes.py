"""What features of a joint dictionary write, and a model into which two adapters write at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.sae.model import SAE
from lorascope.subject.bottlenecks import unmix
from lorascope.subject.intervene import Outcome, RowEditor
from lorascope.subject.load import Subject

Floats = npt.NDArray[np.float64]


def site_writes(subject: Subject) -> Iterator[tuple[str, slice, Float[Tensor, "d_out rank"]]]:
    """Yield each site's module, its columns, and the matrix from its values to what it writes."""
    layout = subject.layout
    for site, here, mix in zip(layout.sites, layout.slices, subject.mixes, strict=True):
        layer = subject.causal.get_submodule(site.module)
        write = layer.lora_B[layer.active_adapters[0]]
        whole = getattr(write, "weight_as_blockdiagonal_matrix", None)
        b = (whole() if whole else write.weight).detach().float().cpu() * site.scale
        yield site.module, here, b if mix is None else b @ unmix(mix.cpu())


class SideBySide(RowEditor):
    """Runs a subject while rows of another adapter are written beside its own.

    `held` are the rows of the other, then the subject's own, `(batch, seq, both)`.
    """

    def __init__(self, subject: Subject, other: Subject) -> None:
        super().__init__(subject, fast=True)
        self._other, self._also = other, torch.zeros(0)

    def __enter__(self) -> "SideBySide":
        super().__enter__()
        for module, here, b in site_writes(self._other):
            layer = self.subject.causal.get_submodule(module)
            self._undo.callback(layer.register_forward_hook(self._adds(here, b)).remove)
        return self

    def run(self, *args: Any, held: Tensor, **how: Any) -> Outcome:
        """Run the subject as `RowEditor.run` does, with the rows of both written."""
        n = self._other.layout.d_in
        self._also = held[..., :n]
        return super().run(*args, held=held[..., n:], **how)

    def _adds(self, here: slice, b: Tensor) -> Callable[..., Tensor | None]:
        def add(_module: Any, _args: Any, out: Tensor) -> Tensor | None:
            if self._run is None:
                return None  # not in `run`
            written = self._also[..., here].to(out.device, b.dtype) @ b.to(out.device).T
            return out + written.to(out.dtype).view_as(out)

        return add


class Writes:
    """What each latent's parts write into the outputs of the adapted modules, at a value of 1.

    Parts of two adapters at one module write into the same space, so they can be compared there:
    `gram[a, b][latent]` is the sum over modules of the inner products of what they write. It does
    not depend on ranks, gauges or on how an update is split into A and B.
    """

    def __init__(self, subjects: Mapping[str, Subject], sae: SAE) -> None:
        parts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}  # by module: rows' part, and B
        for name, subject in subjects.items():
            decoder = sae.W_dec[:, torch.from_numpy(sae.layout.columns_of(name))]
            for module, here, b in site_writes(subject):
                parts.setdefault(module, {})[name] = decoder[:, here], b
        self.gram = {(a, b): torch.zeros(sae.d_sae) for a in subjects for b in subjects}
        for here in parts.values():
            for a, (one, b_one) in here.items():
                for b, (other, b_other) in here.items():
                    self.gram[a, b] += (one @ (b_one.T @ b_other) * other).sum(1)

    def size(self, name: str) -> Floats:
        """Return the norm of what each latent's part writes with one adapter, `(latent,)`."""
        return self.gram[name, name].clamp(min=0).sqrt().double().numpy()

    def sizes(self, names: Sequence[str]) -> Floats:
        """Return the norm of what each latent's parts write with some adapters together."""
        return np.sqrt(sum(self.size(name) ** 2 for name in names))

    def apart(self, one: str, other: str) -> Floats:
        """Return the norm of what both parts write, one minus the other, `(latent,)`."""
        square = self.gram[one, one] + self.gram[other, other] - 2 * self.gram[one, other]
        return square.clamp(min=0).sqrt().double().numpy()

    def cosine(self, one: str, other: str) -> Floats:
        """Return the cosine of what both parts write, `(latent,)`; 0 if one writes nothing."""
        product = self.size(one) * self.size(other)
        cosine = self.gram[one, other].double().numpy() / np.maximum(product, 1e-30)
        return np.where(product > 0, cosine, 0.0)
