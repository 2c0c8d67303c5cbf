"""An index seen in other ways: found by text, as a table of statistics, with fewer examples."""

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lorascope.features.index import FeatureIndex
from lorascope.features.topk import rank_in_run

if TYPE_CHECKING:
    import pandas as pd

_BETWEEN = b"\xff"  # no UTF-8 text holds this byte, so no match goes from one window to the next


def search(index: FeatureIndex, text: str) -> list[int]:
    """Return the latents with a window that holds `text`, in any case.

    Ordered by the largest value at a token that the text covers; those that do not fire in the text
    itself come last. Every latent, where the text is empty.
    """
    wanted = text.lower().encode("utf-8", "surrogatepass")
    if not wanted:
        return list(range(len(index)))
    raw = [index.token_bytes(int(i)) for i in index.token_id]
    lowered = [t.decode("utf-8", "surrogateescape").lower() for t in raw]
    folded = [t.encode("utf-8", "surrogateescape") for t in lowered]
    at = np.searchsorted(index.token_id, index.window_token_id)
    n_windows = len(index.window_offset) - 1
    is_last = np.zeros(len(at), bool)
    is_last[index.window_offset[1:][np.diff(index.window_offset) > 0] - 1] = True
    ends = np.cumsum(np.array([len(t) for t in folded], np.int64)[at] + is_last)
    pieces = [folded[i] for i in at.tolist()]
    for last in np.flatnonzero(is_last).tolist():
        pieces[last] += _BETWEEN
    counts = np.concatenate([np.diff(index.example_offset), np.diff(index.sample_offset)])
    latents = np.repeat(np.concatenate([np.arange(len(index))] * 2), counts)
    best: dict[int, float] = {}
    for match in re.finditer(re.escape(wanted), b"".join(pieces)):
        first = int(np.searchsorted(ends, match.start(), side="right"))
        last = int(np.searchsorted(ends, match.end() - 1, side="right"))
        window = int(np.searchsorted(index.window_offset, first, side="right")) - 1
        assert window < n_windows, "a match lies in a window"
        latent = int(latents[window])
        value = float(index.window_activation[first : last + 1].max())
        best[latent] = max(best.get(latent, 0.0), value)
    return sorted(best, key=lambda latent: (-best[latent], latent))


def table(index: FeatureIndex) -> "pd.DataFrame":
    """Return the statistics of every latent as a pandas table; what is unknown is missing."""
    import pandas as pd

    content = index.content
    n_eligible = content.get("n_eligible")
    n_active = index.latent_n_active.astype(float)
    n_active[index.latent_n_active < 0] = np.nan
    n_rollouts = index.latent_n_rollouts.astype(float)
    n_rollouts[index.latent_n_rollouts < 0] = np.nan
    columns = {
        "n_active": n_active,
        "density": n_active / n_eligible if n_eligible else np.full(len(index), np.nan),
        "l0_share": n_active / max(np.nansum(n_active), 1.0),
        "n_rollouts": n_rollouts,
        "rollout_share": n_rollouts / (content.get("n_rollouts") or np.nan),
        "max": index.latent_max,
        "mean": index.latent_mean,
        "std": index.latent_std,
        "n_examples": index.n_examples,
        "stability": index.latent_stability,
    }
    n_by_role = np.array(content.get("n_by_role") or [], float)
    for role, counts, total in zip(
        content.get("roles") or (), index.latent_by_role.T, n_by_role, strict=False
    ):
        if total:
            columns[f"density_{role}"] = counts / total
    sites = (index.manifest.get("layout") or {}).get("sites") or []
    if index.latent_fingerprint.shape[1] == len(sites) > 0:
        top = index.latent_fingerprint.argmax(1)
        columns["site"] = np.array([str(site.get("module")) for site in sites])[top]
        columns["site_share"] = index.latent_fingerprint.max(1).astype(np.float32)
    for ranking in ("mean", "lift"):
        tokens = [index.ranked_tokens(latent, ranking) for latent in range(len(index))]
        columns[f"tokens_{ranking}"] = [" | ".join(text for text, _ in found) for found in tokens]
    return pd.DataFrame(columns, index=pd.RangeIndex(len(index), name="feature"))


def limited(index: FeatureIndex, n: int) -> FeatureIndex:
    """Return the index with `n` examples of each latent at most, and `n // 5` samples of a fifth.

    Examples are the strongest; statistics stay as they are.
    """
    owner = np.repeat(np.arange(len(index)), np.diff(index.example_offset))
    examples = rank_in_run(owner) < n
    drawn = np.repeat(np.arange(len(index)), np.diff(index.sample_offset))
    samples = rank_in_run(drawn * 128 + index.sample_quantile) < n // 5
    windows = np.concatenate([examples, samples])
    lengths = np.diff(index.window_offset)
    tokens = np.repeat(windows, lengths)
    kept = {"example": examples, "sample": samples}
    arrays = {
        name: array[kept[name.partition("_")[0]]]
        for name, array in index.arrays.items()
        if name.startswith(("example_", "sample_")) and not name.endswith("_offset")
    }
    for name, of, chosen in (("example", owner, examples), ("sample", drawn, samples)):
        counts = np.bincount(of[chosen], minlength=len(index))
        arrays[f"{name}_offset"] = np.concatenate([[0], np.cumsum(counts)])
    return replace(
        index,
        **arrays,
        window_offset=np.concatenate([[0], np.cumsum(lengths[windows])]),
        window_target=index.window_target[windows],
        window_token_id=index.window_token_id[tokens],
        window_activation=index.window_activation[tokens],
    )
