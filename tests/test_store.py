import multiprocessing
import os
import pickle

import h5py
import numpy as np
import pytest
from builders.stores import layout_of

from lorascope.activations import shards
from lorascope.activations.shards import Vocabulary
from lorascope.activations.store import ActivationStore
from lorascope.arrayfile import map_arrays
from lorascope.artifact import Manifest, write_manifest
from lorascope.errors import ArtifactError
from lorascope.inspection import verify
from lorascope.sites import PROJECTIONS


def test_rows_come_back_across_shards_in_any_slice_and_any_order(make_store):
    rows = np.random.default_rng(1).standard_normal((240, 14)).astype(np.float16)
    store = make_store(rows, dtype="float16")
    assert len(store.shards) == 2
    assert store.dtype == np.float16
    np.testing.assert_array_equal(store.rows(0, 240), rows)
    np.testing.assert_array_equal(store.rows(150, 170), rows[150:170])
    picked = np.array([239, 0, 160, 159, 0])
    np.testing.assert_array_equal(store.take(picked), rows[picked])
    np.testing.assert_array_equal(np.concatenate([b for _, b in store.blocks(77)]), rows)


@pytest.mark.parametrize("types", [PROJECTIONS, ["up_proj", "o_proj"]])
def test_rising_rows_are_read_from_the_files_as_they_are_taken_from_maps(make_store, types):
    store = make_store(dtype="float16").select(types)
    for rows in ([*range(3, 9), 11, *range(150, 170), 239], [0], [159, 160], range(240), []):
        picked = np.array(rows, np.int64)
        out = np.full((len(picked), store.d_in), np.nan, np.float16)
        store.read_into(out, picked)
        np.testing.assert_array_equal(out, store.take(picked))


def test_a_file_that_became_shorter_is_named_and_not_filled_up(make_store, monkeypatch):
    store = make_store()
    monkeypatch.setattr(shards, "map_arrays", lambda path, found=map_arrays: truncated(found, path))

    def truncated(found, path):
        arrays = found(path)
        os.truncate(path, 5000)
        return arrays

    with pytest.raises(ArtifactError, match=r"shard-00000.h5 is damaged: it ends before its last"):
        store.read_into(np.empty((160, 14), np.float32), np.arange(160))


def test_a_row_knows_its_rollout(make_store):
    store = make_store(n_rollouts=6, length=40)
    assert store.rollout_start.tolist() == [0, 40, 80, 120, 160, 200, 240]
    assert store.rollout_of(np.array([0, 39, 40, 239])).tolist() == [0, 0, 1, 5]
    assert store.rollout_id.tolist() == [0, 1, 2, 3, 4, 5]


def test_special_tokens_are_not_eligible_and_nothing_else_is_excluded(make_store):
    store = make_store()
    assert store.eligible.sum() == store.n_rows - store.n_rollouts
    assert not store.eligible[store.rollout_start[:-1]].any()


def test_a_selection_of_projections_keeps_their_columns(make_store):
    rows = np.arange(240 * 14).reshape(240, 14).astype(np.float32)
    store = make_store(rows).select(["up_proj", "o_proj"])
    assert store.layout.column_names == ("0.up_proj", "0.o_proj", "1.up_proj", "1.o_proj")
    np.testing.assert_array_equal(store.rows(3, 5), rows[3:5][:, [1, 6, 8, 13]])
    np.testing.assert_array_equal(store.take(np.array([200])), rows[[200]][:, [1, 6, 8, 13]])
    assert make_store(name="b").select(PROJECTIONS).columns is None


def _sum(store, queue):
    queue.put((os.getpid(), float(store.rows(0, store.n_rows).sum(dtype=np.float64))))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_other_processes_read_the_same_bytes(make_store, method):
    store = make_store()
    expected = float(store.rows(0, store.n_rows).sum(dtype=np.float64))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_sum, args=(store, queue))
    process.start()
    pid, total = queue.get(timeout=60)
    process.join()
    assert pid != os.getpid()
    assert total == expected


def test_a_store_pickles_as_a_path_not_as_a_handle(make_store):
    store = make_store()
    store.rows(0, 10)
    assert len(pickle.dumps(store.shards[0].read)) < 1000
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.rows(0, 240), store.rows(0, 240))


def test_verify_names_a_changed_byte_a_missing_shard_and_a_short_one(make_store):
    store = make_store()
    assert verify(store.path) == []
    shard = store.path / "shard-00001.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100] + bytes(100))
    assert verify(store.path) == ["shard-00001.h5 has another checksum than the manifest"]
    shard.write_bytes(whole[:-1])
    assert "bytes, the manifest says" in verify(store.path)[0]
    with pytest.raises(ArtifactError, match="it is damaged"):
        ActivationStore.open(store.path)
    shard.unlink()
    assert verify(store.path) == ["shard-00001.h5 is missing"]
    with pytest.raises(ArtifactError, match=r"shard-00001.h5 is missing; run generate again"):
        ActivationStore.open(store.path)


@pytest.mark.parametrize(
    "dataset", ["activations", "token_ids", "role", "rollout_start", "rollout_id"]
)
def test_verify_finds_a_flipped_byte_in_any_dataset(make_store, dataset):
    store = make_store()
    shard = store.path / "shard-00001.h5"
    with h5py.File(shard, "r") as file:
        offset = file[dataset].id.get_offset() + file[dataset].id.get_storage_size() // 2
    content = bytearray(shard.read_bytes())
    content[offset] ^= 1
    shard.write_bytes(content)
    assert verify(store.path) == ["shard-00001.h5 has another checksum than the manifest"]


def test_verify_names_a_shard_of_another_store(make_store):
    store = make_store()
    (store.path / "shard-00002.h5").write_bytes((store.path / "shard-00001.h5").read_bytes())
    assert verify(store.path) == [
        "shard-00002.h5 is not in the manifest: it belongs to something else, remove it"
    ]


def test_a_folder_that_is_no_store_says_what_it_lacks(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist; make it with lorascope generate"):
        ActivationStore.open(tmp_path / "none")
    with pytest.raises(ArtifactError, match="neither manifest.json nor rollout_<i>.h5"):
        ActivationStore.open(tmp_path)
    sae = Manifest(kind="sae", schema=1, settings={}, parents={}, layout=None, content={})
    write_manifest(tmp_path, sae, [])
    with pytest.raises(ArtifactError, match="holds sae, expected activations"):
        ActivationStore.open(tmp_path)


def test_the_vocabulary_keeps_bytes_that_are_no_text(tmp_path):
    tokens = [b"", b"\xff\xfe", "é".encode(), b"<|end|>"]
    Vocabulary.from_tokens(tokens, np.array([False, False, False, True])).save(tmp_path / "v.h5")
    read = Vocabulary.load(tmp_path / "v.h5")
    assert [read[i] for i in range(len(read))] == tokens
    assert read.special.tolist() == [False, False, False, True]


def test_the_layout_of_a_448_column_store_survives(make_store):
    store = make_store(n_rollouts=2, length=3, layout=layout_of(64))
    assert store.d_in == 448
    assert ActivationStore.open(store.path).layout == store.layout
