"""Find the tokens of the vocabulary whose probability an adapter moves, and where.

KL(adapter ‖ base) of a prediction is a sum over the vocabulary of terms `p log(p/q) − p + q`, which
are all 0 or more (`effects.kl_divergence`). So the KL of all predictions divides exactly among
tokens: each term belongs to the token, to its *rise* (p > q) or its *fall*, and to the role of the
token that is predicted there. The strongest sums say what the adapter does to the output.

Differences of logits over unrelated text name a fine-tune's objective in most cases (Minder et al.
2025, arXiv 2510.13900); KL weighs a difference by how much it matters.
"""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope.causal.report_records import ShiftExample, TokenBefore, TokenShift
from lorascope.texts.roles import ROLES
from lorascope.texts.tokens import token_bytes

if TYPE_CHECKING:
    from lorascope.causal.held_out import HeldOut

N_SHIFTS = 40
_N_OF_ROLE = 4  # rises of each role that are kept in any case
_N_LARGEST = 3  # terms of a prediction that are kept one by one
_N_AFTER = 12  # tokens before a shift
_MIN_AFTER = 0.01  # share of it
_CONTEXT = 24  # tokens before an example
_CHUNK = 1 << 22  # logits at a time
_SIDES = ("rises", "falls")


class ShiftAccumulator:
    """Sums of KL terms: `sums` is `(side, role, vocab)`, in nats.

    `best_row` has the row with the largest term of each, -1 for none; ties go to the lower row.
    For each prediction, the tokens of the largest terms of each side are kept, with its row.
    """

    def __init__(self) -> None:
        self._begin(0)
        self._largest: list[tuple[int, int, *tuple[npt.NDArray[Any], ...]]] = []

    def _begin(self, n_vocab: int) -> None:
        shape = (len(_SIDES), len(ROLES), n_vocab)
        self.sums = np.zeros(shape)
        self._n = np.zeros(shape, np.int64)  # predictions in which the term is most of the side
        self._p = np.zeros((2, *shape))  # sums of the base's and the adapter's p times the term
        self._best = np.zeros(shape)
        self.best_row = np.full(shape, -1)
        self._at_best = np.zeros((2, *shape), np.float32)

    @property
    def total(self) -> float:
        """KL(adapter ‖ base), summed over all predictions, in nats."""
        return float(self.sums.sum())

    def add(
        self,
        log_p: Float[Tensor, "token vocab"],
        log_q: Float[Tensor, "token vocab"],
        rows: npt.NDArray[np.int64],
        roles: npt.NDArray[np.uint8],
    ) -> None:
        """Add predictions of the adapter and the base, made at `rows`, of tokens with `roles`."""
        if not self.sums.shape[-1]:
            self._begin(log_p.shape[-1])
        step = max(1, _CHUNK // log_p.shape[-1])
        for role in np.unique(roles).tolist():
            for where in np.array_split(
                np.flatnonzero(roles == role), -(-int((roles == role).sum()) // step)
            ):
                index = torch.from_numpy(where).to(log_p.device)
                p, q = (side[index].double().exp() for side in (log_p, log_q))
                terms = torch.where(p > 0, p * (log_p[index] - log_q[index]), 0.0) - p + q
                terms = terms.clamp(min=0)
                for side, has in enumerate((p > q, p < q)):
                    self._add_side(side, role, torch.where(has, terms, 0.0), p, q, rows[where])

    def _add_side(
        self, side: int, role: int, terms: Tensor, p: Tensor, q: Tensor, rows: npt.NDArray[np.int64]
    ) -> None:
        self.sums[side, role] += terms.sum(0).cpu().numpy()
        most = terms > 0.5 * terms.sum(1, keepdim=True)
        self._n[side, role] += most.sum(0).cpu().numpy()
        for which, probability in enumerate((q, p)):
            self._p[which, side, role] += (terms * probability).sum(0).cpu().numpy()
        largest, tokens = (
            part.cpu().numpy() for part in terms.topk(min(_N_LARGEST, terms.shape[1]))
        )
        self._largest.append((side, role, rows, tokens, largest))
        best, at = terms.max(0)
        best, at = best.cpu().numpy(), at.cpu().numpy()
        before, row = self._best[side, role], self.best_row[side, role]
        better = np.flatnonzero(
            (best > before) | ((best == before) & (best > 0) & (rows[at] < row))
        )
        self._best[side, role, better] = best[better]
        self.best_row[side, role, better] = rows[at[better]]
        for which, probability in enumerate((q, p)):
            values = probability.cpu().numpy()
            self._at_best[which, side, role, better] = values[at[better], better]

    def strongest(self, held_out: "HeldOut", n: int = N_SHIFTS) -> tuple[TokenShift, ...]:
        """Return the `n` largest sums, largest first; a token has one for each side and role.

        The largest rises of each role are among them.
        """
        total = self.total
        order = np.argsort(-self.sums, axis=None, kind="stable")
        side, role, _ = np.unravel_index(order, self.sums.shape)
        by_role = [np.flatnonzero((side == 0) & (role == one)) for one in range(len(ROLES))]
        chosen = np.unique(
            np.concatenate([np.arange(len(order))[:n], *(i[:_N_OF_ROLE] for i in by_role)])
        )
        kept = [i for i in order[chosen].tolist() if self.sums.flat[i] > 0]
        spelled = token_bytes(held_out.subject.tokenizer, self.sums.shape[-1])
        store = held_out.store
        text = store.vocabulary.text

        def after(side: int, role: int, token_id: int) -> tuple[TokenBefore, ...]:
            weights: Counter[int] = Counter()
            for of_side, of_role, rows, tokens, terms in self._largest:
                if (of_side, of_role) == (side, role):
                    at, column = np.nonzero(tokens == token_id)
                    before = store.token_ids[rows[at]].tolist()
                    for one, term in zip(before, terms[at, column].tolist(), strict=True):
                        weights[one] += term
            whole = float(self.sums[side, role, token_id])
            return tuple(
                TokenBefore(token=text([one]), share=weight / whole)
                for one, weight in weights.most_common(_N_AFTER)
                if weight >= _MIN_AFTER * whole
            )

        found: list[TokenShift] = []
        for flat in kept:
            at = side, role, token_id = tuple(
                int(i) for i in np.unravel_index(flat, self.sums.shape)
            )
            row = int(self.best_row[at])
            rollout = int(store.rollout_of(np.array([row]))[0])
            first = int(store.rollout_start[rollout])
            context = slice(max(first, row + 1 - _CONTEXT), row + 1)
            found.append(
                TokenShift(
                    token_id=token_id,
                    token=spelled[token_id].decode(errors="replace"),
                    side="falls" if side else "rises",
                    role=ROLES[role],
                    share=float(self.sums[at] / total),
                    n_main=int(self._n[at]),
                    p_base=float(self._p[0][at] / self.sums[at]),
                    p_adapter=float(self._p[1][at] / self.sums[at]),
                    example=ShiftExample(
                        row=row,
                        rollout=int(store.rollout_id[rollout]),
                        position=row - first,
                        before=text(store.token_ids[context]),
                        actual=text([store.token_ids[row + 1]]),
                        p_base=float(self._at_best[0][at]),
                        p_adapter=float(self._at_best[1][at]),
                    ),
                    after=after(side, role, token_id),
                )
            )
        return tuple(found)
