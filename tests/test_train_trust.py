"""What a training run promises: nothing wrong gets in silently, nothing beside it can stop it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from builders.stores import planted_rows, write_store
from builders.training_logs import timeless

from lorascope.activations.batches import split_rows
from lorascope.activations.store import ActivationStore
from lorascope.artifact import digest_file, read_manifest
from lorascope.cli import call
from lorascope.errors import ArtifactError, NumberError
from lorascope.sae.model import load_sae
from lorascope.sae.objective import initial_weights
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run
from lorascope.sae.trainer import Trainer
from lorascope.sae.training_log import read_training_log, sibling
from lorascope.texts.roles import ROLES

CHECKPOINT = "sae.pt.partial/checkpoint.safetensors"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A store that no test changes."""
    folder = tmp_path_factory.mktemp("data")
    return write_store(folder / "store", planted_rows(600), n_rollouts=12, dtype="float16").path


@pytest.fixture
def config(data_dir, tmp_path):
    return TrainConfig(
        data_dir=data_dir,
        output=tmp_path / "sae.pt",
        expansion_factor=2,
        k=3,
        batch_size=64,
        epochs=3,
        dead_after=300,
        device="cpu",
    )


def report_of(path: Path) -> dict:
    return read_manifest(path).content["report"]


def break_off(config: TrainConfig, monkeypatch, at: int, saved: int) -> Path:
    """Run until step `at`, with a checkpoint of step `saved` left behind; return its path."""
    take, save = Trainer.take, Trainer.save

    def breaks(self, x):
        if self.step == at:
            raise RuntimeError("power cut")
        return take(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take", breaks)
        patch.setattr(Trainer, "save", lambda t, path: save(t, path) if t.step == saved else None)
        with pytest.raises(RuntimeError):
            run(replace(config, checkpoint_every=0))
    return config.output.parent / CHECKPOINT


# --- what stands beside a run


@pytest.mark.parametrize("saved", [None, 5, 11])
def test_the_log_has_every_point_once_also_after_a_resume(config, tmp_path, monkeypatch, saved):
    straight = run(replace(config, output=tmp_path / "straight.pt"))
    expected = timeless(sibling(straight, ".jsonl"))
    assert [line["step"] for line in expected] == list(range(1, 26))
    assert [line["tokens"] for line in expected] == list(range(64, 1601, 64))
    break_off(config, monkeypatch, at=11, saved=saved)
    begun = [line["step"] for line in timeless(config.output.with_name("sae.jsonl"))]
    assert begun == list(range(1, 12))
    resumed = sibling(run(config), ".jsonl")
    assert timeless(resumed) == expected
    for line in read_training_log(resumed):
        del line["tokens_per_second"]  # unknown on the first line after a resume
        assert all(np.isfinite(value) for value in line.values())
    log = read_manifest(config.output).content["log"]
    assert [{k: v for k, v in line.items() if k != "tokens"} for line in expected] == log


def test_the_settings_are_on_disk_before_the_first_step(config, monkeypatch):
    """A value that cannot be written down fails in the first second, not after hours."""
    seen = []

    def first(self, x):
        seen.append(
            json.loads((config.output.parent / CHECKPOINT).with_name("settings.json").read_text())
        )
        raise RuntimeError("power cut")

    monkeypatch.setattr(Trainer, "take", first)
    with pytest.raises(RuntimeError):
        run(config)
    assert seen[0]["settings"]["k"] == 3.0
    assert seen[0]["settings"]["batch_size"] == 64


def test_a_config_survives_the_way_to_another_process(config):
    many = replace(config, k=(3, 5.5), lr=("auto", "1e-3"), seed=(1, 2), roles=("think",))
    for given in (config, many):
        assert TrainConfig.from_json(json.loads(json.dumps(given.to_json()))) == given


# --- values that are not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("buffer_rows", [None, 100])
@pytest.mark.parametrize("side", ["training", "held out"])
def test_what_is_not_finite_is_named_before_training_and_nothing_is_written(
    make_store, config, tmp_path, monkeypatch, bad, buffer_rows, side
):
    store = ActivationStore.open(config.data_dir)
    row = int(split_rows(store, 0.1, 42)[side == "held out"][7])
    rows = planted_rows(600)
    rows[row, 9] = bad
    store = make_store(rows, n_rollouts=12, dtype="float16", name="bad")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Trainer, "take", lambda *_: pytest.fail("training began"))
    with pytest.raises(NumberError) as caught:
        run(replace(config, data_dir=store.path, buffer_rows=buffer_rows))
    message = str(caught.value)
    assert (
        f"row {row} (rollout {row // 50}) is {bad} in column 9 ({store.layout.column_names[9]})"
        in message
    )
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before


