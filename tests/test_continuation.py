"""Continuations under changed rows: against plain generation, whole passes, and theory."""

import numpy as np
import pytest
import torch
from builders.studies import each_column, make_texts, strengthen
from builders.subjects import N_TERMS, load, save_adapter, save_rotary
from builders.tolerance import assert_same_up_to_rounding, kl_rounding, rounding

from lorascope.activations.store import ActivationStore
from lorascope.causal.continuation import Change, Opening, continue_prompts
from lorascope.subject.intervene import RowEditor
from lorascope.subject.sampling import sample_rollouts
from lorascope.texts.roles import ROLES
from lorascope.texts.rollouts import Rollout

PROMPT = torch.tensor([5, 9, 200, 31, 7, 64])
TEXT = torch.ones(6, dtype=torch.bool)


@pytest.fixture(scope="module")
def dirs(make_subject, tmp_path_factory):
    return strengthen(make_subject(), tmp_path_factory.mktemp("strong"), 3.0)


@pytest.fixture(scope="module")
def subject(dirs):
    return load(dirs[1], dirs[0])


def push(size):
    def of(rows, _counts):
        added = torch.zeros_like(rows)
        added[..., 3] = size
        return added

    return Change(of)


def written(subject, arms, seed=(0,), **given):
    prompt = Opening(PROMPT, TEXT, seed)
    with RowEditor(subject) as editor:
        return continue_prompts(editor, [prompt], arms, max_new_tokens=8, **given)[0]


def test_without_a_change_it_is_what_the_model_writes_by_itself(subject):
    prompt = Rollout(0, PROMPT.numpy().astype(np.int32), np.full(6, ROLES.index("text"), np.uint8))
    (plain,) = sample_rollouts(subject, [prompt], max_new_tokens=8, temperature=0.0, seed=[0])
    ((one,),) = written(subject, [None])
    assert one.token_ids.tolist() == plain.token_ids[6:].tolist()
    assert len(one.token_ids) > 2
    assert not one.kl.any()


def test_a_change_of_nothing_is_no_change_to_the_bit(subject):
    for temperature in (0.0, 1.0):
        (plain,), (nothing,), (pushed,) = written(
            subject, [None, push(0.0), push(5.0)], temperature=temperature
        )
        assert plain.token_ids.tolist() == nothing.token_ids.tolist()
        assert not nothing.kl.any()
        assert np.array_equal(plain.surprise, nothing.surprise)
        assert pushed.kl.max() > 0


@pytest.fixture(scope="module", params=["Qwen2", "Mamba", "RecurrentGemma"])
def any_subject(request, subject, tokenizer_dir, tmp_path_factory):
    """The tiny subject, and some whose models keep what they have read in no cache of layers."""
    if request.param == "Qwen2":
        return subject
    folder, targets = tmp_path_factory.mktemp(request.param), {"Mamba": "in_proj"}
    config = {"intermediate_size": 96, "num_hidden_layers": 3, "initializer_range": 0.1}
    base = save_rotary(tokenizer_dir, folder / "base", request.param, **config)
    target = targets.get(request.param, "linear_x")
    save_adapter(base, folder / "adapter", r=4, target_modules=[target])
    return load(folder / "adapter", base)


