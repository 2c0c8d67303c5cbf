import math

import pytest
import torch
from builders.definitions import choose
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.errors import ConfigError
from lorascope.sae.sparsity import Rule, SparseCode, calibrate_threshold


def by_sorting(scores: torch.Tensor, rule: Rule, by_row: bool) -> torch.Tensor:
    """What fires, by its definition: sort by (score, then lower index first)."""
    size = scores
    batch, width = scores.shape
    fires = torch.zeros(batch * width, dtype=torch.bool)

    def order(indices):
        return sorted(indices, key=lambda i: (-float(size.flatten()[i]), i))

    if by_row or rule.architecture == "topk":
        candidates = []
        for row in range(batch):
            candidates += order(range(row * width, (row + 1) * width))[: math.ceil(rule.k)]
    else:
        candidates = range(batch * width)
    chosen = order(candidates)[: round(rule.k * batch)]
    fires[torch.tensor(chosen, dtype=torch.int64)] = True
    return fires.view(batch, width) & (size > 0)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 7),
    latents=st.integers(1, 9),
    share=st.floats(0.01, 1, allow_nan=False),
    levels=st.integers(1, 50),
    seed=st.integers(0, 1000),
    architecture=st.sampled_from(["batchtopk", "topk", "matryoshka"]),
    by_row=st.booleans(),
)
def test_what_fires_is_a_stable_sort_cut_off(
    rows, latents, share, levels, seed, architecture, by_row
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (rows, latents), generator=generator).float()
    rule = Rule(architecture, share * latents)
    assert torch.equal(choose(scores, rule, by_row=by_row), by_sorting(scores, rule, by_row))


@pytest.mark.parametrize(("k", "n"), [(0.01, 1), (0.5, 50), (2.344, 234), (7, 700)])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_fraction_of_a_latent_is_a_share_of_the_rows(k, n, by_row):
    scores = torch.rand(100, 20, generator=torch.Generator().manual_seed(0)) + 0.1
    assert int(choose(scores, Rule("batchtopk", k), by_row=by_row).sum()) == n


def test_the_prefixes_of_a_matryoshka_end_with_the_whole_dictionary():
    assert Rule("matryoshka", 4).prefixes(64) == (4, 8, 16, 32, 64)
    assert Rule("matryoshka", 1).prefixes(3) == (1, 3)
    assert Rule("batchtopk", 4).prefixes(64) == (64,)


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
    with pytest.raises(ConfigError, match="no rows"):
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
