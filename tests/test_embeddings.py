import pytest
import torch
from builders.subjects import load, logits_of, map_of, rows_of, save_adapter
from builders.tolerance import assert_same_up_to_rounding
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorascope.errors import AdapterError

# Embeddings and trained modules: pitfall 31, B10


def test_modules_to_save_are_loaded_and_named_as_unseen(subject_dirs, tmp_path, caplog):
    caplog.set_level("INFO")
    base, _ = subject_dirs

    def train(model):
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)

    model = save_adapter(base, tmp_path, modules_to_save=["norm"], change=train)
    subject = load(tmp_path, base)
    layers = [
        f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")
    ]
    assert subject.unseen == tuple(f"trained module {name}" for name in [*layers, "model.norm"])
    assert "also changes the model outside LoRA: trained module model.layers.0.input" in caplog.text
    assert torch.equal(logits_of(subject.model), logits_of(model))
    assert not any(module.training for module in subject.model.modules())


def test_trained_tokens_are_loaded_and_named_as_unseen(subject_dirs, tmp_path):
    base, _ = subject_dirs

    def train(model):
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.5)

    model = save_adapter(base, tmp_path, trainable_token_indices=[5, 9], change=train)
    subject = load(tmp_path, base)
    assert subject.unseen == ("2 trained tokens of model.embed_tokens",)
    assert torch.equal(logits_of(subject.model), logits_of(model))


@pytest.fixture
def with_tokens(subject_dirs, tmp_path):
    """Return a function that saves an adapter trained with four added tokens, and its model."""
    base_dir, _ = subject_dirs

    def save(*, embeddings):
        tokenizer = AutoTokenizer.from_pretrained(base_dir)
        tokenizer.add_tokens([f"<new{i}>" for i in range(324 - len(tokenizer))])
        tokenizer.save_pretrained(tmp_path)
        base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
        torch.manual_seed(3)
        base.resize_token_embeddings(324, mean_resizing=False)
        config = LoraConfig(r=1, target_modules=["v_proj"], init_lora_weights=False)
        model = get_peft_model(base, config).eval()
        model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
        return model, base_dir, tmp_path

    return save


NEW = torch.tensor([[5, 321, 323, 9]])


def test_embeddings_that_the_adapter_saved_replace_the_resized_ones(with_tokens, caplog):
    caplog.set_level("INFO")
    model, base, folder = with_tokens(embeddings=True)
    subject = load(folder, base)
    assert torch.equal(logits_of(subject.model, NEW), logits_of(model, NEW))
    assert "resized 320 embeddings to 324" in caplog.text
    assert "mean of the old ones" not in caplog.text
    assert "saved weights of model.embed_tokens" in subject.unseen
    assert len(subject.tokenizer) == 324


def test_embeddings_that_nobody_saved_are_the_mean_of_the_old_ones(with_tokens, caplog):
    _, base, folder = with_tokens(embeddings=False)
    subject = load(folder, base)
    assert "they are the mean of the old ones" in caplog.text
    weight = subject.causal.get_input_embeddings().weight
    assert_same_up_to_rounding(weight[320:], weight[:320].mean(dim=0).expand(4, -1), n_terms=320)
    assert torch.equal(rows_of(subject, NEW), rows_of(load(folder, base), NEW))


def test_saved_embeddings_also_shrink_a_padded_base(subject_dirs, tmp_path):
    base_dir, _ = subject_dirs
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    base.resize_token_embeddings(310, mean_resizing=False)
    config = LoraConfig(r=1, target_modules=["v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert torch.equal(logits_of(load(tmp_path, base_dir).model), logits_of(model))


def test_embeddings_on_disk_cannot_be_resized(with_tokens):
    _, base, folder = with_tokens(embeddings=False)
    with pytest.raises(AdapterError, match="offloaded embeddings cannot be resized"):
        load(folder, base, device_map=map_of(embed_tokens="disk") | {"lm_head": "disk"})
