"""Choose the rollouts that an index keeps whole: their tokens, and the code of every token.

Four lists are taken from in turn until `n_tokens` are kept: the rollouts in which most latents fire
per token, those with most firings of rare latents, those that the SAE reconstructs worst, and
random ones. Only tokens of text count for this. Rare latents are those whose sample holds every
firing (`N_SAMPLED` or fewer); each spreads a total weight of 1 over its firings.

The arrays are called `text_*` in the file.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lorascope.activations.store import ActivationStore
from lorascope.features.accumulators import Accumulator
from lorascope.features.spans import Span
from lorascope.features.topk import row_hash
from lorascope.texts.roles import ROLES

if TYPE_CHECKING:
    from lorascope.sae.model import SAE


def rollout_arrays(
    store: ActivationStore,
    sae: "SAE",
    accumulator: Accumulator,
    n_tokens: int,
    only_roles: tuple[str, ...] = ROLES,
) -> dict[str, npt.NDArray[Any]]:
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
