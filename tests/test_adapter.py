import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from lorascope.cli import call
from lorascope.errors import AdapterError
from lorascope.subject.adapter import (
    CONFIG,
    WEIGHTS,
    TensorFile,
    inspect_adapter,
    is_routed,
    lora_kind,
    lora_tensors,
    ranks_by_projection,
    scale_of,
    unsupported_reason,
)
from lorascope.subject.inventory import inventory

PREFIX = "base_model.model.model.layers"


def write_adapter(folder, tensors, **config):
    """Write an adapter of the given tensors, the prefix `PEFT.layers` left out of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{PREFIX}.{name}": value for name, value in tensors.items()}, folder / WEIGHTS)
    data = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (folder / CONFIG).write_text(json.dumps(data))
    return folder


def pair(path="0.self_attn.q_proj", d_x=6, rank=2, d_y=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{path}.lora_A.weight": torch.randn(rank, d_x, generator=generator).to(dtype),
        f"{path}.lora_B.weight": torch.randn(d_y, rank, generator=generator).to(dtype),
    }


@pytest.fixture
def several(tmp_path):
    """A folder with the adapters `default` and `other`, as PEFT saves two of one model."""
    write_adapter(tmp_path / "two", pair(seed=1))
    write_adapter(tmp_path / "two" / "other", pair(seed=2))
    return tmp_path / "two"


def test_several_adapters_in_a_folder_are_listed_and_chosen_by_name(several):
    # B8
    with pytest.raises(AdapterError, match=r"2 adapters \(default, other\).*--adapter-name"):
        inspect_adapter(str(several))
    with pytest.raises(AdapterError, match=r"no adapter third; it has default, other"):
        inspect_adapter(str(several), "third")
    own, other = (inspect_adapter(str(several), name) for name in ("default", "other"))
    assert (own.path, other.path) == (several, several / "other")
    assert other.name == "two/other"
    assert own.digest != other.digest


def test_a_sub_folder_that_stands_alone_and_a_trainers_checkpoints_leave_no_choice(several):
    (several / CONFIG).unlink()
    assert inspect_adapter(str(several)).path == several / "other"
    final = write_adapter(several.parent / "run", pair())
    write_adapter(final / "checkpoint-10", pair(seed=1))
    assert inspect_adapter(str(final)).path == final
    assert inspect_adapter(str(final), "checkpoint-10").path == final / "checkpoint-10"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_are_read_exactly_in_every_floating_type(dtype, tmp_path):
    tensors = pair(dtype=dtype)
    folder = write_adapter(tmp_path / "adapter", tensors)
    file = TensorFile(folder / WEIGHTS)
    for name, value in tensors.items():
        np.testing.assert_array_equal(file.read(f"{PREFIX}.{name}"), value.double().numpy())


def test_an_integer_type_is_refused_by_name(tmp_path):
    folder = write_adapter(tmp_path, {n: v.to(torch.int8) for n, v in pair().items()})
    with pytest.raises(AdapterError, match=r"lora_A.weight .* is of type I8, expected one of F64"):
        inspect_adapter(str(folder))


def test_norms_and_effect_are_those_of_the_whole_matrices(tmp_path):
    tensors = pair(rank=3, dtype=torch.bfloat16) | pair("1.mlp.up_proj", seed=1)
    folder = write_adapter(
        tmp_path, tensors, r=3, rank_pattern={"up_proj": 2}, alpha_pattern={"1.mlp.up_proj": 9}
    )
    q_proj, up_proj = inventory(inspect_adapter(str(folder))).sites
    assert (q_proj.layer, q_proj.rank, q_proj.d_x, q_proj.d_y) == (0, 3, 6, 8)
    assert (q_proj.scale, up_proj.scale) == (pytest.approx(4 / 3), 4.5)
    for held, name in ((q_proj, "0.self_attn.q_proj"), (up_proj, "1.mlp.up_proj")):
        a = tensors[f"{name}.lora_A.weight"].double()
        b = tensors[f"{name}.lora_B.weight"].double()
        assert held.a_norm == pytest.approx(a.norm().item())
        assert held.b_norm == pytest.approx(b.norm().item())
        assert held.effect == pytest.approx((held.scale * b @ a).norm().item())


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn.q_proj", True),
        (r".*\.0\..*", True),
        (r"^model.layers.0.self_attn.q_proj", True),
        ("layers", False),
        (r"layers\.[01]\.self_attn\.(q|k)_proj", True),
        ("1.self_attn.q_proj", False),
    ],
)
def test_patterns_match_as_pefts_own_rule_does(pattern, matches):
    # pitfall 24
    module = "model.layers.0.self_attn.q_proj"
    assert (get_pattern_key([pattern], module) == pattern) == matches
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 12}}
    assert scale_of(config, module) == (3.0 if matches else 1.0)
    assert scale_of({**config, "use_rslora": True}, module) == (6.0 if matches else 2.0)


@pytest.mark.parametrize("pattern", ["(", "(?i)Q_PROJ"])  # the second is a pattern by itself
def test_a_pattern_that_peft_cannot_use_is_one_line(pattern, tmp_path):
    folder = write_adapter(tmp_path / "a", pair(), rank_pattern={pattern: 4})
    with pytest.raises(AdapterError, match="is no pattern of names"):
        inspect_adapter(str(folder))


def test_the_first_of_two_patterns_wins():
    config = {"r": 2, "lora_alpha": 2, "alpha_pattern": {"q_proj": 4, "self_attn.q_proj": 8}}
    assert scale_of(config, "model.layers.0.self_attn.q_proj") == 2.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda name: name,
        lambda name: name.removeprefix("base_model.model."),
        lambda name: "base_model.model." + name,
        lambda name: "module." + name,
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: name.replace(".weight", ".my_adapter.weight"),
        lambda name: name.replace(".lora_", "_"),
    ],
)
def test_modules_are_found_whatever_was_done_to_the_names(damage):
    # pitfall 1, B2
    names = [damage(f"{PREFIX}.{name}") for name in pair()]
    modules = lora_tensors(names)
    assert list(modules) == ["model.layers.0.self_attn.q_proj"]
    assert modules["model.layers.0.self_attn.q_proj"] == dict(
        zip(["lora_A", "lora_B"], names, strict=True)
    )


def test_what_has_no_row_per_token_is_listed_with_its_reason(tmp_path):
    # pitfall 26, B6, B12
    embedding = {
        "0.embed.lora_embedding_A": torch.ones(2, 9),
        "0.embed.lora_embedding_B": torch.ones(4, 2),
    }
    tensors = {
        **pair(),
        **pair("0.mlp.experts.7.up_proj"),
        **pair("0.mlp.experts.base_layer"),
        **pair("0.mlp.experts"),
        **embedding,
        "0.conv.lora_A.weight": torch.ones(2, 4, 3),
        "0.conv.lora_B.weight": torch.ones(4, 2, 1),
    }
    folder = write_adapter(
        tmp_path, tensors, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    held = inventory(inspect_adapter(str(folder)))
    assert [pair.projection for pair in held.sites] == ["q_proj"]
    reasons = {name.removeprefix("model.layers.0."): why for name, why in held.unreadable}
    assert "routed" in reasons["mlp.experts.7.up_proj"]
    assert "parameter" in reasons["mlp.experts.base_layer"]
    assert "parameter" in reasons["mlp.experts"]
    assert "embedding" in reasons["embed"]
    assert "convolution" in reasons["conv"]


def test_modules_that_are_called_as_initials_are_keep_their_names(tmp_path):
    paths = ["mlp.gate", "mlp.gate_proj", "self_attn.q", "self_attn.q_proj", "mlp.w-1"]
    tensors = {}
    for i, path in enumerate(paths, 1):
        tensors |= pair(f"0.{path}", rank=i)
    adapter = inspect_adapter(str(write_adapter(tmp_path, tensors)))
    expected = {"gate_proj": 2, "q_proj": 4, "gate": 1, "q": 3, "w-1": 5}
    assert list(ranks_by_projection(adapter).items()) == list(expected.items())


def test_one_of_several_experts_is_not_a_shared_expert():
    assert is_routed("model.layers.0.mlp.experts.3.up_proj")
    assert is_routed("model.layers.0.block_sparse_moe.local_experts.12.w1")
    assert not is_routed("model.layers.0.mlp.shared_experts.up_proj")
    assert not is_routed("model.layers.0.mlp.shared_experts.0.up_proj")
    assert not is_routed("model.layers.0.mlp.experts")


def test_what_an_adapter_changes_outside_its_rows_is_named(tmp_path):
    # pitfall 31, B10
    tensors = {
        **pair(),
        "0.self_attn.q_proj.base_layer.bias": torch.ones(8),
        "0.self_attn.q_proj.lora_B.bias": torch.ones(8),
        "0.classifier.dense.weight": torch.ones(2, 2),
        "0.embed_tokens.weight": torch.ones(9, 4),
        "0.wte.token_adapter.trainable_tokens_delta": torch.ones(3, 4),
    }
    folder = write_adapter(tmp_path, tensors, modules_to_save=["classifier"], bias="all")
    assert set(inventory(inspect_adapter(str(folder))).unseen) == {
        "biases of 1 modules",
        "lora_B biases of 1 modules",
        "trained module model.layers.0.classifier",
        "saved weights of model.layers.0.embed_tokens",
        "3 trained tokens of model.layers.0.wte",
    }


def test_variants_without_rows_are_refused_by_name():
    # B6
    assert lora_kind({"use_dora": True}) == "dora"
    assert lora_kind({"use_dora": False, "alora_invocation_tokens": None}) == "lora"
    assert lora_kind({"init_lora_weights": "mica"}) == "mica"
    assert unsupported_reason({"use_dora": True, "use_bdlora": {"nblocks": 2}}) is None
    keys = ["alora_invocation_tokens", "use_qalora", "arrow_config"]
    for key in [*keys, "monteclora_config", "kasa_config"]:
        assert key in str(unsupported_reason({key: [1]}))


def info(*arguments):
    """Run `lorascope info` in a process of its own that must not load torch."""
    code = (
        "import sys; from lorascope.cli import call; code = call(['info', *sys.argv[1:]]);"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules); assert not heavy, heavy;"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_info_shows_an_adapter_without_torch_and_without_its_base(subject_dirs, tmp_path):
    # pitfall 39
    _, adapter = subject_dirs
    alone = tmp_path / "alone"
    shutil.copytree(adapter, alone)
    done = info(alone)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("site"))
    table = lines[head : head + 15]
    assert [line.split()[0] for line in table[1:4]] == ["0.gate_proj", "0.up_proj", "0.down_proj"]
    assert "‖scale·B·A‖" in table[0]
    assert len({line.index("model.layers") for line in table[1:]}) == 1  # aligned
    assert "../base" in done.stdout
    assert "d_in 14" in done.stdout


def test_info_as_json_has_the_same_numbers(subject_dirs):
    _, adapter = subject_dirs
    done = info(adapter, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["kind"], data["d_in"], len(data["sites"])) == ("adapter", 14, 14)
    tensors = load_file(adapter / WEIGHTS)
    for site in data["sites"]:
        a = tensors[f"base_model.model.{site['module']}.lora_A.weight"].double()
        assert site["a_norm"] == pytest.approx(a.norm().item())


def test_info_says_what_is_unread_and_what_has_no_effect(several, capsys):
    # B4, B8
    tensors = pair() | pair("0.mlp.experts.1.up_proj")
    zero = {name: v * 0 if "lora_B" in name else v for name, v in tensors.items()}
    write_adapter(several / "other", zero, alora_invocation_tokens=[1], modules_to_save=["x"])
    assert call(["info", str(several), "--adapter-name", "other"]) == 0
    text = capsys.readouterr().out
    assert "every lora_B is zero: the adapter has no effect" in text
    assert "model.layers.0.mlp.experts.1.up_proj: an expert" in text
    assert "does not support this adapter: it is alora" in text
    assert call(["info", str(several)]) == 2
    assert "--adapter-name" in capsys.readouterr().err


def test_info_of_what_is_neither_adapter_nor_artifact_is_one_line(several, capsys):
    (several / WEIGHTS).write_bytes(b"123")
    for words in (["info", str(several), "--adapter-name", "default"], ["info", "no/adapter"]):
        assert call(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("AdapterError: ")
        assert error.count("\n") == 1
