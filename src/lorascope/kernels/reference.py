"""The definition of every kernel, in its plainest form. Tests compare the fast ones with these.

Nothing here is optimised. Ties and order are part of the definition.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class Best(NamedTuple):
    """Chosen pairs: flat indices, rising; their scores; a guess of the bound for the next batch.

    On CUDA the last pairs may be padding with value 0: see `cuda.py`.
    """

    indices: Int64[Tensor, "pair"]
    values: Float[Tensor, "pair"]
    guess: float


def best_indices(scores: Float[Tensor, "batch latent"], n: int) -> Int64[Tensor, "pair"]:
    """Return the flat indices, rising, of the `n` largest positive scores.

    Ties go to the lower index. Returns fewer than `n` if fewer scores are positive.
    """
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:n]
    return order[flat[order] > 0].sort().values


def gather_sum(
    values: Float[Tensor, "pair"],
    index: Int64[Tensor, "pair"],
    offsets: Int64[Tensor, "bag_plus_1"],
    table: Float[Tensor, "entry d"],
) -> Float[Tensor, "bag d"]:
    """Return for each bag the sum of `values[p] * table[index[p]]` over its pairs.

    Bag i holds the pairs `[offsets[i], offsets[i + 1])`. With rows as bags and `W_dec` as table
    this decodes; with latents as bags and rows as table it is the gradient of a weight matrix.
    """
    bags = torch.repeat_interleave(offsets.diff())
    out = table.new_zeros(len(offsets) - 1, table.shape[1])
    return out.index_add(0, bags, values[:, None] * table[index])


def pair_dot(
    left: Float[Tensor, "left d"],
    left_index: Int64[Tensor, "pair"],
    right: Float[Tensor, "right d"],
    right_index: Int64[Tensor, "pair"],
) -> Float[Tensor, "pair"]:
    """Return the inner product of `left[left_index[p]]` and `right[right_index[p]]` of each pair.

    `left_index` rises. With the gradient of the rows as left and `W_dec` as right this is the
    gradient of a code's values.
    """
    return (left[left_index] * right[right_index]).sum(1)


def encode(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in latent"],
    b_enc: Float[Tensor, "latent"],
    threshold: Float[Tensor, "latent"],
) -> Float[Tensor, "batch latent"]:
    """Return the dense code that `encoder.Encoder` computes: scores above their thresholds."""
    pre = x @ W_enc + b_enc
    return torch.where(pre > threshold, pre, 0.0)
