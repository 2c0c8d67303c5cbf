"""Sum up what taking parts and features out did: means over tokens, with intervals over texts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorascope.causal.effects import interval_of, ratio_of
from lorascope.causal.parts import Part

if TYPE_CHECKING:
    from lorascope.causal.removals import Sums

_SHOWN = 10  # features in the table
_KINDS = {"site": "sites", "projection": "projections", "layer": "layers", "block": "blocks"}


def part_entries(
    parts: Sequence[Part],
    sums: "Sums",
    counts: npt.NDArray[np.float64],
    n_special: int,
    seed: int,
) -> dict[str, Any]:
    """Return `without_adapter` and, by kind, an entry of each part.

    `sums` are `(n_changes, n_texts)`: rounding, all zero, then for every part it taken out, it
    alone, and its control; `counts` are the tokens of each text.
    """
    n, total = len(parts), float(counts.sum())
    entries: dict[str, Any] = {"without_adapter": _entry(sums, 1, counts, n_special, seed)}
    whole = sums.kl[1]
    for i, part in enumerate(parts):
        alone = 2 + n + i
        entries.setdefault(_KINDS[part.kind], {})[part.name] = {
            **_entry(sums, 2 + i, counts, n_special, seed),
            "kl_random": float(sums.kl[2 + 2 * n + i].sum()) / total,
            "alone": {
                "kl": float(sums.kl[alone].sum()) / total,
                "recovered": _left(ratio_of(sums.kl[alone], whole)),
                "recovered_interval": _flipped(interval_of(sums.kl[alone], whole, seed)),
            },
        }
    return entries


def _entry(
    sums: "Sums", change: int, counts: npt.NDArray[np.float64], n_special: int, seed: int
) -> dict[str, Any]:
    kl, total = sums.kl[change], float(counts.sum())
    return {
        "kl": float(kl.sum()) / total,
        "kl_interval": interval_of(kl, counts, seed),
        "ce_rise": float(sums.ce[change].sum()) / total,
        "kl_special": float(sums.special[change].sum()) / n_special if n_special else None,
    }


def _left(share: float | None) -> float | None:
    return None if share is None else 1 - share


def _flipped(edges: list[float] | None) -> list[float] | None:
    return None if edges is None else [1 - edges[1], 1 - edges[0]]


def greedy_entries(
    steps: Sequence[tuple[str, float, float]], n_tokens: int
) -> list[dict[str, Any]]:
    """Return the steps in their order: what was taken out then, and the means over tokens."""
    return [{"part": name, "kl": kl / n_tokens, "ce_rise": ce / n_tokens} for name, kl, ce in steps]


def feature_entries(
    numbers: Sequence[int],
    n_fired: npt.NDArray[np.int64],
    found: npt.NDArray[np.float64],
    counts: npt.NDArray[np.float64],
    n_special: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Return an entry of each feature, by number.

    `found` is `(itself or its control, kl ce special here, latent, text)`. One that never fires
    has no effect at all: its sums are zero because nothing was run.
    """
    total = float(counts.sum())
    entries = []
    for latent in sorted(numbers):
        kl, ce, special, here = found[0, :, latent]
        fired = int(n_fired[latent])
        entries.append(
            {
                "feature": latent,
                "n_fired": fired,
                "kl": float(kl.sum()) / total,
                "kl_interval": interval_of(kl, counts, seed),
                "kl_each": float(kl.sum()) / fired if fired else None,
                "share_here": ratio_of(here, kl),
                "ce_rise": float(ce.sum()) / total,
                "kl_special": float(special.sum()) / n_special if n_special else None,
                "kl_random": float(found[1, 0, latent].sum()) / total,
            }
        )
    return entries


def table(report: Mapping[str, Any]) -> str:
    """Return the report's main numbers as a table for the terminal."""
    whole, floor = report["without_adapter"], report["floor"]
    head = f"{'KL':>11}  {'95 % interval':<21}{'random':>11}{'CE rise':>10}{'alone recovers':>16}"
    lines = [
        f"{report['n_rollouts']} rollouts, {report['n_tokens']:,} predicted tokens; "
        f"KL(adapter ‖ without) in nats a token; without all of it {whole['kl']:.4g}; floor: "
        f"{floor['null']:.1e}, nothing taken out; {floor['rounding']:.1e}, rows moved by one "
        "rounding step",
    ]
    for kind in ("blocks", "projections", "layers"):
        if report.get(kind):
            lines.append(f"{'without, ' + kind:<20}{head}")
        lines += [
            f"  {name:<18}{_numbers(part)}{part['ce_rise']:>10.4f}"
            f"{_share(part['alone']['recovered']):>16}"
            for name, part in report.get(kind, {}).items()
        ]
    if report.get("greedy"):
        steps = [f"{step['part']} {step['kl']:.3g}" for step in report["greedy"]]
        lines.append("taken out one after the other: " + ", ".join(steps))
    features = sorted(report.get("features", []), key=lambda one: -one["kl"])
    if features:
        head = f"{'KL':>11}  {'95 % interval':<21}{'random':>11}{'here':>10}{'tokens':>16}"
        lines.append(f"{'without, features':<20}{head}")
        lines += [
            f"  {one['feature']:<18}{_numbers(one)}{_share(one['share_here']):>10}"
            f"{one['n_fired']:>16,}"
            for one in features[:_SHOWN]
        ]
        lines.append(f"  (the strongest of {len(features):,})")
    return "\n".join(line.rstrip() for line in lines)


def _numbers(part: Mapping[str, Any]) -> str:
    edges = part["kl_interval"]
    shown = "—" if edges is None else f"{edges[0]:.3g} to {edges[1]:.3g}"
    return f"{part['kl']:>11.3g}  {shown:<21}{part['kl_random']:>11.3g}"


def _share(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