@torch.inference_mode()
def test_token_by_token_is_one_pass_over_the_whole_text(any_subject):
    """KL, surprise and rows of a changed text, by two plain passes without a cache."""
    subject = any_subject
    ((one,),) = written(subject, [push(2.0)], temperature=1.0)
    whole = torch.cat([PROMPT, torch.from_numpy(one.token_ids)])[None]
    where = torch.zeros(1, whole.shape[1], 1)
    where[:, 5:] = 1

    def edit(columns, values):
        bump = torch.zeros(columns.stop - columns.start)
        if columns.start <= 3 < columns.stop:
            bump[3 - columns.start] = 2.0
        return values + where * bump

    with RowEditor(subject) as editor:
        clean = editor.run(whole)
        changed = editor.run(whole, edit)
    log_p, log_q = (x.logits[0, 5:-1].double().log_softmax(-1) for x in (clean, changed))
    of_logits = rounding(N_TERMS, float(clean.logits.abs().max()))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    assert (np.abs(one.kl - kl) <= [kl_rounding(x, of_logits) for x in kl]).all()
    surprise = -log_p.gather(-1, torch.from_numpy(one.token_ids)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(one.surprise, surprise, rtol=0, atol=2 * of_logits)
    assert_same_up_to_rounding(one.rows, clean.rows[0, 6:-1], n_terms=N_TERMS)


@pytest.mark.parametrize("everywhere", [False, True])
def test_prompts_of_other_lengths_in_the_batch_change_nothing(subject, everywhere):
    """Text marks, noise, the end of each text and the changed rows are a prompt's own."""
    prompts = [
        Opening(ids, torch.arange(len(ids)) % 2 == 0, (7, i))
        for i, ids in enumerate((PROMPT[:2], PROMPT, PROMPT[1:4], PROMPT.flip(0)))
    ]

    def of_text(rows, is_text):
        added = torch.zeros_like(rows)
        added[..., 3] = 4.0 * is_text
        return added

    changes = [None, Change(of_text), Change(lambda rows, _: -rows, held=True)]
    how = {"samples": 2, "max_new_tokens": 8, "temperature": 1.0, "everywhere": everywhere}
    with RowEditor(subject) as editor:
        together = continue_prompts(editor, prompts, changes, **how)
        alone = [continue_prompts(editor, [prompt], changes, **how)[0] for prompt in prompts]
        largest = float(editor.run(PROMPT[None]).logits.abs().max())
    of_logits = 4 * rounding(N_TERMS, largest)  # those of the changed texts are larger
    for prompt, one in zip(together, alone, strict=True):
        for change, expected in zip(prompt, one, strict=True):
            for text, other in zip(change, expected, strict=True):
                assert text.token_ids.tolist() == other.token_ids.tolist()
                assert text.is_text.tolist() == other.is_text.tolist()
                assert_same_up_to_rounding(text.rows, other.rows, n_terms=N_TERMS)
                np.testing.assert_allclose(text.surprise, other.surprise, rtol=0, atol=of_logits)
                gap = np.abs(text.kl - other.kl)
                assert (gap <= [kl_rounding(x, of_logits) for x in other.kl]).all()
    assert len({tuple(x.token_ids) for texts in together for row in texts for x in row}) > 12
    assert any(text.kl.max() > 0.1 for texts in together for text in texts[1])


@torch.inference_mode()
def test_rows_held_at_nothing_are_the_base_model(subject):
    nothing = Change(lambda rows, counts: torch.zeros_like(rows), held=True)
    with RowEditor(subject) as editor:
        (((one,),),) = continue_prompts(
            editor, [Opening(PROMPT, TEXT)], [nothing], max_new_tokens=8, everywhere=True
        )
        ids = PROMPT[None]
        for token in one.token_ids:
            assert int(editor.base(ids)[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_taking_out_everything_that_a_dictionary_sees_is_the_base_model(
    dirs, subject, dataset_file, tmp_path
):
    store = ActivationStore.open(make_texts(dirs, dataset_file, tmp_path / "s", num_examples=2))
    sae = each_column(store)
    held = Change(lambda rows, counts: torch.zeros_like(rows), held=True)

    def of(rows, _counts):
        return rows - sae.decode(sae.encode(rows))

    (by_code,), (by_hand,) = written(
        subject, [Change(of, held=True), held], everywhere=True, temperature=1.0
    )
    assert by_code.token_ids.tolist() == by_hand.token_ids.tolist()


def test_all_changes_meet_the_same_noise_in_any_batch(subject):
    given = {"samples": 3, "temperature": 1.0, "seed": (7, 1)}
    alone = written(subject, [None], **given)[0]
    together = written(subject, [push(9.0), None, push(0.0)], **given)
    for sample_, (one, other, third) in enumerate(
        zip(alone, together[1], together[2], strict=True)
    ):
        assert one.token_ids.tolist() == other.token_ids.tolist() == third.token_ids.tolist()
        assert sample_ < 3
    assert len({tuple(one.token_ids) for one in alone}) > 1
    other_seed = written(subject, [None], **{**given, "seed": (8, 1)})[0]
    assert [tuple(x.token_ids) for x in other_seed] != [tuple(x.token_ids) for x in alone]


def test_an_adapter_that_writes_nothing_cannot_be_steered(dirs, tmp_path):
    def silence(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()

    save_adapter(dirs[0], tmp_path / "adapter", change=silence, r=1)
    silent = load(tmp_path / "adapter", dirs[0])
    (plain,), (pushed,) = written(silent, [None, push(100.0)])
    assert plain.token_ids.tolist() == pushed.token_ids.tolist()
    assert not pushed.kl.any()


def test_hooks_are_gone_after_a_change_that_raised(subject):
    def raises(rows, counts):
        raise RuntimeError("no")

    def n_hooks():
        return sum(len(module._forward_hooks) for module in subject.model.modules())

    before = n_hooks()
    with pytest.raises(RuntimeError, match="no"):
        written(subject, [Change(raises)])
    assert n_hooks() == before
