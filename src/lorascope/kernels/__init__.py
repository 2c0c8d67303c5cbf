"""The operations that decide how long a training step takes, each with a plain reference.

After the one dense product of a step, `pre = x @ W_enc`, everything is done by *pairs*: the places
(row, latent) where a latent fires, `k * batch` of them, in rising order of `row * d_sae + latent`.

- `best_places`: which pairs are the best of a batch, exactly, without sorting the batch.
- `by_latent`: the same pairs in the order of their latents, and where each latent's begin.
- `gather_sum`: for each bag of pairs, the weighted sum of rows of a table: decoding, and the
  gradients of `W_enc` and `W_dec`.
- `pair_dot`: for each pair, the inner product of two rows: the gradient of a code's values.

`reference.py` says what they mean, `cpu.py` has them in torch's own operations, `triton.py` for
CUDA, where shapes are static so that a whole step can be captured into a graph. Any other device
uses `cpu.py`.
"""

from types import ModuleType

import torch


def of(device: torch.device) -> ModuleType:
    """Return the module that has the operations for tensors on a device."""
    if device.type == "cuda":
        from lorascope.kernels import triton

        return triton
    from lorascope.kernels import cpu

    return cpu
