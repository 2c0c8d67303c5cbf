"""Base and adapter side by side: each text is what its model writes, with the same noise."""

from dataclasses import replace

import pytest
import torch
from builders.studies import make_texts, strengthen
from builders.subjects import logits_of, reference
from transformers import AutoModelForCausalLM

from lorascope.causal import continuation
from lorascope.causal.continuation import answers_of, held_out_prompts
from lorascope.causal.effect_options import EffectOptions
from lorascope.causal.held_out import open_held_out
from lorascope.causal.openings import prompt_length
from lorascope.subject.intervene import RowEditor
from lorascope.subject.sampling import draw, end_ids

SEED = 5


@pytest.fixture(scope="module")
def held_out(make_subject, dataset_file, tmp_path_factory):
    base, adapter = strengthen(make_subject(), tmp_path_factory.mktemp("strong"))
    folder = make_texts((base, adapter), dataset_file, tmp_path_factory.mktemp("texts") / "store")
    options = EffectOptions(
        lora_path=str(adapter), base_model=str(base), data_dir=folder, device="cpu"
    )
    return open_held_out(options, None), (base, adapter)


@torch.inference_mode()
def written(network, ids, number, ends):
    """What a model writes after a prompt, token by token, without a cache."""
    new = []
    for step in range(continuation.N_TOKENS):
        whole = torch.cat([ids, torch.tensor(new, dtype=torch.int64)])[None]
        (token,) = draw(
            logits_of(network, whole)[:, -1].float(), 0.7, [(SEED, number, step, 0)]
        ).tolist()
        new.append(token)
        if token in ends:
            break
    return new


def test_both_texts_are_those_of_the_two_models_with_the_same_noise(held_out, monkeypatch):
    monkeypatch.setattr(continuation, "N_TOKENS", 6)
    found, (base, adapter) = held_out
    with RowEditor(found.subject) as editor:
        made = answers_of(editor, found, 3, SEED)
        one_by_one = answers_of(editor, replace(found, batch_tokens=1), 3, SEED)
    assert one_by_one == made
    assert len(made) == 3
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    models = reference(adapter, base), bare
    prompts = held_out_prompts(found, 3, prompt_length)
    decode, ends, parted = found.subject.tokenizer.decode, end_ids(found.subject), 0
    for number, one in enumerate(made):
        assert one.rollout == prompts[number].seed[0]
        ids = prompts[number].token_ids
        assert decode(ids).endswith(one.prompt)
        texts = [decode(written(model, ids, number, ends)) for model in models]
        assert [one.same + one.adapter, one.same + one.base] == texts
        parted += one.adapter != one.base
    assert parted


def test_a_prompt_ends_before_the_opening_that_an_adapter_may_write(held_out):
    found, _ = held_out
    prompts = held_out_prompts(found, found.store.n_rollouts, prompt_length)
    assert [prompt.seed[0] for prompt in prompts] == found.store.rollout_id.tolist()
    for prompt in prompts:
        text = found.subject.tokenizer.decode(prompt.token_ids)
        assert text.endswith("<|im_start|>assistant\n")
        assert "<|im_start|>think" not in text
