"""Rollouts that the model writes itself."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from builders.subjects import N_TERMS, captured, change_adapter, load
from builders.tolerance import assert_same_up_to_rounding

from lorascope.activations import generate
from lorascope.activations.generate import GenerateConfig
from lorascope.activations.store import ActivationStore
from lorascope.causal.continuation import Opening, continue_prompts
from lorascope.causal.effect_options import SteerConfig
from lorascope.errors import ConfigError
from lorascope.subject import sampling
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.base import find_base
from lorascope.subject.intervene import RowEditor
from lorascope.subject.sampling import draw, end_ids, log_ignored_settings, sample_rollouts
from lorascope.texts.roles import ROLES
from lorascope.texts.rollouts import Rollout


@pytest.fixture(scope="module")
def subject(subject_dirs):
    return load(subject_dirs[1], subject_dirs[0])


def prompts(lengths):
    rng = np.random.default_rng(1)
    user = ROLES.index("user")
    return [
        Rollout(i, rng.integers(3, 320, n).astype(np.int32), np.full(n, user, np.uint8))
        for i, n in enumerate(lengths)
    ]


def write(subject, given, **options):
    options = {"max_new_tokens": 12, "temperature": 0.0, "seed": (0, 0), **options}
    return sample_rollouts(subject, given, **options)


def test_the_likeliest_token_follows_each_prompt_whatever_stands_beside_it(subject):
    given = prompts([5, 9, 2])
    for prompt, written in zip(given, write(subject, given), strict=True):
        ids = prompt.token_ids.tolist()
        assert written.token_ids[: len(ids)].tolist() == ids
        assert written.roles[: len(ids)].tolist() == prompt.roles.tolist()
        assert len(written.roles) == len(written.token_ids) > len(ids)
        with torch.inference_mode():
            for token in written.token_ids[len(ids) :]:
                logits = subject.model(input_ids=torch.tensor([ids])).logits[0, -1]
                assert logits[token] > logits.max() - 1e-4
                ids.append(int(token))


def test_rows_of_what_it_wrote_are_those_it_had_while_writing(subject):  # pitfall 40
    [written] = write(subject, prompts([6]))
    seen: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(subject.sites))}
    handles = [
        module.register_forward_hook(lambda _m, _a, h, i=i: seen[i].append(h[0]))
        for i, module in enumerate(subject.sites)
    ]
    cache = None
    with torch.inference_mode():
        for token in written.token_ids:
            out = subject.model(
                input_ids=torch.tensor([[int(token)]]), past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
    for handle in handles:
        handle.remove()
    stepwise = torch.cat([torch.cat(seen[i]) for i in seen], dim=1).numpy()
    assert_same_up_to_rounding(captured(subject, [written]), stepwise, n_terms=N_TERMS)


def test_the_seed_decides_what_is_drawn_and_nothing_else_does(subject):
    given = prompts([4] * 20)
    first, again, other = (
        [r.token_ids.tolist() for r in write(subject, given, temperature=1.0, seed=(s, 0))]
        for s in (1, 1, 2)
    )
    before = torch.random.get_rng_state()
    write(subject, given[:1], temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == again != other
    assert len({tuple(ids[4:]) for ids in first}) > 1


def test_writing_ends_at_the_end_of_the_turn(subject, monkeypatch):
    given = prompts([5])
    free = write(subject, given)[0].token_ids[5:]
    end = int(free[3])
    monkeypatch.setattr(subject.causal.generation_config, "eos_token_id", end)
    stop = free.tolist().index(end)
    assert write(subject, given)[0].token_ids[5:].tolist() == free[: stop + 1].tolist()


def test_each_prompt_has_its_own_room(subject, monkeypatch, caplog):
    monkeypatch.setattr(sampling, "end_ids", lambda subject: [])
    lengths = [5] * 9 + [500, 512, 480] + [7] * 6  # the context has 512
    written = write(subject, prompts(lengths), max_new_tokens=40)
    new = [len(text.token_ids) - n for text, n in zip(written, lengths, strict=True)]
    assert new == [40] * 9 + [12, 0, 32] + [40] * 6
    assert "1 of 18 prompts fill the context of 512 tokens" in caplog.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_in_the_generation_config_acts_but_ends_of_text(
    subject_dirs, tmp_path, temperature
):
    hidden = {
        "repetition_penalty": 3.0,
        "num_beams": 2,
        "num_return_sequences": 2,
        "min_length": 30,
        "no_repeat_ngram_size": 1,
        "top_k": 1,
        "do_sample": True,
        "suppress_tokens": list(range(3, 300)),
        "cache_implementation": "static",
    }
    texts = []
    for more in ({}, hidden):
        adapter, _ = change_adapter(subject_dirs, tmp_path)
        base = tmp_path / "base"
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], **more}))
        subject = load(adapter, base)
        assert end_ids(subject) == [2, 7]
        given = prompts([6, 4, 9])
        plain = write(subject, given, temperature=temperature, seed=(3,))
        texts.append([text.token_ids.tolist() for text in plain])
        with RowEditor(subject) as editor:
            ids = torch.from_numpy(given[1].token_ids.astype(np.int64))
            prompt = Opening(ids, torch.ones(4, dtype=torch.bool), (3, 1))
            (((steered,),),) = continue_prompts(
                editor, [prompt], [None], max_new_tokens=12, temperature=temperature
            )
        assert steered.token_ids.tolist() == texts[-1][1][4:]
    assert texts[0] == texts[1]


def test_settings_that_have_no_effect_are_named_in_one_line(subject_dirs, tmp_path, caplog):
    change_adapter(subject_dirs, tmp_path)
    base = find_base(inspect_adapter(str(tmp_path / "adapter")), str(tmp_path / "base"))
    file = tmp_path / "base" / "generation_config.json"
    caplog.set_level("INFO")
    acts = {"repetition_penalty": 1.05, "do_sample": True, "top_k": None}
    for given in ({"eos_token_id": 2}, acts):
        file.write_text(json.dumps({"transformers_version": "4.56", "bos_token_id": 1, **given}))
        log_ignored_settings(base)
    (line,) = caplog.messages
    assert "of base: repetition_penalty 1.05, do_sample true; only" in line


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    n, temperature = 4000, 2.0
    drawn = draw(logits.expand(n, -1), temperature, [(0, i) for i in range(n)])
    share = torch.bincount(drawn, minlength=4) / n
    likely = torch.softmax(logits[0] / temperature, -1)
    assert ((share - likely).abs() <= 5 * (likely * (1 - likely) / n).sqrt()).all()


def test_the_stage_stores_what_the_model_wrote(subject_dirs, dataset_file, tmp_path):
    config = GenerateConfig(
        lora_path=str(subject_dirs[1]),
        dataset=str(dataset_file),
        output=tmp_path / "store",
        sample=70,
        num_examples=70,
        max_new_tokens=8,
    )
    store = ActivationStore.open(generate.run(config))
    assert store.n_rollouts == 70
    assert len(store.shards) == 2
    assert store.content["n_rows"] == store.n_rows
    assert store.content["end_ids"] == [2]
    lengths = np.diff(store.rollout_start)
    assert lengths.max() > 8
    roles = {ROLES[i] for i in np.unique(store.roles)}
    assert {"user", "special"} < roles


@pytest.mark.parametrize("stage", [GenerateConfig, partial(SteerConfig, features=(0,))])
def test_a_temperature_that_logits_cannot_be_divided_by_is_refused(stage):
    for temperature in (1e-38, 1e-320, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="--temperature is .*, expected 0, .*or 0.001 or"):
            stage(temperature=temperature)


def test_more_texts_than_prompts_need_a_temperature(subject_dirs, dataset_file, tmp_path):
    options = {
        "lora_path": str(subject_dirs[1]),
        "dataset": str(dataset_file),
        "output": tmp_path / "store",
        "num_examples": 2,
        "sample": 5,
        "max_new_tokens": 4,
    }
    with pytest.raises(ConfigError, match="5, but there are 2 prompts.*--temperature 0"):
        generate.run(GenerateConfig(**options))
    store = ActivationStore.open(generate.run(GenerateConfig(**options, temperature=1.0)))
    assert store.rollout_id.tolist() == [0, 1, 0, 1, 0]
