"""Find what is near a latent: latents that write alike or fire with it, tokens, and sites.

- Decoder (`nearest_rows`): cosine of decoder rows in effect units, over latents that fire.
- Co-firing (`cofiring`): Jaccard index of the sets of tokens on which two latents fire, from the
  samples of their firings. A sample holds the rows of lowest hash, and the hash of a row is the
  same for every latent (coordinated bottom-k sketches, Cohen and Kaplan 2007). Below the lower of
  two latents' cut-offs, both samples hold all firings. Their shared rows there, divided by the
  share of all hashes below it, estimate all shared rows. This is exact if both latents have no more
  firings than a sample holds.
- Tokens (`ranked_tokens`), from the same samples: `mean` ranks tokens by the latent's mean value on
  them, `lift` by how much more frequent they are among its firings than among all eligible tokens,
  `before` and `after` the tokens next to a firing in its rollout by their share of the firings. A
  token needs `_MIN_COUNT` firings (one, if the sample has fewer than `_FEW`), because otherwise
  rare tokens lead every ranking by chance.
- Fingerprint (`fingerprint`): the share of a decoder row's squared effect at each site.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lorascope import kernels
from lorascope.activations.store import ActivationStore
from lorascope.features.topk import FiringSample, best_per_latent
from lorascope.sites import SiteLayout

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

N_NEAR = 10
N_RANKED = 8
_BLOCK = 1024  # latents whose cosines are computed at once
_PAIRS = 1 << 22  # pairs of firings that are counted at once
_MIN_JACCARD = 0.01  # a lower index means that two latents are unrelated
_MIN_SHARED = 3  # shared firings in the samples; fewer are chance, if samples are not complete
_MIN_COUNT = {"mean": 2, "lift": 3, "before": 1, "after": 1}
_FEW = 16
_N_HASHES = 1 << 32
Nearest = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]  # (latent, N_NEAR) each


def effect_rows(sae: "SAE") -> tuple[torch.Tensor, str]:
    """Return the decoder in effect units, `(latent, d_in)` float32, and the name of the units.

    If the layout does not know the norms of `B`, these are the SAE's own units.
    """
    if all(site.b_norms for site in sae.layout.sites):
        scale = torch.from_numpy(sae.layout.effect_scale).to(sae.W_dec)
        return sae.W_dec * scale, "effect"
    return sae.W_dec * sae.scale, "sae"


def fingerprint(rows: torch.Tensor, layout: SiteLayout) -> npt.NDArray[np.float16]:
    """Return the share of each decoder row's squared norm at each site, `(latent, site)`."""
    owner = torch.repeat_interleave(torch.tensor([site.rank for site in layout.sites]))
    share = torch.zeros(len(rows), len(layout.sites), dtype=torch.float64, device=rows.device)
    for part, block in zip(share.split(_BLOCK), rows.split(_BLOCK), strict=True):
        part.index_add_(1, owner.to(rows.device), block.double().square())
    share /= share.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return share.cpu().numpy().astype(np.float16)


