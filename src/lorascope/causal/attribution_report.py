"""Sum up attributions: what adds up to what, what agrees with real removals, what is strongest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lorascope.causal.attribute import AttributeConfig

_SHOWN = 12  # tokens in the table
_NAMED = 3  # features behind each of them
_FEWEST = 5  # features that a rank correlation needs
_UNITS = {"kl": "nats", "logprob": "nats", "logit-difference": "logits"}

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class TokenAttribution:
    """What is behind one prediction. `adapter` and `base` are its number with rows and with none.

    `tokens` are the shares of whole rows, of the tokens from `first` on. Firing i is of latent
    `latents[i]` at token `sources[i]` of the text; `contributions` are its shares of
    `adapter - base`, `removals` what taking it out would take, to first order: both have an entry
    for each firing of the whole text, 0 behind the token. `taken` is what taking each latent out
    really takes, by number, where that was run.
    """

    rollout: int
    token: int
    text: str
    adapter: float
    base: float
    rests: Mapping[str, float]
    tokens: Floats
    first: int
    latents: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    contributions: Floats
    removals: Floats
    taken: Floats | None = None

    @property
    def effect(self) -> float:
        """What the whole adapter does to the number."""
        return self.adapter - self.base

    def by_latent(self, values: Floats) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the latents that fire in the text, and the sum of each one's values."""
        latents, at = np.unique(self.latents, return_inverse=True)
        return latents, np.bincount(at, values, minlength=len(latents)).astype(np.float64)

    def sources_of(self, top: int) -> list[list[float]]:
        """Return `[place, share]` of the tokens whose rows have the largest shares."""
        order = np.argsort(-np.abs(self.tokens), kind="stable")[:top]
        return [[int(i) + self.first, float(self.tokens[i])] for i in order if self.tokens[i]]

    def strongest(self, top: int) -> list[list[float]]:
        """Return `[latent, contribution, source, removal]` of the largest contributions."""
        latents, sums = self.by_latent(self.contributions)
        _, removals = self.by_latent(self.removals)
        order = np.argsort(-np.abs(sums), kind="stable")[:top]
        found = []
        for i in order[sums[order] != 0].tolist():
            mine = np.flatnonzero(self.latents == latents[i])
            source = self.sources[mine[np.abs(self.contributions[mine]).argmax()]]
            found.append([int(latents[i]), float(sums[i]), int(source), float(removals[i])])
        return found


def summarize(
    rollouts: Mapping[int, npt.NDArray[np.float64]],
    behind: Sequence[TokenAttribution],
    usual: Mapping[int, npt.NDArray[np.bool_]],
    d_sae: int,
    config: "AttributeConfig",
) -> dict[str, Any]:
    """Return the report as JSON values; `rollouts` are KL and rise of each token, by text id."""
    masks = list(usual.values())
    kl = np.concatenate([x[0][m] for x, m in zip(rollouts.values(), masks, strict=True)])
    by_text: dict[int, list[TokenAttribution]] = {rollout: [] for rollout in rollouts}
    for one in sorted(behind, key=lambda one: one.token):
        by_text[one.rollout].append(one)
    return {
        "target": config.target,
        "unit": _UNITS[config.target],
        "steps": config.steps,
        "n_rollouts": len(rollouts),
        "n_tokens": len(kl),
        "n_targets": len(behind),
        "kl": float(kl.mean()) if len(kl) else None,
        "completeness": completeness_of(behind),
        "agreement": agreement_of(behind),
        "features": feature_entries(behind, d_sae),
        "rollouts": [
            {
                "rollout": rollout,
                "kl": _numbers(numbers[0]),
                "rise": _numbers(numbers[1]),
                "targets": [_target(one, config.top) for one in by_text[rollout]],
            }
            for rollout, numbers in rollouts.items()
        ],
    }


def completeness_of(behind: Sequence[TokenAttribution]) -> dict[str, float | None]:
    """Return how much of the adapter's effect the shares add up to, and how far each token's miss.

    `gap` is `Σ|sum of shares − effect| / Σ|effect|` over targets. The others are sums over targets
    of each kind of share, as a share of the summed effect.
    """
    effects = np.array([one.effect for one in behind])
    features = np.array([float(one.contributions.sum(dtype=np.float64)) for one in behind])
    rests = {
        name: np.array([one.rests[name] for one in behind])
        for name in (behind[0].rests if behind else ())
    }
    whole = features + sum(rests.values(), np.zeros(len(behind)))
    size = float(np.abs(effects).sum())

    def share(values: npt.NDArray[np.float64]) -> float | None:
        total = float(effects.sum())
        return float(values.sum()) / total if total else None

    return {
        "gap": float(np.abs(whole - effects).sum()) / size if size else None,
        "features": share(features),
        **{name: share(values) for name, values in rests.items()},
    }


