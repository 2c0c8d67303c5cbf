"""How far two runs of a model differ at each token, in nats, and intervals of sums over tokens.

Logits are converted to float32 first: in 16 bits the softmax alone leaves a floor of about 1e-3
nats, more than most effects that are measured here. Sums over tokens are float64. Intervals
resample whole rollouts, never tokens, because tokens of one rollout are not independent.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorascope.causal.report_records import N_SLICES, Interval, Recovered

Values = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]

_CHUNK = (1 << 18, 1 << 25)  # logits converted to float32 at a time, on the CPU and on a GPU
_LARGEST_RATIO = 80.0  # of the logarithm of two probabilities: float32 holds e^88
_ROUNDING_KL = 2.0**-46  # nats a token: float32's rounding step squared
_N_DRAWS = 2000
_N_LIKELY = 3  # tokens of each run
MOST_LIKELY = 2 * _N_LIKELY  # of both
_LEAST_LIKELY = 0.01  # probability
_PERCENTILES = (2.5, 97.5)  # a 95 % interval


def kl_divergence(
    reference: Float[Tensor, "token vocab"], other: Float[Tensor, "token vocab"]
) -> Float[Tensor, "token"]:
    """Return `KL(reference ‖ other) = Σ p (log p − log q)` of each token, in nats, float32.

    The sum is `Σ p (log p − log q) − p + q`, whose terms are all 0 or more. The rounding error of
    the normalisation, about 1e-7, then enters only squared, so that effects of 1e-10 nats can be
    told from none. Takes logits of any type. Where the reference has probability 0 (a logit of
    −inf), the term is the other's probability; where only the other has 0, the KL is infinite.
    """
    return torch.cat(
        [
            _kl(p.float().log_softmax(-1), q.float().log_softmax(-1))
            for p, q in zip(_chunks(reference), _chunks(other), strict=True)
        ]
    )


def cross_entropy(
    logits: Float[Tensor, "token vocab"], targets: Int[Tensor, "token"]
) -> Float[Tensor, "token"]:
    """Return `−log p(target)` of each token, in nats, float32. Takes logits of any type."""
    chunks = _chunks(logits)
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(chunk.float(), target, reduction="none")
            for chunk, target in zip(chunks, targets.split(len(chunks[0])), strict=True)
        ]
    )


def log_probabilities(logits: Float[Tensor, "token vocab"]) -> Float[Tensor, "token vocab"]:
    """Return `log p` of each token of the vocabulary, float32. Takes logits of any type."""
    return torch.cat([chunk.float().log_softmax(-1) for chunk in _chunks(logits)])


def likeliest(
    adapter: Float[Tensor, "token vocab"], base: Float[Tensor, "token vocab"]
) -> tuple[Int[Tensor, "token n"], Float[Tensor, "2 token n"]]:
    """Return the likeliest tokens of two runs, and their probabilities in the base and the adapter.

    They are the `_N_LIKELY` likeliest of each run, without those below `_LEAST_LIKELY` in both, but
    with the first of each; in descending order of the adapter's probability. -1: no further token.
    """
    n, ids, p = min(_N_LIKELY, adapter.shape[-1]), [], []
    for chunks in zip(_chunks(adapter), _chunks(base), strict=True):
        of_adapter, of_base = (chunk.float().softmax(-1) for chunk in chunks)
        own, other = (side.topk(n).indices for side in (of_adapter, of_base))
        both = torch.cat([own, other], dim=1)
        pair = torch.stack([side.gather(1, both) for side in (of_base, of_adapter)])
        kept = pair.amax(0) >= _LEAST_LIKELY
        kept[:, [0, n]] = True
        kept[:, n:] &= (other[:, :, None] != own[:, None, :]).all(2)
        order = pair[1].masked_fill(~kept, -1).argsort(stable=True, dim=1, descending=True)
        ids.append(both.masked_fill(~kept, -1).gather(1, order))
        p.append(pair.gather(2, order.expand_as(pair)))
    return torch.cat(ids), torch.cat(p, dim=1)


def kl_and_loss(
    log_p: Float[Tensor, "token vocab"],
    logits: Float[Tensor, "token vocab"],
    targets: Int[Tensor, "token"],
) -> tuple[Float[Tensor, "token"], Float[Tensor, "token"]]:
    """Return `kl_divergence` from a reference and `cross_entropy`, normalising the logits once.

    `log_p` are the reference's `log_probabilities`: many runs are compared with one reference.
    """
    kl, loss = [], []
    chunks = _chunks(logits)
    for p, chunk, target in zip(_chunks(log_p), chunks, targets.split(len(chunks[0])), strict=True):
        log_q = chunk.float().log_softmax(-1)
        loss.append(-log_q.gather(-1, target[:, None])[:, 0])
        kl.append(_kl(p, log_q))
    return torch.cat(kl), torch.cat(loss)


def largest_falls(
    log_p: Float[Tensor, "token vocab"], logits: Float[Tensor, "token vocab"], n: int
) -> tuple[Float[Tensor, "token n"], Int[Tensor, "token n"]]:
    """Return the `n` largest terms of each `kl_divergence` with p > q, and the tokens they are of.

    `log_p` are the reference's `log_probabilities`. A term is 0 where fewer tokens fall.
    """
    log_q = log_probabilities(logits)
    terms = torch.where(log_q < log_p, _kl_terms(log_p, log_q), 0.0)
    return terms.topk(min(n, terms.shape[1]), dim=1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _kl_terms(log_p, log_q).sum(-1)


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p·(e^d − 1 − d) of each token of the vocabulary, with d = log q − log p."""
    d = log_q - log_p
    terms = torch.expm1(d).sub_(d).mul_(log_p.exp())
    if (far := ~(d <= _LARGEST_RATIO)).any():  # e^d may overflow; there p is 0, or as good as 0
        terms[far] = log_q[far].exp()
    return terms


