"""Edits of features in weights: exact where theory says so, measured and left alone elsewhere."""

import json

import pytest
import torch
from builders.schemas import require_schema
from builders.studies import dictionary, each_column, make_texts, strengthen
from builders.subjects import IDS, N_TERMS, load, logits_of, reference
from builders.tolerance import assert_same_up_to_rounding
from safetensors.torch import load_file

from lorascope.activations.store import ActivationStore
from lorascope.causal.edit import EditConfig, run
from lorascope.causal.patch import Patch
from lorascope.cli import call
from lorascope.errors import ArtifactError, ConfigError
from lorascope.subject.adapter import WEIGHTS, inspect_adapter
from lorascope.subject.intervene import RowEditor


@pytest.fixture(scope="module")
def dirs(make_subject, tmp_path_factory):
    return strengthen(make_subject(), tmp_path_factory.mktemp("strong"), 2.0)


@pytest.fixture(scope="module")
def store(dirs, dataset_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "store"
    return ActivationStore.open(make_texts(dirs, dataset_file, folder, num_examples=3))


@pytest.fixture
def edited(dirs, store, tmp_path):
    """Return a function that edits features of an SAE, and returns the folder and its report."""

    def made(sae, name="edited", **given):
        base, adapter = dirs
        if not (tmp_path / "sae").exists():
            sae.save(tmp_path / "sae")
        given = {"lora_path": str(adapter), "base_model": str(base), "data_dir": store.path} | given
        out = run(EditConfig(sae=tmp_path / "sae", output=tmp_path / name, device="cpu", **given))
        return out, json.loads((out / "report.json").read_text())

    return made


def both(store, name):
    """The latents of `each_column` for the two signs of a column."""
    at = store.layout.column_names.index(name)
    return (at, at + store.d_in)


def test_taking_out_both_signs_of_a_column_is_its_b_at_zero_and_nothing_else(dirs, store, edited):
    out, report = edited(each_column(store), features=both(store, "1.up_proj"), tokens="all")
    assert report["output"] == "adapter"
    assert report["fold_error"] == pytest.approx(0, abs=1e-9)
    before, after = load_file(dirs[1] / WEIGHTS), load_file(out / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "layers.1.mlp.up_proj.lora_B" in name:
            assert float(after[name].abs().max()) < 1e-6 * float(tensor.abs().max())
        else:
            assert torch.equal(after[name], tensor)
    assert report["kl"]["folded"]["kl"] > 0
    assert report["kl_patched_folded"] < 1e-6 * report["kl"]["patched"]["kl"]


def test_a_folded_adapter_runs_in_peft_as_the_patch_does_here(dirs, store, edited):
    sae = each_column(store)
    features = both(store, "0.down_proj")
    out, _ = edited(sae, features=features, factor=3.0, tokens="all")
    subject = load(dirs[1], dirs[0])
    with RowEditor(subject) as editor, torch.inference_mode():
        everywhere = torch.ones_like(IDS, dtype=torch.bool)
        patched = Patch.from_features(sae, features, 3.0).logits(editor, IDS, everywhere)
        unpatched = editor.run(IDS).logits
    folded = logits_of(reference(out, dirs[0]), IDS)
    assert float((patched - unpatched).abs().max()) > 1e-2
    assert_same_up_to_rounding(folded, patched, n_terms=N_TERMS)


def test_a_direction_of_a_site_is_folded_in_the_svd_gauge(make_subject, dataset_file, tmp_path):
    """Without its first singular direction, `B·A` is the rest of its singular decomposition."""
    base, adapter = make_subject(r=3, n_layers=1, targets=["down_proj"])
    store = ActivationStore.open(
        make_texts((base, adapter), dataset_file, tmp_path / "store", num_examples=2)
    )
    each_column(store).save(tmp_path / "sae")
    config = EditConfig(
        lora_path=str(adapter),
        base_model=str(base),
        data_dir=store.path,
        sae=tmp_path / "sae",
        features=(0, 3),
        tokens="all",
        output=tmp_path / "edited",
        device="cpu",
    )
    out = run(config)
    updates = []
    for folder in (adapter, out):
        tensors = load_file(folder / WEIGHTS)
        (a,) = (t.double() for n, t in tensors.items() if "lora_A" in n)
        (b,) = (t.double() for n, t in tensors.items() if "lora_B" in n)
        updates.append(b @ a)
    u, s, vh = torch.linalg.svd(updates[0], full_matrices=False)
    expected = u[:, 1:] @ torch.diag(s[1:]) @ vh[1:]
    assert_same_up_to_rounding(updates[1], expected, n_terms=N_TERMS)


def test_a_sparse_feature_of_many_sites_becomes_a_patch_and_the_report_says_why(store, edited):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, store.d_in, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    x = torch.from_numpy(store.rows(0, store.n_rows).astype("float32"))[store.eligible]
    threshold = float((x @ rows[1]).quantile(0.9))
    sae = dictionary(store.layout, rows.T.contiguous(), rows.clone(), threshold=threshold)
    out, report = edited(sae, features=(1,))
    assert report["output"] == "patch"
    assert report["fold_error"] > 0.3
    assert not (out / WEIGHTS).exists()
    patch = Patch.open(out)
    assert patch.features == (1,) and patch.factor == 0
    x = torch.from_numpy(store.rows(0, 20).astype("float32"))
    code = sae.encode_dense(x)[:, [1]]
    torch.testing.assert_close(
        patch.change(x, torch.ones(20, dtype=torch.bool)), -code @ sae.W_dec[[1]]
    )
    assert not patch.change(x, torch.zeros(20, dtype=torch.bool)).any()
    forced, report = edited(sae, "forced", features=(1,), tolerance=9.0)
    assert report["output"] == "adapter"
    assert inspect_adapter(str(forced)).shapes


def test_a_factor_of_one_changes_nothing(store, edited):
    _, report = edited(each_column(store), features=(0, 3), factor=1.0)
    assert report["kl"]["patched"]["kl"] == report["kl"]["folded"]["kl"] == 0


def test_a_feature_that_never_fires_changes_nothing(store, edited):
    sae = each_column(store, threshold=1e9)
    _, report = edited(sae, features=(2,))
    assert report["kl"]["patched"]["kl"] == report["kl_patched_folded"] == 0
    assert report["fold_error"] is None
    assert report["output"] == "patch"


def test_the_same_command_gives_the_same_folder_and_verify_finds_changes(store, edited, capsys):
    sae = each_column(store)
    out, _ = edited(sae, features=both(store, "0.up_proj"), tokens="all")
    first = {file.name: file.read_bytes() for file in out.iterdir()}
    again, _ = edited(sae, "again", features=both(store, "0.up_proj"), tokens="all")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == first
    assert edited(sae, features=both(store, "0.up_proj"), tokens="all")[0] == out
    assert call(["verify", str(out)]) == 0
    require_schema(out / "report.json", "edit")
    (out / WEIGHTS).write_bytes(b"")
    assert call(["verify", str(out)]) == 1
    assert WEIGHTS in capsys.readouterr().err


def test_impossible_edits_are_one_line(store, edited, tmp_path):
    sae = each_column(store)
    for given, words in (
        ({"features": ()}, "names no feature"),
        ({"features": (1, 1)}, "different numbers"),
        ({"features": (10**6,)}, "has features 0 to"),
        ({"features": (1,), "factor": float("nan")}, "--factor is nan"),
    ):
        with pytest.raises(ConfigError, match=words):
            edited(sae, **given)
    with pytest.raises(ArtifactError, match="patch"):
        Patch.open(tmp_path)
    assert not (tmp_path / "edited").exists()
