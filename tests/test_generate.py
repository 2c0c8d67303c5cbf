import json
import re
import shutil

import numpy as np
import pytest
import torch
from builders.records import s1_records
from builders.subjects import N_TERMS, change_adapter, load, reference
from builders.tolerance import assert_same_up_to_rounding
from safetensors.torch import load_file, save_file

from lorascope.activations import generate
from lorascope.activations.capture import compare_likelihood
from lorascope.activations.generate import GenerateConfig
from lorascope.activations.store import ActivationStore, default_name
from lorascope.artifact import read_manifest
from lorascope.causal.held_out import load_subject_of
from lorascope.errors import ArtifactError, ConfigError, NumberError
from lorascope.inspection import verify
from lorascope.sites import PROJECTIONS
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.adapter_files import WEIGHTS
from lorascope.subject.base import find_base
from lorascope.subject.load import load_subject, load_tokenizer
from lorascope.texts.roles import ROLES
from lorascope.texts.rollouts import Rollout


@pytest.fixture
def config(subject_dirs, dataset_file, tmp_path):
    return lambda **given: GenerateConfig(
        **{
            "lora_path": str(subject_dirs[1]),
            "dataset": str(dataset_file),
            "output": tmp_path / "store",
            "store_dtype": "float32",
            **given,
        }
    )


@pytest.fixture
def subject(subject_dirs):
    adapter = inspect_adapter(str(subject_dirs[1]))
    base = find_base(adapter, None)
    return load_subject(adapter, base, load_tokenizer(adapter, base), torch.device("cpu"), "auto")


def test_rows_equal_an_independent_product_of_a_and_the_modules_input(config, subject):
    store = ActivationStore.open(generate.run(config(num_examples=3)))
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: seen.__setitem__(name, args[0].detach())
        )
        for name, module in subject.model.base_model.model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    ]
    weights = load_file(subject.adapter.path / WEIGHTS)
    start, stop = store.rollout_start[1:3]
    ids = torch.from_numpy(store.token_ids[start:stop].astype(np.int64))[None]
    with torch.inference_mode():
        subject.model(input_ids=ids)
    for handle in handles:
        handle.remove()
    rows = store.rows(start, stop)
    for column, site in enumerate(store.layout.sites):
        a_matrix = weights[f"base_model.model.{site.module}.lora_A.weight"].double()
        by_hand = (seen[site.module][0].double() @ a_matrix.T)[:, 0]
        assert_same_up_to_rounding(rows[:, column], by_hand, n_terms=N_TERMS)


def test_a_module_writes_base_plus_scale_times_b_times_the_row(subject):
    path = subject.layout.sites[0].module
    module = subject.model.base_model.model.get_submodule(path)
    x = torch.randn(3, module.base_layer.in_features)
    with torch.inference_mode():
        row = module.lora_A["default"](x)
        b_matrix = module.lora_B["default"].weight
        by_hand = module.base_layer(x) + subject.layout.sites[0].scale * row @ b_matrix.T
        assert_same_up_to_rounding(module(x), by_hand, n_terms=x.shape[1] + 1)


def test_a_text_has_the_same_rows_alone_and_in_any_batch(config, tmp_path):
    whole = ActivationStore.open(generate.run(config(num_examples=9)))
    alone = ActivationStore.open(
        generate.run(config(num_examples=9, batch_tokens=1, output=tmp_path / "alone"))
    )
    np.testing.assert_array_equal(whole.token_ids, alone.token_ids)
    rows, expected = (store.rows(0, store.n_rows) for store in (whole, alone))
    assert_same_up_to_rounding(rows, expected, n_terms=N_TERMS)


