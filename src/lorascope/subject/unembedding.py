"""What a LoRA writes into the residual stream, and what that adds to the logits, by its weights.

A site writes into the residual stream if its module's output is added to it. These are the last
projections of attention and MLP, found by their usual names and an output width of `d_model`. Some
models put a norm between such a module and the stream (Gemma 2, OLMo 2). There no site writes
directly, because the norm divides by the norm of the whole output.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.sites import SiteLayout
from lorascope.subject.bottlenecks import unmix
from lorascope.subject.load import Subject

_LAST_PROJECTIONS = (
    "down_proj",
    "o_proj",
    "out_proj",
    "c_proj",
    "dense_4h_to_h",
    "fc2",
    "fc_out",
    "wo",
    "w2",
    "dense",
)
_FINAL_NORMS = ("norm", "norm_f", "final_layernorm", "final_layer_norm", "ln_f", "final_norm")


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
    writes, start = [], 0
    for site in layout.sites:
        columns = slice(start, start + site.rank)
        start = columns.stop
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
    if module.rpartition(".")[2] not in _LAST_PROJECTIONS:
        return False
    if width != subject.causal.get_input_embeddings().weight.shape[1]:
        return False
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return False
    layer = subject.causal.get_submodule(".".join(parts[: numbers[0] + 1]))
    return not hasattr(layer, "post_feedforward_layernorm")


class Unembedding:
    """The linear part of final norm and unembedding: maps residual directions to `logits`.

    The norm's gain is measured by running it on vectors of +1 and -1, so its class and the way it
    stores its weight do not matter. Raises AdapterError if the model has no final norm or no
    unembedding under the usual names.
    """

    def __init__(self, subject: Subject) -> None:
        causal = subject.causal
        head, backbone = causal.get_output_embeddings(), getattr(causal, causal.base_model_prefix)
        norms = [getattr(backbone, name) for name in _FINAL_NORMS if hasattr(backbone, name)]
        norms = [norm for norm in norms if isinstance(norm, nn.Module)]
        if head is None or len(norms) != 1:
            what = "no unembedding" if head is None else "no final norm under a usual name"
            raise AdapterError(
                f"{type(causal).__name__} has {what}, so direct effects cannot be computed; skip "
                "lorascope direct (in run: leave out --effect-texts)"
            )
        head = getattr(head, "base_layer", head)  # the adapter may sit on it
        self.weight = head.weight.detach()
        norm, width = norms[0], self.weight.shape[1]
        like = next(norm.parameters(), self.weight)
        signs = torch.ones(width, dtype=like.dtype, device=like.device)
        signs[1::2] = -1  # mean 0, mean square 1: LayerNorm and RMSNorm divide by 1
        with torch.no_grad():
            self.gain = (signs * (norm(signs) - norm(-signs)) / 2).float().cpu()
            even = norm(2 * signs.abs()) - norm(-2 * signs.abs())
        self.subtracts_mean = bool(even.abs().max() < 1e-3 * self.gain.abs().max())  # a LayerNorm
        self.width = width

    def logits(
        self, directions: Float[Tensor, "n_directions d_model"]
    ) -> Float[Tensor, "n_directions vocab"]:
        """Return what directions add to the logits, before the norm's division."""
        if self.subtracts_mean:
            directions = directions - directions.mean(-1, keepdim=True)
        scaled = (directions * self.gain).to(self.weight.device, self.weight.dtype)
        return (scaled @ self.weight.T).float().cpu()
