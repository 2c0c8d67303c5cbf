"""A rough product of two tables at a quarter of the cost, on CPUs with instructions for bytes.

Each row of both tables is rounded to 8 bits, with a scale of its own. The product of the bytes is
exact, so the only errors are those of this rounding and that of the result, which is bfloat16.
`prefilter.py` (training) and `encoder.py` find with it the few scores that they compute in float32.
"""

import os
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor

from lorascope.kernels import cpu

ROUNDED = 1.1 * 2**-8  # of a bfloat16 number, and of the number with which it is compared
WIDEST = 1 << 15  # columns whose products of bytes surely fit into 32 bits
_ZERO = 128  # the unsigned byte for zero
_TINY = 1e-30  # smallest unit; zeros have it
_ISAS = ("AVX512_CORE_", "AVX10")  # beginnings of oneDNN's names of instructions for bytes


def is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this CPU has instructions for bytes (VNNI or AMX) and the rows are float32.

    oneDNN must be allowed to use them: without, its product of bytes takes seconds.
    """
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    limits = [os.environ.get(f"{name}_MAX_CPU_ISA", "") for name in ("ONEDNN", "DNNL")]
    if not all(
        limit.upper() in ("", "ALL", "DEFAULT") or limit.upper().startswith(_ISAS)
        for limit in limits
    ):
        return False
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


class Bytes(NamedTuple):
    """A table whose row i is about `unit[i] * numbers[i]`, and the norms of the exact rows.

    The bytes are signed, or unsigned with `_ZERO` added.
    """

    numbers: Tensor
    unit: Float[Tensor, "row"]
    norm: Float[Tensor, "row"]

    @classmethod
    def rounded(cls, table: Float[Tensor, "row d_in"], *, signed: bool) -> "Bytes":
        """Round a table; the largest number of each row becomes 127 or -127."""
        numbers = torch.empty(table.shape, dtype=torch.int8 if signed else torch.uint8)
        result = cls(numbers, table.new_empty(len(table)), table.new_empty(len(table)))
        size = max(cpu.CACHED // max(table.shape[1], 1), 1)
        parts = (tensor.split(size) for tensor in (table, *result))
        for part, out, unit, norm in zip(*parts, strict=True):
            torch.amax(part.abs(), 1, out=unit)
            unit.div_(127).clamp_(min=_TINY)
            scaled = part * (1 / unit)[:, None]
            # squares of tiny numbers would be lost
            torch.linalg.vector_norm(scaled, dim=1, out=norm).mul_(unit)
            # conversion cuts off what follows the dot
            out.copy_(scaled.round_() if signed else scaled.add_(_ZERO + 0.5))
        return result

    def select(self, rows: slice) -> "Bytes":
        """Return some of the rows."""
        return Bytes(*(tensor[rows] for tensor in self))

    def error_norms(self, table: Float[Tensor, "row d_in"]) -> Float[Tensor, "row"]:
        """Return an upper bound of the norm of what rounding changed in each row, in its unit."""
        zero = _ZERO if self.numbers.dtype == torch.uint8 else 0
        apart = table * (1 / self.unit)[:, None] - (self.numbers.float() - zero)
        return apart.norm(dim=1) * (1 + 2**-10) + 2**-14 * table.shape[1] ** 0.5


def product(weight: Bytes, x: Bytes, added: Float[Tensor, "row"]) -> BFloat16[Tensor, "latent row"]:
    """Return `weight @ x.T` in units of the latents, plus a number for each row of `x`.

    `weight` is unsigned, `x` signed. Neither may be empty.
    """
    onednn = torch.ops.onednn
    return onednn.qlinear_pointwise(
        weight.numbers,
        1.0,
        _ZERO,
        onednn.qlinear_prepack(x.numbers, None),
        x.unit,
        torch.zeros(len(x.unit), dtype=torch.int64),
        added,
        1.0,
        0,
        torch.bfloat16,
        "none",
        [],
        "",
    )
