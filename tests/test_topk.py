from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lorascope.features.topk import TopExamples

firings = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 60), st.sampled_from([0.5, 1.0, 1.5, 2.0])),
    unique_by=lambda f: f[:2],
    max_size=200,
)


def arrays(found):
    latents, rows, values = (
        (np.array(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    )
    return np.array(latents, np.int64), np.array(values, np.float32), np.array(rows, np.int64)


def by_sorting_everything(found, k):
    kept = []
    for latent in range(5):
        mine = sorted((f for f in found if f[0] == latent), key=lambda f: (-f[2], f[1]))
        kept += mine[:k]
    return [(latent, row, np.float32(value)) for latent, row, value in kept]


def as_list(top):
    offset, value, row = top.sorted()
    latents = np.repeat(np.arange(5), np.diff(offset))
    return list(zip(latents.tolist(), row.tolist(), value, strict=True))


@given(firings, st.integers(1, 7), st.lists(st.integers(0, 200), max_size=5))
def test_streaming_equals_sorting_everything_whatever_the_batches(found, k, cuts):
    top = TopExamples(5, k)
    bounds = [0, *sorted(min(c, len(found)) for c in cuts), len(found)]
    for first, last in pairwise(bounds):
        top.add(*arrays(found[first:last]))
        top._settle()
    assert as_list(top) == by_sorting_everything(found, k)


@given(firings, st.integers(1, 7), st.randoms(use_true_random=False))
def test_merging_in_any_order_gives_the_same(found, k, random):
    parts = [TopExamples(5, k) for _ in range(3)]
    for firing in found:
        random.choice(parts).add(*arrays([firing]))
    random.shuffle(parts)
    for part in parts[1:]:
        parts[0].merge(part)
    assert as_list(parts[0]) == by_sorting_everything(found, k)


def test_an_ascending_stream_keeps_its_last_k():
    top = TopExamples(1, 3)
    for row in range(100):
        top.add(np.zeros(1, np.int64), np.array([row], np.float32), np.array([row]))
    assert top.sorted()[2].tolist() == [99, 98, 97]


def test_ties_go_to_the_lower_row_also_when_it_comes_later():
    top = TopExamples(1, 1)
    for row in (9, 3, 5):
        top.add(np.zeros(1, np.int64), np.ones(1, np.float32), np.array([row]))
        top._settle()
    assert top.sorted()[2].tolist() == [3]
