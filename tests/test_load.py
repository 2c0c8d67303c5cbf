import json
import shutil
import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from builders.subjects import (
    CPU,
    change_adapter,
    load,
    logits_of,
    map_of,
    refused,
    rows_of,
    save_adapter,
    save_gguf,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorascope.errors import AdapterError
from lorascope.subject.adapter import CONFIG, inspect_adapter
from lorascope.subject.adapter_files import WEIGHTS
from lorascope.subject.base import find_base
from lorascope.subject.base import other_base as other_base_of
from lorascope.subject.load import load_tokenizer


@pytest.fixture
def broken(subject_dirs, tmp_path):
    """Return a function that copies the adapter, changes its tensors and config, and names both."""
    return partial(change_adapter, subject_dirs, tmp_path)


def test_the_layout_says_scale_and_norm_of_every_site(subject_dirs):
    base, adapter = subject_dirs
    subject = load(adapter, base)
    tensors = load_file(adapter / WEIGHTS)
    assert subject.layout.d_in == 14
    assert subject.layout.adapter == subject.adapter.digest
    for site in subject.layout.sites:
        b_matrix = tensors[f"base_model.model.{site.module}.lora_B.weight"].double()
        assert site.scale == 16.0
        assert site.b_norms == pytest.approx(b_matrix.norm(dim=0).tolist(), rel=1e-9)


def test_rank_alpha_and_rslora_patterns_are_read_from_the_live_module(make_subject):
    base, adapter = make_subject(  # pitfall 24
        r=4, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 8}
    )
    sites = {site.projection: site for site in load(adapter, base).layout.sites}
    assert (sites["q_proj"].rank, sites["gate_proj"].rank) == (2, 4)
    assert sites["gate_proj"].scale == pytest.approx(16 / 2)
    assert sites["up_proj"].scale == pytest.approx(8 / 2)
    assert sites["q_proj"].scale == pytest.approx(16 / 2**0.5)


