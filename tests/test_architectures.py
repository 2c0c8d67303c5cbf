"""Any causal LM: tiny random models of many architectures, from saved folders to rows."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders.subjects import N_TERMS
from builders.tolerance import assert_same_up_to_rounding
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lorascope.errors import AdapterError
from lorascope.subject.adapter import WEIGHTS, inspect_adapter, ranks_by_projection
from lorascope.subject.base import find_base
from lorascope.subject.inventory import inventory
from lorascope.subject.load import Subject, load_subject
from lorascope.subject.unembedding import Unembedding, residual_writes

CPU = torch.device("cpu")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
N_EXPERT_PLACES = 4  # gate_up_proj and down_proj of two layers


@dataclass(frozen=True)
class Case:
    """An architecture, what LoRA is put on, and the projections that its sites are to have."""

    name: str
    config: dict[str, Any]
    targets: list[str]
    projections: list[str]
    lora: dict[str, Any]


def case(name: str, targets: list[str], *, config=None, projections=None, **lora: Any) -> Case:
    return Case(name, {**SIZES, **(config or {})}, targets, projections or targets, lora)


CASES = [
    case("Llama", LLAMA, r=1),
    case("Qwen2", LLAMA, r=1, use_rslora=True),
    case("Qwen3", LLAMA, r=2, config={"head_dim": 8}),
    case("Mistral", LLAMA, r=4, rank_pattern={"q_proj": 1, "0.mlp.up_proj": 2}),
    case("Gemma2", LLAMA, r=1, config={"head_dim": 4}),
    case("Gemma3", LLAMA, r=1, config={"head_dim": 4}),
    case("Phi3", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], r=2),
    case(
        "GPT2",
        ["c_attn", "c_proj", "c_fc"],
        projections=["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"],
        config={"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
        r=2,
        fan_in_fan_out=True,
    ),
    case(
        "GPTNeoX",
        ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
        r=1,
        alpha_pattern={"dense": 4},
    ),
    case("Olmo2", [*LLAMA, "lm_head"], r=1, layers_to_transform=[1]),
    case("Mamba", ["in_proj", "x_proj"], config={"state_size": 4}, r=1),
    case("xLSTM", ["q", "k", "v"], config={"num_heads": 4, "qk_dim_factor": 1.0}, r=1),
    case("Qwen3Moe", ["q_proj", "o_proj"], config=EXPERTS, r=2),
    case(
        "Qwen2Moe",
        ["v_proj", "shared_expert.up_proj"],
        projections=["v_proj", "up_proj"],
        config={**EXPERTS, "shared_expert_intermediate_size": 16},
        r=1,
    ),
]


def save_subject(made: Case, folder: Path, **lora: Any) -> tuple[Path, Path]:
    """Save a random model of a case with a random adapter; return both folders."""
    torch.manual_seed(0)
    suffix = "TextConfig" if made.name == "Gemma3" else "Config"
    config = getattr(transformers, made.name + suffix)(**made.config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "base")
    options = {"lora_alpha": 16, "lora_dropout": 0.5, **made.lora, **lora}
    lora_config = LoraConfig(
        target_modules=made.targets, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    adapted = get_peft_model(model, lora_config)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter"


def load(base_dir: Path, adapter_dir: Path, **options: Any) -> Subject:
    adapter = inspect_adapter(str(adapter_dir))
    base = find_base(adapter, str(base_dir))
    return load_subject(adapter, base, None, CPU, "auto", **options)


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Subject]:
    """Return a function that makes and loads the subject of a case, once."""
    made: dict[str, Subject] = {}

    def subject(case: Case) -> Subject:
        if case.name not in made:
            folder = tmp_path_factory.mktemp(case.name)
            made[case.name] = load(*save_subject(case, folder), gauge="raw")
        return made[case.name]

    return subject


@torch.inference_mode()
def run(subject: Subject, ids: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """Run a batch; return by site the input `x`, `base(x)`, `h` and the module's output."""
    seen: dict[str, dict[str, torch.Tensor]] = {site.module: {} for site in subject.layout.sites}
    handles = []
    for site, read in zip(subject.layout.sites, subject.sites, strict=True):
        layer = subject.causal.get_submodule(site.module)

        def keep(_module, args, out, values=seen[site.module], key=""):
            values[key] = out
            if key == "out":
                values["x"] = args[0]

        for key, module in {"h": read, "base": layer.base_layer, "out": layer}.items():
            handles.append(
                module.register_forward_hook(
                    lambda m, a, o, keep=keep, key=key: keep(m, a, o, key=key)
                )
            )
    subject.backbone(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("made", CASES, ids=lambda made: made.name)
def test_rows_are_a_times_x_and_the_output_is_base_plus_scale_b_a_x(made, subject_of):
    # pitfalls 23, 24, B5, B6, B49: scale from the live module; every architecture; no dropout
    subject = subject_of(made)
    tensors = load_file(subject.adapter.path / WEIGHTS)
    seen = run(subject, ids_of(2, 9))
    assert {site.projection for site in subject.layout.sites} == set(made.projections)
    assert len({(s.layer, s.projection) for s in subject.layout.sites}) == len(seen)
    for site in subject.layout.sites:
        values = seen[site.module]
        a = tensors[f"base_model.model.{site.module}.lora_A.weight"]
        b = tensors[f"base_model.model.{site.module}.lora_B.weight"]
        h = values["x"].double() @ a.double().T
        d_x = values["x"].shape[-1]
        assert_same_up_to_rounding(
            values["h"], h, n_terms=d_x, scale=float((values["x"].abs() @ a.abs().T).max())
        )
        expected = values["base"].double() + site.scale * h @ b.double().T
        assert_same_up_to_rounding(values["out"], expected, n_terms=d_x + site.rank)
        assert site.rank == a.shape[0] == len(site.b_norms)
        assert site.b_norms == pytest.approx(b.double().norm(dim=0).tolist(), rel=1e-6)


@pytest.mark.parametrize("made", CASES, ids=lambda made: made.name)
def test_files_alone_tell_the_same_sites_as_the_live_model(made, subject_of):
    # pitfall 24: rank_pattern, alpha_pattern and rsLoRA are matched as PEFT matches them
    subject = subject_of(made)
    told = {pair.module: pair for pair in inventory(subject.adapter).sites}
    for site in subject.layout.sites:
        pair = told.pop(site.module)
        assert (pair.layer, pair.projection, pair.rank) == (site.layer, site.projection, site.rank)
        assert pair.scale == pytest.approx(site.scale)
        layer = subject.causal.get_submodule(site.module)
        delta = layer.get_delta_weight("default").double().norm().item()
        assert pair.effect == pytest.approx(delta, rel=1e-5)
        assert (pair.d_x, pair.d_y) == (layer.in_features, layer.out_features)
    assert told == {}
    ranks = ranks_by_projection(subject.adapter)
    assert tuple(ranks) == subject.layout.adapter_types
    assert sum(ranks.values()) == subject.layout.d_in


@pytest.mark.parametrize("made", CASES, ids=lambda made: made.name)
def test_a_document_has_the_same_rows_alone_and_in_a_right_padded_batch(made, subject_of):
    # pitfall 3, B17: GPT-2 has learned absolute positions, the others rotate
    subject = subject_of(made)
    ids = ids_of(3, 12)
    lengths = [12, 7, 1]
    for i, length in enumerate(lengths):
        ids[i, length:] = 0
    padded = run(subject, ids)
    for i, length in enumerate(lengths):
        alone = run(subject, ids[i : i + 1, :length])
        for site in subject.layout.sites:
            h = padded[site.module]["h"].reshape(3, 12, site.rank)
            largest = float(h.abs().max())
            expected = alone[site.module]["h"].reshape(length, site.rank)
            assert_same_up_to_rounding(h[i, :length], expected, n_terms=N_TERMS, scale=largest)


@pytest.mark.parametrize("made", CASES[-2:], ids=lambda made: made.name)
def test_lora_on_fused_experts_is_refused_by_name_or_left_active_and_unread(made, tmp_path):
    # pitfall 26, B12
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folders = save_subject(made, tmp_path, target_parameters=parameters, lora_dropout=0.0)
    with pytest.raises(AdapterError) as caught:
        load(*folders)
    message = str(caught.value)
    assert "model.layers.0.mlp.experts.gate_up_proj" in message
    assert "--skip-unhookable" in message
    assert "\n" not in message
    subject = load(*folders, skip_unhookable=True)
    assert len(subject.unhooked) == N_EXPERT_PLACES
    assert "model.layers.1.mlp.experts.down_proj" in subject.unhooked
    assert {site.projection for site in subject.layout.sites} == set(made.projections)
    assert len(inventory(subject.adapter).unreadable) == N_EXPERT_PLACES
    ids = ids_of(1, 5)
    with torch.inference_mode():
        changed = subject.model(input_ids=ids).logits
        for tensor in subject.model.state_dict().items():
            if ".experts." in tensor[0] and "lora_B" in tensor[0]:
                tensor[1].zero_()
        without = subject.model(input_ids=ids).logits
    assert not torch.allclose(changed, without)  # they were active


@pytest.mark.parametrize("version", ["0.18.1", ""])
def test_fused_experts_of_peft_before_0_19_are_read_in_their_own_layout(version, tmp_path):
    # The widths of gate_up_proj are equal here, so shapes do not tell the layouts apart.
    made = next(made for made in CASES if made.name == "Qwen3Moe")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    base, folder = save_subject(made, tmp_path, target_parameters=parameters, lora_dropout=0.0)
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    expected: dict[str, torch.Tensor] = {}
    for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
        is_up = "base_layer" in name  # PEFT wraps the parameters one in the other
        d_1, d_2 = (16, 16) if is_up else (16, 8)
        a = torch.randn(4 * 2, d_1, generator=generator)
        b = torch.randn(d_2, 2 * 4, generator=generator)
        tensors[name], tensors[name.replace("lora_A", "lora_B")] = a, b
        delta = torch.einsum("ore,eri->eio", b.reshape(d_2, 2, 4), a.reshape(4, 2, d_1))
        expected[name.removesuffix(".lora_A.weight")] = 8 * delta
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))
    if not version:
        with pytest.raises(AdapterError, match=r"fused experts.*add its peft_version"):
            load(base, folder, skip_unhookable=True)
        return
    subject = load(base, folder, skip_unhookable=True)
    assert len(expected) == N_EXPERT_PLACES
    for path, delta in expected.items():
        layer: Any = subject.model.get_submodule(path)
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_lora_on_a_module_whose_weight_is_used_without_calling_it_is_found_by_running_it(tmp_path):
    # pitfall 26: nothing but a forward tells it
    mamba = next(made for made in CASES if made.name == "Mamba")
    made = replace(mamba, targets=[*mamba.targets, "dt_proj"])
    folders = save_subject(made, tmp_path)
    with pytest.raises(AdapterError, match=r"layers\.0\.mixer\.dt_proj: never called"):
        load(*folders)
    subject = load(*folders, skip_unhookable=True)
    assert subject.unhooked == tuple(f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1))
    assert set(subject.layout.adapter_types) == {"in_proj", "x_proj"}


