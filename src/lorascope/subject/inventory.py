"""List what an adapter's file holds: every site with its size, what has no rows, what is besides.

Norms are Frobenius norms of the whole matrices. The effect of a site is `‖scale·B·A‖`, by
`‖B·A‖² = trace(BᵀB · AAᵀ)`: the product, as large as the weight itself, is never made.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lorascope.sites import Site, name_modules
from lorascope.subject.adapter import (
    WEIGHTS,
    Adapter,
    TensorFile,
    base_path,
    lora_tensors,
    scale_of,
    variant_of,
    why_refused,
    why_unreadable,
)

_Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Pair:
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
    variant: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What an adapter holds.

    `pairs` are the sites in column order, `unreadable` the LoRA tensors without a row per token,
    each module with its reason, and `unseen` what the adapter changes without a low-rank bottleneck
    (see `unseen_of`). `refused` says why `generate` takes no adapter of this variant, if it does.
    """

    pairs: tuple[Pair, ...]
    unreadable: tuple[tuple[str, str], ...]
    unseen: tuple[str, ...]
    refused: str | None

    @property
    def d_in(self) -> int:
        """Number of columns: the sum of the ranks."""
        return sum(pair.rank for pair in self.pairs)

    @property
    def has_no_effect(self) -> bool:
        """Say whether every site writes nothing: an adapter that was never trained."""
        return bool(self.pairs) and all(pair.b_norm == 0 for pair in self.pairs)


def inventory(adapter: Adapter) -> Inventory:
    """Read every pair of LoRA tensors of an adapter's file. Neither torch nor a base is needed."""
    modules = lora_tensors(adapter.shapes)
    names = name_modules(modules)
    file = TensorFile(adapter.path / WEIGHTS)
    pairs: list[Pair] = []
    unreadable: list[tuple[str, str]] = []
    for module, parts in sorted(modules.items()):
        reason = "its B is missing" if "lora_A" in parts and "lora_B" not in parts else None
        reason = reason or (
            why_unreadable(adapter, module, parts)
            if {"lora_A", "lora_embedding_A"} & parts.keys()
            else "its A is missing"
        )
        if reason:
            unreadable.append((module, reason))
            continue
        a, b = _dense(adapter, module, file.read(parts["lora_A"]), file.read(parts["lora_B"]))
        layer, projection = names[module]
        scale = scale_of(adapter.config, module)
        product = float(np.sum((b.T @ b) * (a @ a.T)))
        pairs.append(
            Pair(
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
                variant=variant_of(adapter.config),
            )
        )
    pairs.sort(
        key=lambda pair: (
            Site(layer=pair.layer, projection=pair.projection, module=pair.module).order
        )
    )
    return Inventory(
        pairs=tuple(pairs),
        unreadable=tuple(unreadable),
        unseen=unseen_of(adapter),
        refused=why_refused(adapter.config),
    )


def unseen_of(adapter: Adapter) -> tuple[str, ...]:
    """Name what an adapter changes outside its rows: trained modules, tokens, embeddings, biases.

    Rows say nothing of these, so that they account for a part of the fine-tune only.
    """
    modules = lora_tensors(adapter.shapes)
    lora = {name for parts in modules.values() for name in parts.values()}
    saved = [str(name) for name in adapter.config.get("modules_to_save") or []]
    found: dict[str, None] = {}  # a set that keeps its order
    n_biases = 0
    for name in sorted(adapter.shapes.keys() - lora):
        path, _, last = base_path(name).rpartition(".")
        trained = _trained_module(path, saved)
        if last == "trainable_tokens_delta" or "trainable_tokens_delta." in f"{path}.":
            module = path.partition(".token_adapter")[0]
            found[f"{adapter.shapes[name][0]} trained tokens of {module}"] = None
        elif trained:
            found[f"trained module {trained}"] = None
        elif last == "bias":
            n_biases += 1
        else:
            found[f"saved weights of {path.removesuffix('.base_layer')}"] = None
    if n_biases:
        found[f"biases of {n_biases} modules"] = None
    n_lora_biases = sum("lora_B.bias" in parts for parts in modules.values())
    if n_lora_biases:
        found[f"lora_B biases of {n_lora_biases} modules"] = None
    return tuple(found)


