"""The state of a training run: weights, moments, counters, and how a step changes them.

1. In the first half of a run every row gets its own best latents, whatever the rule; then the rule
   takes over. If latents were chosen over the batch from the start, rows with large values would
   take most of them while the dictionary is still poor, and fewer directions would be found
   (`docs/training.md`).
2. `step.py` computes the gradients.
3. Adam updates the weights. Its rate rises over the first steps and then falls linearly to zero.
4. Decoder rows are scaled back to unit norm.

On CUDA a step is recorded as a graph: one launch instead of a hundred. This has not run on a GPU
yet.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Bool, Float
from safetensors import safe_open
from torch import Tensor

from lorascope import kernels
from lorascope.artifact import replacing
from lorascope.errors import ArtifactError, NumberError
from lorascope.sae.objective import Loss, Weights, aux_latents
from lorascope.sae.sparsity import Rule
from lorascope.sae.step import Step
from lorascope.sae.team import Team

log = logging.getLogger(__name__)

_LOG_POINTS = 200  # lines of the training log
_BETAS = (0.9, 0.99)
_WARMUP = 100  # steps over which the rate rises, at most a tenth of all steps
_MEMORY = 0.98  # decay of the running means in the progress bar and the log
_BY_ROW = 0.5  # share of the steps in which each row gets its own best latents
_EAGER_STEPS = 3  # steps of a kind before it is recorded as a CUDA graph


class Trainer:
    """One SAE in training."""

    def __init__(
        self,
        weights: Weights,
        *,
        k: float,
        n_steps: int,
        lr: float,
        architecture: str = "batchtopk",
        dead_after: int = 100_000,
        auxk_alpha: float = 1 / 8,
        device: torch.device | None = None,
        team: Team | None = None,
    ) -> None:
        self.rule = Rule(architecture, k)
        self.n_steps, self.lr, self.dead_after = n_steps, lr, dead_after
        self.warmup = min(_WARMUP, n_steps // 10)
        self.team = team or Team()
        device = device or torch.device("cpu")
        on_device = {
            name: tensor.detach().to(device).requires_grad_()
            for name, tensor in weights.tensors().items()
        }
        self.weights = Weights(**on_device)
        on_cuda = device.type == "cuda"
        self._rate: float | Tensor = torch.tensor(lr, device=device) if on_cuda else lr
        # Adam needs contiguous tensors, so it sees W_enc transposed
        self._flat = {name: tensor.detach() for name, tensor in on_device.items()}
        self._flat["W_enc"] = self._flat["W_enc"].T
        self._moments = {
            "step": [torch.zeros((), device=device) for _ in self._flat],
            "exp_avg": [torch.zeros_like(tensor) for tensor in self._flat.values()],
            "exp_avg_sq": [torch.zeros_like(tensor) for tensor in self._flat.values()],
        }
        static = on_cuda and architecture != "jumprelu" and self.team.world == 1
        k_aux = aux_latents(weights.b_dec.numel())
        self._step = Step(self.rule, k_aux, auxk_alpha, self.team, static=static)
        self._by_row_steps = _BY_ROW * n_steps
        self._graphs = _StepGraphs(self._update) if static else None
        self.step = 0
        self.log_every = max(n_steps // _LOG_POINTS, 1)
        self.log: list[dict[str, float]] = []
        self.silent_tokens = torch.zeros(weights.b_enc.numel(), dtype=torch.int64, device=device)
        self.running = torch.zeros(3, device=device)  # weighted sums of fvu, l0 and auxk

    @property
    def dead(self) -> Bool[Tensor, "latent"]:
        """Mask of latents that have not fired for more than `dead_after` tokens."""
        return self.silent_tokens > self.dead_after

    def take(self, x: Float[Tensor, "batch d_in"]) -> Loss:
        """Train one step on a batch of scaled rows, or on this process's part of it."""
        if self.step == 0 and self.weights.log_threshold is not None:
            self._first_threshold(x)
        by_row = self.rule.architecture != "jumprelu" and self.step < self._by_row_steps
        rate = self.lr * schedule(self.step, self.n_steps, self.warmup)
        if isinstance(self._rate, Tensor):
            self._rate.fill_(rate)  # a graph reads it
        else:
            self._rate = rate
        loss = (self._graphs.take if self._graphs else self._update)(x, by_row)
        self.step += 1
        if self.step % self.log_every == 0 or self.step == self.n_steps:
            self.log.append({"step": self.step, **self.means()})
        return loss

    def _update(self, x: Float[Tensor, "batch d_in"], by_row: bool) -> Loss:
        """Do the part of a step that happens on the device."""
        loss = self._step.take(self.weights, x, self.dead, by_row=by_row)
        with torch.no_grad():
            self._move()
            W_dec = self.weights.W_dec
            torch.nn.functional.normalize(W_dec, dim=1, out=W_dec)
            self.silent_tokens += self.team.share(len(x))[1]
            self.silent_tokens.masked_fill_(loss.fired, 0)
            new = torch.stack([loss.fvu, loss.l0, loss.auxk])
            self.running.mul_(_MEMORY).add_(new, alpha=1 - _MEMORY)
        return loss

    def _move(self) -> None:
        """Take Adam's step, as `torch.optim.Adam` does, which takes two seconds to import."""
        grads: dict[str, Any] = {name: w.grad for name, w in self.weights.tensors().items()}
        grads["W_enc"] = grads["W_enc"].T
        steps, first, second = self._moments.values()
        torch.ops.aten._foreach_add_(steps, 1)
        torch.ops.aten._fused_adam_(
            *(list(self._flat.values()), list(grads.values()), first, second, [], steps),
            lr=self._rate,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    @torch.no_grad()
    def _first_threshold(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Set learned thresholds so that `k` latents per row fire in the first batch."""
        weights = self.weights
        pre = (x - weights.b_dec) @ weights.W_enc + weights.b_enc
        n = round(self.rule.k * self.team.share(len(x))[1])
        best = torch.cat(self.team.gather(kernels.for_device(x.device).best_indices(pre, n).values))
        best = best.topk(min(n, len(best))).values
        best = best[best > 0]
        lowest = best[-1] if len(best) else pre.new_ones(())
        assert weights.log_threshold is not None
        weights.log_threshold.fill_(lowest.log())

    def means(self) -> dict[str, float]:
        """Return running means over about 50 steps, and the share of dead latents.

        Raises NumberError if the loss is not finite.
        """
        weight = 1 - _MEMORY**self.step  # the mean starts at 0
        fvu, l0, auxk = (self.running / max(weight, 1e-9)).tolist()
        if not math.isfinite(fvu):
            raise NumberError(
                f"the loss is {fvu} at step {self.step} with --lr {self.lr:g}; use a lower --lr"
            )
        values = {
            "fvu": fvu,
            "l0": l0,
            "auxk": auxk,
            "dead": float(self.dead.float().mean()),
            "lr": self.lr * schedule(self.step, self.n_steps, self.warmup),
        }
        return {name: float(f"{value:.6g}") for name, value in values.items()}

    def summary(self) -> str:
        """Return the running means for the progress bar."""
        means = self.means()
        return f"FVU {means['fvu']:.4f}, L0 {means['l0']:.1f}, dead {means['dead']:.1%}"

    def release(self) -> None:
        """Free the gradients and Adam's moments, three quarters of the memory, after the end."""
        self._moments.clear()
        for tensor in self.weights.tensors().values():
            tensor.grad = None

    def _state(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name, to be read or changed."""
        tensors = {name: tensor.detach() for name, tensor in self.weights.tensors().items()}
        for key, moments in self._moments.items():
            tensors |= {
                f"adam.{key}.{name}": m for name, m in zip(self._flat, moments, strict=True)
            }
        return {**tensors, "silent_tokens": self.silent_tokens, "running": self.running}

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on, atomically."""
        state = json.dumps({"step": self.step, "log": self.log})
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in self._state().items()}
        with replacing(path) as partial:
            safetensors.torch.save_file(on_cpu, partial, metadata={"state": state})

    def restore(self, path: Path) -> None:
        """Resume from a checkpoint if there is one.

        Raises ArtifactError if it is damaged, or belongs to another run.
        """
        if not path.exists():
            return
        try:
            with safe_open(path, framework="pt") as file:
                state = json.loads(file.metadata()["state"])
                self.step, self.log = state["step"], state["log"]
                for name, tensor in self._state().items():
                    saved = file.get_tensor(name)
                    if saved.shape != tensor.shape:
                        raise ValueError(f"{name} has another shape")
                    tensor.copy_(saved)
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            RuntimeError,
            safetensors.SafetensorError,
        ) as error:
            raise ArtifactError(
                f"cannot resume from {path} ({str(error).splitlines()[0]}); "
                "give --no-resume to start again"
            ) from error
        log.info("resuming from step %d of %d", self.step, self.n_steps)

    def agree(self) -> None:
        """Copy the state of rank 0, which alone reads a checkpoint, to all ranks."""
        if self.team.world == 1:
            return
        step = torch.tensor([self.step], device=self.silent_tokens.device)
        self.step = int(self.team.broadcast(step))
        for tensor in self._state().values() if self.step else ():
            self.team.broadcast(tensor)


def schedule(step: int, n_steps: int, warmup: int) -> float:
    """Return the factor of the learning rate: it rises over `warmup` steps, then falls to zero."""
    rising = (step + 1) / (warmup + 1)
    falling = (n_steps - step) / max(n_steps - warmup, 1)
    return max(min(rising, falling, 1.0), 0.0)


class _StepGraphs:
    """Runs steps `update(x, by_row)`; from the fourth of a kind on by replaying its CUDA graph.

    A step can be recorded because its shapes are static and nothing in it waits for the device
    (`Step.static`). The first steps of each kind run eagerly: they compile the kernels and create
    the state of the optimiser.
    """

    def __init__(self, update: Callable[[Tensor, bool], Loss]) -> None:
        self._update = update
        self._n_steps: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Loss]] = {}

    def take(self, x: Tensor, by_row: bool) -> Loss:
        """Run one step; the next step of this kind overwrites the tensors of the loss."""
        kind = (by_row, x.shape)
        self._n_steps[kind] += 1
        if self._n_steps[kind] <= _EAGER_STEPS:
            return self._update(x, by_row)
        if kind not in self._graphs:
            graph, static_x = torch.cuda.CUDAGraph(), x.clone()
            with torch.cuda.graph(graph):
                loss = self._update(static_x, by_row)
            self._graphs = {kind: (graph, static_x, loss)}  # an earlier kind does not come again
        graph, static_x, loss = self._graphs[kind]
        static_x.copy_(x, non_blocking=True)
        graph.replay()
        return loss
