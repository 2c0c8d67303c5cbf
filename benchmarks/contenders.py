"""Trainers that take the same rows: ours, four libraries', and the published loop.

Each is a function `(rows, setting) -> Run`. `rows` are the training rows in float32, `run.step(x)`
trains on one batch, and `run.finish()` returns the SAE with the code that its users read it with.
The libraries train with their own classes, losses and optimisers:

- `sae_lens`: `SAETrainer.step` on a `BatchTopKTrainingSAE`, saved and loaded as its JumpReLU SAE.
- `dictionary_learning`: `BatchTopKTrainer.update`, then its threshold.
- `sparsify`: its trainer needs a language model, so we write the loop around `SparseCoder` (TopK,
  aux-k) from its description: mean of the first batch as bias, Adam with linear decay.
  `sparsify-signum` uses its default optimiser instead.
- `overcomplete`: `train_sae` on a `BatchTopKSAE`, one batch per call.
- `published`: our own writing of the published loop from its description: BatchTopK over scores
  times decoder norms without a ReLU, Adam after a warm-up, no unit norms, no threshold (codes
  depend on the batch), and an auxiliary loss in which dead latents encode the residual, not
  detached. Where the description is silent, the decoder starts as the encoder's transpose, losses
  are sums over columns and means over rows, and half as many dead latents as columns take part.

What differs from their defaults: `dead_after` is 100,000 tokens for all (the libraries use 1 to 10
million); warm-ups take at most a tenth of the run; sparsify's aux-k has weight 1/32 (off by
default); dictionary_learning's threshold starts at half of the run (by default after 1,000 steps,
more than short runs have). SAELens and dictionary_learning keep their rate constant unless `decay`
is set: then it falls to zero over the last fifth, by their own options. overcomplete has a plain
squared error and no aux-k.
"""

import math
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from planted_rows import column_deviation
from torch import Tensor

from lorascope.sae.objective import initial_weights
from lorascope.sae.sparsity import calibrate_threshold
from lorascope.sae.train import auto_lr
from lorascope.sae.trainer import Trainer

