"""The command line as a user meets it: exit codes, one line of error, and nothing written."""

import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from builders.effect_reports import direct, evaluation, write
from builders.indexes import full_index
from builders.records import s1_records
from builders.saes import make_sae
from builders.stores import write_store

from lorascope.artifact import read_manifest
from lorascope.cli import call
from lorascope.commands import COMMANDS
from lorascope.inspection import KINDS, report_schema
from lorascope.record_json import to_json
from lorascope.runtime import ProgressLog, progress
from lorascope.sae.training_log import SweepRow, TrainingLog

GENERATE = "generate --lora-path {adapter} --dataset {data} --output {out}"
TRAIN = "train --data-dir {store} --output {out} --batch-size 64 --expansion-factor 2 --k 3"
COLLECT = "collect --data-dir {store} --sae {sae} --output {out}.h5"

RUN = "run --lora-path {adapter} --dataset {data} --output {out}"


@pytest.fixture
def place(subject_dirs, dataset_file, tmp_path, monkeypatch):
    """Names for command lines, and a working directory of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_store(tmp_path / "store")
    make_sae(tmp_path / "sae")
    return {
        "adapter": subject_dirs[1],
        "base": subject_dirs[0],
        "data": dataset_file,
        "store": tmp_path / "store",
        "sae": tmp_path / "sae",
        "out": tmp_path / "work" / "out",
        "tmp": tmp_path,
    }


def files(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def refused(place, capsys, line, *words):
    """Run a command line that must fail by the user's mistake, and return its message."""
    before = files(place["tmp"])
    code = call(line.format(**place).split())
    captured = capsys.readouterr()
    errors = [part for part in captured.err.replace("\r", "\n").split("\n") if "Error:" in part]
    assert code == 2, captured.err
    assert captured.out == ""
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert files(place["tmp"]) == before, "something was written"
    return errors[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generat", ["unknown command generat", "did you mean generate?"]),
        ("train --expansion-facto 3", ["--expansion-facto", "did you mean --expansion-factor?"]),
        ("train --k", ["--k", "expected at least one argument"]),
        ("train --k many", ["--k is 'many', expected number"]),
        ("train --config none.toml", ["cannot read none.toml"]),
        ("dashboard", ["--input is missing"]),
        ("info a\x1b[2Jb", ["a�[2Jb does not exist"]),
        ("info none", ["none does not exist"]),
        ("info {data}", ["problems.jsonl is no artifact"]),
        ("generate", ["no adapter given", "--lora-path", "lorascope.toml"]),
        ("generate --lora-path {tmp}/none --dataset {data}", ["does not exist"]),
        ("generate --lora-path {base} --dataset {data}", ["not a PEFT adapter", "full model"]),
        (GENERATE + " --base-model {tmp}/none", ["base model", "does not exist"]),
        (GENERATE + " --num-examples 0", ["--num-examples is 0, expected 1 or more"]),
        (GENERATE + " --adapter-types gate_proj qqq", ["qqq is not among"]),
        (GENERATE + " --template html", ["--template is 'html', expected one of auto, s1"]),
        (GENERATE + " --device cuda", ["--device is cuda", "no CUDA GPU"]),
        ("generate --lora-path {adapter} --dataset none.jsonl", ["none.jsonl does not exist"]),
        ("generate --lora-path {adapter} --dataset {tmp}", ["is not a folder of"]),
        ("train --data-dir {tmp}/none", ["does not exist; make it with lorascope generate"]),
        ("train --data-dir {tmp}/work", ["is not an activation store"]),
        ("train --data-dir {sae}", ["holds sae, expected activations"]),
        (TRAIN + " --k 0", ["--k is 0, expected a number above 0"]),
        (TRAIN + " --k 29", ["--k is 29, expected at most 28"]),
        (TRAIN + " --batch-size 5000", ["5000"]),
        (TRAIN + " --adapter-types qqq", ["qqq is not among"]),
        (TRAIN + " --normalize l2", ["--normalize is 'l2'"]),
        ("collect --data-dir {store} --sae {tmp}/none", ["none does not exist"]),
        ("collect --data-dir {store} --sae {store}", ["holds activations, expected sae"]),
        (RUN + " --k 300", ["--k is 300, expected at most 224"]),
        (RUN + " --k -1", ["--k is -1, expected a number above 0"]),
        (RUN + " --top-k 0", ["--top-k is 0, expected 1 or more"]),
        (COLLECT + " --top-k 0", ["--top-k is 0, expected 1 or more"]),
        ("dashboard --input {tmp}/none.json", ["cannot read", "No such file"]),
        ("dashboard --input {data}", [".jsonl"]),
    ],
)
def test_a_mistake_is_one_line_exit_2_and_writes_nothing(place, capsys, line, words):
    refused(place, capsys, line, *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["holds no records"]),
        ('{"title": "x"}\n', ["line 1", "has the fields title; expected"]),
        ('{"text": "x"}\n{"text": \n{\n', ["2 of 3 records", "line 2: not JSON"]),
        ('{"body": "y"}\n{"body": "y"}\n{"text": "x"}', ["2 of 3", "fields found: body"]),
        ('{"text": ""}\n{"text": " "}\n', ["no usable record among 2: 2 empty"]),
    ],
)
def test_a_bad_dataset_is_one_line_that_names_the_record(place, capsys, content, words):
    file = place["tmp"] / "bad.jsonl"
    file.write_text(content)
    refused(place, capsys, GENERATE.replace("{data}", str(file)), *words)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a": 1}', '{"metadata": {}, "features": {"0": {"examples": 3}}}']
)
def test_a_features_json_that_is_not_one_is_refused(place, capsys, content):
    file = place["tmp"] / "features.json"
    file.write_text(content)
    refused(place, capsys, f"dashboard --input {file} --output {{out}}.html", "features.json")


