"""Random SAEs, and the weights of one in training."""

import numpy as np
import torch

from builders.stores import layout_of
from lorascope.artifact import Manifest
from lorascope.sae.model import SAE
from lorascope.sae.objective import Weights
from lorascope.sites import Site, SiteLayout


def make_sae(path, layout=None, d_sae=24, seed=0, threshold=1.0):
    """Save a random SAE over a layout and return it."""
    layout = layout or layout_of()
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(
        torch.randn(d_sae, layout.d_in, generator=generator), dim=1
    )
    manifest = Manifest(
        kind="sae", schema=1, settings={"seed": seed}, parents={}, layout=layout, content={"k": 3.0}
    )
    sae = SAE(
        W_enc=W_dec.T.contiguous(),
        b_enc=torch.zeros(d_sae),
        W_dec=W_dec,
        b_dec=torch.zeros(layout.d_in),
        threshold=torch.full((d_sae,), threshold),
        layout=layout,
        manifest=manifest,
    ).sealed()
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
    sae = SAE(
        W_enc=W_dec.T.contiguous(),
        b_enc=0.1 * torch.randn(d_sae, generator=generator),
        W_dec=W_dec,
        b_dec=torch.randn(d_in, generator=generator),
        threshold=torch.full((d_sae,), threshold),
        layout=layout,
        manifest=Manifest(
            kind="sae",
            schema=1,
            settings={"k": 4.0},
            parents={"activations": "d" * 64},
            layout=layout,
            content={"k": 4.0, "config": {"k": 4, "seed": 7}},
        ),
    )
    return sae.sealed()


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
