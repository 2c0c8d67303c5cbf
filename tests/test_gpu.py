"""`make gpu`: what can be shown of it without a GPU.

Every part runs small on the CPU, the commands for the GPU are understood by their scripts, and
whatever ends it early leaves what was measured.
"""

import argparse
import json
import re
import runpy
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu import GPU_TESTS, PARTS, Part, figures_of, needed, run_all, run_part, table  # noqa: E402


def given(tmp_path: Path, **values) -> Namespace:
    options = {"device": "cpu", "tiny": True, "minutes": 30.0, "only": None}
    return Namespace(**{**options, "output": tmp_path / "out" / "gpu", **values})


def read(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_rehearsal_runs_every_part_and_finds_its_figures(tmp_path, monkeypatch):
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    assert run_all(given(tmp_path)) == 0, read(tmp_path)
    parts = read(tmp_path)["parts"]
    assert list(parts) == [part.name for part in PARTS]
    for name, part in parts.items():
        assert part["status"] == "done", (name, part["output"])
        assert part["figures"], (name, part["output"])
    assert re.match(r"1 passed", parts["tests"]["figures"]["tests"])
    apart = [float(text) for name, text in parts["stages"]["figures"].items() if "apart" in name]
    assert apart == [0.0, 0.0], "the CPU agrees with itself"
    for name in ("train", "train wide"):
        assert {"lorascope", "published", "reached"} <= parts[name]["figures"].keys()
    for name in ("capture", "capture 32b"):
        assert {"lorascope", "bare", "published"} <= parts[name]["figures"].keys()
    text = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert text.count("\n|") > len(PARTS)


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    marker = tmp_path / "late"
    child = f"import time; time.sleep(4); open({str(marker)!r}, 'w')"
    program = (
        "import subprocess, sys, time; print('FIGURE a = 1', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    (tmp_path / "slow.py").write_text(program, encoding="utf-8")
    part = Part("slow", 1, [], [str(tmp_path / "slow.py")])
    begun = time.monotonic()
    found = run_part(part, True, 2)
    assert time.monotonic() - begun < 30
    assert found["status"] == "cut off"
    assert found["figures"] == {"a": "1"}
    time.sleep(4)
    assert not marker.exists()


def test_each_part_is_written_before_the_next_one_begins(tmp_path):
    def run(part: Part, tiny: bool, limit: float) -> dict:
        done = read(tmp_path)["parts"] if (tmp_path / "out").exists() else {}
        assert list(done) == [one.name for one in PARTS[: len(done)]]
        if len(done) == 3:
            raise KeyboardInterrupt  # the machine is taken away
        return {"status": "done", "seconds": 1.0, "figures": {"x": "1 | 2"}}

    with pytest.raises(KeyboardInterrupt):
        run_all(given(tmp_path), run)
    assert list(read(tmp_path)["parts"]) == [part.name for part in PARTS[:3]]
    assert r"1 \| 2" in (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")


def test_without_time_parts_are_left_out_and_a_failed_one_is_told(tmp_path):
    limits = []

    def run(part: Part, tiny: bool, limit: float) -> dict:
        limits.append(limit)
        return {"status": "failed (1)", "seconds": 1.0, "figures": {}}

    status = run_all(given(tmp_path, tiny=False, device="cuda", only="train,tests"), run)
    assert status == 1
    assert limits == [150, 75], "the limits of both, in the order of the parts"
    assert run_all(given(tmp_path, minutes=0.0), run) == 0
    assert {part["status"] for part in read(tmp_path)["parts"].values()} == {"left out"}
    assert len(limits) == 2


class UnderstoodError(Exception):
    """The arguments of a script were accepted."""


@pytest.mark.parametrize("part", [part for part in PARTS if "gpu.py" not in part.command[0]])
@pytest.mark.parametrize("which", ["command", "tiny"])
def test_the_scripts_understand_the_commands(part, which, monkeypatch):
    words = getattr(part, which)
    if words[0] == "-m":
        assert words[1] == "pytest"
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *args):
        parse(self, *args)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(UnderstoodError):
        runpy.run_path(str(ROOT / "benchmarks" / words[0]), run_name="__main__")


def test_all_tests_that_need_a_gpu_are_in_it():
    files = {
        f"tests/{file.name}"
        for file in (ROOT / "tests").glob("test_*.py")
        if re.search(r"^\s*@(on_device|pytest\.mark\.gpu)", file.read_text("utf-8"), re.M)
    }
    assert files == set(GPU_TESTS)


def test_figures_are_found_in_what_the_scripts_print():
    named = {part.name: part for part in PARTS}
    speed = (
        "  lorascope                     1.23    1.20 to 1.30 3,333,333  1.00 (1.00 to 1.00)\n"
        "  sae_lens                      9.87    9.00 to 10.1   415,000  8.02 (7.90 to 8.10)\n"
        "  - Adam, fused                 0.94    0.91 to 0.99\n"
        "  reached: lorascope 61%, sae_lens 8%\n"
    )
    assert figures_of(named["train"], speed) == {
        "lorascope": "3,333,333",
        "sae_lens": "415,000",
        "reached": "lorascope 61%, sae_lens 8%",
    }
    capture = (
        "  lorascope        21,000 tokens/s   time / bare: all 1.045, median 1.040 (1 to 2)\n"
        "  400 of 700 TFLOP/s measured for a product of 8192 (57%); 10 M tokens in 8 minutes\n"
    )
    assert figures_of(named["capture"], capture) == {
        "lorascope": "21,000 tokens/s   time / bare: all 1.045,",
        "700 TFLOP/s measured for a product of 8192": "57%",
    }
    tests = "F\nFAILED tests/test_a.py::test_b - AssertionError\n1 failed, 80 passed in 9.9s\n"
    assert figures_of(named["tests"], tests) == {
        "FAILED": "tests/test_a.py::test_b",
        "tests": "1 failed, 80 passed in 9.9s",
    }


def test_packages_of_torchs_build_stay_with_the_machine():
    names = "torch triton nvidia-cublas cuda-bindings torchvision lorascope sae-lens peft".split()
    report = [{"metadata": {"name": name, "version": "1.0"}} for name in names]
    assert needed(report) == ["peft==1.0", "sae-lens==1.0"]


def test_the_environment_of_a_gpu_is_asked_after_its_work_is_done(monkeypatch, capsys):
    """With `torch.cuda` mocked: every rate is taken between two waits for the device."""
    events = []
    draw = torch.randn
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: events.append("wait"))
    monkeypatch.setattr(torch, "randn", lambda *_, device, dtype: draw(8, 8, dtype=dtype))
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: events.append("mm") or product(a, b))
    gpu.environment(tiny=False)
    assert events == [*["mm"] * 3, "wait", *["mm"] * 10, "wait"] * 2
    figures = figures_of(PARTS[0], capsys.readouterr().out)
    assert figures["device"] == "H200"
    assert len(figures) == 4


def test_a_table_has_a_line_for_each_figure_and_each_part_without_one():
    parts = {
        "a": {"status": "done", "seconds": 1.5, "figures": {"x": "1", "y": "2"}},
        "b": {"status": "left out", "seconds": 0.0, "figures": {}},
    }
    assert table({"parts": parts}).splitlines()[2:] == [
        "| a | done | 1.5 | x | 1 |",
        "|  |  |  | y | 2 |",
        "| b | left out | 0 |  |  |",
    ]
