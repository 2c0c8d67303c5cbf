"""The operations that decide how fast training and encoding are, each with a plain reference.

After the one dense product of a training step, `pre = x @ W_enc`, everything works on *pairs*: the
flat indices `row * d_sae + latent` where a latent fires, `k * batch` of them, in rising order.

- `product`: the dense product, written into existing memory.
- `best_indices`: the best pairs of a batch, exactly, without sorting the batch.
- `best_of_rows`: the best pairs of each row.
- `indices_above`: the pairs above a bound of their latent.
- `by_latent`: the same pairs ordered by latent, and where each latent's pairs begin.
- `row_offsets`: where each row's pairs begin.
- `gather_sum`: for each bag of pairs, the weighted sum of rows of a table. It decodes, and gives
  the gradients of `W_enc` and `W_dec`.
- `pair_dot`: for each pair, the inner product of two rows. It gives the gradient of a code.

`tests/builders/definitions.py` defines what they mean. `cpu.py` builds them from torch operations.
`cuda.py` has the same functions with static shapes, so that a whole step can become a CUDA graph.
Where the CPU multiplies bytes fast, `byte_product` comes before the float32 product: in
`prefilter.py`, which chooses pairs in training, and in `encoder.py`, which computes codes. Training
runs on CPU and CUDA only.
"""

from types import ModuleType

import torch

from lorascope.kernels import cpu


def for_device(device: torch.device) -> ModuleType:
    """Return the module with the operations for tensors on a device."""
    if device.type == "cuda":
        from lorascope.kernels import cuda  # needs Triton, which CPU builds of torch do not bring

        return cuda
    return cpu
