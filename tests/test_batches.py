import contextlib
import gc
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.stores import layout_of, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.activations import batches
from lorascope.activations.batches import (
    BatchPlan,
    Shuffle,
    batches_on,
    read_blocks,
    split_rows,
)
from lorascope.activations.store import ActivationStore
from lorascope.errors import ArtifactError, ConfigError, NumberError
from lorascope.texts.roles import ROLES


def numbered(make_store, n_rollouts=10, length=30, **kwargs):
    """A store whose first column is the row's own number."""
    rows = np.zeros((n_rollouts * length, 14))
    rows[:, 0] = np.arange(len(rows))
    return make_store(rows, n_rollouts=n_rollouts, **kwargs)


def test_whole_rollouts_are_held_out_and_every_token_is_on_one_side(make_store):
    store = numbered(make_store)
    train, held = split_rows(store, 0.2, seed=1)
    assert not set(store.rollout_of(train)) & set(store.rollout_of(held))
    assert len(set(store.rollout_of(held))) == 2
    assert sorted([*train, *held]) == list(range(store.n_rows))


@pytest.mark.parametrize(("n_rollouts", "holdout"), [(2, 0.001), (2, 0.999), (5, 0.01), (5, 0.99)])
def test_both_sides_have_a_rollout_whatever_the_share(make_store, n_rollouts, holdout):
    train, held = split_rows(numbered(make_store, n_rollouts), holdout, seed=0)
    assert len(train) >= 29
    assert len(held) >= 29


def test_one_rollout_is_split_by_row(make_store):
    train, held = split_rows(numbered(make_store, 1, 40), 0.25, seed=0)
    assert (len(train), len(held)) == (30, 10)


def batch(plan, number):
    """Return a batch read row by row, as a reference for how plans read them."""
    return torch.from_numpy(plan.store.take(plan.rows[plan.indices(number)])).float()


def test_a_store_of_one_token_is_refused(make_store):
    with pytest.raises(ArtifactError, match="1 tokens to train on"):
        split_rows(numbered(make_store, 1, 1), 0.1, seed=0)


def test_every_epoch_shows_every_row_once_in_another_order(make_store):
    store = numbered(make_store)
    rows = np.flatnonzero(store.eligible)  # 290 rows: not a multiple of 64
    plan = BatchPlan.from_store(store, rows, 64, seed=3)
    seen = np.concatenate([batch(plan, i)[:, 0].numpy() for i in range(plan.n_batches(3))])
    assert plan.n_batches(3) == 3 * 290 // 64
    first, second = seen[:290], seen[290:580]
    assert sorted(first) == sorted(second) == sorted(rows)
    assert (first != second).any()
    assert abs(np.corrcoef(first, np.arange(290))[0, 1]) < 0.2


def test_one_pool_is_one_permutation_of_all_rows(make_store):
    store = numbered(make_store)
    plan = BatchPlan.from_store(store, np.arange(300), 100, seed=3)
    assert plan.buffer_rows == 300
    assert plan.loaded is not None
    for epoch in (0, 1):
        indices = np.concatenate([plan.indices(3 * epoch + i) for i in range(3)])
        assert (indices == np.random.default_rng([3, 1, epoch]).permutation(300)).all()
    larger = BatchPlan.from_store(store, np.arange(300), 100, seed=3, buffer_rows=10**9)
    assert (larger.indices(4) == plan.indices(4)).all()


@pytest.mark.parametrize("buffer_rows", [None, 45])
def test_any_batch_is_the_same_alone_and_in_a_row(make_store, buffer_rows):
    store = numbered(make_store, dtype="float16")
    rows = np.flatnonzero(store.eligible)
    straight = BatchPlan.from_store(store, rows, 100, seed=3, buffer_rows=buffer_rows)
    line = [batch(straight, i) for i in range(9)]
    alone = BatchPlan.from_store(store, rows, 100, seed=3, buffer_rows=buffer_rows)
    for i in (7, 2, 8, 0):
        assert torch.equal(batch(alone, i), line[i])
        assert batch(alone, i).dtype == torch.float32
    for first in range(9):
        resumed = list(alone.batches(first, 9))
        assert [b.tolist() for b in resumed] == [b.tolist() for b in line[first:]]
        assert {b.dtype for b in resumed} == {torch.float32}
    assert not torch.equal(
        batch(BatchPlan.from_store(store, rows, 100, seed=4, buffer_rows=buffer_rows), 0), line[0]
    )


