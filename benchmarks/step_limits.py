"""Measure the least time that each part of a training step can take, by the fastest primitives.

The reference step is one dense product (the encoder), decoding, the gradient of the code (which
reads the same decoder rows as decoding and is priced like it), the gradients of both matrices, and
Adam. Selecting what fires is free in it: it can be done while the product is written.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

KINDS = ("float32, medium", "bfloat16")


def limits(x: Tensor, d_sae: int, k: int) -> dict[str, Callable[[], object]]:
    """Return the parts of a step, each by the fastest primitive seen; names begin with a dash."""
    n, d_in, device = len(x), x.shape[1], x.device
    W = torch.randn(d_in, d_sae, device=device)
    W_dec = torch.randn(d_sae, d_in, device=device)
    x16, W16 = x.bfloat16(), W.bfloat16()
    pre, out, out16 = x @ W, x @ W, x16 @ W16
    bound = pre.flatten().topk(k * n).values[-1]
    rows, latents = (pre >= bound).nonzero(as_tuple=True)
    values = pre[rows, latents]
    starts = torch.searchsorted(rows, torch.arange(n, device=device))
    by_latent = latents.argsort(stable=True)
    bags = torch.searchsorted(latents[by_latent], torch.arange(d_sae, device=device))
    theirs, weight = rows[by_latent], values[by_latent]
    moved = [torch.randn(t.shape, device=device).requires_grad_() for t in (W, W_dec)]
    for tensor in moved:
        tensor.grad = torch.randn_like(tensor)
    adam = torch.optim.Adam(moved, lr=1e-9, fused=True)

    def product(precision: str) -> Callable[[], object]:
        def task() -> object:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            torch.mm(x, W, out=out)
            torch.set_float32_matmul_precision(before)
            return out

        return task

    return {
        "- product, float32, highest": product("highest"),
        "- product, float32, medium": product("medium"),
        "- product, bfloat16": lambda: torch.mm(x16, W16, out=out16),
        "- compare and nonzero": lambda: torch.nonzero(pre >= bound),
        "- decode": lambda: embedding_bag(
            latents, W_dec, starts, per_sample_weights=values, mode="sum"
        ),
        "- gradient of a matrix": lambda: embedding_bag(
            theirs, x, bags, per_sample_weights=weight, mode="sum"
        ),
        "- Adam, fused": adam.step,
    }


def reference_step(took: Mapping[str, float], kind: str) -> tuple[float, float]:
    """Return the time of the reference step, and that with torch's own pass of selection."""
    sparse = 2 * took["- decode"] + 2 * took["- gradient of a matrix"] + took["- Adam, fused"]
    step = took[f"- product, {kind}"] + sparse
    return step, step + took["- compare and nonzero"]
