"""Run the adapter's rollouts with other rows written at every site, and compare the predictions.

Rows are *held*: each site gets the row that is written, whatever it would read. In the **open
loop** the SAE reads the rows of the adapter's own run. In the **closed loop** it reads the rows of
the run that it is part of. A code needs all sites of a token, but the sites run one after the
other, so the loop is closed by passes:

1. Pass 1 is the open loop.
2. Pass n writes the reconstruction of the rows that the sites of pass n − 1 read: what `A·x` gave
   there, in answer to the rows that were written before.

If the passes settled, the rows that are encoded would be those of the run itself. `change` says how
far they are from that.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from torch import Tensor

from lorascope.causal.effects import Values, kl_and_loss, log_probabilities, select_measured
from lorascope.causal.held_out import Batch
from lorascope.subject.intervene import RowEditor

PASSES = 3  # of the closed loop, the open one included


class Compared(NamedTuple):
    """KL to the adapter and CE of each measured token of a run, in nats."""

    kl: Values
    ce: Values


class SplicedBatch:
    """One batch of the adapter's run, and runs of the same batch with other rows.

    `x` are the adapter's rows in the given columns, `(batch, seq, d_in)`; `read` those in all
    columns. Columns that are not given keep the adapter's rows.
    """

    def __init__(self, editor: RowEditor, batch: Batch, columns: npt.NDArray[np.int64]) -> None:
        out = editor.run(batch.token_ids)
        self._editor, self._batch, self._columns = editor, batch, columns
        self.read, self.x = out.rows, out.rows[..., columns]
        self.log_p = log_probabilities(select_measured(out.logits, batch.mask))
        self._targets = batch.targets[batch.mask].to(self.log_p.device)

    def adapter(self) -> Compared:
        """Return what the adapter's run gives: KL is 0."""
        loss = -self.log_p.gather(-1, self._targets[:, None])[:, 0].cpu().numpy()
        return Compared(np.zeros_like(loss), loss)

    def base(self) -> Compared:
        """Return what the base model gives."""
        return self._compared(self._editor.base(self._batch.token_ids))

    def written(self, rows: Float[Tensor, "batch seq d_in"]) -> Compared:
        """Return what a run gives in which `rows` are written."""
        return self._compared(self.run(rows)[0])

    def closed_loop(
        self,
        rebuild: Callable[[Tensor], Tensor],
        first: Float[Tensor, "batch seq d_in"],
        scale: Float[Tensor, "d_in"],
    ) -> tuple[Compared, Compared, tuple[float, float]]:
        """Return what the open and the closed loop give, and the change of the last pass.

        `first` are the rows that the open loop writes, `rebuild(x)`. The change is `Σ‖after −
        before‖²` and `Σ‖before‖²` of the rows that were read, columns times `scale`.
        """
        logits, rows = self.run(first)
        opened = self._compared(logits)
        before = self.x
        for _ in range(PASSES - 1):
            before = rows
            logits, rows = self.run(rebuild(before))
        own = self._batch.own.to(rows.device)
        step, size = (
            ((part * scale)[own]).double().square().sum() for part in (rows - before, before)
        )
        return opened, self._compared(logits), (float(step), float(size))

    def run(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Run the batch with `rows` written; return the logits and the rows that were read."""
        whole = self.read.clone()
        whole[..., self._columns] = rows
        out = self._editor.run(self._batch.token_ids, lambda here, _: whole[..., here])
        return out.logits, out.rows[..., self._columns]

    def _compared(self, logits: Tensor) -> Compared:
        kl, ce = kl_and_loss(self.log_p, select_measured(logits, self._batch.mask), self._targets)
        return Compared(kl.cpu().numpy(), ce.cpu().numpy())
