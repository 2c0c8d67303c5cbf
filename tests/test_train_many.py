"""Several SAEs of one run: each is what its own run would have made, whatever is killed when."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.schemas import faults, require_schema
from builders.stores import planted_rows

from lorascope.artifact import read_manifest
from lorascope.cli import call
from lorascope.errors import ArtifactError, ConfigError, LorascopeError, NumberError
from lorascope.sae import publish, train, trainer
from lorascope.sae.model import load_sae
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run
from lorascope.sae.training_log import CLOCK_FIELDS, read_training_log, sibling

N_STEPS = 25  # of the small config: 3 epochs of 539 rows, by 64


@pytest.fixture
def config(make_store, tmp_path):
    store = make_store(planted_rows(600), n_rollouts=12)
    return TrainConfig(
        data_dir=store.path,
        output=tmp_path / "sae.pt",
        expansion_factor=2,
        k=3,
        batch_size=64,
        epochs=3,
        dead_after=1000,
        device="cpu",
    )


def outputs(config: TrainConfig) -> list[Path]:
    return [member.path(config.output) for member in config.sweep()]


def content(out: Path) -> dict[str, bytes]:
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    assert files, f"{out} is not there"
    return {file.name if out.is_dir() else "": file.read_bytes() for file in files}


def lines(out: Path) -> list[dict[str, float]]:
    """Return the training log beside an SAE, without what a clock says."""
    journal = read_training_log(sibling(out, ".jsonl"))
    return [{k: v for k, v in line.items() if k not in CLOCK_FIELDS} for line in journal]


def stamps(outs: list[Path]) -> list[int]:
    return [out.stat().st_mtime_ns for out in outs]


@pytest.fixture
def steps_taken(monkeypatch):
    """Every step that a trainer takes, as (k, step)."""
    taken: list[tuple[float, int]] = []
    take = trainer.Trainer.take

    def noted(self, x):
        taken.append((self.rule.k, self.step))
        return take(self, x)

    monkeypatch.setattr(trainer.Trainer, "take", noted)
    return taken


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sae.pt", "sae"])
def test_each_of_many_has_the_bytes_of_its_run_alone(config, tmp_path, name):
    lists = {"k": (2.0, 4.0), "expansion_factor": (1, 2), "lr": ("auto", "0.02")}
    many = replace(config, output=tmp_path / name, **lists)
    run(many)
    end = ".pt" if name.endswith(".pt") else ""
    made = {path.name for path in tmp_path.glob("sae_*") if path.suffix != ".jsonl"}
    assert made == {
        f"sae_k{k}_x{x}_lr{lr}{end}" for k, x, lr in product((2, 4), (1, 2), ("auto", "0.02"))
    }
    for member, out in zip(many.sweep(), outputs(many), strict=True):
        alone = replace(
            *(config,),
            output=tmp_path / "alone" / name,
            k=member.k,
            expansion_factor=member.expansion_factor,
            lr=member.lr,
            overwrite=True,
        )
        assert content(run(alone)) == content(out)
        assert lines(alone.output) == lines(out)
    assert not list(tmp_path.glob("*.partial"))


def test_a_seed_of_many_has_the_weights_of_its_run_alone(config, tmp_path):
    many = replace(config, seed=(7, 8))
    require_schema(run(many), "runs")
    for line in read_training_log(sibling(outputs(many)[0], ".jsonl")):
        assert faults("training-log", line) == []
    first, second = (load_sae(out) for out in outputs(many))
    alone = load_sae(run(replace(config, seed=7, output=tmp_path / "alone.pt")))
    assert all(torch.equal(a, b) for a, b in zip(
        first.tensors().values(), alone.tensors().values(), strict=True
    ))  # fmt: skip
    assert not torch.equal(first.W_dec, second.W_dec)
    settings = dict(first.manifest.settings)
    assert settings.pop("seeds") == [7, 8]
    assert settings == alone.manifest.settings
    named = dict(first.manifest.content)
    assert len(named.pop("stability")) == first.d_sae
    assert named == alone.manifest.content
    assert alone.stability is None


@pytest.mark.slow
def test_other_lists_do_not_change_the_bytes_of_several_seeds(config, tmp_path):
    seeds = replace(config, seed=(7, 8))
    run(seeds)
    more = replace(seeds, output=tmp_path / "more" / "sae.pt", k=(3, 5))
    run(more)
    assert [out.name for out in outputs(more)[:2]] == ["sae_k3_seed7.pt", "sae_k3_seed8.pt"]
    for out, same in zip(outputs(seeds), outputs(more)[:2], strict=True):
        assert content(out) == content(same)


@pytest.mark.slow
def test_the_table_has_the_report_of_every_sae(config, capsys, caplog):
    caplog.set_level("INFO")
    many = replace(config, k=(2, 4), seed=(42, 43))
    path = run(many)
    assert path == config.output.with_name("sae.runs.json")
    require_schema(path, "runs")
    rows = json.loads(path.read_text())
    assert [row["sae"] for row in rows] == [out.name for out in outputs(many)]
    for row, member, out in zip(rows, many.sweep(), outputs(many), strict=True):
        content = read_manifest(out).content
        for name in ("fvu", "l0", "alive", "cosine"):
            assert row[name] == content["report"][name], name
        assert row["stability"] == np.median(content["stability"])
        for name, value in member.settings().items():
            assert row[name] == value, name
    assert "sae_k4_seed43.pt" in caplog.text
    before, text = stamps(outputs(many)), path.read_bytes()
    assert run(many) == path
    assert stamps(outputs(many)) == before
    assert path.read_bytes() == text


def units_of(sae) -> torch.Tensor:
    """Return the decoder rows in the units of training, of unit norm."""
    return torch.nn.functional.normalize(sae.W_dec.double() * sae.scale.double(), dim=1)


@pytest.mark.parametrize("normalize", ["std", "none"])
def test_stability_is_the_cosine_with_the_nearest_latent_of_the_other_seeds(config, normalize):
    """By brute force over the saved decoders."""
    many = replace(config, seed=(42, 43, 44), normalize=normalize)
    run(many)
    saes = [load_sae(out) for out in outputs(many)]
    decoders = [units_of(sae) for sae in saes]
    for i, sae in enumerate(saes):
        nearest = [
            [max(float(row @ other) for other in decoder) for row in decoders[i]]
            for j, decoder in enumerate(decoders)
            if j != i
        ]
        expected = np.clip(np.mean(nearest, axis=0), -1, 1)
        assert sae.stability is not None
        assert np.allclose(sae.stability.numpy(), expected, atol=1e-4)


@pytest.mark.slow
def test_a_planted_direction_is_stable_and_what_only_one_seed_has_is_not(make_store, config):
    rng = np.random.default_rng(3)
    directions = np.linalg.qr(rng.standard_normal((14, 14)))[0][:6]
    fires = (rng.random((2000, 6)) < 0.15) * rng.uniform(1, 2, (2000, 6))
    rows = fires @ directions + 0.03 * rng.standard_normal((2000, 14))
    store = make_store(rows, n_rollouts=20, name="planted")
    many = replace(
        config, data_dir=store.path, seed=(42, 43, 44), k=1, epochs=12, expansion_factor=4
    )
    run(many)
    for out in outputs(many):
        sae = load_sae(out)
        planted = torch.tensor(directions) * sae.scale.double()
        cosine = units_of(sae) @ torch.nn.functional.normalize(planted, dim=1).T
        found = (cosine > 0.97).any(1)
        assert (cosine > 0.97).any(0).sum() >= 5
        assert sae.stability is not None
        assert sae.stability[found].min() > 0.9
        others = sae.stability[cosine.amax(1) < 0.7]
        assert others.median() < sae.stability[found].median() - 0.15


def breaks_at(step: int, of: float):
    """Return a `take` that fails at a step of the SAE with this k."""
    take = trainer.Trainer.take

    def failing(self, x):
        if self.step == step and self.rule.k == of:
            raise RuntimeError("power cut")
        return take(self, x)

    return "take", failing


def breaks_after(step: int, of: float):
    """Return a `save` that fails for the SAE with this k, once the others' are at `step`."""
    save = trainer.Trainer.save

    def failing(self, path):
        if self.step == step and self.rule.k == of:
            raise RuntimeError("power cut")
        save(self, path)

    return "save", failing


