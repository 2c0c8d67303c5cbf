import importlib
import io
import json
import os
import pickle
import warnings
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from builders.foreign_saes import dictionary_folder, foreign_weights, published, saelens_folder
from builders.saes import random_rows, random_sae
from builders.tolerance import assert_same_up_to_rounding

from lorascope.errors import ArtifactError, NumberError
from lorascope.sae.model import SAE, load_sae


def as_of_numpy_1(path):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    assert any(b"numpy._core" in data for data in entries.values())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data.replace(b"numpy._core", b"numpy.core"))
    path.write_bytes(buffer.getvalue())


def saelens_code(rows, config, tensors):
    """The codes of SAELens' standard and jumprelu, in float64, with the margin of each."""
    named = {name: tensor.double() for name, tensor in tensors.items()}
    shift = named["b_dec"] if config["apply_b_dec_to_input"] else 0.0
    pre = (rows.double() - shift) @ named["W_enc"] + named["b_enc"]
    threshold = named.get("threshold", torch.zeros(1).double())
    return pre.relu() * (pre > threshold), (pre - threshold.clamp(min=0)).abs()


def require_equal_codes(found, expected, margin):
    clear = margin > 1e-4  # nearer than that, rounding may decide
    assert clear.float().mean() > 0.99
    assert 0 < int((expected > 0).sum()) < expected.numel()
    assert torch.allclose(found.double()[clear], expected[clear], atol=1e-4)


def dictionary_code(state, rows):
    """The codes of BatchTopKSAE, in float64, with the margin of each."""
    named = {name: tensor.double() for name, tensor in state.items()}
    pre = (rows.double() - named["b_dec"]) @ named["encoder.weight"].T + named["encoder.bias"]
    code = pre.relu()
    return code * (code > named["threshold"]), (pre - named["threshold"].clamp(min=0)).abs()


def test_a_published_file_gets_a_threshold_at_its_k_and_says_so(tmp_path, make_store, caplog):
    store = make_store(length=100)
    path = published(tmp_path / "sae.pt")
    sae = load_sae(path, store)
    assert "calibrating one" in caplog.text
    rows = torch.from_numpy(store.take(np.arange(store.n_rows)))
    assert float(sae.encode(rows).l0.float().mean()) == pytest.approx(4, abs=0.002)
    pre = rows @ sae.W_enc + sae.b_enc  # without subtracting b_dec, without a ReLU
    assert_same_up_to_rounding(
        sae.encode_dense(rows),
        pre * (pre > sae.threshold),
        n_terms=sae.d_in,
        scale=float(pre.abs().max()),
    )
    assert sae.manifest.parents == {"activations": store.digest}
    assert load_sae(sae.save(tmp_path / "with_threshold.pt")).digest == sae.digest


def test_a_published_file_that_has_a_threshold_keeps_it(tmp_path, make_store, caplog):
    threshold = torch.linspace(0.5, 2, 40)
    sae = load_sae(published(tmp_path / "sae.pt", threshold=threshold), make_store())
    assert torch.equal(sae.threshold, threshold)
    assert "calibrating" not in caplog.text


def test_a_published_file_of_numpy_1_loads(tmp_path, make_store):
    path = published(tmp_path / "sae.pt")
    as_of_numpy_1(path)
    assert load_sae(path, make_store()).d_sae == 40


@pytest.mark.parametrize("version", [1, 2])
def test_numpy_scalars_beside_the_tensors_are_read_as_numbers(tmp_path, make_store, version):
    config = {
        "k": np.int64(4),
        "lr": np.float64(0.1),
        "rate": np.float32(0.5),
        "half": np.float16(2),
        "big": np.uint64(2**63),
        "tied": np.bool_(True),
    }
    path = published(tmp_path / "sae.pt", config=config, final_metrics={"fvu": np.float64(0.25)})
    if version == 1:
        as_of_numpy_1(path)
    found = load_sae(path, make_store()).manifest.content["config"]
    assert found == {"k": 4, "lr": 0.1, "rate": 0.5, "half": 2.0, "big": 2**63, "tied": True}
    assert [type(value) for value in found.values()] == [int, float, float, float, int, bool]


