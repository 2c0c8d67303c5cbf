"""The examples and samples of every latent with their windows, as the arrays of an index.

1. Examples are the strongest firings as they were kept; `n_alike` is counted over the whole store.
2. Samples: the kept sample of a latent's firings is cut into fifths by value, and of each fifth the
   `per_fifth` firings of lowest hash are shown that are not examples already.
3. Windows: the tokens on each side, cut at the rollout's ends. The latent's value at each of them
   is an inner product of its own (`Encoder.at`), equal to the bit to the value that was scanned.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.features.spans import Span
from lorascope.features.topk import Firings, FiringSample, rank_in_run, row_hash

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

N_FIFTHS = 5
_ROWS = 1 << 16  # rows whose windows are computed at once
Arrays = dict[str, npt.NDArray[Any]]


def example_arrays(
    store: ActivationStore, examples: Firings, spans: list[Span], d_sae: int, reach: int
) -> Arrays:
    """Return the arrays `example_*` of firings sorted by latent."""
    return {
        **_places(store, examples, d_sae, "example"),
        "example_n_alike": _n_alike(examples, spans, reach),
    }


def sample_arrays(
    store: ActivationStore, sample: FiringSample, examples: Firings, per_fifth: int
) -> tuple[Firings, Arrays]:
    """Return the samples that are shown, by latent and falling fifth, and the arrays `sample_*`."""
    kept = sample.sorted()
    order = np.lexsort((kept.row, kept.value, kept.latent))
    n = np.bincount(kept.latent, minlength=sample.d_sae)
    fifth = np.empty(len(order), np.int64)
    fifth[order] = rank_in_run(kept.latent[order]) * N_FIFTHS // n[kept.latent[order]]
    taken = np.isin(_pair(kept, sample.d_sae), _pair(examples, sample.d_sae))
    free = np.flatnonzero(~taken)
    kept, fifth = kept.where(free), fifth[free]
    place = kept.latent * N_FIFTHS + (N_FIFTHS - 1 - fifth)
    order = np.lexsort((kept.row, row_hash(kept.row), place))
    chosen = order[rank_in_run(place[order]) < per_fifth]
    chosen = chosen[np.lexsort((kept.row[chosen], place[chosen]))]
    shown = kept.where(chosen)
    arrays = _places(store, shown, sample.d_sae, "sample")
    return shown, {**arrays, "sample_quantile": fifth[chosen].astype(np.int8)}


def window_arrays(
    store: ActivationStore, sae: "SAE", centres: Firings, context_window: int
) -> Arrays:
    """Return the arrays `window_*` of firings in the order in which they are given."""
    begin = np.maximum(centres.row - context_window, store.rollout_start[centres.rollout])
    end = np.minimum(centres.row + context_window + 1, store.rollout_start[centres.rollout + 1])
    offset = np.concatenate([[0], np.cumsum(end - begin)]).astype(np.int64)
    owner = np.repeat(np.arange(len(begin)), end - begin)
    rows = np.arange(offset[-1]) - offset[owner] + begin[owner]  # row of each window token
    return {
        "window_offset": offset,
        "window_target": (centres.row - begin).astype(np.int32),
        "window_token_id": store.take_token_ids(rows),
        "window_activation": _values(store, sae, rows, centres.latent[owner]),
    }


def _values(
    store: ActivationStore,
    sae: "SAE",
    rows: npt.NDArray[np.int64],
    latents: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]:
    """Return the code at any pairs of row and latent."""
    values = np.zeros(len(rows), np.float32)
    order = np.argsort(rows * sae.d_sae + latents)  # equal pairs have equal values
    in_order = rows[order]
    needed = np.unique(in_order)
    device = sae.b_enc.device
    with runtime.progress(len(needed), "contexts", "tokens") as bar:
        for start in range(0, len(needed), _ROWS):
            chunk = needed[start : start + _ROWS]
            first, last = np.searchsorted(in_order, [chunk[0], chunk[-1] + 1])
            here = order[first:last]
            index = torch.from_numpy(np.searchsorted(chunk, in_order[first:last])).to(device)
            x = torch.from_numpy(store.take(chunk)).to(device)
            pairs = index, torch.from_numpy(latents[here]).to(device)
            values[here] = sae.encoder.at(x, *pairs).cpu().numpy()
            bar.update(len(chunk))
    return values


def _places(store: ActivationStore, firings: Firings, d_sae: int, name: str) -> Arrays:
    counts = np.bincount(firings.latent, minlength=d_sae)
    return {
        f"{name}_offset": np.concatenate([[0], np.cumsum(counts)]),
        f"{name}_value": firings.value,
        f"{name}_row": firings.row,
        f"{name}_rollout": store.rollout_id[firings.rollout],
        f"{name}_position": firings.row - store.rollout_start[firings.rollout],
    }


def _n_alike(examples: Firings, spans: list[Span], reach: int) -> npt.NDArray[np.int64]:
    """Return at how many eligible tokens the same tokens stand within `reach` places."""
    own = np.zeros(len(examples.row), np.uint64)
    for span in spans:
        row = examples.row - span.first_row
        here = (row >= 0) & (row < span.n_rows)
        own[here] = span.reopened().neighbourhoods(reach)[row[here]]
    wanted, inverse = np.unique(own, return_inverse=True)
    counts = np.zeros(len(wanted), np.int64)
    for span in (span.reopened() for span in spans if len(wanted)):
        found = span.neighbourhoods(reach)[span.eligible]
        at = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        counts += np.bincount(at[wanted[at] == found], minlength=len(wanted))
    return counts[inverse]


def _pair(firings: Firings, d_sae: int) -> npt.NDArray[np.int64]:
    return firings.row * d_sae + firings.latent
