"""Measure how much of what an adapter does to its model's output an SAE explains.

1. On rollouts that the SAE never saw, the model runs with the adapter; its rows `x` are read, and
   compared with the store's.
2. It runs again with other rows written at every site: the SAE's reconstruction, those of simple
   baselines of the same sparsity, of other SAEs, zeros, and `x` itself as a control.
3. Each token's prediction is compared with the adapter's: `KL(adapter ‖ run)` in nats, float32.
   `recovered = 1 − ΣKL(adapter ‖ run) / ΣKL(adapter ‖ base)`: 0 is the base model, 1 the adapter.
   Sums are over tokens, intervals draw whole rollouts anew. `ce_recovered` is the same for the
   loss on the text's next token.
4. The SAE never saw special tokens and template headers, which other tokens attend to. So each
   run is repeated with their rows as they are (`special kept`).
5. The same by role, and by layer and projection: then only these columns are reconstructed, the
   others stay as they were, and 0 is the run with these columns at zero.

In: adapter, activation store, SAE. Out: a report (JSON) and a picture beside it; the table of the
report goes to stderr.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope import runtime
from lorascope.activations.batches import read_blocks, split_rows
from lorascope.activations.store import ActivationStore
from lorascope.causal.effects import Values, ce_of, counted, kl_of
from lorascope.causal.evaluation_report import summarize, table
from lorascope.causal.held_out import (
    Batch,
    HeldOut,
    RandomEffectOptions,
    described,
    open_held_out,
)
from lorascope.causal.study import Report, report_at
from lorascope.config import option
from lorascope.errors import ArtifactError, ConfigError
from lorascope.sites import SiteLayout

if TYPE_CHECKING:
    from lorascope.sae.model import SAE
    from lorascope.subject.intervene import Edit, RowEditor

log = logging.getLogger(__name__)

KIND = "evaluation"
SCHEMA = 1
_FITTED = 65_536  # training rows that baselines are fitted on

Rebuild = Callable[[Tensor], Tensor]  # rows (n, d_in of the SAE) to rows


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RandomEffectOptions):
    """Options of `evaluate`."""

    sae: Path = option(
        Path("trained_sae_adapters_g-u-d-q-k-v-o.pt"), help="SAE to evaluate", identity=False
    )
    against: tuple[Path, ...] = option(
        (), help="other SAEs of the same columns to compare with, such as one of another seed",
        identity=False,
    )  # fmt: skip
    output: Path | None = option(
        None, help="report to make; default: evaluation_{SAE's name}.json", identity=False
    )

    def check(self) -> None:
        """Refuse impossible numbers and an output that is no JSON file."""
        super().check()
        if self.output is not None and self.output.suffix != ".json":
            raise ConfigError(f"--output is {self.output}, expected a .json file")


def run(config: EvaluateConfig) -> Path:
    """Make a report, or find the finished one, and return its file."""
    from lorascope.causal.figures import draw_faithfulness
    from lorascope.sae.metrics import evaluate
    from lorascope.sae.model import load_sae

    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.sae, store)
    others = {f"against {path.name}": load_sae(path, store) for path in config.against}
    if len(others) < len(config.against):
        raise ConfigError("--against names two SAEs of one file name; rename one of them")
    out = config.output or Path(f"evaluation_{config.sae.stem}.json")

    def make() -> Report:
        for name, other in others.items():
            other.layout.require_same(sae.layout, name, config.sae.name)
        texts = open_held_out(config, sae)
        narrow = sae.narrow(store)
        rows = _rows_of(narrow, texts.rollouts)
        reconstruction = evaluate(sae, read_blocks(narrow, rows))
        arms = _arms(sae, others, narrow, reconstruction["l0"], config.seed)
        faithfulness = measure(texts, sae, arms, config.seed)
        report = {"reconstruction": reconstruction, "faithfulness": faithfulness}
        return Report(report, sae.layout, described(texts, config.sae))

    return report_at(
        out,
        KIND,
        SCHEMA,
        settings=config.settings(),
        parents={
            "activations": store.digest,
            "sae": sae.digest,
            **{name: other.digest for name, other in others.items()},
        },
        overwrite=config.overwrite,
        make=make,
        table=table,
        draw=lambda data: draw_faithfulness(data, out.with_suffix(".png")),
    )


def _rows_of(store: ActivationStore, rollouts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the eligible rows of some rollouts."""
    rows = np.flatnonzero(store.eligible)
    rows = rows[np.isin(store.rollout_of(rows), rollouts)]
    if not len(rows):
        raise ArtifactError(f"{store.path}: the rollouts to run hold no token that counts")
    return rows


