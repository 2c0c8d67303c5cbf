"""Simple reconstructions of rows, which an SAE has to beat at the same number of values a token.

All are fitted on the SAE's training rows, in the SAE's units (`s·x`), and keep `m` numbers of each
token beside the mean row, `m` being the SAE's L0 rounded, at least 1:

- `mean`: no number at all, the mean row for every token.
- `pca`: the coordinates along the first m principal directions.
- `columns`: the m columns that are farthest from their means, as they are.
- `random`: of as many random directions as the SAE has latents, the m that match the row best,
  with the least-squares values for these m together. That is more than an encoder can do.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float32
from torch import Tensor

from lorascope.sae.model import SAE

Reconstruction = Callable[[Tensor], Tensor]
_AT_ONCE = 1024  # rows, of each of which m directions are copied
_RIDGE = 1e-6  # keeps the least squares solvable where two directions are almost one


def baselines(
    sae: SAE, training: Float32[Tensor, "row d_in"], l0: float, seed: int
) -> dict[str, Reconstruction]:
    """Return the reconstructions by name; each takes and returns raw rows `(n, d_in)`, float32."""
    scale = sae.scale
    back = torch.where(scale > 0, 1 / scale, 0.0)  # a constant column is its mean
    mean = training.mean(0)
    m = min(max(1, round(l0)), sae.d_in)
    centred = (training - mean) * scale
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    first = directions[:m]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(sae.d_sae, sae.d_in, generator=generator)
    drawn = (drawn / drawn.norm(dim=1, keepdim=True)).to(mean.device)

    def pca(x: Tensor) -> Tensor:
        return mean + ((x - mean) * scale) @ first.T @ first * back

    def columns(x: Tensor) -> Tensor:
        far = (x - mean) * scale
        kept = far.abs().topk(m, dim=1).indices
        return mean + torch.zeros_like(far).scatter(1, kept, far.gather(1, kept)) * back

    def random(x: Tensor) -> Tensor:
        parts = [_best_of(drawn, part, m) for part in ((x - mean) * scale).split(_AT_ONCE)]
        return mean + torch.cat(parts) * back

    return {"mean": mean.expand_as, "pca": pca, "columns": columns, "random": random}


def _best_of(directions: Tensor, x: Tensor, m: int) -> Tensor:
    """Return `x` rebuilt of the m directions that match each row best, by least squares."""
    chosen = directions[(x @ directions.T).abs().topk(min(m, len(directions)), dim=1).indices]
    gram = chosen @ chosen.mT  # (row, m, m)
    gram += _RIDGE * torch.eye(gram.shape[-1], device=x.device)
    values = torch.linalg.solve(gram, (chosen @ x[:, :, None]))
    return (values * chosen).sum(1)


def random_rows(sae: SAE, seed: int) -> Tensor:
    """Return a random direction for each latent, as long as its decoder row in the SAE's units.

    In raw or effect units it would go mostly into columns that the adapter hardly uses.
    """
    scale = sae.scale.cpu()
    drawn = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(seed))
    drawn *= scale > 0
    length = (sae.W_dec.cpu() * scale).norm(dim=1, keepdim=True)
    drawn *= length / drawn.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.where(scale > 0, drawn / scale, 0.0)
