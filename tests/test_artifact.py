import json
import multiprocessing
import zipfile
from pathlib import Path

import pytest

from lorascope import artifact, stage
from lorascope.artifact import Identity, read_manifest
from lorascope.errors import ArtifactError
from lorascope.sites import Site, SiteLayout
from lorascope.stage import building, is_made, require_space

SETTINGS, PARENTS = {"k": 1}, {"store": "abc"}


LAYOUT = SiteLayout(
    (Site(layer=0, projection="up_proj", rank=1, module="layers.0.mlp.up_proj", b_norms=(0.5,)),),
    "abc",
)


def identity(settings=SETTINGS, parents=PARENTS):
    return Identity(kind="sae", schema=1, settings=settings, parents=parents)


def manifest():
    return identity().manifest(LAYOUT, {"n": 1})


def make(out: Path, settings=SETTINGS, parents=PARENTS, overwrite=False):
    named = identity(settings, parents)
    if is_made(out, named, overwrite=overwrite):
        return False
    with building(out, named, overwrite=overwrite) as build:
        (build.path / "data").write_text("x")
        build.publish_directory(named.manifest(None, {"n": 1}), ["data"])
    return True


def test_a_folder_appears_whole_and_is_found_again(tmp_path):
    assert make(tmp_path / "a") is True
    assert make(tmp_path / "a") is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["data", "manifest.json"]


def test_other_settings_or_parents_are_refused_by_name_unless_overwritten(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"other settings \(k 1 there, 2 here\).*--overwrite"):
        make(tmp_path / "a", settings={"k": 2})
    with pytest.raises(ArtifactError, match="made from another store"):
        make(tmp_path / "a", parents={"store": "other"})
    assert make(tmp_path / "a", settings={"k": 2}, overwrite=True) is True
    assert read_manifest(tmp_path / "a").settings == {"k": 2}


def test_what_another_made_is_never_overwritten_by_accident(tmp_path):
    (tmp_path / "a").write_text("precious")
    with pytest.raises(ArtifactError, match="was not made by this stage"):
        make(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_elses_is_never_replaced(tmp_path, overwrite):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(ArtifactError, match="lorascope did not make, and is never replaced"):
        make(tmp_path / "home", overwrite=overwrite)
    with (
        pytest.raises(ArtifactError, match="never replaced"),
        building(tmp_path / "home", identity(), overwrite=overwrite),
    ):
        pass
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_unfinished_work_is_kept_for_the_same_settings_and_refused_for_others(tmp_path):
    with (
        pytest.raises(RuntimeError),
        building(tmp_path / "a", identity(), overwrite=False) as build,
    ):
        (build.path / "piece").write_text("done")
        raise RuntimeError("killed")
    with building(tmp_path / "a", identity(), overwrite=False) as build:
        assert (build.path / "piece").read_text() == "done"
    other = identity({"k": 2})
    with (
        pytest.raises(ArtifactError, match="unfinished work of other settings"),
        building(tmp_path / "a", other, overwrite=False),
    ):
        pass
    with building(tmp_path / "a", other, overwrite=True) as build:
        assert not (build.path / "piece").exists()


def _hold(path, ready, leave):
    with building(path, identity(), overwrite=False):
        ready.set()
        leave.wait(30)


def test_a_second_process_is_told_that_the_first_one_writes(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "a", ready, leave))
    process.start()
    assert ready.wait(30)
    with pytest.raises(ArtifactError, match="another process is writing"):
        make(tmp_path / "a")
    leave.set()
    process.join(30)
    assert make(tmp_path / "a") is True


def test_manifests_are_read_from_every_kind_of_file(tmp_path):
    text = artifact.canonical(manifest().to_json())
    (tmp_path / "a.h5").write_text(text + "\n")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("archive/lorascope.json", text)
    (tmp_path / "a.json").write_text(json.dumps({"metadata": {"lorascope": manifest().to_json()}}))
    (tmp_path / "a.html").write_bytes(
        b"<!doctype html>" + artifact.HTML_MARK + text.encode() + b" -->"
    )
    for name in ("a.h5", "a.pt", "a.json", "a.html"):
        assert read_manifest(tmp_path / name) == manifest(), name


@pytest.mark.parametrize("name", ["a.h5", "a.pt", "a.json", "a.html", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"garbage"])
def test_foreign_and_damaged_files_have_no_manifest(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_manifest(tmp_path / name) is None


@pytest.mark.parametrize("key", ["kind", "schema", "version", "settings", "parents", "layout"])
@pytest.mark.parametrize("value", [7.5, [], {"sites": 3}, {"a": 1}])
def test_a_manifest_with_a_field_of_another_type_is_none(tmp_path, key, value):
    if key == "settings" and isinstance(value, dict):
        return  # settings may hold anything
    damaged = {**manifest().to_json(), key: value}
    (tmp_path / "a.json").write_text(json.dumps({"metadata": {"lorascope": damaged}}))
    assert read_manifest(tmp_path / "a.json") is None


def test_an_artifact_of_rows_without_a_layout_is_refused():
    assert manifest().columns == LAYOUT
    with pytest.raises(ArtifactError, match="has no layout"):
        identity().manifest(None, {}).columns  # noqa: B018


def test_a_newer_schema_is_refused(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="schema 1 of sae.*up to 0.*newer lorascope"):
        artifact.open_manifest(tmp_path / "a", "sae", 0)
    with pytest.raises(ArtifactError, match="holds sae, expected features"):
        artifact.open_manifest(tmp_path / "a", "features", 1)
    with pytest.raises(ArtifactError, match="does not exist"):
        artifact.open_manifest(tmp_path / "b", "sae", 1)


def test_too_little_space_is_said_before_the_work(tmp_path):
    require_space(tmp_path / "not" / "there", 1)
    with pytest.raises(ArtifactError, match="GB free, this needs"):
        require_space(tmp_path, 1 << 60)


def test_a_single_file_replaces_the_old_one_at_once(tmp_path):
    out = tmp_path / "page.html"
    out.write_text("old")
    with building(out, identity(), overwrite=True) as build:
        (build.path / "new").write_text("new")
        assert out.read_text() == "old"
        build.publish_file("new")
    assert out.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_what_a_kill_left_after_the_file_had_its_name_is_removed(tmp_path, monkeypatch):
    out = tmp_path / "page.html"

    def make_page():
        if not is_made(out, identity(), overwrite=False):
            with building(out, identity(), overwrite=False) as build:
                text = artifact.canonical(manifest().to_json()).encode()
                (build.path / "new").write_bytes(artifact.HTML_MARK + text + b" -->")
                build.publish_file("new")

    with monkeypatch.context() as patch:
        patch.setattr(stage.shutil, "rmtree", lambda *_, **__: None)  # killed before it ran
        make_page()
    assert (tmp_path / "page.html.partial").is_dir()
    make_page()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_what_a_kill_left_half_written_is_not_published(tmp_path):
    for name in (".tmpCCZ4zL", "settings.json.tmp", "inside/shard-00000.h5.tmp"):
        half = tmp_path / "a.partial" / name
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
    assert make(tmp_path / "a") is True
    left = {path.name for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert left == {"manifest.json", *read_manifest(tmp_path / "a").files}
