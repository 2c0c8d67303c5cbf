import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.stores import planted_rows

from lorascope.activations.batches import split_rows
from lorascope.activations.store import ActivationStore
from lorascope.artifact import digest_file, read_manifest
from lorascope.errors import ArtifactError, ConfigError, Interrupted, LorascopeError, NumberError
from lorascope.sae import train, trainer
from lorascope.sae.model import load_sae
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run
from lorascope.sae.training_log import read_training_log


@pytest.fixture
def small_config(make_store, tmp_path):
    store = make_store(planted_rows(), n_rollouts=12, dtype="float16")
    return TrainConfig(
        data_dir=store.path,
        output=tmp_path / "sae.pt",
        expansion_factor=3,
        k=3,
        batch_size=64,
        epochs=4,
        dead_after=2000,
        device="cpu",
    )


@pytest.mark.parametrize(
    ("d_in", "n_steps", "lowest", "highest"),
    [
        (448, 97, 1.2e-2, 1.6e-2),
        (448, 390, 5e-3, 7e-3),
        (448, 1171, 3e-3, 4e-3),
        (112, 3906, 5e-3, 1e-2),
        (56, 2738, 1e-2, 2e-2),
        (56, 10_951, 1e-2, 2e-2),
        (2, 10, 0.03, 0.03),
    ],
)
def test_the_automatic_rate_is_one_of_the_best_that_were_measured(d_in, n_steps, lowest, highest):
    """`docs/training.md` has the runs."""
    assert lowest <= train.auto_lr(d_in, n_steps) <= highest


def test_a_run_writes_an_sae_with_a_threshold_and_a_report(small_config, caplog):
    caplog.set_level(logging.INFO)
    path = run(small_config)
    assert path == small_config.output
    sae = load_sae(path, ActivationStore.open(small_config.data_dir))
    assert (sae.d_in, sae.d_sae) == (14, 42)
    report = sae.manifest.content["report"]
    assert 0 < report["fvu"] < 1
    assert report["l0"] == pytest.approx(3, rel=0.2)
    assert report["train"]["l0"] == pytest.approx(3, rel=0.01)
    assert "held out" in caplog.text
    assert "learning rate" in caplog.text
    assert not path.with_name("sae.pt.partial").exists()
    config = torch.load(path, weights_only=True)["config"]
    assert config["k"] == 3
    assert config["adapter_types"] == list(sae.layout.adapter_types)
    json.dumps(read_manifest(path).to_json(), allow_nan=False)


def test_a_dictionary_that_learned_nothing_is_published_only_on_request(
    small_config, tmp_path, monkeypatch
):
    bad = replace(small_config, lr=("1",))
    for _ in range(2):  # the second time from the checkpoint
        with pytest.raises(NumberError, match=r"not published: its FVU is .*--max-fvu inf") as said:
            run(bad)
    assert "\n" not in str(said.value)
    assert not bad.output.exists()
    assert read_training_log(tmp_path / "sae.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "take", lambda *_: pytest.fail("it was trained already"))
        path = run(replace(bad, max_fvu=float("inf")))
    assert read_manifest(path).content["report"]["fvu"] > 1
    several = replace(small_config, lr=("1", "auto"), output=tmp_path / "several.pt")
    with pytest.raises(NumberError, match="several_lr1.pt is not published"):
        run(several)
    assert [path.name for path in tmp_path.glob("several*.pt")] == ["several_lrauto.pt"]


def test_a_constant_is_no_dictionary(small_config, monkeypatch):
    """Without a latent that fires, the FVU is at least 1: no constant beats the rows' mean."""
    monkeypatch.setattr("lorascope.sae.model.calibrate_threshold", lambda *_: float("inf"))
    with pytest.raises(NumberError, match="FVU is 1.*, and 0 of 42 latents fire"):
        run(small_config)


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "matryoshka"])
def test_the_threshold_gives_k_on_half_of_the_held_out_rollouts(small_config, architecture):
    """The other half is reported on, so that its L0 is measured, not fitted."""
    config = replace(small_config, architecture=architecture, holdout=0.4)
    sae = load_sae(run(config))
    store = ActivationStore.open(small_config.data_dir)
    held_out = split_rows(store, 0.4, 42)[1]
    rollouts = store.rollout_of(held_out)
    names = np.unique(rollouts)
    calibrated = held_out[np.isin(rollouts, names[1::2])]
    l0 = sae.encode(torch.from_numpy(store.take(calibrated))).l0.float().mean()
    assert float(l0) == pytest.approx(3, abs=1.5 / len(calibrated))  # one firing more or less
    report = sae.manifest.content["report"]
    assert report["n_calibrated"] == len(calibrated)
    assert report["n_rows"] == len(held_out) - len(calibrated)
    assert sae.architecture == architecture
    if architecture == "jumprelu":
        assert len(sae.threshold.unique()) > 10
    else:
        assert len(sae.threshold.unique()) == 1


