"""Sum up what was measured at each token: shares of the adapter's effect, with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.causal.effects import Tokens, Values, interval_of, ratio_of
from lorascope.causal.held_out import SPECIAL, HeldOut
from lorascope.errors import ArtifactError
from lorascope.texts.roles import ROLES

_BEYOND = 10.0  # times the floor that an effect must have for a share of it to mean anything


def summarize(
    texts: HeldOut,
    rows: npt.NDArray[np.int64],
    values: Mapping[Any, Values],
    *,
    whole: bool,
    seed: int,
) -> dict[str, Any]:
    """Return sums, ratios and intervals as JSON values.

    `values[run, "kl"]` and `values[run, "ce"]` are of the measured `rows`, in nats. A run is a
    name, `(name, "kept")` with special tokens as they are, or `(kind, group, how)` of a group of
    columns. `whole` says that the SAE has all columns.
    """
    _, text = np.unique(texts.store.rollout_of(rows), return_inverse=True)
    tokens = Tokens(text, int(text.max(initial=-1)) + 1)
    role = texts.role_of(rows)
    usual = role != SPECIAL
    if not usual.any():
        raise ArtifactError("no token to predict counts: all are special; give other texts")
    zero = "base" if whole else "zero"

    def share(name: Any, reference: Any, where: npt.NDArray[np.bool_]) -> dict[str, Any]:
        kl = tokens.sums(values[name, "kl"], where)
        below = tokens.sums(values[reference, "kl"], where)
        ratio, edges = ratio_of(kl, below), interval_of(kl, below, seed)
        return {
            "kl": float(kl.sum()) / int(where.sum()),
            "recovered": None if ratio is None else 1 - ratio,
            "recovered_interval": None if edges is None else [1 - edges[1], 1 - edges[0]],
        }

    def loss(name: Any) -> dict[str, Any]:
        ce, best, worst = (tokens.sums(values[key, "ce"], usual) for key in (name, "adapter", zero))
        return {
            "ce": float(ce.sum()) / int(usual.sum()),
            "ce_recovered": ratio_of(worst - ce, worst - best),
            "ce_recovered_interval": interval_of(worst - ce, worst - best, seed),
        }

    floor = {name: share(name, zero, usual)["kl"] for name in ("null", "rounding")}
    names = [name for name, unit in values if unit == "kl"]
    runs: dict[str, Any] = {
        name: {**share(name, zero, usual), **loss(name)}
        for name in names
        if isinstance(name, str) and name not in floor
    }
    for name, run in runs.items():
        if ((name, "kept"), "kl") in values:
            run["special_kept"] = share((name, "kept"), zero, usual)
    groups: dict[str, dict[str, Any]] = {"layers": {}, "projections": {}}
    for kind, name, how in (name for name in names if len(name) == 3 and name[0] in groups):
        if how == "zero":
            continue
        got = share((kind, name, how), (kind, name, "zero"), usual)
        removed = share((kind, name, "zero"), zero, usual)["kl"]
        if removed <= _BEYOND * floor["rounding"]:  # a share of nothing says nothing
            got = {**got, "recovered": None, "recovered_interval": None}
        groups[kind][name] = {**got, "kl_zero": removed}
    return {
        "zero_is": "the base model" if whole else "the SAE's columns at zero",
        "n_rollouts": tokens.n_texts,
        "n_tokens": int(usual.sum()),
        "floor": floor,
        "runs": runs,
        "roles": {
            ROLES[number]: {
                "n_tokens": int((role == number).sum()),
                **share("sae", zero, role == number),
                "special_kept": share(("sae", "kept"), zero, role == number),
                "kl_zero": float(values[zero, "kl"][role == number].mean(dtype=np.float64)),
            }
            for number in np.unique(role)
        },
        **groups,
    }


def table(report: Mapping[str, Any]) -> str:
    """Return the report's main numbers as a table for the terminal."""
    made, found = report["reconstruction"], report["faithfulness"]
    floor = found["floor"]
    lines = [
        f"held out: {found['n_rollouts']} rollouts, {found['n_tokens']:,} predicted tokens; FVU "
        f"{_shown(made['fvu'])}, cosine {_shown(made['cosine'])}, L0 {made['l0']:.2f}, "
        f"{made['alive']:,} latents alive",
        f"recovered: 0 is {found['zero_is']}, 1 the adapter. KL(adapter ‖ run) in nats a token; "
        f"its floor: {floor['null']:.1e}, rows written as they are; {floor['rounding']:.1e}, rows "
        "moved by one rounding step",
        f"{'rows written':<24}{'KL':>9}{'recovered':>11}  {'95 % interval':<17}"
        f"{'special kept':>13}{'CE':>9}{'recovered':>11}",
    ]
    for name, run in found["runs"].items():
        kept = run.get("special_kept", {}).get("recovered")
        lines.append(
            f"{name:<24}{_shown(run['kl']):>9}{_shown(run['recovered']):>11}  "
            f"{_edges(run['recovered_interval']):<17}{'' if kept is None else _shown(kept):>13}"
            f"{run['ce']:>9.4f}{_shown(run['ce_recovered']):>11}"
        )
    titles = {
        "roles": "sae, by predicted role",
        "layers": "sae, in one layer",
        "projections": "sae, in one projection",
    }
    for kind, title in titles.items():
        lines.append(f"{title:<24}{'KL':>9}{'recovered':>11}  {'95 % interval':<17}{'KL at 0':>13}")
        lines += [
            f"  {name:<22}{_shown(part['kl']):>9}{_shown(part['recovered']):>11}  "
            f"{_edges(part['recovered_interval']):<17}{part['kl_zero']:>13.4f}"
            for name, part in found[kind].items()
        ]
    return "\n".join(line.rstrip() for line in lines)


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"


def _edges(edges: Sequence[float] | None) -> str:
    return "—" if edges is None else f"{edges[0]:.3f} to {edges[1]:.3f}"
