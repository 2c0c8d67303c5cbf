"""Make the arrays of an index that hold examples, samples and their windows.

1. Examples are the strongest firings that were kept. `n_alike` counts, over the whole store, the
   tokens with the same context.
2. Samples: the sample of a latent's firings is cut into fifths by value. Each fifth shows the
   `per_fifth` firings of lowest hash that are not examples already.
3. Windows: the tokens on each side, cut at the ends of the rollout. The latent's value at each
   token is computed again (`Encoder.at`) and equals the scanned value to the bit.
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
_ROWS = 1 << 16  # rows whose values are computed at once
Arrays = dict[str, npt.NDArray[Any]]


def example_arrays(
    store: ActivationStore, examples: Firings, spans: list[Span], d_sae: int, reach: int
) -> Arrays:
    """Return the arrays `example_*` of firings sorted by latent.

    Contexts are equal if the tokens within `reach` positions are.
    """
    return {
        **firing_arrays(store, examples, d_sae, "example"),
        "example_n_alike": _n_equal_contexts(examples, spans, reach),
    }


def sample_arrays(
    store: ActivationStore, sample: FiringSample, examples: Firings, per_fifth: int
) -> tuple[Firings, Arrays]:
    """Return the samples, by latent and descending fifth, and the arrays `sample_*`."""
    kept = sample.sorted()
    order = np.lexsort((kept.row, kept.value, kept.latent))
    n = np.bincount(kept.latent, minlength=sample.d_sae)
    fifth = np.empty(len(order), np.int64)
    fifth[order] = rank_in_run(kept.latent[order]) * N_FIFTHS // n[kept.latent[order]]
    is_example = np.isin(_pair(kept, sample.d_sae), _pair(examples, sample.d_sae))
    others = np.flatnonzero(~is_example)
    kept, fifth = kept.select(others), fifth[others]
    cell = kept.latent * N_FIFTHS + (N_FIFTHS - 1 - fifth)
    order = np.lexsort((kept.row, row_hash(kept.row), cell))
    chosen = order[rank_in_run(cell[order]) < per_fifth]
    chosen = chosen[np.lexsort((kept.row[chosen], cell[chosen]))]
    shown = kept.select(chosen)
    arrays = firing_arrays(store, shown, sample.d_sae, "sample")
    return shown, {**arrays, "sample_quantile": fifth[chosen].astype(np.int8)}


def window_arrays(
    store: ActivationStore, sae: "SAE", centres: Firings, context_window: int
) -> Arrays:
    """Return the arrays `window_*` of the windows around firings, in the given order."""
    begin = np.maximum(centres.row - context_window, store.rollout_start[centres.rollout])
    end = np.minimum(centres.row + context_window + 1, store.rollout_start[centres.rollout + 1])
    offset = np.concatenate([[0], np.cumsum(end - begin)]).astype(np.int64)
    owner = np.repeat(np.arange(len(begin)), end - begin)
    rows = np.arange(offset[-1]) - offset[owner] + begin[owner]  # of each window token
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
    """Return the code at pairs of row and latent, `(n,)`."""
    values = np.zeros(len(rows), np.float32)
    order = np.argsort(rows * sae.d_sae + latents)  # may be unstable: equal pairs have equal values
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
            latent = torch.from_numpy(latents[here]).to(device)
            values[here] = sae.encoder.values_of(x, index, latent).cpu().numpy()
            bar.update(len(chunk))
    return values


def firing_arrays(store: ActivationStore, firings: Firings, d_sae: int, name: str) -> Arrays:
    """Return the arrays `NAME_*` of firings sorted by latent."""
    counts = np.bincount(firings.latent, minlength=d_sae)
    return {
        f"{name}_offset": np.concatenate([[0], np.cumsum(counts)]),
        f"{name}_value": firings.value,
        f"{name}_row": firings.row,
        f"{name}_rollout": store.rollout_id[firings.rollout],
        f"{name}_position": firings.row - store.rollout_start[firings.rollout],
    }


def _n_equal_contexts(examples: Firings, spans: list[Span], reach: int) -> npt.NDArray[np.int64]:
    """Return for each example the number of eligible tokens with the same context."""
    contexts = np.zeros(len(examples.row), np.uint64)
    for span in spans:
        row = examples.row - span.first_row
        here = (row >= 0) & (row < span.n_rows)
        contexts[here] = span.uncached().context_hashes(reach, reach)[row[here]]
    wanted, inverse = np.unique(contexts, return_inverse=True)
    counts = np.zeros(len(wanted), np.int64)
    for span in (span.uncached() for span in spans if len(wanted)):
        here = span.context_hashes(reach, reach)[span.eligible]
        at = np.minimum(np.searchsorted(wanted, here), len(wanted) - 1)
        counts += np.bincount(at[wanted[at] == here], minlength=len(wanted))
    return counts[inverse]


def _pair(firings: Firings, d_sae: int) -> npt.NDArray[np.int64]:
    return firings.row * d_sae + firings.latent
