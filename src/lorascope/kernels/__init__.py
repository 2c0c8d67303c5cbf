"""The operations that decide how long a training step takes, each with a plain reference.

After the one dense product of a step, `pre = x @ W_enc`, everything is done by *pairs*: the places
(row, latent) where a latent fires, `k * batch` of them, in rising order of `row * d_sae + latent`.

- `product`: the dense one, into memory that is there.
- `best_places`: which pairs are the best of a batch, exactly, without sorting the batch.
- `best_of_rows`: which are the best of each row.
- `above`: which are above a bound of their latent.
- `by_latent`: the same pairs in the order of their latents, and where each latent's begin.
- `row_offsets`: where each row's begin.
- `gather_sum`: for each bag of pairs, the weighted sum of rows of a table: decoding, and the
  gradients of `W_enc` and `W_dec`.
- `pair_dot`: for each pair, the inner product of two rows: the gradient of a code's values.

`reference.py` says what they mean. `cpu.py` has them in torch's own operations, and `screen.py`
spares a CPU half of the product; `firing.py` does the same for codes, whose thresholds are known.
`cuda.py` has the same functions with static shapes, so that a whole step can be captured into a
graph; `triton.py` and `triton_best.py` are its kernels. On other devices nothing is trained.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class Best(NamedTuple):
    """Pairs that were chosen: flat places, rising; their scores; a guess for the next batch.

    On CUDA the last ones may be pads, of value 0: see `cuda.py`.
    """

    places: Int64[Tensor, "pair"]
    values: Float[Tensor, "pair"]
    guess: float


def for_device(device: torch.device) -> ModuleType:
    """Return the module that has the operations for tensors on a device."""
    if device.type == "cuda":
        from lorascope.kernels import cuda

        return cuda
    from lorascope.kernels import cpu

    return cpu
