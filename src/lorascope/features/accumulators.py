"""What one pass over the rows keeps of every latent, in memory that does not grow with the rows.

A *span* is a run of whole rollouts, fixed by the store and the SAE; `scan` reads one and returns
its `Accumulator`, which is saved, loaded, and merged in the order of the spans: however many
processes shared the spans, the sum is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lorascope.activations.store import ActivationStore
from lorascope.artifact import replacing
from lorascope.features.spans import Span
from lorascope.features.statistics import N_TENTHS, FiringStatistics
from lorascope.features.topk import Firings, FiringSample, TopExamples
from lorascope.texts.rollouts import ROLES

if TYPE_CHECKING:
    from lorascope.sae.model import SAE

N_SAMPLED = 128  # firings of each latent that tokens, neighbours and samples are told from
_SPAN = 1 << 18  # rows of a span, at least
_PER_LATENT = 64  # and for each latent, so that a span's file is small beside its rows


@dataclass
class Accumulator:
    """The tally, the strongest firings and the sample of some spans; counts of their tokens.

    `rollouts` has for each rollout its eligible tokens, the latents that fired on them, and the
    squared error of reconstruction and the squared size of its rows: `(n_rollouts, 4)`.
    """

    statistics: FiringStatistics
    top: TopExamples
    sample: FiringSample
    tokens: npt.NDArray[np.int64]  # (vocabulary,), eligible ones
    roles: npt.NDArray[np.int64]  # (len(ROLES),), likewise
    tenths: npt.NDArray[np.int64]  # (10,)
    rollouts: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, d_sae: int, n_vocabulary: int, k: int, per_rollout: int | None) -> "Accumulator":
        """Return an empty accumulator."""
        return cls(
            FiringStatistics.empty(d_sae),
            TopExamples(d_sae, k, per_rollout),
            FiringSample(d_sae, N_SAMPLED),
            np.zeros(n_vocabulary, np.int64),
            np.zeros(len(ROLES), np.int64),
            np.zeros(N_TENTHS, np.int64),
            np.zeros((0, 4)),
        )

    def successor(self) -> "Accumulator":
        """Return an empty accumulator that inherits the current cut-offs."""
        new = Accumulator.empty(
            len(self.statistics.n_active), len(self.tokens), self.top.n, self.top.per_rollout
        )
        new.top.bound[:] = self.top.bound
        new.sample.bound[:] = self.sample.bound
        return new

    def merge(self, later: "Accumulator") -> None:
        """Merge the accumulator of later spans."""
        self.statistics.merge(later.statistics)
        self.top.merge(later.top)
        self.sample.merge(later.sample)
        self.tokens += later.tokens
        self.roles += later.roles
        self.tenths += later.tenths
        self.rollouts = np.concatenate([self.rollouts, later.rollouts])

    def save(self, path: Path) -> None:
        """Write it to a file, whole or not at all."""
        from safetensors.numpy import save_file

        sampled = self.sample.sorted()  # of its columns, row tells the others
        arrays: dict[str, npt.NDArray[Any]] = {
            **{
                f"statistics.{f.name}": getattr(self.statistics, f.name)
                for f in fields(FiringStatistics)
            },
            **{f"top.{n}": c for n, c in self.top.sorted()._asdict().items()},
            "sample.latent": sampled.latent.astype(np.int32),
            "sample.value": sampled.value,
            "sample.row": sampled.row,
            **{name: getattr(self, name) for name in ("tokens", "roles", "tenths", "rollouts")},
        }
        with replacing(path) as beside:
            save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, beside)

    def load(self, path: Path, store: ActivationStore) -> None:
        """Merge the accumulator of the next span from its file."""
        from safetensors.numpy import load_file

        arrays = load_file(path)
        later = self.successor()
        for field in fields(FiringStatistics):
            getattr(later.statistics, field.name)[:] = arrays[f"statistics.{field.name}"]
        later.top.add(Firings(**{name: arrays[f"top.{name}"] for name in Firings._fields}))
        row = arrays["sample.row"]
        later.sample.add(
            Firings(
                arrays["sample.latent"].astype(np.int64),
                arrays["sample.value"],
                row,
                store.rollout_of(row),
                row.astype(np.uint64),
            )
        )
        for name in ("tokens", "roles", "tenths", "rollouts"):
            setattr(later, name, arrays[name])
        self.merge(later)


def spans_of(
    store: ActivationStore, n_rollouts: int, d_sae: int, only: tuple[str, ...] = ()
) -> list[Span]:
    """Cut the first rollouts into spans of `max(2**18, 64 * d_sae)` rows or a little more.

    The file of a span takes less than 3 kB for each latent, whatever its rows, at `k` 10.
    """
    least = max(_SPAN, _PER_LATENT * d_sae)
    spans, first = [], 0
    for rollout in range(1, n_rollouts + 1):
        n_rows = store.rollout_start[rollout] - store.rollout_start[first]
        if n_rows >= least or rollout == n_rollouts:
            spans.append(Span(store, first, rollout, only))
            first = rollout
    return spans


def scan(
    span: Span, sae: "SAE", accumulator: Accumulator, batch_size: int, *, collapse: bool, reach: int
) -> Iterator[int]:
    """Read a span into empty accumulator, and yield the rows of each batch when they are read.

    `collapse` takes firings for alike where the tokens within `reach` places are the same.
    """
    lowest = lowest_threshold(sae)
    tenths, eligible = span.tenths, span.eligible
    groups = span.neighbourhoods(reach) if collapse else None
    seen = np.zeros((1, sae.d_sae), bool)  # of the rollout that a batch begins in
    n_fired = np.zeros(span.n_rows)
    squares = np.zeros((2, span.n_rows))
    for start in range(0, span.n_rows, batch_size):
        stop = min(start + batch_size, span.n_rows)
        here = np.flatnonzero(eligible[start:stop]) + start
        index, latent, value, squares[:, here] = _encode(sae, span.rows(start, stop)[here - start])
        local = here[index]
        rollout = span.rollout[local]
        row = local + span.first_row
        group = row.astype(np.uint64) if groups is None else groups[local]
        firings = Firings(latent, value, row, rollout, group)
        accumulator.statistics.add(firings, span.roles[local], tenths[local], lowest)
        last = span.rollout[stop - 1]
        is_cut = stop < span.n_rows and span.rollout[stop] == last
        open_from = int(span.store.rollout_start[last]) if is_cut else None
        accumulator.top.add(firings, open_from=open_from)
        accumulator.sample.add(firings)
        np.add.at(n_fired, local, 1)
        begun = span.rollout[start]
        marks = np.zeros((last - begun + 1, sae.d_sae), bool)
        marks[0] = seen[0]
        marks[rollout - begun, latent] = True
        done = marks[: len(marks) - is_cut]
        accumulator.statistics.n_rollouts[:] += done.sum(0)
        seen = marks[len(marks) - 1 :] if is_cut else np.zeros_like(seen)
        yield stop - start
    accumulator.tokens += np.bincount(span.token_ids[eligible], minlength=len(accumulator.tokens))
    accumulator.roles += np.bincount(span.roles[eligible], minlength=len(ROLES))
    accumulator.tenths += np.bincount(tenths[eligible], minlength=N_TENTHS)
    columns = np.stack([eligible.astype(np.float64), n_fired, *squares])
    accumulator.rollouts = np.add.reduceat(columns, span.starts, axis=1).T


def lowest_threshold(sae: "SAE") -> float:
    """Return the threshold of the latent that has the lowest one."""
    assert sae.threshold is not None, "load_sae calibrates it"
    return float(sae.threshold.min())


def _encode(
    sae: "SAE", rows: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Return row index, latent and value of every firing, row by row, and each row's squares."""
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
