"""What a LoRA writes into the residual stream, and what that adds to the logits, by its weights.

A site writes into the residual stream if its module's output is added to it. These are the last
projections of attention and MLP, found by their usual names and an output width of `d_model`. Some
models put a norm between such a module and the stream (Gemma 2, OLMo 2). There no site writes
directly, because the norm divides by the norm of the whole output.
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.sites import SiteLayout
from lorascope.subject.bottlenecks import unmix
from lorascope.subject.load import Subject

_LAST_PROJECTIONS = "down_proj o_proj out_proj c_proj dense_4h_to_h fc2 fc_out wo w2 dense".split()
_POST_NORM = re.compile(r"post_(feed_?forward|mlp|ffn?|ffw)_?(layer_?)?norm")


@dataclass(frozen=True)
class ResidualWrite:
    """What a site adds to the residual stream: `matrix @ row[columns]`.

    `matrix` is `scale·B` in the gauge of the row, float32 on the CPU.
    """

    name: str
    columns: slice
    matrix: Float[Tensor, "d_model rank"]


def residual_writes(subject: Subject, layout: SiteLayout) -> list[ResidualWrite]:
    """Return what each site of `layout` writes into the residual stream, if it writes directly.

    `layout` is the subject's or a selection from it. DoRA's rescaling is not included.
    """
    mixes = {
        site.module: mix for site, mix in zip(subject.layout.sites, subject.mixes, strict=True)
    }
    writes = []
    for site, columns in zip(layout.sites, layout.slices, strict=True):
        layer = subject.causal.get_submodule(site.module)
        b = layer.lora_B[layer.active_adapters[0]].weight.detach().float().cpu()
        if not _writes_directly(subject, site.module, b.shape[0]):
            continue
        mix = mixes[site.module]
        if mix is not None:
            b = b @ unmix(mix).cpu()
        writes.append(ResidualWrite(site.name, columns, site.scale * b))
    return writes


def _writes_directly(subject: Subject, module: str, width: int) -> bool:
    """Return whether a module's output is added to the residual stream unchanged."""
    in_layer = re.match(r".*?\.\d+(?=\.)", module)
    is_last = module.rpartition(".")[2] in _LAST_PROJECTIONS
    d_model = subject.causal.get_input_embeddings().weight.shape[1]
    if not in_layer or not is_last or width != d_model:
        return False
    layer = subject.causal.get_submodule(in_layer.group())
    return not any(_POST_NORM.match(name) for name, _ in layer.named_children())


class Unembedding:
    """The linear part of final norm and unembedding: maps residual directions to `logits`.

    The norm is the module whose output the unembedding reads, whatever its name. Its gain is
    measured by running it on vectors of +1 and -1, so its class and the way it stores its weight do
    not matter. Raises AdapterError if the model has no unembedding, or none that reads a norm.
    """

    def __init__(self, subject: Subject) -> None:
        head = subject.causal.get_output_embeddings()
        if head is None:
            raise _no_read_out(subject, "no unembedding")
        norm, like = _final_norm(subject, head)
        head = getattr(head, "base_layer", head)  # the adapter may sit on it
        self.weight = head.weight.detach()
        self.width = len(like)
        signs = torch.ones_like(like)
        signs[1::2] = -1  # mean 0, mean square 1: LayerNorm and RMSNorm divide by 1
        with torch.no_grad():
            plus = norm(signs)
            self.gain = (signs * (plus - norm(-signs)) / 2).float().cpu()
            even = norm(2 * signs.abs()) - norm(-2 * signs.abs())
            change = norm(2 * signs) - plus
        largest = self.gain.abs().max()
        if change.abs().max() > 0.1 * largest:
            raise _no_read_out(subject, "no norm before its unembedding")
        self.subtracts_mean = bool(even.abs().max() < 1e-3 * largest)  # a LayerNorm

    def logits(
        self, directions: Float[Tensor, "n_directions d_model"]
    ) -> Float[Tensor, "n_directions vocab"]:
        """Return what directions add to the logits, before the norm's division."""
        if self.subtracts_mean:
            directions = directions - directions.mean(-1, keepdim=True)
        scaled = (directions * self.gain).to(self.weight.device, self.weight.dtype)
        return (scaled @ self.weight.T).float().cpu()


@torch.inference_mode()
def _final_norm(subject: Subject, head: nn.Module) -> tuple[nn.Module, Tensor]:
    """Run two tokens; return the first module that returns what `head` reads, and one such vector.

    A dropout after the norm returns the same values in eval mode, but later.
    """
    returned: list[tuple[nn.Module, Tensor]] = []
    read: list[Tensor] = []
    leaves = [m for m in subject.causal.modules() if m is not head and not list(m.children())]

    def keep(module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor):
            returned.append((module, output))

    handles = [leaf.register_forward_hook(keep) for leaf in leaves]
    handles.append(head.register_forward_pre_hook(lambda _, args: read.append(args[0])))
    try:
        subject.causal(input_ids=torch.arange(2, device=subject.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for module, output in returned:
        if any(output.shape == x.shape and torch.equal(output, x) for x in read):
            return module, output[0, -1]
    raise _no_read_out(subject, "no norm before its unembedding")


def _no_read_out(subject: Subject, what: str) -> AdapterError:
    return AdapterError(
        f"{type(subject.causal).__name__} has {what}, so direct effects cannot be computed; skip "
        "lorascope direct"
    )