@pytest.mark.parametrize("normalize", ["std", "none"])
@pytest.mark.parametrize("name", ["sae.pt", "sae"])
def test_saved_weights_reconstruct_raw_rows_as_training_did(
    small_config, tmp_path, monkeypatch, normalize, name
):
    """Threshold and both biases included: the trainer's own code, cut at the saved threshold."""
    kept = []
    original = train.Trainer.save
    monkeypatch.setattr(
        train.Trainer, "save", lambda self, path: (kept.append(self), original(self, path))
    )
    sae = load_sae(run(replace(small_config, normalize=normalize, output=tmp_path / name)))
    store = ActivationStore.open(small_config.data_dir)
    raw = torch.from_numpy(store.rows(0, 400).astype(np.float64))
    w = {name: t.detach().double() for name, t in kept[-1].weights.tensors().items()}
    scale = torch.tensor(sae.manifest.content["scale"], dtype=torch.float64)
    norm = w["W_dec"].norm(dim=1)
    pre = (raw * scale - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    code = pre * (pre * norm > sae.threshold.double())
    x_hat = (code @ w["W_dec"] + w["b_dec"]) / scale
    ours = sae.decode(sae.encode(raw.float())).double()
    near = ((pre * norm - sae.threshold).abs() < 1e-4).any(1)  # float32 may decide otherwise
    assert near.float().mean() < 0.1
    error = ((ours - x_hat) * scale)[~near].abs().max()
    assert float(error) < 1e-5 * max(1.0, float((raw * scale).abs().max()))


def test_the_same_command_gives_the_same_bytes_and_another_seed_does_not(small_config, tmp_path):
    first = digest_file(run(small_config))
    assert digest_file(run(replace(small_config, output=tmp_path / "b.pt"))) == first
    assert digest_file(run(replace(small_config, output=tmp_path / "c.pt", seed=1))) != first


def test_a_finished_output_is_left_alone_and_other_settings_are_refused(small_config):
    path = run(small_config)
    made = path.stat().st_mtime_ns
    assert run(small_config) == path
    assert path.stat().st_mtime_ns == made
    with pytest.raises(ArtifactError, match="k 3.0 there, 2.0 here"):
        run(replace(small_config, k=2))
    run(replace(small_config, k=2, overwrite=True))
    assert load_sae(path).manifest.settings["k"] == 2.0


@pytest.mark.parametrize("at", [17, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 40))])
def test_a_run_broken_off_and_continued_is_the_undisturbed_run(
    small_config, tmp_path, monkeypatch, at, caplog
):
    caplog.set_level(logging.INFO)
    straight = digest_file(run(small_config))
    broken = replace(small_config, output=tmp_path / "broken.pt", checkpoint_every=0)
    take = trainer.Trainer.take

    def breaks(self, x):
        if self.step == at:
            raise RuntimeError("power cut")
        return take(self, x)

    monkeypatch.setattr(train.Trainer, "take", breaks)
    with pytest.raises(RuntimeError):
        run(broken)
    assert not broken.output.exists()
    monkeypatch.setattr(train.Trainer, "take", take)
    assert digest_file(run(replace(broken, checkpoint_every=60))) == straight
    assert f"resuming from step {at}" in caplog.text


