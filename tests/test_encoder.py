import pytest
import torch
from builders import definitions
from builders.tolerance import assert_same_up_to_rounding, rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.kernels import cpu, encoder
from lorascope.kernels.encoder import Encoder

HAS_BYTES = cpu.multiplies_bytes(torch.device("cpu"), torch.float32)
needs_bytes = pytest.mark.skipif(not HAS_BYTES, reason="without instructions for bytes")
TYPES = [pytest.param("bytes", marks=needs_bytes), "float32"]


def choose(monkeypatch, kind):
    """Take the rough product in a type, whatever this machine would choose."""
    monkeypatch.setattr(encoder, "_FEWEST", 0)
    monkeypatch.setattr(cpu, "multiplies_bytes", lambda *_: kind == "bytes")


@pytest.fixture(params=TYPES)
def rough(request, monkeypatch):
    choose(monkeypatch, request.param)


def problem(n, d_in, n_latents, *, seed=0, spread=0.0, bias=0.1):
    """Rows and weights; columns have scales over `10**spread`, and weights the inverse ones."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** torch.linspace(-spread / 2, spread / 2, d_in) if d_in else torch.ones(0)
    x = torch.randn(n, d_in, generator=generator) * scale
    W_enc = torch.randn(d_in, n_latents, generator=generator) / scale[:, None] / max(d_in, 1) ** 0.5
    b_enc = bias * torch.randn(n_latents, generator=generator)
    threshold = torch.rand(n_latents, generator=generator) + 0.5
    return x, W_enc, b_enc, threshold


def dense(fired, n, n_latents):
    code = torch.zeros(n, n_latents)
    code[fired.rows, fired.latents] = fired.values
    return code


@pytest.mark.parametrize("spread", [0.0, 4.0])
@pytest.mark.parametrize(
    ("n", "d_in", "n_latents"),
    [(0, 5, 3), (1, 1, 1), (3, 14, 24), (130, 56, 224), (1030, 448, 700), (2, 449, 9)],
)
def test_no_pair_is_missed_and_none_is_added(rough, n, d_in, n_latents, spread):
    x, W_enc, b_enc, threshold = problem(n, d_in, n_latents, spread=spread)
    fired = Encoder(W_enc, b_enc, threshold)(x)
    exact = definitions.encode(x.double(), W_enc.double(), b_enc.double(), threshold.double())
    code = dense(fired, n, n_latents).double()
    pre = x.double() @ W_enc.double() + b_enc.double()
    largest = float(pre.abs().max()) if n else 0.0
    sure = (pre - threshold).abs() > rounding(d_in, largest)
    assert sure.double().mean() > 0.9 or not n
    assert torch.equal((code > 0) & sure, (exact > 0) & sure)
    assert_same_up_to_rounding(code[sure], exact[sure], n_terms=d_in, scale=largest)
    order = fired.rows * n_latents + fired.latents
    assert bool((order.diff() > 0).all())


@needs_bytes
@pytest.mark.parametrize("bias", [0.1, 3.0])  # the larger one is above many thresholds
def test_both_products_find_the_same_pairs_to_the_bit(monkeypatch, bias):
    x, W_enc, b_enc, threshold = problem(700, 56, 900, bias=bias)
    found = []
    for kind in ("bytes", "float32"):
        choose(monkeypatch, kind)
        found.append(Encoder(W_enc, b_enc, threshold)(x))
    for one, same in zip(*found, strict=True):
        assert torch.equal(one, same)
    assert len(found[0].values) > 1000


@needs_bytes
@pytest.mark.parametrize("d_in", [16, 400])
def test_a_score_that_rounding_to_bytes_makes_as_small_as_it_can_is_found(monkeypatch, d_in):
    """Each weight is the rounding error of its row, so nothing of the errors cancels."""
    choose(monkeypatch, "bytes")
    n = 60
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(0))
    rounded = cpu.Bytes.rounded(x, signed=True)
    error = x - rounded.numbers * rounded.unit[:, None]
    scores = (x.double() * error.double()).sum(1)
    threshold = (scores - 1e-5 * x.norm(dim=1) * error.norm(dim=1)).float()
    screen = Encoder(error.T.contiguous(), torch.zeros(n), threshold)
    assert screen._bytes
    monkeypatch.setattr(encoder, "_MANY", 0)  # so that the bytes decide
    fired = screen(x)
    assert set(zip(fired.rows.tolist(), fired.latents.tolist(), strict=True)) >= {
        (i, i) for i in range(n)
    }


def test_sums_that_lie_on_their_threshold_are_decided_in_float32(rough):
    x, W_enc, b_enc, _ = problem(64, 20, 50)
    every = Encoder(W_enc, b_enc, torch.full((50,), -1e30))(x)
    assert len(every.values) == 64 * 50
    values = every.values.view(64, 50)
    threshold = values[7]  # row 7 is equal to every threshold, so that nothing fires there
    code = dense(Encoder(W_enc, b_enc, threshold)(x), 64, 50)
    assert torch.equal(code, torch.where(values > threshold, values, 0.0))
    assert not code[7].any()


@settings(max_examples=25, deadline=None)
@given(
    d_in=st.sampled_from([1, 14, 56, 100]),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    chosen=st.lists(st.integers(0, 39), min_size=1, max_size=5, unique=True),
)
def test_a_rows_code_is_the_same_in_any_batch_and_through_a_slice_of_latents(d_in, cuts, chosen):
    x, W_enc, b_enc, threshold = problem(60, d_in, 40)
    encoder = Encoder(W_enc, b_enc, threshold)
    whole = dense(encoder(x), 60, 40)
    for part in torch.tensor_split(torch.arange(60), sorted(cuts)):
        assert torch.equal(dense(encoder(x[part]), len(part), 40), whole[part])
    few = torch.tensor(chosen)
    sliced = Encoder(W_enc[:, few].contiguous(), b_enc[few], threshold[few])
    assert torch.equal(dense(sliced(x), 60, len(few)), whole[:, few])


def test_blocks_change_nothing(rough, monkeypatch):
    x, W_enc, b_enc, threshold = problem(50, 14, 24)
    whole = Encoder(W_enc, b_enc, threshold)(x)
    monkeypatch.setattr(encoder, "BLOCK", 7)
    for one, other in zip(Encoder(W_enc, b_enc, threshold)(x), whole, strict=True):
        assert torch.equal(one, other)


def test_the_value_of_a_pair_is_that_of_the_code_and_zero_where_it_does_not_fire(rough):
    x, W_enc, b_enc, threshold = problem(90, 56, 70)
    encoder = Encoder(W_enc, b_enc, threshold)
    whole = dense(encoder(x), 90, 70)
    index = torch.arange(90).repeat_interleave(70)
    latents = torch.arange(70).repeat(90)
    assert torch.equal(encoder.values_of(x, index, latents).view(90, 70), whole)


def test_columns_and_latents_without_weights_are_no_trouble(rough):
    x, W_enc, b_enc, threshold = problem(30, 14, 6)
    W_enc[3], x[:, 3] = 0, 1e30
    W_enc[:, 2], b_enc[2] = 0, 5.0  # always on
    W_enc[:, 4], b_enc[4] = 0, -5.0  # always off
    threshold[5] = torch.inf
    code = dense(Encoder(W_enc, b_enc, threshold)(x), 30, 6)
    assert bool((code[:, 2] == 5).all())
    assert not code[:, [4, 5]].any()
    kept = torch.arange(14) != 3
    same = dense(Encoder(W_enc[kept], b_enc, threshold)(x[:, kept]), 30, 6)
    assert_same_up_to_rounding(code, same, n_terms=14)


@pytest.mark.parametrize("size", [1e17, 1e19, 1e30, 1e37])
def test_rows_near_the_largest_number_are_coded_as_their_scores_say(rough, size):
    x, W_enc, b_enc, threshold = problem(64, 14, 600)
    x[-1] *= size
    W_enc[:, :9], b_enc[:9] = 0, 5.0  # always on
    threshold[9:50] = -threshold[9:50] * size
    threshold[50:] = 1e38
    threshold[70:99] = torch.inf
    encoder = Encoder(W_enc, b_enc, threshold)
    index = torch.arange(64).repeat_interleave(600)
    latents = torch.arange(600).repeat(64)
    values = encoder.values_of(x, index, latents).view(64, 600)
    assert bool((values[:, :9] == 5).all())
    assert bool((values[-1, 9:50] < 0).any())
    assert torch.equal(dense(encoder(x), 64, 600), values)


def test_half_precision_rows_are_those_of_float32(rough):
    x, W_enc, b_enc, threshold = problem(40, 56, 70)
    encoder = Encoder(W_enc, b_enc, threshold)
    for one, other in zip(encoder(x.half()), encoder(x.half().float()), strict=True):
        assert torch.equal(one, other)


def every_score(encoder, x, n_latents):
    """Return what the encoder says of each pair alone, without a screen."""
    index = torch.arange(len(x)).repeat_interleave(n_latents)
    latents = torch.arange(n_latents).repeat(len(x))
    return encoder.values_of(x, index, latents).view(len(x), n_latents)


@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-23, 1e-25, 1e-30, 1e-38, 1e-41])
@pytest.mark.parametrize("rows_are_small", [True, False])
def test_scores_of_any_size_fire_whatever_rounding_did(rough, monkeypatch, size, rows_are_small):
    """Weights are each row's rounding error, so nothing cancels; float32 squares underflow."""
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    rounded = cpu.Bytes.rounded(x, signed=True)
    errors = [x - rounded.numbers * rounded.unit[:, None], x - x.bfloat16().float()]
    weight = torch.cat([sign * error for error in errors for sign in (1, -1)])
    x = torch.cat([x, x * size])
    if not rows_are_small:
        weight[1::2] *= size
    scores = x.double() @ weight.double().T
    threshold = (0.9999 * scores[60:120].diagonal()).float().repeat(4)
    threshold = torch.where(torch.arange(240) % 3 == 0, 0.0, threshold)
    encoder_ = Encoder(weight.T.contiguous(), torch.zeros(240), threshold)
    monkeypatch.setattr(encoder, "_MANY", 0)  # so that the bytes decide
    values = every_score(encoder_, x, 240)
    assert int((values != 0)[60:].sum()) > 1000
    assert torch.equal(dense(encoder_(x), 120, 240), values)


@pytest.mark.parametrize(("size", "other"), [(3e38, 1.0), (1e-45, 1e-45), (1e-37, 1e9)])
def test_weights_at_the_ends_of_float32_keep_their_scores(rough, size, other):
    W_enc = torch.full((3, 600), other)
    W_enc[:, 0] = size
    x = torch.eye(3)
    code = dense(Encoder(W_enc, torch.zeros(600), torch.zeros(600))(x), 3, 600)
    assert torch.equal(code, x @ W_enc)
    single = torch.zeros(3, 100_000)
    single[:, 7] = size
    fired = Encoder(single, torch.zeros(100_000), torch.zeros(100_000))(x)
    assert fired.latents.tolist() == [7] * 3
