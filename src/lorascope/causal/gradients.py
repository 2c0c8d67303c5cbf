"""Say how much each feature at each token contributed to one prediction, by gradients of the rows.

The rows of a text are held (written as given), so that a prediction `y` is a function of them:
`y(x)` is the adapter's, `y(0)` the base model's.

1. `Targets` are the predictions of some tokens, each as one number.
2. `mean_gradients` gives `G = ∫ ∇y(a·x) da` over `a` from 0 to 1, the gradient averaged along the
   straight line from no adapter to the adapter (integrated gradients: Sundararajan et al. 2017,
   section 3), by Gauss-Legendre quadrature. Then `Σ x·G = y(x) − y(0)` (their proposition 1), up to
   what the quadrature misses. `steps` 0 gives the gradient at the adapter's own rows instead,
   which says to first order what taking a little away there does.
3. `Share` parts `x·G`: a row is `Σ value · decoder row + bias + what the SAE leaves unexplained`,
   so each feature's part at each token is `value · (decoder row · G)`.

All features at all tokens come from one backward pass for each target and step.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lorascope.errors import NumberError
from lorascope.sae.model import SAE
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject

Kind = Literal["kl", "logprob", "logit-difference"]
_PAIRS = 1 << 18  # of a decoder row with a gradient, at a time


@dataclass(frozen=True)
class Targets:
    """Predictions of some tokens of one text: each is one number of its logits.

    `kl` is KL(prediction ‖ base) in nats, `logprob` the token's log-probability in nats,
    `logit-difference` its logit less that of the token that the base finds likeliest beside it.
    `places` are where the tokens stand, `base` the base model's log-probabilities of them.
    """

    kind: Kind
    places: Int[Tensor, "target"]
    tokens: Int[Tensor, "target"]
    base: Float[Tensor, "target vocab"]

    @classmethod
    def at(
        cls,
        kind: Kind,
        places: Int[Tensor, "target"],
        token_ids: Int[Tensor, "1 seq"],
        base_logits: Float[Tensor, "1 seq vocab"],
    ) -> "Targets":
        """Take the tokens at `places` (from 1) of a text, of which the base's logits are given."""
        places = places.to(base_logits.device)
        base = base_logits[0, places - 1].float().log_softmax(-1)
        return cls(kind, places, token_ids[0].to(places.device)[places], base)

    def __len__(self) -> int:
        return len(self.places)

    def split(self, size: int) -> Iterator["Targets"]:
        """Yield groups of at most `size`, the later tokens first."""
        order = self.places.argsort(descending=True, stable=True)
        for some in order.split(size):
            yield self.take(some)

    def take(self, some: Int[Tensor, "some"]) -> "Targets":
        """Return some of the targets."""
        return Targets(self.kind, self.places[some], self.tokens[some], self.base[some])

    def values(self, logits: Float[Tensor, "*copies target vocab"]) -> Tensor:
        """Return the number of each target, `(*copies, target)`, of the logits that predict it.

        A token that both models rule out (a logit of −inf) adds nothing to a KL. Raises NumberError
        where only the base rules one out: the KL is infinite.
        """
        tokens = self.tokens.expand(logits.shape[:-1])[..., None]
        if self.kind == "logit-difference":
            others = self.base.scatter(-1, self.tokens[:, None], -torch.inf).argmax(-1)
            other = others.expand(logits.shape[:-1])[..., None]
            return (logits.gather(-1, tokens) - logits.gather(-1, other))[..., 0].float()
        log_p = logits.float().log_softmax(-1)
        if self.kind == "logprob":
            return log_p.gather(-1, tokens)[..., 0]
        out = log_p == -torch.inf
        kl = (log_p.exp() * (log_p.masked_fill(out, 0) - self.base.masked_fill(out, 0))).sum(-1)
        if not torch.isfinite(kl).all():
            raise NumberError(
                "the base rules out a token that the adapter does not: KL is infinite"
            )
        return kl


@contextmanager
def no_weight_gradients(subject: Subject) -> Generator[None]:
    """Keep gradients to the rows: those of weights would take their memory again."""
    marks = [(parameter, parameter.requires_grad) for parameter in subject.model.parameters()]
    try:
        for parameter, _ in marks:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, mark in marks:
            parameter.requires_grad_(mark)