def test_float16_keeps_the_rows_to_half_precision_and_overflow_is_an_error(
    config, subject_dirs, tmp_path
):
    base, adapter = subject_dirs
    half = ActivationStore.open(generate.run(config(store_dtype="float16")))
    full = ActivationStore.open(generate.run(config(output=tmp_path / "full")))
    assert (half.dtype, full.dtype) == (np.float16, np.float32)
    np.testing.assert_array_equal(half.rows(0, 99), full.rows(0, 99).astype(np.float16))
    loud = tmp_path / "loud"
    shutil.copytree(adapter, loud)
    tensors = load_file(loud / WEIGHTS)
    name = next(n for n in tensors if "layers.1.mlp.down_proj.lora_A" in n)
    save_file({**tensors, name: tensors[name] * 1e9}, loud / WEIGHTS)
    with pytest.raises(NumberError, match=r"site 1.down_proj reads .* of rollout 15.*float32"):
        generate.run(
            config(
                lora_path=str(loud),
                base_model=str(base),
                store_dtype="float16",
                output=tmp_path / "o",
            )
        )
    assert not (tmp_path / "o").exists()


def test_a_chosen_projection_is_a_slice_of_all_of_them(config, tmp_path):
    whole = ActivationStore.open(generate.run(config(num_examples=2)))
    part = ActivationStore.open(
        generate.run(config(num_examples=2, adapter_types=("mlp",), output=tmp_path / "mlp"))
    )
    assert part.content["adapter_types"] == list(PROJECTIONS[:3])
    np.testing.assert_array_equal(part.rows(0, 50), whole.select(PROJECTIONS[:3]).rows(0, 50))


def test_an_unknown_projection_is_refused_and_nothing_is_written(config, tmp_path):
    with pytest.raises(ConfigError, match="gate_pro is not among"):
        generate.run(config(adapter_types=("gate_pro",)))
    assert list(tmp_path.iterdir()) == []


def test_published_folder_names_are_kept():
    assert default_name(PROJECTIONS) == "activations_all_adapters"
    assert default_name(PROJECTIONS[:3]) == "activations"
    assert default_name(PROJECTIONS[3:]) == "activations_q-k-v-o"


def test_the_store_counts_what_it_dropped_and_cut(config, tmp_path, caplog):
    file = tmp_path / "mixed.jsonl"
    records = s1_records(4)
    records[1]["question"] = " "
    file.write_text("\n".join(map(json.dumps, records)))
    store = ActivationStore.open(generate.run(config(dataset=str(file), max_length=60)))
    assert store.rollout_id.tolist() == [0, 2, 3]
    assert store.content["dropped"] == {"empty": 1, "broken": 0, "duplicate": 0}
    assert store.content["longer"] == {"n": 3, "how": "truncate"}
    assert np.diff(store.rollout_start).max() == 60
    assert "left out 1 empty of 4 records" in caplog.text


