"""Rotary positions: the frequencies that a config states, and those that follow a text's length."""

import json
import shutil

import pytest
import torch
from builders.subjects import IDS, load, refused, rows_of, save_adapter, save_rotary
from transformers import AutoModelForCausalLM

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 64}
DYNAMIC = {**LINEAR, "rope_type": "dynamic"}
HALF = [1.0 + i for i in range(8)]
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": HALF,
    "long_factor": [4 * factor for factor in HALF],
    "original_max_position_embeddings": 64,
}
GEMMA = {
    "full_attention": {**LINEAR, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.fixture
def subject_dirs(tokenizer_dir, tmp_path):
    def make(rope, name="Llama", **config):
        base = save_rotary(tokenizer_dir, tmp_path / "base", name, rope_parameters=rope, **config)
        targets = {"target_modules": ["qkv_proj"]} if name == "Phi3" else {}
        save_adapter(base, tmp_path / "adapter", **targets)
        return tmp_path / "adapter", base

    return make


def old_layout(base, rope):
    """Write a config as transformers 4 does."""
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    (base / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("rope", [PLAIN, LINEAR, LLAMA3, YARN, DYNAMIC])
def test_settings_that_transformers_does_not_read_are_refused(rope, subject_dirs, monkeypatch):
    adapter, base = subject_dirs(rope)
    right = rows_of(load(adapter, base))
    original = AutoModelForCausalLM.from_pretrained

    def ignorant(pretrained_model_name_or_path, **options):
        """Load as a transformers that does not know `rope_parameters`: theta is 10000."""
        copy = base.parent / "copy"
        shutil.copytree(pretrained_model_name_or_path, copy, dirs_exist_ok=True)
        config = json.loads((copy / "config.json").read_text())
        del config["rope_parameters"]
        (copy / "config.json").write_text(json.dumps(config))
        return original(copy, **options)

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", ignorant)
        refused(adapter, base, rope["rope_type"], "does not apply", "install the version that")
    old_layout(base, rope)
    assert torch.equal(rows_of(load(adapter, base)), right)


@pytest.mark.parametrize(("name", "rope"), [("Phi3", LONG), ("Gemma3Text", GEMMA)])
def test_kinds_with_formulas_of_their_own_load(name, rope, subject_dirs):
    more = {"head_dim": 16, "layer_types": list(GEMMA)} if name == "Gemma3Text" else {}
    adapter, base = subject_dirs(rope, name, **more)
    assert rows_of(load(adapter, base)).shape[0] == IDS.shape[1]
