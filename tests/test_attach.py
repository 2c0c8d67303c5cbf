import re
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from builders.subjects import (
    change_adapter,
    load,
    logits_of,
    reference,
    refused,
    rows_of,
    save_adapter,
)
from builders.tolerance import assert_same_up_to_rounding
from transformers import AutoModelForCausalLM

from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.attach import fit_prefix
from lorascope.subject.inventory import inventory


@pytest.fixture
def broken(subject_dirs, tmp_path):
    """Return a function that copies the adapter, changes its tensors and config, and names both."""
    return partial(change_adapter, subject_dirs, tmp_path)


# What the files are called and how they are damaged: pitfalls 1, 30, 35, B1, B2, B9


@pytest.mark.parametrize(
    "damage",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: "module." + name,
        lambda name: name.replace("base_model.model.", "base_model.model.module."),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: "base_model.model." + name,
        lambda name: name.replace(".lora_", "_"),
        lambda name: "_orig_mod." + name[17:].replace(".weight", ".x.weight"),
    ],
)
def test_damage_to_the_names_is_repaired_and_said(damage, broken, subject_dirs, caplog):
    # pitfall 1, B2: with the last one three damages meet
    caplog.set_level("INFO")
    adapter_dir, base = broken(tensors=lambda t: {damage(name): v for name, v in t.items()})
    subject = load(adapter_dir, base)
    assert re.search(r"renamed 28 tensors of \S+, such as \S+ to base_model\.model\.", caplog.text)
    assert torch.equal(rows_of(subject), rows_of(load(subject_dirs[1], base)))


@pytest.mark.parametrize(
    ("start", "targets"),
    [
        ("", None),
        ("model.language_model.", r"(?!vision).*layers\.\d+\..*_proj"),
        ("language_model.model.", None),
    ],
)
def test_names_that_one_prefix_mends_are_read_and_said(
    start, targets, tmp_path, make_subject, caplog
):
    caplog.set_level("INFO")
    patterns = {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"model.layers.1.mlp.up_proj": 3}}
    dirs = make_subject(r=2, **patterns)
    config = {"alpha_pattern": {f"{start}layers.1.mlp.up_proj": 3}}
    if targets:
        config["target_modules"] = targets
    adapter_dir, base = change_adapter(
        dirs,
        tmp_path,
        lambda t: {name.replace(".model.layers", f".{start}layers"): v for name, v in t.items()},
        **config,
    )
    subject, original = load(adapter_dir, base), load(dirs[1], base)
    assert f"was trained on {start}layers: read as model.layers" in caplog.text
    assert torch.equal(rows_of(subject), rows_of(original))
    assert torch.equal(logits_of(subject.model), logits_of(original.model))
    scales = [{s.name: s.scale for s in one.layout.sites} for one in (subject, original)]
    assert scales[0] == scales[1]


def test_a_prefix_counts_only_if_it_is_the_only_one_and_every_shape_fits(
    make_subject, subject_dirs
):
    adapter = inspect_adapter(str(subject_dirs[1]))
    shapes = {name.replace(".model.layers", ".layers"): s for name, s in adapter.shapes.items()}
    bare = replace(adapter, shapes=shapes)
    model = AutoModelForCausalLM.from_pretrained(subject_dirs[0])
    wider = AutoModelForCausalLM.from_pretrained(make_subject(hidden=32)[0])
    assert fit_prefix(model, adapter) is adapter
    assert fit_prefix(wider, bare) is bare
    two = torch.nn.ModuleDict({"one": model.model, "two": type(model.model)(model.config)})
    assert fit_prefix(two, bare) is bare


def test_a_repair_that_leaves_a_tensor_over_is_no_repair(broken):
    adapter_dir, base = broken(
        tensors=lambda t: {
            **{"module." + name: v for name, v in t.items()},
            "module.base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(1, 16),
        }
    )
    refused(adapter_dir, base, "lacks 28 tensors")


@pytest.mark.parametrize("name", ["lora", "lora_A", "weight", "model"])
def test_an_adapter_saved_under_a_name_that_collides_loads(name, subject_dirs, tmp_path):
    # B2: what the installed PEFT really saves
    base, _ = subject_dirs
    model = save_adapter(base, tmp_path, name=name)
    subject = load(tmp_path, base)
    path = f"base_model.model.{subject.layout.sites[1].module}.lora_A.{name}.weight"
    assert torch.equal(subject.sites[1].get_parameter("weight"), model.get_parameter(path))


def test_keys_that_peft_does_not_know_are_dropped_when_they_say_nothing(broken, caplog):
    # pitfall 30, B9: also the keys of the first PEFT
    caplog.set_level("INFO")
    empty = {"enable_lora": None, "merge_weights": False, "new_list": [], "new_text": ""}
    adapter_dir, base = broken(**empty)
    load(adapter_dir, base)
    assert "ignored enable_lora, merge_weights, new_list, new_text" in caplog.text


def test_keys_that_peft_does_not_know_and_that_say_something_are_refused(broken):
    # pitfall 30: PEFT would go on without them
    adapter_dir, base = broken(use_new_trick=True, new_scale=0.5, peft_version="9.9")
    message = refused(adapter_dir, base, "sets new_scale, use_new_trick", "PEFT 9.9")
    assert peft.__version__ in message
    adapter_dir, base = broken(use_new_trick=None, new_scale=None, eva_config={"new_key": 1})
    load(adapter_dir, base)  # PEFT drops it itself: EVA changes nothing after training
    adapter_dir, base = broken(r="four")
    refused(adapter_dir, base)


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