@pytest.mark.parametrize("of", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("breaks", [breaks_at, pytest.param(breaks_after, marks=pytest.mark.slow)])
def test_many_broken_off_go_on_to_the_same_bytes(config, tmp_path, monkeypatch, breaks, of):
    """Broken between the steps or the checkpoints of two SAEs, so that they stand apart."""
    straight = replace(config, output=tmp_path / "straight" / "sae.pt", k=(2, 4))
    run(straight)
    broken = replace(config, k=(2, 4), checkpoint_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, *breaks(11, of))
        with pytest.raises(RuntimeError):
            run(broken)
    assert not any(out.exists() for out in outputs(broken))
    run(replace(broken, checkpoint_every=60))
    for out, other in zip(outputs(broken), outputs(straight), strict=True):
        assert content(out) == content(other)
        assert lines(out) == lines(other)


def broken_between_publications(config: TrainConfig, monkeypatch) -> None:
    """Run until the first SAE is published and the others are trained."""
    publish_one, n = publish.publish, []

    def first_only(*given):
        if n:
            raise RuntimeError("power cut")
        n.append(publish_one(*given))

    with monkeypatch.context() as patch:
        patch.setattr(train, "publish", first_only)
        with pytest.raises(RuntimeError):
            run(config)
    assert [out.exists() for out in outputs(config)] == [True, False]


@pytest.mark.parametrize(
    "lists", [{"k": (2, 4)}, pytest.param({"seed": (42, 43)}, marks=pytest.mark.slow)]
)
def test_many_killed_while_they_are_published_end_with_the_same_bytes(
    config, tmp_path, monkeypatch, lists
):
    straight = replace(config, output=tmp_path / "straight" / "sae.pt", **lists)
    run(straight)
    broken = replace(config, **lists)
    broken_between_publications(broken, monkeypatch)
    table = run(broken)
    assert [row["sae"] for row in json.loads(table.read_text())] == [
        out.name for out in outputs(broken)
    ]
    for out, other in zip(outputs(broken), outputs(straight), strict=True):
        assert content(out) == content(other)
        assert lines(out) == lines(other)
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_published_is_neither_trained_nor_written_again(config, monkeypatch, steps_taken):
    many = replace(config, k=(2, 4))
    broken_between_publications(many, monkeypatch)
    assert len(steps_taken) == 2 * N_STEPS
    before = stamps(outputs(many)[:1])
    run(many)
    assert len(steps_taken) == 2 * N_STEPS
    assert stamps(outputs(many)[:1]) == before


def test_one_that_is_finished_stays_and_the_others_are_trained(config, tmp_path, steps_taken):
    done = run(replace(config, k=4, output=tmp_path / "sae_k4.pt"))
    before, logged = stamps([done]), lines(done)
    assert len(steps_taken) == N_STEPS
    table = run(replace(config, k=(2, 4, 5)))
    assert stamps([done]) == before
    assert lines(done) == logged
    assert {k for k, _ in steps_taken[N_STEPS:]} == {2.0, 5.0}
    assert [row["k"] for row in json.loads(table.read_text())] == [2, 4, 5]
    alone = run(replace(config, k=5, output=tmp_path / "alone.pt"))
    assert content(alone) == content(tmp_path / "sae_k5.pt")


def test_another_sae_under_one_of_the_names_is_refused_before_training(config, tmp_path):
    other = run(replace(config, k=4, epochs=1, output=tmp_path / "sae_k4.pt"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match="epochs 1 there, 3 here") as caught:
        run(replace(config, k=(2, 4)))
    assert str(other) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "lists",
    [
        {"k": (4, 4.0)},
        {"seed": (1, 1)},
        {"expansion_factor": (2, 2)},
        {"lr": ("0.001", "1e-3")},
        {"k": ()},
    ],
)
def test_lists_that_name_one_sae_twice_or_none_are_one_line(config, lists):
    with pytest.raises(ConfigError, match=rf"--{next(iter(lists)).replace('_', '-')}") as caught:
        replace(config, **lists)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lists", [{"k": (3.00001, 3.00002)}, {"lr": ("1.00001e-3", "1.00002e-3")}])
def test_values_that_are_close_get_names_of_their_own_or_are_refused(config, tmp_path, lists):
    many = replace(config, epochs=1, **lists)
    try:
        rows = json.loads(run(many).read_text())
    except LorascopeError as error:
        assert "\n" not in str(error)
        assert not list(tmp_path.glob("sae*"))
        return
    assert len({row["sae"] for row in rows}) == 2
    assert all((tmp_path / row["sae"]).exists() for row in rows)


def test_one_that_diverges_is_named(config):
    with pytest.raises(NumberError, match="lower --lr") as caught:
        run(replace(config, lr=("0.01", "1e30")))
    assert "1e+30" in str(caught.value) or "1e30" in str(caught.value)


def test_the_command_line_and_toml_take_one_value_or_several(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data-dir", str(config.data_dir), "--output", "sae.pt"]
    words += ["--expansion-factor", "2", "--batch-size", "64", "--epochs", "1", "--device", "cpu"]
    assert call([*words, "--k", "4", "8"]) == 0
    assert capsys.readouterr().out == "sae.runs.json\n"
    made = [content(tmp_path / f"sae_k{k}.pt") for k in (4, 8)]
    for text, given in (("k = [4, 8]", "sae.runs.json"), ("k = 4", "sae.pt")):
        (tmp_path / "toml").mkdir(exist_ok=True)
        (tmp_path / "lorascope.toml").write_text(text)
        assert call([*words[:4], f"toml/{'sae.pt'}", *words[5:]]) == 0
        assert capsys.readouterr().out == f"toml/{given}\n"
    assert [content(tmp_path / "toml" / f"sae_k{k}.pt") for k in (4, 8)] == made
    assert content(tmp_path / "toml" / "sae.pt") == made[0]
    (tmp_path / "lorascope.toml").write_text('k = ["four"]')
    assert call(words) == 2
    assert capsys.readouterr().err == "ConfigError: --k is 'four', expected number\n"


@pytest.mark.parametrize("name", ["k", "expansion-factor", "lr", "seed"])
def test_run_takes_no_lists(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    words = ["run", "--lora-path", "adapter", "--dataset", "texts.jsonl", "--output", "out"]
    (tmp_path / "lorascope.toml").write_text(f"{name} = [1, 2]" if name != "lr" else "")
    for given in ([f"--{name}", "1", "2"], [] if name != "lr" else ["--lr", "auto", "0.1"]):
        assert call([*words, *given]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"ConfigError: run trains one SAE, --{name} has 2 values; give one")
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