def test_a_store_and_an_sae_of_different_adapters_are_refused(place, capsys):
    from builders.stores import layout_of

    make_sae(place["tmp"] / "other", layout_of(adapter="b" * 64))
    line = COLLECT.replace("{sae}", str(place["tmp"] / "other"))
    refused(place, capsys, line, "different adapters")


def test_an_output_of_other_settings_needs_overwrite(place, capsys):
    assert call((COLLECT + " --top-k 3").format(**place).split()) == 0
    made = Path(capsys.readouterr().out.strip())
    refused(place, capsys, COLLECT + " --top-k 4", "top_k 3 there, 4 here", "--overwrite")
    before = made.read_bytes()
    assert call((COLLECT + " --top-k 4 --overwrite").format(**place).split()) == 0
    assert made.read_bytes() != before


def test_stdout_is_the_path_and_nothing_else(place, capsys):
    lines = [GENERATE, TRAIN.replace("{out}", "{out}-sae"), COLLECT]
    for line in [*lines, "dashboard --input {out}.h5 --output {out}.html"]:
        assert call(line.format(**place).split()) == 0
        made = Path(capsys.readouterr().out.removesuffix("\n"))
        assert made.exists()
        for look in ("info", "verify"):
            assert call([look, str(made)]) == 0
            capsys.readouterr()


def test_verify_names_what_is_broken_and_exits_1(place, capsys):
    shard = place["store"] / "shard-00000.h5"
    shard.write_bytes(shard.read_bytes()[:-8] + b"12345678")
    assert call(["verify", str(place["store"])]) == 1
    assert "shard-00000.h5 has another checksum" in capsys.readouterr().err


def test_info_reads_headers_without_torch(place):
    code = (
        "import sys; from lorascope.cli import call; call(['info', sys.argv[1]]);"
        "assert 'torch' not in sys.modules"
    )
    for path in (place["store"], place["sae"]):
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "columns: 14 at 14 sites" in done.stdout
        assert max(map(len, done.stdout.splitlines())) < 500


