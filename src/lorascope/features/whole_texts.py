"""The rollouts that an index keeps whole: their tokens, and the code of every token.

Four lists are drawn from in turn until `n_tokens` are kept: the rollouts in which most latents
fire, those that hold most of what rare latents do, those that the SAE explains worst, and random
ones. Rare latents are those whose every firing is known (`evidence.N_SAMPLED` or fewer): each gives
its rollouts shares that add up to 1.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lorascope.activations.store import ActivationStore
from lorascope.features.evidence import Evidence
from lorascope.features.topk import row_hash

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

WHY = ("most", "rarest", "strangest", "random")  # bits of `text_why`, the first is 1


def text_arrays(
    store: ActivationStore,
    sae: "SAE",
    evidence: Evidence,
    n_tokens: int,
    only: tuple[str, ...] = (),
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays `text_*`. A rollout longer than what is left is passed over."""
    n_eligible, n_fired, error, size = evidence.rollouts.T
    l0 = n_fired / np.maximum(n_eligible, 1)
    fvu = error / np.where(size > 0, size, 1)
    rare = _rare(evidence)
    random = row_hash(np.arange(len(l0)))
    able = n_eligible > 0
    lists = [
        np.lexsort((np.arange(len(l0)), -key)) for key in (l0, rare, fvu, random.astype(float))
    ]
    lists = [order[able[order]] for order in lists]
    lists[1] = lists[1][rare[lists[1]] > 0]
    why = _chosen(lists, np.diff(store.rollout_start[: len(l0) + 1]), n_tokens)
    chosen = np.flatnonzero(why)
    parts = [_text(store, sae, evidence, int(i), only) for i in chosen]
    whole = (
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    )
    if not parts:
        return {"text_offset": np.zeros(1, np.int64), "text_code_offset": np.zeros(1, np.int64)}
    lengths = [len(part["text_token_id"]) for part in parts]
    fired = whole.pop("n_fired")
    return {
        "text_rollout": store.rollout_id[chosen],
        "text_why": why[chosen],
        "text_l0": l0[chosen],
        "text_fvu": fvu[chosen],
        "text_offset": np.concatenate([[0], np.cumsum(lengths)]),
        "text_code_offset": np.concatenate([[0], np.cumsum(fired)]),
        **whole,
    }


def _rare(evidence: Evidence) -> npt.NDArray[np.float64]:
    kept = evidence.sample.sorted()
    n_active = evidence.tally.n_active[kept.latent]
    known = n_active <= evidence.sample.n
    weight = 1 / n_active[known]
    share = np.bincount(kept.rollout[known], weight, minlength=len(evidence.rollouts))
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


def _text(
    store: ActivationStore, sae: "SAE", evidence: Evidence, rollout: int, only: tuple[str, ...]
) -> dict[str, npt.NDArray[Any]]:
    """Return one rollout's arrays; tokens that do not count have no code."""
    start, stop = store.rollout_start[rollout : rollout + 2].tolist()
    token_ids, roles = store.token_ids_of(start, stop), store.roles_of(start, stop)
    rows = torch.from_numpy(np.array(store.rows(start, stop))).to(sae.b_enc.device)
    code = sae.encode(rows)
    n_fired, latents, values = (t.cpu().numpy() for t in (code.l0, code.latents, code.values))
    counts = store.eligible_of(token_ids, roles, only)
    of_fired = np.repeat(counts, n_fired)
    latents, values = latents[of_fired], values[of_fired]
    density = evidence.tally.n_active[latents] / max(evidence.roles.sum(), 1)
    rarity = -np.log10(density).mean() if len(latents) else np.nan
    return {
        "text_rarity": np.array([rarity]),
        "text_token_id": token_ids,
        "text_role": roles,
        "text_latent": latents,
        "text_value": values,
        "n_fired": n_fired * counts,
    }
