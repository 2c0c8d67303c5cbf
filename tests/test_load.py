import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorascope.errors import AdapterError
from lorascope.subject.load import (
    CONFIG,
    WEIGHTS,
    find_base,
    inspect_adapter,
    load_subject,
    load_tokenizer,
)

CPU = torch.device("cpu")


def load(adapter_dir, base_dir, dtype="auto"):
    adapter = inspect_adapter(str(adapter_dir))
    base = find_base(adapter, str(base_dir) if base_dir else None)
    return load_subject(adapter, base, load_tokenizer(adapter, base), CPU, dtype)


@pytest.fixture
def broken(subject_dirs, tmp_path):
    """Return a function that copies the adapter, changes its tensors and config, and names both."""
    base, adapter = subject_dirs

    def change(tensors=None, **config):
        copy = tmp_path / "adapter"
        shutil.copytree(adapter, copy, dirs_exist_ok=True)
        shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
        if tensors is not None:
            save_file(tensors(load_file(copy / WEIGHTS)), copy / WEIGHTS)
        if config:
            data = json.loads((copy / CONFIG).read_text())
            (copy / CONFIG).write_text(json.dumps({**data, **config}))
        return copy, base

    return change


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
    base, adapter = make_subject(
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


def refused(adapter_dir, base, *words):
    with pytest.raises(AdapterError) as caught:
        load(adapter_dir, base)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_a_folder_that_is_not_there_names_the_nearest_and_never_asks_the_hub(subject_dirs):
    base, adapter = subject_dirs
    refused(adapter.parent / "adaptr", base, "does not exist", "did you mean adapter?")
    refused("./no/such/folder", base, "does not exist")
    refused(adapter, base.parent / "basis", "base model", "does not exist", "--base-model")


def test_no_adapter_says_how_to_give_one():
    with pytest.raises(AdapterError, match="--lora-path.*lorascope.toml"):
        inspect_adapter(None)


def test_what_is_no_lora_is_named(broken, subject_dirs, tmp_path):
    adapter_dir, base = broken(peft_type="IA3")
    refused(adapter_dir, base, "type IA3")
    refused(base, base, "no PEFT adapter", "full model")
    (adapter_dir / CONFIG).write_text("{")
    refused(adapter_dir, base, "is not JSON")


def test_pickled_and_missing_weights_are_refused(broken):
    adapter_dir, base = broken()
    (adapter_dir / WEIGHTS).unlink()
    refused(adapter_dir, base, "no weights")
    (adapter_dir / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    refused(adapter_dir, base, "pickled", "can run code")


def test_a_damaged_weights_file_is_named(broken):
    adapter_dir, base = broken()
    (adapter_dir / WEIGHTS).write_bytes((adapter_dir / WEIGHTS).read_bytes()[:100])
    refused(adapter_dir, base, WEIGHTS, "damaged")


def test_missing_and_extra_tensors_are_counted_and_named(broken):
    def drop(tensors):
        name = sorted(tensors)[3]
        return {key: value for key, value in tensors.items() if key != name}

    adapter_dir, base = broken(tensors=drop)
    refused(adapter_dir, base, "lacks 1 tensors", "lora_")
    adapter_dir, base = broken(
        tensors=lambda t: {**t, "base_model.model.x.lora_A.weight": torch.ones(1)}
    )
    message = refused(adapter_dir, base)
    assert "lacks" in message or "unknown" in message


def test_renamed_tensors_are_an_error_not_a_random_adapter(broken):
    adapter_dir, base = broken(
        tensors=lambda t: {
            k.replace("base_model.model.", "base_model.model.wrapped."): v for k, v in t.items()
        }
    )
    refused(adapter_dir, base, "lacks 28 tensors", "wrapper's prefix")


def test_empty_tensors_are_named_with_their_cause(broken):
    adapter_dir, base = broken(
        tensors=lambda t: {k: v[:0] if "0.mlp.up_proj.lora_B" in k else v for k, v in t.items()}
    )
    refused(adapter_dir, base, "empty tensors", "sharded")


def test_an_adapter_of_another_base_names_the_first_shape(make_subject, subject_dirs):
    _, adapter = subject_dirs
    other_base, _ = make_subject(hidden=32)
    refused(adapter, other_base, "for another base", "in the file", "in the model")
    shallow, _ = make_subject(n_layers=1)
    refused(adapter, shallow, "unknown 14 tensors")


def test_an_adapter_that_fits_no_module_is_refused(broken):
    adapter_dir, base = broken(target_modules=["nothing_proj"])
    refused(adapter_dir, base, "does not fit base model")


def test_an_untrained_adapter_is_warned_of(broken, caplog):
    adapter_dir, base = broken(
        tensors=lambda t: {k: v * 0 if "lora_B" in k else v for k, v in t.items()}
    )
    load(adapter_dir, base)
    assert "every lora_B of adapter is zero" in caplog.text


def test_an_adapter_without_any_lora_a_is_refused(broken):
    adapter_dir, base = broken(tensors=lambda t: {"x.weight": torch.ones(1)})
    refused(adapter_dir, base, "no lora_A tensor")


def test_half_precision_is_computed_when_asked_for(subject_dirs):
    base, adapter = subject_dirs
    assert load(adapter, base).dtype == torch.float32
    assert load(adapter, base, "bfloat16").dtype == torch.bfloat16
