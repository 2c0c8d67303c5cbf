"""Random SAEs, and the weights of one in training."""

from typing import Any

import numpy as np
import torch

from builders.stores import layout_of
from lorascope.artifact import Manifest
from lorascope.sae.model import KIND, SAE, SCHEMA
from lorascope.sae.objective import Weights
from lorascope.sites import Site, SiteLayout


def dictionary(
    layout: SiteLayout,
    W_enc: torch.Tensor,
    W_dec: torch.Tensor,
    *,
    b_enc: torch.Tensor | None = None,
    b_dec: torch.Tensor | None = None,
    threshold: float = 0.0,
    **manifest: Any,
) -> SAE:
    """Make an SAE of given weights, with other parts of its manifest than the usual ones."""
    d_sae = W_enc.shape[1]
    said = {"settings": {}, "parents": {}, "content": {"architecture": "batchtopk"}, **manifest}
    return SAE(
        W_enc=W_enc,
        b_enc=torch.zeros(d_sae) if b_enc is None else b_enc,
        W_dec=W_dec,
        b_dec=torch.zeros(layout.d_in) if b_dec is None else b_dec,
        threshold=torch.full((d_sae,), threshold),
        layout=layout,
        manifest=Manifest(kind=KIND, schema=SCHEMA, layout=layout, **said),
    ).sealed()


def make_sae(path, layout=None, d_sae=24, seed=0, threshold=1.0):
    """Save a random SAE over a layout and return it."""
    layout = layout or layout_of()
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(
        torch.randn(d_sae, layout.d_in, generator=generator), dim=1
    )
    sae = dictionary(
        layout,
        W_dec.T.contiguous(),
        W_dec,
        threshold=threshold,
        settings={"seed": seed},
        content={"k": 3.0},
    )
    sae.save(path)
    return sae


def dense_code(store, sae):
    return sae.encode_dense(torch.from_numpy(np.array(store.rows(0, store.n_rows)))).numpy()


def plain_layout(d_in: int) -> SiteLayout:
    return SiteLayout.from_sites([Site(layer=i, projection="gate_proj") for i in range(d_in)])


def random_sae(d_in=14, d_sae=40, seed=0, layout=None, threshold=0.3) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    layout = layout or (layout_of() if d_in == 14 else plain_layout(d_in))
    W_dec = torch.randn(d_sae, d_in, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return dictionary(
        layout,
        W_dec.T.contiguous(),
        W_dec,
        b_enc=0.1 * torch.randn(d_sae, generator=generator),
        b_dec=torch.randn(d_in, generator=generator),
        threshold=threshold,
        settings={"k": 4.0},
        parents={"activations": "d" * 64},
        content={"k": 4.0, "config": {"k": 4, "seed": 7}},
    )


def random_rows(n, d_in, seed=1, dtype=torch.float32):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(d_in=7, d_sae=24, seed=0, *, jump=False, dtype=torch.float64) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, d_in, generator=generator, dtype=dtype)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    weights = Weights(
        W_enc=torch.randn(d_sae, d_in, generator=generator, dtype=dtype).T,
        b_enc=torch.randn(d_sae, generator=generator, dtype=dtype),
        W_dec=W_dec,
        b_dec=torch.randn(d_in, generator=generator, dtype=dtype),
        log_threshold=torch.randn(d_sae, generator=generator, dtype=dtype) * 0.5 if jump else None,
    )
    for tensor in weights.tensors().values():
        tensor.requires_grad_()
    return weights
