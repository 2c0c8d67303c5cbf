"""What a LoRA writes into the residual stream, and what the model's head makes of it, from weights.

A site writes to the residual stream where its module's output is added to it: the projections that
end the attention and the MLP, by their usual names, with as many outputs as the stream is wide. In
models that put a norm between such a module and the stream (Gemma 2, OLMo 2) no site writes
directly: the norm divides by the length of the whole output.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.sites import SiteLayout
from lorascope.subject.gauge import unmix
from lorascope.subject.load import Subject

_WRITERS = (
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
_NORMS = ("norm", "norm_f", "final_layernorm", "final_layer_norm", "ln_f", "final_norm")


@dataclass(frozen=True)
class Writer:
    """A site that writes to the residual stream: its name, the columns of its row, and `scale·B`.

    `matrix` is that of the row's gauge: `matrix @ row[columns]` is what is added to the stream.
    """

    name: str
    columns: slice
    matrix: Float[Tensor, "d_model rank"]


def writers_of(subject: Subject, layout: SiteLayout) -> list[Writer]:
    """Return the sites of `layout`, which are the subject's or some of them, that write directly.

    Matrices are float32, on the CPU. DoRA's rescaling of each output is not in them.
    """
    mixes = {
        site.module: mix for site, mix in zip(subject.layout.sites, subject.mixes, strict=True)
    }
    found, start = [], 0
    for site in layout.sites:
        columns = slice(start, start + site.rank)
        start = columns.stop
        layer = subject.causal.get_submodule(site.module)
        b = layer.lora_B[layer.active_adapters[0]].weight.detach().float().cpu()
        if not _writes(subject, site.module, b.shape[0]):
            continue
        mix = mixes[site.module]
        if mix is not None:
            b = b @ unmix(mix).cpu()
        found.append(Writer(site.name, columns, site.scale * b))
    return found


def _writes(subject: Subject, module: str, width: int) -> bool:
    """Say whether a module's output is added to the residual stream as it is."""
    if module.rpartition(".")[2] not in _WRITERS:
        return False
    if width != subject.causal.get_input_embeddings().weight.shape[1]:
        return False
    inside = module.split(".")
    numbers = [i for i, part in enumerate(inside) if part.isdigit()]
    if not numbers:
        return False
    layer = subject.causal.get_submodule(".".join(inside[: numbers[0] + 1]))
    return not hasattr(layer, "post_feedforward_layernorm")


class ReadOut:
    """The final norm's linear part and the unembedding: `logits` of directions in the stream.

    The norm's gain is found by running it on vectors of ones and minus ones, so that neither its
    class nor the way in which it keeps its weight matters. Raises AdapterError where the model has
    no final norm or head where they are looked for.
    """

    def __init__(self, subject: Subject) -> None:
        causal = subject.causal
        head, backbone = causal.get_output_embeddings(), getattr(causal, causal.base_model_prefix)
        norms = [getattr(backbone, name) for name in _NORMS if hasattr(backbone, name)]
        norms = [norm for norm in norms if isinstance(norm, nn.Module)]
        if head is None or len(norms) != 1:
            what = "no unembedding" if head is None else "no final norm by any usual name"
            raise AdapterError(
                f"{type(causal).__name__} has {what}, so that direct effects are not known; leave "
                "lorascope direct (of run: --effect-texts) out"
            )
        head = getattr(head, "base_layer", head)  # the adapter may sit on it
        self.unembedding = head.weight.detach()
        norm, width = norms[0], self.unembedding.shape[1]
        place = next((p for p in norm.parameters()), self.unembedding)
        signs = torch.ones(width, dtype=place.dtype, device=place.device)
        signs[1::2] = -1  # mean 0, mean square 1: what either kind of norm divides by is 1
        with torch.no_grad():
            self.gain = (signs * (norm(signs) - norm(-signs)) / 2).float().cpu()
            even = norm(2 * signs.abs()) - norm(-2 * signs.abs())
        self.centres = bool(even.abs().max() < 1e-3 * self.gain.abs().max())  # a LayerNorm
        self.width = width

    def logits(self, written: Float[Tensor, "some d_model"]) -> Float[Tensor, "some vocab"]:
        """Return what directions add to the logits, up to the length that the norm divides by."""
        if self.centres:
            written = written - written.mean(-1, keepdim=True)
        inside = (written * self.gain).to(self.unembedding.device, self.unembedding.dtype)
        return (inside @ self.unembedding.T).float().cpu()
