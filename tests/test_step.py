"""The step by pairs gives the gradients of the definition, in float64."""

import pytest
import torch
from builders.definitions import objective
from builders.saes import weights_of

from lorascope.sae.sparsity import Rule
from lorascope.sae.step import Step
from lorascope.sae.team import Team


def both(
    rule: Rule,
    batch: int,
    *,
    by_row=False,
    n_dead=0,
    k_aux=3,
    d_in=7,
    d_sae=24,
    seed=1,
    static=False,
):
    """Return the loss and gradients by definition and by the step."""
    jump = rule.architecture == "jumprelu"
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator, dtype=torch.float64)
    dead = torch.arange(d_sae) < n_dead
    plain, fast = weights_of(d_in, d_sae, jump=jump), weights_of(d_in, d_sae, jump=jump)
    loss = objective(plain, x, rule, dead, k_aux=k_aux, auxk_alpha=0.7, by_row=by_row)
    loss.total.backward()
    step = Step(rule, k_aux=k_aux, auxk_alpha=0.7, team=Team(), static=static)
    for _ in range(2):  # the second time with the first one's guess
        taken = step.take(fast, x, dead, by_row=by_row)
    return (loss, plain), (taken, fast)


def assert_equal_steps(expected, found) -> None:
    (loss, plain), (taken, fast) = expected, found
    assert taken.fvu.item() == pytest.approx(loss.fvu.item(), rel=1e-12)
    assert taken.auxk.item() == pytest.approx(loss.auxk.item(), rel=1e-12)
    assert taken.l0.item() == pytest.approx(loss.l0.item(), rel=1e-6)
    assert torch.equal(taken.fired, loss.fired)
    for name, tensor in plain.tensors().items():
        grad = fast.tensors()[name].grad
        assert grad.shape == tensor.shape
        assert torch.allclose(grad, tensor.grad, rtol=1e-9, atol=1e-13), name


@pytest.mark.parametrize("k", [0.5, 2.0, 3.4])
@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "matryoshka"])
def test_gradients_by_pairs_are_those_of_the_definition(architecture, k):
    rule = Rule(architecture, k)
    for batch in (2, 5, 16):
        assert_equal_steps(*both(rule, batch))
        assert_equal_steps(*both(rule, batch, n_dead=9))
        assert_equal_steps(*both(rule, batch, by_row=True, n_dead=2))


@pytest.mark.parametrize("k_aux", [1, 3, 100])
@pytest.mark.parametrize("n_dead", [0, 1, 9, 24])
def test_aux_k_by_pairs_of_a_fixed_number_is_that_of_the_definition(n_dead, k_aux):
    for batch in (2, 5, 16):
        rule = Rule("topk", 2.0)
        assert_equal_steps(*both(rule, batch, n_dead=n_dead, k_aux=k_aux, static=True))


@pytest.mark.parametrize("n_dead", [0, 9])
def test_learned_thresholds_get_the_gradients_of_the_definition(n_dead):
    rule = Rule("jumprelu", 2.0)
    for seed in range(5):
        assert_equal_steps(*both(rule, 33, n_dead=n_dead, seed=seed))


@pytest.mark.parametrize(("batch", "d_in", "d_sae"), [(3, 2, 1), (17, 5, 64), (64, 33, 101)])
def test_ugly_sizes(batch, d_in, d_sae):
    for architecture in ("batchtopk", "topk", "matryoshka", "jumprelu"):
        rule = Rule(architecture, min(4, d_sae))
        assert_equal_steps(*both(rule, batch, d_in=d_in, d_sae=d_sae, n_dead=d_sae // 2))


def test_a_batch_in_which_nothing_fires_has_finite_gradients():
    weights = weights_of(dtype=torch.float32)
    with torch.no_grad():
        weights.b_enc.fill_(-1e6)
    step = Step(Rule("batchtopk", 2), k_aux=3, auxk_alpha=1 / 32, team=Team())
    loss = step.take(weights, torch.randn(8, 7), torch.zeros(24, dtype=torch.bool))
    assert loss.l0 == 0
    assert not loss.fired.any()
    assert all(torch.isfinite(t.grad).all() for t in weights.tensors().values())
