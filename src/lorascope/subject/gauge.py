"""Fix the gauge of a LoRA: choose the one factorisation of its update that is well defined.

`A` and `B` are defined only up to an invertible matrix `M`: `(M·A, B·M⁻¹)` is the same adapter with
different rows. The singular value decomposition of the update, `scale·B·A = U·S·Vᵀ`, has no such
freedom. So in the svd gauge, rows are `h' = Vᵀ·x`:

1. `Aᵀ = Qa·Ra` and `B = Qb·Rb`, thin, in float64. No matrix is as large as the base weight.
2. `scale·Rb·Raᵀ = U'·S·V'ᵀ`, which is small. Then `U = Qb·U'` and `V = Qa·V'`.
3. Columns are sorted by falling `S`. The largest entry of each right singular vector is positive.
4. `mix = Vᵀ·A⁺ = V'ᵀ·(Raᵀ)⁺`, so that `h' = mix·h` can be computed from the model's `h = A·x`.

Directions that write nothing (`S` below 1e-10 of the largest) are zero in `mix` and `S`. If two
values of `S` are equal, their columns are defined only up to a rotation. Rounding errors of `h`
grow by at most the condition number of `A`, which is near 1 for trained adapters.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_ZERO = 1e-10
_TIE = 1e-9  # entries this close in magnitude are tied; the first of them decides the sign


def svd_gauge(
    a: Float[Tensor, "rank d_x"], b: Float[Tensor, "d_y rank"], scale: float
) -> tuple[Float[Tensor, "rank rank"], Float[Tensor, " rank"]]:
    """Return `mix` (rows are `h @ mix.T`) and `S`, both in float64 on the CPU.

    `S[i]` is the Euclidean norm of what a value of 1 in column i writes.
    """
    rank = a.shape[0]
    q_a, r_a = torch.linalg.qr(a.detach().cpu().double().T)
    _, r_b = torch.linalg.qr(b.detach().cpu().double())
    _, s, vh = torch.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    keep = s > _ZERO * s.max() if s.numel() else s > 0
    signs = _signs(q_a @ vh.T)
    rows = (signs * keep)[:, None] * (vh @ torch.linalg.pinv(r_a.T))
    mix = torch.zeros(rank, rank, dtype=torch.float64)
    values = torch.zeros(rank, dtype=torch.float64)
    mix[: len(rows)] = rows
    values[: len(rows)] = s * keep
    return mix, values


def unmix(mix: Float[Tensor, "rank rank"]) -> Float[Tensor, "rank rank"]:
    """Return the `back` with which `h = h' @ back.T`, up to directions that write nothing.

    `B @ back` is `B` in the gauge: it writes for `h'` what `B` writes for `h`.
    """
    return torch.linalg.pinv(mix.double()).to(mix.dtype)


def _signs(v: Float[Tensor, "d_x k"]) -> Float[Tensor, " k"]:
    """Return the sign of each column's largest entry; of tied entries, the first decides."""
    size = v.abs()
    first = (size >= (1 - _TIE) * size.max(dim=0).values).to(torch.int8).argmax(dim=0)
    return torch.where(v.gather(0, first[None])[0] < 0, -1.0, 1.0).double()
