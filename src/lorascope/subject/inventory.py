"""List an adapter's content: its sites, LoRA without a row per token, changes outside LoRA.

Norms are Frobenius norms of the whole matrices. The effect of a site is `‖scale·B·A‖`, computed as
`‖B·A‖² = trace(BᵀB · AAᵀ)` without the product, which is as large as the base weight.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.sites import Site, name_modules
from lorascope.subject.adapter import (
    Adapter,
    changes_outside_lora,
    lora_kind,
    lora_tensors,
    other_purpose,
    scale_of,
    unreadable_reason,
    unsupported_reason,
)

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SiteSize:
    """One adapted module: `A` is `(rank, d_x)`, `B` is `(d_y, rank)`."""

    module: str
    layer: int
    projection: str
    rank: int
    d_x: int
    d_y: int
    scale: float
    a_norm: float
    b_norm: float
    effect: float
    lora_kind: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What an adapter holds.

    `sites` are in column order. `unreadable` lists modules whose LoRA gives no row per token, with
    the reason. `unseen` lists changes outside LoRA (see `changes_outside_lora`). `refused` is the
    reason why `generate` does not support this kind of LoRA, if it does not.
    """

    sites: tuple[SiteSize, ...]
    unreadable: tuple[tuple[str, str], ...]
    unseen: tuple[str, ...]
    refused: str | None

    @property
    def d_in(self) -> int:
        """Number of columns: the sum of the ranks."""
        return sum(site.rank for site in self.sites)

    @property
    def has_no_effect(self) -> bool:
        """Whether every site writes nothing, as in an adapter that was never trained."""
        return bool(self.sites) and all(site.b_norm == 0 for site in self.sites)


def inventory(adapter: Adapter) -> Inventory:
    """Read every LoRA matrix of an adapter's file, without torch and without the base model."""
    modules = lora_tensors(adapter.shapes)
    names = name_modules(modules)
    file = adapter.open()
    sites: list[SiteSize] = []
    unreadable: list[tuple[str, str]] = []
    for module, parts in sorted(modules.items()):
        if not {"lora_A", "lora_embedding_A"} & parts.keys():
            reason = "its A is missing"
        elif "lora_A" in parts and "lora_B" not in parts:
            reason = "its B is missing"
        else:
            reason = unreadable_reason(adapter, module, parts)
        if reason:
            unreadable.append((module, reason))
            continue
        a, b = _dense(adapter, module, file.read(parts["lora_A"]), file.read(parts["lora_B"]))
        layer, projection = names[module]
        scale = scale_of(adapter.config, module)
        product = float(np.sum((b.T @ b) * (a @ a.T)))
        sites.append(
            SiteSize(
                module=module,
                layer=layer,
                projection=projection,
                rank=a.shape[0],
                d_x=a.shape[1],
                d_y=b.shape[0],
                scale=scale,
                a_norm=float(np.linalg.norm(a)),
                b_norm=float(np.linalg.norm(b)),
                effect=abs(scale) * math.sqrt(max(product, 0.0)),
                lora_kind=lora_kind(adapter.config),
            )
        )
    refused = unsupported_reason(adapter.config)
    if purpose := other_purpose(adapter):
        refused = f"it was made for {purpose}, and lorascope studies causal language models"
    sites.sort(key=lambda s: Site(layer=s.layer, projection=s.projection, module=s.module).order)
    return Inventory(
        sites=tuple(sites),
        unreadable=tuple(unreadable),
        unseen=changes_outside_lora(adapter),
        refused=refused,
    )


def factors(adapter: Adapter, modules: Sequence[str]) -> dict[str, tuple[Matrix, Matrix]]:
    """Return `A` (rank, d_x) and `B` (d_y, rank) of some sites, whole."""
    tensors, file = lora_tensors(adapter.shapes), adapter.open()
    return {
        module: _dense(
            adapter,
            module,
            *(file.read(tensors[module][part]) for part in ("lora_A", "lora_B")),
        )
        for module in modules
    }


def to_json(adapter: Adapter) -> dict[str, Any]:
    """Return the inventory as plain JSON values."""
    held = inventory(adapter)
    config = adapter.config
    return {
        "kind": "adapter",
        "name": adapter.name,
        "digest": adapter.digest,
        "base_model": config.get("base_model_name_or_path"),
        "peft_version": config.get("peft_version"),
        "lora_kind": lora_kind(config),
        "d_in": held.d_in,
        "has_no_effect": held.has_no_effect,
        "refused": held.refused,
        "sites": [asdict(site) for site in held.sites],
        "unreadable": [{"module": name, "reason": reason} for name, reason in held.unreadable],
        "unseen": list(held.unseen),
    }


def describe(adapter: Adapter) -> str:
    """Return the inventory as aligned text."""
    held = inventory(adapter)
    config = adapter.config
    layers = {site.layer for site in held.sites}
    ranks = sorted({site.rank for site in held.sites})
    lines = [
        f"adapter      {adapter.name} ({adapter.digest[:12]})",
        f"base model   {config.get('base_model_name_or_path') or 'not named'}",
        f"PEFT         {config.get('peft_version') or 'version not named'}",
        f"LoRA kind    {lora_kind(config)}{', rsLoRA' if config.get('use_rslora') else ''}",
        f"columns      d_in {held.d_in}: {len(held.sites)} sites in {len(layers)} layers, "
        f"rank {', '.join(map(str, ranks)) or 'none'}",
    ]
    if held.sites:
        lines += ["", *_table(held.sites)]
    if held.refused:
        lines += ["", f"generate does not support this adapter: {held.refused}"]
    if held.unreadable:
        lines += ["", f"no row per token ({len(held.unreadable)}; see --skip-unhookable):"]
        lines += [f"  {name}: {reason}" for name, reason in held.unreadable]
    if held.unseen:
        lines += ["", "changed outside LoRA:", *(f"  {name}" for name in held.unseen)]
    if held.has_no_effect:
        lines += ["", "every lora_B is zero: the adapter has no effect"]
    return "\n".join(lines)


def _table(sites: tuple[SiteSize, ...]) -> list[str]:
    head = ("site", "rank", "d_x", "d_y", "scale", "‖A‖", "‖B‖", "‖scale·B·A‖", "module")
    rows = [
        (
            f"{site.layer}.{site.projection}" if site.layer >= 0 else site.module,
            *(str(n) for n in (site.rank, site.d_x, site.d_y)),
            *(f"{x:.4g}" for x in (site.scale, site.a_norm, site.b_norm, site.effect)),
            site.module,
        )
        for site in sites
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    ends = (0, len(head) - 1)  # names to the left, numbers to the right
    return [
        "  ".join(
            cell.ljust(width) if i in ends else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def _dense(adapter: Adapter, module: str, a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """Return `A` and `B` whole. BD-LoRA stores only the diagonal blocks of one of them."""
    blocks = adapter.config.get("use_bdlora") or {}
    n_blocks = int(blocks.get("nblocks", 1))
    if any(target in module for target in blocks.get("target_modules_bd_a") or []):
        a = _block_diagonal(a, n_blocks)
    elif any(target in module for target in blocks.get("target_modules_bd_b") or []):
        b = _block_diagonal(b, n_blocks)
    return a, b


def _block_diagonal(stacked: Matrix, n_blocks: int) -> Matrix:
    height, width = stacked.shape[0] // n_blocks, stacked.shape[1]
    whole = np.zeros((stacked.shape[0], width * n_blocks))
    for i in range(n_blocks):
        rows = slice(i * height, (i + 1) * height)
        whole[rows, i * width : (i + 1) * width] = stacked[rows]
    return whole
