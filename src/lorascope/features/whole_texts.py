"""The rollouts that an index keeps whole: their tokens, and the code of every token.

Four lists are drawn from in turn until `n_tokens` are kept: the rollouts in which most latents
fire, those that hold most of what rare latents do, those that the SAE explains worst, and random
ones. Rare latents are those whose every firing is known (`N_SAMPLED` or fewer): each gives
its rollouts shares that add up to 1.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lorascope.activations.store import ActivationStore
from lorascope.features.accumulators import Accumulator
from lorascope.features.spans import Span
from lorascope.features.topk import row_hash

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

WHY = ("most", "rarest", "strangest", "random")  # bits of `text_why`, the first is 1


def text_arrays(
    store: ActivationStore,
    sae: "SAE",
    accumulator: Accumulator,
    n_tokens: int,
    only: tuple[str, ...] = (),
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays `text_*`. A rollout longer than what is left is passed over."""
    n_eligible, n_fired, error, size = accumulator.rollouts.T
    l0 = n_fired / np.maximum(n_eligible, 1)
    fvu = error / np.where(size > 0, size, 1)
    rare = _rare(accumulator)
    random = row_hash(np.arange(len(l0)))
    able = n_eligible > 0
    lists = [
        np.lexsort((np.arange(len(l0)), -key)) for key in (l0, rare, fvu, random.astype(float))
    ]
    lists = [order[able[order]] for order in lists]
    lists[1] = lists[1][rare[lists[1]] > 0]
    why = _chosen(lists, np.diff(store.rollout_start[: len(l0) + 1]), n_tokens)
    chosen = np.flatnonzero(why)
    if not len(chosen):
        return {"text_offset": np.zeros(1, np.int64), "text_code_offset": np.zeros(1, np.int64)}
    spans = [Span(store, int(i), int(i) + 1, only) for i in chosen]
    lengths = np.array([span.n_rows for span in spans])
    rows = np.concatenate([span.rows(0, span.n_rows) for span in spans])
    counts = np.concatenate([span.eligible for span in spans])
    code = sae.encode(torch.from_numpy(rows).to(sae.b_enc.device))
    n_fired, latents, values = (t.cpu().numpy() for t in (code.l0, code.latents, code.values))
    of_fired = np.repeat(counts, n_fired)  # tokens that do not count have no code
    latents, values, n_fired = latents[of_fired], values[of_fired], n_fired * counts
    density = accumulator.statistics.n_active[latents] / max(accumulator.roles.sum(), 1)
    text = np.repeat(np.repeat(np.arange(len(chosen)), lengths), n_fired)
    total = np.bincount(text, -np.log10(density), minlength=len(chosen))
    with np.errstate(invalid="ignore"):
        rarity = total / np.bincount(text, minlength=len(chosen))
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


def _rare(accumulator: Accumulator) -> npt.NDArray[np.float64]:
    kept = accumulator.sample.sorted()
    n_active = accumulator.statistics.n_active[kept.latent]
    known = n_active <= accumulator.sample.n
    weight = 1 / n_active[known]
    share = np.bincount(kept.rollout[known], weight, minlength=len(accumulator.rollouts))
    return share.astype(np.float64)  # of nothing it is whole numbers


def _chosen(
    lists: list[npt.NDArray[np.int64]], lengths: npt.NDArray[np.int64], n_tokens: int
) -> npt.NDArray[np.uint8]:
    """Return the bits of each rollout: the lists that it was taken from, in turn."""
    why = np.zeros(len(lengths), np.uint8)
    left = n_tokens
    for place in range(max(map(len, lists), default=0)):
        if left < lengths.min(initial=n_tokens):
            break
        for bit, order in enumerate(lists):
            if place >= len(order):
                continue
            rollout = order[place]
            if not why[rollout]:
                if lengths[rollout] > left:
                    continue
                left -= int(lengths[rollout])
            why[rollout] |= 1 << bit
    return why
