import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.errors import ConfigError
from lorascope.sae.sparsity import SparseCode, batch_topk, calibrate_threshold


def by_sorting(scores: torch.Tensor, k: float) -> torch.Tensor:
    """BatchTopK as its definition says it: sort by (score, then lower index first)."""
    flat = scores.flatten().numpy()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[: round(k * len(scores))]
    kept = np.zeros_like(flat)
    for i in order:
        kept[i] = max(flat[i], 0.0)
    return torch.from_numpy(kept).view_as(scores)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 7),
    latents=st.integers(1, 9),
    k=st.floats(0.1, 9, allow_nan=False),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_batch_topk_is_a_stable_sort_cut_off(rows, latents, k, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (rows, latents), generator=generator).float()
    assert torch.equal(batch_topk(scores, k), by_sorting(scores, k))


@pytest.mark.parametrize("shape", [(1024, 448), (333, 1001), (64, 4096)])
@pytest.mark.parametrize(
    "kind", ["normal", "one latent", "one row", "levels", "rising", "negative"]
)
def test_the_guess_changes_no_choice_of_a_large_batch(shape, kind):
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
        order = scores.flatten().sort(descending=True, stable=True).indices[:n]
        kept = torch.zeros(scores.numel())
        kept[order] = scores.flatten()[order].clamp(min=0)
        assert torch.equal(batch_topk(scores, k), kept.view(shape))


def test_of_equal_scores_the_lower_flat_index_is_kept():
    kept = batch_topk(torch.ones(4, 5), 1.5)
    assert kept.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_only_positive_scores_are_kept_when_there_are_too_few():
    kept = batch_topk(torch.tensor([[-1.0, 2.0, 0.0], [-3.0, -1.0, 0.5]]), 3)
    assert kept.tolist() == [[0.0, 2.0, 0.0], [0.0, 0.0, 0.5]]


@pytest.mark.parametrize(("k", "n"), [(0.01, 1), (0.5, 50), (2.344, 234), (7, 700)])
def test_a_fraction_of_a_latent_is_a_share_of_the_rows(k, n):
    scores = torch.rand(100, 20, generator=torch.Generator().manual_seed(0)) + 0.1
    assert int((batch_topk(scores, k) > 0).sum()) == n


@pytest.mark.parametrize("k", [0.013, 0.5, 3.7, 11.0])
@pytest.mark.parametrize("spread", [0.0, 8.0])
def test_the_threshold_leaves_exactly_k_latents_a_row(k, spread):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(1000, 32, generator=generator)
    scores = scores * torch.exp(spread * torch.randn(32, generator=generator))
    threshold = calibrate_threshold(lambda: scores.split(77), k)
    assert int((scores > threshold).sum()) == round(k * 1000)
    assert threshold == float(scores.flatten().sort(descending=True).values[round(k * 1000)])


def test_the_threshold_does_not_depend_on_the_blocks():
    scores = torch.rand(130, 9, generator=torch.Generator().manual_seed(2))
    found = {calibrate_threshold(lambda size=size: scores.split(size), 2) for size in (1, 100, 130)}
    assert len(found) == 1


def test_the_threshold_is_zero_when_too_few_scores_are_positive():
    scores = torch.tensor([[1.0, -1.0, -2.0], [3.0, -1.0, 0.0]])
    assert calibrate_threshold(lambda: [scores], 1) == 0.0
    assert calibrate_threshold(lambda: [scores], 3) == 0.0


@pytest.mark.parametrize(("k", "fires"), [(1.2, 1), (2.8, 4)])
def test_equal_scores_at_the_threshold_are_all_in_or_all_out(k, fires):
    scores = torch.tensor([[5.0, 2.0, 2.0, 2.0, 1.0]])
    threshold = calibrate_threshold(lambda: [scores.repeat(10, 1)], k)
    assert int((scores > threshold).sum()) == fires


def test_scores_from_the_smallest_to_the_largest_float_are_told_apart():
    scores = torch.tensor([[1e-45, 1e-38, 1e-10, 1.0, 3e38]])
    counts = [int((scores > calibrate_threshold(lambda: [scores], k)).sum()) for k in range(1, 6)]
    assert counts == [1, 2, 3, 4, 5]


def test_no_rows_give_no_threshold():
    with pytest.raises(ConfigError, match="needs rows"):
        calibrate_threshold(list, 1)


def test_a_sparse_code_and_its_dense_form_say_the_same():
    code = SparseCode(
        offsets=torch.tensor([0, 2, 2, 3]),
        latents=torch.tensor([0, 3, 1]),
        values=torch.tensor([1.5, 2.5, 3.5]),
        shape=(3, 4),
    )
    assert code.l0.tolist() == [2, 0, 1]
    assert code.to_dense().tolist() == [[1.5, 0, 0, 2.5], [0, 0, 0, 0], [0, 3.5, 0, 0]]
