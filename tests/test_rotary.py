"""Rotary positions: the frequencies that a config states, and those that follow a text's length."""

import json
import shutil

import numpy as np
import pytest
import torch
from builders.subjects import (
    IDS,
    N_TERMS,
    capture_of,
    captured,
    load,
    logits_of,
    refused,
    rows_of,
    save_adapter,
    save_rotary,
)
from builders.tolerance import assert_same_up_to_rounding
from transformers import AutoModelForCausalLM

from lorascope.causal.continuation import Opening, continue_prompts
from lorascope.errors import NumberError
from lorascope.subject.hooks import RowReader
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject
from lorascope.subject.sampling import sample_rollouts
from lorascope.texts.roles import ROLES
from lorascope.texts.rollouts import Rollout

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


LENGTHS = {
    "longrope": (LONG, "Phi3", {"original_max_position_embeddings": 64}),
    "dynamic": (DYNAMIC, "Llama", {"max_position_embeddings": 64}),
}


def texts(lengths):
    drawn = np.random.default_rng(0).integers(3, 320, max(lengths)).astype(np.int32)
    user = ROLES.index("user")
    return [Rollout(i, drawn[:n], np.full(n, user, np.uint8)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("kind", LENGTHS)
def test_rows_do_not_depend_on_neighbours_where_frequencies_follow_the_length(kind, subject_dirs):
    rope, name, more = LENGTHS[kind]
    adapter, base = subject_dirs(rope, name, **more)
    rollouts = texts([63, 64, 66, 30, 65, 66, 177, 221])
    alone = {
        n: rows_of(load(adapter, base), torch.from_numpy(rollouts[-1].token_ids[None, :n]).long())
        for n in (30, 63, 64, 65, 66, 177, 221)
    }
    assert (alone[66][:63] - alone[63]).norm() > 0.1 * alone[63].norm()
    subject = load(adapter, base)
    for batch_tokens in (1, 4096):
        rows = captured(subject, rollouts, batch_tokens=batch_tokens)
        expected = np.concatenate([alone[len(one.token_ids)] for one in rollouts])
        assert_same_up_to_rounding(rows, expected, n_terms=N_TERMS)


@pytest.mark.parametrize("kind", LENGTHS)
def test_each_written_token_is_that_of_one_pass_over_the_text_before_it(
    kind, subject_dirs, monkeypatch
):
    monkeypatch.setattr(Subject, "max_length", 512)
    rope, name, more = LENGTHS[kind]
    subject = load(*subject_dirs(rope, name, **{**more, "eos_token_id": None}))
    prompts = texts([60, 50, 63, 66])
    given = {"max_new_tokens": 8, "temperature": 0.0}
    written = sample_rollouts(subject, prompts, seed=(0,), **given)
    with RowEditor(subject) as editor:
        ids = torch.from_numpy(prompts[0].token_ids).long()
        prompt = Opening(ids, torch.ones(60, dtype=torch.bool))
        (((steered,),),) = continue_prompts(editor, [prompt], [None], **given)
    whole = [text.token_ids.tolist() for text in written]
    whole.append(ids.tolist() + steered.token_ids.tolist())
    for prompt, text in zip([*prompts, prompts[0]], whole, strict=True):
        for n in range(len(prompt.token_ids), len(text)):
            logits = logits_of(subject.model, torch.tensor([text[:n]]))[0, -1]
            assert logits[text[n]] > logits.max() - 1e-4
    assert len(whole[0]) > 64


def test_a_model_whose_rows_depend_on_the_batch_is_refused(subject_dirs):
    subject = load(*subject_dirs(PLAIN))
    subject.causal.model.layers[0].register_forward_pre_hook(
        lambda _m, args: (args[0] + args[0].mean(1, keepdim=True), *args[1:])
    )
    with RowReader(subject) as reader:
        capture_of(reader).check_neighbours(texts([9, 9]))
        with pytest.raises(NumberError, match="text of 5 tokens change by .* next to one of 9"):
            capture_of(reader).check_neighbours(texts([9, 5]))