_SAMPLE = 32_768  # training rows for first weights and for the threshold
_AUX = 1 / 32


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is given."""

    d_sae: int
    k: int
    batch: int
    n_steps: int
    lr: float | None  # None: what the library chooses by itself; not all do
    device: str = "cpu"
    dead_after: int = 100_000
    bf16: bool = False
    decay: bool = False
    seed: int = 0


class Coder(NamedTuple):
    """A trained SAE for rows of the kind that it was trained on."""

    W_dec: Tensor  # (latent, d_in)
    code: Callable[[Tensor], Tensor]  # (batch, d_in) to (batch, latent), dense
    decode: Callable[[Tensor], Tensor]
    l0: float  # while training
    dead: float = math.nan  # share silent for the last `dead_after` training tokens, where counted


class Run(NamedTuple):
    """A training run."""

    step: Callable[[Tensor], Any]
    finish: Callable[[], Coder]


def lorascope(rows: Tensor, s: Setting, scale: Tensor | None = None) -> Run:
    """Return a run of this project's trainer, which divides columns by their deviation.

    `scale`, float64 `(d_in,)`, multiplies columns instead.
    """
    scale = 1 / column_deviation(rows) if scale is None else scale
    here = scale.float().to(s.device)
    sample = rows[:: max(len(rows) // max(_SAMPLE, s.d_sae), 1)]
    weights = initial_weights(
        sample * scale.float(), s.d_sae, torch.Generator().manual_seed(s.seed)
    )
    trainer = Trainer(
        weights,
        k=s.k,
        n_steps=s.n_steps,
        lr=s.lr or auto_lr(rows.shape[1], s.n_steps),
        dead_after=s.dead_after,
        device=torch.device(s.device),
    )

    def finish() -> Coder:
        raw = trainer.weights.folded(scale.to(s.device), torch.zeros_like(scale).to(s.device))

        def scores(x: Tensor) -> Tensor:
            return (x @ raw["W_enc"] + raw["b_enc"]).relu()

        threshold = calibrate_threshold(
            lambda: (scores(x.to(s.device)) for x in sample.split(s.batch)), s.k
        )
        return Coder(
            raw["W_dec"],
            lambda x: torch.nn.functional.threshold(scores(x), threshold, 0.0),
            lambda code: code @ raw["W_dec"] + raw["b_dec"],
            trainer.means()["l0"],
            trainer.means()["dead"],
        )

    return Run(lambda x: trainer.take(x * here), finish)


def published(rows: Tensor, s: Setting) -> Run:
    """Return a run of the published loop."""
    d_in = rows.shape[1]
    W_enc = torch.empty(s.d_sae, d_in)
    torch.nn.init.kaiming_uniform_(W_enc, a=math.sqrt(5))
    first = [W_enc, torch.zeros(s.d_sae), W_enc.clone(), torch.zeros(d_in)]
    W_enc, b_enc, W_dec, b_dec = weights = [t.to(s.device).requires_grad_() for t in first]
    adam = torch.optim.Adam(weights, lr=s.lr or 5e-4)
    warm = _warm_up(100, s)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: min((i + 1) / max(warm, 1), 1.0))
    silent = torch.zeros(s.d_sae, dtype=torch.int64, device=s.device)

    def code(x: Tensor) -> Tensor:
        pre = (x - b_dec) @ W_enc.T + b_enc
        best = (pre * W_dec.norm(dim=1)).flatten().topk(s.k * len(x)).indices
        return torch.zeros_like(pre).flatten().scatter(0, best, pre.flatten()[best]).view_as(pre)

    def step(x: Tensor) -> None:
        values = code(x)
        residual = x - (values @ W_dec + b_dec)
        loss = residual.square().sum(1).mean()
        dead = (silent > s.dead_after).nonzero()[:, 0]
        if len(dead):
            pre = residual @ W_enc[dead].T + b_enc[dead]
            best = pre.topk(min(d_in // 2, len(dead)), dim=1)
            theirs = torch.zeros_like(pre).scatter(1, best.indices, best.values)
            loss = loss + _AUX * (residual - theirs @ W_dec[dead]).square().sum(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
        silent.add_(len(x)).masked_fill_((values.detach() != 0).any(0), 0)

    def finish() -> Coder:
        dead = float((silent > s.dead_after).float().mean())
        return Coder(W_dec.detach(), code, lambda z: z @ W_dec + b_dec, float(s.k), dead)

    return Run(step, finish)


def sae_lens(rows: Tensor, s: Setting) -> Run:
    """Return a run of SAELens."""
    library = import_module("sae_lens")
    config = library.BatchTopKTrainingSAEConfig(
        d_in=rows.shape[1], d_sae=s.d_sae, k=float(s.k), dtype="float32", device=s.device
    )
    sae = library.BatchTopKTrainingSAE(config)
    lr = s.lr or 3e-4
    trainer = library.SAETrainer(
        cfg=import_module("sae_lens.config").SAETrainerConfig(
            total_training_samples=s.n_steps * s.batch,
            train_batch_size_samples=s.batch,
            lr=lr,
            lr_end=lr / 10,
            lr_decay_steps=s.n_steps // 5 if s.decay else 0,
            device=s.device,
            autocast=s.bf16,
            dead_feature_window=s.dead_after // s.batch,
        ),
        sae=sae,
        data_provider=iter(()),
    )

    def step(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    def finish() -> Coder:
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            loaded = library.SAE.load_from_disk(folder, device=s.device)
        dead = float(trainer.dead_neurons.float().mean())
        return Coder(loaded.W_dec.detach(), loaded.encode, loaded.decode, float(s.k), dead)

    return Run(step, finish)


def dictionary_learning(rows: Tensor, s: Setting) -> Run:
    """Return a run of dictionary_learning; bfloat16 is autocast, which it does on CUDA only."""
    trainer = import_module("dictionary_learning.trainers.batch_top_k").BatchTopKTrainer(
        steps=s.n_steps,
        activation_dim=rows.shape[1],
        dict_size=s.d_sae,
        k=s.k,
        layer=0,
        lm_name="planted",
        lr=s.lr,
        warmup_steps=_warm_up(1000, s),
        decay_start=s.n_steps * 4 // 5 if s.decay else None,
        threshold_start_step=s.n_steps // 2,
        seed=s.seed,
        device=s.device,
    )
    trainer.dead_feature_threshold = s.dead_after
    done = 0

    def step(x: Tensor) -> None:
        nonlocal done
        with torch.autocast(x.device.type, torch.bfloat16) if s.bf16 else nullcontext():
            trainer.update(done, x)
        done += 1

    def finish() -> Coder:
        ae = trainer.ae
        return Coder(ae.decoder.weight.detach().T, ae.encode, ae.decode, float(s.k))

    return Run(step, finish)


def sparsify(rows: Tensor, s: Setting, *, signum: bool = False) -> Run:
    """Return a run of sparsify's TopK SAE; on CUDA its forward is in bfloat16 by itself."""
    if s.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it takes an installed one for a GPU
    library = import_module("sparsify")
    config = library.SparseCoderConfig(num_latents=s.d_sae, k=s.k)
    sae = library.SparseCoder(rows.shape[1], config, device=s.device, dtype=torch.float32)
    scheduler: Any = None
    optimizer: Any
    if signum:
        wrapper = import_module("schedulefree").ScheduleFreeWrapper
        lr = s.lr or 5e-3 / (s.d_sae / 2**14) ** 0.5
        sign = import_module("sparsify.sign_sgd").SignSGD(sae.parameters(), lr=lr)
        optimizer = wrapper(sign, momentum=0.95)
        optimizer.train()
    else:
        lr = s.lr or 2e-4 / (s.d_sae / 2**14) ** 0.5
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
        linear = import_module("transformers").get_linear_schedule_with_warmup
        scheduler = linear(optimizer, _warm_up(1000, s), s.n_steps)
    silent = torch.zeros(s.d_sae, dtype=torch.int64, device=s.device)
    begun = False

    def step(x: Tensor) -> None:
        nonlocal begun
        if not begun:
            sae.b_dec.data = x.mean(0)
            begun = True
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=silent > s.dead_after)
        (out.fvu + _AUX * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        silent.add_(len(x))
        silent[out.latent_indices.flatten()] = 0

    def code(x: Tensor) -> Tensor:
        values, latents, _ = sae.encode(x)
        return x.new_zeros(len(x), s.d_sae).scatter(1, latents, values.to(x))

    def decode(dense: Tensor) -> Tensor:
        best = dense.topk(s.k, dim=1, sorted=False)
        return sae.decode(best.values, best.indices)

    def finish() -> Coder:
        if signum:
            optimizer.eval()  # the averaged weights
        dead = float((silent > s.dead_after).float().mean())
        return Coder(sae.W_dec.detach(), code, decode, float(s.k), dead)

    return Run(step, finish)


def sparsify_signum(rows: Tensor, s: Setting) -> Run:
    """Return a run of sparsify with its default optimiser."""
    return sparsify(rows, s, signum=True)


def overcomplete(rows: Tensor, s: Setting) -> Run:
    """Return a run of overcomplete."""
    library = _overcomplete()
    sae = library.BatchTopKSAE(rows.shape[1], s.d_sae, top_k=s.k * s.batch, device=s.device)
    adam = torch.optim.Adam(sae.parameters(), lr=s.lr or 5e-4)

    def squared(x: Tensor, x_hat: Tensor, *_rest: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def step(x: Tensor) -> None:
        library.train_sae(
            sae, [x], squared, adam, nb_epochs=1, monitoring=0, device=torch.device(s.device)
        )

    def finish() -> Coder:
        sae.eval()
        return Coder(
            sae.get_dictionary().detach(), lambda x: sae.encode(x)[1], sae.decode, float(s.k)
        )

    return Run(step, finish)


def _overcomplete() -> ModuleType:
    """Return `overcomplete.sae` without the vision models that the package imports at its top."""
    if "overcomplete" not in sys.modules and (spec := find_spec("overcomplete")):
        package = ModuleType("overcomplete")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["overcomplete"] = package
    return import_module("overcomplete.sae")


def _warm_up(default: int, s: Setting) -> int:
    return min(default, s.n_steps // 10)


CONTENDERS: dict[str, Callable[[Tensor, Setting], Run]] = {
    "lorascope": lorascope,
    "published": published,
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "sparsify-signum": sparsify_signum,
    "overcomplete": overcomplete,
}
BF16 = ("sae_lens", "dictionary_learning")


def package(name: str) -> str | None:
    """Return the package that a contender needs and that is not installed, else None."""
    needed = name.split("-", maxsplit=1)[0]
    if needed in ("lorascope", "published") or find_spec(needed):
        return None
    return needed
