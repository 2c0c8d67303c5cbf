import subprocess
import sys

import numpy as np
import pytest
import torch
from builders.definitions import objective

from lorascope.errors import ArtifactError, NumberError
from lorascope.sae.metrics import ColumnMoments
from lorascope.sae.objective import AUX_ROWS, Weights, column_scale, initial_weights
from lorascope.sae.sparsity import Rule
from lorascope.sae.trainer import Trainer, schedule

AUX = {"k_aux": 3, "auxk_alpha": 1 / 32}


def weights_of(d_in=7, d_sae=20, seed=0, dtype=torch.float64) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    tensors = {
        name: torch.randn(*shape, generator=generator, dtype=dtype)
        for name, shape in shapes.items()
    }
    tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
    return Weights(**{name: tensor.requires_grad_() for name, tensor in tensors.items()})


def by_definition(w: Weights, x, k, dead, k_aux, alpha):
    """The loss written with loops over rows and latents."""
    n, d_sae = len(x), len(w.b_enc)
    pre = [[(x[i] - w.b_dec) @ w.W_enc[:, j] + w.b_enc[j] for j in range(d_sae)] for i in range(n)]
    value = [[p if p > 0 else p * 0 for p in row] for row in pre]
    score = {(i, j): float(value[i][j].detach()) for i in range(n) for j in range(d_sae)}
    kept = sorted(score, key=lambda place: (-score[place], place))[: round(k * n)]
    mean = x.mean(0)
    error, spread, aux = 0.0, 0.0, 0.0
    for i in range(n):
        x_hat = w.b_dec + sum(value[i][j] * w.W_dec[j] for j in range(d_sae) if (i, j) in kept)
        residual = x[i] - x_hat
        error = error + (residual**2).sum()
        spread = spread + ((x[i] - mean) ** 2).sum()
        if i % AUX_ROWS:
            continue
        share = n / len(range(0, n, AUX_ROWS))
        chosen = sorted((j for j in range(d_sae) if dead[j]), key=lambda j: -pre[i][j].item())
        e_hat = sum(pre[i][j] * w.W_dec[j] for j in chosen[:k_aux])
        aux = aux + share * ((residual.detach() - e_hat) ** 2).sum()
    return (error + alpha * aux) / spread


@pytest.mark.parametrize("k", [0.5, 2.0, 3.4])
def test_loss_and_gradients_are_those_of_the_definition_in_float64(k):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dead = torch.arange(20) % 3 == 0
    ours, reference = weights_of(), weights_of()
    loss = objective(ours, x, Rule("batchtopk", k), dead, **AUX)
    loss.total.backward()
    expected = by_definition(reference, x, k, dead, 3, 1 / 32)
    expected.backward()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, tensor in ours.tensors().items():
        assert torch.allclose(tensor.grad, reference.tensors()[name].grad, rtol=1e-9, atol=1e-12)


def test_aux_k_moves_dead_latents_only():
    weights = weights_of()
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dead = torch.arange(20) < 6
    with_aux = torch.autograd.grad(
        objective(weights, x, Rule("batchtopk", 2), dead, k_aux=3, auxk_alpha=1.0).total,
        [weights.W_dec],
    )[0]
    without = torch.autograd.grad(
        objective(weights, x, Rule("batchtopk", 2), dead, k_aux=3, auxk_alpha=0.0).total,
        [weights.W_dec],
    )[0]
    moved = (with_aux - without).norm(dim=1) > 1e-12
    assert moved[:6].any()
    assert not moved[6:].any()


def test_nothing_dead_and_a_constant_batch_give_finite_losses():
    weights = weights_of(dtype=torch.float32)
    alive, dead = torch.zeros(20, dtype=torch.bool), torch.ones(20, dtype=torch.bool)
    assert (
        float(objective(weights, torch.randn(4, 7), Rule("batchtopk", 2), alive, **AUX).auxk) == 0.0
    )
    with torch.no_grad():
        for tensor in weights.tensors().values():
            tensor.zero_()
    loss = objective(weights, torch.zeros(4, 7), Rule("batchtopk", 2), dead, **AUX)
    loss.total.backward()
    assert loss.total.item() == 0.0


