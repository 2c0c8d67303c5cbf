"""Stores at URLs: fsspec's memory, and a server that speaks S3."""

import os
import pickle
import urllib.request
from pathlib import Path

import fsspec
import numpy as np
import pytest
from builders.indexes import small_index
from builders.labels import label_of, save_labels

from lorascope.activations import generate
from lorascope.activations.batches import BatchPlan
from lorascope.activations.generate import GenerateConfig
from lorascope.activations.store import ActivationStore
from lorascope.arrayfile import RemoteArray
from lorascope.cli import call
from lorascope.errors import ArtifactError, ConfigError
from lorascope.remote import RemotePath, as_path
from lorascope.sae.settings import TrainConfig


@pytest.fixture
def memory():
    """An object store in this process, empty before and after."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def s3(monkeypatch):
    """A server that speaks S3 with a bucket named `bucket`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
    ):
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    fsspec.filesystem("s3").mkdir("bucket")
    yield fsspec.filesystem("s3")
    request = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(request).close()  # buckets would outlive the server
    server.stop()


SAES = ("sae0.pt", "sae0.jsonl", "sae2.pt", "sae2.jsonl")


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_url_stays_one_in_every_form_of_a_path():
    path = as_path("s3://bucket/store")
    for same in (Path("s3://bucket/store"), path / "." / "", pickle.loads(pickle.dumps(path))):
        assert str(as_path(same)) == as_path(same).as_posix() == "s3://bucket/store"
    assert str(path / "shard-00000.h5") == "s3://bucket/store/shard-00000.h5"
    assert str(path.parent) == "s3://bucket"
    assert path.with_name("a.h5").suffix == ".h5"
    config = TrainConfig(data_dir=Path("s3://bucket/store"))
    assert str(TrainConfig.from_json(config.to_json()).data_dir) == "s3://bucket/store"
    assert as_path("file:///tmp/store") == Path("/tmp/store")
    for local in ("store", "/a/b", "./c:/d", "a/s3:/b"):
        assert as_path(local) == Path(local)
        assert not isinstance(as_path(local), RemotePath)
    assert as_path("FILE:///tmp/store") == Path("/tmp/store")
    for wrong in ("s3://", "memory://", "simplecache::s3://bucket/store"):
        with pytest.raises(ConfigError, match=f"{wrong} is no URL of a folder"):
            as_path(wrong)


