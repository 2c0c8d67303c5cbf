"""Take features out of an adapter, or make them weaker or stronger, and say what that changes.

1. `folding` finds the weights that come nearest to the edit, and how much of it they miss.
2. Where that is little (`--tolerance`), the output is a PEFT adapter like any other, its `lora_B`
   changed. Else it is a runtime patch (`patch`), and the report says what folding would miss.
3. Before and after, on held-out texts: KL(adapter ‖ patched), KL(adapter ‖ folded), and
   KL(patched ‖ folded), which is 0 where the fold is exact; beside them KL(adapter ‖ base).

In: adapter, activation store, SAE, features. Out: a folder with the adapter or the patch, and
`report.json`.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.artifact import (
    MANIFEST,
    Build,
    building,
    is_made,
    make_manifest,
    write_text,
)
from lorascope.causal.effects import counted, interval_of, kl_of
from lorascope.causal.held_out import (
    SPECIAL,
    HeldOut,
    RandomEffectOptions,
    described,
    open_held_out,
    require_features,
)
from lorascope.config import option
from lorascope.errors import ConfigError

if TYPE_CHECKING:
    from lorascope.causal.folding import Fold
    from lorascope.causal.patch import Patch
    from lorascope.sae.model import SAE
    from lorascope.subject.load import Subject

log = logging.getLogger(__name__)

KIND = "edit"
SCHEMA = 1
REPORT = "report.json"
_COPIED = (".json", ".jinja", ".txt", ".model")  # config and tokenizer
_ARMS = ("base", "patched", "folded")


@dataclass(frozen=True, kw_only=True)
class EditConfig(RandomEffectOptions):
    """Options of `edit`."""

    sae: Path = option(
        Path("trained_sae_adapters_g-u-d-q-k-v-o.pt"), help="SAE of the features", identity=False
    )
    features: tuple[int, ...] = option(help="numbers of the features to edit, together")
    factor: float = option(
        0.0, help="by what to multiply them: 0 takes them out, 1 changes nothing, 2 doubles them"
    )
    tokens: Literal["text", "all"] = option(
        "text", help="tokens to edit: those of text, or special ones and template headers too"
    )
    how: Literal["auto", "fold", "patch"] = option(
        "auto", help="an adapter with changed weights, a runtime patch, or what --tolerance says"
    )
    tolerance: float = option(
        0.05, help="share of the edit that weights may miss for auto to fold it into them"
    )
    output: Path = option(Path("edited-adapter"), help="folder to make", identity=False)

    def check(self) -> None:
        """Refuse impossible choices."""
        super().check()
        if not self.features:
            raise ConfigError("--features names no feature; give the numbers of those to edit")
        require_features(self.features)
        if not math.isfinite(self.factor):
            raise ConfigError(f"--factor is {self.factor}, expected a finite number")
        self.require("tolerance", 0)


def run(config: EditConfig) -> Path:
    """Make the folder, or find the finished one, and return it."""
    from lorascope.causal.folding import fit
    from lorascope.causal.patch import PATCH, Patch
    from lorascope.sae.model import load_sae

    store = ActivationStore.open(config.data_dir)
    sae = load_sae(config.sae, store)
    require_features(config.features, sae)
    identity = {
        "settings": config.settings(),
        "parents": {"activations": store.digest, "sae": sae.digest},
    }
    if is_made(config.output, KIND, **identity, overwrite=config.overwrite):
        log.info("%s is already made with these settings", config.output)
        return config.output
    texts = open_held_out(config, sae)
    patch = Patch.from_features(sae, config.features, config.factor)
    fitted = np.ones(store.n_rollouts, bool)
    fitted[texts.rollouts] = False
    counts = store.eligible if config.tokens == "text" else np.ones(store.n_rows, bool)
    fold = fit(patch, sae.narrow(store), counts, fitted if fitted.any() else ~fitted)
    as_weights = _folds(config, fold)
    with building(config.output, KIND, **identity, overwrite=config.overwrite) as build:
        found = measure(texts, counts, patch, fold, config.seed)
        report = {**describe(config, sae, fold, as_weights), **found}
        names = _write_adapter(build, texts.subject, sae, fold) if as_weights else [PATCH]
        if not as_weights:
            patch.save(build.path / PATCH)
        write_text(build.path / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
        manifest = make_manifest(
            KIND,
            SCHEMA,
            **identity,
            layout=texts.subject.layout.to_json(),
            content=described(texts, config.sae),
        )
        build.publish_directory(manifest, [*names, REPORT])
    log.info("%s", table(report, config.output))
    return config.output


def _folds(config: EditConfig, fold: "Fold") -> bool:
    """Say whether the output is an adapter with changed weights."""
    if config.how != "auto":
        return config.how == "fold"
    return fold.error is not None and fold.error <= config.tolerance


def describe(config: EditConfig, sae: "SAE", fold: "Fold", as_weights: bool) -> dict[str, Any]:
    """Return the report's part on the edit and on what weights have of it, as JSON values."""
    return {
        "features": list(config.features),
        "factor": config.factor,
        "tokens": config.tokens,
        "output": "adapter" if as_weights else "patch",
        "fold_error": fold.error,
        "fold_error_by_site": dict(fold.errors),
        "n_sites": len(fold.changes),
        "d_sae": sae.d_sae,
    }


