"""What a product of bytes lets through, and float32 decides, is what float32 alone would choose."""

import pytest
import torch
from builders.tolerance import assert_same_up_to_rounding, rounding

from lorascope.kernels import cpu, prefilter
from lorascope.kernels.prefilter import Prefilter
from lorascope.sae.objective import initial_weights
from lorascope.sae.sparsity import Rule
from lorascope.sae.step import Step
from lorascope.sae.team import Team

needs_bytes = pytest.mark.skipif(
    not cpu.multiplies_bytes(torch.device("cpu"), torch.float32),
    reason="without instructions for bytes the product is slow and never used",
)
KINDS = [
    *("normal", "sizes", "equal columns", "one column", "few positive", "zero rows", "big bias"),
    *("same rounding", "constant latents", "tiny rows", "tiny latents", "tiny all"),
]


def rows_of(kind, n, d, latents, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    weight = torch.randn(latents, d, generator=g) * torch.rand(latents, 1, generator=g)
    bias = 0.1 * torch.randn(latents, generator=g)
    if kind == "sizes":
        x *= torch.logspace(-3, 3, n)[:, None]
    elif kind == "equal columns":  # every product is rounded the same way
        x = x[:, :1].expand(n, d).contiguous()
        weight = weight[:, :1].expand(latents, d).contiguous()
    elif kind == "one column":
        x[:, 1:] *= 1e-3
    elif kind == "few positive":
        bias -= 30
        bias[:3] += 30
    elif kind == "zero rows":
        x[::3] = 0
    elif kind.startswith("tiny"):  # squares of these are lost in float32
        x[:: 1 if kind == "tiny all" else 3] *= 1e-25 if kind != "tiny latents" else 1
        weight[::4] *= 1e-25 if kind == "tiny latents" else 1
        bias *= 1e-25 if kind == "tiny all" else 1
    elif kind == "big bias":
        bias *= 100
    elif kind == "same rounding":  # all errors of a score have the same sign and add up
        x[:], weight[:] = 1 + 0.001 * x, 1 + 0.001 * weight
        x[:, 0] = weight[:, 0] = 127 / 50.49
    elif kind == "constant latents":
        weight[: latents // 2] = 0
    return x, weight, bias


def exact(x, weight, bias):
    return (x.double() @ weight.double().T + bias).float()


@needs_bytes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d", "latents"), [(64, 96, 1024), (33, 7, 101)])
def test_the_choice_is_that_of_exact_scores(kind, n, d, latents):
    of_batch, of_rows = Prefilter(), Prefilter()
    for seed in range(4):  # the later ones with what is remembered
        x, weight, bias = rows_of(kind, n, d, latents, seed)
        scores = exact(x, weight, bias)
        for k in (5, 2.5):
            one = of_batch.best_indices(x, weight, bias, round(k * n))
            other = cpu.best_indices(scores, round(k * n))
            assert_same(one, other, scores, d)
        one = of_rows.best_of_rows(x, weight, bias, 5)
        assert_same(one, cpu.best_of_rows(scores, 5), scores, d)


def assert_same(found, wanted, scores, d):
    """Float32 rounds sums in one order or another: what differs by no more may be swapped."""
    assert len(found.indices) == len(wanted.indices)
    assert (found.indices.diff() > 0).all()
    there = scores.flatten()
    swapped = set(found.indices.tolist()) ^ set(wanted.indices.tolist())
    assert len(swapped) <= 2
    scale = float(there.abs().max())
    for place in swapped:
        near = min(abs(float(there[place]) - float(there[other])) for other in swapped - {place})
        assert near <= rounding(d, scale)
    expected = there[found.indices]
    assert_same_up_to_rounding(found.values, expected, n_terms=d, scale=scale)


@needs_bytes
def test_a_step_with_the_screen_is_the_step_without(monkeypatch):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(128, 64, generator=g)
    for architecture, by_row in (("batchtopk", False), ("batchtopk", True), ("matryoshka", False)):
        grads = []
        for screened in (True, False):
            monkeypatch.setattr(cpu, "multiplies_bytes", lambda *_, on=screened: on)
            weights = initial_weights(x, 512, torch.Generator().manual_seed(1))
            step = Step(Rule(architecture, 8), 16, 0.5, Team())
            for _ in range(2):
                loss = step.take(weights, x, torch.arange(512) < 40, by_row=by_row)
            grads.append((loss, [t.grad for t in weights.tensors().values()]))
        (one, ours), (other, theirs) = grads
        assert torch.equal(one.fired, other.fired)
        assert float(one.fvu) == pytest.approx(float(other.fvu), rel=rounding(x.numel()))
        for a, b in zip(ours, theirs, strict=True):
            assert_same_up_to_rounding(a, b, n_terms=x.numel())


@needs_bytes
def test_the_choice_has_the_same_bits_in_blocks_with_guesses_and_by_a_float32_product(monkeypatch):
    x, weight, bias = rows_of("normal", 61, 40, 333, 0)
    ways = []
    with monkeypatch.context() as patch:
        for name, value in (("_BLOCK", 333 * 20), ("_MANY", 8), ("_MANY", 0)):
            patch.setattr(prefilter, name, value)
            ours = Prefilter()
            for _ in range(2):
                of_batch = ours.best_indices(x, weight, bias, 300)
                of_rows = ours.best_of_rows(x, weight, bias, 5)
                ways.append([(best.indices, best.values) for best in (of_batch, of_rows)])
    for way in ways[1:]:
        for (indices, values), (first, wanted) in zip(way, ways[0], strict=True):
            assert torch.equal(indices, first)
            assert torch.equal(values, wanted)


@needs_bytes
def test_errors_that_add_up_widen_the_margin_which_stays():
    x, weight, bias = rows_of("same rounding", 64, 400, 512, 0)
    x *= torch.linspace(0.2, 1, 64)[:, None]
    ours = Prefilter()
    best = ours.best_indices(x, weight, bias, 640)
    assert ours._margin > prefilter._SIGMAS
    assert_same(best, cpu.best_indices(exact(x, weight, bias), 640), exact(x, weight, bias), 400)


@needs_bytes
@pytest.mark.parametrize("kind", ["normal", "sizes", "zero rows", "tiny rows", "tiny all"])
def test_rows_of_any_size_and_of_zeros_need_no_float32_product(monkeypatch, kind):
    monkeypatch.setattr(prefilter._Scores, "dense", lambda _: pytest.fail("took the product"))
    ours = Prefilter()
    for seed in range(3):
        x, weight, bias = rows_of(kind, 256, 96, 1024, seed)
        assert len(ours.best_indices(x, weight, bias, 256 * 8).values) == 256 * 8
        assert len(ours.best_of_rows(x, weight, bias, 8).values) == 256 * 8


@needs_bytes
def test_a_row_that_is_not_finite_leaves_the_others_their_choice():
    x, weight, bias = rows_of("normal", 16, 8, 64, 0)
    wanted = Prefilter().best_of_rows(x[1:], weight, bias, 4)
    x[0, 3] = torch.nan
    found = Prefilter().best_of_rows(x, weight, bias, 4)
    assert torch.equal(found.indices, wanted.indices + 64)
    assert torch.equal(found.values, wanted.values)


def test_only_float32_on_a_cpu_that_multiplies_bytes_is_screened(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    for limit in ("AVX2", "avx512_core", "SSE41", "AVX2_VNNI"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert not cpu.multiplies_bytes(torch.device("cpu"), torch.float32), limit
    for limit in ("AVX512_CORE_VNNI", "avx512_core_amx", "ALL", ""):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert cpu.multiplies_bytes(torch.device("cpu"), torch.float32), limit
    assert not cpu.multiplies_bytes(torch.device("cpu"), torch.float64)
    assert not cpu.multiplies_bytes(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not cpu.multiplies_bytes(torch.device("cpu"), torch.float32)
