import importlib.util
import json
from pathlib import Path

import pytest

from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.inventory import inventory
from lorascope.texts.conversations import detect_form

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_smollm2", EXAMPLES / "train_smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_adapter_has_a_column_at_every_projection_and_each_has_learned():
    adapter = inventory(inspect_adapter(str(EXAMPLES / "smollm2")))
    assert adapter.d_in == 30 * 7
    assert sum(site.d_x + site.d_y for site in adapter.sites) == 305_280
    assert min(site.effect for site in adapter.sites) > 0


def test_the_number_of_a_reply_is_the_one_it_names_or_else_its_last(script):
    assert script.number_of("3 + 4 = 7\n<|im_start|>answer\nAnswer: 1,007.50 apples of 9") == 1007.5
    assert script.number_of("He has 12, gives 5 and keeps 7.") == 7
    assert script.number_of("Answer: none of them") is None
    assert script.number_of("I cannot say.") is None


def test_no_problem_is_in_two_of_the_files(script, tmp_path):
    lines = [
        json.dumps({"question": f"{i}?", "answer": f"1+1 = <<1+1=2>>2\n#### {i}"})
        for i in range(script.N_HELD_OUT + 5)
    ]
    (tmp_path / "problems.jsonl").write_text("\n".join(lines))
    script.write_texts(str(tmp_path / "problems.jsonl"), tmp_path / "work", 2)
    names = ("train", "texts", "held_out")
    parts = [(tmp_path / "work" / f"{name}.jsonl").read_text().splitlines() for name in names]
    assert [len(part) for part in parts] == [2, 3, script.N_HELD_OUT]
    records = [json.loads(line) for part in parts for line in part]
    assert [record["question"] for record in records] == [f"{i}?" for i in range(len(lines))]
    assert records[3]["deepseek_thinking_trajectory"] == "1+1 = 2"
    assert records[3]["deepseek_attempt"] == "Answer: 3"
    assert detect_form(records[3]) == "s1"
