import fnmatch
import shutil

import huggingface_hub
import pytest
from builders.foreign_saes import dictionary_folder, published, saelens_folder
from builders.saes import random_sae
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorascope.errors import ArtifactError
from lorascope.sae.model import SAE


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub: `owner/name` is a folder in it."""
    root = tmp_path / "hub"

    def snapshot_download(repo_id, *, allow_patterns, revision):
        found = root / repo_id
        if not found.is_dir():
            raise LocalEntryNotFoundError("outgoing traffic has been disabled\nmore")
        here = tmp_path / "cache" / repo_id / str(revision)
        for file in [path for path in found.rglob("*") if path.is_file()]:
            name = file.relative_to(found).as_posix()
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, here / name)
        here.mkdir(parents=True, exist_ok=True)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def test_an_uploaded_folder_is_the_same_sae_when_it_comes_back(hub, tmp_path):
    sae = random_sae()
    sae.save(hub / "ann" / "latents")
    (hub / "ann" / "latents" / "README.md").write_text("a card")
    assert SAE.from_pretrained("ann/latents").digest == sae.digest
    fetched = {file.name for file in (tmp_path / "cache" / "ann" / "latents" / "None").iterdir()}
    assert fetched == {"cfg.json", "manifest.json", "sae_weights.safetensors"}


def test_a_folder_or_a_file_inside_a_repository_is_named_after_a_colon(hub, make_store, tmp_path):
    sae, store = random_sae(), make_store()
    repo = hub / "ann" / "many"
    repo.mkdir(parents=True)
    sae.save(repo / "ours" / "layer [3]")
    sae.save(repo / "one.pt")
    published(repo / "old.pt")
    saelens_folder(repo / "lens")
    dictionary_folder(repo / "dict")
    for inside in ("ours/layer [3]", "ours/layer [3]/", "one.pt"):
        assert SAE.from_pretrained(f"ann/many:{inside}").digest == sae.digest
    for inside in ("old.pt", "lens", "dict"):
        assert SAE.from_pretrained(f"ann/many:{inside}", store, revision="v1").d_in == 14
    fetched = tmp_path / "cache" / "ann" / "many" / "v1"
    files = {path.relative_to(fetched).as_posix() for path in fetched.rglob("*") if path.is_file()}
    assert files == {
        "old.pt",
        "lens/cfg.json",
        "lens/sae_weights.safetensors",
        "dict/ae.pt",
        "dict/config.json",
    }


def test_a_path_of_any_known_format_is_loaded_without_the_hub(tmp_path, make_store):
    sae, store = random_sae(), make_store()
    for path in (sae.save(tmp_path / "sae"), sae.save(tmp_path / "sae.pt")):
        assert SAE.from_pretrained(path).digest == sae.digest
        assert SAE.from_pretrained(str(path), store).digest == sae.digest
    assert SAE.from_pretrained(published(tmp_path / "old.pt"), store).d_sae == 40
    with pytest.raises(ArtifactError, match="is a local path, which has no revision v1"):
        SAE.from_pretrained(tmp_path / "sae", revision="v1")


def test_what_the_hub_cannot_give_is_told_in_one_line(hub, tmp_path):
    (hub / "ann" / "empty").mkdir(parents=True)
    cases = {
        "ann/absent": "outgoing traffic has been disabled",
        "ann/empty": "not a known SAE file .found: nothing.",
        "ann/empty:layer": "has no layer",
        "ann/empty:../../other": "is not a path inside",
        "ann/empty:/etc": "is not a path inside",
        str(tmp_path / "absent"): "absent does not exist",
        "./ann/absent": "does not exist",
        "absent": "does not exist",
    }
    for name, match in cases.items():
        with pytest.raises(ArtifactError, match=match) as caught:
            SAE.from_pretrained(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (GatedRepoError, "it is gated"),
        (RepositoryNotFoundError, "there is no such repository, or it is private"),
        (RevisionNotFoundError, "it has no such revision"),
    ],
)
def test_a_refusal_of_the_hub_is_told_in_words(hub, monkeypatch, kind, match):
    def refuse(*_, **__):
        error = kind.__new__(kind)
        Exception.__init__(error, "404 Client Error\nlong text")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ArtifactError, match=match) as caught:
        SAE.from_pretrained("ann/x")
    assert "\n" not in str(caught.value)