@pytest.mark.slow
def test_without_resume_it_begins_anew_and_ends_the_same(
    small_config, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    straight = digest_file(run(small_config))
    other = replace(small_config, output=tmp_path / "other.pt", resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(train, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(other)
    assert digest_file(run(other)) == straight
    assert "resuming" not in caplog.text


CHILD = """
import sys
from pathlib import Path
from lorascope.errors import Interrupted
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run
from lorascope.sae.training_log import read_training_log
if __name__ == "__main__":
    config = TrainConfig(
        data_dir=Path(sys.argv[1]), output=Path(sys.argv[2]), expansion_factor=3, k=3,
        batch_size=64, epochs=4, dead_after=2000, device="cpu", checkpoint_every=0,
    )
    try:
        run(config)
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
"""


def start(config: TrainConfig, output: Path) -> subprocess.Popen[bytes]:
    source = Path(train.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(config.data_dir), str(output)],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def wait_for(path: Path, child: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while not path.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)],
)
def test_a_process_killed_by_a_signal_goes_on_to_the_same_bytes(
    small_config, tmp_path, number, code
):
    straight = digest_file(run(replace(small_config, output=tmp_path / "straight.pt")))
    out = tmp_path / "killed.pt"
    child = start(small_config, out)
    wait_for(tmp_path / "killed.pt.partial" / "checkpoint.safetensors", child)
    child.send_signal(number)
    stdout, _ = child.communicate(timeout=60)
    assert child.returncode in (code, 0)  # 0: it was done before the signal came
    assert stdout == b""
    if child.returncode:
        assert not out.exists()
    assert digest_file(run(replace(small_config, output=out))) == straight


def test_a_signal_ends_the_step_saves_and_raises(small_config, monkeypatch):
    take = trainer.Trainer.take

    def signalled(self, x):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, x)

    monkeypatch.setattr(train.Trainer, "take", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        run(small_config)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    saved = small_config.output.with_name("sae.pt.partial") / "checkpoint.safetensors"
    assert saved.exists()


def test_one_set_of_projections_gives_its_columns_and_its_name(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = run(replace(small_config, adapter_types=("mlp",), output=None, expansion_factor=7))
    assert path.name == "trained_sae_adapters_g-u-d.pt"
    sae = load_sae(path)
    assert sae.layout.adapter_types == ("gate_proj", "up_proj", "down_proj")
    assert (sae.d_in, sae.d_sae) == (6, 42)
    store = ActivationStore.open(small_config.data_dir)
    assert sae.narrow(store).d_in == 6


def test_a_name_without_pt_is_a_folder(small_config, tmp_path):
    folder = run(replace(small_config, output=tmp_path / "sae"))
    names = {"cfg.json", "manifest.json", "sae_weights.safetensors"}
    assert {file.name for file in folder.iterdir()} == names
    manifest = read_manifest(folder)
    assert manifest.files["cfg.json"]["sha256"] == digest_file(folder / "cfg.json")
    assert load_sae(folder).digest == load_sae(run(small_config)).digest


def test_constant_columns_are_listed_left_out_and_reconstructed(make_store, small_config, caplog):
    rows = planted_rows()
    rows[:, 2], rows[:, 9] = 0.0, 4.0
    store = make_store(rows, n_rollouts=12, name="constant")
    sae = load_sae(run(replace(small_config, data_dir=store.path)))
    names = [store.layout.column_names[i] for i in (2, 9)]
    assert f"2 of 14 columns are constant and are left out: {', '.join(names)}" in caplog.text
    assert sae.manifest.content["left_out"] == names
    x_hat = sae.decode(sae.encode(torch.tensor(store.rows(0, 50))))
    assert (x_hat[:, 2] == 0).all()
    assert (x_hat[:, 9] == 4).all()


def test_an_outlier_column_and_few_steps_still_train(make_store, small_config):
    rows = planted_rows()
    rows[7] *= 1e4
    store = make_store(rows, n_rollouts=12, name="outlier")
    path = run(replace(small_config, data_dir=store.path, epochs=1, batch_size=1000))
    assert np.isfinite(load_sae(path).manifest.content["report"]["fvu"])


@pytest.mark.slow
def test_a_fraction_of_a_latent_a_token_trains(small_config):
    sae = load_sae(run(replace(small_config, k=0.5)))
    assert sae.manifest.content["report"]["train"]["l0"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "--k is 0"),
        ({"k": -3}, "--k is -3,"),
        ({"k": float("nan")}, "--k is nan"),
        ({"k": 43}, "--k is 43, expected at most 42"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"batch_size": 5000}, "5000"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"expansion_factor": 0}, "--expansion-factor is 0"),
        ({"holdout": 0.0}, "--holdout is 0.0"),
        ({"holdout": 1.0}, "--holdout is 1.0"),
        ({"lr": "fast"}, "--lr is fast"),
        ({"lr": "-1"}, "--lr is -1"),
        ({"adapter_types": ("lm_head",)}, "lm_head"),
        ({"data_dir": Path("absent")}, "absent"),
        ({"device": "warp"}, "warp"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(small_config, tmp_path, changes, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(LorascopeError) as caught:
        run(replace(small_config, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_value_that_is_not_finite_is_refused_before_training(make_store, small_config):
    rows = planted_rows()
    rows[123, 4] = np.nan
    store = make_store(rows, n_rollouts=12, name="nan")
    with pytest.raises(NumberError, match="row 123"):
        run(replace(small_config, data_dir=store.path))
    assert not list(small_config.output.parent.glob("*.partial"))


@pytest.mark.parametrize(
    ("d_in", "k", "factor"),
    [(1, 1, 16), (4, 1, 16), (24, 3, 16), (448, 50, 16), (3584, 50, 4), (14336, 50, 1)],
)
def test_the_defaults_follow_the_columns(d_in, k, factor):
    chosen = TrainConfig().for_columns(d_in)
    assert (chosen.values_of("k"), chosen.values_of("expansion_factor")) == ((k,), (factor,))
    assert chosen.training_bytes(d_in) < 12e9
    given = TrainConfig(k=(2, 3), expansion_factor=5).for_columns(d_in)
    assert (given.values_of("k"), given.values_of("expansion_factor")) == ((2, 3), (5,))


def test_memory_that_is_not_there_is_one_line_that_says_what_to_lower(caplog):
    config = TrainConfig(expansion_factor=16).for_columns(14336)
    with pytest.raises(ConfigError, match=r"229,376 latents .* lower --expansion-factor to 2, or"):
        config.require_memory(14336, 24 << 30)
    with pytest.raises(ConfigError, match=r"free; keep fewer columns with --adapter-types"):
        config.require_memory(14336, 5 << 30)
    config.require_memory(14336, None)
    config.require_memory(14336, 1 << 40)
    assert not caplog.messages
    config.require_memory(14336, round(0.9 * config.training_bytes(14336)))  # it may still fit
    assert "229,376 latents" in caplog.text


def test_settings_name_what_decides_the_result_in_one_spelling(small_config):
    settings = TrainConfig(lr="2e-3").settings()
    assert settings == TrainConfig(lr="0.002").settings()
    assert not {"data_dir", "output", "device", "resume", "overwrite"} & settings.keys()
    assert settings["data_seed"] == 42
    json.dumps(settings)


def test_all_seven_projections_by_name_are_the_same_run_as_none_named(small_config):
    path = run(small_config)
    assert run(replace(small_config, adapter_types=("all",))) == path


def test_a_device_without_kernels_is_left_for_the_cpu_and_said(small_config, monkeypatch, caplog):
    straight = digest_file(run(small_config))
    monkeypatch.setattr(train, "pick_device", lambda _: torch.device("mps"))
    other = replace(small_config, output=small_config.output.with_name("other.pt"), device="auto")
    assert digest_file(run(other)) == straight
    assert "training has no kernels for mps: using the CPU" in caplog.text


def test_cuda_without_triton_is_one_line_and_writes_nothing(small_config, monkeypatch):
    monkeypatch.setattr(train, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(train, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="training on cuda needs triton.*--device cpu"):
        run(small_config)
    assert not list(small_config.output.parent.glob("sae*"))