def test_decoder_rows_keep_unit_norm_so_that_the_value_is_the_score():
    trainer = Trainer(weights_of(dtype=torch.float32), k=2, n_steps=5, lr=1e-1)
    for _ in range(5):
        trainer.take(torch.randn(16, 7))
    norm = trainer.weights.W_dec.norm(dim=1)
    assert torch.allclose(norm, torch.ones(20), atol=1e-6)


def test_a_step_of_adam_is_that_of_torch_to_the_bit():
    trainer = Trainer(weights_of(dtype=torch.float32), k=2, n_steps=9, lr=0.1)
    theirs = {name: tensor.clone() for name, tensor in trainer._flat.items()}
    adam = torch.optim.Adam(theirs.values(), lr=0.1, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name, tensor in trainer.weights.tensors().items():
            tensor.grad = torch.randn(tensor.shape, generator=generator)
            theirs[name].grad = tensor.grad.T if name == "W_enc" else tensor.grad
        with torch.no_grad():
            trainer._move()
        adam.step()
        assert all(torch.equal(theirs[name], tensor) for name, tensor in trainer._flat.items())


def test_training_does_not_import_a_compiler_which_takes_seconds():
    code = (
        "import sys, torch\nfrom lorascope.sae.objective import initial_weights\n"
        "from lorascope.sae.trainer import Trainer\nx = torch.eye(8)\n"
        "trainer = Trainer(initial_weights(x, 9, torch.Generator()), k=2, n_steps=3, lr=0.1)\n"
        "trainer.take(x)\nassert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def planted(n: int, n_directions: int, d_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two random directions each, on average, and the directions."""
    generator = torch.Generator().manual_seed(7)
    directions = torch.nn.functional.normalize(
        torch.randn(n_directions, d_in, generator=generator), dim=1
    )
    fires = torch.rand(n, n_directions, generator=generator) < 2 / n_directions
    x = (fires * (0.5 + torch.rand(n, n_directions, generator=generator))) @ directions
    return x, directions


def trained(weights: Weights, x: torch.Tensor, n_steps: int, **options) -> Trainer:
    trainer = Trainer(weights, n_steps=n_steps, **options)
    for i in range(n_steps):
        trainer.take(x[torch.arange(i * 256, (i + 1) * 256) % len(x)])
    return trainer


@pytest.mark.slow
def test_training_finds_planted_directions():
    """Share with cosine > 0.9, as the mean cosine is high for raw data already."""
    x, directions = planted(16_384, 32, 16)

    def found(rows: torch.Tensor) -> float:
        rows = torch.nn.functional.normalize(rows, dim=1)
        return float(((directions @ rows.T).amax(1) > 0.9).float().mean())

    weights = initial_weights(x, 64, torch.Generator().manual_seed(0))
    assert found(weights.W_dec.detach()) < 0.4
    trainer = trained(weights, x, 500, k=2, lr=1e-2, dead_after=5_000)
    assert found(trainer.weights.W_dec.detach()) > 0.8
    assert trainer.means()["fvu"] < 0.15


@pytest.mark.slow
def test_aux_k_brings_dead_latents_back():
    """The planted directions need them: 8 latents cannot hold 32 directions."""
    x, _ = planted(8192, 32, 16)
    dead, error = {}, {}
    for alpha in (0.0, 1 / 32):
        weights = initial_weights(x, 32, torch.Generator().manual_seed(0))
        with torch.no_grad():
            weights.b_enc[8:] = -0.5  # these start too low to be chosen
        options = {"k": 2, "lr": 1e-2, "dead_after": 2_000, "auxk_alpha": alpha}
        trainer = trained(weights, x, 300, **options)
        dead[alpha] = int(trainer.dead.sum())
        error[alpha] = trainer.means()["fvu"]
    assert dead[1 / 32] < dead[0.0] / 2
    assert error[1 / 32] < error[0.0]


def test_dead_is_counted_in_tokens():
    trainer = Trainer(weights_of(dtype=torch.float32), k=0.01, n_steps=10, lr=1e-9, dead_after=250)
    x = torch.randn(100, 7, generator=torch.Generator().manual_seed(0))
    counts = [int((trainer.take(x), trainer.dead.sum())[1]) for _ in range(3)]
    assert counts == [0, 0, 19]  # one place for a hundred rows: one latent keeps firing


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = Trainer(weights_of(dtype=torch.float32), k=2, n_steps=300, lr=1e30)
    with pytest.raises(NumberError, match="lower --lr"):
        for _ in range(300):
            trainer.take(torch.randn(8, 7))


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [schedule(step, 100, 10) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == 0.0
    assert schedule(0, 1, 0) == 1.0


@pytest.mark.parametrize("normalize", ["std", "none"])
def test_columns_over_four_orders_of_magnitude_get_mean_variance_1(normalize):
    rows = torch.randn(500, 14, generator=torch.Generator().manual_seed(0)) + 0.5
    rows = rows * torch.logspace(-2, 2, 14)
    rows[:, 3], rows[:, 5] = 0.0, 8.0
    moments = ColumnMoments.from_blocks([rows])
    scale = column_scale(normalize, moments)
    assert scale[3] == scale[5] == 0.0
    used = scale > 0
    variance = (scale * moments.std) ** 2
    assert variance[used].mean() == pytest.approx(1.0)
    if normalize == "std":
        assert np.allclose(variance[used], 1.0)
    if normalize == "none":
        assert np.ptp(scale[used]) == 0.0


def test_std_does_not_see_how_a_and_b_share_their_size():
    rows = torch.randn(300, 14, generator=torch.Generator().manual_seed(0))
    factor = np.logspace(-2, 2, 14)
    before = column_scale("std", ColumnMoments.from_blocks([rows]))
    moments = ColumnMoments.from_blocks([(rows.double() * torch.from_numpy(factor)).float()])
    after = column_scale("std", moments)
    assert np.allclose(before, after * factor, rtol=1e-5)


def test_the_first_tokens_of_texts_do_not_set_the_scale():
    rows = torch.randn(300, 14, generator=torch.Generator().manual_seed(0))
    rows[:, 5] = 2.0  # constant but for the sink
    typical = ColumnMoments.from_blocks([rows])
    sink = torch.full((3, 14), -250.0)
    everything = typical.merge(ColumnMoments.from_blocks([sink]))
    scale = column_scale("std", everything, typical)
    usual = np.arange(14) != 5
    ratio = scale[usual] / column_scale("std", typical)[usual]
    assert np.allclose(ratio, ratio[0])
    assert scale[5] == pytest.approx(scale[0] * typical.std[0] / everything.std[5])
    assert column_scale("std", everything)[0] < 0.1 * scale[0]


def test_a_store_whose_columns_are_all_constant_is_refused():
    with pytest.raises(ArtifactError, match="every column of the store is constant"):
        column_scale("std", ColumnMoments.from_blocks([torch.ones(9, 7)]))


def test_folded_weights_give_the_same_reconstruction_of_raw_rows():
    weights = weights_of(dtype=torch.float32)
    scale = torch.tensor([1e-3, 0.1, 0.0, 5.0, 100.0, 1.0, 0.5], dtype=torch.float64)
    mean = torch.arange(7, dtype=torch.float64)
    raw = torch.randn(30, 7, dtype=torch.float64) / scale.clamp(min=1e-3)
    raw[:, 2] = 2.0  # the constant column
    seen = raw * scale
    w = {name: tensor.detach().double() for name, tensor in weights.tensors().items()}
    active = ((seen - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    x_hat = active @ w["W_dec"] + w["b_dec"]
    folded = {k: v.double() for k, v in weights.folded(scale, mean).items()}
    code = (raw @ folded["W_enc"] + folded["b_enc"]).relu()
    assert torch.allclose(code, active * w["W_dec"].norm(dim=1), rtol=1e-4, atol=1e-4)
    made = code @ folded["W_dec"] + folded["b_dec"]
    used = scale > 0
    assert torch.allclose(made[:, used] * scale[used], x_hat[:, used], rtol=1e-4, atol=1e-4)
    assert (made[:, 2] == 2.0).all()
    norms = (folded["W_dec"] * scale).norm(dim=1)
    expected = w["W_dec"][:, used].norm(dim=1) / w["W_dec"].norm(dim=1)
    assert torch.allclose(norms, expected, rtol=1e-5)