# --- streaming


def test_a_stream_trains_is_repeatable_and_part_of_the_identity(config, tmp_path):
    streamed = replace(config, buffer_rows=100)
    path = run(streamed)
    again = run(replace(streamed, output=tmp_path / "again.pt"))
    loaded = run(replace(config, output=tmp_path / "loaded.pt"))
    assert digest_file(path) == digest_file(again)
    assert not torch.equal(load_sae(path).W_dec, load_sae(loaded).W_dec)
    manifest = read_manifest(path) or {}
    assert manifest.content["steps"] == 25
    assert manifest.settings["buffer_rows"] == 100
    assert report_of(path)["fvu"] == pytest.approx(report_of(loaded)["fvu"], rel=0.4)
    for other in (None, 200):
        with pytest.raises(ArtifactError, match=f"buffer_rows 100 there, {other} here"):
            run(replace(config, buffer_rows=other))
    assert run(replace(config, buffer_rows=200, overwrite=True)) == path


@pytest.mark.parametrize("buffer_rows", [pytest.param(1, marks=pytest.mark.slow), 63, 539, 10**9])
def test_a_buffer_of_any_size_trains(config, buffer_rows):
    assert 0 < report_of(run(replace(config, buffer_rows=buffer_rows, epochs=1)))["fvu"] < 1


# --- going on


@pytest.mark.parametrize(
    "changes",
    [
        {"buffer_rows": 100},
        {"architecture": "topk", "k": 2.4},
        {"architecture": "jumprelu"},
        {"architecture": "matryoshka"},
        pytest.param({"normalize": "none", "seed": 9}, marks=pytest.mark.slow),
    ],
)
def test_any_run_broken_off_goes_on_to_the_same_bytes(config, tmp_path, monkeypatch, changes):
    config = replace(config, **changes)
    straight = digest_file(run(replace(config, output=tmp_path / "straight.pt")))
    break_off(config, monkeypatch, at=16, saved=14)
    assert digest_file(run(config)) == straight


def with_tensors(change):
    """Return a damage that changes the tensors of a checkpoint."""

    def damage(path: Path) -> None:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(tensors)
        safetensors.torch.save_file(tensors, path, metadata=metadata)

    return damage


def with_state(text: str | None):
    """Return a damage that puts another text into the place of the step and the log."""

    def damage(path: Path) -> None:
        tensors = safetensors.torch.load_file(path)
        metadata = None if text is None else {"state": text}
        safetensors.torch.save_file(tensors, path, metadata=metadata)

    return damage


