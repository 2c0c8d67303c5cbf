import numpy as np
import pytest
import torch

from lorascope.activations.batches import BatchPlan, read_blocks, split_rows
from lorascope.errors import ArtifactError, NumberError


def numbered(make_store, n_rollouts=10, length=30, **kwargs):
    """A store whose first column is the row's own number."""
    rows = np.zeros((n_rollouts * length, 14))
    rows[:, 0] = np.arange(len(rows))
    return make_store(rows, n_rollouts=n_rollouts, **kwargs)


def test_whole_rollouts_are_held_out_and_special_tokens_are_nowhere(make_store):
    store = numbered(make_store)
    train, held = split_rows(store, 0.2, seed=1)
    assert not set(store.rollout_of(train)) & set(store.rollout_of(held))
    assert len(set(store.rollout_of(held))) == 2
    assert sorted([*train, *held]) == list(np.flatnonzero(store.eligible))
    assert len(train) + len(held) == store.n_rows - store.n_rollouts


@pytest.mark.parametrize(("n_rollouts", "holdout"), [(2, 0.001), (2, 0.999), (5, 0.01), (5, 0.99)])
def test_both_sides_have_a_rollout_whatever_the_share(make_store, n_rollouts, holdout):
    train, held = split_rows(numbered(make_store, n_rollouts), holdout, seed=0)
    assert len(train) >= 29
    assert len(held) >= 29


def test_one_rollout_is_split_by_row(make_store):
    train, held = split_rows(numbered(make_store, 1, 41), 0.25, seed=0)
    assert (len(train), len(held)) == (30, 10)


def test_a_store_of_special_tokens_only_is_refused(make_store):
    with pytest.raises(ArtifactError, match="0 tokens to train on"):
        split_rows(numbered(make_store, n_special=30), 0.1, seed=0)


def test_every_epoch_shows_every_row_once_in_another_order(make_store):
    store = numbered(make_store)
    rows = np.flatnonzero(store.eligible)  # 290 rows: not a multiple of 64
    plan = BatchPlan.of(store, rows, 64, seed=3)
    seen = np.concatenate([plan.batch(i)[:, 0].numpy() for i in range(plan.n_batches(3))])
    assert plan.n_batches(3) == 3 * 290 // 64
    first, second = seen[:290], seen[290:580]
    assert sorted(first) == sorted(second) == sorted(rows)
    assert (first != second).any()
    assert abs(np.corrcoef(first, np.arange(290))[0, 1]) < 0.2


def test_any_batch_is_the_same_alone_and_in_a_row_and_from_disk(make_store):
    store = numbered(make_store, dtype="float16")
    rows = np.flatnonzero(store.eligible)
    straight = BatchPlan.of(store, rows, 100, seed=3)
    line = [straight.batch(i) for i in range(9)]
    alone = BatchPlan.of(store, rows, 100, seed=3, in_memory=0)
    assert alone.loaded is None
    for i in (7, 2, 8, 0):
        assert torch.equal(alone.batch(i), line[i])
        assert alone.batch(i).dtype == torch.float32
    assert not torch.equal(BatchPlan.of(store, rows, 100, seed=4).batch(0), line[0])


def test_neighbours_of_one_rollout_rarely_stay_neighbours(make_store):
    store = numbered(make_store, 20, 50)
    plan = BatchPlan.of(store, np.flatnonzero(store.eligible), 980, seed=0)
    rollouts = store.rollout_of(plan.batch(0)[:, 0].numpy().astype(np.int64))
    assert (np.diff(rollouts) == 0).mean() < 0.1  # 1 in 20 by chance


def test_one_shard_and_one_batch_work(make_store):
    store = numbered(make_store, rollouts_per_shard=10)
    rows = np.flatnonzero(store.eligible)
    plan = BatchPlan.of(store, rows, len(rows), seed=0)
    assert plan.n_batches(1) == 1
    assert sorted(plan.batch(0)[:, 0].tolist()) == sorted(rows)


def test_numpys_global_generator_is_neither_read_nor_changed(make_store):
    store = numbered(make_store)
    before = np.random.get_state()[1].copy()
    BatchPlan.of(store, split_rows(store, 0.1, 0)[0], 8, seed=0).batch(0)
    assert (np.random.get_state()[1] == before).all()


def test_fewer_tokens_than_a_batch_are_refused(make_store):
    store = numbered(make_store)
    with pytest.raises(ArtifactError, match="200 training tokens, fewer than one batch of 201"):
        BatchPlan.of(store, np.arange(200), 201, seed=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_a_value_that_is_not_finite_is_named_by_row_and_column(make_store, bad, in_memory):
    rows = np.zeros((60, 14))
    rows[37, 8] = bad
    store = make_store(rows, n_rollouts=3)
    with pytest.raises(NumberError, match=r"row 37 \(rollout 1\) is .* column 8 \(1.up_proj\)"):
        BatchPlan.of(store, np.arange(60), 60, seed=0, in_memory=in_memory).batch(0)


def test_blocks_come_in_the_order_asked_for(make_store):
    store = numbered(make_store)
    rows = np.array([250, 3, 77, 4], np.int64)
    blocks = list(read_blocks(store, rows, size=3))
    assert [len(block) for block in blocks] == [3, 1]
    assert torch.cat(blocks)[:, 0].tolist() == [250, 3, 77, 4]
