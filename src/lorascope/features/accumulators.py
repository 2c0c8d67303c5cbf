"""Accumulate the firings of every latent over the rows, in memory that does not grow with them.

`scan` reads one span into an `Accumulator`, which is saved, loaded, and merged in the order of the
spans. The result is the same however many processes share the spans. Sums add each latent's values
in the order of their rows, whatever the batches: the same rows give the same bits.

Firings at special tokens are apart: they are counted by role, the strongest are kept, and nothing
else is about them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorascope.activations.store import ActivationStore
from lorascope.artifact import replacing
from lorascope.features.spans import N_TENTHS, Span
from lorascope.features.topk import Firings, FiringSample, TopExamples
from lorascope.texts.roles import ROLES, SPECIAL

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

N_SAMPLED = 128  # firings of each latent that samples, tokens and neighbours are computed from
N_SPECIAL = 3  # strongest firings of each latent at special tokens that are kept
N_BINS = 40  # of the histogram: four per octave from the lowest threshold up, a factor of 1,024
_MANTISSA = 21  # bits of a float32 below those that give its quarter of an octave
_LOWEST = 1e-6  # lower bound of the histogram's first edge
_COUNTS = ("n_by_token", "n_by_role", "n_by_position", "rollouts")


@dataclass(frozen=True)
class FiringStatistics:
    """Counts and sums over the firings of each latent. Arrays are changed in place.

    `by_role` has the firings at special tokens too, the other arrays only those at text.
    """

    n_active: npt.NDArray[np.int64]  # (latent,)
    total: npt.NDArray[np.float64]
    square: npt.NDArray[np.float64]
    n_rollouts: npt.NDArray[np.int64]
    by_role: npt.NDArray[np.int64]  # (latent, role)
    by_position: npt.NDArray[np.int64]  # (latent, N_TENTHS)
    histogram: npt.NDArray[np.int64]  # (latent, N_BINS)

    @classmethod
    def empty(cls, d_sae: int) -> "FiringStatistics":
        """Return statistics of no firings."""

        def zeros(*width: int) -> npt.NDArray[np.int64]:
            return np.zeros((d_sae, *width), np.int64)

        return cls(
            n_active=zeros(),
            total=np.zeros(d_sae),
            square=np.zeros(d_sae),
            n_rollouts=zeros(),
            by_role=zeros(len(ROLES)),
            by_position=zeros(N_TENTHS),
            histogram=zeros(N_BINS),
        )

    def add(
        self,
        firings: Firings,
        role: npt.NDArray[np.integer[Any]],
        tenth: npt.NDArray[np.integer[Any]],
        lowest: float,
    ) -> None:
        """Count firings; `role` and `tenth` are those of their tokens, `(n,)` each.

        `n_rollouts` is not changed: the caller counts it, because batches cut rollouts.
        """
        latent = firings.latent
        value = firings.value.astype(np.float64)
        np.add.at(self.n_active, latent, 1)
        np.add.at(self.total, latent, value)
        np.add.at(self.square, latent, value**2)
        np.add.at(self.by_role.reshape(-1), latent * len(ROLES) + role, 1)
        np.add.at(self.by_position.reshape(-1), latent * N_TENTHS + tenth, 1)
        bins = (firings.value.view(np.int32) >> _MANTISSA) - _first_bin(lowest)
        bins = np.clip(bins, 0, N_BINS - 1)
        np.add.at(self.histogram.reshape(-1), latent * N_BINS + bins, 1)

    def merge(self, later: "FiringStatistics") -> None:
        """Add the statistics of the rows that follow."""
        for field in fields(self):
            mine = getattr(self, field.name)
            mine += getattr(later, field.name)

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """Mean value over the firings, `(latent,)`; 0 for a latent that never fires."""
        return self._mean().astype(np.float32)

    @property
    def std(self) -> npt.NDArray[np.float32]:
        """Standard deviation of the values over the firings, `(latent,)`."""
        square = self.square / np.maximum(self.n_active, 1)
        return np.sqrt(np.maximum(square - self._mean() ** 2, 0)).astype(np.float32)

    def _mean(self) -> npt.NDArray[np.float64]:
        return self.total / np.maximum(self.n_active, 1)


@dataclass
class Accumulator:
    """Statistics, strongest firings and a sample of each latent, and counts of the tokens.

    `special` has the strongest firings at special tokens, `top` and `sample` those at text.
    `rollouts` `(n_rollouts, 4)` has for each rollout: its eligible tokens, the firings on them, the
    squared reconstruction error of its rows, and their squared distance to `b_dec`.
    """

    statistics: FiringStatistics
    top: TopExamples
    special: TopExamples
    sample: FiringSample
    n_by_token: npt.NDArray[np.int64]  # eligible tokens by token id, (vocabulary,)
    n_by_role: npt.NDArray[np.int64]  # tokens by role, special ones included, (len(ROLES),)
    n_by_position: npt.NDArray[np.int64]  # eligible tokens by tenth of the rollout, (N_TENTHS,)
    rollouts: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, d_sae: int, n_vocabulary: int, k: int, per_rollout: int | None) -> "Accumulator":
        """Return an empty accumulator."""
        return cls(
            statistics=FiringStatistics.empty(d_sae),
            top=TopExamples(d_sae, k, per_rollout),
            special=TopExamples(d_sae, N_SPECIAL, per_rollout),
            sample=FiringSample(d_sae, N_SAMPLED),
            n_by_token=np.zeros(n_vocabulary, np.int64),
            n_by_role=np.zeros(len(ROLES), np.int64),
            n_by_position=np.zeros(N_TENTHS, np.int64),
            rollouts=np.zeros((0, 4)),
        )

    @property
    def n_eligible(self) -> int:
        """Number of tokens of text that were read."""
        return int(self.n_by_position.sum())

    def successor(self) -> "Accumulator":
        """Return an empty accumulator that inherits the current cut-offs."""
        new = Accumulator.empty(
            len(self.statistics.n_active), len(self.n_by_token), self.top.n, self.top.per_rollout
        )
        for mine, its in zip(self.kept, new.kept, strict=True):
            its.cutoff[:] = mine.cutoff
        return new

    def merge(self, later: "Accumulator") -> None:
        """Merge the accumulator of the spans that follow."""
        self.statistics.merge(later.statistics)
        self.merge_kept(later)
        self.n_by_token += later.n_by_token
        self.n_by_role += later.n_by_role
        self.n_by_position += later.n_by_position
        self.rollouts = np.concatenate([self.rollouts, later.rollouts])

    def merge_kept(self, later: "Accumulator") -> None:
        """Merge the firings that another accumulator keeps, and nothing else."""
        for mine, its in zip(self.kept, later.kept, strict=True):
            mine.merge(its)

    @property
    def kept(self) -> tuple[TopExamples, TopExamples, FiringSample]:
        """What keeps firings."""
        return self.top, self.special, self.sample

    def save(self, path: Path) -> None:
        """Write the accumulator to a file, atomically."""
        from safetensors.numpy import save_file

        sample = self.sample.sorted()  # `load` computes its other columns from the rows
        arrays: dict[str, npt.NDArray[Any]] = {
            **{
                f"statistics.{field.name}": getattr(self.statistics, field.name)
                for field in fields(FiringStatistics)
            },
            **{
                f"{part}.{name}": column
                for part in ("top", "special")
                for name, column in getattr(self, part).sorted()._asdict().items()
            },
            "sample.latent": sample.latent.astype(np.int32),
            "sample.value": sample.value,
            "sample.row": sample.row,
            **{name: getattr(self, name) for name in _COUNTS},
        }
        with replacing(path) as temporary:
            save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, temporary)

    def load(self, path: Path, store: ActivationStore) -> None:
        """Merge the accumulator of the next span from its file."""
        from safetensors.numpy import load_file

        arrays = load_file(path)
        later = self.successor()
        for field in fields(FiringStatistics):
            getattr(later.statistics, field.name)[:] = arrays[f"statistics.{field.name}"]
        for part in ("top", "special"):
            columns = {name: arrays[f"{part}.{name}"] for name in Firings._fields}
            getattr(later, part).add(Firings(**columns))
        row = arrays["sample.row"]
        sample = Firings(
            latent=arrays["sample.latent"].astype(np.int64),
            value=arrays["sample.value"],
            row=row,
            rollout=store.rollout_of(row),
            context=row.astype(np.uint64),
        )
        later.sample.add(sample)
        for name in _COUNTS:
            setattr(later, name, arrays[name])
        self.merge(later)


def scan(
    span: Span, sae: "SAE", accumulator: Accumulator, batch_size: int, *, collapse: bool, reach: int
) -> Iterator[int]:
    """Read a span into an empty accumulator, and yield the number of rows after each batch.

    With `collapse`, firings have equal contexts if the tokens within `reach` positions are equal;
    firings at special tokens, if those up to `reach` positions before are, because what follows a
    header is always different and cannot have caused the value.
    """
    lowest = lowest_threshold(sae)
    roles, read, tenth, rollout_of = span.roles, span.read, span.tenth, span.rollout
    is_special = roles == SPECIAL
    eligible = read & ~is_special
    contexts = None
    if collapse:
        contexts = span.context_hashes(reach, reach)
        contexts[is_special] = span.context_hashes(reach, 0)[is_special]
    seen = np.zeros((1, sae.d_sae), bool)  # latents in the rollout that continues in a batch
    n_fired = np.zeros(span.n_rows)
    squares = np.zeros((2, span.n_rows))
    for start in range(0, span.n_rows, batch_size):
        stop = min(start + batch_size, span.n_rows)
        here = np.flatnonzero(read[start:stop]) + start
        index, latent, value, squares[:, here] = _encode(sae, span.rows(start, stop)[here - start])
        local = here[index]  # of each firing: its row, from the start of the span
        rollout = rollout_of[local]
        row = local + span.first_row
        context = row.astype(np.uint64) if contexts is None else contexts[local]
        firings = Firings(latent, value, row, rollout, context)
        first, last = rollout_of[start], rollout_of[stop - 1]
        is_cut = stop < span.n_rows and rollout_of[stop] == last
        open_from = int(span.store.rollout_start[last]) if is_cut else None
        at_special = is_special[local]
        special, firings = firings.select(at_special), firings.select(~at_special)
        accumulator.special.add(special, open_from=open_from)
        np.add.at(accumulator.statistics.by_role[:, SPECIAL], special.latent, 1)
        local, latent, rollout = local[~at_special], firings.latent, firings.rollout
        accumulator.statistics.add(firings, roles[local], tenth[local], lowest)
        accumulator.top.add(firings, open_from=open_from)
        accumulator.sample.add(firings)
        np.add.at(n_fired, local, 1)
        fired_in = np.zeros((last - first + 1, sae.d_sae), bool)  # (rollout, latent)
        fired_in[0] = seen[0]
        fired_in[rollout - first, latent] = True
        n_complete = len(fired_in) - is_cut
        accumulator.statistics.n_rollouts[:] += fired_in[:n_complete].sum(0)
        seen = fired_in[-1:] if is_cut else np.zeros_like(seen)
        yield stop - start
    n_tokens = len(accumulator.n_by_token)
    accumulator.n_by_token += np.bincount(span.token_ids[eligible], minlength=n_tokens)
    accumulator.n_by_role += np.bincount(roles[read], minlength=len(ROLES))
    accumulator.n_by_position += np.bincount(tenth[eligible], minlength=N_TENTHS)
    columns = np.stack([eligible.astype(np.float64), n_fired, *(squares * eligible)])
    accumulator.rollouts = np.add.reduceat(columns, span.starts, axis=1).T


def lowest_threshold(sae: "SAE") -> float:
    """Return the lowest threshold of all latents."""
    assert sae.threshold is not None, "load_sae calibrates it"
    return float(sae.threshold.min())


def histogram_edges(lowest: float) -> npt.NDArray[np.float32]:
    """Return the edges of the bins, `(N_BINS + 1,)`: 2**e times 1, 1.25, 1.5 and 1.75.

    The low bits of such float32 numbers are zero, so the high bits of a value give its bin.
    """
    bits = (_first_bin(lowest) + np.arange(N_BINS + 1, dtype=np.int32)) << _MANTISSA
    return bits.astype(np.int32).view(np.float32)


def _first_bin(lowest: float) -> int:
    return int(np.float32(max(lowest, _LOWEST)).view(np.int32)) >> _MANTISSA


def _encode(
    sae: "SAE", rows: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Return row index, latent and value of every firing, and squared lengths of every row.

    The latter, `(2, n_rows)`, are `‖s(x − x̂)‖²` and `‖s(x − b_dec)‖²`.
    """
    import torch

    x = torch.from_numpy(rows).to(sae.b_enc.device)
    code = sae.encode(x)
    x = x.float()
    scale = sae.scale
    norms = [
        torch.linalg.vector_norm((x - y) * scale, dim=1) for y in (sae.decode(code), sae.b_dec)
    ]
    index = torch.repeat_interleave(torch.arange(len(rows), device=x.device), code.l0)
    squares = torch.stack(norms).double().square()
    latents, values = code.latents.cpu().numpy(), code.values.cpu().numpy()
    return index.cpu().numpy(), latents, values, squares.cpu().numpy()
