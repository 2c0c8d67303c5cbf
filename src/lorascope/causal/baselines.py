"""Simple reconstructions of rows with as many values a token as an SAE, for comparison with it.

They are fitted on the SAE's training rows, in the SAE's units (`s·x`). Each keeps the mean row and
`m` values of a token, where `m` is the SAE's L0, rounded, and at least 1:

- `mean`: no value, only the mean row.
- `pca`: the coordinates along the first m principal directions.
- `columns`: the m columns that are farthest from their means.
- `random`: draws as many random directions as the SAE has latents, takes the m that match the row
  best, and fits their values by least squares together, which an encoder cannot do.

`random_decoder_rows` are the controls of single features.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float32
from torch import Tensor

from lorascope.sae.model import SAE

Reconstruction = Callable[[Tensor], Tensor]
_CHUNK = 1024  # rows at a time: m directions are copied for each
_RIDGE = 1e-6  # keeps the least squares solvable when two directions are almost equal


def baselines(
    sae: SAE, training: Float32[Tensor, "row d_in"], l0: float, seed: int
) -> dict[str, Reconstruction]:
    """Return the reconstructions by name; each takes and returns raw rows `(n, d_in)`, float32."""
    scale = sae.scale
    unscale = torch.where(scale > 0, 1 / scale, 0.0)  # a constant column stays at its mean
    mean = training.mean(0)
    m = min(max(1, round(l0)), sae.d_in)
    centred = (training - mean) * scale
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    first = directions[:m]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(sae.d_sae, sae.d_in, generator=generator)
    drawn = (drawn / drawn.norm(dim=1, keepdim=True)).to(mean.device)

    def pca(x: Tensor) -> Tensor:
        return mean + ((x - mean) * scale) @ first.T @ first * unscale

    def columns(x: Tensor) -> Tensor:
        far = (x - mean) * scale
        kept = far.abs().topk(m, dim=1).indices
        return mean + torch.zeros_like(far).scatter(1, kept, far.gather(1, kept)) * unscale

    def random(x: Tensor) -> Tensor:
        parts = [_best_of(drawn, part, m) for part in ((x - mean) * scale).split(_CHUNK)]
        return mean + torch.cat(parts) * unscale

    return {"mean": mean.expand_as, "pca": pca, "columns": columns, "random": random}


def _best_of(directions: Tensor, x: Tensor, m: int) -> Tensor:
    """Return `x` as the least-squares sum of the m directions that match each row best."""
    chosen = directions[(x @ directions.T).abs().topk(min(m, len(directions)), dim=1).indices]
    gram = chosen @ chosen.mT  # (row, m, m)
    gram += _RIDGE * torch.eye(gram.shape[-1], device=x.device)
    values = torch.linalg.solve(gram, (chosen @ x[:, :, None]))
    return (values * chosen).sum(1)


def random_decoder_rows(sae: SAE, seed: int) -> Tensor:
    """Return a random direction for each latent, of its decoder row's norm in the SAE's units.

    Drawn in raw units, it would lie mostly in columns that the adapter hardly uses.
    """
    scale = sae.scale.cpu()
    drawn = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(seed))
    drawn *= scale > 0
    length = (sae.W_dec.cpu() * scale).norm(dim=1, keepdim=True)
    drawn *= length / drawn.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.where(scale > 0, drawn / scale, 0.0)
