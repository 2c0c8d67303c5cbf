"""Reports of effects that fit a feature index, made up: for tests of the page."""

from pathlib import Path
from typing import Any

import numpy as np

from lorascope.artifact import Manifest, sealed_json
from lorascope.features.index import FeatureIndex
from lorascope.inspection import _record_of

NEW_TOKEN = 900_001  # not in any index: its text is hostile
HOSTILE = "</script><img src=x onerror=alert(1)>"


def write(
    path: Path, kind: str, index: FeatureIndex, report: dict[str, Any], schema: int | None = None
) -> Path:
    """Write a report with its checksum, as of the index's SAE and store; default: new schema."""
    manifest = Manifest(
        kind=kind,
        schema=schema or _record_of(kind).schema,
        settings={},
        parents=index.manifest.parents,
        layout=None,
        content={},
    )
    path.write_text(sealed_json(manifest, report), encoding="utf-8")
    return path


def shift(
    token: str, side: str, role: str, share: float, p_base: float, p_adapter: float
) -> dict[str, Any]:
    """A token whose probability the adapter moves."""
    return {
        "token_id": 1,
        "token": token,
        "side": side,
        "role": role,
        "share": share,
        "n_main": 3,
        "p_base": p_base,
        "p_adapter": p_adapter,
        "example": {
            "row": 5,
            "rollout": 0,
            "position": 5,
            "before": f"before {HOSTILE}\n",
            "actual": token,
            "p_base": p_base,
            "p_adapter": p_adapter,
        },
    }


def evaluation() -> dict[str, Any]:
    """An SAE that recovers 0.9 of generated tokens, where a constant recovers 0.5.

    Three quarters of the effect are at special tokens.
    """

    def share(recovered: float) -> dict[str, Any]:
        interval = [recovered - 0.1, recovered]
        return {"kl": 1 - recovered, "recovered": recovered, "recovered_interval": interval}

    def run(recovered: float) -> dict[str, Any]:
        kl = share(recovered)
        rest = {"conditional": None, "conditional_interval": None, "ce": 1.0}
        return kl | rest | {"ce_recovered": None, "ce_recovered_interval": None}

    return {
        "reconstruction": {},
        "faithfulness": {
            "zero_is": "the base model",
            "n_rollouts": 5,
            "n_tokens": 400,
            "n_generated": 200,
            "floor": {"null": 0.0, "rounding": 3e-12},
            "closed_passes": 3,
            "closed_change": 0.02,
            "runs": {
                "sae": run(0.95) | {"generated": run(0.9), "l0": 3.0},
                "constant": run(0.7) | {"generated": run(0.5), "l0": 0},
                "base": run(0.0) | {"generated": run(0.0), "l0": None},
            },
            "roles": {
                "special": share(0.95) | {"n_tokens": 100, "kl_zero": 3.0},
                "think": share(0.9) | {"n_tokens": 200, "kl_zero": 0.5},
            },
            "layers": {},
            "projections": {},
            "subsets": [],
            "seeds": [],
            "rows_drift": 0.0,
        },
        "shifts": [
            shift("<think>", "rises", "special", 0.5, 0.001, 0.999),
            shift(HOSTILE, "falls", "special", 0.2, 0.75, 0.25),
            shift("\n", "rises", "think", 0.1, 0.1, 0.6),
        ],
        "answers": [
            {
                "rollout": 0,
                "prompt": f"ask {HOSTILE}\n",
                "same": f"{HOSTILE}",
                "base": "short",
                "adapter": f"long | {HOSTILE}\n",
            }
        ],
        "attention": {
            "n_rollouts": 2,
            "n_tokens": 30,
            "layers": [0, 1],
            "moved": [[0.1, 0.0], [0.02, 0.6]],
            "heads": [
                {
                    "layer": 1,
                    "head": 1,
                    "moved": 0.6,
                    "kl": 5.0,
                    "example": {
                        "rollout": 0,
                        "position": 4,
                        "before": f"see {HOSTILE}",
                        "token": HOSTILE,
                        "gains": [{"position": 1, "token": HOSTILE, "base": 0.0, "adapter": 0.8}],
                        "losses": [{"position": 0, "token": "\n", "base": 0.9, "adapter": 0.1}],
                    },
                }
            ],
        },
    }


