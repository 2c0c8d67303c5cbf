"""Compute how much each feature at each token contributed to a prediction, by gradients of rows.

The rows of a rollout are held (written as given), so that a prediction `y` is a function of them:
`y(x)` is the adapter's, `y(0)` the base model's.

1. `Targets` are the predictions of some tokens, each as one number.
2. `path_gradients` returns `G = ∫ ∇y(a·x) da` over `a` from 0 to 1: the gradient averaged along the
   straight line from no adapter to the adapter (integrated gradients: Sundararajan et al. 2017,
   section 3), by Gauss-Legendre quadrature. Then `Σ x·G = y(x) − y(0)` (their proposition 1), up to
   the error of the quadrature. It returns the gradient at the adapter's own rows too, which gives
   the effect of a small removal.
3. `RowDecomposition` splits `x·G`: a row is `Σ value · decoder row + bias + unexplained`, so the
   contribution of a feature at a token is `value · (decoder row · G)`.

One backward pass for each target gives all features at all tokens, at all points of a batch. Where
the activations of one text are more than fit, the backward pass computes them again, layer by
layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lorascope.causal.report_records import TargetKind
from lorascope.errors import NumberError
from lorascope.sae.model import SAE
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject

_CHUNK = 1 << 18  # products of a decoder row and a gradient at a time
_GRAPH_BYTES = (1 << 28, 1 << 33)  # of activations for a backward pass, on the CPU and on a GPU
_SEEDS = (1.0, 2.0**60)  # a backward pass begins with it, on a GPU and on the CPU
_HALF_SEEDS = (2.0**16, 2.0**8, 1.0)  # in float16; to be tried in this order
_KEPT_WIDTHS = 36  # of the residual stream that a layer keeps of each token; MLPs are 3 wide


@dataclass(frozen=True)
class Targets:
    """The predictions of some tokens of one rollout, each as one number of its logits.

    `kl` is KL(prediction ‖ base) in nats, `logprob` the token's log-probability in nats,
    `logit-difference` its logit minus that of the base's likeliest other token. `positions` are
    the tokens' positions, `base` the base model's log-probabilities there.
    """

    kind: TargetKind
    positions: Int[Tensor, "target"]
    tokens: Int[Tensor, "target"]
    base: Float[Tensor, "target vocab"]

    @classmethod
    def at(
        cls,
        kind: TargetKind,
        positions: Int[Tensor, "target"],
        token_ids: Int[Tensor, "1 seq"],
        base_logits: Float[Tensor, "1 seq vocab"],
    ) -> "Targets":
        """Return the targets at `positions` (from 1), given the base's logits of the rollout."""
        positions = positions.to(base_logits.device)
        base = base_logits[0, positions - 1].float().log_softmax(-1)
        return cls(kind, positions, token_ids[0].to(positions.device)[positions], base)

    def __len__(self) -> int:
        return len(self.positions)

    def groups(self) -> Iterator["Targets"]:
        """Yield groups for `path_gradients`, later tokens first.

        A group costs a forward pass, and a backward pass for each target, over the tokens up to its
        last target. The groups are those of least cost.
        """
        order = self.positions.argsort(descending=True, stable=True)
        last = self.positions[order].tolist()
        costs, begins = [0], [0]  # of the first i targets; where the last group of these begins
        for i in range(1, len(last) + 1):
            cost, begin = min((costs[j] + (1 + i - j) * last[j], j) for j in range(i))
            costs.append(cost)
            begins.append(begin)
        ends = [len(last)] if last else []
        while ends and ends[-1]:
            ends.append(begins[ends[-1]])
        for end, begin in reversed(list(pairwise(ends))):
            yield self.take(order[begin:end])

    def take(self, indices: Int[Tensor, "index"]) -> "Targets":
        """Return the targets with these indices."""
        return Targets(self.kind, self.positions[indices], self.tokens[indices], self.base[indices])

    def values(self, logits: Float[Tensor, "*copies target vocab"]) -> Tensor:
        """Return the number of each target, `(*copies, target)`, from the logits that predict it.

        A token that both models rule out (a logit of −inf) adds nothing to a KL. Raises NumberError
        if only the base rules one out, because the KL is then infinite.
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
                "KL is infinite: the base gives a token probability 0, the adapter does not; use "
                "--target logprob"
            )
        return kl


def input_gradients(
    subject: Subject, y: Float[Tensor, ""], inputs: Sequence[Tensor], *, keep_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradient of a number by each input of the subject's run, such as held rows.

    The backward pass is that of `y` times a power of two. A CPU is slow with numbers below 1e-38,
    of which sharp attention makes many: there `2⁶⁰·y` is up to a third faster. float16 loses
    numbers below 6e-8, so there it is the largest of `_HALF_SEEDS` that lets nothing overflow.
    """
    seeds = (
        _HALF_SEEDS if subject.dtype == torch.float16 else (_SEEDS[subject.device.type == "cpu"],)
    )
    found: tuple[Tensor, ...] = ()
    for seed in seeds:
        kept = keep_graph or seed != seeds[-1]
        found = torch.autograd.grad(y, inputs, torch.full_like(y, seed), retain_graph=kept)
        found = tuple(gradient.float() / seed for gradient in found)
        if all(bool(gradient.isfinite().all()) for gradient in found):
            break
    return found


