"""Several SAEs from one pass over the data: what varies between them, and how far they agree.

Lists for `--k`, `--expansion-factor`, `--lr` and `--seed` are multiplied out. All of them see the
same batches, split and shuffled by the first seed; a further seed changes the first weights only.
Where SAEs differ by their seed alone, each latent gets a stability (evaluate.py).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One SAE of a run, and what distinguishes its name from the others'."""

    k: float
    expansion_factor: int
    lr: str
    seed: int
    label: str = ""

    @property
    def kin(self) -> tuple[float, int, str]:
        """Return what SAEs share that differ by their seed alone."""
        return self.k, self.expansion_factor, self.lr

    def settings(self) -> dict[str, Any]:
        """Return its options as the artifact records them."""
        lr = self.lr if self.lr == "auto" else float(self.lr)
        return {
            "k": self.k,
            "expansion_factor": self.expansion_factor,
            "lr": lr,
            "seed": self.seed,
        }


def variants(
    k: Sequence[float], expansion_factor: Sequence[int], lr: Sequence[str], seed: Sequence[int]
) -> list[Variant]:
    """Multiply the lists out, the seed varying fastest; a label names what there is a list of.

    >>> [v.label for v in variants([8.0, 16.0], [4], ["auto"], [1])]
    ['k8', 'k16']
    """
    found = []
    for one in itertools.product(k, expansion_factor, lr, seed):
        named = zip(("k", "x", "lr", "seed"), one, (k, expansion_factor, lr, seed), strict=True)
        words = [
            f"{name}{str(value).removesuffix('.0')}"
            for name, value, every in named
            if len(every) > 1
        ]
        found.append(Variant(*one, label="_".join(words)))
    return found


def output_of(out: Path, variant: Variant) -> Path:
    """Return where an SAE of a run of several is written: `sae.pt` becomes `sae_k8_seed1.pt`."""
    suffix = ".pt" if out.suffix == ".pt" else ""
    stem = out.name.removesuffix(suffix)
    return out.with_name(f"{stem}_{variant.label}{suffix}") if variant.label else out


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of the same keys as text in columns; numbers with four digits."""
    cells = [list(rows[0])] + [[_short(value) for value in row.values()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