def mean_gradients(
    editor: RowEditor,
    token_ids: Int[Tensor, "1 seq"],
    rows: Float[Tensor, "seq d_in"],
    targets: Targets,
    steps: int,
) -> Float[Tensor, "target before d_in"]:
    """Return the gradient of each target with respect to the rows of the text, as the module says.

    The text is cut before the last target: `before` tokens are left. Each target has a copy of the
    text in the batch.
    """
    n = int(targets.places.max())
    copies = len(targets)
    ids, at = token_ids[:, :n].expand(copies, -1), torch.arange(copies)
    mean = torch.zeros(copies, n, rows.shape[1], device=rows.device)
    for a, weight in _nodes(steps):
        with torch.enable_grad():
            leaf = (a * rows[:n]).expand(copies, -1, -1).clone().requires_grad_()
            logits = editor.run(ids, lambda columns, _, leaf=leaf: leaf[..., columns]).logits
            y = targets.values(logits[at, targets.places - 1])
            mean += weight * torch.autograd.grad(y.sum(), leaf)[0]
    return mean


def _nodes(steps: int) -> list[tuple[float, float]]:
    """Return places on the line from 0 to 1 and their weights."""
    if not steps:
        return [(1.0, 1.0)]
    places, weights = np.polynomial.legendre.leggauss(steps)
    return [(float(a + 1) / 2, float(w) / 2) for a, w in zip(places, weights, strict=True)]


class Share:
    """The rows of one text as the SAE parts them, and the share of each part in a target.

    `eligible` marks the tokens that the SAE reads; the rows of the others stay whole, as `special`.
    Columns that it does not read are `other_columns`.
    """

    def __init__(
        self,
        sae: SAE,
        rows: Float[Tensor, "seq d_in"],
        columns: npt.NDArray[np.int64],
        eligible: npt.NDArray[np.bool_],
    ) -> None:
        self.sae, self.rows = sae, rows
        self.columns = torch.from_numpy(columns)
        self.eligible = torch.from_numpy(eligible)
        read = self.eligible.nonzero()[:, 0]
        mine = rows[:, self.columns].cpu()
        code = sae.encode(mine[read])
        counts = code.offsets.diff()
        self.place = read.repeat_interleave(counts)  # of each firing
        self.latent, self.value = code.latents, code.values
        self.rest = torch.zeros_like(mine)
        self.rest[read] = mine[read] - sae.decode(code)

    @property
    def fired(self) -> Int[Tensor, "fired"]:
        """Latents that fire anywhere in the text."""
        return self.latent.unique()

    def firings(
        self, gradient: Float[Tensor, "target before d_in"]
    ) -> Float[Tensor, "target firing"]:
        """Return the share of each firing, the places in the order of `place` and `latent`."""
        inside = gradient[:, :, self.columns].cpu()
        n = inside.shape[1]
        found = torch.zeros(len(inside), len(self.latent))
        for some in torch.arange(int((self.place < n).sum())).split(
            max(1, _PAIRS // self.sae.d_in)
        ):
            written = self.value[some, None] * self.sae.W_dec[self.latent[some]]
            found[:, some] = torch.einsum("tfc,fc->tf", inside[:, self.place[some]], written)
        return found

    def tokens(
        self, gradient: Float[Tensor, "target before d_in"]
    ) -> Float[Tensor, "target before"]:
        """Return the share of each token's whole row."""
        return (gradient * self.rows[: gradient.shape[1]]).sum(-1).cpu()

    def rests(self, gradient: Float[Tensor, "target before d_in"]) -> dict[str, Tensor]:
        """Return the shares of what is no feature, `(target,)` each, by name."""
        n = gradient.shape[1]
        inside, read = gradient[:, :, self.columns].cpu(), self.eligible[:n]
        shares = (inside * self.rows[:n, self.columns].cpu()).sum(-1)
        return {
            "bias": (inside[:, read] @ self.sae.b_dec).sum(-1),
            "unexplained": (inside[:, read] * self.rest[:n][read]).sum((1, 2)),
            "special": shares[:, ~read].sum(-1),
            "other_columns": (self.tokens(gradient) - shares).sum(-1),
        }
