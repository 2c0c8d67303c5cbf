import fnmatch
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from builders.foreign_saes import dictionary_folder, published, saelens_folder
from builders.saes import random_rows, random_sae
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lorascope.errors import ArtifactError
from lorascope.sae.model import SAE
from lorascope.sae.sae_hub import model_card


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub: `owner/name` is a folder in it."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            (root / repo_id).mkdir(parents=True, exist_ok=True)
            (root / f"{repo_id}.private").write_text(str(private))
            return f"https://hub.test/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            assert commit_message
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

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

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def test_what_was_pushed_is_the_same_sae_when_it_comes_back(hub, tmp_path):
    sae = random_sae()
    assert sae.push_to_hub("ann/latents") == "https://hub.test/ann/latents"
    assert (hub / "ann" / "latents.private").read_text() == "False"
    assert {file.name for file in (hub / "ann" / "latents").iterdir()} == {
        "README.md",
        "cfg.json",
        "manifest.json",
        "sae_weights.safetensors",
    }
    found = SAE.from_pretrained("ann/latents")
    assert found.digest == sae.digest
    assert torch.equal(
        found.encode_dense(random_rows(20, 14)), sae.encode_dense(random_rows(20, 14))
    )
    fetched = {file.name for file in (tmp_path / "cache" / "ann" / "latents" / "None").iterdir()}
    assert fetched == {"cfg.json", "manifest.json", "sae_weights.safetensors"}
    sae.push_to_hub("ann/latents", private=True)
    assert (hub / "ann" / "latents.private").read_text() == "True"


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
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    for call in (lambda: SAE.from_pretrained("ann/x"), lambda: random_sae().push_to_hub("ann/x")):
        with pytest.raises(ArtifactError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_name_that_is_no_hub_id_is_not_pushed_to(hub):
    for name in ("sae", "a/b/c", 'ann/x"\n---', "../x", "ann/x:y"):
        with pytest.raises(ArtifactError, match="is not a hub repository name"):
            random_sae().push_to_hub(name)
    assert not hub.exists()


def test_the_card_says_what_the_sae_is_and_how_it_is_loaded(hub, make_store):
    store = make_store()
    store = replace(
        store,
        content={
            "base_model": "Qwen/Qwen2.5-0.5B",
            "adapter_name": "reasoner",
            "dataset": "org/texts",
            "n_rows": 240,
            "n_rollouts": 6,
        },
    )
    report = {"fvu": 0.123456, "l0": 3.98765, "never_fired": 0.025, "n_rows": 60, "cosine": None}
    sae = random_sae().sealed(report=report, architecture="matryoshka")
    manifest = {**sae.manifest, "parents": {"activations": store.digest}}
    sae = replace(sae, manifest=manifest)
    sae.push_to_hub("ann/latents", store=store)
    card = (hub / "ann" / "latents" / "README.md").read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    assert head.splitlines()[0] == "library_name: lorascope"
    assert 'base_model: "Qwen/Qwen2.5-0.5B"' in head
    assert "license" not in head
    table = dict(re.findall(r"^\| (.*?) \| (.*) \|$", body.replace("\\", ""), re.MULTILINE))
    expected = {
        "base model": "Qwen/Qwen2.5-0.5B",
        "adapter": "reasoner",
        "corpus": "org/texts",
        "rollouts": "6",
        "tokens": "240",
        "d_in": "14",
        "d_sae": "40",
        "k": "4",
        "trained as": "matryoshka",
        "held-out tokens": "60",
        "FVU, held out": "0.1235",
        "L0, held out": "3.988",
        "share of latents that never fired, held out": "0.025",
    }
    assert expected.items() <= table.items()
    assert 'SAE.from_pretrained("ann/latents")' in body
    assert 'SAE.load_from_disk(snapshot_download("ann/latents"))' in body


def card_of(sae: SAE, repo_id: str, corpus: dict) -> str:
    return model_card(sae.manifest, sae.d_sae, repo_id, corpus)


def test_names_in_manifests_cannot_write_into_the_card():
    hostile = (
        "x\n---\nlicense: mit\n---\n# Owned | <script>alert(1)</script> [a](javascript:b) `c` "
        "**d** https://evil.test \u202e &lt; {rows} {repo_id}\u2028| z"
    )
    corpus = {"base_model": f"org/model\n{hostile}", "adapter_name": hostile, "dataset": 'a"\n- b'}
    sae = random_sae().sealed(architecture=hostile, normalize=hostile)
    card = model_card(sae.manifest, sae.d_sae, "ann/latents", corpus)
    plain = card_of(random_sae(), "ann/latents", {})
    head = card.split("---\n")[1]
    assert head == plain.split("---\n")[1]
    assert card.count("\n---\n") == 1
    lines = card.splitlines()
    assert not [line for line in lines if line.startswith("# Owned")]
    rows = [line for line in lines if "Owned" in line]
    assert len(rows) == 4
    for row in rows:
        assert re.fullmatch(r"\| [a-z ]+ \| (?:\\[!-/:-@\[-`{-~]|[^!-/:-@\[-`{-~\\])* \|", row), row
        assert row.isprintable()


def test_a_base_model_that_is_a_folder_stays_out_of_the_head():
    card = card_of(random_sae(), "ann/latents", {"base_model": "my-folder"})
    assert "base_model:" not in card
    assert r"| base model | my\-folder |" in card


def test_a_long_name_is_cut(make_store):
    card = card_of(random_sae(), "ann/latents", {"adapter_name": "a" * 10_000})
    assert "a" * 199 + "…" in card
    assert "a" * 200 not in card


def test_a_card_with_another_store_than_that_of_training_is_refused(hub, make_store):
    with pytest.raises(ArtifactError, match="is not the store that the SAE was trained on"):
        random_sae().push_to_hub("ann/latents", store=make_store())
    assert not Path(hub).exists()
