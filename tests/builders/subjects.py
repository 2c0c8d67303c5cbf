"""Load subjects from folders, read them by means of the tests' own, and break them."""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorascope.activations.capture import Capture
from lorascope.errors import AdapterError
from lorascope.subject.adapter import CONFIG, inspect_adapter
from lorascope.subject.adapter_files import WEIGHTS
from lorascope.subject.base import find_base
from lorascope.subject.hooks import RowReader
from lorascope.subject.load import Subject, load_subject, load_tokenizer
from lorascope.texts.rollouts import Rollout

CPU = torch.device("cpu")
# Added up on the way through a tiny subject: some 250 terms in each of its two layers, whose
# random weights make what is lost by rounding larger.
N_TERMS = 1000
IDS = torch.tensor([[5, 9, 200, 31, 7, 64]])


def load(
    adapter_dir: Path | str, base_dir: Path | None, dtype: str = "auto", **options: Any
) -> Subject:
    """Load a subject from its folders."""
    adapter = inspect_adapter(str(adapter_dir))
    base = find_base(adapter, str(base_dir) if base_dir else None)
    return load_subject(adapter, base, load_tokenizer(adapter, base), CPU, dtype, **options)


@torch.inference_mode()
def rows_of(subject: Subject, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Run the subject and return its rows, `(tokens, d_in)`, read by hooks of this test's own."""
    read = {}
    handles = [
        module.register_forward_hook(lambda m, a, h: read.update({m: h.reshape(-1, h.shape[-1])}))
        for module in subject.sites
    ]
    subject.backbone(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    mixes = zip(subject.sites, subject.mixes, strict=True)
    return torch.cat([read[m] if mix is None else read[m] @ mix.T for m, mix in mixes], dim=1)


def capture_of(reader: RowReader, **given: Any) -> Capture:
    """Make a capture of every column in float32."""
    options = {"store_dtype": "float32", "batch_tokens": 64, "longest": None, **given}
    return Capture(reader, np.arange(reader.subject.layout.d_in), **options)


def captured(
    subject: Subject, rollouts: Sequence[Rollout], *, own_forward: bool = True, **given: Any
) -> np.ndarray:
    """Return the rows of rollouts as `generate` captures them."""
    with RowReader(subject, own_forward=own_forward) as reader:
        capture = capture_of(reader, **given)
        return capture.finish(capture.run(rollouts))


@torch.inference_mode()
def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Run a model to its logits."""
    return model(input_ids=ids, use_cache=False).logits


def reference(adapter_dir: Path, base_dir: Path) -> PeftModel:
    """Load as a user of PEFT would."""
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(adapter_dir)).eval()


def refused(adapter_dir: Path | str, base: Path | None, *words: str) -> str:
    """Check that loading is refused in one line with these words, and return the line."""
    with pytest.raises(AdapterError) as caught:
        load(adapter_dir, base)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def save_rotary(tokenizer_dir: Path, folder: Path, name: str = "Llama", **config: Any) -> Path:
    """Save a tiny random base with these rotary settings and a tokenizer; return its folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = {**sizes, **heads, **ends, "initializer_range": 0.3, **config}
    given = getattr(transformers, f"{name}Config")(**config)
    AutoModelForCausalLM.from_config(given).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return folder


def save_adapter(
    base_dir: Path,
    folder: Path,
    *,
    change: Callable[[PeftModel], None] | None = None,
    name: str = "default",
    **lora: Any,
) -> PeftModel:
    """Put a random adapter on a base, let `change` alter the model, and save it as PEFT does."""
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    options = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **lora}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options), name)
        if change:
            with torch.no_grad():
                change(model)
        model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def change_adapter(
    subject_dirs: tuple[Path, Path],
    folder: Path,
    tensors: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    **config: Any,
) -> tuple[Path, Path]:
    """Copy an adapter, change its tensors and its config, and return both folders."""
    base, adapter = subject_dirs
    copy = folder / "adapter"
    shutil.copytree(adapter, copy, dirs_exist_ok=True)
    shutil.copytree(base, folder / "base", dirs_exist_ok=True)
    if tensors is not None:
        save_file(tensors(load_file(copy / WEIGHTS)), copy / WEIGHTS)
    if config:
        data = json.loads((copy / CONFIG).read_text())
        (copy / CONFIG).write_text(json.dumps({**data, **config}))
    return copy, base


def map_of(**places: str) -> dict[str, str]:
    """Return a device map of the two-layer base, all on the CPU but for the given places."""
    parts = ["embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb"]
    return {"lm_head": "cpu", **{f"model.{part}": places.get(part, "cpu") for part in parts}}


def save_gguf(base: Path, file: Path, quantization: Any = None) -> Path:
    """Write the tiny base as one GGUF file, named as llama.cpp names its parts."""
    import gguf

    config = json.loads((base / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(base)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    tokens += [f"[unused{i}]" for i in range(len(tokens), config["vocab_size"])]
    special = set(tokenizer.all_special_tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in special else normal for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for name, tensor in load_file(base / "model.safetensors").items():
        values = tensor.float().numpy()
        kind = quantization if values.ndim == 2 else None
        values = values if kind is None else gguf.quantize(values, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