def test_an_adapter_of_separate_experts_is_fused_by_peft_and_its_attention_is_read(tmp_path):
    # pitfall 26: transformers 5 keeps in one tensor what the adapter was trained on one by one
    made = CASES[-2]
    base, adapter = save_subject(made, tmp_path)
    tensors = load_file(adapter / WEIGHTS)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        for expert in range(4):
            place = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}"
            for name, d_x, d_y in [("gate", 16, 8), ("up", 16, 8), ("down", 8, 16)]:
                key = f"{place}.{name}_proj"
                tensors[f"{key}.lora_A.weight"] = torch.randn(2, d_x, generator=generator)
                tensors[f"{key}.lora_B.weight"] = torch.randn(d_y, 2, generator=generator)
    save_file(tensors, adapter / WEIGHTS)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = [*made.targets, "gate_proj", "up_proj", "down_proj"]
    config["lora_dropout"] = 0.0
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"experts\.gate_up_proj.*--skip-unhookable"):
        load(base, adapter)
    subject = load(base, adapter, skip_unhookable=True)
    assert len(subject.unhooked) == N_EXPERT_PLACES
    assert {site.projection for site in subject.layout.sites} == {"q_proj", "o_proj"}
    reasons = dict(inventory(subject.adapter).unreadable)
    assert len(reasons) == 2 * 4 * 3
    assert "routed" in reasons["model.layers.0.mlp.experts.3.up_proj"]


