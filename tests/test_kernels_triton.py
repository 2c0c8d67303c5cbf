"""Parity of the Triton kernels with their reference on ugly sizes.

Without a GPU they run in Triton's interpreter. It is chosen when Triton is imported, so the parity
tests run in a process of their own (`test_parity_holds_in_the_interpreter`); the marker `gpu` has
the same tests on CUDA.
"""

import pytest
import torch
from builders import definitions
from builders.interpreter import DEVICE, INTERPRETED, on_device, passed_in_the_interpreter
from builders.tolerance import assert_same_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

from lorascope.kernels import cuda  # noqa: E402

TYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")


def check_best(scores, n):
    """Compare with the reference: indices, and what fills the rest."""
    best = cuda.best_indices(scores.to(DEVICE), n)
    indices, values = best.indices.cpu(), best.values.cpu()
    wanted = definitions.best_indices(scores, n)
    assert len(indices) == len(values) == min(n, scores.numel())
    assert indices[: len(wanted)].tolist() == wanted.tolist()
    assert (indices[len(wanted) :] == scores.numel() - 1).all()
    assert not values[len(wanted) :].any()


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@on_device
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("shape", "n"),
    [((1, 1), 1), ((3, 7), 5), ((3, 7), 100), ((1, 2049), 40), ((13, 1009), 37), ((64, 640), 3)],
)
def test_the_best_indices_are_those_of_the_reference(shape, n, dtype):
    check_best(random(*shape).to(dtype), n)


@on_device
@pytest.mark.parametrize(("shape", "n"), [((0, 5), 3), ((5, 0), 3), ((0, 0), 0), ((3, 7), 0)])
def test_nothing_to_choose_gives_no_indices(shape, n):
    check_best(torch.ones(shape), n)


@on_device
@pytest.mark.parametrize("n", [1, 50, 2000, 9998])
def test_of_equal_scores_the_lower_indices_are_taken_across_tiles_and_blocks(n):
    check_best(torch.ones(11, 909), n)
    check_best(random(11, 909).round(), n)


@on_device
def test_fewer_positive_scores_than_wanted_are_all_taken():
    scores = -random(9, 700).abs()
    check_best(scores, 60)
    check_best(-torch.zeros(9, 700), 60)
    scores[2, 5] = scores[8, 698] = 1.0
    check_best(scores, 60)
    scores[4] = 2.0
    check_best(scores, 60)


@on_device
@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_of_both_signs_denormals_and_infinities_are_in_their_order(dtype):
    tiny = torch.finfo(dtype).smallest_normal
    small = torch.tensor([0.0, -0.0, tiny, tiny / 4, tiny / 2, -tiny, -tiny / 2]).to(dtype)
    large = torch.tensor([float("inf"), float("-inf"), torch.finfo(dtype).max]).to(dtype)
    scores = torch.cat([small, large]).repeat(3, 7)
    assert len(scores[0].unique()) >= 9  # the CPU has not flushed the denormals
    for n in (1, 4, 30, 70, 100, 210):
        check_best(scores, n)


@on_device
def test_scores_need_not_be_contiguous():
    check_best(random(301, 6).T, 20)
    check_best(random(5, 400)[:, ::3], 9)


@on_device
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1e-45, 0.5, 1.0, 1.0078125, 3.0]), max_size=90),
    st.integers(1, 40),
    st.integers(0, 100),
)
def test_any_mixture_of_ties_is_chosen_as_in_the_reference(row, repeats, n):
    check_best(torch.tensor([row], dtype=torch.float32).repeat(1, repeats), n)