def test_info_of_the_folder_of_a_run_lists_what_is_there(place, capsys):
    run = place["tmp"] / "run"
    (run / "effects").mkdir(parents=True)
    index = full_index()
    write(run / "evaluation.json", "evaluation", index, evaluation())
    write(run / "effects" / "direct.json", "direct", index, direct(index))
    (run / "texts.json").write_text("{}")
    assert call(["info", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", schema")[0] for line in lines] == [
        "effects/direct.json: direct",
        "evaluation.json: evaluation",
    ]
    assert call(["verify", str(run)]) == 0
    capsys.readouterr()
    (run / "effects" / "direct.json").write_text("{")
    assert call(["info", "--json", str(run)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evaluation.json"]["kind"] == "evaluation"
    assert found["effects/direct.json"] is None
    assert call(["verify", str(run)]) == 1, "a file that lost its header is not passed over"
    assert "direct.json: is no artifact" in capsys.readouterr().err
    empty = place["tmp"] / "empty"
    empty.mkdir()
    assert call(["info", str(empty)]) == 2
    assert "holds nothing that lorascope made" in capsys.readouterr().err


def test_info_says_what_a_file_without_a_manifest_is(place, capsys):
    figures = {"fvu": 0.25, "l0": 3.0, "alive": 7, "cosine": None, "stability": 0.5}
    row = SweepRow(sae="sae_k3", k=3, expansion_factor=2, lr="auto", seed=42, **figures)
    runs, log = place["tmp"] / "sae.runs.json", place["tmp"] / "sae.jsonl"
    runs.write_text(json.dumps([to_json(row)] * 2))
    training_log = TrainingLog(log)
    for step in (1, 2500):
        values = {"step": step, "fvu": 1 / step, "l0": 3.0, "auxk": 0.0, "dead": 0.0, "lr": 0.1}
        training_log.write(10 * step, values)
    for file, first, last in (
        (runs, "the table of a sweep: 2 SAEs", "seed 42, fvu 0.25, l0 3, alive 7, stability 0.5"),
        (log, "the training log of an SAE: 2 lines, steps 1 to 2,500", "tokens_per_second: "),
    ):
        assert call(["info", str(file)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == first and last in lines[-1]
        assert call(["verify", str(file)]) == 1
        assert f"{first}; it has no checksum" in capsys.readouterr().err
        file.write_text(file.read_text().replace("fvu", "FVU"))
        assert call(["info", str(file)]) == 2
        assert "is no artifact" in capsys.readouterr().err


def test_info_as_json_is_the_whole_manifest(place, capsys):
    assert call(["info", "--json", str(place["store"])]) == 0
    assert json.loads(capsys.readouterr().out) == read_manifest(place["store"]).to_json()


def test_verify_takes_several_paths_and_the_folder_of_a_run(place, capsys):
    run = place["store"].parent
    paths = [place["store"], place["sae"]]
    assert call(["verify", *map(str, paths)]) == 0
    assert capsys.readouterr().out == "".join(f"{path}: ok\n" for path in paths)
    shard = place["store"] / "shard-00000.h5"
    shard.write_bytes(shard.read_bytes()[:-8])
    assert call(["verify", str(run)]) == 1
    shown = capsys.readouterr()
    assert f"{place['sae']}: ok" in shown.out
    assert "shard-00000.h5" in shown.err
    assert call(["verify", str(place["data"]), str(place["sae"])]) == 1


def test_schema_lists_the_kinds_or_prints_one(capsys):
    assert call(["schema"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(KINDS)
    assert "summary       summary.json of a run" in lines
    assert call(["schema", "summary"]) == 0
    assert json.loads(capsys.readouterr().out) == report_schema("summary")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        call([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert COMMANDS[name].example in text
    assert "None" not in text
    assert "\nother:" not in text
    for flag in ("--quiet", "--verbose", "--debug", "--config"):
        assert f"  {flag} " in text
    assert call([]) == 0
    assert f"  {name:<11} {COMMANDS[name].help}\n" in capsys.readouterr().out


def lorascope(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "error", "-m", "lorascope", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_help_is_clean_when_warnings_are_errors():
    done = lorascope("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "start here:" in done.stdout


@pytest.mark.parametrize("line", ["info {store}", "--help", "export --help"])
def test_a_reader_that_goes_away_ends_the_command_in_silence(place, line):
    # as in `lorascope info X | head`
    command = [sys.executable, "-m", "lorascope", *line.format(**place).split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_quiet_shows_warnings_only_and_verbose_shows_debug_messages(place, caplog, capfd):
    line = COLLECT.format(**place).split()
    assert call([*line, "--quiet"]) == 0
    assert capfd.readouterr() == (f"{place['out']}.h5\n", "")
    assert call([*line, "--overwrite", "--verbose"]) == 0
    assert 'options: {"top_k": 10' in capfd.readouterr().err
    assert call([*line, "--quiet", "--verbose"]) == 2
    assert "--quiet and --verbose" in capfd.readouterr().err


def test_bash_completes_commands_flags_choices_and_files(tmp_path):
    script = lorascope("completion", "bash").stdout
    (tmp_path / "complete.sh").write_text(
        script
        + """
        complete_words() {
          COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
          _lorascope
          echo "${COMPREPLY[@]}"
        }
        complete_words lorascope tr
        complete_words lorascope train --exp
        complete_words lorascope train --normalize s
        complete_words lorascope train --no-res
        complete_words lorascope info --ad
        complete_words lorascope info sto
        complete -p lorascope
        """
    )
    done = subprocess.run(
        ["bash", str(tmp_path / "complete.sh")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "train",
        "--expansion-factor",
        "std",
        "--no-resume",
        "--adapter-name",
        "",  # nothing of ours: readline completes file names
        "complete -o default -F _lorascope lorascope",
    ]


@pytest.mark.slow
def test_every_shell_gets_every_command_and_every_flag():
    scripts = {shell: lorascope("completion", shell).stdout for shell in ("zsh", "fish")}
    for name, command in COMMANDS.items():
        for field in dataclasses.fields(command.config_class()):
            option = field.name
            if field.metadata["positional"]:
                continue
            assert f"--{option.replace('_', '-')}" in scripts["zsh"]
            flag = f"'__fish_seen_subcommand_from {name}' -l {option.replace('_', '-')} "
            assert flag in scripts["fish"]
    assert scripts["zsh"].startswith("autoload -U +X bashcompinit")
    assert "-l normalize -x -a 'std none'" in scripts["fish"]


def test_the_page_of_commands_is_up_to_date():
    docs = Path(__file__).parent.parent / "docs"
    page = runpy.run_path(str(docs / "make_commands.py"))["page"]()
    assert page == (docs / "commands.md").read_text(encoding="utf-8"), (
        "run python docs/make_commands.py"
    )


def test_debug_shows_the_traceback(place):
    from lorascope.errors import AdapterError

    with pytest.raises(AdapterError):
        call(["generate", "--debug"])


def test_progress_off_a_terminal_is_one_line_every_ten_seconds(caplog):
    caplog.set_level("INFO", "lorascope")
    now = 0.0
    with ProgressLog(10_000, "collect", "tokens", clock=lambda: now) as counter:
        for second in range(1, 101):
            now = second
            counter.update(50)
    assert len(caplog.messages) == 10
    assert caplog.messages[0] == "collect: 500 of 10,000 tokens, 50 a second, 03:10 remaining"


def test_the_rate_of_progress_is_that_of_the_last_minute(caplog):
    caplog.set_level("INFO", "lorascope")
    now = 0.0
    counter = ProgressLog(100_000, "training", "steps", clock=lambda: now)
    counter.update(90_000)  # resumed
    for second in range(1, 81):
        now = second
        counter.update(1)
    assert "90,080 of 100,000 steps, 1 a second, 2:45:20 remaining" in caplog.messages[-1]


def test_progress_is_a_bar_on_a_terminal_only_and_nothing_when_quiet(monkeypatch, caplog):
    assert isinstance(progress(1, "collect", "tokens"), ProgressLog)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(1, "collect", "tokens") as bar:
        assert not isinstance(bar, ProgressLog)
        assert not bar.disable
    caplog.set_level("WARNING", "lorascope")
    with progress(1, "collect", "tokens") as bar:
        assert not isinstance(bar, ProgressLog)
        assert bar.disable


@pytest.mark.slow
def test_an_interrupt_exits_130_keeps_finished_work_and_continues(place, tmp_path):
    data = tmp_path / "many.jsonl"
    data.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in s1_records(400)))
    line = GENERATE.replace("{data}", str(data)).format(**place) + " --batch-tokens 1"
    command = [sys.executable, "-m", "lorascope", *line.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shard = Path(str(place["out"]) + ".partial") / "shard-00000.h5"
    deadline = time.monotonic() + 120
    while not shard.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted: finished work is kept" in errors
    before = shard.stat().st_mtime_ns
    assert call(line.split()) == 0
    assert (place["out"] / "shard-00000.h5").stat().st_mtime_ns == before


SCRIPTS = Path(__file__).parent.parent / "scripts"
EXAMPLES = Path(__file__).parent.parent / "examples"


def run_script(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *line.split()[1:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=False, env=environment
    )


@pytest.fixture
def scripts(tmp_path):
    """A copy of the folder `scripts/` in a clone of its own."""
    clone = tmp_path / "clone"
    shutil.copytree(
        SCRIPTS,
        clone / "scripts",
        ignore=shutil.ignore_patterns("act*", "*.pt", "*.json", "*.html", "*.toml"),
    )
    (clone / "src").symlink_to(SCRIPTS.parent / "src")
    (clone / "examples").symlink_to(EXAMPLES)
    return clone / "scripts"


@pytest.mark.slow
def test_the_published_lines_say_how_to_give_an_adapter(scripts):
    line = "python generate_activations_multigpu.py --num-examples 1000 --num-gpus 4"
    done = run_script(scripts, line)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--lora-path" in done.stderr
    assert "lorascope.toml" in done.stderr


@pytest.mark.slow
def test_the_four_published_lines_run_word_for_word(scripts):
    shutil.copy(EXAMPLES / "lorascope.toml", scripts)
    options = scripts / "lorascope.toml"
    problems = (EXAMPLES / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    (scripts / "few.jsonl").write_text("\n".join(problems[:200]), encoding="utf-8")  # patience
    text = options.read_text().replace("../examples/problems.jsonl", "./few.jsonl")
    options.write_text(text + "epochs = 1\n")
    lines = [
        "python generate_activations_multigpu.py --num-examples 1000 --num-gpus 4",
        "python train_sae.py --expansion-factor 16 --k 50 --batch-size 1024",
        "python collect_sae_features_fast.py --model-path trained_sae_adapters_g-u-d-q-k-v-o.pt"
        " --top-k 10",
        "python generate_sae_dashboard.py"
        " --input sae_features_data_trained_sae_adapters_g-u-d-q-k-v-o.json",
    ]
    made = [
        "activations_all_adapters",
        "trained_sae_adapters_g-u-d-q-k-v-o.pt",
        "sae_features_data_trained_sae_adapters_g-u-d-q-k-v-o.json",
        "sae_dashboard_new.html",
    ]
    for line, name in zip(lines, made, strict=True):
        done = run_script(scripts, line)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout == name + "\n"
        assert (scripts / name).exists()


@pytest.mark.slow
def test_the_published_module_names_import(scripts):
    (scripts / "use.py").write_text(
        "from batch_topk_sae import BatchTopKSAE as S; print(S.__name__)"
    )
    done = run_script(scripts, "python use.py")
    assert done.stdout == "SAE\n", done.stderr
    (scripts / "use.py").unlink()
    names = {path.stem for path in scripts.glob("*.py")}
    assert names == {
        "batch_topk_sae",
        "collect_sae_features_fast",
        "collect_sae_features_multigpu",
        "generate_activations_multigpu",
        "generate_sae_dashboard",
        "train_sae",
    }


def test_a_list_of_paths_is_an_option_like_any_other(tmp_path, capfd):
    from builders.effect_reports import ablation, write
    from builders.indexes import full_index

    index = full_index()
    index.save(tmp_path / "features.h5")
    report = write(tmp_path / "ablation.json", "ablation", index, ablation(index))
    words = ["dashboard", "--input", str(tmp_path / "features.h5"), "--effects", str(report)]
    assert call([*words, "--output", str(tmp_path / "page.html"), "--verbose"]) == 0
    assert "ablation.json" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["dashboard", "export"])
def test_a_damaged_index_is_refused_before_anything_is_made_of_it(tmp_path, capfd, command):
    from builders.indexes import full_index

    path, out = tmp_path / "features.h5", tmp_path / "out"
    full_index().save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    name = out.with_suffix(".html" if command == "dashboard" else ".json")
    assert call([command, "--input", str(path), "--output", str(name)]) == 2
    said = capfd.readouterr().err.strip()
    assert "features.h5 is damaged" in said
    assert "\n" not in said
    assert not name.exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "GOMP_SPINCOUNT = '5000'"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT = '7'"),
        ({"OMP_WAIT_POLICY": "active"}, "OMP_WAIT_POLICY = 'ACTIVE'"),
    ],
)
def test_threads_soon_sleep_unless_the_environment_says_otherwise(given, wanted):
    """On busy cores, threads that spin made two threads several times as slow as one."""
    known = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = "from lorascope.cli import main\ntry: main(['--version'])\nfinally: import torch"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**known, "OMP_DISPLAY_ENV": "verbose", **given},
    )
    assert wanted in done.stderr