def test_other_uses_of_a_url_are_refused_in_one_line(memory, tmp_path, make_store, capsys):
    store = make_store()
    for use in (os.fspath, os.stat, Path.mkdir, Path.touch, Path.resolve):
        with pytest.raises(ConfigError, match="memory://a is a URL, expected a local path"):
            use(as_path("memory://a"))
    words = ["train", "--data-dir", str(store.path), "--k", "2", "--expansion-factor", "2"]
    assert call([*words, "--batch-size", "16", "--output", "memory://sae.pt"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("ConfigError: memory://sae.pt")
    assert call(["verify", "nosuch://bucket/store"]) == 2
    assert "Protocol not known: nosuch" in capsys.readouterr().err
    assert call(["verify", "S3://bucket/store"]) == 2
    assert "cannot open S3://bucket/store: Protocol not known: S3" in capsys.readouterr().err
    assert call(["dashboard", "--input", "memory://a/features.h5"]) == 2
    assert "memory://a/features.h5 does not exist" in capsys.readouterr().err
    assert call(["verify", "memory://nothing"]) == 2
    assert "memory://nothing does not exist" in capsys.readouterr().err


def test_rows_are_those_on_disk_however_they_are_read(memory, make_store):
    local = make_store(n_rollouts=12, length=50)
    memory.put(str(local.path), "/bucket/store", recursive=True)
    remote = ActivationStore.open("memory://bucket/store")
    assert isinstance(remote.shards[0].read("activations"), RemoteArray)
    assert (remote.digest, remote.n_rows, remote.dtype) == (local.digest, 600, local.dtype)
    np.testing.assert_array_equal(remote.token_ids, local.token_ids)
    np.testing.assert_array_equal(remote.roles, local.roles)
    assert remote.vocabulary.text(range(8)) == local.vocabulary.text(range(8))
    any_order = np.random.default_rng(0).integers(0, 600, 200)
    for one, other in ((remote, local), (remote.select(["o_proj"]), local.select(["o_proj"]))):
        for size in (7, 64, 600):
            for (a, x), (b, y) in zip(one.blocks(size), other.blocks(size), strict=True):
                assert a == b
                np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(one.take(any_order), other.take(any_order))
        copy = pickle.loads(pickle.dumps(one))
        np.testing.assert_array_equal(copy.rows(199, 203), other.rows(199, 203))
    for buffer in (None, 100):  # loaded, and streamed in pools
        plans = [
            BatchPlan.from_store(one, np.arange(5, 600), 32, 0, buffer_rows=buffer)
            for one in (remote, local)
        ]
        for x, y in zip(*(plan.batches(0, 30) for plan in plans), strict=True):
            assert x.equal(y)


def test_rows_near_each_other_are_one_request_and_a_long_one_is_several(memory, monkeypatch):
    import lorascope.arrayfile as module

    values = np.arange(4000.0).reshape(1000, 4)
    memory.pipe("/a", b"head" + values.tobytes())
    asked = []
    read = RemotePath.ranges
    monkeypatch.setattr(
        RemotePath, "ranges", lambda self, spans: asked.append(spans) or read(self, spans)
    )
    monkeypatch.setattr(module, "_GAP", 320)
    monkeypatch.setattr(module, "_PIECE", 3200)
    array = RemoteArray(as_path("memory://a"), values.dtype, values.shape, 4)
    rows = np.array([0, 1, 11, 22, 23, 500])
    out = np.empty((6, 4))
    array.take(rows, out)
    np.testing.assert_array_equal(out, values[rows])
    assert asked.pop() == [(4, 4 + 12 * 32), (4 + 22 * 32, 4 + 24 * 32), (16004, 16036)]
    np.testing.assert_array_equal(np.asarray(array), values)
    assert len(asked.pop()) == 10


def test_slices_in_order_are_read_ahead_and_others_are_not(memory, monkeypatch):
    values = np.arange(100.0).reshape(50, 2)
    memory.pipe("/a", values.tobytes())
    array = RemoteArray(as_path("memory://a"), values.dtype, values.shape, 0)
    np.testing.assert_array_equal(array[0:20], values[0:20])
    (ahead,) = array._ahead.values()
    np.testing.assert_array_equal(ahead.result(), values[20:40])
    memory.store.clear()
    np.testing.assert_array_equal(array[20:40], values[20:40])
    with pytest.raises(ArtifactError, match="cannot read memory://a: FileNotFoundError"):
        array[40:50]  # what failed ahead fails when it is asked for
    memory.pipe("/a", values.tobytes())
    np.testing.assert_array_equal(array[10:15], values[10:15])
    assert array._ahead == {}


def test_damage_at_a_url_is_found_as_on_disk(memory, make_store, capsys):
    memory.put(str(make_store().path), "/bucket/store", recursive=True)
    assert call(["verify", "memory://bucket/store"]) == 0
    assert call(["info", "memory://bucket/store"]) == 0
    assert "activations, schema 2" in capsys.readouterr().out
    whole = memory.cat("/bucket/store/shard-00001.h5")
    memory.pipe("/bucket/store/shard-00001.h5", whole[:-100] + bytes(100))
    assert call(["verify", "memory://bucket/store"]) == 1
    assert "shard-00001.h5 has another checksum" in capsys.readouterr().err
    store = ActivationStore.open("memory://bucket/store")
    memory.pipe("/bucket/store/shard-00001.h5", whole[:3000])
    with pytest.raises(ArtifactError, match="shard-00001.h5 is damaged: it ends before"):
        store.take(np.array([239]))
    with pytest.raises(ArtifactError, match="shard-00001.h5 has 3000 bytes, its manifest says"):
        ActivationStore.open("memory://bucket/store")
    memory.rm("/bucket/store/shard-00001.h5")
    with pytest.raises(ArtifactError, match="shard-00001.h5 is missing"):
        ActivationStore.open("memory://bucket/store")
    memory.rm("/bucket/store/manifest.json")
    with pytest.raises(ArtifactError, match=r"no manifest.json: it is not a finished store"):
        ActivationStore.open("memory://bucket/store")


@pytest.mark.parametrize("name", ["features.h5", "features.json"])
def test_an_index_at_a_url_gives_the_page_and_the_tables_of_a_disk(memory, tmp_path, name, capsys):
    small_index().save(tmp_path / "features.h5")
    save_labels(tmp_path / "features.h5", {0: label_of("a name of a feature")})
    words = ["export", "--input", str(tmp_path / "features.h5")]
    assert call([*words, "--output", str(tmp_path / "features.json")]) == 0
    for file in (name, "labels.json"):
        memory.put_file(str(tmp_path / file), f"/bucket/{file}")
    for place in ("disk", "url"):
        source = str(tmp_path / name) if place == "disk" else f"memory://bucket/{name}"
        (tmp_path / place).mkdir()
        for command, out in (("dashboard", "a.html"), ("export", "a.csv"), ("export", "a.json")):
            output = str(tmp_path / place / out)
            assert call([command, "--input", source, "--output", output]) == 0
        assert call(["verify", source]) == 0
    assert content(tmp_path / "url") == content(tmp_path / "disk")
    has_label = b"a name of a feature" in (tmp_path / "url" / "a.html").read_bytes()
    assert has_label == (name == "features.h5")  # those of the JSON are its index's own
    whole = memory.cat(f"/bucket/{name}")
    memory.pipe(f"/bucket/{name}", whole[:-100])
    capsys.readouterr()
    assert call(["dashboard", "--input", source, "--output", str(tmp_path / "b.html")]) == 2
    assert f"{source} " in capsys.readouterr().err
    words = ["export", "--input", str(tmp_path / name), "--output", "memory://bucket/out.csv"]
    assert call(words) == 2
    assert "is a URL, expected a local path" in capsys.readouterr().err


@pytest.fixture
def config(subject_dirs, dataset_file, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "ROLLOUTS_PER_SHARD", 3)
    return lambda output, **given: GenerateConfig(
        lora_path=str(subject_dirs[1]),
        dataset=str(dataset_file),
        output=Path(output),
        **{"num_examples": 9, **given},
    )


def test_generate_writes_the_same_bytes_to_a_url(memory, config, tmp_path):
    expected = content(generate.run(config(tmp_path / "store")))
    out = generate.run(config("memory://bucket/store"))
    assert str(out) == "memory://bucket/store"
    memory.get("/bucket/store", str(tmp_path / "copy"), recursive=True)
    assert content(tmp_path / "copy") == expected
    before = dict(memory.store)
    generate.run(config("memory://bucket/store"))  # it is finished
    assert all(memory.store[name] is before[name] for name in before)
    with pytest.raises(
        ArtifactError, match="memory://bucket/store exists and was made from another"
    ):
        generate.run(config("memory://bucket/store", num_examples=3))
    generate.run(config("memory://bucket/store", num_examples=3, overwrite=True))
    assert len(memory.glob("/bucket/store/shard-*")) == 1
    memory.pipe("/other/file", b"of somebody else")
    with pytest.raises(ArtifactError, match="memory://other is a folder with files that lorascope"):
        generate.run(config("memory://other", overwrite=True))


def test_generate_continues_at_a_url_and_reads_no_finished_shard_again(
    memory, config, tmp_path, monkeypatch
):
    expected = content(generate.run(config(tmp_path / "store")))
    real, written = generate.write_shard, []

    def stops(path, *given):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, *given)

    monkeypatch.setattr(generate, "write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        generate.run(config("memory://bucket/store"))
    left = {name.rpartition("/")[2] for name in memory.find("/bucket/store")}
    shards_left = {"shard-00000.h5", "shard-00001.h5"}
    assert left == {"settings.json", *shards_left, *(f"{name}.sha256" for name in shards_left)}
    with pytest.raises(ArtifactError, match="not a finished store"):
        ActivationStore.open("memory://bucket/store")
    with pytest.raises(ArtifactError, match="holds unfinished work of other settings"):
        generate.run(config("memory://bucket/store", store_dtype="float32"))
    memory.rm("/bucket/store/shard-00000.h5.sha256")  # killed before it was written
    opened = []
    read = RemotePath.open
    monkeypatch.setattr(
        RemotePath,
        "open",
        lambda self, *given, **more: (
            opened.append((self.name, *given, more)) or read(self, *given, **more)
        ),
    )
    monkeypatch.setattr(
        generate,
        "write_shard",
        lambda path, *given: written.append(path.name) or real(path, *given),
    )
    generate.run(config("memory://bucket/store"))
    assert written == ["shard-00000.h5", "shard-00001.h5", "shard-00002.h5"]
    wholly = {name for name, *_, more in opened if name.endswith(".h5") and not more}
    assert wholly == {"shard-00000.h5", "vocabulary.h5"}
    memory.get("/bucket/store", str(tmp_path / "copy"), recursive=True)
    assert content(tmp_path / "copy") == expected


def test_a_bucket_that_does_not_exist_is_named_in_one_line(memory, config, monkeypatch):
    def put_file(*_given):
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(type(memory), "put_file", put_file)
    with pytest.raises(ArtifactError, match=r"cannot write memory://b/.*bucket does not exist; ch"):
        generate.run(config("memory://b/store"))


def test_a_run_that_fails_at_once_leaves_nothing_at_a_url(memory, config, monkeypatch):
    def fails(*_given):
        raise ArtifactError("no room")

    monkeypatch.setattr(generate, "write_shard", fails)
    with pytest.raises(ArtifactError, match="no room"):
        generate.run(config("memory://bucket/store"))
    assert memory.find("/bucket") == []


@pytest.mark.slow
@pytest.mark.needs("moto")
@pytest.mark.needs("s3fs")
def test_from_generate_to_the_page_without_a_copy_of_the_rows(s3, config, tmp_path, monkeypatch):
    """On a server that speaks S3; everything that is made is as it is from a disk."""
    monkeypatch.chdir(tmp_path)
    words = ["--k", "2", "--expansion-factor", "2", "--batch-size", "16", "--epochs", "2"]
    made = []
    for name, store in (("disk", str(tmp_path / "store")), ("url", "s3://bucket/store")):
        generate.run(config(store))
        assert call(["verify", store]) == 0
        out = tmp_path / name
        out.mkdir()
        for buffer in ([], ["--buffer-rows", "50"]):
            sae = str(out / f"sae{len(buffer)}.pt")
            assert call(["train", "--data-dir", store, *words, *buffer, "--output", sae]) == 0
        features = str(out / "features.h5")
        assert call(["collect", "--sae", sae, "--data-dir", store, "--output", features]) == 0
        assert call(["dashboard", "--input", features, "--output", str(out / "page.html")]) == 0
        made.append(content(out))  # but for the log, which has seconds
    for one in made:
        assert set(one) == {*SAES, "features.h5", "page.html"}
    assert all(made[0][name] == made[1][name] for name in made[0] if not name.endswith(".jsonl"))
    s3.get("bucket/store", str(tmp_path / "copy"), recursive=True)
    assert content(tmp_path / "copy") == content(tmp_path / "store")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3.clear_instance_cache()
    with pytest.raises(ArtifactError, match=r"cannot read s3://bucket/store: .*check the URL"):
        ActivationStore.open("s3://bucket/store")