def test_tokens_and_rollouts_agree_with_an_independent_tokenisation(config, dataset_file, subject):
    store = ActivationStore.open(generate.run(config()))
    assert store.n_rollouts == 70
    assert len(store.shards) == 2
    records = [json.loads(line) for line in dataset_file.read_text().splitlines()]
    tokenizer = subject.tokenizer
    for i in (0, 13, 69):
        r = records[i]
        assistant = (
            f"<|im_start|>think\n{r['deepseek_thinking_trajectory']}\n"
            f"<|im_start|>answer\n{r['deepseek_attempt']}"
        )
        text = tokenizer.apply_chat_template(
            [
                {"role": "user", "content": r["question"]},
                {"role": "assistant", "content": assistant},
            ],
            tokenize=False,
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        here = slice(store.rollout_start[i], store.rollout_start[i + 1])
        assert store.token_ids[here].tolist() == ids
        assert b"".join(store.vocabulary[t] for t in store.token_ids[here]).decode() == text


def test_the_same_command_again_does_nothing_and_other_settings_are_refused(config, caplog):
    out = generate.run(config(num_examples=2))
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with caplog.at_level("INFO"):
        assert generate.run(config(num_examples=2)) == out
    assert "already exists" in caplog.text
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(ArtifactError, match="made from another dataset"):
        generate.run(config(num_examples=3))
    with pytest.raises(ArtifactError, match="template auto there, s1 here"):
        generate.run(config(num_examples=2, template="s1"))
    generate.run(config(num_examples=3, overwrite=True))
    assert ActivationStore.open(out).n_rollouts == 3


def test_the_store_needs_no_model_afterwards_and_verifies(config):
    from transformers import AutoTokenizer

    out = generate.run(config(num_examples=2))
    assert verify(out) == []
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    store = ActivationStore.open(out)
    first = store.token_ids[: store.rollout_start[1]]
    assert tokenizer.decode(first).encode() == b"".join(store.vocabulary[i] for i in first)


def test_the_store_says_nothing_of_the_machine_that_made_it(config, tmp_path, monkeypatch):
    import huggingface_hub.constants

    def made(name):
        out = generate.run(config(num_examples=2, output=tmp_path / name))
        return {
            file.relative_to(out).as_posix(): file.read_bytes()
            for file in out.rglob("*")
            if file.is_file()
        }

    offline = made("offline")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert made("online") == offline
    for name, content in offline.items():
        assert str(tmp_path).encode() not in content, name


def test_rank_above_one_gives_a_column_for_each_rank(make_subject, config):
    base, adapter = make_subject(r=3)
    out = generate.run(config(lora_path=str(adapter), base_model=str(base), num_examples=2))
    store = ActivationStore.open(out)
    assert store.d_in == 2 * 7 * 3
    assert store.layout.column_names[:4] == (
        "0.gate_proj:0", "0.gate_proj:1", "0.gate_proj:2", "0.up_proj:0",
    )  # fmt: skip


def test_windows_keep_every_token_of_a_text_longer_than_the_context(config, tmp_path, caplog):
    given = {"num_examples": 6, "max_length": 40}
    cut = ActivationStore.open(generate.run(config(**given)))
    with caplog.at_level("INFO"):
        out = generate.run(config(**given, long_texts="window", output=tmp_path / "w"))
    windowed = ActivationStore.open(out)
    whole = ActivationStore.open(generate.run(config(num_examples=6, output=tmp_path / "all")))
    assert windowed.token_ids.tolist() == whole.token_ids.tolist()
    assert np.diff(cut.rollout_start).max() == 40 < np.diff(windowed.rollout_start).max()
    assert windowed.content["longer"] == {"n": 6, "how": "window"}
    assert "6 of 6 rollouts are read in windows of 40" in caplog.text
    first = windowed.rows(0, 40)
    assert_same_up_to_rounding(first, whole.rows(0, 40), n_terms=N_TERMS)


def test_tokens_and_disk_are_said_before_the_run_starts(config, caplog):
    with caplog.at_level("INFO"):
        store = ActivationStore.open(generate.run(config(num_examples=4)))
    assert f"{store.n_rows:,} tokens to read, 0.00 GB on disk" in caplog.text


def test_a_published_subset_is_named_as_published(config, tmp_path, monkeypatch, make_subject):
    monkeypatch.chdir(tmp_path)
    base, adapter = make_subject(targets=PROJECTIONS[:3])
    given = {"lora_path": str(adapter), "base_model": str(base), "num_examples": 1}
    assert generate.run(config(**given, output=None)).name == "activations"


def test_a_max_length_beyond_the_context_is_refused(config):
    assert generate.run(config(num_examples=2, max_length=512)).exists()
    with pytest.raises(ConfigError, match="--max-length is 513 tokens.*context of 512"):
        generate.run(config(num_examples=2, max_length=513, overwrite=True))


@pytest.mark.slow
def test_a_model_with_tiny_rows_is_refused_in_float16_and_right_in_float32(
    config, subject_dirs, tmp_path
):
    base, adapter = subject_dirs
    quiet = tmp_path / "quiet"
    shutil.copytree(adapter, quiet)
    factor = 2.0**-30  # A and B are the same model, to the bit
    tensors = {
        name: tensor * (factor if "lora_A" in name else 1 / factor)
        for name, tensor in load_file(adapter / WEIGHTS).items()
    }
    save_file(tensors, quiet / WEIGHTS)
    given = {"lora_path": str(quiet), "base_model": str(base), "num_examples": 6}
    with pytest.raises(NumberError, match="float16 cannot hold 14 of 14 columns"):
        generate.run(config(store_dtype="float16", output=tmp_path / "half", **given))
    tiny = ActivationStore.open(generate.run(config(output=tmp_path / "tiny", **given)))
    full = ActivationStore.open(generate.run(config(num_examples=6)))
    np.testing.assert_array_equal(tiny.rows(0, tiny.n_rows) / factor, full.rows(0, full.n_rows))


def test_a_base_with_other_weights_is_not_taken_for_the_one_of_the_store(
    config, subject_dirs, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(subject_dirs[0], base)
    given = config(base_model=str(base), num_examples=3)
    store = ActivationStore.open(generate.run(given))
    tensors = load_file(base / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    changed = {
        name: t + 0.03 * t.std() * torch.randn(t.shape, generator=noise)
        for name, t in tensors.items()
        if t.std() > 0
    }
    save_file(tensors | changed, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="base_weights"):
        generate.run(given)
    with pytest.raises(ArtifactError, match="or with other weights of it"):
        load_subject_of(store, given, device="cpu", dtype="auto")


def test_the_base_is_named_in_log_and_store_and_another_one_is_warned_of(
    config, subject_dirs, tmp_path, caplog
):
    adapter, base = tmp_path / "adapter", tmp_path / "llama"
    shutil.copytree(subject_dirs[1], adapter)
    shutil.copytree(subject_dirs[0], base)
    data = json.loads((adapter / "adapter_config.json").read_text())
    data["base_model_name_or_path"] = "/elsewhere/qwen"
    (adapter / "adapter_config.json").write_text(json.dumps(data))
    with caplog.at_level("INFO"):
        path = generate.run(config(lora_path=str(adapter), base_model=str(base), num_examples=2))
    assert "names the base model /elsewhere/qwen, and is studied on llama" in caplog.text
    assert "of adapter, base llama, on cpu" in caplog.text
    manifest = read_manifest(path)
    assert manifest is not None
    assert manifest.content["base_model"] == "llama (the adapter names qwen)"


def test_an_adapter_that_makes_its_texts_less_likely_is_warned_of(subject_dirs, tmp_path, caplog):
    # To first order, a small step and the opposite one change the likelihood by opposite amounts.
    ids = np.arange(3, 60, dtype=np.int32)
    texts = [Rollout(0, ids, np.full(len(ids), ROLES.index("text"), np.uint8))]
    warned, losses = [], []
    for sign in (1, -1):
        adapter, base = change_adapter(
            subject_dirs,
            tmp_path / str(sign),
            lambda t, sign=sign: {n: sign * v if "lora_B" in n else v for n, v in t.items()},
            lora_alpha=0.1,
        )
        caplog.clear()
        with caplog.at_level("INFO"):
            compare_likelihood(load(adapter, base), texts)
        warned.append("makes these texts less likely" in caplog.text)
        model, input_ids = reference(adapter, base), torch.from_numpy(ids[None]).long()
        with torch.no_grad():
            losses.append([float(model(input_ids, labels=input_ids).loss)])
            with model.disable_adapter():
                losses[-1].append(float(model(input_ids, labels=input_ids).loss))
        pattern = r"(\S+) nats a token with the adapter, (\S+) without; KL"
        said = re.search(pattern, caplog.text)
        assert said is not None
        assert [float(word) for word in said.groups()] == pytest.approx(losses[-1], abs=2e-3)
    assert min(abs(own - base) for own, base in losses) > 1e-4  # far above rounding
    assert sorted(warned) == [False, True]
    assert warned == [own > base for own, base in losses]
