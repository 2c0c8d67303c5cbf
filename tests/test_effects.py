"""KL, loss and their intervals: by hand, against float64, and where logits are infinite."""

import math

import numpy as np
import pytest
import torch
from builders.tolerance import assert_same_up_to_rounding

from lorascope.causal import effects
from lorascope.causal.effects import (
    bootstrap_interval,
    cross_entropy,
    kl_and_loss,
    kl_divergence,
    likeliest,
    log_probabilities,
    ratio_of_sums,
    select_measured,
    spread,
    sum_by,
)
from lorascope.causal.report_records import N_SLICES

INF = math.inf


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_kl_by_hand_and_its_direction():
    """Reference (1/2, 1/2), other (1/4, 3/4): ½·log 2 + ½·log(2/3); the other way differs."""
    p, q = logits([0.0, 0.0]), logits([0.0, math.log(3)])
    assert float(kl_divergence(p, q)) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7
    )
    assert float(kl_divergence(q, p)) == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7
    )


def test_the_likeliest_tokens_are_the_first_three_of_each_run_once():
    """Token 0 leads in both, 4 is in neither first three, 3 is below 0.01 in both."""
    adapter = [0.6, 0.3, 0.09, 0.005, 0.005]
    base = [0.5, 0.4, 0.001, 0.009, 0.09]
    ids, p = likeliest(*(torch.tensor([one, one[::-1]]).log() for one in (adapter, base)))
    assert ids.tolist() == [[0, 1, 2, 4, -1, -1], [4, 3, 2, 0, -1, -1]]
    expected = [[base[i] for i in (0, 1, 2, 4)], [adapter[i] for i in (0, 1, 2, 4)]]
    assert_same_up_to_rounding(p[:, 0, :4], torch.tensor(expected), n_terms=5)
    assert_same_up_to_rounding(p[:, 1, :4], torch.tensor(expected), n_terms=5)


@pytest.mark.parametrize("n", [1, 2, 300])
def test_the_first_token_of_each_run_is_named_however_unlikely_it_is(n):
    even, other = torch.zeros(2, n), torch.zeros(2, n)
    other[:, -1] = 0.1
    ids, p = likeliest(even, other)
    assert (ids[0] >= 0).sum() == min(2, n)
    assert n - 1 in ids[0].tolist()
    assert (p <= 1).all()


def test_kl_and_loss_are_those_of_float64():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 50, 97)) * 3
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    expected = (np.exp(log_p) * (log_p - log_q)).sum(1)
    found = kl_divergence(torch.from_numpy(p).float(), torch.from_numpy(q).float())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    targets = torch.from_numpy(rng.integers(0, 97, 50))
    np.testing.assert_allclose(
        cross_entropy(torch.from_numpy(q).float(), targets),
        -log_q[np.arange(50), targets],
        rtol=1e-5,
    )


@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_effects_keep_their_digits(step):
    """Of 1e-9 nats at the last of these; in the plain sum, 1e-7 of rounding would be left."""
    rng = np.random.default_rng(0)
    p = rng.normal(size=(50, 768)).astype(np.float32)
    q = (p + step * rng.normal(size=p.shape)).astype(np.float32)
    wide = [torch.from_numpy(x).double().log_softmax(-1) for x in (p, q)]
    expected = (wide[0].exp() * (wide[0] - wide[1])).sum(-1).numpy()
    found = kl_divergence(torch.from_numpy(p), torch.from_numpy(q)).numpy()
    assert (found > 0).all()
    np.testing.assert_allclose(found, expected, rtol=5e-3)


def test_kl_of_a_thing_with_itself_is_exactly_zero_in_any_type():
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 10
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert (kl_divergence(x.to(dtype), x.to(dtype)) == 0).all()