def test_neighbours_of_one_rollout_rarely_stay_neighbours(make_store):
    store = numbered(make_store, 20, 50)
    plan = BatchPlan.from_store(store, np.flatnonzero(store.eligible), 980, seed=0)
    rollouts = store.rollout_of(batch(plan, 0)[:, 0].numpy().astype(np.int64))
    assert (np.diff(rollouts) == 0).mean() < 0.1  # 1 in 20 by chance


def test_one_shard_and_one_batch_work(make_store):
    store = numbered(make_store, rollouts_per_shard=10)
    rows = np.flatnonzero(store.eligible)
    plan = BatchPlan.from_store(store, rows, len(rows), seed=0)
    assert plan.n_batches(1) == 1
    assert sorted(batch(plan, 0)[:, 0].tolist()) == sorted(rows)


def test_numpys_global_generator_is_neither_read_nor_changed(make_store):
    store = numbered(make_store)
    before = np.random.get_state()[1].copy()
    batch(BatchPlan.from_store(store, split_rows(store, 0.1, 0)[0], 8, seed=0), 0)
    assert (np.random.get_state()[1] == before).all()


def test_fewer_tokens_than_a_batch_are_refused(make_store):
    store = numbered(make_store)
    with pytest.raises(ArtifactError, match="200 training tokens, fewer than one batch of 201"):
        BatchPlan.from_store(store, np.arange(200), 201, seed=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("buffer_rows", [7, 60])
def test_a_value_that_is_not_finite_is_named_by_row_and_column(make_store, bad, buffer_rows):
    rows = np.zeros((60, 14))
    rows[37, 8] = bad
    store = make_store(rows, n_rollouts=3)
    with pytest.raises(NumberError, match=r"row 37 \(rollout 1\) is .* column 8 \(1.up_proj\)"):
        list(
            BatchPlan.from_store(store, np.arange(60), 60, 0, buffer_rows=buffer_rows).batches(0, 1)
        )


def test_blocks_come_in_the_order_asked_for(make_store):
    store = numbered(make_store)
    rows = np.array([250, 3, 77, 4], np.int64)
    blocks = list(read_blocks(store, rows, size=3))
    assert [len(block) for block in blocks] == [3, 1]
    assert torch.cat(blocks)[:, 0].tolist() == [250, 3, 77, 4]


# --- which rows


def with_roles(make_store, roles: str):
    """A store of six rollouts, whose tokens have these roles by turns."""
    store = numbered(make_store, 6, 40)
    names = roles.split()
    own = np.array([ROLES.index(names[i % len(names)]) for i in range(store.n_rows)], np.uint8)
    store.__dict__["roles"] = np.where(store.roles == ROLES.index("special"), store.roles, own)
    return store


def test_only_rows_of_the_named_roles_are_used(make_store):
    store = with_roles(make_store, "user think think answer")
    train, held = split_rows(store, 0.2, 0, ("think", "answer"))
    used = np.sort(np.concatenate([train, held]))
    think, answer = ROLES.index("think"), ROLES.index("answer")
    assert (used == np.flatnonzero(np.isin(store.roles, [think, answer]))).all()
    assert not set(store.rollout_of(train)) & set(store.rollout_of(held))
    everything = np.concatenate(split_rows(store, 0.2, 0))
    assert set(everything) == set(range(store.n_rows))


def test_special_tokens_are_left_out_where_other_roles_are_named(make_store):
    store = with_roles(make_store, "think")
    assert len(np.concatenate(split_rows(store, 0.2, 0, ("think",)))) == 234
    assert len(np.concatenate(split_rows(store, 0.2, 0, ("think", "special")))) == 240
    assert len(np.concatenate(split_rows(store, 0.2, 0, ("special",)))) == 6
    older = np.concatenate(split_rows(store, 0.2, 0, ()))  # their settings name no role
    assert set(older) == set(np.flatnonzero(store.eligible))


def test_an_unknown_role_is_refused_with_the_known_ones(make_store):
    known = "system, user, think, answer, special, text; did you mean think"
    with pytest.raises(ConfigError, match=f"unknown role thinks, expected {known}"):
        split_rows(numbered(make_store), 0.1, 0, ("answer", "thinks"))


def test_roles_that_no_token_has_are_refused_with_the_roles_that_there_are(make_store):
    store = with_roles(make_store, "user think think answer")
    with pytest.raises(
        ArtifactError, match=r"0 tokens .* system, text \(it has: user 54, think 120, .* special 6"
    ):
        split_rows(store, 0.1, 0, ("system", "text"))


# --- how well rows are shuffled


def order_of(plan, epoch):
    """The indices of an epoch in the order in which they are emitted."""
    assert len(plan.rows) % plan.batch_size == 0
    n = plan.n_batches(1)
    return np.concatenate([plan.indices(i) for i in range(epoch * n, (epoch + 1) * n)])


@pytest.fixture(scope="module")
def long_store(tmp_path_factory):
    """400 rollouts of 100 rows in ten shards, all rows eligible; column 0 is the row's number."""
    rows = np.zeros((40_000, 14))
    rows[:, 0] = np.arange(40_000)
    folder = tmp_path_factory.mktemp("long") / "store"
    return write_store(folder, rows, n_rollouts=400, rollouts_per_shard=40, n_special=0)


@pytest.mark.parametrize("buffer_rows", [1000, 4000, 16_400, 39_999, 40_000])
def test_emitted_order_does_not_follow_the_stores_order(long_store, buffer_rows):
    plan = BatchPlan.from_store(long_store, np.arange(40_000), 1000, 5, buffer_rows=buffer_rows)
    orders = [order_of(plan, epoch) for epoch in range(8)]
    for order in orders:
        assert (np.sort(order) == np.arange(40_000)).all()
    for a, b in pairwise(orders):
        assert (a == b).mean() < 0.01
        assert set(a[:1000]) != set(b[:1000])
    # indices are ranks, without ties: Pearson's correlation of them is Spearman's
    correlation = [np.corrcoef(order, np.arange(40_000))[0, 1] for order in orders]
    assert np.abs(correlation).mean() < 0.05


@pytest.mark.parametrize("buffer_rows", [1000, 4000, 16_400, 39_999])
def test_neighbours_come_from_one_rollout_as_rarely_as_stated(long_store, buffer_rows):
    plan = BatchPlan.from_store(long_store, np.arange(40_000), 1000, 5, buffer_rows=buffer_rows)
    orders = [order_of(plan, epoch) for epoch in range(4)]
    pairs = np.concatenate([np.stack([order[:-1], order[1:]]) for order in orders], axis=1)
    same = (np.diff(long_store.rollout_of(pairs), axis=0) == 0).mean()
    run, pool = max(buffer_rows // 1024, 1), 40_000 / -(-40_000 // buffer_rows)
    by_chance = 1 / 400  # in a permutation of the whole store
    error = 4 * np.sqrt(0.005 / pairs.shape[1])
    assert same < by_chance + run / pool + error < by_chance + 1 / 512 + error
    assert same == pytest.approx((run - 1) / pool + (100 - run) / 40_000, abs=error)


def test_a_pool_is_read_in_runs_and_holds_no_more_rows_than_the_buffer():
    shuffle = Shuffle(2_000_000, 400_000, seed=1)
    assert shuffle.n_pools == 5
    for pool in range(7):
        indices = np.sort(shuffle.indices(pool))
        assert len(indices) == shuffle.start_of(pool + 1) - shuffle.start_of(pool) == 400_000
        pieces = 1 + (np.diff(indices) != 1).sum()
        assert 1000 < pieces <= 400_000 / 256 + 3  # the ends of the pool cut two runs at most


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 700), st.integers(1, 900), st.integers(0, 2**40), st.integers(1, 4))
def test_every_epoch_of_any_size_is_a_permutation(n_rows, buffer_rows, seed, epochs):
    shuffle = Shuffle(n_rows, buffer_rows, seed)
    for epoch in range(epochs):
        pools = range(epoch * shuffle.n_pools, (epoch + 1) * shuffle.n_pools)
        parts = [shuffle.indices(pool) for pool in pools]
        assert max(map(len, parts)) <= buffer_rows
        assert min(map(len, parts)) >= min(n_rows, buffer_rows) // 2
        assert (np.sort(np.concatenate(parts)) == np.arange(n_rows)).all()
        for pool, part in zip(pools, parts, strict=True):
            first = shuffle.start_of(pool)
            assert {shuffle.pool_at(first), shuffle.pool_at(first + len(part) - 1)} == {pool}