def of_shape(name: str, *shape: int):
    return with_tensors(lambda tensors: tensors.update({name: torch.ones(shape)}))


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff" * 5000),
    "without state": with_state(None),
    "state is no JSON": with_state("{"),
    "state is a list": with_state("[]"),
    "state lacks the log": with_state('{"step": 3}'),
    "a tensor is missing": with_tensors(lambda tensors: tensors.pop("adam.exp_avg.b_enc")),
    "counters are missing": with_tensors(lambda tensors: tensors.pop("silent_tokens")),
    "weights of another width": of_shape("W_enc", 14, 29),
    "weights that would be stretched": of_shape("W_enc", 14, 1),
    "a moment of another width": of_shape("adam.exp_avg.W_dec", 28, 13),
    "counters of another width": of_shape("silent_tokens", 27),
    "counters that would be stretched": of_shape("silent_tokens", 1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_that_names_no_resume(config, monkeypatch, name):
    checkpoint = break_off(config, monkeypatch, at=3, saved=3)
    DAMAGES[name](checkpoint)
    with pytest.raises(ArtifactError, match="--no-resume") as caught:
        run(config)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not config.output.exists()


def test_after_a_damaged_checkpoint_no_resume_gives_the_undisturbed_run(
    config, tmp_path, monkeypatch
):
    straight = digest_file(run(replace(config, output=tmp_path / "straight.pt")))
    DAMAGES["garbage"](break_off(config, monkeypatch, at=3, saved=3))
    assert digest_file(run(replace(config, resume=False))) == straight


# --- what is learned from


def test_roles_restrict_the_rows_and_are_recorded(make_store, config):
    """The tokens of the other role hold NaN: one of them in any sum would be seen."""
    rows = planted_rows(1200)
    wanted = np.arange(1200) % 3 == 0
    rows[~wanted] = np.nan
    roles = np.where(wanted, ROLES.index("answer"), ROLES.index("think")).astype(np.uint8)
    store = make_store(rows, n_rollouts=12, name="roles", roles=roles)
    config = replace(config, data_dir=store.path, batch_size=32, holdout=0.25)
    with pytest.raises(NumberError):
        run(config)
    path = run(replace(config, roles=("answer",)))
    manifest = read_manifest(path) or {}
    assert manifest.settings["roles"] == ["answer"]
    assert manifest.content["roles"] == ["answer"]
    n = int((store.roles == ROLES.index("answer")).sum())
    report = report_of(path)
    n_train = n - report["n_rows"] - report["n_calibrated"]
    assert manifest.content["steps"] == 3 * n_train // 32
    with pytest.raises(ArtifactError, match=r"roles \['answer'\] there, \['system', "):
        run(config)


@pytest.mark.slow
def test_columns_of_any_size_are_learned_by_default(config):
    """Scales of 10^-2 to 10^2: in raw units the small columns count for nothing."""
    longer = replace(config, epochs=20, expansion_factor=3)
    worst = {}
    for normalize in ("std", "none"):
        report = report_of(run(replace(longer, normalize=normalize, overwrite=True)))
        worst[normalize] = report["worst_columns"][0]["fvu"]
    assert worst["std"] < 0.5
    assert worst["none"] > 0.9


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "matryoshka", "jumprelu"])
def test_l0_at_inference_is_that_of_training_after_ten_steps(make_store, config, architecture):
    store = make_store(planted_rows(9000), n_rollouts=60, name="long")
    path = run(
        replace(
            config,
            data_dir=store.path,
            architecture=architecture,
            holdout=0.7,
            batch_size=256,
            epochs=1,
        )
    )
    manifest = read_manifest(path) or {}
    assert manifest.content["steps"] <= 10
    report = report_of(path)
    if architecture != "jumprelu":  # whose thresholds take longer to find k
        assert report["train"]["l0"] == pytest.approx(3, rel=1e-5)
    assert report["l0"] == pytest.approx(3, rel=0.05)


def test_l0_that_differs_by_a_fifth_is_warned_of(make_store, config, caplog):
    """The rows of the rollouts that are reported on are larger than those that calibrate."""
    store = ActivationStore.open(config.data_dir)
    held_out = split_rows(store, 0.4, 42)[1]
    of = store.rollout_of(held_out)
    rows = planted_rows(600)
    rows[held_out[np.isin(of, np.unique(of)[0::2])]] *= 3
    store = make_store(rows, n_rollouts=12, name="shifted")
    run(replace(config, data_dir=store.path, holdout=0.4))
    assert "more than 20 % apart: the held-out rollouts differ" in caplog.text