def test_16_bit_logits_are_compared_in_float32():
    """A softmax in bfloat16 has three digits; two distributions that near would be noise in it."""
    x = torch.randn(200, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = x.clone()
    y[:, 0] += 0.125
    wide = kl_divergence(x.double().float(), y.double().float())
    assert torch.equal(kl_divergence(x, y), wide)
    assert 0 < float(wide.mean()) < 1e-4


def test_tokens_that_are_suppressed_give_no_nan():
    """0 · (−∞ − −∞) is 0; what the other alone rules out is infinite, and said so."""
    p, q = logits([0.0, 1.0, -INF]), logits([1.0, 0.0, -INF])
    assert float(kl_divergence(p, q)) == pytest.approx(
        float(kl_divergence(p[:, :2], q[:, :2])), abs=1e-7
    )
    assert float(kl_divergence(p, logits([0.0, 0.0, 5.0]))) == pytest.approx(
        sum(
            w * math.log(w / v) for w, v in zip((0.26894, 0.73106), (0.00665, 0.00665), strict=True)
        ),
        rel=1e-3,
    )
    far = kl_divergence(logits([0.0, -200.0]), logits([0.0, 200.0]))
    assert float(far) == pytest.approx(200.0)
    assert float(kl_divergence(logits([0.0, 0.0]), logits([0.0, -INF]))) == INF


def test_the_vocabulary_is_never_copied_whole_and_pieces_change_nothing(monkeypatch):
    x, y = torch.randn(2, 33, 50, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(33)
    whole = kl_divergence(x, y), cross_entropy(x, targets)
    monkeypatch.setattr(effects, "_CHUNK", (350, 350))  # seven tokens at a time
    assert torch.equal(kl_divergence(x, y), whole[0])
    kl, loss = kl_and_loss(log_probabilities(x), y, targets)
    assert torch.equal(kl, whole[0])
    assert_same_up_to_rounding(loss, cross_entropy(y, targets), n_terms=50)
    assert torch.equal(cross_entropy(x, targets), whole[1])
    assert kl_divergence(x[:0], y[:0]).shape == (0,)


def test_counted_keeps_the_measured_positions_in_order():
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 4)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(select_measured(x, mask), torch.stack([x[0, 0], x[0, 2], x[1, 1]]))


def test_sums_are_over_rollouts_and_the_ratio_is_of_sums_not_a_mean_of_ratios():
    values = np.array([1, 2, 4, 8], np.float32)
    assert sum_by(np.array([0, 0, 1, 2]), values, 4).tolist() == [3, 4, 8, 0]
    assert ratio_of_sums(np.array([1.0, 9.0]), np.array([1.0, 1.0])) == 5
    assert ratio_of_sums(np.array([1.0, 9.0]), np.array([1.0, 9.0])) == 1
    assert ratio_of_sums(np.zeros(2), np.zeros(2)) is None


def test_the_interval_resamples_rollouts_and_has_the_width_of_their_spread():
    """Means of n texts: ±1.96 standard errors, as for any mean of independent draws."""
    rng = np.random.default_rng(0)
    above = rng.normal(1.0, 0.2, 400)
    low, high = bootstrap_interval(above, np.ones(400))
    error = above.std() / 20
    assert low == pytest.approx(above.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(above.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(above, np.ones(400)) == (low, high)
    assert bootstrap_interval(above, np.ones(400), seed=1) != (low, high)


def test_a_sum_is_spread_over_slices_of_the_rollouts_in_order():
    assert spread(np.array([1.0, 0.0, 2.0, 1.0])) == (250, 0, 500, 250)
    values = np.zeros(3 * N_SLICES + 5)  # slices of three and of four rollouts
    values[[0, -1]] = 1.0, 3.0
    assert spread(values) == (250, *[0] * (N_SLICES - 2), 750)
    assert sum(spread(np.ones(len(values)))) == pytest.approx(1000, abs=N_SLICES / 2)
    assert min(spread(np.ones(len(values)))) >= 3 * 1000 // len(values)
    assert spread(np.zeros(4)) == ()


def test_where_a_draw_has_no_ratio_there_is_no_interval():
    assert bootstrap_interval(np.ones(1), np.ones(1)) is None
    assert bootstrap_interval(np.ones(2), np.array([0.0, 1.0])) is None
