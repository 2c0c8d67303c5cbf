"""Run rollouts through a subject in batches and return their rows.

1. Cut rollouts longer than the context into pieces (windows), each with the rows to keep.
2. Sort pieces by length, and cut them into batches of at most `batch_tokens` tokens with the lowest
   cost: tokens computed, padding included, plus a fixed overhead for each batch. Lengths that the
   model reads with different rotary frequencies share no batch.
3. If a batch does not fit into memory, halve it, and halve `batch_tokens` from then on.
4. Copy a batch's rows to the host while the next one computes. `finish` puts them in order and
   checks that the stored dtype can hold them: none overflows, no column becomes constant.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorascope.activations.shards import Rows
from lorascope.errors import ConfigError, NumberError
from lorascope.runtime import is_out_of_memory
from lorascope.subject.hooks import RowReader
from lorascope.subject.intervene import adapter_off
from lorascope.subject.load import Subject
from lorascope.texts.roles import has_role
from lorascope.texts.rollouts import Rollout, windows

log = logging.getLogger(__name__)

_CPU_TOKENS = 2048
_PROBE_TOKENS = 1024
_LARGEST = 1 << 16  # tokens in a batch; a GPU gains nothing from more
_OVERHEAD = {"cpu": 16, "cuda": 512}  # cost of starting a batch, in tokens computed
_MOST_ROUNDED = 1e-3  # of a column's variance; an FVU is not known to more
_NOISE = 1e-5  # a column that varies less, relative to its size, is constant but for rounding
_LIKELIHOOD_TEXTS, _LIKELIHOOD_TOKENS = 8, 256
_MOST_DRIFT = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Piece:
    """Tokens `[start, stop)` of rollout `index` of several; rows from `keep` on are kept."""

    index: int
    start: int
    stop: int
    keep: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Pending:
    """A work unit that was run: `parts` are its rows on the host, once `event` has happened."""

    rollouts: Sequence[Rollout]
    parts: list[tuple[Piece, Tensor]]
    event: Any


class Capture:
    """Reads rows with an open `RowReader`, and keeps `columns` of them as `store_dtype`.

    `batch_tokens=None` uses what fits: measured on a GPU, 2,048 tokens on a CPU.
    """

    def __init__(
        self,
        reader: RowReader,
        columns: npt.NDArray[np.int64],
        *,
        store_dtype: str,
        batch_tokens: int | None,
        longest: int | None,
    ) -> None:
        self.reader, self.longest = reader, longest
        self.subject: Subject = reader.subject
        self.store_dtype = np.dtype(store_dtype)
        self.columns = torch.from_numpy(columns).to(self.subject.device)
        self.names = [self.subject.layout.column_names[i] for i in columns]
        self.batch_tokens = batch_tokens or self._fitting_tokens()
        # of each column, over the rows so far: sum, sum of squares, squared errors of rounding
        self._sums = np.zeros((3, len(self.names)))
        self._n_rows = 0

    def _fitting_tokens(self) -> int:
        """Return how many tokens of a batch fit into the device's free memory, with a reserve."""
        device = self.subject.device
        if device.type != "cuda":
            return _CPU_TOKENS
        ids = torch.zeros(1, min(_PROBE_TOKENS, self.longest or _PROBE_TOKENS), dtype=torch.int64)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.reader.read(ids)
        each = (torch.cuda.max_memory_allocated(device) - before) / ids.numel()
        free = torch.cuda.mem_get_info(device)[0]
        n = min(max(int(0.7 * free / max(each, 1)), _PROBE_TOKENS), _LARGEST)
        log.info(
            "batches of up to %d tokens: %.0f kB per token, %.1f GB free", n, each / 1e3, free / 1e9
        )
        return n

    def run(self, rollouts: Sequence[Rollout]) -> Pending:
        """Compute the rows of a work unit. Pass the result to `finish` to get them."""
        parts: list[tuple[Piece, Tensor]] = []
        for batch in self._batches(rollouts):
            parts += self._run_batch(batch, rollouts)
        event = None
        if self.subject.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return Pending(rollouts, parts, event)

    def _batches(self, rollouts: Sequence[Rollout]) -> list[list[Piece]]:
        """Return the pieces of rollouts in batches, each the longest first."""
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        overhead = _OVERHEAD.get(self.subject.device.type, _OVERHEAD["cuda"])
        return plan_pieces(
            lengths, self.longest, self.batch_tokens, overhead, self.subject.length_class
        )

    def _run_batch(
        self, batch: list[Piece], rollouts: Sequence[Rollout]
    ) -> list[tuple[Piece, Tensor]]:
        try:
            rows = self.reader.read(_padded(batch, rollouts))[..., self.columns]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return [
                (piece, self._to_host(rows[i, piece.keep - piece.start : len(piece)]))
                for i, piece in enumerate(batch)
            ]
        if self.subject.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            rollout = rollouts[batch[0].index]
            raise ConfigError(
                f"a rollout of {len(batch[0])} tokens (record {rollout.id}) does not fit into "
                "memory; lower --max-length, with --long-texts window to keep the rest of it"
            )
        self.batch_tokens = max(max(map(len, batch)) * len(batch) // 2, 1)
        log.warning("out of memory: batches of at most %d tokens from now on", self.batch_tokens)
        half = len(batch) // 2
        return self._run_batch(batch[:half], rollouts) + self._run_batch(batch[half:], rollouts)

    def _to_host(self, rows: Float[Tensor, "seq d_in"]) -> Float[Tensor, "seq d_in"]:
        if not rows.is_cuda:
            return rows.cpu()
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        return host.copy_(rows, non_blocking=True)

    def finish(self, pending: Pending) -> Rows:
        """Return the rows of a work unit, in the order of its rollouts, in the stored dtype.

        Raises NumberError with site, token and rollout if a value does not fit the stored dtype,
        or with the site if rounding removes what varies in a column. May run in a different thread
        than `run`.
        """
        if pending.event is not None:
            pending.event.synchronize()
        lengths = [len(rollout.token_ids) for rollout in pending.rollouts]
        ends = np.cumsum(lengths)
        out = np.empty((sum(lengths), len(self.names)), self.store_dtype)
        largest = float(np.finfo(out.dtype).max)
        while pending.parts:
            piece, tensor = pending.parts.pop(0)
            rows, rollout = tensor.numpy(), pending.rollouts[piece.index]
            if not (np.abs(rows) <= largest).all():  # false for NaN as well
                row, column = np.argwhere(~(np.abs(rows) <= largest))[0]
                raise NumberError(
                    f"site {self.names[column]} reads {rows[row, column]} at token "
                    f"{piece.keep + row} of rollout {rollout.id}, which {out.dtype} cannot hold; "
                    "use --store-dtype float32"
                )
            first = int(ends[piece.index]) - len(rollout.token_ids) + piece.keep
            stored = out[first : first + len(rows)]
            stored[:] = rows
            if out.dtype == np.float16:
                exact = rows.astype(np.float64)
                parts = exact, exact**2, (exact - stored) ** 2
                self._sums += np.stack([part.sum(0) for part in parts])
                self._n_rows += len(rows)
        self._require_precision()
        return out

    def _require_precision(self) -> None:
        """Raise NumberError if float16 loses more than a little of what varies in a column.

        It does where values are below its smallest number, 6e-8, or vary far less than their mean.
        """
        total, squares, rounded = self._sums
        spread = np.maximum(squares - total**2 / max(self._n_rows, 1), 0)
        lost = (rounded > _MOST_ROUNDED * spread) & (spread > _NOISE**2 * squares)
        if lost.any():
            column = int(lost.argmax())
            raise NumberError(
                f"float16 cannot hold {int(lost.sum())} of {len(lost)} columns: the values of "
                f"{self.names[column]}, {np.sqrt(squares[column] / self._n_rows):.2g} on average, "
                f"vary by {np.sqrt(spread[column] / self._n_rows):.2g} and lose "
                f"{np.sqrt(rounded[column] / self._n_rows):.2g} by rounding; use "
                "--store-dtype float32"
            )

    def check(self, rollout: Rollout) -> None:
        """Check that rows are reproducible and correct.

        Raises NumberError if a second run gives different rows. If the fast forward differs from
        PEFT's by more than rounding, warns and uses PEFT's forward from then on.
        """
        piece = Piece(0, 0, min(len(rollout.token_ids), self.longest or 1 << 62), 0)
        ids = _padded([piece], [rollout])
        first, second = self.reader.read(ids).cpu(), self.reader.read(ids).cpu()
        if not torch.equal(first.nan_to_num(), second.nan_to_num()):
            raise NumberError(
                "a second run of the same rollout gives different rows, expected the same: "
                "something in the model is random"
            )
        if self.reader.own_forward:
            self.reader.__exit__(None, None, None)
            with RowReader(self.subject, own_forward=False) as reference:
                third = reference.read(ids).cpu()
            drift = float((second - third).norm() / third.norm().clamp(min=1e-30))
            log.debug("rows differ from PEFT's forward by %.2g of their norm", drift)
            if drift > _MOST_DRIFT.get(self.subject.dtype, 0.1):
                log.warning("rows differ from PEFT's forward by %.2g: using PEFT's forward", drift)
                self.reader.own_forward = False
            self.reader.__enter__()

    def check_neighbours(self, rollouts: Sequence[Rollout]) -> None:
        """Check that rows do not depend on a longer text in the batch, or in the one before it.

        Runs two texts of different lengths that share a batch together, and the shorter one alone.
        Raises NumberError if the rows differ by more than rounding.
        """
        batches = self._batches(rollouts)
        widest = max(batches, key=lambda batch: len(batch[0]) - len(batch[-1]))
        long, short = widest[0], widest[-1]
        if len(long) == len(short):
            return
        alone = self.reader.read(_padded([short], rollouts))[0]
        beside = self.reader.read(_padded([long, short], rollouts))[1, : len(short)]
        after = self.reader.read(_padded([short], rollouts))[0]
        drift = max(float((rows - alone).norm() / alone.norm()) for rows in (beside, after))
        if drift > _MOST_DRIFT.get(self.subject.dtype, 0.1):
            raise NumberError(
                f"rows of a text of {len(short)} tokens change by {drift:.2g} of their norm next "
                f"to one of {len(long)}, expected rounding only; lorascope reads causal models only"
            )


@torch.inference_mode()
def compare_likelihood(subject: Subject, rollouts: Sequence[Rollout]) -> None:
    """Log how likely some texts are with the adapter and without; warn if it makes them less so.

    An adapter that was trained on another base, or on a base into which another adapter was merged,
    fits by its shapes, and does that. Reads the beginnings of a few short texts.
    """
    told = ("think", "answer", "text")
    masks = [has_role(rollout.roles[1:_LIKELIHOOD_TOKENS], told) for rollout in rollouts]
    order = sorted(range(len(rollouts)), key=lambda i: (len(rollouts[i].token_ids), i))
    measured: list[tuple[float, float, float]] = []  # nats with, nats without, KL
    for i in [i for i in order if masks[i].any()][:_LIKELIHOOD_TEXTS]:
        ids = torch.from_numpy(rollouts[i].token_ids[:_LIKELIHOOD_TOKENS].astype(np.int64))[None]
        ids, mask = ids.to(subject.device), torch.from_numpy(masks[i])
        with_adapter = _log_probabilities(subject, ids, mask)
        with adapter_off(subject):
            without = _log_probabilities(subject, ids, mask)
        target = ids[0, 1:].to(with_adapter.device)[mask.to(with_adapter.device), None]
        own, base = (-float(one.gather(1, target).mean()) for one in (with_adapter, without))
        kl = (with_adapter.exp() * (with_adapter - without)).nan_to_num(0.0).sum(1).mean()
        measured.append((own, base, float(kl)))
    if not measured:
        return
    values = np.array(measured)
    own, base, kl = values.mean(0)
    lost = values[:, 0] - values[:, 1]
    log.info(
        "%d texts: %.3f nats a token with the adapter, %.3f without; KL(adapter ‖ base) %.3g",
        len(values),
        own,
        base,
        kl,
    )
    if lost.mean() > 2 * lost.std() / math.sqrt(len(lost)):
        log.warning(
            "%s makes these texts less likely (%.3f nats a token, %.3f without it): check that %s "
            "is the base that it was trained on, and that such texts were too",
            subject.adapter.name,
            own,
            base,
            subject.base.name,
        )


def _log_probabilities(
    subject: Subject, ids: Int[Tensor, "1 tok"], mask: Bool[Tensor, "rest"]
) -> Float[Tensor, "told vocab"]:
    """Return the log-probabilities after the tokens before those of `mask`."""
    logits = subject.model(input_ids=ids, use_cache=False).logits[0, :-1]
    return logits[mask.to(logits.device)].float().log_softmax(-1)


def plan_pieces(
    lengths: Sequence[int],
    longest: int | None,
    batch_tokens: int,
    overhead: int,
    length_class: Callable[[int], int],
) -> list[list[Piece]]:
    """Cut rollouts into windows of at most `longest` tokens, and return these in batches."""
    pieces = [
        Piece(index, *window)
        for index, n in enumerate(lengths)
        for window in windows(n, longest or n)
    ]
    planned = plan_batches([len(piece) for piece in pieces], batch_tokens, overhead, length_class)
    return [[pieces[i] for i in batch] for batch in planned]


def plan_batches(
    lengths: Sequence[int],
    batch_tokens: int,
    overhead: int,
    length_class: Callable[[int], int] = lambda _: 0,
) -> list[list[int]]:
    """Return batches of indices into `lengths`, longest first, with the lowest total cost.

    A batch of n rollouts costs n times the longest length, plus `overhead`. The product is at most
    `batch_tokens`, unless the batch is a single rollout. All of a batch are of one class. Dynamic
    programming from the end finds the exact optimum among cuts of the sorted lengths, in quadratic
    time.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    n = len(order)
    best, step, stop = [0] * (n + 1), [0] * n, n
    classes = [length_class(lengths[i]) for i in order]
    for first in range(n - 1, -1, -1):
        longest = lengths[order[first]]
        if classes[first] != classes[stop - 1]:
            stop = first + 1
        fitting = max(1, min(batch_tokens // max(longest, 1), stop - first))
        best[first], step[first] = min(
            (longest * size + overhead + best[first + size], size) for size in range(1, fitting + 1)
        )
    batches, first = [], 0
    while first < n:
        batches.append(order[first : first + step[first]])
        first += step[first]
    return batches


def _padded(batch: Sequence[Piece], rollouts: Sequence[Rollout]) -> Tensor:
    ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    for i, piece in enumerate(batch):
        tokens = rollouts[piece.index].token_ids[piece.start : piece.stop]
        ids[i, : len(piece)] = torch.from_numpy(tokens.astype(np.int64))
    return ids
