"""Models that also see images are studied as text models; other kinds are refused by name."""

import json
import warnings

import pytest
import torch
import transformers
from builders.subjects import CPU, IDS, N_TERMS, captured, rows_of
from builders.tolerance import assert_same_up_to_rounding
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from lorascope.activations.generate import GenerateConfig
from lorascope.activations.generate import run as generate
from lorascope.activations.store import ActivationStore
from lorascope.errors import AdapterError
from lorascope.subject.adapter import CONFIG, WEIGHTS, inspect_adapter, other_purpose
from lorascope.subject.base import find_base
from lorascope.subject.inventory import describe
from lorascope.subject.load import load_subject, load_tokenizer
from lorascope.subject.sampling import sample_rollouts
from lorascope.subject.unembedding import Unembedding
from lorascope.texts.rollouts import Rollout

TEXT = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 8, "intermediate_size": 32}
SEEING = {
    "Qwen2VL": {
        "text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0]}},
        "vision_config": {**QWEN, "embed_dim": 16},
    },
    "Qwen2_5_VL": {
        "text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0]}},
        "vision_config": {**QWEN, "out_hidden_size": 16},
    },
    "Qwen3VL": {
        "text_config": {"head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
        "vision_config": {
            **QWEN, "out_hidden_size": 16, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "Mistral3": {
        "text_config": {"model_type": "mistral", "head_dim": 4},
        "vision_config": {"model_type": "pixtral"},
    },
    "Llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model"},
        "image_token_index": 319,
    },
    "SmolVLM": {"text_config": {"model_type": "llama"}, "image_token_id": 319, "pad_token_id": 0},
    "Gemma3": {
        "text_config": {"head_dim": 4}, "mm_tokens_per_image": 4, "image_token_index": 319,
    },
}  # fmt: skip
PALIGEMMA = {
    "text_config": {"model_type": "gemma", "head_dim": 4},
    "vision_config": {"model_type": "siglip_vision_model", "projection_dim": 16},
    "projection_dim": 16, "hidden_size": 16, "image_token_index": 319,
}  # fmt: skip


@pytest.fixture
def seeing(tmp_path, tokenizer_dir):
    """Return a function that saves a tiny model with eyes and an adapter on its text model."""

    def make(name, given, targets=r".*(language|text)_model.*(q_proj|up_proj)"):
        if not hasattr(transformers, f"{name}Config"):
            pytest.skip(f"this transformers has no {name}")
        torch.manual_seed(0)
        text = {**TEXT, **given["text_config"]}
        vision = {**VISION, **given.get("vision_config", {})}
        config = {**given, "text_config": text, "vision_config": vision}
        model = transformers.AutoModelForImageTextToText.from_config(
            getattr(transformers, f"{name}Config")(**config)
        )
        model.save_pretrained(tmp_path / "base")
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "base")
        lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, lora)
            adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter", tmp_path / "base", adapted.eval()

    return make


def load(adapter_dir, base_dir, **options):
    adapter = inspect_adapter(str(adapter_dir))
    base = find_base(adapter, str(base_dir))
    tokenizer = load_tokenizer(adapter, base)
    return load_subject(adapter, base, tokenizer, CPU, "auto", gauge="raw", **options)


@pytest.mark.parametrize("name", SEEING)
def test_the_text_model_of_a_model_that_sees_images_is_studied_alone(name, seeing):
    adapter_dir, base, adapted = seeing(name, SEEING[name])
    subject = load(adapter_dir, base)
    assert (subject.layout.d_in, subject.max_length) == (8, 64)
    text = next(
        module
        for path, module in adapted.named_modules()
        if path.endswith(("model.language_model", "model.text_model"))
    )
    seen = {}
    for path, module in text.named_modules():
        if path.endswith("lora_A.default"):
            module.register_forward_hook(lambda _m, _a, h, path=path: seen.update({path: h[0]}))
    with torch.inference_mode():
        text(input_ids=IDS, use_cache=False)
    sites = [site.module.partition("_model.")[2] for site in subject.layout.sites]
    expected = torch.cat([seen[f"{site}.lora_A.default"] for site in sites], dim=1)
    assert_same_up_to_rounding(rows_of(subject), expected, n_terms=N_TERMS)
    texts = [
        Rollout(i, IDS[0, :n].numpy().astype("int32"), torch.ones(n, dtype=torch.uint8).numpy())
        for i, n in enumerate((6, 3, 5))
    ]
    rows = captured(subject, texts)
    assert_same_up_to_rounding(
        rows, torch.cat([expected[:n] for n in (6, 3, 5)]).numpy(), n_terms=N_TERMS
    )
    written = sample_rollouts(subject, texts, max_new_tokens=4, temperature=0.0, seed=(0,))
    with torch.inference_mode():
        logits = adapted(input_ids=torch.from_numpy(written[1].token_ids[None]).long()).logits[0]
    n = len(written[1].token_ids)
    assert written[1].token_ids[3:].tolist() == logits[2 : n - 1].argmax(-1).tolist()