@torch.inference_mode()
def measure(
    texts: HeldOut, counts: npt.NDArray[np.bool_], patch: "Patch", fold: "Fold", seed: int = 0
) -> dict[str, Any]:
    """Return KL of patched and folded runs on the held-out texts, nats a token, as JSON values.

    `counts` are the rows of the store that the patch edits.
    """
    from lorascope.subject.intervene import RowEditor

    sums: dict[str, list[float]] = {name: [] for name in (*_ARMS, "between", "patched_here")}
    sizes, owners = [], []
    edited = torch.from_numpy(counts)
    batches = list(texts.batches(copies=4))
    with RowEditor(texts.subject) as editor, runtime.progress(len(batches), "edit", "texts") as bar:
        change = _folded_edit(texts.subject, patch, fold)
        for batch in batches:
            own = edited[batch.rows] & batch.own
            out = editor.run(batch.token_ids)
            texts.require_rows(batch, out.rows)
            arms = {
                "base": editor.base(batch.token_ids),
                "patched": editor.run(batch.token_ids, patch.edit(editor, out.rows, own)).logits,
                "folded": editor.run(batch.token_ids, change).logits,
            }
            logits = {name: counted(values, batch.mask) for name, values in arms.items()}
            reference = counted(out.logits, batch.mask)
            kl = {name: kl_of(reference, values) for name, values in logits.items()}
            kl["between"] = kl_of(logits["patched"], logits["folded"])
            _, columns = texts.subject.layout.select(patch.layout.adapter_types)
            fires = patch.change(out.rows[..., columns], own).abs().sum(-1) > 0
            kl["patched_here"] = kl["patched"] * fires[batch.mask].to(reference.device)
            rollouts = texts.store.rollout_of(batch.measured)
            usual = texts.role_of(batch.measured) != SPECIAL
            for rollout in np.unique(rollouts):
                mine = torch.from_numpy((rollouts == rollout) & usual)
                owners.append(int(rollout))
                sizes.append(float(mine.sum()))
                for name, values in kl.items():
                    sums[name].append(float(values.double().cpu()[mine].sum()))
            bar.update(1)
    _, text = np.unique(owners, return_inverse=True)
    tokens = np.bincount(text, sizes).astype(np.float64)
    totals = {name: np.bincount(text, values).astype(np.float64) for name, values in sums.items()}
    n = float(tokens.sum())
    whole = float(totals["patched"].sum())
    return {
        "n_rollouts": len(tokens),
        "n_tokens": int(n),
        "kl": {
            name: {
                "kl": float(totals[name].sum()) / n,
                "interval": interval_of(totals[name], tokens, seed),
            }
            for name in _ARMS
        },
        "kl_patched_folded": float(totals["between"].sum()) / n,
        "share_here": float(totals["patched_here"].sum()) / whole if whole else None,
    }


def _folded_edit(subject: "Subject", patch: "Patch", fold: "Fold") -> Any:
    """Return the edit that does to rows what the folded weights do."""
    start, by_site = 0, {}
    place = {site.module: change for site, change in _changes(patch, fold)}
    for site in subject.layout.sites:
        if site.module in place:
            by_site[start] = place[site.module].float()
        start += site.rank

    def edit(columns: slice, values: torch.Tensor) -> torch.Tensor | None:
        change = by_site.get(columns.start)
        return None if change is None else values + values @ change.T.to(values.device)

    return edit


def _changes(patch: "Patch", fold: "Fold") -> list[tuple[Any, torch.Tensor]]:
    return [(patch.layout.sites[i], change) for i, change in fold.changes.items()]


def _write_adapter(build: Build, subject: "Subject", sae: "SAE", fold: "Fold") -> list[str]:
    """Write the folded adapter into the folder, as PEFT saves one; return its files' names.

    A base model that its config names relatively is named from where the folder will be.
    """
    from lorascope.causal.folding import write_folded
    from lorascope.subject.adapter import CONFIG, WEIGHTS

    source, out = subject.adapter.path, build.path
    copied = [
        file.name
        for file in sorted(source.iterdir())
        if file.suffix in _COPIED and file.name not in (CONFIG, MANIFEST, REPORT) and file.is_file()
    ]
    for name in copied:
        shutil.copyfile(source / name, out / name)
    named = subject.adapter.config.get("base_model_name_or_path")
    beside = source / str(named)
    if named and not Path(str(named)).is_absolute() and beside.is_dir():
        named = Path(os.path.relpath(beside.resolve(), build.out.resolve())).as_posix()
    settings = {**subject.adapter.config, "base_model_name_or_path": named}
    write_text(out / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    mixes = {
        site.module: mix for site, mix in zip(subject.layout.sites, subject.mixes, strict=True)
    }
    write_folded(subject.adapter, sae.layout, mixes, fold, out / WEIGHTS)
    return [*copied, CONFIG, WEIGHTS]


def table(report: Mapping[str, Any], out: Path) -> str:
    """Return the report's main numbers as a table for the terminal."""
    error = report["fold_error"]
    said = (
        "no feature fires on held-out rows" if error is None else f"weights miss {error:.1%} of it"
    )
    what = {
        "adapter": f"{out} is a PEFT adapter with changed weights",
        "patch": f"{out} is a runtime patch: the adapter's weights stay as they are",
    }
    lines = [
        f"features {', '.join(map(str, report['features']))} times {report['factor']:g}; {said}; "
        + what[report["output"]],
        f"{report['n_rollouts']} held-out rollouts, {report['n_tokens']:,} predicted tokens; "
        "KL(adapter ‖ run) in nats a token",
    ]
    for name in _ARMS:
        one = report["kl"][name]
        edges = one["interval"]
        shown = "—" if edges is None else f"{edges[0]:.3g} to {edges[1]:.3g}"
        lines.append(f"  {name:<10}{one['kl']:>11.4g}  {shown}")
    lines.append(f"KL(patched ‖ folded): {report['kl_patched_folded']:.4g}")
    return "\n".join(lines)
