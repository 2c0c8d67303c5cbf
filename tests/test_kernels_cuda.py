"""What CUDA uses means what the reference does, and a step through it has the gradients of the
definition, pads included.

As in test_kernels_triton.py the tests run in Triton's interpreter, in a process of their own, and
on CUDA with the marker `gpu`.
"""

import inspect
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

from builders import definitions  # noqa: E402
from builders.interpreter import DEVICE, INTERPRETED, on_device, passed_in_the_interpreter  # noqa: E402

from lorascope import kernels  # noqa: E402
from lorascope.errors import ConfigError  # noqa: E402
from lorascope.kernels import cpu, cuda  # noqa: E402
from lorascope.sae.objective import Weights  # noqa: E402
from lorascope.sae.sparsity import Rule  # noqa: E402
from lorascope.sae.step import Step  # noqa: E402
from lorascope.sae.team import Team  # noqa: E402

TYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


def quarters(*shape, seed=0, dtype=torch.float32):
    """Draw numbers of few bits: products and sums of them are exact, and often equal."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((4 * drawn).round() / 4).to(dtype)


def check(best, wanted, total, n) -> None:
    """Compare what was chosen of `total` with the wanted indices and `n` minus so many pads."""
    indices, values = best.indices.cpu(), best.values.cpu()
    n_pads = n - len(wanted)
    assert (indices.dtype, values.dtype, best.guess) == (torch.int64, total.dtype, 0.0)
    assert indices.tolist() == [*wanted.tolist(), *[total.numel() - 1] * n_pads]
    assert values.tolist() == [*total.flatten()[wanted].tolist(), *[0.0] * n_pads]


def check_indices(scores, n) -> None:
    there = scores.to(DEVICE)
    before = there.clone()
    best = cuda.best_indices(there, n, guess=7.0)
    check(best, definitions.best_indices(scores, n), scores, min(n, scores.numel()))
    assert torch.equal(there, before)


def check_rows(scores, k) -> None:
    there = scores.to(DEVICE)
    before = there.clone()
    best = cuda.best_of_rows(there, k)
    n = len(scores) * min(k, scores.shape[1])
    fires = definitions.choose(scores.contiguous(), Rule("topk", k), by_row=True)
    check(best, fires.flatten().nonzero()[:, 0], scores, n)
    assert torch.equal(there, before)


@on_device
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("shape", "n"), [((1, 1), 1), ((3, 7), 5), ((3, 7), 100), ((5, 509), 37), ((0, 5), 3)]
)
def test_the_best_indices_and_their_values_are_those_of_the_reference(shape, n, dtype):
    scores = quarters(*shape, dtype=dtype)
    check_indices(scores.T, n)
    check_indices(scores - 1, n)


@on_device
@pytest.mark.parametrize(
    ("shape", "k"),
    [
        *(((5, 7), k) for k in (0, 1, 3, 7, 9)),
        *[((1, 1), 1), ((2, 3), 3), ((13, 509), 38), ((0, 5), 2)],
    ],
)
def test_the_best_of_rows_and_their_values_are_those_of_the_definition(shape, k):
    scores = quarters(*shape)
    check_rows(scores, k)
    check_rows(scores - 2, k)
    check_rows(scores.T.contiguous().T, k)
    check_rows(torch.ones_like(scores), k)
    check_rows(-scores.abs(), k)


@on_device
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(0, 9),
    st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1e-45, 0.5, 1.0, 3.0, torch.inf]), min_size=54),
)
def test_any_mixture_of_ties_is_chosen_by_rows_as_in_the_definition(batch, width, k, values):
    scores = torch.tensor(values[: batch * width], dtype=torch.float32).view(batch, width)
    check_rows(scores, k)


@on_device
def test_pads_stand_behind_a_true_pair_of_the_last_place():
    scores = -torch.ones(3, 4)
    for values in ([], [5.0, 6.0]):
        indices = [2, 11][: len(values)]
        scores.view(-1)[indices] = torch.tensor(values)
        for best in (
            cuda.best_indices(scores.to(DEVICE), 6),
            cuda.best_of_rows(scores.to(DEVICE), 2),
        ):
            assert best.indices.tolist() == indices + [11] * (6 - len(indices))
            assert best.values.tolist() == values + [0.0] * (6 - len(values))


@on_device
def test_a_nan_is_never_chosen_and_is_no_value_of_a_pad():
    scores = torch.full((4, 50), torch.nan)
    scores[1, 7], scores[3, 9] = 1.0, -2.0
    for best in (
        cuda.best_indices(scores.to(DEVICE), 8),
        cuda.best_of_rows(scores.to(DEVICE), 2),
    ):
        n_pads = len(best.indices) - 1
        assert n_pads > 0
        assert best.indices.tolist() == [57] + [199] * n_pads
        assert best.values.tolist() == [1.0] + [0.0] * n_pads


@on_device
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_above_a_bound_of_each_latent(dtype):
    scores, bound = quarters(9, 24, dtype=dtype), quarters(24, seed=2)
    best = cuda.indices_above(scores.to(DEVICE), bound.to(DEVICE))
    wanted = (scores > bound).flatten().nonzero()[:, 0]
    check(best, wanted, scores, len(wanted))


@on_device
@pytest.mark.parametrize("dtype", TYPES)
def test_the_product_is_written_into_the_memory_it_is_given(dtype):
    x, weight = quarters(5, 6, dtype=dtype), quarters(7, 6, seed=1, dtype=dtype)
    out = torch.empty(5, 7, dtype=dtype, device=DEVICE)
    assert cuda.product(x.to(DEVICE), weight.to(DEVICE), out) is out
    exact = (x.double() @ weight.double().T).to(dtype)
    torch.testing.assert_close(out.cpu(), exact)


class Steps(NamedTuple):
    """A step by the definition, in float64, and one by the kernels, in float32."""

    plain: Weights
    loss: object
    fast: Weights
    taken: object
    n_positive: int


def weights_of(d_in, d_sae, dtype, device, *, jump, shift, distinct) -> Weights:
    """Make weights of few bits; `distinct` tells the scores of a row apart."""
    bias = quarters(d_sae, seed=3, dtype=dtype) - shift
    named = {
        "W_enc": quarters(d_sae, d_in, seed=1, dtype=dtype).T,
        "b_enc": bias + torch.arange(d_sae, dtype=dtype) / 1024 if distinct else bias,
        "W_dec": quarters(d_sae, d_in, seed=2, dtype=dtype),
        "b_dec": quarters(d_in, seed=4, dtype=dtype),
        "log_threshold": quarters(d_sae, seed=5, dtype=dtype) / 2 if jump else None,
    }
    return Weights(
        **{n: None if t is None else t.to(device).requires_grad_() for n, t in named.items()}
    )


def steps(
    rule,
    monkeypatch,
    *,
    batch=5,
    d_in=3,
    d_sae=7,
    by_row=False,
    n_dead=0,
    static=False,
    shift=0.0,
) -> Steps:
    """Take a step of each kind with the same weights and rows."""
    monkeypatch.setattr(kernels, "for_device", lambda device: cuda)
    made = {"jump": rule.architecture == "jumprelu", "shift": shift, "distinct": n_dead > 0}
    plain = weights_of(d_in, d_sae, torch.float64, "cpu", **made)
    fast = weights_of(d_in, d_sae, torch.float32, DEVICE, **made)
    x = quarters(batch, d_in, seed=6, dtype=torch.float64)
    dead = torch.arange(d_sae) < n_dead
    loss = definitions.objective(plain, x, rule, dead, k_aux=2, auxk_alpha=0.7, by_row=by_row)
    loss.total.backward()
    step = Step(rule, k_aux=2, auxk_alpha=0.7, team=Team(), static=static)
    taken = step.take(fast, x.float().to(DEVICE), dead.to(DEVICE), by_row=by_row)
    pre = (x - plain.b_dec) @ plain.W_enc + plain.b_enc
    n_positive = int((pre > 0).sum())
    return Steps(plain, loss, fast, taken, n_positive)


def assert_equal_steps(found: Steps) -> None:
    plain, loss, fast, taken, _ = found
    for name in ("fvu", "auxk", "l0"):
        ours, wanted = (float(getattr(of, name).detach()) for of in (taken, loss))
        assert ours == pytest.approx(wanted, rel=1e-5, abs=1e-6), name
    assert taken.fired.tolist() == loss.fired.tolist()
    for name, tensor in plain.tensors().items():
        ours = fast.tensors()[name].grad.cpu().double()
        largest = float(tensor.grad.abs().max())
        torch.testing.assert_close(ours, tensor.grad, rtol=1e-4, atol=1e-5 * largest)


@on_device
@pytest.mark.parametrize("k", [0.5, 2.4])
@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "matryoshka"])
def test_a_step_through_the_kernels_has_the_gradients_of_the_definition(
    architecture, k, monkeypatch
):
    rule = Rule(architecture, k)
    assert_equal_steps(steps(rule, monkeypatch))
    assert_equal_steps(steps(rule, monkeypatch, by_row=True))


@on_device
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("n_dead", [0, 5])
def test_dead_latents_get_the_gradients_of_the_definition(n_dead, static, monkeypatch):
    for rule in (Rule("batchtopk", 2.4), Rule("topk", 2.4)):
        assert_equal_steps(steps(rule, monkeypatch, n_dead=n_dead, static=static))


@on_device
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_pads_change_nothing_where_fewer_scores_are_positive_than_wanted(
    architecture, by_row, monkeypatch
):
    for k, shift, n_dead in ((4.5, 3.0, 0), (4.5, 3.0, 7), (4.5, 99.0, 7), (7, 0.0, 0)):
        rule = Rule(architecture, k)
        more = {"by_row": by_row, "n_dead": n_dead, "shift": shift}
        found = steps(rule, monkeypatch, static=n_dead > 0, **more)
        assert (found.n_positive == 0) == (shift == 99)
        assert found.n_positive < round(k * 5)
        assert_equal_steps(found)


@on_device
def test_learned_thresholds_get_the_gradients_of_the_definition(monkeypatch):
    for batch, n_dead in ((5, 0), (33, 5)):
        rule = Rule("jumprelu", 2.0)
        assert_equal_steps(steps(rule, monkeypatch, batch=batch, n_dead=n_dead))


class Waiting(TorchDispatchMode):
    """Collect the operations that wait for a device, or copy from the host, or shape by data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "lift")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(of, torch.Tensor) and of.dtype == torch.bool
            for part in args[1:2]
            if isinstance(part, list | tuple)
            for of in part
        )
        if masks or name.startswith(self.FORBIDDEN):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@on_device
