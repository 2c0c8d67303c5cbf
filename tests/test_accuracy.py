"""What share of problems the shipped subject solves: rows as they are, rebuilt, and at nothing."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders.subjects import load
from demo_problems import answer_of, make_problem
from intervals import wilson

from lorascope.demo.demo import SUBJECT

_FILE = Path(__file__).parent.parent / "benchmarks" / "accuracy.py"
accuracy = SimpleNamespace(**runpy.run_path(str(_FILE)))


@pytest.fixture(scope="module")
def subject():
    return load(SUBJECT / "adapter", SUBJECT / "base")


def test_a_prompt_is_the_chat_up_to_where_the_assistant_begins(subject):
    problems = [make_problem("eval", i) for i in range(2)]
    prompts = accuracy.prompts_of(problems, subject.tokenizer)
    for prompt, problem in zip(prompts, problems, strict=True):
        messages = [{"role": "user", "content": problem.question}]
        text = subject.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert subject.tokenizer.decode(prompt.token_ids) == text


@pytest.mark.slow
@torch.inference_mode()
def test_arms_that_change_nothing_solve_what_the_adapter_solves_by_itself(subject):
    problems = [make_problem("eval", i) for i in range(3)]
    found = accuracy.solved(
        subject,
        problems,
        {"adapter": None, "itself": accuracy.spliced(lambda rows: rows),
         "base": accuracy.without_adapter()},
        max_new_tokens=160,
    )  # fmt: skip
    plain = []
    prompts = accuracy.prompts_of(problems, subject.tokenizer)
    for prompt, problem in zip(prompts, problems, strict=True):
        ids = torch.from_numpy(prompt.token_ids).long()[None]
        out = subject.causal.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=160,
            do_sample=False,
            pad_token_id=0,
        )
        text = subject.tokenizer.decode(out[0, ids.shape[1] :])
        plain.append(answer_of(text) == problem.answer)
    assert found["adapter"] == found["itself"] == plain
    assert any(plain)


def test_wilsons_interval_is_that_of_the_book():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-9)
