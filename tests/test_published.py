import json

import h5py
import numpy as np
import pytest
from builders.stores import write_published_store

from lorascope.activations import published
from lorascope.activations.store import ActivationStore
from lorascope.errors import ArtifactError
from lorascope.sites import PROJECTIONS
from lorascope.texts.roles import ROLES


def expected(rollout, token, layer, name):
    return np.float16(rollout * 100 + token * 10 + layer + PROJECTIONS.index(name) / 8)


def test_columns_are_taken_by_name_whatever_their_order_in_the_file(tmp_path):
    types = ("o_proj", "gate_proj", "v_proj")
    store = ActivationStore.open(write_published_store(tmp_path / "a", types))
    assert store.layout.adapter_types == ("gate_proj", "v_proj", "o_proj")
    assert store.rollout_id.tolist() == [0, 2, 10]
    assert store.rollout_start.tolist() == [0, 4, 9, 16]
    row = store.rows(10, 11)[0]
    for value, name in zip(row, store.layout.column_names, strict=True):
        layer, projection = name.split(".")
        assert value == expected(10, 1, int(layer), projection)


@pytest.mark.parametrize("types", [PROJECTIONS[:3], PROJECTIONS])
def test_a_file_without_names_holds_gate_up_down_or_all_seven(tmp_path, types):
    store = ActivationStore.open(write_published_store(tmp_path / "a", types, attribute=False))
    assert store.layout.adapter_types == types
    assert store.d_in == 3 * len(types)


def test_token_strings_become_ids_and_marks_become_special(tmp_path):
    store = ActivationStore.open(write_published_store(tmp_path / "a", PROJECTIONS[:3]))
    texts = [store.vocabulary[i].decode() for i in store.token_ids[:4]]
    assert texts == ["<|im_start|>", " w1", " w0", " w1"]
    assert [ROLES[role] for role in store.roles[:4]] == ["special", "text", "text", "text"]
    assert store.eligible[:4].tolist() == [False, True, True, True]


def test_a_selection_and_rows_in_any_order_work_as_in_our_own_store(tmp_path):
    store = ActivationStore.open(write_published_store(tmp_path / "a", PROJECTIONS)).select(
        ["down_proj"]
    )
    assert store.take(np.array([9, 0]))[:, 1].tolist() == [
        expected(10, 0, 1, "down_proj"),
        expected(0, 0, 1, "down_proj"),
    ]


def test_other_values_or_tokens_of_the_same_size_are_another_capture(tmp_path):
    folder = write_published_store(tmp_path / "a", PROJECTIONS)
    digests = {ActivationStore.open(folder).digest}
    with h5py.File(folder / "rollout_2.h5", "r+") as file:
        file["activations"][...] *= 1.03
    digests.add(ActivationStore.open(folder).digest)
    tokens = folder / "rollout_tokens.json"
    tokens.write_text(tokens.read_text().replace("w1", "w9"))
    digests.add(ActivationStore.open(folder).digest)
    assert len(digests) == 3


def test_files_of_different_captures_are_refused(tmp_path):
    write_published_store(tmp_path / "a", PROJECTIONS[:3], lengths=((0, 4),))
    tokens = (tmp_path / "a" / "rollout_tokens.json").read_text()
    write_published_store(tmp_path / "a", PROJECTIONS[3:], lengths=((1, 4),))
    (tmp_path / "a" / "rollout_tokens.json").write_text(tokens)
    with pytest.raises(ArtifactError, match=r"rollout_1.h5 has.*they come from different captures"):
        ActivationStore.open(tmp_path / "a")


def test_missing_and_short_token_lists_are_named(tmp_path):
    folder = write_published_store(tmp_path / "a", PROJECTIONS[:3])
    tokens = json.loads((folder / "rollout_tokens.json").read_text())
    tokens["10"] = tokens["10"][:-1]
    (folder / "rollout_tokens.json").write_text(json.dumps(tokens))
    with pytest.raises(ArtifactError, match="has 6 tokens for rollout 10, the capture 7"):
        ActivationStore.open(folder)
    (folder / "rollout_tokens.json").unlink()
    with pytest.raises(ArtifactError, match=r"cannot read .*rollout_tokens.json"):
        ActivationStore.open(folder)


def test_a_truncated_file_is_named(tmp_path):
    folder = write_published_store(tmp_path / "a", PROJECTIONS[:3])
    file = folder / "rollout_2.h5"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ArtifactError, match=r"rollout_2.h5 is damaged"):
        ActivationStore.open(folder)


def test_a_file_that_crashes_hdf5_is_refused_by_name(tmp_path, monkeypatch):
    folder = write_published_store(tmp_path / "a", PROJECTIONS[:3])
    crash = tmp_path / "probe.py"
    whole = published._PROBE.read_text()
    crash.write_text(
        whole.replace(
            "    for name in json.load(sys.stdin):\n",
            "    import os\n"
            "    for name in json.load(sys.stdin):\n"
            "        if name.endswith('rollout_2.h5'):\n"
            "            os.kill(os.getpid(), 11)\n",
        )
    )
    monkeypatch.setattr(published, "_PROBE", crash)
    with pytest.raises(ArtifactError, match=r"rollout_2\.h5 is damaged: it crashes .* -11"):
        ActivationStore.open(folder)


def test_a_file_that_claims_more_than_it_can_hold_is_refused(tmp_path):
    folder = write_published_store(tmp_path / "a", PROJECTIONS[:3])
    with h5py.File(folder / "rollout_2.h5", "w") as file:
        file.create_dataset("activations", (1 << 40, 3, 3), np.float16, compression="gzip")
    with pytest.raises(ArtifactError, match=r"rollout_2\.h5 .*more than fit the file"):
        ActivationStore.open(folder)


def test_a_link_into_another_file_is_refused(tmp_path):
    folder = write_published_store(tmp_path / "a", PROJECTIONS[:3])
    (folder / "rollout_2.h5").rename(tmp_path / "other.h5")
    with h5py.File(folder / "rollout_2.h5", "w") as file:
        file["activations"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "activations")
    with pytest.raises(ArtifactError, match="no array activations of its own"):
        ActivationStore.open(folder)