def _arms(
    sae: "SAE", others: Mapping[str, "SAE"], store: ActivationStore, l0: float, seed: int
) -> dict[str, Rebuild]:
    """Return what is written instead of the rows, by name; `sae` is the first."""
    from lorascope.causal.baselines import baselines

    settings = sae.manifest["settings"]
    training = np.flatnonzero(store.eligible)
    if {"holdout", "data_seed"} <= settings.keys():
        training, _ = split_rows(
            store, settings["holdout"], settings["data_seed"], settings.get("roles", ())
        )
    training = training[:: -(-len(training) // _FITTED)]
    fitted = torch.cat(list(read_blocks(store, training)))
    named = {"sae": sae, **others}
    return {
        **{name: lambda x, one=one: one.decode(one.encode(x)) for name, one in named.items()},
        **baselines(sae, fitted, l0, seed),
    }


@torch.inference_mode()
def measure(
    texts: HeldOut, sae: "SAE", arms: Mapping[str, Rebuild], seed: int = 0
) -> dict[str, Any]:
    """Return the faithfulness part of the report, as JSON values.

    `arms` make rows of the SAE's columns, in float32 on the CPU; `arms["sae"]` must be there.
    """
    from lorascope.subject.intervene import RowEditor

    layout, columns = texts.subject.layout.select(sae.layout.adapter_types)
    whole = layout.d_in == texts.subject.layout.d_in
    groups = _groups(layout)
    found: dict[Any, list[Values]] = {}
    measured: list[npt.NDArray[np.int64]] = []
    drift = 0.0
    bar = runtime.progress(texts.n_tokens, "evaluate", "tokens")
    with RowEditor(texts.subject, seed=seed) as editor, bar:
        for batch in texts.batches():
            seen, probe = _Probe.open(editor, batch)
            drift = max(drift, texts.require_rows(batch, seen))
            mine = seen[..., columns]
            made = {name: _rebuilt(arm, mine) for name, arm in arms.items()}
            kept = torch.from_numpy(texts.store.eligible)[batch.rows] & batch.own
            kept = kept.to(mine.device)[..., None]
            plain: dict[Any, Tensor] = {
                "null": mine,
                "rounding": mine * (1 + torch.finfo(texts.subject.dtype).eps),
                "zero": torch.zeros_like(mine),
                **made,
                **{(name, "kept"): torch.where(kept, rows, mine) for name, rows in made.items()},
            }
            got: dict[Any, Any] = {
                name: probe(_held(seen, columns, rows)) for name, rows in plain.items()
            }
            got["base"] = probe.base()
            got["adapter"] = probe.itself()
            for (kind, name), part in groups.items():
                for how, rows in (("sae", made["sae"]), ("zero", plain["zero"])):
                    edited = torch.where(part.to(mine.device), rows, mine)
                    got[kind, name, how] = probe(_held(seen, columns, edited))
            for name, (kl, ce) in got.items():
                found.setdefault((name, "kl"), []).append(kl)
                found.setdefault((name, "ce"), []).append(ce)
            measured.append(batch.measured)
            bar.update(int(batch.own.sum()))
    rows = np.concatenate(measured)
    values = {name: np.concatenate(parts) for name, parts in found.items()}
    return {**summarize(texts, rows, values, whole=whole, seed=seed), "rows_drift": drift}


class _Probe:
    """Runs one batch under edits and compares each run with the adapter's."""

    def __init__(self, editor: "RowEditor", batch: Batch, reference: Tensor) -> None:
        self.editor, self.batch, self.reference = editor, batch, reference
        self.targets = batch.targets[batch.mask].to(reference.device)

    @classmethod
    def open(cls, editor: "RowEditor", batch: Batch) -> "tuple[Tensor, _Probe]":
        """Run the batch as it is; return its rows, and the probe of what comes after."""
        out = editor.run(batch.token_ids)
        return out.rows, cls(editor, batch, counted(out.logits, batch.mask))

    def __call__(self, edit: "Edit") -> tuple[Values, Values]:
        """Return KL to the adapter and CE of each measured token, in nats."""
        return self._compare(
            counted(self.editor.run(self.batch.token_ids, edit).logits, self.batch.mask)
        )

    def base(self) -> tuple[Values, Values]:
        """Return the same of the base model."""
        return self._compare(counted(self.editor.base(self.batch.token_ids), self.batch.mask))

    def itself(self) -> tuple[Values, Values]:
        """Return the same of the adapter."""
        return self._compare(self.reference)

    def _compare(self, logits: Tensor) -> tuple[Values, Values]:
        kl, ce = kl_of(self.reference, logits), ce_of(logits, self.targets)
        return kl.cpu().numpy(), ce.cpu().numpy()


def _rebuilt(arm: Rebuild, rows: Tensor) -> Tensor:
    flat = arm(rows.reshape(-1, rows.shape[-1]).cpu())
    return flat.view(rows.shape).to(rows.device)


def _held(seen: Tensor, columns: npt.NDArray[np.int64], rows: Tensor) -> "Edit":
    """Return the edit that writes `rows` in some columns, and in the others what was seen."""
    whole = seen.clone()
    whole[..., columns] = rows
    return lambda here, _values: whole[..., here]


def _groups(layout: SiteLayout) -> dict[tuple[str, str], Tensor]:
    """Return the columns, `(d_in,)` bool, of each layer and of each projection."""
    layer = np.repeat([site.layer for site in layout.sites], [s.rank for s in layout.sites])
    kind = np.repeat([site.projection for site in layout.sites], [s.rank for s in layout.sites])
    return {
        **{("layers", str(n)): torch.from_numpy(layer == n) for n in np.unique(layer)},
        **{("projections", n): torch.from_numpy(kind == n) for n in layout.adapter_types},
    }
