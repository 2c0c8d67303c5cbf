import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.subject.bottlenecks import svd_gauge, unmix

D_X, D_Y = 12, 9


def factors(rank, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, D_X, generator=generator, dtype=torch.float64)
    b = torch.randn(D_Y, rank, generator=generator, dtype=torch.float64)
    return a, b, torch.randn(50, D_X, generator=generator, dtype=torch.float64)


def well_conditioned(rank, seed):
    """Make a random invertible matrix whose singular values lie between 0.3 and 3."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(made)
    values = 0.3 + 2.7 * torch.rand(rank, generator=generator, dtype=torch.float64)
    return u @ torch.diag(values) @ vh


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6), st.sampled_from([0.5, 16.0, -2.0]))
def test_rows_do_not_depend_on_the_factors_that_an_update_is_written_in(rank, seed, scale):
    # pitfall 24, B5
    a, b, x = factors(rank, seed)
    m = well_conditioned(rank, seed + 1)
    mix, s = svd_gauge(a, b, scale)
    other_mix, other_s = svd_gauge(m @ a, b @ torch.linalg.inv(m), scale)
    rows, others = x @ a.T @ mix.T, x @ (m @ a).T @ other_mix.T
    torch.testing.assert_close(s, other_s, rtol=1e-9, atol=1e-9)
    gaps = torch.diff(torch.cat([s, s.new_zeros(1)])).abs()
    clear = torch.minimum(gaps, torch.cat([s.new_ones(1) * 1e9, gaps[:-1]])) > 1e-3 * s[0]
    torch.testing.assert_close(rows[:, clear], others[:, clear], rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_what_the_columns_write_is_the_update_in_falling_size(rank, seed):
    a, b, x = factors(rank, seed)
    scale = 3.0
    mix, s = svd_gauge(a, b, scale)
    h = x @ a.T
    rows = h @ mix.T
    b_gauge = b @ unmix(mix)
    update = scale * h @ b.T
    torch.testing.assert_close(scale * rows @ b_gauge.T, update, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(scale * b_gauge.norm(dim=0), s, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(rows @ unmix(mix).T, h, rtol=1e-8, atol=1e-8)
    assert torch.equal(s, s.sort(descending=True).values)
    assert s.square().sum().sqrt() == pytest.approx((scale * b @ a).norm().item())
    v = mix @ a  # the right singular vectors themselves
    torch.testing.assert_close(v @ v.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-8)
    assert (v.gather(1, v.abs().argmax(dim=1)[:, None]) > 0).all()


def test_two_entries_of_one_size_let_the_first_decide_the_sign():
    a = torch.tensor([[0.0, -2.0, 2.0]])
    mix, _ = svd_gauge(a, torch.ones(4, 1), 1.0)
    assert (mix @ a.double())[0, 1] > 0
    mix, _ = svd_gauge(a.flip(1), torch.ones(4, 1), 1.0)
    assert (mix @ a.flip(1).double())[0, 0] > 0


def test_directions_that_write_nothing_have_zeros():
    a, b, x = factors(4, 0)
    b[:, 3] = b[:, 2]
    a[3] = -a[2]  # what the third writes, the fourth takes back: rank 2 is left
    mix, s = svd_gauge(a, b, 2.0)
    assert (s > 0).tolist() == [True, True, False, False]
    assert not mix[2:].any()
    h = x @ a.T
    torch.testing.assert_close(h @ mix.T @ unmix(mix).T @ b.T, h @ b.T, rtol=1e-8, atol=1e-8)
    for factor in (torch.zeros(4, D_X), torch.ones(4, D_X)):
        mix, s = svd_gauge(factor, torch.zeros(D_Y, 4), 2.0)
        assert not mix.any()
        assert not s.any()


def test_a_rank_above_the_width_leaves_columns_of_zeros():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator), torch.randn(7, 5, generator=generator)
    mix, s = svd_gauge(a, b, 1.0)
    assert mix.shape == (5, 5)
    assert (s > 0).sum() == 3
    x = torch.randn(4, 3, generator=generator).double()
    rows = x @ a.double().T @ mix.T
    torch.testing.assert_close(rows @ (b.double() @ unmix(mix)).T, x @ a.double().T @ b.double().T)


def test_half_precision_factors_are_read_exactly():
    a, b, _ = factors(3, 5)
    half_a, half_b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    exact = svd_gauge(half_a.double(), half_b.double(), 1.0)
    for got, expected in zip(svd_gauge(half_a, half_b, 1.0), exact, strict=True):
        assert torch.equal(got, expected)
