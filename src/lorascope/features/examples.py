"""Make the arrays of an index that hold texts: examples, samples, their windows, whole rollouts.

1. Examples are the strongest firings that were kept. `n_alike` counts, over the whole store, the
   tokens with the same context.
2. Samples: the sample of a latent's firings is cut into fifths by value. Each fifth shows the
   `per_fifth` firings of lowest hash that are not examples already.
3. Windows: the tokens on each side, cut at the ends of the rollout. The latent's value at each
   token is computed again (`Encoder.values_of`) and equals the scanned value to the bit.
4. Whole rollouts (arrays `text_*`), with the code of every token. Four lists are taken from in turn
   until `n_tokens` are kept: the rollouts in which most latents fire per token, those with most
   firings of rare latents, those that the SAE reconstructs worst, and random ones. Only tokens of
   text count for this. Rare latents are those whose sample holds every firing (`N_SAMPLED` or
   fewer); each spreads a total weight of 1 over its firings.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.arrayfile import Arrays
from lorascope.features.accumulators import Accumulator
from lorascope.features.spans import Span
from lorascope.features.topk import Firings, FiringSample, rank_in_run, row_hash
from lorascope.texts.roles import ROLES

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

N_FIFTHS = 5
_ROWS = 1 << 16  # rows whose values are computed at once


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


def count_equal_contexts(examples: Firings, spans: list[Span], reach: int) -> npt.NDArray[np.int64]:
    """Return for each example how many eligible tokens equal it up to `reach` positions away."""
    contexts = np.zeros(len(examples.row), np.uint64)
    for span in spans:
        row = examples.row - span.first_row
        here = (row >= 0) & (row < span.n_rows)
        contexts[here] = span.context_hashes(reach, reach)[row[here]]
    wanted, inverse = np.unique(contexts, return_inverse=True)
    counts = np.zeros(len(wanted), np.int64)
    for span in spans if len(wanted) else ():
        here = span.context_hashes(reach, reach)[span.eligible]
        at = np.minimum(np.searchsorted(wanted, here), len(wanted) - 1)
        counts += np.bincount(at[wanted[at] == here], minlength=len(wanted))
    return counts[inverse]


def _pair(firings: Firings, d_sae: int) -> npt.NDArray[np.int64]:
    return firings.row * d_sae + firings.latent


def rollout_arrays(
    store: ActivationStore,
    sae: "SAE",
    accumulator: Accumulator,
    n_tokens: int,
    only_roles: tuple[str, ...] = ROLES,
) -> Arrays:
    """Return the arrays `text_*`. A rollout longer than what is left of `n_tokens` is skipped.

    The bits of `text_why` say which lists chose a rollout, in the order of the module's text.
    """
    n_eligible, n_fired, error, size = accumulator.rollouts.T
    l0 = n_fired / np.maximum(n_eligible, 1)
    fvu = error / np.where(size > 0, size, 1)
    rare = _weight_of_rare_latents(accumulator)
    random = row_hash(np.arange(len(l0))).astype(float)
    lists = [np.lexsort((np.arange(len(l0)), -key)) for key in (l0, rare, fvu, random)]
    lists = [order[n_eligible[order] > 0] for order in lists]
    lists[1] = lists[1][rare[lists[1]] > 0]
    why = _choose(lists, np.diff(store.rollout_start[: len(l0) + 1]), n_tokens)
    chosen = np.flatnonzero(why)
    if not len(chosen):
        return {"text_offset": np.zeros(1, np.int64), "text_code_offset": np.zeros(1, np.int64)}
    spans = [Span(store, int(i), int(i) + 1, only_roles) for i in chosen]
    lengths = np.array([span.n_rows for span in spans])
    rows = np.concatenate([span.rows(0, span.n_rows) for span in spans])
    read, eligible = (
        np.concatenate([getattr(span, name) for span in spans]) for name in ("read", "eligible")
    )
    code = sae.encode(torch.from_numpy(rows).to(sae.b_enc.device))
    n_fired, latents, values = (t.cpu().numpy() for t in (code.l0, code.latents, code.values))
    coded = np.repeat(read, n_fired)  # tokens of other roles have no code
    latents, values, n_fired = latents[coded], values[coded], n_fired * read
    counted = np.repeat(eligible, n_fired)
    density = accumulator.statistics.n_active[latents[counted]] / max(accumulator.n_eligible, 1)
    rollout = np.repeat(np.repeat(np.arange(len(chosen)), lengths), n_fired)[counted]
    total = np.bincount(rollout, -np.log10(density), minlength=len(chosen))
    with np.errstate(invalid="ignore"):
        rarity = total / np.bincount(rollout, minlength=len(chosen))
    return {
        "text_rollout": store.rollout_id[chosen],
        "text_why": why[chosen],
        "text_l0": l0[chosen],
        "text_fvu": fvu[chosen],
        "text_rarity": rarity,
        "text_offset": np.concatenate([[0], np.cumsum(lengths)]),
        "text_token_id": np.concatenate([span.token_ids for span in spans]),
        "text_role": np.concatenate([span.roles for span in spans]),
        "text_code_offset": np.concatenate([[0], np.cumsum(n_fired)]),
        "text_latent": latents,
        "text_value": values,
    }


def _weight_of_rare_latents(accumulator: Accumulator) -> npt.NDArray[np.float64]:
    """Return the summed weight of rare latents' firings in each rollout, `(n_rollouts,)`."""
    kept = accumulator.sample.sorted()
    n_active = accumulator.statistics.n_active[kept.latent]
    rare = n_active <= accumulator.sample.n
    weight = np.bincount(
        kept.rollout[rare], 1 / n_active[rare], minlength=len(accumulator.rollouts)
    )
    return weight.astype(np.float64)  # bincount of nothing gives integers


def _choose(
    lists: list[npt.NDArray[np.int64]], lengths: npt.NDArray[np.int64], n_tokens: int
) -> npt.NDArray[np.uint8]:
    """Return for each rollout the bits of the lists that chose it; 0 for one not chosen."""
    why = np.zeros(len(lengths), np.uint8)
    n_left = n_tokens
    for rank in range(max(map(len, lists), default=0)):
        if n_left < lengths.min(initial=n_tokens):
            break
        for bit, order in enumerate(lists):
            if rank >= len(order):
                continue
            rollout = order[rank]
            if not why[rollout]:
                if lengths[rollout] > n_left:
                    continue
                n_left -= int(lengths[rollout])
            why[rollout] |= 1 << bit
    return why
