"""Files that are not what they seem: adapters of other tools, pointers, folders one level off."""

import json
import shutil

import pytest
import torch
from builders.subjects import IDS, load, refused, rows_of
from builders.tolerance import assert_same_up_to_rounding
from safetensors.torch import load_file, save_file

from lorascope.artifact import open_manifest
from lorascope.cli import call
from lorascope.errors import AdapterError, ArtifactError, DatasetError
from lorascope.inspection import describe, verify
from lorascope.sae.model import load_sae
from lorascope.subject.adapter import CONFIG, WEIGHTS, inspect_adapter
from lorascope.subject.base import find_base
from lorascope.subject.inventory import describe as describe_adapter
from lorascope.subject.inventory import inventory
from lorascope.subject.load import load_tokenizer
from lorascope.texts.records import read_records

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def folders(subject_dirs, tmp_path):
    """Copies of a base model and its adapter."""
    for source, name in zip(subject_dirs, ("base", "adapter"), strict=True):
        shutil.copytree(source, tmp_path / name)
    return tmp_path / "adapter", tmp_path / "base"


def test_a_pickle_of_tensors_is_the_adapter_in_safetensors(folders):
    adapter, base = folders
    expected, listed = rows_of(load(adapter, base)), inventory(inspect_adapter(str(adapter)))
    digest = inspect_adapter(str(adapter)).digest
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()
    found = inspect_adapter(str(adapter))
    assert torch.equal(rows_of(load(adapter, base)), expected)
    assert inventory(found) == listed
    assert found.digest != digest  # it is another file


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": Evil()}, "cannot be read as tensors alone"),
        ([torch.ones(2)], "holds other values than tensors"),
        ({"x": "y"}, "holds other values than tensors"),
        (None, "cannot be read as tensors alone"),
    ],
)
def test_a_pickle_of_anything_else_is_refused_and_not_run(folders, content, message):
    adapter, base = folders
    (adapter / WEIGHTS).unlink()
    torch.save(content, adapter / "adapter_model.bin")
    if content is None:
        (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    refused(adapter, base, message)


def as_mlx(adapter, scale=20.0, **config):
    """Rewrite an adapter of rank 1 as mlx-lm saves it."""
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    mlx = {
        name.removeprefix("base_model.model.")
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): tensor.T.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(mlx, adapter / "adapters.safetensors")
    parameters = {"rank": 1, "scale": scale, "dropout": 0.0}
    given = {"fine_tune_type": "lora", "model": "../base", "num_layers": 2, "lr": 1e-5}
    given |= {"lora_parameters": parameters, **config}
    (adapter / CONFIG).write_text(json.dumps(given))
    return mlx


def test_an_mlx_adapter_writes_scale_b_a_x(folders, caplog):
    adapter, base = folders
    expected = rows_of(load(adapter, base))
    mlx = as_mlx(adapter, scale=16.0)  # as lora_alpha 16 of rank 1
    caplog.set_level("INFO")
    subject = load(adapter, None)  # the base that its config names
    assert "is an MLX adapter: A and B are transposed, scale is 16" in caplog.text
    assert torch.equal(rows_of(subject), expected)
    site = "model.layers.0.mlp.up_proj"
    layer, x = subject.causal.get_submodule(site), torch.randn(3, 16)
    with torch.no_grad():
        written = layer(x) - layer.base_layer(x)
        by_mlx = 16.0 * ((x @ mlx[f"{site}.lora_a"]) @ mlx[f"{site}.lora_b"])
    assert_same_up_to_rounding(written, by_mlx, n_terms=64)
    assert subject.backbone(input_ids=IDS)[0].isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "dora"}, "MLX adapter of type dora, expected lora"),
        ({"lora_parameters": {"rank": 1}}, "config names no scale"),
        ({"lora_parameters": []}, "config names no scale"),
    ],
)
def test_an_mlx_adapter_that_cannot_be_converted_is_one_line(folders, config, message):
    as_mlx(folders[0], **config)
    refused(*folders, message)


def test_an_mlx_adapter_of_another_base_is_told_by_its_shapes(folders, make_subject):
    as_mlx(folders[0])
    refused(folders[0], make_subject(hidden=32)[0], "does not belong to base")
    tensors = load_file(folders[0] / "adapters.safetensors")
    save_file({**tensors, "x.weight": torch.ones(2)}, folders[0] / "adapters.safetensors")
    refused(*folders, "holds x.weight of shape (2,), expected lora_a and lora_b")


