"""What every kernel means, in the plainest form: the fast ones are compared with these.

Nothing here is made to be fast. Ties and order are part of the meaning.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def best_places(
    scores: Float[Tensor, "batch latent"], n: int, *, signed: bool = False
) -> Int64[Tensor, "pair"]:
    """Return the flat places, rising, of the `n` largest positive scores.

    Of equal scores those at lower places are taken. Fewer than `n` where fewer are positive.
    `signed` ranks by absolute value.
    """
    flat = scores.flatten().abs() if signed else scores.flatten()
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
    this decodes; with latents as bags and rows as table it is the gradient of a weight.
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

    `left_index` rises. With the gradient of rows as left and `W_dec` as right this is the gradient
    of the values of a code.
    """
    return (left[left_index] * right[right_index]).sum(1)


def firing(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in latent"],
    b_enc: Float[Tensor, "latent"],
    threshold: Float[Tensor, "latent"],
) -> Float[Tensor, "batch latent"]:
    """Return the code of `firing.Encoder` with its zeros: sums that beat their thresholds."""
    pre = x @ W_enc + b_enc
    return torch.where(pre > threshold, pre, 0.0)