def test_every_module_is_in_eval_mode_although_the_adapter_has_dropout(subject_dirs):
    base, adapter = subject_dirs
    subject = load(adapter, base)
    dropouts = [m for m in subject.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(dropouts) == 14
    assert not any(module.training for module in subject.model.modules())


def test_the_base_model_is_the_one_that_the_adapter_names_beside_itself(subject_dirs):
    base, adapter = subject_dirs
    assert find_base(inspect_adapter(str(adapter)), None).path == base.resolve()


def test_other_weights_of_the_same_size_are_another_base(subject_dirs, tmp_path):
    adapter = inspect_adapter(str(subject_dirs[1]))
    copy = tmp_path / "copy"
    shutil.copytree(subject_dirs[0], copy)
    before = find_base(adapter, str(subject_dirs[0])).digest
    assert find_base(adapter, str(copy)).digest == before
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:  # any one of them
        save_file(tensors | {name: tensors[name] + 0.01}, copy / "model.safetensors")
        assert find_base(adapter, str(copy)).digest != before, name


def test_the_digest_of_a_large_base_reads_a_small_part_of_it(subject_dirs, tmp_path, monkeypatch):
    copy = tmp_path / "large"
    shutil.copytree(subject_dirs[0], copy)
    size = 60 * 10**9
    header = b'{"w": {"dtype": "U8", "shape": [%d], "data_offsets": [0, %d]}}' % (size, size)
    with (copy / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # a sparse file
    digest, adapter = Mock(**{"hexdigest.return_value": "0"}), inspect_adapter(str(subject_dirs[1]))
    monkeypatch.setattr("lorascope.artifact.hashlib", Mock(sha256=lambda _: digest))
    find_base(adapter, str(copy))
    read = [len(call.args[0]) for call in digest.update.call_args_list]
    assert sum(read) < size / 1000
    assert len(read) > size / 10**7  # and is spread over the file


@pytest.mark.parametrize(
    ("named", "folder", "is_other"),
    [
        ("../base", "base", False),
        ("../base", "copy", False),
        ("../base", "other", True),
        ("owner/Base", "base", False),
        ("owner/base-instruct", "base", True),
        ("owner/base", "models--owner--Base/snapshots/0a1b", False),
        ("/elsewhere/base", "models--owner--other/snapshots/0a1b", True),
        (None, "other", False),
    ],
)
def test_a_base_that_is_not_the_one_that_the_adapter_names_is_told_apart(
    named, folder, is_other, subject_dirs, tmp_path
):
    shutil.copytree(subject_dirs[0], tmp_path / "base")
    shutil.copytree(subject_dirs[1], tmp_path / "adapter")
    given = tmp_path / folder
    if folder != "base":
        shutil.copytree(subject_dirs[0], given)
        if folder == "other":
            (given / "config.json").write_text((given / "config.json").read_text() + "\n")
    adapter = inspect_adapter(str(tmp_path / "adapter"))
    adapter.config["base_model_name_or_path"] = named
    assert other_base_of(adapter, find_base(adapter, str(given))) == (named if is_other else None)


def test_a_damaged_base_is_one_line(subject_dirs, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(subject_dirs[0], copy)
    for data in (b"", bytes(16), b"\2" + bytes(7)):
        (copy / "model.safetensors").write_bytes(data)
        refused(subject_dirs[1], copy, "cannot be loaded", "model.safetensors is damaged")


def test_the_revision_of_a_base_comes_from_the_adapter_or_from_its_flag(
    broken, subject_dirs, monkeypatch
):
    asked = []

    def download(name, *, allow_patterns, revision):
        asked.append((name, revision))
        return str(subject_dirs[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder, _ = broken(base_model_name_or_path="owner/base", revision="v1")
    adapter = inspect_adapter(str(folder))
    find_base(adapter, None)
    find_base(adapter, "owner/base")
    find_base(adapter, None, "v2")
    find_base(adapter, "owner/other")  # v1 is a version of another repository
    find_base(adapter, "owner/other", "v3")
    assert asked[::2] == asked[1::2]  # the config, then the rest
    assert asked[::2] == [
        ("owner/base", "v1"),
        ("owner/base", "v1"),
        ("owner/base", "v2"),
        ("owner/other", None),
        ("owner/other", "v3"),
    ]
    with pytest.raises(AdapterError, match="has one version; give --base-revision with a hub id"):
        find_base(adapter, str(subject_dirs[0]), "v1")


def test_weights_of_a_kind_that_is_refused_are_not_downloaded(subject_dirs, tmp_path, monkeypatch):
    asked = []
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')

    def download(name, *, allow_patterns, revision):
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(AdapterError, match="owner/bert is an encoder"):
        find_base(inspect_adapter(str(subject_dirs[1])), "owner/bert")
    assert asked == [["config.json"]]


def test_the_adapters_own_tokenizer_comes_first(broken):
    adapter_dir, base = broken()
    shutil.copytree(
        base,
        adapter_dir,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.saf*", "config.json"),
    )
    adapter = inspect_adapter(str(adapter_dir))
    found = find_base(adapter, str(base))
    assert load_tokenizer(adapter, found).name_or_path == str(adapter_dir)


def test_a_folder_that_is_not_there_names_the_nearest_and_never_asks_the_hub(subject_dirs):
    base, adapter = subject_dirs
    refused(adapter.parent / "adaptr", base, "does not exist", "did you mean adapter?")
    refused("./no/such/folder", base, "does not exist")
    refused(adapter, base.parent / "basis", "base model", "does not exist", "--base-model")


def test_a_base_named_beside_an_adapter_is_looked_for_there_only(broken, tmp_path, monkeypatch):
    adapter_dir, _ = broken(base_model_name_or_path="../base-of-it")
    (tmp_path / "here" / "base-of-them").mkdir(parents=True)
    (tmp_path / "here" / "work").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "work")
    with pytest.raises(AdapterError, match="does not exist") as caught:
        find_base(inspect_adapter(str(adapter_dir)), None)
    assert str(adapter_dir.parent.resolve() / "base-of-it") in str(caught.value)
    assert "base-of-them" not in str(caught.value)


def test_no_adapter_says_how_to_give_one():
    with pytest.raises(AdapterError, match="--lora-path.*lorascope.toml"):
        inspect_adapter(None)


def test_what_is_no_lora_is_named(broken, subject_dirs, tmp_path):
    adapter_dir, base = broken(peft_type="IA3")
    refused(adapter_dir, base, "type IA3")
    refused(base, base, "not a PEFT adapter", "full model")
    (adapter_dir / CONFIG).write_text("{")
    refused(adapter_dir, base, "not JSON")


def test_a_byte_order_mark_is_no_part_of_the_config(broken):
    adapter_dir, base = broken()
    text = (adapter_dir / CONFIG).read_text()
    (adapter_dir / CONFIG).write_text(text, encoding="utf-8-sig")
    assert load(adapter_dir, base).layout.d_in == 14


def test_missing_weights_are_refused(broken):
    adapter_dir, base = broken()
    (adapter_dir / WEIGHTS).unlink()
    refused(adapter_dir, base, "no weights")


def test_a_damaged_weights_file_is_named(broken):
    adapter_dir, base = broken()
    (adapter_dir / WEIGHTS).write_bytes((adapter_dir / WEIGHTS).read_bytes()[:100])
    refused(adapter_dir, base, WEIGHTS, "damaged")


def test_empty_tensors_are_named_with_their_cause(broken):
    adapter_dir, base = broken(
        tensors=lambda t: {k: v[:0] if "0.mlp.up_proj.lora_B" in k else v for k, v in t.items()}
    )
    refused(adapter_dir, base, "empty tensors", "sharded")


def test_an_adapter_without_any_lora_a_is_refused(broken):
    adapter_dir, base = broken(tensors=lambda t: {"x.weight": torch.ones(1)})
    refused(adapter_dir, base, "no lora_A tensor")


def test_half_precision_is_computed_when_asked_for(subject_dirs):
    base, adapter = subject_dirs
    assert load(adapter, base).dtype == torch.float32
    assert load(adapter, base, "bfloat16").dtype == torch.bfloat16


# Base models: pitfalls 25, 35, 38, B11


def test_rows_are_the_same_with_layers_offloaded_to_disk(make_subject):
    # pitfall 38
    base, adapter = make_subject(r=2)
    plain = load(adapter, base)
    for device_map in ({"": "cpu"}, map_of(**{"layers.0": "disk", "norm": "disk"})):
        subject = load(adapter, base, device_map=device_map)
        assert subject.device == CPU
        assert torch.equal(rows_of(subject), rows_of(plain))
        assert torch.equal(logits_of(subject.model), logits_of(plain.model))
        assert subject.layout == plain.layout
    offloaded = subject.causal.get_submodule("model.layers.0.mlp.up_proj")
    assert offloaded.base_layer.weight.is_meta
    assert not offloaded.lora_A["default"].weight.is_meta


def test_what_needs_an_offloaded_base_weight_at_hand_is_refused(subject_dirs, tmp_path):
    # pitfall 38
    base, _ = subject_dirs
    device_map = map_of(**{"layers.0": "disk"})
    for name, lora in (("dora", {"use_dora": True}), ("pissa", {"init_lora_weights": "pissa"})):
        save_adapter(base, tmp_path / name, **lora)
        with pytest.raises(AdapterError, match=r"is offloaded.*--device-map"):
            load(tmp_path / name, base, device_map=device_map)
    save_adapter(base, tmp_path / "saved", modules_to_save=["norm"])
    with pytest.raises(AdapterError, match=r"norm.*offloaded.*--device-map"):
        load(tmp_path / "saved", base, device_map=map_of(norm="disk"))


@pytest.fixture
def other_base(subject_dirs, tmp_path):
    """Return a function that copies the base and changes its config."""

    def copy(**config):
        folder = tmp_path / "base"
        shutil.copytree(subject_dirs[0], folder, dirs_exist_ok=True)
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**data, **config}))
        return folder

    return copy


def test_sharded_safetensors_are_read_and_pickles_are_not(subject_dirs, other_base):
    # pitfall 35, B47
    folder = other_base()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    _, adapter = subject_dirs
    assert torch.equal(rows_of(load(adapter, folder)), rows_of(load(adapter, subject_dirs[0])))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    refused(adapter, folder, "cannot be loaded", "safetensors")


def test_code_of_a_base_model_is_never_run(subject_dirs, other_base):
    # pitfall 35
    _, adapter = subject_dirs
    folder = other_base(
        model_type="own_model",
        auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    )
    (folder / "own.py").write_text("raise SystemExit('code was run')")
    refused(adapter, folder, "cannot be loaded", "custom code")
    known = other_base(auto_map={"AutoModelForCausalLM": "own.Own"})  # transformers has its own
    assert torch.equal(rows_of(load(adapter, known)), rows_of(load(adapter, subject_dirs[0])))


def test_a_base_that_lacks_tensors_is_no_base(subject_dirs, other_base):
    # transformers would fill them at random
    folder = other_base()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(subject_dirs[1], folder, "lacks 1 tensors", "model.layers.1.mlp.up_proj.weight")


def test_a_base_folder_with_an_adapter_in_it_is_refused(subject_dirs, other_base):
    folder = other_base()
    shutil.copy(subject_dirs[1] / CONFIG, folder / CONFIG)
    refused(subject_dirs[1], folder, "is an adapter; give a full model")


def test_a_quantisation_whose_package_is_missing_is_one_line(subject_dirs, other_base):
    # B11
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    refused(subject_dirs[1], other_base(quantization_config=config), "bitsandbytes")


def test_a_quantised_base_loads_as_transformers_loads_it_and_is_named(subject_dirs, other_base):
    # B11: without a GPU transformers widens these weights again
    base, adapter = subject_dirs
    assert load(adapter, base).quantized is None
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = other_base(quantization_config={**config, "activation_scheme": "dynamic"})
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    subject = load(adapter, folder)
    assert subject.quantized == "fp8"
    assert (subject.device, subject.dtype) == (CPU, torch.float32)
    torch.testing.assert_close(rows_of(subject), rows_of(load(adapter, base)), rtol=0.3, atol=0.1)
    assert not torch.equal(rows_of(subject), rows_of(load(adapter, base)))


# GGUF bases


@pytest.mark.needs("gguf")
def test_a_gguf_base_gives_the_rows_of_the_same_weights_in_safetensors(subject_dirs, tmp_path):
    base, adapter = subject_dirs
    plain = load(adapter, base)
    file = save_gguf(base, tmp_path / "tiny.gguf")
    for given in (file, tmp_path):  # the file, or the folder that holds no other model
        subject = load(adapter, given)
        assert torch.equal(rows_of(subject), rows_of(plain))
        assert torch.equal(logits_of(subject.model), logits_of(plain.model))
        assert (subject.base.name, subject.quantized) == ("tiny.gguf", "gguf")
        assert (subject.dtype, subject.max_length) == (torch.float32, plain.max_length)
    text = "<|im_start|>user\nHow many?<|im_end|>\n"
    assert subject.tokenizer.chat_template == plain.tokenizer.chat_template
    assert subject.tokenizer.eos_token == plain.tokenizer.eos_token
    assert subject.tokenizer.decode(subject.tokenizer.encode(text)) == text


@pytest.mark.needs("gguf")
def test_a_quantised_gguf_is_widened_before_the_adapter_goes_on(make_subject, tmp_path):
    from gguf import GGMLQuantizationType

    base, adapter = make_subject(hidden=32)
    file = save_gguf(base, tmp_path / "q8.gguf", GGMLQuantizationType.Q8_0)
    rows, plain = rows_of(load(adapter, file)), rows_of(load(adapter, base))
    assert not torch.equal(rows, plain)
    # Q8_0 rounds to 1/254 of the largest of 32 weights, which is some 3 standard deviations: each
    # weight is wrong by 0.7 % of its deviation, and errors grow through two layers.
    assert (rows - plain).norm() < 0.05 * plain.norm()


@pytest.mark.needs("gguf")
def test_one_bit_of_a_gguf_makes_another_base(subject_dirs, tmp_path):
    adapter = inspect_adapter(str(subject_dirs[1]))
    file = save_gguf(subject_dirs[0], tmp_path / "tiny.gguf")
    before = find_base(adapter, str(file)).digest
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert find_base(adapter, str(file)).digest != before


@pytest.mark.needs("gguf")
def test_what_is_no_causal_model_in_gguf_is_named_in_one_line(subject_dirs, tmp_path):
    base, adapter = subject_dirs
    file = save_gguf(base, tmp_path / "tiny.gguf")
    data = file.read_bytes()
    for size in (20, 1000, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        refused(adapter, file, "tiny.gguf", "damaged")
    file.write_bytes(b"PK\3\4" + data[4:])
    refused(adapter, file, "is not a GGUF file", "PK")
    refused(adapter, tmp_path / "tinny.gguf", "does not exist", "did you mean tiny.gguf?")
    file.write_bytes(data.replace(b"qwen2", b"clip2"))
    refused(adapter, file, "clip2")
    (tmp_path / "other.gguf").write_bytes(data)
    refused(adapter, tmp_path, "2 GGUF files", "other.gguf", "--base-model")


def test_a_gguf_base_without_its_package_says_what_to_install(subject_dirs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    refused(subject_dirs[1], tmp_path / "tiny.gguf", "needs the package gguf", "lorascope[gguf]")
