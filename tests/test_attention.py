"""Where attention heads look: the weights are those of two separate models."""

import numpy as np
import pytest
import torch
from builders.studies import make_texts
from builders.subjects import N_TERMS, change_adapter, reference
from builders.tolerance import rounding
from transformers import AutoModelForCausalLM

from lorascope.causal import attention
from lorascope.causal.attention import attention_of
from lorascope.causal.effect_options import EffectOptions
from lorascope.causal.held_out import HeldOut, open_held_out
from lorascope.subject.intervene import RowEditor

# Of a share of attention, whose scores pass through every layer before.
ROUNDED = rounding(N_TERMS)


@pytest.fixture(scope="module")
def held_out(make_subject, dataset_file, tmp_path_factory):
    dirs = scaled(make_subject(), tmp_path_factory.mktemp("weak"), 0.05)
    return opened(dirs, dataset_file, tmp_path_factory.mktemp("texts") / "store"), dirs


def scaled(dirs, folder, factor):
    """Copy a subject, with every B times a factor."""

    def scale(tensors):
        return {
            name: tensor * (factor if "lora_B" in name else 1) for name, tensor in tensors.items()
        }

    return change_adapter(dirs, folder, scale)[::-1]


def opened(dirs, dataset_file, folder) -> HeldOut:
    base, adapter = dirs
    store = make_texts(dirs, dataset_file, folder)
    options = EffectOptions(
        lora_path=str(adapter), base_model=str(base), data_dir=store, device="cpu"
    )
    return open_held_out(options, None)


def measured(found: HeldOut):
    with RowEditor(found.subject) as editor:
        return attention_of(editor, found)


@torch.inference_mode()
def weights(model, ids):
    """The attention of a model that never saw lorascope: `(layer, head, seq, seq)`."""
    model.set_attn_implementation("eager")
    out = model(ids[None], output_attentions=True, use_cache=False)
    return torch.stack([layer[0].double() for layer in out.attentions])


def test_moved_attention_is_that_between_two_separate_models(held_out, monkeypatch):
    found, (base, adapter) = held_out
    monkeypatch.setattr(attention, "N_ROLLOUTS", 3)
    monkeypatch.setattr(attention, "N_TOKENS", 20)
    made = measured(found)
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    adapted = reference(adapter, base).base_model.model
    store, sums, n, by_token = found.store, 0.0, 0, {}
    for index in found.rollouts[:3].tolist():
        first, last = store.rollout_start[index : index + 2].tolist()
        rows = np.arange(first, min(last, first + 20))
        ids = torch.from_numpy(store.token_ids[rows].astype(np.int64))
        moved = (weights(adapted, ids) - weights(bare, ids)).abs().sum(-1) / 2
        sums, n = sums + moved.sum(-1), n + len(rows) - 1
        by_token[int(store.rollout_id[index])] = moved
    expected = sums / n
    assert made.n_tokens == n
    assert torch.tensor(made.moved).double() == pytest.approx(expected, abs=ROUNDED)
    assert float(expected.max()) > 100 * ROUNDED, "the adapter moves attention"
    top = made.heads[0]
    assert top.moved == pytest.approx(float(expected.max()), abs=ROUNDED)
    example = top.example
    there = by_token[example.rollout][top.layer, top.head]
    assert float(there[example.position]) == pytest.approx(float(there.max()), abs=ROUNDED)
    assert all(one.adapter > one.base for one in example.gains)
    assert all(one.adapter < one.base for one in example.losses)
    assert [head.moved for head in made.heads] == sorted(
        (head.moved for head in made.heads), reverse=True
    )


def test_the_model_is_left_as_it_was(held_out):
    found, _ = held_out
    causal = found.subject.causal
    before = causal.config._attn_implementation
    hooks = sum(len(module._forward_hooks) for module in causal.modules())
    measured(found)
    assert causal.config._attn_implementation == before
    assert sum(len(module._forward_hooks) for module in causal.modules()) == hooks


def test_an_adapter_that_writes_nothing_moves_nothing(make_subject, dataset_file, tmp_path):
    dirs = scaled(make_subject(), tmp_path, 0.0)
    made = measured(opened(dirs, dataset_file, tmp_path / "store"))
    assert not np.any(made.moved)
    assert made.heads == ()


def test_a_model_without_eager_attention_has_none(held_out, monkeypatch):
    found, _ = held_out

    def refuse(_name):
        raise ValueError("no eager attention")

    monkeypatch.setattr(found.subject.causal, "set_attn_implementation", refuse)
    assert measured(found) is None


def test_a_layer_whose_attention_is_nested_counts_once():
    """The inner and the outer module give the same weights, as in GPT-Neo."""
    base, own = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    weights = torch.stack([base, own])[:, None]
    heads = attention._Heads()
    for rollout in range(2):
        heads.begin(rollout)
        heads.add(0, weights)
        heads.add(0, weights)
    assert heads.sums[0][0].tolist() == [1.5]