def test_an_adapter_that_would_be_half_loaded_is_named_so(broken):
    adapter_dir, base = broken(
        tensors=lambda t: {k.replace("layers.1", "blocks.1"): v for k, v in t.items()}
    )
    refused(
        adapter_dir,
        base,
        "only 14 of the 28 tensors that the model needs are in the file",
        "14 of the file match nothing (base_model.model.model.blocks.1",
        "would apply a part of it",
    )


def test_renamed_tensors_are_an_error_not_a_random_adapter(broken):
    adapter_dir, base = broken(
        tensors=lambda t: {
            k.replace(".self_attn.", ".attn.").replace(".mlp.", ".ffn."): v for k, v in t.items()
        }
    )
    refused(adapter_dir, base, "lacks 28 tensors", "wrapper's prefix")


def test_an_adapter_of_another_base_names_the_first_shape(make_subject, subject_dirs):
    _, adapter = subject_dirs
    other_base, _ = make_subject(hidden=32)
    refused(adapter, other_base, "does not belong to base", "in the file", "in the model")
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


# What else an adapter may be: B3 to B7, pitfalls 24 and 26


def test_dora_is_counted_and_recorded_and_its_rows_are_a_times_x(subject_dirs, tmp_path, caplog):
    # pitfall 24, B6
    base, _ = subject_dirs
    model = save_adapter(base, tmp_path, use_dora=True)
    subject = load(tmp_path, base, gauge="raw")
    assert "4 sites" in caplog.text
    assert caplog.text.count("DoRA") == 1
    assert {site.lora_kind for site in subject.layout.sites} == {"dora"}
    assert torch.equal(logits_of(subject.model), logits_of(model))
    inputs, calls = [], []
    for site, read in zip(subject.layout.sites, subject.sites, strict=True):
        layer = subject.causal.get_submodule(site.module)
        layer.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0])))
        read.register_forward_hook(lambda *call: calls.append(call))  # PEFT alone would call twice
    rows = rows_of(subject)
    assert len(calls) == len(inputs) == 4
    x = {module: value[0] for module, value in inputs}
    for i, site in enumerate(subject.layout.sites):
        layer = subject.causal.get_submodule(site.module)
        expected = x[layer] @ layer.lora_A["default"].weight.T
        assert_same_up_to_rounding(rows[:, 2 * i : 2 * i + 2], expected, n_terms=layer.in_features)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_initialisation_that_alters_the_base_loads_as_peft_loads_it(
    init, subject_dirs, tmp_path, caplog
):
    base, _ = subject_dirs

    def train(model):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)

    save_adapter(base, tmp_path, init_lora_weights=init, change=train)
    torch.manual_seed(0)  # pissa_niter draws a start of its own
    expected = logits_of(reference(tmp_path, base))
    before = torch.random.get_rng_state()
    for _ in range(2):
        subject = load(tmp_path, base)
        assert torch.equal(logits_of(subject.model), expected)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert f"initialised with {init}" in caplog.text
    assert "the base that PEFT reconstructs" in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with subject.model.disable_adapter():
        assert not torch.allclose(logits_of(subject.model), logits_of(plain))


@pytest.mark.parametrize("init", ["corda", "loftq"])
def test_an_initialisation_that_peft_cannot_repeat_is_one_line(init, broken):
    adapter_dir, base = broken(init_lora_weights=init, loftq_config={"loftq_bits": 4})
    refused(adapter_dir, base, "eigens" if init == "corda" else "scipy")


def test_block_diagonal_factors_are_read_whole(subject_dirs, tmp_path):
    base, _ = subject_dirs
    blocks = peft.tuners.lora.config.BdLoraConfig(["q_proj"], ["up_proj"], nblocks=2)

    def train(model):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()

    model = save_adapter(base, tmp_path, use_bdlora=blocks, r=4, change=train)
    subject = load(tmp_path, base)
    assert torch.equal(logits_of(subject.model), logits_of(model))
    told = {pair.module: pair for pair in inventory(subject.adapter).sites}
    for site in subject.layout.sites:
        layer = subject.causal.get_submodule(site.module)
        delta = layer.lora_variant["default"]._get_bdlora_delta_weight(layer, "default").double()
        effect = site.scale * torch.tensor(site.b_norms).norm().item()
        assert effect == pytest.approx(delta.norm().item(), rel=1e-5)
        assert told[site.module].effect == pytest.approx(effect, rel=1e-5)
        assert site.lora_kind == "bdlora"


def test_a_bias_of_b_is_loaded_and_named_as_unseen(subject_dirs, tmp_path):
    base, _ = subject_dirs
    model = save_adapter(base, tmp_path, lora_bias=True)
    subject = load(tmp_path, base)
    assert subject.unseen == ("lora_B biases of 4 modules",)
    assert torch.equal(logits_of(subject.model), logits_of(model))


@pytest.mark.parametrize(
    "config",
    [{"alora_invocation_tokens": [1, 2]}, {"use_qalora": True}, {"kasa_config": {"beta": 0.1}}],
)
def test_variants_without_rows_are_refused_by_name(config, broken):
    adapter_dir, base = broken(**config)
    refused(adapter_dir, base, "no rows to read", next(iter(config)))


def test_all_of_bias_all_is_loaded_and_named_as_unseen(subject_dirs, tmp_path):
    base, _ = subject_dirs

    def train(model):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.3)

    model = save_adapter(base, tmp_path, bias="all", change=train)
    subject = load(tmp_path, base)
    assert torch.equal(logits_of(subject.model), logits_of(model))
    assert subject.unseen == ("biases of 6 modules",)