def test_a_published_file_takes_its_columns_by_name(tmp_path, make_store):
    config = {"d_model": 6, "dict_size": 40, "k": 4}
    config["adapter_types"] = ["down_proj", "gate_proj", "up_proj"]
    path = published(tmp_path / "sae.pt", d_in=6, config=config)
    assert load_sae(path, make_store()).layout.initials == "g-u-d"


def test_a_published_file_needs_a_store_that_fits(tmp_path, make_store):
    with pytest.raises(ArtifactError, match="no threshold; give the activation store"):
        load_sae(published(tmp_path / "sae.pt"))
    with pytest.raises(ArtifactError, match="expects d_in 15, .* has 14: they come from different"):
        load_sae(published(tmp_path / "wide.pt", d_in=15), make_store())
    config = {"d_model": 14, "dict_size": 40, "k": 41}
    with pytest.raises(ArtifactError, match="k 41 in its config, expected 1 to 40"):
        load_sae(published(tmp_path / "k.pt", config=config), make_store(name="other"))


class _Reduced:
    """Pickled as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch, make_store):
    monkeypatch.chdir(tmp_path)
    malice = _Reduced(os.mkdir, ("owned",))
    scalar = np.float64(1).__reduce__()[0]
    published(tmp_path / "zip.pt", extra=malice)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(malice, protocol=2))
    float64 = np.dtype("f8")
    published(tmp_path / "inside.pt", extra=_Reduced(scalar, (float64, malice)))
    published(tmp_path / "object.pt", extra=_Reduced(scalar, (np.dtype("O"), b"x")))
    published(tmp_path / "record.pt", extra=_Reduced(scalar, (np.dtype("V8"), b"12345678")))
    published(tmp_path / "short.pt", extra=_Reduced(scalar, (float64, b"1234")))
    published(tmp_path / "list.pt", extra=_Reduced(scalar, (float64, [b"12345678"])))
    dictionary_folder(tmp_path / "dictionary", extra=malice)
    store = make_store()
    paths = [*tmp_path.glob("*.pt"), tmp_path / "dictionary"]
    assert len(paths) == 8
    for path in paths:
        with pytest.raises(ArtifactError, match="may run code") as caught:
            load_sae(path, store)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_foreign_and_broken_files_are_refused_in_one_line(tmp_path, make_store):
    cases = {
        "empty.pt": b"",
        "text.pt": b"hello",
        "zip.pt": b"PK\x03\x04 broken",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state": 1}, tmp_path / "other.pt")
    published(tmp_path / "missing.pt", model_state_dict={"W_enc": torch.zeros(14, 40)})
    state = {
        "W_enc": torch.zeros(40, 14),
        "b_enc": torch.zeros(40),
        "W_dec": torch.zeros(40, 14),
        "b_dec": torch.zeros(14),
    }
    published(tmp_path / "turned.pt", model_state_dict=state)
    itself = []
    itself.append(itself)
    published(tmp_path / "itself.pt", config={"k": 4, "of": itself})
    (tmp_path / "folder").mkdir()
    store = make_store()
    for path in [*tmp_path.glob("*.pt"), tmp_path / "folder", store.path, tmp_path / "absent.pt"]:
        with pytest.raises(ArtifactError) as caught:
            load_sae(path, store)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


def test_what_is_no_known_sae_is_answered_with_what_was_found_and_what_is_read(
    tmp_path, make_store
):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cfg.json").write_text("{}")
    (tmp_path / "other" / "sae.safetensors").write_bytes(b"")
    (tmp_path / "params.npz").write_bytes(b"")
    for name in ("other", "params.npz"):
        with pytest.raises(ArtifactError) as caught:
            load_sae(tmp_path / name, make_store(name=f"store-{name}"))
        text = str(caught.value)
        assert ("cfg.json, sae.safetensors" if name == "other" else "params.npz") in text
        assert "SAELens (cfg.json, sae_weights.safetensors)" in text
        assert "dictionary_learning (ae.pt, config.json)" in text
        assert "\n" not in text
    torch.save({"encoder": 1, "b_pre": 2}, tmp_path / "unknown.pt")
    with pytest.raises(ArtifactError, match="holds b_pre, encoder, expected model_state_dict"):
        load_sae(tmp_path / "unknown.pt")
    folder = random_sae().save(tmp_path / "sae")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        load_sae(folder, make_store(name="again"))


@pytest.mark.parametrize("is_shifted", [True, False])
@pytest.mark.parametrize("threshold", [0.7, -1.0, None])
def test_a_folder_of_saelens_has_the_codes_of_saelens(tmp_path, make_store, threshold, is_shifted):
    folder, config, tensors = saelens_folder(
        tmp_path / "lens", threshold, apply_b_dec_to_input=is_shifted
    )
    store = make_store()
    sae = load_sae(folder, store)
    rows = random_rows(400, 14)
    expected, margin = saelens_code(rows, config, tensors)
    require_equal_codes(sae.encode_dense(rows), expected, margin)
    x_hat = expected @ tensors["W_dec"].double() + tensors["b_dec"].double()
    assert_same_up_to_rounding(sae.decode(expected.float()), x_hat, n_terms=sae.d_sae)
    assert sae.architecture == config["architecture"]
    assert sae.layout == store.layout
    assert load_sae(sae.save(tmp_path / "ours"), store).digest == sae.digest


def test_a_folder_of_saelens_3_to_5_takes_the_defaults_of_its_time(tmp_path, make_store):
    folder, config, tensors = saelens_folder(tmp_path / "lens", None)
    old = {"d_in": 14, "d_sae": 40, "activation_fn_str": "relu", "normalize_activations": False}
    (folder / "cfg.json").write_text(json.dumps(old))
    rows = random_rows(50, 14)
    expected, margin = saelens_code(rows, config, tensors)
    require_equal_codes(load_sae(folder, make_store()).encode_dense(rows), expected, margin)


def test_what_lorascope_cannot_say_of_saelens_is_refused_with_the_reason(tmp_path, make_store):
    cases = {
        "topk": ({"architecture": "topk", "k": 4}, "topk .its latents fire by their rank"),
        "old": ({"activation_fn_str": "topk", "architecture": "standard"}, "fire by their rank"),
        "batch": ({"architecture": "batchtopk"}, "save_inference_model turns it into a jumprelu"),
        "gated": ({"architecture": "gated"}, "gate has a separate encoder"),
        "new": (
            {"architecture": "hyper"},
            "hyper .unknown to lorascope.; lorascope reads standard and",
        ),
        "norm": ({"normalize_activations": "layer_norm"}, "normalizes its rows"),
        "average": ({"normalize_activations": True}, "normalizes its rows"),
    }
    store = make_store()
    for name, (changes, match) in cases.items():
        folder, _, _ = saelens_folder(tmp_path / name, **changes)
        with pytest.raises(ArtifactError, match=match) as caught:
            load_sae(folder, store)
        assert "\n" not in str(caught.value)
    folder, _, tensors = saelens_folder(tmp_path / "scaled")
    tensors["scaling_factor"] = torch.full((40,), 2.0)
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(ArtifactError, match="scaling_factor"):
        load_sae(folder, store)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(ArtifactError, match="holds list, expected a JSON object"):
        load_sae(folder, store)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"cfg\.json is damaged or not JSON"):
        load_sae(folder, store)


@pytest.mark.parametrize("write", [saelens_folder, dictionary_folder])
def test_a_foreign_folder_needs_a_store_of_its_width(tmp_path, make_store, write):
    write(tmp_path / "foreign")
    with pytest.raises(ArtifactError, match="does not say what its columns are; give the activ"):
        load_sae(tmp_path / "foreign")
    write(tmp_path / "wide", d_in=15)
    with pytest.raises(ArtifactError, match="expects d_in 15, .* has 14: they come from different"):
        load_sae(tmp_path / "wide", make_store())


def test_our_folder_without_its_manifest_is_read_as_of_saelens(tmp_path, make_store):
    sae = replace(random_sae(), threshold=torch.linspace(0.1, 1, 40)).sealed(architecture="topk")
    folder = sae.save(tmp_path / "sae")
    (folder / "manifest.json").unlink()
    found = load_sae(folder, make_store())
    assert found.architecture == "topk"
    rows = random_rows(60, 14)
    assert torch.equal(found.encode_dense(rows), sae.encode_dense(rows))
    store = make_store(name="other")
    (folder / "cfg.json").write_text((folder / "cfg.json").read_text().replace("1.down", "2.down"))
    with pytest.raises(ArtifactError, match="other columns than .* different adapters"):
        load_sae(folder, store)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("BatchTopKSAE", "batchtopk"),
        ("MatryoshkaBatchTopKSAE", "matryoshka"),
        ("JumpReluAutoEncoder", "jumprelu"),
    ],
)
def test_a_folder_of_dictionary_learning_has_its_codes(tmp_path, make_store, name, architecture):
    threshold = torch.linspace(0.1, 2, 40) if name == "JumpReluAutoEncoder" else 0.7
    folder = dictionary_folder(tmp_path / "dict", name, threshold)
    store = make_store()
    sae = load_sae(folder, store)
    rows = random_rows(400, 14)
    shift = name != "JumpReluAutoEncoder"
    expected, margin = saelens_code(
        rows,
        {"apply_b_dec_to_input": shift},
        {**foreign_weights(), "threshold": torch.as_tensor(threshold)},
    )
    require_equal_codes(sae.encode_dense(rows), expected, margin)
    assert sae.architecture == architecture
    assert sae.manifest.content["k"] == 5
    assert torch.equal(load_sae(folder / "ae.pt", store).b_enc, sae.b_enc)


def test_a_dictionary_whose_threshold_was_never_set_fires_above_zero(tmp_path, make_store, caplog):
    sae = load_sae(dictionary_folder(tmp_path / "dict", threshold=-1.0), make_store())
    assert torch.equal(sae.threshold, torch.zeros(40))
    assert "has not set a threshold" in caplog.text


def test_what_lorascope_cannot_say_of_dictionary_learning_is_refused(tmp_path, make_store):
    store = make_store()
    folder = dictionary_folder(tmp_path / "topk", "AutoEncoderTopK")
    with pytest.raises(
        ArtifactError, match="of class AutoEncoderTopK, expected a class with a thresh"
    ):
        load_sae(folder, store)
    folder = dictionary_folder(tmp_path / "scalar", **{"encoder.bias": torch.tensor(0.0)})
    with pytest.raises(ArtifactError, match="b_enc has shape"):
        load_sae(folder, store)
    folder = dictionary_folder(tmp_path / "nan", threshold=torch.nan)
    with pytest.raises(NumberError, match="threshold is not finite"):
        load_sae(folder, store)
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"give the folder that holds it and its config\.json"):
        load_sae(folder / "ae.pt", store)


def imported(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library and what it imports
        return importlib.import_module(module)


@pytest.mark.needs("sae_lens")
@pytest.mark.filterwarnings("ignore")
def test_the_real_saelens_gives_our_codes_and_reconstructions(tmp_path):
    lens = imported("sae_lens")
    sae = replace(random_sae(), threshold=torch.linspace(0.1, 1, 40)).sealed(
        architecture="jumprelu"
    )
    theirs = lens.SAE.load_from_disk(sae.save(tmp_path / "sae"), device="cpu")
    rows = random_rows(300, 14)
    ours = sae.encode_dense(rows)
    assert int((ours > 0).sum()) > 100
    with torch.no_grad():
        assert_same_up_to_rounding(theirs.encode(rows), ours, n_terms=sae.d_in)
        assert_same_up_to_rounding(theirs(rows), sae.decode(ours), n_terms=sae.d_sae)
    assert theirs.cfg.metadata.training_architecture == "jumprelu"
    assert theirs.cfg.metadata.columns == list(sae.layout.column_names)


@pytest.mark.needs("sae_lens")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["jumprelu", "standard", "batchtopk"])
def test_what_the_real_saelens_saved_has_its_codes(tmp_path, make_store, kind):
    lens = imported("sae_lens")
    torch.manual_seed(0)
    if kind == "batchtopk":
        training = lens.BatchTopKTrainingSAE(
            lens.BatchTopKTrainingSAEConfig(
                d_in=14, d_sae=40, k=4, rescale_acts_by_decoder_norm=True
            )
        )
        training.topk_threshold.fill_(1.5)
        randomize(training)
        training.save_inference_model(tmp_path / "lens")
        theirs = lens.SAE.load_from_disk(tmp_path / "lens")
    else:
        of = {
            "jumprelu": (lens.JumpReLUSAE, lens.JumpReLUSAEConfig),
            "standard": (lens.StandardSAE, lens.StandardSAEConfig),
        }
        theirs = of[kind][0](of[kind][1](d_in=14, d_sae=40, apply_b_dec_to_input=True))
        randomize(theirs)
        theirs.save_model(tmp_path / "lens")
    sae = load_sae(tmp_path / "lens", make_store())
    rows = random_rows(300, 14)
    with torch.no_grad():
        code, x_hat = theirs.encode(rows), theirs(rows)
    assert 0 < int((code > 0).sum()) < code.numel()
    assert_same_up_to_rounding(sae.encode_dense(rows), code, n_terms=sae.d_in)
    assert_same_up_to_rounding(sae.decode(code), x_hat, n_terms=sae.d_sae)


def randomize(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape))


@pytest.mark.needs("sae_lens")
@pytest.mark.filterwarnings("ignore")
def test_a_topk_of_the_real_saelens_is_refused(tmp_path, make_store):
    lens = imported("sae_lens")
    lens.TopKSAE(lens.TopKSAEConfig(d_in=14, d_sae=40, k=4)).save_model(tmp_path / "lens")
    with pytest.raises(ArtifactError, match="fire by their rank"):
        load_sae(tmp_path / "lens", make_store())


@pytest.mark.needs("dictionary_learning")
@pytest.mark.filterwarnings("ignore")
def test_what_the_real_dictionary_learning_saved_has_its_codes(tmp_path, make_store):
    library = imported("dictionary_learning.trainers.batch_top_k")
    torch.manual_seed(0)
    theirs = library.BatchTopKSAE(14, 40, 4)
    randomize(theirs)
    theirs.threshold.fill_(1.2)
    (tmp_path / "dict").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "dict" / "ae.pt")
    config = {"trainer": {"dict_class": "BatchTopKSAE", "k": 4}}
    (tmp_path / "dict" / "config.json").write_text(json.dumps(config))
    sae = load_sae(tmp_path / "dict", make_store())
    rows = random_rows(300, 14)
    with torch.no_grad():
        code, x_hat = theirs.encode(rows), theirs(rows)
    assert 0 < int((code > 0).sum()) < code.numel()
    assert_same_up_to_rounding(sae.encode_dense(rows), code, n_terms=sae.d_in)
    assert_same_up_to_rounding(sae.decode(code), x_hat, n_terms=sae.d_sae)


def test_an_sae_says_what_it_was_trained_as_and_how_stable_its_latents_are(tmp_path):
    sae = random_sae()
    assert sae.architecture == "batchtopk"
    assert sae.stability is None
    known = sae.sealed(architecture="matryoshka", stability=[i / 40 for i in range(40)])
    for name in ("sae", "sae.pt"):
        found: SAE = load_sae(known.save(tmp_path / name))
        assert found.architecture == "matryoshka"
        assert torch.equal(found.stability, torch.arange(40) / 40)
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["training_architecture"] == "matryoshka"