def bags(lengths, n_entries, d, seed=0, dtype=torch.float32):
    """Make values, index, offsets and table of bags of these lengths."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    n = int(offsets[-1])
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, max(n_entries, 1), (n,), generator=generator)
    table = random(n_entries, d, seed=seed + 2, dtype=dtype)
    return random(n, seed=seed + 1, dtype=dtype), index, offsets, table


UGLY = {
    "no bags": ([], 3, 5),
    "no pairs": ([0, 0, 0], 3, 5),
    "no columns": ([2, 1], 3, 0),
    "one": ([1], 1, 1),
    "odd": ([3, 0, 7, 1, 0], 5, 13),
    "one bag holds everything": ([0, 0, 317, 0], 11, 6),
    "as long as pieces": ([64, 128, 0, 64, 1], 7, 3),
    "around pieces": ([63, 65, 129, 127, 1, 191, 0, 200], 9, 4),
    "rows of the paper": ([70, 40], 19, 448),
    "wider than a block": ([5, 130, 2], 4, 515),
}


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", UGLY)
def test_the_sums_of_bags_are_those_of_the_reference(case, dtype):
    given = bags(*UGLY[case], dtype=dtype)
    ours = cuda.gather_sum(*(t.to(DEVICE) for t in given)).cpu()
    assert ours.dtype == dtype
    n_terms = max(len(given[1]), 4)
    wanted = definitions.gather_sum(*given)
    assert_same_up_to_rounding(ours, wanted, n_terms=n_terms, dtype=dtype)


@on_device
def test_the_sum_of_a_bag_does_not_depend_on_the_bags_before_it():
    values, index, offsets, table = bags([333], 40, 24)
    alone = cuda.gather_sum(*(t.to(DEVICE) for t in (values, index, offsets, table)))[0]
    for before in (1, 31, 64, 100):
        values2, index2 = torch.cat([values[:before], values]), torch.cat([index[:before], index])
        offsets2 = torch.tensor([0, before, before + 333])
        moved = cuda.gather_sum(*(t.to(DEVICE) for t in (values2, index2, offsets2, table)))[1]
        assert torch.equal(alone, moved)


@on_device
def test_a_bfloat16_table_is_added_up_in_float32():
    values, index, offsets, table = bags([300, 3], 30, 20)
    table = table.bfloat16()
    sums = cuda.gather_sum(*(t.to(DEVICE) for t in (values, index, offsets, table)))
    wanted = definitions.gather_sum(values, index, offsets, table.float())
    assert sums.dtype == torch.float32
    assert_same_up_to_rounding(sums.cpu(), wanted, n_terms=len(index))


@on_device
@pytest.mark.parametrize(("n_pairs", "d"), [(0, 3), (1, 1), (33, 56), (67, 13), (5, 0), (9, 515)])
def test_the_inner_products_of_pairs_are_those_of_the_reference(n_pairs, d):
    left, right = random(7, d, seed=1), random(11, d, seed=2)
    generator = torch.Generator().manual_seed(3)
    left_index = torch.randint(0, 7, (n_pairs,), generator=generator).sort().values
    right_index = torch.randint(0, 11, (n_pairs,), generator=generator)
    given_ = (left, left_index, right, right_index)
    wanted = definitions.pair_dot(*given_)
    ours = cuda.pair_dot(*(t.to(DEVICE) for t in given_)).cpu()
    assert_same_up_to_rounding(ours, wanted, n_terms=d)


@on_device
@pytest.mark.parametrize("n_pairs", [0, 1, 97, 3000])
def test_pairs_by_latent_keep_their_order_and_bounds(n_pairs):
    generator = torch.Generator().manual_seed(n_pairs)
    latents = torch.randint(0, 13, (n_pairs,), generator=generator)
    latents[::2] = 4  # one that fires in every other row; 13 and 14 never do
    order, offsets = cuda.by_latent(latents.to(DEVICE), 15)
    wanted = sorted(range(n_pairs), key=lambda p: int(latents[p]))
    assert order.tolist() == wanted
    assert (order.dtype, offsets.dtype, len(offsets)) == (torch.int64, torch.int64, 16)
    assert offsets.diff().tolist() == torch.bincount(latents, minlength=15).tolist()


def step(scores, n, table, gradient):
    """Choose, decode, and return the gradients of the values and of the table, by pairs."""
    n_rows, width = scores.shape
    best = cuda.best_indices(scores, n)
    indices, count = best.indices, (best.values > 0).sum()
    chosen = torch.arange(len(indices), device=scores.device) < count
    values = scores.view(-1)[indices].float().where(chosen, 0)
    rows, latents = indices // width, indices % width
    sums = cuda.gather_sum(values, latents, cuda.row_offsets(rows, n_rows), table)
    of_values = cuda.pair_dot(gradient, rows, table, latents).where(chosen, 0)
    order, bounds = cuda.by_latent(latents, width)
    of_table = cuda.gather_sum(values[order], rows[order], bounds, gradient)
    return indices, count, sums, of_values, of_table


@on_device
def test_a_step_by_pairs_is_the_dense_step_also_where_few_are_positive():
    table, gradient = random(97, 10, seed=1), random(21, 10, seed=2)
    for shift in (0.0, -2.5):
        scores = random(21, 97) + shift
        given_ = (t.to(DEVICE) for t in (table, gradient))
        _, count, sums, of_values, of_table = step(scores.to(DEVICE), 63, *given_)
        code = torch.zeros(21 * 97)
        chosen = definitions.best_indices(scores, 63)
        code[chosen] = scores.view(-1)[chosen]
        code = code.view(21, 97)
        assert int(count) == len(chosen)
        assert (int(count) < 63) == (shift < 0)
        assert_same_up_to_rounding(sums, code @ table, n_terms=97)
        assert_same_up_to_rounding(of_table, code.T @ gradient, n_terms=21)
        dense = (gradient @ table.T).view(-1)[chosen]
        assert_same_up_to_rounding(of_values[: len(chosen)], dense, n_terms=10)
        assert not of_values[len(chosen) :].any()


@on_device
def test_a_repetition_gives_the_same_bits():
    given_ = [t.to(DEVICE) for t in (random(40, 90), random(90, 24, seed=1), random(40, 24))]
    once, again = (step(given_[0], 300, *given_[1:]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


if not INTERPRETED:

    @pytest.mark.slow
    def test_parity_holds_in_the_interpreter():
        assert passed_in_the_interpreter(__file__) > 60

    @pytest.mark.slow
    def test_every_kernel_compiles_without_a_gpu(tmp_path, monkeypatch):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        pointers = {"values": "fp32", "table": "bf16", "out": "fp32"}
        pointers |= dict.fromkeys(("left", "right", "pieces"), "fp32")
        pointers |= dict.fromkeys(
            ("index", "offsets", "cut_bags", "left_index", "right_index"), "i64"
        )
        sizes = {"WIDTH": 32, "PAIRS": 4, "PIECE": 64, "WIDE": triton.language.float32}
        compiled = set()
        for name, kernel in vars(cuda).items():
            if not isinstance(kernel, triton.JITFunction) or name == "_sum_run":  # part of others
                continue
            constants = {a: sizes[a] for a in kernel.arg_names if a.isupper()}
            signature = {
                a: "constexpr" if a in sizes else "*" + pointers[a] if a in pointers else "i32"
                for a in kernel.arg_names
            }
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            target = GPUTarget("cuda", 90, 32)
            assert triton.compile(source, target=target).asm["cubin"]
            compiled.add(name)
        assert len(compiled) == 3

    @on_device
    @pytest.mark.parametrize("dtype", TYPES)
    def test_a_captured_graph_replays_the_step_on_other_scores(dtype):
        scores = random(256, 2048).to(DEVICE, dtype)
        table, gradient = random(2048, 56, seed=1).to(DEVICE), random(256, 56, seed=2).to(DEVICE)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step(scores, 5120, table, gradient)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(scores, 5120, table, gradient)
        for seed, shift in ((3, 0.0), (4, -2.5), (5, 1.0)):
            scores.copy_((random(256, 2048, seed=seed) + shift).to(dtype))
            graph.replay()
            eager = step(scores, 5120, table, gradient)
            assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))

    @on_device
    @pytest.mark.parametrize("dtype", TYPES)
    def test_large_batches_are_chosen_as_in_the_reference(dtype):
        scores = random(1024, 7168).to(dtype)
        check_best(scores, 51_200)
        check_best(scores.relu(), 3_700_000)