def nearest_rows(rows: torch.Tensor, alive: npt.NDArray[np.bool_]) -> Nearest:
    """Return for each latent that fires the others with the highest cosine, nearest first."""
    ids, scores = _none_near(len(rows))
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
    """Return for each latent the others with the highest Jaccard index, highest first.

    `n_active` `(latent,)` has the number of each latent's firings.
    """
    kept = sample.sorted()
    ids, scores = _none_near(sample.d_sae)
    if not len(kept.row):
        return ids, scores
    is_complete = n_active <= sample.n
    covered = np.where(is_complete, 1.0, (sample.cutoff + 1.0) / _N_HASHES)  # share of the hashes
    order = np.argsort(kept.row, kind="stable")
    by_row = kept.latent[order].astype(np.uint32)  # the latents that fire in each row, row by row
    starts = np.flatnonzero(np.concatenate([[True], np.diff(kept.row[order]) != 0]))
    lengths = np.diff(np.append(starts, len(order)))
    run = np.empty(len(order), np.int64)  # of each firing: which row it is in, among sampled rows
    run[order] = np.repeat(np.arange(len(starts)), lengths)
    n_others, begin = lengths[run], starts[run]
    bounds = np.concatenate([[0], np.cumsum(n_others)])
    offset = np.searchsorted(kept.latent, np.arange(sample.d_sae + 1))
    max_latents = max(_N_HASHES // sample.d_sae, 1)  # at once, so that a pair fits a uint32
    first = 0
    while first < sample.d_sae:  # a block of latents, with everything that fires with them
        last = int(np.searchsorted(bounds[offset], bounds[offset[first]] + _PAIRS, side="right"))
        last = min(max(last - 1, first + 1), first + max_latents)
        block = slice(int(offset[first]), int(offset[last]))
        n = n_others[block]
        at = np.repeat(begin[block] - (bounds[block] - bounds[block.start]), n)
        at += np.arange(len(at))
        owners = ((kept.latent[block] - first) * sample.d_sae).astype(np.uint32)
        pairs = np.repeat(owners, n) + by_row[at]
        pairs.sort()
        begins = np.flatnonzero(np.concatenate([[len(pairs) > 0], pairs[1:] != pairs[:-1]]))
        counts = np.diff(np.append(begins, len(pairs)))
        owner, other = np.divmod(pairs[begins].astype(np.int64), sample.d_sae)
        owner += first
        common = np.minimum(covered[owner], covered[other])
        shared = np.minimum(counts / common, np.minimum(n_active[owner], n_active[other]))
        jaccard = shared / (n_active[owner] + n_active[other] - shared)
        enough = np.flatnonzero(
            (owner != other) & (jaccard >= _MIN_JACCARD) & ((common >= 1) | (counts >= _MIN_SHARED))
        )
        ids[first:last], scores[first:last] = best_per_latent(
            owner[enough] - first, other[enough], jaccard[enough], last - first, N_NEAR
        )
        first = last
    return ids, scores


def ranked_tokens(
    store: ActivationStore, sample: FiringSample, n_by_token: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays `ranked_*`, `(latent, N_RANKED)`, best first; -1 and NaN fill the rest.

    `n_by_token` `(vocabulary,)` has the number of eligible tokens with each id.
    """
    kept = sample.sorted()
    n_sampled = np.bincount(kept.latent, minlength=sample.d_sae)
    has_few = n_sampled < _FEW
    starts, ends = store.rollout_start[kept.rollout], store.rollout_start[kept.rollout + 1]
    arrays: dict[str, npt.NDArray[Any]] = {}
    for offset, rankings in ((0, ("mean", "lift")), (-1, ("before",)), (1, ("after",))):
        at = kept.row + offset
        inside = np.flatnonzero((at >= starts) & (at < ends))
        pairs, inverse, counts = np.unique(
            kept.latent[inside] * len(n_by_token) + store.take_token_ids(at[inside]),
            return_inverse=True,
            return_counts=True,
        )
        latent, token = np.divmod(pairs, len(n_by_token))
        share = counts / n_sampled[latent]
        for ranking in rankings:
            if ranking == "mean":
                score = np.bincount(inverse, kept.value[inside], minlength=len(pairs)) / counts
            elif ranking == "lift":
                score = share / (n_by_token[token] / max(n_by_token.sum(), 1))
            else:
                score = share
            enough = (counts >= _MIN_COUNT[ranking]) | has_few[latent]
            ids, scores = best_per_latent(
                latent[enough], token[enough], score[enough], sample.d_sae, N_RANKED
            )
            arrays[f"ranked_{ranking}_id"], arrays[f"ranked_{ranking}_score"] = ids, scores
    return arrays


def _none_near(n_latents: int) -> Nearest:
    ids = np.full((n_latents, N_NEAR), -1, np.int32)
    return ids, np.full((n_latents, N_NEAR), np.nan, np.float32)