def agreement_of(behind: Sequence[TokenAttribution]) -> dict[str, Any] | None:
    """Return how contributions and first-order removals compare with real removals.

    `rank` is Spearman's correlation over the features that fire before a target, averaged over
    targets with at least five; `pearson` is that of all pairs of feature and target; `top` the
    share of the five features of largest real effect that are among the five largest here.
    """
    checked = [one for one in behind if one.taken is not None]
    found: dict[str, Any] = {}
    for name in ("contribution", "removal"):
        ranks, tops, pairs = [], [], []
        for one in checked:
            _, mine = one.by_latent(one.contributions if name == "contribution" else one.removals)
            real = np.asarray(one.taken, np.float64)
            latents = np.unique(one.latents)
            before = np.isin(latents, one.latents[one.sources < one.token])
            if before.sum() < _FEWEST or not real[before].any():
                continue
            mine, real = mine[before], real[before]
            ranks.append(_correlation(_ranks(mine), _ranks(real)))
            best = [set(np.argsort(-np.abs(v), kind="stable")[:_FEWEST]) for v in (mine, real)]
            tops.append(len(best[0] & best[1]) / _FEWEST)
            pairs.append((mine, real))
        if not pairs:
            return None
        mine, real = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
        found["n_targets"], found["n_pairs"] = len(pairs), len(mine)
        found[name] = {
            "rank": float(np.mean(ranks)),
            "pearson": _correlation(mine, real),
            "top": float(np.mean(tops)),
        }
    return found


def feature_entries(behind: Sequence[TokenAttribution], d_sae: int) -> list[dict[str, Any]]:
    """Return an entry of each latent that contributed: its sums over all targets, by number."""
    sums, sizes, counts = np.zeros(d_sae), np.zeros(d_sae), np.zeros(d_sae, np.int64)
    for one in behind:
        latents, values = one.by_latent(one.contributions)
        sums[latents] += values
        sizes[latents] += np.abs(values)
        counts[latents] += values != 0
    return [
        {
            "feature": int(latent),
            "n_targets": int(counts[latent]),
            "sum": float(sums[latent]),
            "size": float(sizes[latent]),
        }
        for latent in np.flatnonzero(counts)
    ]


def table(report: Mapping[str, Any]) -> str:
    """Return the report's main numbers as a table for the terminal."""
    whole, agreed = report["completeness"], report["agreement"]
    parts = [f"{name} {_shown(whole[name])}" for name in whole if name != "gap"]
    lines = [
        f"{report['n_rollouts']} rollouts, {report['n_tokens']:,} predicted tokens, KL(adapter ‖ "
        f"base) {_shown(report['kl'])} nats a token; {report['n_targets']} explained",
        f"shares of the adapter's effect on {report['target']}: {', '.join(parts)}; they miss it "
        f"by {_shown(whole['gap'])} of its size with {report['steps']} steps",
    ]
    if agreed:
        lines.append(
            f"against {agreed['n_pairs']:,} real removals: "
            + "; ".join(
                f"{name} rank {agreed[name]['rank']:.2f}, Pearson {agreed[name]['pearson']:.2f}, "
                f"top five {agreed[name]['top']:.2f}"
                for name in ("contribution", "removal")
            )
        )
    lines.append(
        f"{'rollout':>9}{'place':>7}  {'token':<16}{report['unit']:>9}  features behind it"
    )
    targets = [(one, text["rollout"]) for text in report["rollouts"] for one in text["targets"]]
    targets.sort(key=lambda pair: -abs(pair[0]["adapter"] - pair[0]["base"]))
    for one, rollout in targets[:_SHOWN]:
        named = ", ".join(f"{latent} {value:+.3g}" for latent, value, *_ in one["behind"][:_NAMED])
        lines.append(
            f"{rollout:>9}{one['token']:>7}  {ascii(one['text'])[:15]:<16}"
            f"{one['adapter'] - one['base']:>9.3g}  {named}"
        )
    return "\n".join(line.rstrip() for line in lines)


def _target(one: TokenAttribution, top: int) -> dict[str, Any]:
    return {
        "token": one.token,
        "text": one.text,
        "adapter": one.adapter,
        "base": one.base,
        "features": float(one.contributions.sum(dtype=np.float64)),
        **one.rests,
        "sources": one.sources_of(top),
        "behind": one.strongest(top),
    }


def _numbers(values: npt.NDArray[np.float64]) -> list[float | None]:
    """Return float32 numbers in their shortest form; None for tokens that are not predicted."""
    return [None if np.isnan(x) else float(str(np.float32(x))) for x in values]


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return ranks from 0, the mean rank for equal values."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts + 1) / 2)[at]


def _correlation(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Return Pearson's correlation, 0 where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / size if size else 0.0


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"