def ablation(index: FeatureIndex) -> dict[str, Any]:
    """An entry for each feature but the last two; 1 never fires, 2 fires in one rollout only."""
    rng, slices = np.random.default_rng(1), np.random.default_rng(2)
    entries = []
    for latent in range(max(len(index) - 2, 0)):
        kl = 0.0 if latent == 1 else float(10 ** rng.uniform(-6, -2))
        p = None if latent == 1 else 0.001 if latent == 3 else 0.4
        verdict = {None: "too few firings", 0.001: "specific"}.get(p, "not distinguishable")
        entries.append(
            {
                "feature": latent,
                "n_fired": 0 if latent == 1 else 5 + latent,
                "kl": kl,
                "kl_interval": None if latent == 2 else [kl / 3, kl * 2],
                "kl_each": None if latent == 1 else kl * 20,
                "share_here": None if latent == 1 else 0.25,
                "ce_rise": None if latent == 4 else -kl / 7,  # not removed
                "kl_special": kl,
                "kl_estimate": 0.9 * kl,
                "kl_control": kl / 2,
                "verdict": verdict,
                "pull": None if p is None else 0.5,
                "pull_excess": None if p is None else [0.2 if p < 0.05 else -0.3, 0.9 + latent],
                "p": p,
                "spread": [] if latent == 1 else slices.multinomial(1000, [0.2] * 5).tolist(),
            }
        )
    whole = {"kl": 0.3, "kl_interval": [0.2, 0.4], "ce_rise": 0.1, "kl_special": None}
    return {
        "n_rollouts": 5,
        "n_tokens": 400,
        "n_special": 0,
        "floor": {"null": 0.0, "rounding": 3e-12},
        "without_adapter": whole,
        "parts_on": {"n_rollouts": 5, "n_tokens": 400, "kl": 0.3},
        "sites": {},
        "projections": {},
        "layers": {},
        "features": entries,
    }


def direct(index: FeatureIndex) -> dict[str, Any]:
    """Two tokens on each side, one not in the index; feature 1 writes nothing."""
    known = int(index.token_id[index.token_id >= 0][0])
    vocabulary = {known: index.token_bytes(known), NEW_TOKEN: HOSTILE.encode()}

    def side(sign: int, latent: int) -> list[dict[str, Any]]:
        return [
            {"token_id": i, "token": vocabulary[i].decode(errors="replace"), "z": sign * z}
            for i, z in ((NEW_TOKEN, 4.0 + latent), (known, 1.5))
        ]

    return {
        "unit": "standard deviations over the vocabulary",
        "n_tokens": 2,
        "writers": ["0.down_proj"],
        "indirect": [],
        "vocabulary": {str(i): raw.hex() for i, raw in vocabulary.items()},
        "features": [
            {
                "feature": latent,
                "share": 0.0 if latent == 1 else 0.625,
                "promoted": [] if latent == 1 else side(1, latent),
                "suppressed": [] if latent == 1 else side(-1, latent),
            }
            for latent in range(len(index))
        ],
    }


def attribution(index: FeatureIndex) -> dict[str, Any]:
    """KL and rise of every token of the complete rollouts; the two strongest are explained.

    Of each rollout, the token at 2 is likely in both models, a hostile one in the adapter only, and
    two others hardly.
    """
    rng = np.random.default_rng(2)
    others = [i for i in index.token_id.tolist() if i >= 0][:2]
    named = {NEW_TOKEN: HOSTILE.encode()}
    rollouts = []
    for number, rollout in enumerate(index.text_rollout.tolist()):
        n = int(np.diff(index.text_offset)[number])
        kl = [None, *(10 ** rng.uniform(-4, 1, n - 1)).tolist()]
        kl[2] = 0.5
        order = sorted(range(1, n), key=lambda t: -kl[t])[:2]
        itself = int(index.text_token_id[index.text_offset[number] + 2])
        hardly = [i for i in others if i != itself]
        named |= {i: index.token_bytes(i) for i in [itself, *hardly]}
        rollouts.append(
            {
                "rollout": rollout,
                "kl": kl,
                "rise": [None, *rng.normal(size=n - 1).tolist()],
                "targets": [
                    {
                        "token": t,
                        "text": "x",
                        "adapter": kl[t],
                        "base": 0.0,
                        "features": 0.6 * kl[t],
                        "bias": 0.1 * kl[t],
                        "unexplained": -0.05 * kl[t],
                        "special": 0.35 * kl[t],
                        "other_columns": 0.0,
                        "sources": [[0, kl[t]]],
                        "behind": [
                            [0, 0.8 * kl[t], t - 1, 0.1],
                            [min(3, len(index) - 1), -0.2 * kl[t], 0, -0.3],
                        ],
                    }
                    for t in sorted(order)
                ],
                "likely": {
                    "count": [2 + len(hardly) if t == 2 else 0 for t in range(n)],
                    "token_id": [NEW_TOKEN, itself, *hardly],
                    "base": [0.001, 0.9, *([0.02] * len(hardly))],
                    "adapter": [0.75, 0.2499, *([0.01] * len(hardly))],
                },
            }
        )
    return {
        "target": "kl",
        "unit": "nats",
        "steps": 8,
        "n_rollouts": len(rollouts),
        "n_tokens": 10,
        "n_targets": 4,
        "kl": 0.1,
        "completeness": {
            "gap": 0.1,
            "features": 0.6,
            "bias": 0.1,
            "unexplained": -0.05,
            "special": 0.35,
            "other_columns": 0.0,
        },
        "agreement": None,
        "features": [],
        "rollouts": rollouts,
        "vocabulary": {str(i): raw.hex() for i, raw in named.items()},
    }


MAKERS = {"ablation": ablation, "direct": direct, "attribution": attribution}


def write_all(folder: Path, index: FeatureIndex) -> tuple[Path, ...]:
    """Write one report of each kind."""
    return tuple(
        write(folder / f"{kind}.json", kind, index, make(index)) for kind, make in MAKERS.items()
    )