def _trained_module(path: str, saved: list[str]) -> str | None:
    """Return the module of `modules_to_save` that a tensor lies in: PEFT compares path endings."""
    parts = path.split(".")
    above = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((module for module in above if module.endswith(tuple(saved))), None)


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
        "variant": variant_of(config),
        "d_in": held.d_in,
        "has_no_effect": held.has_no_effect,
        "refused": held.refused,
        "sites": [asdict(pair) for pair in held.pairs],
        "unreadable": [{"module": name, "reason": reason} for name, reason in held.unreadable],
        "unseen": list(held.unseen),
    }


def describe(adapter: Adapter) -> str:
    """Return the inventory as aligned text for people."""
    held = inventory(adapter)
    config = adapter.config
    layers = {pair.layer for pair in held.pairs}
    ranks = sorted({pair.rank for pair in held.pairs})
    lines = [
        f"adapter      {adapter.name} ({adapter.digest[:12]})",
        f"base model   {config.get('base_model_name_or_path') or 'not named'}",
        f"PEFT         {config.get('peft_version') or 'version not named'}",
        f"variant      {variant_of(config)}{', rsLoRA' if config.get('use_rslora') else ''}",
        f"columns      d_in {held.d_in}: {len(held.pairs)} sites in {len(layers)} layers, "
        f"rank {', '.join(map(str, ranks)) or 'none'}",
    ]
    if held.pairs:
        lines += ["", *_table(held.pairs)]
    if held.refused:
        lines += ["", f"generate does not take this adapter: {held.refused}"]
    if held.unreadable:
        lines += ["", f"no row per token ({len(held.unreadable)}; see --skip-unhookable):"]
        lines += [f"  {name}: {reason}" for name, reason in held.unreadable]
    if held.unseen:
        lines += ["", "changed outside the rows:", *(f"  {name}" for name in held.unseen)]
    if held.has_no_effect:
        lines += ["", "every lora_B is zero: the adapter has no effect"]
    return "\n".join(lines)


def _table(pairs: tuple[Pair, ...]) -> list[str]:
    head = ("site", "rank", "d_x", "d_y", "scale", "‖A‖", "‖B‖", "‖scale·B·A‖", "module")
    rows = [
        (
            f"{pair.layer}.{pair.projection}" if pair.layer >= 0 else pair.module,
            *(str(n) for n in (pair.rank, pair.d_x, pair.d_y)),
            *(f"{x:.4g}" for x in (pair.scale, pair.a_norm, pair.b_norm, pair.effect)),
            pair.module,
        )
        for pair in pairs
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


def _dense(adapter: Adapter, module: str, a: _Matrix, b: _Matrix) -> tuple[_Matrix, _Matrix]:
    """Return `A` and `B` whole: BD-LoRA keeps only the blocks on the diagonal of one of them."""
    blocks = adapter.config.get("use_bdlora") or {}
    n_blocks = int(blocks.get("nblocks", 1))
    if any(target in module for target in blocks.get("target_modules_bd_a") or []):
        a = _block_diagonal(a, n_blocks)
    elif any(target in module for target in blocks.get("target_modules_bd_b") or []):
        b = _block_diagonal(b, n_blocks)
    return a, b


def _block_diagonal(stacked: _Matrix, n_blocks: int) -> _Matrix:
    height, width = stacked.shape[0] // n_blocks, stacked.shape[1]
    whole = np.zeros((stacked.shape[0], width * n_blocks))
    for i in range(n_blocks):
        rows = slice(i * height, (i + 1) * height)
        whole[rows, i * width : (i + 1) * width] = stacked[rows]
    return whole