WRITERS = {
    "Gemma2": set(),  # a norm stands between them and the stream
    "Gemma3": set(),
    "Olmo2": set(),
    "GPT2": {"attn.c_proj", "mlp.c_proj"},
    "GPTNeoX": {"dense", "dense_4h_to_h"},
    "Mamba": set(),
    "Qwen3Moe": {"o_proj"},
    "Qwen2Moe": set(),
}


@pytest.mark.parametrize("made", CASES, ids=lambda made: made.name)
def test_the_sites_that_write_to_the_residual_stream_are_told_from_the_others(made, subject_of):
    subject = subject_of(made)
    found = {writer.name for writer in residual_writes(subject, subject.layout)}
    expected = WRITERS.get(made.name, {"o_proj", "down_proj"})
    assert found == {s.name for s in subject.layout.sites if s.projection in expected}


@pytest.mark.parametrize("made", CASES, ids=lambda made: made.name)
@torch.no_grad()
def test_the_read_out_is_the_slope_of_the_real_norm_and_head(made, subject_of):
    """Along directions that leave the norm's divisor as it is."""
    subject = subject_of(made)
    norms = {n: m for n, m in subject.causal.named_modules() if "norm" in n or n.endswith("ln_f")}
    seen = []
    handles = [
        norm.register_forward_hook(lambda m, args, out: seen.append((m, args[0])))
        for norm in norms.values()
        if not list(norm.children())
    ]
    subject.causal(input_ids=ids_of(1, 5), use_cache=False)
    for handle in handles:
        handle.remove()
    norm, stream = seen[-1]  # the last norm that runs is the final one
    x = stream[0, -1].double()
    norm, head = deepcopy(norm).double(), deepcopy(subject.causal.get_output_embeddings()).double()
    head = getattr(head, "base_layer", head)
    read_out = Unembedding(subject)
    v = torch.randn(len(x), generator=torch.Generator().manual_seed(0)).double()
    centred = x - x.mean() if read_out.subtracts_mean else x
    v -= centred * (centred @ v) / (centred @ centred)
    length = centred.square().mean().sqrt()
    v *= 1e-3 * length
    slope = head(norm(x + v)) - head(norm(x - v))
    expected = 2 * read_out.logits(v[None].float())[0].double() / length
    torch.testing.assert_close(slope, expected, rtol=1e-2, atol=1e-2 * float(slope.abs().max()))