def path_gradients(
    editor: RowEditor,
    token_ids: Int[Tensor, "1 seq"],
    rows: Float[Tensor, "seq d_in"],
    targets: Targets,
    steps: int,
    kept_tokens: int,
) -> Float[Tensor, "2 target before d_in"]:
    """Return the gradient of each target by the rows: the mean over the path, and at its end.

    The mean is over `steps` points; the end are the adapter's own rows. The `before` tokens are
    those before the last target. As many points share a batch as keep the activations of at most
    `kept_tokens` tokens. If a single point has more tokens, its activations are computed again in
    the backward passes.
    """
    n, n_targets = int(targets.positions.max()), len(targets)
    points, weights = np.polynomial.legendre.leggauss(steps)
    path = np.stack([(points + 1) / 2, weights / 2], axis=1).tolist()
    nodes = torch.tensor([*path, (1.0, 0.0)], device=rows.device)
    found = torch.zeros(2, n_targets, n, rows.shape[1], device=rows.device)
    for part in nodes.tensor_split(-(-len(nodes) // max(1, kept_tokens // n))):
        points, weights = part.T
        with torch.enable_grad():
            leaf = (points[:, None, None] * rows[:n]).requires_grad_()
            ids = token_ids[:, :n].expand(len(leaf), -1)
            at = targets.positions - 1
            logits = editor.run(ids, held=leaf, logits_at=at, lean=n > kept_tokens).logits
            y = targets.values(logits).sum(0)
            for i in range(n_targets):
                (gradient,) = input_gradients(
                    editor.subject, y[i], [leaf], keep_graph=i + 1 < n_targets
                )
                found[0, i] += torch.einsum("p,pnd->nd", weights, gradient)
                found[1, i] = gradient[-1]  # the last part's last point is the adapter
    return found


def fitting_graph(subject: Subject) -> int:
    """Return the activations of how many tokens to keep at once for a backward pass, nearly."""
    config = subject.causal.config.get_text_config()
    values = _KEPT_WIDTHS * config.hidden_size * config.num_hidden_layers
    size = _GRAPH_BYTES[subject.device.type == "cuda"]
    return max(1, size // (values * subject.dtype.itemsize))


class RowDecomposition:
    """The rows of one rollout, split by the SAE, and the contribution of each part to a target.

    A firing is one latent at one token: `latent`, `position` and `value` have an entry for each.
    `read` marks the tokens that the SAE reads; the rows of the others are not split and count as
    `special`. Columns that the SAE does not read are `other_columns`.
    """

    def __init__(
        self,
        sae: SAE,
        rows: Float[Tensor, "seq d_in"],
        columns: npt.NDArray[np.int64],
        read: Bool[Tensor, "seq"],
    ) -> None:
        self.sae, self.rows = sae, rows
        self.columns = torch.from_numpy(columns)
        self.read = read
        at = read.nonzero()[:, 0]
        sae_rows = rows[:, self.columns].cpu()
        code = sae.encode(sae_rows[at])
        counts = code.offsets.diff()
        self.position = at.repeat_interleave(counts)
        self.latent, self.value = code.latents, code.values
        self.unexplained = torch.zeros_like(sae_rows)
        self.unexplained[at] = sae_rows[at] - sae.decode(code)

    @property
    def fired(self) -> Int[Tensor, "fired"]:
        """Latents that fire anywhere in the rollout."""
        return self.latent.unique()

    def firing_contributions(
        self, gradient: Float[Tensor, "target before d_in"]
    ) -> Float[Tensor, "target firing"]:
        """Return the contribution of each firing, in their order."""
        inside = gradient[:, :, self.columns].cpu()
        n = inside.shape[1]
        contributions = torch.zeros(len(inside), len(self.latent))
        n_before = int((self.position < n).sum())  # firings are in the order of positions
        for chunk in torch.arange(n_before).split(max(1, _CHUNK // self.sae.d_in)):
            written = self.value[chunk, None] * self.sae.W_dec[self.latent[chunk]]
            contributions[:, chunk] = torch.einsum(
                "tfc,fc->tf", inside[:, self.position[chunk]], written
            )
        return contributions

    def row_contributions(
        self, gradient: Float[Tensor, "target before d_in"]
    ) -> Float[Tensor, "target before"]:
        """Return the contribution of each token's whole row."""
        return (gradient * self.rows[: gradient.shape[1]]).sum(-1).cpu()

    def other_contributions(
        self, gradient: Float[Tensor, "target before d_in"]
    ) -> dict[str, Tensor]:
        """Return the contributions of all parts that are no features, `(target,)` each, by name."""
        n = gradient.shape[1]
        inside, read = gradient[:, :, self.columns].cpu(), self.read[:n]
        by_token = (inside * self.rows[:n, self.columns].cpu()).sum(-1)
        return {
            "bias": (inside[:, read] @ self.sae.b_dec).sum(-1),
            "unexplained": (inside[:, read] * self.unexplained[:n][read]).sum((1, 2)),
            "special": by_token[:, ~read].sum(-1),
            "other_columns": (self.row_contributions(gradient) - by_token).sum(-1),
        }
