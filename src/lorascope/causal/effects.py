"""How far two runs of a model are apart, in nats at each token, and how sure a sum of that is.

Logits become float32 before anything is computed with them: in 16 bits the softmax alone leaves a
floor of about 1e-3 nats, which is more than most of what is measured here. Sums over tokens are
float64. Everything is over texts that were drawn as a whole, so intervals draw texts anew, never
tokens: those of one text are not independent.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Values = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]

_AT_ONCE = 1 << 25  # logits in float32 at a time, 128 MB
_N_DRAWS = 2000
_EDGES = (2.5, 97.5)  # percentiles: an interval of 95 %


def kl_of(
    reference: Float[Tensor, "token vocab"], other: Float[Tensor, "token vocab"]
) -> Float[Tensor, "token"]:
    """Return `KL(reference ‖ other) = Σ p (log p − log q)` of each token, in nats, float32.

    It is summed as `Σ p (log p − log q) − p + q`, whose terms are all 0 or more: what rounding
    leaves of the normalisation, about 1e-7, then counts by its square only, so that effects of
    1e-10 nats can be told from none. Takes logits of any type. A token that the reference gives no
    probability (a logit of −inf) adds what the other gives it; one that only the other rules out
    makes the KL infinite.
    """
    size = max(1, _AT_ONCE // max(reference.shape[-1], 1))
    parts = []
    for p_logits, q_logits in zip(reference.split(size), other.split(size), strict=True):
        log_p, log_q = p_logits.float().log_softmax(-1), q_logits.float().log_softmax(-1)
        p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
        near = p * (torch.expm1(d) - d)
        terms = torch.where(d.abs() < 1, near, q - p - p * d)
        parts.append(torch.where(p > 0, terms, q).sum(-1))
    return torch.cat(parts)


def ce_of(
    logits: Float[Tensor, "token vocab"], targets: Int[Tensor, "token"]
) -> Float[Tensor, "token"]:
    """Return `−log p(target)` of each token, in nats, float32. Takes logits of any type."""
    size = max(1, _AT_ONCE // max(logits.shape[-1], 1))
    parts = [
        torch.nn.functional.cross_entropy(here.float(), wanted, reduction="none")
        for here, wanted in zip(logits.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts)


def counted(
    logits: Float[Tensor, "batch seq vocab"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "token vocab"]:
    """Return the logits of the tokens that count, one after the other."""
    return logits[mask.to(logits.device)]


@dataclass(frozen=True)
class Tokens:
    """Which text each measured token is of, `(n_tokens,)`, numbered from 0."""

    text: npt.NDArray[np.int64]
    n_texts: int

    def sums(self, values: Values, where: npt.NDArray[np.bool_] | None = None) -> Sums:
        """Return the sum of each text, `(n_texts,)`, over all tokens or those `where` says."""
        text, wide = self.text, values.astype(np.float64)
        if where is not None:
            text, wide = text[where], wide[where]
        return np.bincount(text, weights=wide, minlength=self.n_texts).astype(np.float64)


def ratio_of(above: Sums, below: Sums) -> float | None:
    """Return the sum of one over the sum of the other; None where that has no value."""
    total = float(below.sum())
    return float(above.sum()) / total if total else None


def interval_of(above: Sums, below: Sums, seed: int = 0) -> list[float] | None:
    """Return the 95 % interval of `ratio_of` by the bootstrap, texts being drawn anew.

    Percentiles of 2,000 draws (Efron 1979). None where there is one text only, or where a draw has
    no ratio.
    """
    n = len(above)
    if n < 2:
        return None
    rng = np.random.default_rng([seed, n])
    times = rng.multinomial(n, np.full(n, 1 / n), size=_N_DRAWS).astype(np.float64)
    top, bottom = times @ above, times @ below
    if not bottom.all():
        return None
    return [float(edge) for edge in np.percentile(top / bottom, _EDGES)]
