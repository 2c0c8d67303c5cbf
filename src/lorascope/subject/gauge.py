"""Fix the gauge of a LoRA: choose, among all factors of one update, those that mean something.

`A` and `B` are defined only up to an invertible matrix: `(M·A, B·M⁻¹)` is the same adapter with
other rows. The singular value decomposition of the update itself, `scale·B·A = U·S·Vᵀ`, has no
such freedom, so that rows are taken to be `h' = Vᵀ·x`:

1. `Aᵀ = Qa·Ra` and `B = Qb·Rb`, thin, in float64: no matrix as large as the weight is ever made.
2. `scale·Rb·Raᵀ = U'·S·V'ᵀ`, which is small; then `U = Qb·U'` and `V = Qa·V'`.
3. Columns come in falling `S`; the largest entry of each right singular vector is positive.
4. `mix = Vᵀ·A⁺ = V'ᵀ·(Raᵀ)⁺`, so that `h' = mix·h` is made of the `h = A·x` that the model has.

Directions that write nothing (`S` below 1e-10 of the largest) have zeros in `mix` and in `S`.
Where two values of `S` are equal, any rotation of their two columns is as good, and one is taken.
Rounding in `h` grows by up to the condition number of `A`, which is near 1 for trained adapters.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_NOTHING = 1e-10
_TIE = 1e-9  # entries that differ by less are one magnitude, whose first decides the sign


def svd_gauge(
    a: Float[Tensor, "rank d_x"], b: Float[Tensor, "d_y rank"], scale: float
) -> tuple[Float[Tensor, "rank rank"], Float[Tensor, " rank"]]:
    """Return `mix`, with which rows are `h @ mix.T`, and `S`, both in float64 on the CPU.

    `S[i]` is what one unit of column i writes, as a Euclidean norm.
    """
    rank = a.shape[0]
    q_a, r_a = torch.linalg.qr(a.detach().cpu().double().T)
    _, r_b = torch.linalg.qr(b.detach().cpu().double())
    _, s, vh = torch.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    keep = s > _NOTHING * s.max() if s.numel() else s > 0
    signs = _signs(q_a @ vh.T)
    rows = (signs * keep)[:, None] * (vh @ torch.linalg.pinv(r_a.T))
    mix = torch.zeros(rank, rank, dtype=torch.float64)
    values = torch.zeros(rank, dtype=torch.float64)
    mix[: len(rows)] = rows
    values[: len(rows)] = s * keep
    return mix, values


def unmix(mix: Float[Tensor, "rank rank"]) -> Float[Tensor, "rank rank"]:
    """Return the way back, `h = h' @ back.T`, up to what writes nothing.

    `B` in the gauge is `B @ back`: it writes for `h'` what `B` writes for `h`.
    """
    return torch.linalg.pinv(mix.double()).to(mix.dtype)


def _signs(v: Float[Tensor, "d_x k"]) -> Float[Tensor, " k"]:
    """Return the sign of each column's largest entry, the first one where several are largest."""
    size = v.abs()
    first = (size >= (1 - _TIE) * size.max(dim=0).values).to(torch.int8).argmax(dim=0)
    return torch.where(v.gather(0, first[None])[0] < 0, -1.0, 1.0).double()