def test_merged_linear_of_peft_0_2_is_refused_by_name(folders):
    adapter, base = folders
    tensors = {
        name: tensor[..., None] if "lora_B" in name else tensor
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }
    save_file(tensors, adapter / WEIGHTS)
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**config, "enable_lora": [True, False, True]}))
    text = describe_adapter(inspect_adapter(str(adapter)))
    assert "does not support this adapter: it is merged (enable_lora): its B is a grouped" in text
    refused(adapter, base, "enable_lora")


def test_a_and_b_of_different_ranks_are_damaged(folders):
    tensors = load_file(folders[0] / WEIGHTS)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: torch.ones(len(tensors[name]), 3)}, folders[0] / WEIGHTS)
    refused(*folders, "expected the same rank in both; is it damaged?")


def test_a_and_b_as_mlx_saves_them_under_pefts_names_are_named_transposed(folders):
    tensors = load_file(folders[0] / WEIGHTS)
    turned = {name: tensor.T.contiguous() for name, tensor in tensors.items()}
    save_file(turned, folders[0] / WEIGHTS)
    refused(*folders, "A and B are transposed, as MLX saves them")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "adapter_model.bin"])
def test_a_git_lfs_pointer_of_an_adapter_is_named(folders, name):
    adapter, base = folders
    (adapter / name).write_bytes(POINTER)
    refused(adapter, base, f"{name} is a Git LFS pointer", f"run git lfs pull in {adapter}")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "base.gguf"])
def test_a_git_lfs_pointer_of_a_base_is_named(folders, name):
    adapter, base = folders
    (base / name).write_bytes(POINTER)
    given = base / name if name == "base.gguf" else base
    refused(adapter, given, f"{name} is a Git LFS pointer", f"run git lfs pull in {base}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json.gz", "folder/data.arrow"])
def test_a_git_lfs_pointer_of_a_dataset_is_named(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(POINTER)
    given = file.parent if "folder" in name else file
    with pytest.raises(DatasetError, match=f"{file.name} is a Git LFS pointer"):
        read_records(str(given), "train", None)


@pytest.mark.parametrize(
    "name", ["features.h5", "sae.pt", "features.json", "page.html", "sae/cfg.json"]
)
def test_a_git_lfs_pointer_of_an_artifact_is_named(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(POINTER)
    path = file.parent if "/" in name else file
    looks = [verify, lambda path: describe(str(path)), lambda path: open_manifest(path, "sae", 1)]
    for look in [*looks, load_sae]:
        with pytest.raises(ArtifactError, match="is a Git LFS pointer"):
            look(path)


def test_a_file_in_place_of_its_folder_is_told(folders):
    adapter, base = folders
    refused(adapter / WEIGHTS, base, "is a file; give its folder", str(adapter))
    refused(adapter, base / "model.safetensors", "is a file; give its folder", str(base))
    refused(adapter, base / "config.json", "is a file; give its folder")
    with pytest.raises(ArtifactError, match="is a file of an adapter; give its folder"):
        describe(str(adapter / WEIGHTS))


def test_a_full_model_or_a_cache_of_the_hub_is_no_adapter(folders, tmp_path, capsys):
    adapter, base = folders
    refused(base, base, "it holds a full model")
    with pytest.raises(ArtifactError, match="holds a full model"):
        describe(str(base))
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(adapter, snapshot)
    for folder in (snapshot.parents[1], snapshot.parents[2]):
        refused(folder, base, "is a cache of the hub", f"such as {snapshot}")
        refused(adapter, folder, "is a cache of the hub")
        assert call(["info", str(folder)]) == 2
        assert "is a cache of the hub" in capsys.readouterr().err
    assert load(snapshot, base).layout.d_in == 14


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_without_its_vocabulary_is_named(folders, kind):
    adapter, base = folders
    (adapter / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    refused(adapter, base, str(adapter), "its vocabulary", "the base model's tokenizer is used")
    (adapter / "tokenizer_config.json").unlink()
    for file in base.glob("*token*"):
        file.unlink()
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    refused(adapter, base, str(base), "its vocabulary")


def test_a_sentencepiece_model_alone_says_what_to_install(folders, monkeypatch):
    adapter, base = folders
    for file in base.glob("*token*"):
        file.unlink()
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (base / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    found = inspect_adapter(str(adapter))
    with pytest.raises(AdapterError, match="needs the packages sentencepiece and protobuf"):
        load_tokenizer(found, find_base(found, str(base)))
