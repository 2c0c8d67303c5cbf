"""What is near a latent: by the direction it writes, and by the tokens on which it fires.

- Decoder: cosine of decoder rows in effect units, over latents that fire.
- Co-firing: Jaccard index of the sets of tokens on which two latents fire, from the samples of
  their firings. A sample holds the rows of lowest hash, and a row's hash is the same for every
  latent (coordinated bottom-k sketches, Cohen and Kaplan 2007): below the lower of two latents'
  bounds, both have all their firings, so that what they share there, divided by the bound's share
  of all hashes, estimates what they share at all. Exact where both have no more firings than a
  sample holds.
- Fingerprint: the share of the squared effect of a decoder row that lies at each site.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lorascope import kernels
from lorascope.features.topk import FiringSample, ranked
from lorascope.sites import SiteLayout

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

N_NEAR = 10
_BLOCK = 1024  # latents whose cosines are held at once
_PAIRS = 1 << 22  # pairs of firings that are counted at once
_LEAST = 0.01  # a lower index says that two latents have nothing to do with each other
_SEEN = 3  # common firings in the samples: fewer are chance where samples are not everything
_WHOLE = 1 << 32
_HASHES = float(_WHOLE)
Nearest = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]  # (latent, N_NEAR) each


def effect_rows(sae: "SAE") -> tuple[torch.Tensor, str]:
    """Return the decoder in effect units, `(latent, d_in)` float32, and the name of the units.

    Where the layout does not know the norms of `B` they are the SAE's own units.
    """
    if all(site.b_norms for site in sae.layout.sites):
        scale = torch.from_numpy(sae.layout.effect_scale).to(sae.W_dec)
        return sae.W_dec * scale, "effect"
    return sae.W_dec * sae.scale, "sae"


def fingerprint(rows: torch.Tensor, layout: SiteLayout) -> npt.NDArray[np.float16]:
    """Return the share of each decoder row's squared norm at each site, `(latent, site)`."""
    squares = rows.double().square()
    owner = torch.repeat_interleave(torch.tensor([site.rank for site in layout.sites]))
    share = squares.new_zeros(len(rows), len(layout.sites))
    share.index_add_(1, owner.to(rows.device), squares)
    share /= share.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return share.cpu().numpy().astype(np.float16)


def nearest_rows(rows: torch.Tensor, alive: npt.NDArray[np.bool_]) -> Nearest:
    """Return for each latent that fires the others with the highest cosine, nearest first."""
    ids, scores = _nothing(len(rows))
    living = np.flatnonzero(alive)
    n = min(N_NEAR, len(living) - 1)
    if n < 1:
        return ids, scores
    unit = torch.nn.functional.normalize(rows[torch.from_numpy(living).to(rows.device)], dim=1)
    product = kernels.for_device(rows.device).product
    for first in range(0, len(living), _BLOCK):
        block = unit[first : first + _BLOCK]
        cosine = product(block, unit, block.new_empty(len(block), len(unit)))
        itself = torch.arange(len(block), device=rows.device)
        cosine[itself, itself + first] = -2
        best = torch.topk(cosine, n, dim=1)
        here = living[first : first + _BLOCK]
        ids[here, :n] = living[best.indices.cpu().numpy()]
        scores[here, :n] = best.values.cpu().numpy().clip(-1, 1)
    return ids, scores


def cofiring(sample: FiringSample, n_active: npt.NDArray[np.int64]) -> Nearest:
    """Return for each latent the others with the highest Jaccard index, highest first."""
    kept = sample.sorted()
    ids, scores = _nothing(sample.d_sae)
    if not len(kept.row):
        return ids, scores
    reach = np.where(n_active > sample.n, (sample.bound + 1.0) / _HASHES, 1.0)  # (latent,)
    order = np.argsort(kept.row, kind="stable")
    of_row = kept.latent[order].astype(np.uint32)  # the latents that fire in each row, row by row
    starts = np.flatnonzero(np.concatenate([[True], np.diff(kept.row[order]) != 0]))
    lengths = np.diff(np.append(starts, len(order)))
    run = np.empty(len(order), np.int64)
    run[order] = np.repeat(np.arange(len(starts)), lengths)
    n_others, begin = lengths[run], starts[run]  # of each firing, by latent
    bounds = np.concatenate([[0], np.cumsum(n_others)])
    offset = np.searchsorted(kept.latent, np.arange(sample.d_sae + 1))
    most = max(_WHOLE // sample.d_sae, 1)  # latents of a turn, so that a pair is a uint32
    first = 0
    while first < sample.d_sae:  # some latents at a time, with all that fires beside them
        last = int(np.searchsorted(bounds[offset], bounds[offset[first]] + _PAIRS, side="right"))
        last = min(max(last - 1, first + 1), first + most)
        mine = slice(int(offset[first]), int(offset[last]))
        n = n_others[mine]
        at = np.repeat(begin[mine] - (bounds[mine] - bounds[mine.start]), n)
        at += np.arange(len(at))
        owners = ((kept.latent[mine] - first) * sample.d_sae).astype(np.uint32)
        pairs = np.repeat(owners, n) + of_row[at]
        pairs.sort()
        begins = np.flatnonzero(np.concatenate([[len(pairs) > 0], pairs[1:] != pairs[:-1]]))
        counts = np.diff(np.append(begins, len(pairs)))
        owner, other = np.divmod(pairs[begins].astype(np.int64), sample.d_sae)
        owner += first
        shared = counts / np.minimum(reach[owner], reach[other])
        shared = np.minimum(shared, np.minimum(n_active[owner], n_active[other]))
        jaccard = shared / (n_active[owner] + n_active[other] - shared)
        exact = np.minimum(reach[owner], reach[other]) >= 1
        enough = np.flatnonzero(
            (owner != other) & (jaccard >= _LEAST) & (exact | (counts >= _SEEN))
        )
        owner, other, jaccard = owner[enough], other[enough], jaccard[enough]
        here = owner - first, other, jaccard
        ids[first:last], scores[first:last] = ranked(*here, last - first, N_NEAR)
        first = last
    return ids, scores


def _nothing(n_latents: int) -> Nearest:
    ids = np.full((n_latents, N_NEAR), -1, np.int32)
    return ids, np.full((n_latents, N_NEAR), np.nan, np.float32)
