"""The tokens that a latent is about, from the sample of its firings.

- `mean`: tokens by the mean of the latent's values on them.
- `lift`: tokens by how many times as often they occur among the latent's firings as among all
  eligible tokens.
- `before`, `after`: the tokens that stand next to a firing in its rollout, by their share of the
  firings.

A token counts where it occurs at least `_LEAST` times in the sample (once, for a latent of fewer
than `_FEW` firings): rare tokens would lead every ranking by chance.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.activations.store import ActivationStore
from lorascope.features.topk import FiringSample, ranked

N_RANKED = 8
_LEAST = {"mean": 2, "lift": 3, "before": 1, "after": 1}
_FEW = 16


def ranked_tokens(
    store: ActivationStore, sample: FiringSample, n_of_token: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays `ranked_*`, `(latent, N_RANKED)`, best first; -1 and NaN where none is.

    `n_of_token` says how often each token occurs among the eligible ones, `(vocabulary,)`.
    """
    kept = sample.sorted()
    n_sampled = np.bincount(kept.latent, minlength=sample.d_sae)
    least_few = n_sampled < _FEW
    starts, ends = store.rollout_start[kept.rollout], store.rollout_start[kept.rollout + 1]
    arrays: dict[str, npt.NDArray[Any]] = {}
    for by, names in ((0, ("mean", "lift")), (-1, ("before",)), (1, ("after",))):
        at = kept.row + by
        inside = np.flatnonzero((at >= starts) & (at < ends))
        latent = kept.latent[inside]
        token = store.take_token_ids(at[inside])
        groups, inverse, counts = np.unique(
            latent * len(n_of_token) + token, return_inverse=True, return_counts=True
        )
        owner, token = np.divmod(groups, len(n_of_token))
        for name in names:
            if name == "mean":
                total = np.bincount(inverse, kept.value[inside], minlength=len(groups))
                score = total / counts
            elif name == "lift":
                usual = n_of_token[token] / max(n_of_token.sum(), 1)
                score = counts / n_sampled[owner] / usual
            else:
                score = counts / n_sampled[owner]
            enough = (counts >= _LEAST[name]) | least_few[owner]
            ids, scores = ranked(
                *(owner[enough], token[enough], score[enough]), sample.d_sae, N_RANKED
            )
            arrays[f"ranked_{name}_id"], arrays[f"ranked_{name}_score"] = ids, scores
    return arrays