def test_many_latents_that_never_fire_are_warned_of_with_advice(config, caplog):
    path = run(replace(config, expansion_factor=40, dead_after=10**6, max_fvu=math.inf))
    assert report_of(path)["never_fired"] > 0.2
    assert "never fired on held-out rows" in caplog.text
    assert "lower --expansion-factor, or generate more" in caplog.text


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "matryoshka", "jumprelu"])
def test_latents_that_never_fire_are_silent_for_tokens_not_steps(architecture):
    rows = torch.randn(640, 14, generator=torch.Generator().manual_seed(0))
    silent = {}
    for batch_size in (32, 64):
        weights = initial_weights(
            *(rows, 28, torch.Generator().manual_seed(1)),
            learns_threshold=architecture == "jumprelu",
        )
        with torch.no_grad():
            weights.b_enc[:5] = -1e6
        one = Trainer(
            weights, k=3, n_steps=640 // batch_size, lr=1e-3, architecture=architecture,
            dead_after=500,
        )  # fmt: skip
        dead = []
        for x in rows.split(batch_size):
            one.take(x)
            dead.append(int(one.dead[:5].sum()))
        silent[batch_size] = one.silent_tokens
        first = dead.index(5)  # all five become dead at once, after more than 500 tokens
        assert dead[:first] == [0] * first
        assert first == 500 // batch_size
    assert silent[32][:5].tolist() == silent[64][:5].tolist() == [640] * 5
    assert (silent[32] < 640).sum() > 10


@pytest.mark.slow
def test_batches_of_equal_rows_do_no_harm(make_store, config):
    """Nothing varies in such a batch, so that its loss is divided by nothing."""
    rows = np.repeat(planted_rows(10), 60, axis=0)
    store = make_store(rows, n_rollouts=10, n_special=0, name="equal")
    path = run(replace(config, data_dir=store.path, batch_size=2, epochs=1))
    assert all(torch.isfinite(tensor).all() for tensor in load_sae(path).tensors().values())


# --- options


BAD = {
    "architecture": ["relu"],
    "expansion_factor": ["0", "-1", "1.5", "x", "2 0", "2 2"],
    "k": ["0", "-1", "nan", "inf", "x", "29", "3 29", "3 3", "0.001"],
    "batch_size": ["0", "1", "-5", "551", "1.5", "x"],
    "epochs": ["0", "-1", "0.5", "x"],
    "lr": ["0", "-1", "nan", "inf", "fast", "auto 0"],
    "seed": ["-1", "1.5", "x", "3 3", str(2**64)],
    "normalize": ["max"],
    "roles": ["thinks", "answer"],
    "holdout": ["0", "1", "-0.1", "nan", "x"],
    "dead_after": ["-1", "0.5", "x"],
    "auxk_alpha": ["-1", "nan", "inf", "x"],
    "max_fvu": ["-1", "nan", "x"],
    "data_dir": ["absent", "full"],
    "output": ["full", "file/sae.pt"],
    "adapter_types": ["lm_head"],
    "buffer_rows": ["0", "-1", "1.5", "x"],
    "device": ["warp", "cuda:77"],
    "checkpoint_every": ["-1", "nan", "x"],
    "resume": ["maybe"],
    "overwrite": ["maybe"],
}


def test_every_option_has_bad_values():
    assert BAD.keys() == TrainConfig.names()


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in BAD for v in BAD[n]])
def test_a_bad_value_is_one_line_that_names_it_and_writes_nothing(
    config, tmp_path, monkeypatch, capsys, name, value
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "take", lambda *_: pytest.fail("training began"))
    (tmp_path / "full").mkdir()
    for file in ("full/notes.txt", "file"):
        (tmp_path / file).write_text("mine")
    watched = [tmp_path, config.data_dir]
    before = {path: path.stat().st_mtime_ns for top in watched for path in top.rglob("*")}
    flag = "--" + name.replace("_", "-")
    words = ["train", "--data-dir", str(config.data_dir), "--output", "sae.pt", "--k", "3"]
    words += ["--expansion-factor", "2", "--batch-size", "64", "--epochs", "1", "--device", "cpu"]
    assert call([*words, flag, *value.split()]) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if not line.startswith(str(config.data_dir))]
    assert out == ""
    assert len(said) == 1, err
    assert flag in said[0] or value.split()[-1] in said[0]
    after = {path: path.stat().st_mtime_ns for top in watched for path in top.rglob("*")}
    assert after == before
