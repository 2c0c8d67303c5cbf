import gzip
import json
import re
from pathlib import Path

import demo_problems as problems
import pytest
from demo_problems import CLASSES, FIELDS, SPLITS, answer_of, make_problem, write_jsonl

from lorascope.demo import demo
from lorascope.demo.demo import N_PROBLEMS, DemoConfig
from lorascope.errors import ConfigError

DEMO_0 = "Anna takes 8 eggs for 6 € each."
EQUATION = re.compile(r"(\d+) ([+−×÷]) (\d+) = (\d+)")
PROBLEMS = [make_problem(split, index) for split in SPLITS for index in range(300)]


def is_true(left: str, op: str, right: str, result: str) -> bool:
    a, b, c = int(left), int(right), int(result)
    return {"+": a + b == c, "−": a - b == c, "×": a * b == c, "÷": a == b * c}[op]


def parts(problem: problems.Problem, field: str, name: str) -> list[str]:
    text = getattr(problem, field)
    return [text[start:end] for start, end in problem.spans[field][name]]


def test_a_problem_depends_only_on_its_address():
    assert make_problem("demo", 7) == make_problem("demo", 7)
    assert make_problem("demo", 7) != make_problem("demo", 8)
    # Pinned: the shipped weights were trained on exactly these texts.
    assert DEMO_0 in make_problem("demo", 0).question


def test_splits_share_no_question():
    questions = {split: {p.question for p in PROBLEMS if p.split == split} for split in SPLITS}
    for split, others in questions.items():
        assert all(problems.split_of(question) == split for question in others)
    assert not questions["train"] & (questions["eval"] | questions["demo"])


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, eval, demo"):
        make_problem("test", 0)


def test_every_attempt_ends_in_the_right_marked_answer():
    for p in PROBLEMS:
        assert answer_of(p.deepseek_attempt) == p.answer
        assert p.deepseek_attempt.endswith(f"nswer: {p.answer}")


def test_every_solution_is_true_and_ends_in_the_answer():
    for p in PROBLEMS:
        steps = EQUATION.findall(p.solution)
        assert 2 <= len(steps) <= 4
        assert all(is_true(*step) for step in steps)
        assert steps[-1][-1] == p.answer


def test_every_wrong_equation_of_a_trace_is_noticed_at_once():
    n_wrong = 0
    for p in PROBLEMS:
        trace = p.deepseek_thinking_trajectory
        for match in EQUATION.finditer(trace):
            if not is_true(*match.groups()):
                n_wrong += 1
                assert re.match(r"\. (Wait|Hmm, wait)", trace[match.end() :])
    assert n_wrong > 20


def test_numbers_stay_small():
    for p in PROBLEMS:
        assert all(int(n) <= 99 for n in re.findall(r"\d+", p.question))
        assert 2 <= int(p.answer) <= 99


def test_the_last_answer_marker_counts():
    assert answer_of("The answer is 12. Wait. Final answer: 15") == "15"
    assert answer_of("**Answer:** 7") == "7"
    assert answer_of("answer → 007") == "7"
    assert answer_of("There are 12 pens.") is None
    assert answer_of("Answer: none") is None


def test_spans_are_sorted_disjoint_and_hold_what_they_say():
    shapes = {
        "operator": r"[+−×÷=]",
        "digit": r"\d",
        "carried": r"\d+",
        "check": r"(?i)wait|check|verify",
        "answer_marker": r"(Final answer|[Aa]nswer|Therefore|Thus|Hence):?",
        "name": r"\w{2,}",
    }
    assert set(shapes) == set(CLASSES)
    for p in PROBLEMS:
        for field in FIELDS:
            assert set(p.spans[field]) == set(CLASSES)
            for name, spans in p.spans[field].items():
                ends = [at for span in spans for at in span]
                assert ends == sorted(ends)
                assert all(re.fullmatch(shapes[name], part) for part in parts(p, field, name))


def test_a_carried_number_was_computed_before_it_is_used():
    field = "deepseek_thinking_trajectory"
    for p in PROBLEMS:
        text = p.deepseek_thinking_trajectory
        for start, end in p.spans[field]["carried"]:
            assert re.search(rf"= {text[start:end]}\b", text[:start])
            assert not text[:start].endswith(("⟦", "⟧"))
    assert sum(bool(p.spans[field]["carried"]) for p in PROBLEMS) > 0.9 * len(PROBLEMS)


def test_no_mark_is_left_in_any_text():
    for p in PROBLEMS:
        assert not re.search(r"[⟦⟧{}]", "".join(p.record().values()))


def test_every_class_has_several_forms_and_every_kind_occurs():
    seen = {
        name: {part for p in PROBLEMS for field in FIELDS for part in parts(p, field, name)}
        for name in CLASSES
    }
    assert len(seen["operator"]) == 5
    assert len(seen["digit"]) == 10
    assert len(seen["carried"]) > 50
    assert {"Wait", "wait", "Check", "check", "verify"} <= seen["check"]
    assert {"answer", "Answer:", "Final answer:", "Therefore", "Thus", "Hence"} <= seen[
        "answer_marker"
    ]
    assert {"Zoë", "José", "Søren", "Łukasz"} <= seen["name"]
    assert len({p.kind for p in PROBLEMS}) == 6
    assert len({p.question for p in PROBLEMS}) > 0.98 * len(PROBLEMS)


def test_a_jsonl_file_has_the_s1_fields_and_starts_where_asked(tmp_path: Path):
    path = tmp_path / "problems.jsonl"
    write_jsonl(path, 3, "demo", start=5)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["demo-5", "demo-6", "demo-7"]
    assert rows[0] == make_problem("demo", 5).record()
    assert {*FIELDS, "solution", "answer"} <= set(rows[0])


def test_the_shipped_problems_are_those_of_the_generator(tmp_path):
    write_jsonl(tmp_path / "problems.jsonl", 40, "demo")
    shipped = gzip.decompress(demo.PROBLEMS.read_bytes()).splitlines(keepends=True)
    assert b"".join(shipped[:40]) == (tmp_path / "problems.jsonl").read_bytes()
    assert len(shipped) == N_PROBLEMS
    with pytest.raises(ConfigError, match="expected 2000 or fewer"):
        DemoConfig(num_examples=N_PROBLEMS + 1)