def _chunks(logits: Tensor) -> tuple[Tensor, ...]:
    """Return the logits cut into parts that stay in the processor's cache while they are read."""
    return logits.split(max(1, _CHUNK[logits.is_cuda] // max(logits.shape[-1], 1)))


def select_measured(
    logits: Float[Tensor, "batch seq vocab"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "token vocab"]:
    """Return the logits at the positions that `mask` marks, in row-major order."""
    return logits[mask.to(logits.device)]


def sum_by(owner: npt.NDArray[np.int64], values: npt.ArrayLike, n: int) -> Sums:
    """Return the sum of the values of each owner, `(n,)`. Owners are numbered from 0."""
    return np.bincount(owner, weights=np.asarray(values), minlength=n).astype(np.float64)


def ratio_of_sums(numerator: Sums, denominator: Sums) -> float | None:
    """Return the sum of one over the sum of the other; None where the second is 0."""
    total = float(denominator.sum())
    return float(numerator.sum()) / total if total else None


def bootstrap_interval(numerator: Sums, denominator: Sums, seed: int = 0) -> Interval:
    """Return the 95 % interval of `ratio_of_sums`, by resampling rollouts (Efron 1979).

    Both have an entry for each rollout; the edges are percentiles of 2,000 draws. None where there
    is only one rollout, or where the denominator of a draw is 0.
    """
    n = len(numerator)
    if n < 2:
        return None
    times = _draw_rollouts(n, seed)
    top, bottom = times @ numerator, times @ denominator
    if not bottom.all():
        return None
    low, high = np.percentile(top / bottom, _PERCENTILES)
    return float(low), float(high)


@lru_cache(maxsize=2)  # every feature of a report has the same draws
def _draw_rollouts(n: int, seed: int) -> Sums:
    """Return how often each draw of `n` of `n` rollouts has each of them, `(draw, n)`."""
    rng = np.random.default_rng([seed, n])
    return rng.multinomial(n, np.full(n, 1 / n), size=_N_DRAWS).astype(np.float64)


def spread(values: Sums) -> tuple[int, ...]:
    """Return the permille of a sum over rollouts in each of `N_SLICES` slices of them, in order.

    Each slice is one rollout if there are no more. Empty for a sum of 0.
    """
    n, total = min(N_SLICES, len(values)), float(values.sum())
    if not total:
        return ()
    sums = sum_by(np.arange(len(values)) * n // len(values), values, n)
    return tuple(np.rint(1000 * sums / total).astype(int).tolist())


def recovered(kl: Sums, zero: Sums, n_tokens: int, seed: int) -> Recovered:
    """Return KL a token of a run, and its share `1 − Σ kl / Σ zero` of what the run `zero` loses.

    Both have the sums of each rollout. A run that loses no more than rounding does has no share.
    """
    share, edges = ratio_of_sums(kl, zero), bootstrap_interval(kl, zero, seed)
    if float(zero.sum()) <= _ROUNDING_KL * n_tokens:
        share = edges = None
    return Recovered(
        kl=float(kl.sum()) / n_tokens,
        recovered=None if share is None else 1 - share,
        recovered_interval=None if edges is None else (1 - edges[1], 1 - edges[0]),
    )


def correlation(x: Sums, y: Sums) -> float:
    """Return Pearson's correlation; 0 if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / size if size else 0.0


def rank_correlation(x: Sums, y: Sums) -> float:
    """Return Spearman's correlation; 0 if one of them is constant."""
    return correlation(_ranks(x), _ranks(y))


def _ranks(values: Sums) -> Sums:
    """Return ranks from 0; equal values get their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[inverse]