def test_an_adapter_of_the_text_model_alone_is_read_on_the_model_that_sees_images(seeing, caplog):
    caplog.set_level("INFO")
    adapter_dir, base, _ = seeing("Llava", SEEING["Llava"])
    rows = rows_of(load(adapter_dir, base))
    tensors = load_file(adapter_dir / WEIGHTS)
    renamed = {name.replace("model.language_model.", "model."): t for name, t in tensors.items()}
    save_file(renamed, adapter_dir / WEIGHTS)
    config = json.loads((adapter_dir / CONFIG).read_text())
    (adapter_dir / CONFIG).write_text(
        json.dumps({**config, "target_modules": ["q_proj", "up_proj"]})
    )
    assert (rows_of(load(adapter_dir, base)) == rows).all()
    assert "was trained on model.layers: read as model.language_model.layers" in caplog.text


@pytest.mark.parametrize("name", ["Gemma3", "Qwen2_5_VL"])
def test_the_final_norm_is_found_wherever_it_is(name, seeing):
    subject = load(*seeing(name, SEEING[name])[:2])
    norm = subject.causal.model.language_model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.arange(16) / 8)
    gain = 1 + norm.weight if name == "Gemma3" else norm.weight
    torch.testing.assert_close(Unembedding(subject).gain, gain.detach(), rtol=1e-4, atol=1e-5)


def test_generate_reads_texts_with_a_model_that_sees_images(seeing, tmp_path, dataset_file):
    adapter_dir, base, _ = seeing("Qwen2_5_VL", SEEING["Qwen2_5_VL"])
    store = generate(
        GenerateConfig(
            lora_path=str(adapter_dir), base_model=str(base), dataset=str(dataset_file),
            num_examples=3, output=tmp_path / "store", device="cpu",
        )
    )  # fmt: skip
    assert ActivationStore.open(store).d_in == 8


def test_lora_on_what_text_does_not_reach_is_named(seeing):
    adapter_dir, base, _ = seeing("Llava", SEEING["Llava"], ["q_proj"])
    with pytest.raises(AdapterError, match=r"model\.vision_tower\..*q_proj: never called"):
        load(adapter_dir, base)
    assert load(adapter_dir, base, skip_unhookable=True).layout.d_in == 4


def test_a_model_whose_tokens_see_later_ones_is_refused(seeing):
    adapter_dir, base, _ = seeing("PaliGemma", PALIGEMMA)
    with pytest.raises(AdapterError, match="change with later tokens .* no causal language model"):
        load(adapter_dir, base)


OTHERS = {
    "Roberta": "an encoder",
    "Bert": "an encoder",
    "XLMRoberta": "an encoder",
    "ModernBert": "an encoder",
    "T5": "a sequence-to-sequence model",
    "Bart": "a sequence-to-sequence model",
    "Whisper": "a sequence-to-sequence model",
    "Wav2Vec2": "a wav2vec2",
    "CLIP": "a clip",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_base_of_another_kind_is_refused_before_it_is_loaded(name, subject_dirs, tmp_path):
    getattr(transformers, f"{name}Config")(architectures=["Made"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=rf"is {OTHERS[name]} \(Made\); lorascope studies caus"):
        find_base(inspect_adapter(str(subject_dirs[1])), str(tmp_path))


def test_a_decoder_of_a_family_of_encoders_is_a_causal_model(subject_dirs, tmp_path):
    transformers.RobertaConfig(is_decoder=True).save_pretrained(tmp_path)
    base = find_base(inspect_adapter(str(subject_dirs[1])), str(tmp_path))
    assert base.model_class() is transformers.AutoModelForCausalLM


@pytest.mark.parametrize(
    ("modules", "config", "purpose"),
    [
        (["model.layers.0.self_attn.q_proj"], {"task_type": "CAUSAL_LM"}, None),
        (["model.decoder.layers.0.self_attn.q_proj"], {}, None),  # OPT
        (["model.vision_tower.encoder.layers.0.q_proj"], {}, None),
        (["model.layers.0.q_proj"], {"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        (["model.layers.0.q_proj"], {"task_type": "TOKEN_CLS"}, "TOKEN_CLS"),
        (["roberta.encoder.layer.0.attention.self.query"], {}, "an encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"],
         {}, "a sequence-to-sequence model"),
        (["model.encoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.self_attn.q_proj"],
         {"auto_mapping": {"base_model_class": "WhisperForConditionalGeneration"}}, "sequence-to"),
        (["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"], {}, "diffusion"),
        (["model.layers.0.q_proj"], {"auto_mapping": {"base_model_class": "Qwen2Model"}}, None),
    ],
)  # fmt: skip
def test_info_and_generate_say_from_the_adapter_alone_what_cannot_be_studied(
    modules, config, purpose, tmp_path
):
    zeros = torch.zeros(1, 4).numpy()
    tensors = {f"base_model.model.{m}.lora_A.weight": zeros for m in modules}
    tensors |= {f"base_model.model.{m}.lora_B.weight": zeros.T.copy() for m in modules}
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, **config}))
    adapter = inspect_adapter(str(tmp_path))
    if purpose is None:
        assert other_purpose(adapter) is None
        return
    assert "generate does not support this adapter: it was made for" in describe(adapter)
    assert purpose in describe(adapter)
    with pytest.raises(AdapterError, match=rf"made for .*{purpose}.*; lorascope studies causal"):
        find_base(adapter, "no/such-base")  # which is not asked for
