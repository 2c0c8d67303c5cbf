from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorascope.features.topk import Firings, FiringSample, TopExamples, row_hash

N_LATENTS, LENGTH, N_ROWS = 5, 7, 63  # nine rollouts of seven rows

firings = st.lists(
    st.tuples(
        st.integers(0, N_LATENTS - 1),
        st.integers(0, N_ROWS - 1),
        st.sampled_from([0.5, 1.0, 1.5, 2.0]),
    ),
    unique_by=lambda f: f[:2],
    max_size=200,
)
contexts = st.lists(st.integers(0, 9), min_size=N_ROWS, max_size=N_ROWS)
limits = st.one_of(st.none(), st.integers(1, 3))


def columns(found, context) -> Firings:
    latent, row, value = (
        (np.array(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    )
    row = np.array(row, np.int64)
    return Firings(
        np.array(latent, np.int64),
        np.array(value, np.float32),
        row,
        row // LENGTH,
        np.array(context, np.uint64)[row],
    )


def strongest_by_sorting(found, context, k, per_rollout):
    """Return the top examples by their definition, one firing at a time."""
    kept = []
    for latent in range(N_LATENTS):
        mine = sorted((f for f in found if f[0] == latent), key=lambda f: (-f[2], f[1]))
        if per_rollout is not None:
            able, taken = [], {}
            for f in mine:
                same_rollout = taken.setdefault(f[1] // LENGTH, [])
                if context[f[1]] not in same_rollout and len(same_rollout) < per_rollout:
                    same_rollout.append(context[f[1]])
                    able.append(f)
            mine = able
        seen, best = set(), []
        for f in mine:
            if context[f[1]] not in seen:
                seen.add(context[f[1]])
                best.append(f)
        kept += best[:k]
    return [(latent, row, np.float32(value)) for latent, row, value in kept]


def as_list(kept):
    found = kept.sorted()
    return list(zip(found.latent.tolist(), found.row.tolist(), found.value, strict=True))


@given(firings, contexts, st.integers(1, 7), limits, st.lists(st.integers(0, N_ROWS), max_size=5))
def test_streaming_equals_sorting_everything_for_any_cut_of_the_rows(
    found, context, k, per_rollout, cuts
):
    top = TopExamples(N_LATENTS, k, per_rollout)
    for first, last in pairwise([0, *sorted(cuts), N_ROWS]):
        part = [f for f in found if first <= f[1] < last]
        is_cut = last % LENGTH and last < N_ROWS
        top.add(columns(part, context), open_from=last // LENGTH * LENGTH if is_cut else None)
        top.flush()
    assert as_list(top) == strongest_by_sorting(found, context, k, per_rollout)


@pytest.mark.slow
@given(firings, contexts, st.integers(1, 7), limits, st.permutations(range(9)))
def test_merging_rollouts_in_any_order_gives_the_same(found, context, k, per_rollout, order):
    parts = [TopExamples(N_LATENTS, k, per_rollout) for _ in range(3)]
    for i, rollout in enumerate(order):
        parts[i % 3].add(columns([f for f in found if f[1] // LENGTH == rollout], context))
        parts[i % 3].flush()
    parts[1].merge(parts[2])
    parts[0].merge(parts[1])
    assert as_list(parts[0]) == strongest_by_sorting(found, context, k, per_rollout)


@given(firings, st.integers(1, 7), st.randoms(use_true_random=False))
def test_without_contexts_and_limits_it_is_the_plain_top_k(found, k, random):
    random.shuffle(found)
    alone = list(range(N_ROWS))
    top = TopExamples(N_LATENTS, k)
    for i in range(0, len(found), 13):
        top.add(columns(found[i : i + 13], alone))
    kept = []
    for latent in range(N_LATENTS):
        mine = sorted((f for f in found if f[0] == latent), key=lambda f: (-f[2], f[1]))
        kept += [(latent, row, np.float32(value)) for _, row, value in mine[:k]]
    assert as_list(top) == kept


@given(firings, st.integers(1, 7), st.randoms(use_true_random=False))
def test_a_sample_has_the_lowest_hashes_in_any_order_of_the_firings(found, n, random):
    random.shuffle(found)
    alone = list(range(N_ROWS))
    parts = [FiringSample(N_LATENTS, n) for _ in range(3)]
    for i in range(0, len(found), 7):
        parts[i % 3].add(columns(found[i : i + 7], alone))
        parts[i % 3].flush()
    parts[2].merge(parts[0])
    parts[2].merge(parts[1])
    expected = []
    for latent in range(N_LATENTS):
        mine = [f for f in found if f[0] == latent]
        mine.sort(key=lambda f: (int(row_hash(np.array([f[1]]))[0]), f[1]))
        expected += [(latent, row, np.float32(value)) for _, row, value in mine[:n]]
    assert as_list(parts[2]) == expected


def test_a_sample_is_spread_evenly_over_the_stream():
    sample = FiringSample(1, 2000)
    rows = np.arange(100_000)
    for part in np.array_split(rows, 50):
        whole = part.astype(np.int64)
        value = np.ones(len(part), np.float32)
        sample.add(Firings(np.zeros_like(whole), value, whole, whole, whole.astype(np.uint64)))
    kept = sample.sorted().row
    assert len(kept) == 2000
    counts = np.bincount(kept // 10_000, minlength=10)
    assert abs(counts - 200).max() < 60  # four standard deviations


def stream(rows, values, context=None) -> Firings:
    """Return firings of latent 0, each in its own rollout."""
    row = np.array(rows, np.int64)
    value = np.array(values, np.float32)
    return Firings(np.zeros_like(row), value, row, row, np.array(context or rows, np.uint64))


def test_an_ascending_stream_keeps_its_last_k():
    top = TopExamples(1, 3)
    for row in range(100):
        top.add(stream([row], [1.0 + row]))
    assert top.sorted().row.tolist() == [99, 98, 97]


def test_ties_go_to_the_lower_row_even_if_it_comes_later():
    top = TopExamples(1, 1)
    for row in (9, 3, 5):
        top.add(columns([(0, row, 1.0)], range(N_ROWS)))
        top.flush()
    assert top.sorted().row.tolist() == [3]


@pytest.mark.parametrize("buffer_size", [1, 50])
def test_the_size_of_the_buffer_changes_nothing(buffer_size):
    rng = np.random.default_rng(0)
    values = rng.choice([0.5, 1, 2], 300)
    order = rng.permutation(300)
    kept = []
    for size in (None, buffer_size):
        top, sample = TopExamples(1, 4, 2), FiringSample(1, 4)
        if size:
            top._buffer_size = sample._buffer_size = size
        for rows in np.split(order, 30):
            part = stream(rows.tolist(), values[rows], (rows % 40).tolist())
            top.add(part)
            sample.add(part)
        kept.append((as_list(top), as_list(sample)))
    assert kept[0] == kept[1]
