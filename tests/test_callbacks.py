"""`RowLogger` in real trainings: stores are those of checkpoints, and the training is as ever."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import trainings
from builders.studies import each_column
from builders.trainings import losses, peft_model, train

from lorascope.activations.generate import GenerateConfig
from lorascope.activations.generate import run as generate
from lorascope.activations.store import ActivationStore
from lorascope.artifact import read_manifest
from lorascope.callbacks import RowLogger
from lorascope.cli import call
from lorascope.errors import AdapterError, ArtifactError, ConfigError
from lorascope.features.collect import CollectConfig
from lorascope.features.collect import run as collect
from lorascope.sae.model import load_sae
from lorascope.sites import TRAINING
from lorascope.subject.step_callback import unwrapped

STEPS = ["step-000000", "step-000002", "step-000004", "step-000006"]


# Trainer, PEFT and accelerate warn of each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


@pytest.fixture(scope="module")
def base(make_subject) -> str:
    return str(make_subject()[0])


@pytest.fixture(scope="module")
def logged(base, dataset_file, tmp_path_factory):
    """A training with its rows logged, and its folder."""
    out = tmp_path_factory.mktemp("logged")
    return train(base, str(out), str(dataset_file)), out


def rows_of(path: Path) -> np.ndarray:
    store = ActivationStore.open(path)
    return store.rows(0, store.n_rows)


def test_a_training_is_the_same_with_and_without_it(base, logged, tmp_path):
    """To the bit: losses, weights and what is drawn at random, dropout included."""
    plain = train(base, str(tmp_path), None)
    trainer, _ = logged
    assert losses(plain) == losses(trainer) and len(losses(plain)) == 6
    theirs = dict(plain.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in trainer.model.named_parameters())
    assert trainer.model.training and plain.model.training


def test_a_step_has_the_rows_of_its_checkpoint_and_every_stage_reads_it(
    base, logged, dataset_file, tmp_path, capsys
):
    _, out = logged
    assert sorted(path.name for path in (out / "rows").iterdir()) == STEPS
    began = read_manifest(out / "rows" / STEPS[0]).parents["adapter"]
    for step in (2, 6):
        made = generate(
            GenerateConfig(
                lora_path=str(out / f"checkpoint-{step}"),
                base_model=base,
                dataset=str(dataset_file),
                num_examples=5,
                store_dtype="float32",
                gauge="raw",
                output=tmp_path / f"checkpoint-{step}",
                device="cpu",
            )
        )
        own, theirs = (read_manifest(p) for p in (out / "rows" / f"step-{step:06d}", made))
        assert own is not None and theirs is not None
        assert np.array_equal(rows_of(out / "rows" / f"step-{step:06d}"), rows_of(made))
        assert own.parents["dataset"] == theirs.parents["dataset"]
        assert own.parents["base_weights"] == theirs.parents["base_weights"]
        assert own.layout is not None and own.layout.adapter == TRAINING + began
    first, last = (ActivationStore.open(out / "rows" / name) for name in (STEPS[0], STEPS[-1]))
    assert first.layout.writes_nothing and not last.layout.writes_nothing
    assert call(["verify", *(str(out / "rows" / name) for name in STEPS)]) == 0
    assert call(["info", str(out / "rows" / STEPS[1])]) == 0
    assert "activations, schema 2" in capsys.readouterr().out
    each_column(last, 0.1).save(tmp_path / "sae")  # one SAE reads every step
    for name in STEPS[1:]:
        index = collect(
            CollectConfig(
                sae=tmp_path / "sae", data_dir=out / "rows" / name, output=tmp_path / f"{name}.h5"
            )
        )
        assert call(["verify", str(index)]) == 0
    made = tmp_path / "checkpoint-6"
    sae = load_sae(tmp_path / "sae", ActivationStore.open(made))  # the checkpoint's file goes along
    assert sae.layout.adapter == TRAINING + began != ActivationStore.open(made).layout.adapter


def test_rows_of_another_training_are_not_taken_for_those_of_this_one(
    base, logged, dataset_file, tmp_path
):
    _, out = logged
    model = peft_model(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.mul_(2)
    train(base, str(tmp_path), str(dataset_file), steps=2, model=model)
    each_column(ActivationStore.open(out / "rows" / STEPS[-1]), 0.1).save(tmp_path / "sae")
    assert load_sae(tmp_path / "sae", ActivationStore.open(out / "rows" / STEPS[1]))
    with pytest.raises(ArtifactError, match="has training .*come from different adapters"):
        load_sae(tmp_path / "sae", ActivationStore.open(tmp_path / "rows" / STEPS[1]))


@pytest.mark.slow
def test_gradient_checkpointing_and_mixed_precision_change_no_row(base, dataset_file, tmp_path):
    """The rows before the first step are of the same weights, however the steps are computed."""
    plain = train(base, str(tmp_path / "plain"), str(dataset_file), steps=1, every=1)
    for name, given in (
        ("checkpointing", {"gradient_checkpointing": True}),
        ("bf16", {"bf16": True}),
        ("accumulated", {"gradient_accumulation_steps": 2}),
    ):
        out = tmp_path / name
        trainer = train(base, str(out), str(dataset_file), steps=1, every=1, **given)
        first = "rows/step-000000"
        assert np.array_equal(rows_of(out / first), rows_of(tmp_path / "plain" / first))
        assert (rows_of(out / "rows/step-000001") != rows_of(out / first)).any()
        assert np.isfinite(losses(trainer)).all()
        assert [path.name for path in sorted((out / "rows").iterdir())] == [
            "step-000000", "step-000001",
        ]  # fmt: skip
    assert np.isfinite(losses(plain)).all()


@pytest.mark.slow
def test_modules_get_back_the_mode_that_they_had(base, dataset_file, tmp_path, monkeypatch):
    """Also those that a user keeps in eval mode."""
    model = peft_model(base)
    seen = []
    kept = model.get_submodule("base_model.model.model.layers.0")
    monkeypatch.setattr(kept, "train", lambda mode=True: kept)  # always in eval mode
    for module in kept.modules():
        module.training = False
    record = RowLogger.record

    def look(self, subject, step):
        seen.append({module.training for module in model.modules()})
        record(self, subject, step)

    monkeypatch.setattr(RowLogger, "record", look)
    train(base, str(tmp_path), str(dataset_file), steps=2, model=model)
    assert seen == [{False}, {False}]
    assert not any(module.training for module in kept.modules())
    assert model.get_submodule("base_model.model.model.layers.1").training


@pytest.mark.slow
def test_a_resumed_training_keeps_the_steps_before_and_replaces_other_ones(
    base, dataset_file, tmp_path
):
    out = str(tmp_path)
    train(base, out, str(dataset_file), steps=4)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.h5")}
    before = rows_of(tmp_path / "rows" / STEPS[2])
    train(base, out, str(dataset_file), steps=6, resume=True)
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == STEPS
    stores = [ActivationStore.open(tmp_path / "rows" / name) for name in STEPS]
    assert len({store.layout.adapter for store in stores}) == 1
    assert {path: path.stat().st_mtime_ns for path in files} == files
    (tmp_path / "checkpoint-4").rename(tmp_path / "gone")
    (tmp_path / "checkpoint-6").rename(tmp_path / "gone-too")
    train(base, out, str(dataset_file), steps=6, resume=True, max_grad_norm=1e-3)
    after = rows_of(tmp_path / "rows" / STEPS[2])
    assert not np.array_equal(before, after), "from step 2 on the training was another one"
    assert all(
        path.stat().st_mtime_ns == files[path] for path in files if "step-000002" in str(path)
    )


@pytest.mark.slow
def test_stores_of_another_training_stop_a_training_before_it_begins(base, dataset_file, tmp_path):
    train(base, str(tmp_path), str(dataset_file), steps=2)
    train(base, str(tmp_path), str(dataset_file), steps=2)  # the same again
    with pytest.raises(ArtifactError, match="began with other weights; give another output"):
        train(base, str(tmp_path), str(dataset_file), steps=2, r=2)
    for rows in ({"num_examples": 4}, {"store_dtype": "float16"}):
        with pytest.raises(ArtifactError, match="of other texts or another model, or made with"):
            train(base, str(tmp_path), str(dataset_file), steps=2, rows=rows)


def test_what_cannot_be_logged_is_said_and_the_training_goes_on(
    base, dataset_file, tmp_path, monkeypatch, caplog
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorascope.callbacks.make_store", full)
    trainer = train(base, str(tmp_path), str(dataset_file), steps=2)
    assert len(losses(trainer)) == 2
    assert "step 2 is not recorded: [Errno 28] No space left on device" in caplog.text


def test_impossible_requests_are_one_line(base, dataset_file, tmp_path):
    from transformers import AutoModelForCausalLM

    for given, words in (
        ({"every": 0}, "every is 0, expected 1 step or more"),
        ({"sample": 3}, "RowLogger has no option sample"),
        ({"exampels": 3}, "RowLogger has no option exampels"),
        ({"num_examples": 0}, "--num-examples is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            RowLogger(dataset_file, tmp_path, **given)
    with pytest.raises(AdapterError, match="is a Qwen2ForCausalLM, expected a PEFT model"):
        unwrapped(AutoModelForCausalLM.from_pretrained(base))
    model = peft_model(base)
    wrapped = torch.nn.Module()
    wrapped.add_module("module", model)
    assert unwrapped(wrapped) is model
    assert unwrapped(torch.compile(model)) is model
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A.default")
    layer.weight.data = layer.weight.data[:0]  # as a process sees a weight that others hold
    with pytest.raises(AdapterError, match="spread over processes"):
        unwrapped(model)


@pytest.mark.slow
def test_a_rank_above_one_keeps_the_columns_of_training(base, dataset_file, tmp_path):
    train(base, str(tmp_path), str(dataset_file), steps=2, r=3)
    first, last = (ActivationStore.open(tmp_path / "rows" / name) for name in STEPS[:2])
    assert first.d_in == last.d_in == 3 * len(first.layout.sites)
    first.layout.require_same(last.layout, "first", "last")
    assert {site.gauge for site in first.layout.sites} == {"raw"}


def start(processes: int = 1, **given) -> subprocess.Popen:
    program = [str(Path(trainings.__file__)), json.dumps(given)]
    words = [sys.executable, *program]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
        words = [sys.executable, *launch, *program]
    root = Path(__file__).parent
    paths = f"{root}:{root.parent / 'src'}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_a_training_that_is_killed_keeps_its_finished_steps(base, dataset_file, tmp_path):
    given = {"base": base, "folder": str(tmp_path), "dataset": str(dataset_file)}
    process = start(**given, steps=2000, every=2)
    third, deadline = tmp_path / "rows" / STEPS[2], time.monotonic() + 300
    while not third.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = [
        path for path in (tmp_path / "rows").iterdir() if not path.name.endswith(".partial")
    ]
    assert third in finished
    assert call(["verify", *map(str, finished)]) == 0
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows" / STEPS[1]).rglob("*.h5")}
    train(base, str(tmp_path), str(dataset_file), steps=6)  # from the start, with equal weights
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert call(["verify", *(str(tmp_path / "rows" / name) for name in STEPS)]) == 0


@pytest.mark.dist
def test_of_several_processes_the_first_one_writes(base, dataset_file, tmp_path):
    given = {"base": base, "dataset": str(dataset_file), "steps": 4}
    process = start(2, **given, folder=str(tmp_path / "two"))
    text = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, text[-2000:]
    names = sorted(path.name for path in (tmp_path / "two" / "rows").iterdir())
    assert names == STEPS[:3]
    assert call(["verify", *(str(tmp_path / "two" / "rows" / name) for name in names)]) == 0
    train(**given, folder=str(tmp_path / "one"))
    first = "rows/step-000000"
    assert np.array_equal(rows_of(tmp_path / "one" / first), rows_of(tmp_path / "two" / first))
