"""The operations for the CPU mean what the plain ones do, whatever the guess and the size."""

import math

import pytest
import torch
from builders import definitions
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.kernels import cpu
from lorascope.sae.sparsity import Rule


def scores_of(rows, latents, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-levels, levels + 1, (rows, latents), generator=generator).float()


SIZES = {
    "rows": st.integers(0, 7),
    "latents": st.integers(1, 17),
    "levels": st.integers(1, 50),
    "seed": st.integers(0, 1000),
}
GUESSES = st.sampled_from([None, 0.0, 0.4, 3.0, 60.0])


@settings(max_examples=150, deadline=None)
@given(k=st.floats(0, 9, allow_nan=False), guess=GUESSES, **SIZES)
def test_the_best_of_a_batch_are_those_of_a_stable_sort(rows, latents, k, levels, seed, guess):
    scores = scores_of(rows, latents, levels, seed)
    n = round(k * rows)
    best = cpu.best_indices(scores, n, guess=guess)
    assert torch.equal(best.indices, definitions.best_indices(scores, n))
    assert torch.equal(best.values, scores.flatten()[best.indices])


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0.01, 1, allow_nan=False), **SIZES)
def test_the_best_of_rows_are_those_of_a_stable_sort(rows, latents, share, levels, seed):
    scores = scores_of(rows, latents, levels, seed)
    k = math.ceil(share * latents)
    best = cpu.best_of_rows(scores, k)
    expected = definitions.choose(scores, Rule("topk", k), by_row=True).flatten().nonzero()[:, 0]
    assert torch.equal(best.indices, expected)
    assert torch.equal(best.values, scores.flatten()[expected])


@pytest.mark.parametrize("shape", [(1024, 448), (333, 1001), (64, 4096)])
@pytest.mark.parametrize(
    "kind", ["normal", "one latent", "one row", "levels", "rising", "negative"]
)
def test_neither_guesses_nor_parts_change_a_choice_of_a_large_batch(shape, kind):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator)
    if kind == "one latent":
        scores[:, 1:] -= 9
    elif kind == "one row":
        scores[1:] -= 9
    elif kind == "levels":
        scores = scores.round()
    elif kind == "rising":
        scores = torch.arange(scores.numel()).float().view(shape)
    elif kind == "negative":
        scores -= 4
    for k in (0.37, 5, 40):
        n = round(k * shape[0])
        expected = definitions.best_indices(scores, n)
        guess = None
        for _ in range(2):
            best = cpu.best_indices(scores, n, guess=guess)
            assert torch.equal(best.indices, expected)
            guess = best.guess
        rows = cpu.best_of_rows(scores, math.ceil(k))
        kept = definitions.choose(scores, Rule("topk", math.ceil(k)), by_row=True)
        assert torch.equal(rows.indices, kept.flatten().nonzero()[:, 0])
        assert torch.equal(rows.values, scores[kept])


def test_of_equal_scores_the_lower_index_is_kept():
    assert cpu.best_indices(torch.ones(4, 5), 6).indices.tolist() == [0, 1, 2, 3, 4, 5]
    rows = cpu.best_of_rows(torch.ones(2, 5), 3)
    assert rows.indices.tolist() == [0, 1, 2, 5, 6, 7]


def test_only_positive_scores_are_kept_when_there_are_too_few():
    scores = torch.tensor([[-1.0, 2.0, 0.0], [-3.0, -1.0, 0.5]])
    assert cpu.best_indices(scores, 6).indices.tolist() == [1, 5]
    assert cpu.best_of_rows(scores, 3).indices.tolist() == [1, 5]


def test_what_is_above_a_bound_of_each_latent():
    scores, bound = scores_of(9, 24, 6, 0), scores_of(1, 24, 4, 2)[0]
    best = cpu.indices_above(scores, bound)
    assert torch.equal(best.indices, (scores > bound).flatten().nonzero()[:, 0])
    assert torch.equal(best.values, scores[scores > bound])


@settings(max_examples=40, deadline=None)
@given(
    n_pairs=st.integers(0, 60),
    n_rows=st.integers(1, 9),
    n_latents=st.integers(1, 33),
    d=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_sums_and_products_of_pairs_and_their_gradients(n_pairs, n_rows, n_latents, d, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(n_rows, (n_pairs,), generator=generator).sort().values
    latents = torch.randint(n_latents, (n_pairs,), generator=generator)
    values = torch.randn(n_pairs, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(n_latents, d, generator=generator, dtype=torch.float64, requires_grad=True)
    out = torch.randn(n_rows, d, generator=generator, dtype=torch.float64)
    offsets = cpu.row_offsets(rows, n_rows)
    expected = definitions.gather_sum(values, latents, offsets, table)
    expected.backward(out)
    with torch.no_grad():
        assert torch.allclose(cpu.gather_sum(values, latents, offsets, table), expected)
        to_values = cpu.pair_dot(out, rows, table, latents)
        assert torch.allclose(to_values, values.grad)
        assert torch.allclose(to_values, definitions.pair_dot(out, rows, table, latents))
        order, starts = cpu.by_latent(latents, n_latents)
        assert torch.equal(latents[order], latents.sort(stable=True).values)
        assert torch.equal(order, latents.argsort(stable=True))
        to_table = cpu.gather_sum(values[order], rows[order], starts, out)
        assert torch.allclose(to_table, table.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_product_leaves_the_setting_as_it_was(dtype):
    x, weight = torch.randn(33, 20, dtype=dtype), torch.randn(65, 20, dtype=dtype)
    before = torch.backends.mkldnn.matmul.fp32_precision
    out = torch.empty(33, 65, dtype=dtype)
    assert cpu.product(x, weight, out) is out
    exact = x.double() @ weight.double().T
    limit = 1e-5 if dtype != torch.bfloat16 else 2e-2
    assert (out.double() - exact).abs().max() < limit * exact.abs().max()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