def test_a_step_of_static_shapes_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(kernels, "for_device", lambda device: cuda)
    made = {"jump": False, "shift": 1.0, "distinct": True}
    weights = weights_of(3, 9, torch.float32, DEVICE, **made)
    x, dead = quarters(6, 3).to(DEVICE), (torch.arange(9) < 4).to(DEVICE)
    for rule in (Rule("matryoshka", 2.4), Rule("batchtopk", 2.4), Rule("topk", 2.4)):
        step = Step(rule, k_aux=2, auxk_alpha=0.7, team=Team(), static=True)
        step.take(weights, x, dead)  # may keep what later ones use
        for by_row in (False, True):
            with Waiting() as mode:
                step.take(weights, x, dead, by_row=by_row)
            assert mode.found == []
    with Waiting() as mode:
        cuda.indices_above(x, x[0])
        assert float(x.sum()) == float(x[x < 9].sum())
    assert mode.found == ["nonzero", "_local_scalar_dense", "index", "_local_scalar_dense"]


if not INTERPRETED:

    @pytest.mark.slow
    def test_parity_holds_in_the_interpreter():
        assert passed_in_the_interpreter(__file__) > 40

    def test_cuda_has_the_functions_of_the_cpu_with_the_same_signatures():
        contract = {  # types of the same words are not equal
            name: str(inspect.signature(getattr(cpu, name))) for name in cuda.__all__
        }
        assert len(contract) == 8
        for name, signature in contract.items():
            assert str(inspect.signature(getattr(cuda, name))) == signature, name
        assert kernels.for_device(torch.device("cuda", 0)) is cuda
        assert kernels.for_device(torch.device("cpu")) is cpu

    def test_too_many_scores_are_refused():
        with pytest.raises(ConfigError, match=r"expected at most 2\*\*30: use fewer rows"):
            cuda.best_indices(torch.empty(2**16, 2**14 + 1, device="meta"), 1)

    @on_device
    @pytest.mark.parametrize("by_row", [False, True])
    def test_a_captured_graph_replays_a_whole_step_on_other_rows(by_row):
        made = {"jump": False, "shift": 0.0, "distinct": True}
        weights = weights_of(32, 256, torch.float32, DEVICE, **made)
        x, dead = quarters(64, 32).to(DEVICE), torch.arange(256, device=DEVICE) < 9
        step = Step(Rule("matryoshka", 4.3), 16, 0.7, Team(), static=True)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step.take(weights, x, dead, by_row=by_row)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step.take(weights, x, dead, by_row=by_row)
        grads = {name: tensor.grad for name, tensor in weights.tensors().items()}
        for seed, scale in ((7, 1.0), (8, 3.0)):
            x.copy_(scale * quarters(64, 32, seed=seed))
            graph.replay()
            eager = step.take(weights, x, dead, by_row=by_row)
            torch.testing.assert_close(captured.fvu, eager.fvu, rtol=1e-5, atol=0)
            assert torch.equal(captured.fired, eager.fired)
            for name, tensor in weights.tensors().items():
                assert tensor.grad is not grads[name]
                torch.testing.assert_close(grads[name], tensor.grad, rtol=1e-4, atol=1e-6)