# --- streaming


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    """20 rollouts of 35 rows in three shards; column 0 is the row's number."""
    rows = np.zeros((700, 14))
    rows[:, 0] = np.arange(700)
    folder = tmp_path_factory.mktemp("small") / "store"
    return write_store(folder, rows, n_rollouts=20, rollouts_per_shard=8, n_special=0)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_stream_has_every_row_once_an_epoch_whatever_the_sizes(small_store, data):
    n_rows = data.draw(st.integers(1, 700), "rows")
    batch_size = data.draw(st.integers(max(1, n_rows // 40), n_rows), "batch size")
    buffer_rows = data.draw(st.integers(max(1, n_rows // 40), n_rows + 5), "buffer")
    epochs, world = data.draw(st.integers(1, 3), "epochs"), data.draw(st.integers(1, 5), "world")
    rows = np.sort(np.random.default_rng(n_rows).choice(700, n_rows, replace=False))
    plan = BatchPlan.from_store(small_store, rows, batch_size, n_rows, buffer_rows=buffer_rows)
    assert (plan.loaded is None) == (buffer_rows < n_rows)
    n = plan.n_batches(epochs)
    assert n == epochs * n_rows // batch_size
    whole = list(plan.batches(0, n))
    assert len(whole) == n
    assert all(torch.equal(found, batch(plan, i)) for i, found in enumerate(whole))
    seen = torch.cat(whole)[:, 0].tolist()
    for epoch in range(epochs):
        part = Counter(seen[epoch * n_rows : (epoch + 1) * n_rows])
        assert max(part.values(), default=1) == 1
        assert set(part) <= set(rows.tolist())
        assert len(part) == n_rows or epoch == epochs - 1
    ranks = [list(plan.batches(0, n, part=(rank, world))) for rank in range(world)]
    sizes = {len(own[0]) for own in ranks}
    assert max(sizes) - min(sizes) <= 1
    for found, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.cat(parts), found)
    first = data.draw(st.integers(0, n), "resumed at")
    resumed = list(plan.batches(first, n, part=(world - 1, world)))
    assert all(torch.equal(a, b) for a, b in zip(resumed, ranks[-1][first:], strict=True))


@pytest.mark.parametrize("readers", [1, 2, 7])
def test_the_number_of_reading_threads_changes_nothing(small_store, monkeypatch, readers):
    monkeypatch.setattr(batches, "_CHUNK", 16)
    expected = streamed(small_store, np.arange(700), 64, 200, 20)
    monkeypatch.setattr(batches, "_READERS", readers)
    assert torch.equal(streamed(small_store, np.arange(700), 64, 200, 20), expected)


def streamed(store, rows, batch_size, buffer_rows, n):
    plan = BatchPlan.from_store(store, rows, batch_size, 0, buffer_rows=buffer_rows)
    return torch.cat(list(plan.batches(0, n)))


def test_one_shard_one_run_and_a_buffer_smaller_than_a_batch_work(make_store):
    store = numbered(make_store, rollouts_per_shard=10)  # one shard of 300 rows
    for rows, batch_size, buffer_rows in [(300, 300, 1), (255, 100, 254), (2, 1, 1), (1, 1, 1)]:
        found = streamed(store, np.arange(rows), batch_size, buffer_rows, 2 * rows // batch_size)
        line = found[:, 0].numpy()
        assert sorted(line[:rows]) == list(range(rows))
        assert set(line[rows:]) <= set(range(rows))


def test_columns_of_a_selection_are_streamed(make_store):
    store = make_store(dtype="float16").select(["up_proj", "o_proj"])
    plan = BatchPlan.from_store(store, np.arange(240), 50, 1, buffer_rows=60)
    for i, found in enumerate(plan.batches(0, 12)):
        rows = torch.from_numpy(store.take(plan.rows[plan.indices(i)])).float()
        assert found.shape == (50, 4)
        assert torch.equal(found, rows)


def test_a_buffer_by_default_is_what_fits_in_memory_and_half_of_that_in_a_stream(
    make_store, monkeypatch
):
    store = numbered(make_store, dtype="float16")  # 28 bytes a row
    monkeypatch.setattr(batches, "_IN_MEMORY", 28 * 300)
    assert BatchPlan.from_store(store, np.arange(300), 10, 0).buffer_rows == 300
    monkeypatch.setattr(batches, "_IN_MEMORY", 28 * 299)
    plan = BatchPlan.from_store(store, np.arange(300), 10, 0)
    assert plan.buffer_rows == 149
    assert plan.loaded is None


@pytest.mark.slow
def test_two_pools_are_in_memory_at_most(make_store, monkeypatch):
    layout = layout_of(n_layers=40)  # 1120 bytes a row: what is kept per row counts for little
    store = make_store(layout=layout, n_rollouts=20, length=1000, rollouts_per_shard=5)
    monkeypatch.setattr(batches, "_CHUNK", 64)
    plan = BatchPlan.from_store(store, np.arange(20_000), 100, 0, buffer_rows=2000)
    pool = 2000 * layout.d_in * 4
    list(plan.batches(0, 2))
    store.take(np.arange(2))
    peaks = []
    for n in (60, 400):  # three pools, and two epochs of ten
        tracemalloc.start()
        for _ in plan.batches(0, n):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 1.9 * pool < max(peaks) < 2.6 * pool  # four chunks, and 16 bytes a row
    assert max(peaks) / min(peaks) < 1.25  # it does not grow with the batches


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stream_reads_its_rows_once_and_maps_none_of_them(make_store):
    """Otherwise a store larger than memory is read many times over."""
    layout = layout_of(n_layers=40)  # 1120 bytes a row
    store = make_store(layout=layout, n_rollouts=20, length=2000, rollouts_per_shard=5)
    n_bytes = 40_000 * layout.d_in * 4
    plan = BatchPlan.from_store(store, np.arange(40_000), 100, 0, buffer_rows=4000)
    list(plan.batches(0, 2))

    def of_process(file, name):
        with Path("/proc/self", file).open() as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

    read, mapped = of_process("io", "rchar"), of_process("status", "RssFile")
    assert sum(map(len, plan.batches(0, 400))) == 40_000
    assert n_bytes < of_process("io", "rchar") - read < 1.1 * n_bytes
    assert 1024 * (of_process("status", "RssFile") - mapped) < n_bytes / 10


def test_a_part_of_the_batches_keeps_that_part_of_the_pools_only(make_store, monkeypatch):
    layout = layout_of(n_layers=40)
    store = make_store(layout=layout, n_rollouts=20, length=1000, rollouts_per_shard=5)
    monkeypatch.setattr(batches, "_CHUNK", 16)
    plan = BatchPlan.from_store(store, np.arange(20_000), 100, 0, buffer_rows=5000)
    list(plan.batches(0, 2, part=(0, 4)))
    tracemalloc.start()
    for found in plan.batches(0, 200, part=(1, 4)):
        assert len(found) == 25
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.8 * 5000 * layout.d_in * 4  # two quarters, and the order of a pool


class Reads:
    """Notes the rows that are read by a store's `read_into`."""

    def __init__(self, monkeypatch):
        self.rows, self.before = [], lambda: None
        read_into = ActivationStore.read_into

        def noted(store, out, rows):
            self.before()
            self.rows.append(rows.copy())
            return read_into(store, out, rows)

        monkeypatch.setattr(ActivationStore, "read_into", noted)

    def count(self):
        return sum(map(len, self.rows))

    def settle(self, n):
        """Wait until `n` rows are read, then for more that should not come."""
        end = time.monotonic() + 20
        while self.count() < n and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(0.1)
        return self.count()


def test_the_next_pool_is_read_while_one_is_used_and_none_after_it(small_store, monkeypatch):
    reads = Reads(monkeypatch)
    monkeypatch.setattr(batches, "_READERS", 1)
    monkeypatch.setattr(batches, "_CHUNK", 20)
    plan = BatchPlan.from_store(small_store, np.arange(700), 10, 0, buffer_rows=100)
    with contextlib.closing(plan.batches(0, 70)) as stream:
        assert reads.count() == 0
        next(stream)
        assert reads.settle(200) == 200  # of 700
        for _ in range(7):
            next(stream)
        assert reads.settle(200) == 200  # batches 8 and 9 are the last of the first pool
        next(stream)
        assert reads.settle(300) == 300
    for first in (0, 5, 10):
        pool = np.concatenate(reads.rows[first : first + 5])
        assert (np.diff(pool) > 0).all()  # in file order
    assert len(np.unique(np.concatenate(reads.rows))) == 300


def test_a_resumed_stream_reads_only_what_it_emits(small_store, monkeypatch):
    reads = Reads(monkeypatch)
    plan = BatchPlan.from_store(small_store, np.arange(700), 10, 0, buffer_rows=350)
    list(plan.batches(30, 40))
    assert reads.count() == 100
    reads.rows.clear()
    list(plan.batches(30, 40, part=(2, 3)))
    assert reads.count() == 10 * 4
    assert list(plan.batches(40, 40)) == []


@pytest.mark.parametrize("buffer_rows", [50, 220])
def test_a_bad_value_is_raised_at_its_batch_and_not_before(make_store, buffer_rows):
    rows = np.zeros((700, 14))
    rows[437, 8] = np.nan
    store = make_store(rows, n_rollouts=20, length=35, dtype="float16")
    plan = BatchPlan.from_store(store, np.arange(700), 10, 0, buffer_rows=buffer_rows)
    at = next(i for i in range(70) if 437 in plan.indices(i))
    assert at % 22 > 3  # neither at a pool's beginning nor among the first batches
    found = []
    with pytest.raises(NumberError, match=r"row 437 \(rollout 12\) is nan in column 8 \(1.up_proj"):
        for batch in plan.batches(0, 70):
            found.append(batch)
    assert len(found) == at
    assert own_threads() == []
    assert len(list(plan.batches(at + 1, 70))) == 69 - at
    inside = int(np.flatnonzero(plan.indices(at) == 437)[0])
    for rank in (0, 1):
        part = plan.batches(0, 70, part=(rank, 2))
        if inside // 5 == rank:
            with pytest.raises(NumberError, match="row 437"):
                list(part)
        else:
            assert len(list(part)) == 70


def test_an_error_of_reading_surfaces_in_the_caller_at_the_pools_first_batch(
    small_store, monkeypatch
):
    reads = Reads(monkeypatch)
    plan = BatchPlan.from_store(small_store, np.arange(700), 10, 0, buffer_rows=100)

    def fail():
        if reads.count() >= 100:
            raise OSError("the disk is gone")

    reads.before = fail
    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        for batch in plan.batches(0, 70):
            found.append(batch)
    assert len(found) == 10
    assert own_threads() == []


# --- threads


def own_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith(batches._THREADS)]


def settled_threads():
    """The module's threads, after those that were told to end have had time to."""
    end = time.monotonic() + 20
    while own_threads() and time.monotonic() < end:
        time.sleep(0.005)
    return own_threads()


@pytest.mark.parametrize("buffer_rows", [100, 700])
def test_closing_ends_the_threads_at_once(small_store, buffer_rows):
    plan = BatchPlan.from_store(small_store, np.arange(700), 10, 0, buffer_rows=buffer_rows)
    assert own_threads() == []
    stream = plan.batches(0, 70)
    next(stream)
    assert own_threads()
    stream.close()
    assert own_threads() == []
    with pytest.raises(KeyboardInterrupt), contextlib.closing(plan.batches(0, 70)) as stream:
        next(stream)
        raise KeyboardInterrupt
    assert own_threads() == []
    list(plan.batches(0, 70))
    assert own_threads() == []


def test_closing_in_the_midst_of_a_pool_does_not_read_the_rest_of_it(small_store, monkeypatch):
    reads = Reads(monkeypatch)
    monkeypatch.setattr(batches, "_CHUNK", 1)
    # the second of three pools would take three seconds in four threads
    reads.before = lambda: time.sleep(0.05 if reads.count() > 234 else 0)
    plan = BatchPlan.from_store(small_store, np.arange(700), 10, 0, buffer_rows=340)
    stream = plan.batches(0, 70)
    next(stream)
    reads.settle(236)
    stream.close()
    assert reads.count() < 300
    assert own_threads() == []


def test_a_forgotten_stream_ends_its_threads(small_store):
    plan = BatchPlan.from_store(small_store, np.arange(700), 10, 0, buffer_rows=100)
    stream = plan.batches(0, 70)
    next(stream)
    assert own_threads()
    del plan, stream
    gc.collect()
    assert settled_threads() == []


@pytest.mark.parametrize("where", ["rows", "pools", "batches"])
def test_a_stream_may_be_closed_by_one_of_its_own_threads(small_store, monkeypatch, where):
    """As garbage collection does that happens to run in one."""
    place, name = {
        "rows": (ActivationStore, "read_into"),
        "pools": (Shuffle, "indices"),
        "batches": (batches, "_all_finite"),
    }[where]
    real, calls, armed, closed = getattr(place, name), [], threading.Event(), threading.Event()
    plan = BatchPlan.from_store(small_store, np.arange(700), 10, 0, buffer_rows=100)
    stream = plan.batches(0, 70)

    def hooked(*given):
        calls.append(threading.current_thread().name)
        if len(calls) == 2:  # the next pool's, or the next batch's, while the caller is elsewhere
            assert armed.wait(20)
            stream.close()
            closed.set()
        return real(*given)

    monkeypatch.setattr(place, name, hooked)
    next(stream)
    armed.set()
    assert closed.wait(20)
    assert where in calls[1]
    assert settled_threads() == []
    assert list(stream) == []


@pytest.mark.slow
@pytest.mark.parametrize("end", ["pass", "raise KeyboardInterrupt", "sys.exit(3)"])
def test_a_process_exits_with_a_stream_left_open(small_store, end):
    code = f"""
import sys, numpy as np
from pathlib import Path
from lorascope.activations.batches import BatchPlan
from lorascope.activations.store import ActivationStore
store = ActivationStore.open(Path({str(small_store.path)!r}))
plan = BatchPlan.from_store(store, np.arange(700), 10, 0, buffer_rows=100)
stream = plan.batches(0, 70)
next(stream)
print("begun", flush=True)
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "begun\n"
    assert done.returncode == {"pass": 0, "sys.exit(3)": 3}.get(end, -2), done.stderr
    assert "cannot" not in done.stderr


def test_two_streams_and_single_batches_do_not_disturb_each_other(small_store):
    plan = BatchPlan.from_store(small_store, np.arange(700), 10, 0, buffer_rows=100)
    copy = pickle.loads(pickle.dumps(plan))
    for i, (a, b) in enumerate(zip(plan.batches(0, 60), copy.batches(10, 70), strict=True)):
        assert torch.equal(a, batch(copy, i))
        assert torch.equal(b, batch(plan, i + 10))
        assert torch.equal(batch(plan, 69 - i), batch(copy, 69 - i))


def test_rows_kept_on_a_device_give_the_plans_batches(make_store):
    store = make_store(np.arange(97 * 14.0).reshape(97, 14), n_rollouts=5, dtype="float16")
    plan = BatchPlan.from_store(store, np.flatnonzero(store.eligible), 7, seed=3)
    last = plan.n_batches(9)
    for part in [(0, 1), (0, 2), (1, 2)]:
        wanted = list(plan.batches(2, last, part))
        for found in (
            list(batches._from_device_memory(torch.device("cpu"), plan, 2, last, part)),
            list(batches_on(torch.device("cpu"), plan, 2, last, part)),
        ):
            assert len(found) == last - 2
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
