import copy
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from builders.saes import random_rows, random_sae
from builders.stores import layout_of
from builders.tolerance import assert_same_up_to_rounding

from lorascope.artifact import digest_file, read_manifest
from lorascope.causal.patch import select_latents
from lorascope.errors import ArtifactError, NumberError
from lorascope.sae.model import SAE, load_sae


@pytest.mark.parametrize(("d_in", "d_sae"), [(56, 896), (192, 896), (448, 7168), (14, 33)])
def test_a_tokens_code_is_the_same_to_the_bit_alone_and_in_any_batch(d_in, d_sae):
    sae = random_sae(d_in, d_sae, threshold=2.0)
    rows = random_rows(513, d_in)
    whole = sae.encode_dense(rows)
    assert 0 < (whole > 0).sum() < whole.numel() / 2
    for size in (1, 255, 257):
        assert torch.equal(sae.encode_dense(rows[:size]), whole[:size])
        assert torch.equal(sae.encode_dense(rows[-size:]), whole[-size:])
    order = torch.randperm(513, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.encode_dense(rows[order]), whole[order])
    cube = sae.encode(rows[:270].view(3, 90, d_in))
    assert cube.shape == (3, 90, d_sae)
    assert torch.equal(cube.to_dense().view(270, d_sae), whole[:270])
    chosen = [d_sae - 1, 0, 5]
    assert torch.equal(select_latents(sae, chosen).encode_dense(rows), whole[:, chosen])


def test_the_code_is_what_the_formula_says():
    sae = random_sae()
    rows = random_rows(50, 14)
    pre = rows.double() @ sae.W_enc.double() + sae.b_enc.double()
    expected = pre * (pre > sae.threshold.double())
    assert_same_up_to_rounding(sae.encode_dense(rows), expected, n_terms=sae.d_in)
    x_hat = expected @ sae.W_dec.double() + sae.b_dec.double()
    assert_same_up_to_rounding(sae.decode(sae.encode(rows)), x_hat, n_terms=sae.d_sae)
    assert_same_up_to_rounding(sae.decode(sae.encode_dense(rows)), x_hat, n_terms=sae.d_sae)


def test_half_precision_rows_are_computed_in_float32():
    sae = random_sae()
    rows = random_rows(9, 14, dtype=torch.float16)
    code = sae.encode(rows)
    assert code.values.dtype == torch.float32
    assert torch.equal(code.to_dense(), sae.encode_dense(rows.float()))


def test_an_sae_that_has_encoded_can_be_pickled_and_copied():
    sae, rows = random_sae(), torch.randn(9, 14)
    code = sae.encode_dense(rows)
    for other in (pickle.loads(pickle.dumps(sae)), copy.deepcopy(sae)):
        assert torch.equal(other.encode_dense(rows), code)
        assert other.digest == sae.digest


def test_no_rows_have_an_empty_code():
    sae = random_sae()
    code = sae.encode(random_rows(0, 14))
    assert code.to_dense().shape == (0, 40)
    assert sae.encode_dense(random_rows(0, 14)).shape == (0, 40)
    assert sae.decode(code).shape == (0, 14)


def test_a_row_without_any_latent_is_decoded_as_the_bias():
    sae = random_sae(threshold=1e6)
    assert torch.equal(sae.decode(sae.encode(random_rows(3, 14))), sae.b_dec.expand(3, 14))


def test_without_a_threshold_it_refuses_to_encode():
    sae = SAE(**{**vars(random_sae()), "threshold": None})
    with pytest.raises(ArtifactError, match="no threshold"):
        sae.encode(random_rows(1, 14))
    with pytest.raises(ArtifactError, match="no threshold"):
        sae.encode_dense(random_rows(1, 14))


def test_rows_of_another_width_or_not_finite_are_refused():
    sae = random_sae()
    with pytest.raises(ArtifactError, match="13 columns, the SAE expects 14"):
        sae.encode(random_rows(2, 13))
    rows = random_rows(300, 14)
    rows[270, 3] = torch.nan
    with pytest.raises(NumberError, match="row 270"):
        sae.encode(rows)


@pytest.mark.parametrize("name", ["sae.pt", "sae"])
def test_what_was_saved_loads_to_the_bit_and_exports_to_the_other_format(tmp_path, name):
    sae = random_sae()
    rows = random_rows(77, 14)
    first = load_sae(sae.save(tmp_path / name))
    other = "sae" if name == "sae.pt" else "sae.pt"
    second = load_sae(first.save(tmp_path / other))
    third = load_sae(second.save(tmp_path / ("again" + (".pt" if name == "sae.pt" else ""))))
    for loaded in (first, second, third):
        assert torch.equal(loaded.encode_dense(rows), sae.encode_dense(rows))
        assert torch.equal(loaded.decode(loaded.encode(rows)), sae.decode(sae.encode(rows)))
        assert loaded.layout == sae.layout
        assert loaded.digest == sae.digest
    assert not list(tmp_path.glob("*.partial"))


def test_the_same_sae_is_saved_as_the_same_bytes(tmp_path):
    random_sae().save(tmp_path / "a.pt")
    random_sae().save(tmp_path / "b.pt")
    assert digest_file(tmp_path / "a.pt") == digest_file(tmp_path / "b.pt")
    random_sae().save(tmp_path / "a")
    random_sae().save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert digest_file(file) == digest_file(tmp_path / "b" / file.name)


def test_headers_are_read_without_torch(tmp_path):
    sae = random_sae()
    for name in ("sae.pt", "sae"):
        manifest = read_manifest(sae.save(tmp_path / name))
        assert manifest.kind == "sae"
        assert replace(manifest, files={}) == sae.manifest


def test_the_archive_has_the_keys_of_the_published_scripts(tmp_path):
    sae = random_sae()
    data = torch.load(sae.save(tmp_path / "sae.pt"), weights_only=True)
    assert list(data["model_state_dict"]) == ["W_enc", "b_enc", "W_dec", "b_dec"]
    assert data["config"] == {"k": 4, "seed": 7, "d_model": 14, "dict_size": 40}


def test_the_folder_is_a_jumprelu_of_saelens(tmp_path):
    folder = random_sae().save(tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    expected = {
        "architecture": "jumprelu",
        "d_in": 14,
        "d_sae": 40,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }
    assert expected.items() <= config.items()
    tensors = safetensors.torch.load_file(folder / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "W_enc": (14, 40),
        "b_enc": (40,),
        "W_dec": (40, 14),
        "b_dec": (14,),
        "threshold": (40,),
    }


def test_an_output_of_other_settings_is_not_overwritten_by_accident(tmp_path):
    sae = random_sae()
    sae.save(tmp_path / "sae.pt")
    other = replace(sae, manifest=replace(sae.manifest, settings={"k": 5.0})).sealed()
    with pytest.raises(ArtifactError, match="k 4.0 there, 5.0 here"):
        other.save(tmp_path / "sae.pt")
    assert other.save(tmp_path / "sae.pt", overwrite=True)
    assert load_sae(tmp_path / "sae.pt").manifest.settings == {"k": 5.0}


def test_an_sae_and_a_store_of_different_adapters_are_refused(tmp_path, make_store):
    path = random_sae().save(tmp_path / "sae.pt")
    assert load_sae(path, make_store(name="same"))
    with pytest.raises(ArtifactError, match="d_in 14, .* has 21: they come from different"):
        load_sae(path, make_store(layout=layout_of(n_layers=3), name="deeper"))
    with pytest.raises(ArtifactError, match="adapter aaaaaaaaaaaa, .* has bbbbbbbbbbbb"):
        load_sae(path, make_store(layout=layout_of(adapter="b" * 64), name="foreign"))


def test_a_store_is_narrowed_to_the_columns_of_the_sae(make_store):
    store = make_store()
    layout, columns = store.layout.select(["gate_proj", "o_proj"])
    sae = random_sae(d_in=4, layout=layout)
    narrow = sae.narrow(store)
    assert np.array_equal(narrow.rows(0, 5), store.rows(0, 5)[:, columns])


def test_a_damaged_weight_is_noticed(tmp_path):
    folder = random_sae().save(tmp_path / "sae")
    file = folder / "sae_weights.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["b_dec"][3] += 1e-3
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ArtifactError, match="other weights than its manifest says"):
        load_sae(folder)
    tensors["b_dec"][3] = torch.nan
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(NumberError, match="b_dec is not finite"):
        load_sae(folder)


def test_a_file_of_a_newer_schema_asks_for_a_newer_version(tmp_path):
    sae = random_sae()
    newer = replace(sae, manifest=replace(sae.manifest, schema=2))
    with pytest.raises(ArtifactError, match="install a newer lorascope"):
        load_sae(newer.save(tmp_path / "sae.pt"))


def test_encoding_imports_no_training():
    training = ("trainer", "step", "objective", "settings")
    code = (
        "import sys, lorascope.sae.model\n"
        f"loaded = {{f'lorascope.sae.{{name}}' for name in {training}}} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_sae_without_positive_thresholds_is_not_moved_to_another_sparsity(make_store):
    store = make_store()
    sae = random_sae()
    threshold = sae.threshold.clone()
    threshold[3] = 0.0
    with pytest.raises(
        ArtifactError, match=f"1 of {sae.d_sae} latents have a threshold of 0 or less"
    ):
        replace(sae, threshold=threshold).calibrated(store, np.arange(5), 2.0)
