"""`lorascope run` says first what does not fit, and makes the page without what fails."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
from builders.schemas import require_schema
from safetensors.torch import load_file, save_file

from lorascope import depth, pipeline, runtime
from lorascope.activations import generate
from lorascope.artifact import read_manifest, sealed
from lorascope.causal import direct
from lorascope.errors import AdapterError, ArtifactError, ConfigError, Interrupted
from lorascope.features.index import FeatureIndex
from lorascope.pipeline import RunConfig, run
from lorascope.subject.adapter_files import WEIGHTS


@pytest.fixture(scope="module")
def small_run(subject_dirs, dataset_file, tmp_path_factory):
    """A run on a tiny model that is made up to its page, without effects."""
    base, adapter = subject_dirs
    config = RunConfig(
        lora_path=str(adapter),
        base_model=str(base),
        dataset=str(dataset_file),
        num_examples=20,
        k=4,
        expansion_factor=4,
        epochs=1,
        evaluate_texts=0,
        effect_texts=0,
        output=tmp_path_factory.mktemp("run") / "out",
        device="cpu",
    )
    run(config)
    return config


def reports_of(page):
    """The names of the reports that a page was made from."""
    manifest = read_manifest(page)
    assert manifest is not None
    return manifest.parents.keys() - {"features", "labels"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said", "raised"),
    [
        (AdapterError("no norm"), "no norm", None),
        (KeyError("a bug"), "'a bug'", KeyError),
        (MemoryError("no 7 GB"), "out of memory: no 7 GB", None),
    ],
)
def test_a_report_that_fails_is_named_and_the_page_is_made(
    error, said, raised, small_run, monkeypatch, caplog
):
    def fail(_config):
        raise error

    config = replace(small_run, effect_texts=2)
    with monkeypatch.context() as patch:
        patch.setattr(direct, "run", fail)
        if raised is None:
            page = run(config)
        else:
            with pytest.raises(raised):
                run(config)
            page = config.output / "dashboard.html"
    assert f"direct failed: {said}; the page is made without it" in caplog.text
    summary = json.loads((config.output / "summary.json").read_text())
    assert summary["failed"] == {"direct": said}
    without = reports_of(page)
    assert len(without) == 2
    run(config)  # and when it can be made, the page has it
    assert len(reports_of(page)) == 3
    assert reports_of(page) > without


@pytest.mark.slow
def test_what_features_of_an_adapter_of_zeros_do_is_not_measured(
    subject_dirs, small_run, monkeypatch, caplog
):
    base, adapter = subject_dirs
    zero = small_run.output.parent / "zero"
    shutil.copytree(adapter, zero)
    weights = load_file(zero / WEIGHTS)
    weights |= {name: value * 0 for name, value in weights.items() if "lora_B" in name}
    save_file(weights, zero / WEIGHTS, metadata={"format": "pt"})
    out = small_run.output.parent / "of-zero"
    caplog.set_level(logging.INFO)
    given = {"output": out, "lora_path": str(zero), "effect_texts": 2, "normalize": "std"}
    page = run(replace(small_run, base_model=str(base), **given))
    assert reports_of(page) == set()
    assert [text for text in caplog.messages if "every B" in text] == [
        "every B of the adapter is zero: no effects of features are measured"
    ]
    assert not list(out.glob("effects/*[!s].json"))
    assert json.loads((out / "summary.json").read_text())["failed"] == {}


@pytest.mark.slow
def test_labels_are_made_once_and_again_when_what_they_say_changes(small_run):
    labels = small_run.output / "labels.json"
    run(small_run)
    before = labels.stat().st_mtime_ns
    run(small_run)
    assert labels.stat().st_mtime_ns == before
    require_schema(small_run.output / "summary.json", "summary")
    summary = json.loads((small_run.output / "summary.json").read_text())
    assert 0.3 < summary["label_score_shuffled"] < 0.7
    sae = read_manifest(small_run.output / "features.h5").parents["sae"]
    mine = {"format": "lorascope labels 1", "sae": sae, "features": {"0": {"label": "by hand"}}}
    (small_run.output / "hand-labels.json").write_text(json.dumps(mine))
    page = run(small_run)
    index = FeatureIndex.open(small_run.output / "features.h5")
    assert index[0].label.name == "by hand"
    assert read_manifest(page).parents["labels"] == index.labels.manifest.digest


@pytest.mark.slow
def test_labels_of_an_older_version_are_made_again_unless_they_have_other_settings(small_run):
    labels = small_run.output / "labels.json"
    run(small_run)
    new = labels.read_bytes()

    def as_before(**settings):
        data = json.loads(new)
        manifest = data["metadata"]["lorascope"]
        manifest |= {"schema": 1, "seal": "lorascope-sha256:" + "0" * 64}
        del manifest["settings"]["features"]
        manifest["parents"].pop("ablation", None)  # which other tests here make
        manifest["settings"] |= settings
        labels.write_text(sealed(json.dumps(data)))

    as_before()
    run(small_run)
    assert labels.read_bytes() == new
    as_before(llm_model="one that was paid for")
    with pytest.raises(ArtifactError, match="llm_model one that was paid for there"):
        run(small_run)
    labels.write_bytes(new)


def test_a_dictionary_that_cannot_fit_is_refused_before_the_first_stage(
    small_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "free_memory", lambda _device: 1 << 20)
    config = replace(small_run, output=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"training 56 latents on 14 columns needs .* 0\.0 GB"):
        run(config)
    assert not (tmp_path / "out").exists()


def stopped(small_run, monkeypatch, output, **given):
    """Run until the first stage has said what the others will take, on 20 texts of 512 tokens."""
    monkeypatch.setattr(generate, "load_corpus", lambda *_: ([], {}))

    def stop(*_args, **_kwargs):
        raise Interrupted(15)

    monkeypatch.setattr(generate, "built", stop)
    given = {"evaluate_texts": None, "effect_texts": None, "sample": 20} | given
    config = replace(small_run, output=output, **given)
    with pytest.raises(Interrupted):
        run(config)
    return config


def test_the_estimate_of_every_stage_comes_before_the_first(
    small_run, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="lorascope")
    monkeypatch.setattr(runtime, "measure_speed", lambda _device: 1e9)
    stopped(small_run, monkeypatch, tmp_path / "out", evaluate_texts=5, effect_texts=0)
    (line,) = [line for line in caplog.messages if "for 10,240 tokens" in line]
    assert "14 columns and 56 latents on cpu (1 GFLOP/s)" in line
    assert all(f"{stage} 0." in line for stage in ("generate", "train", "collect", "evaluate"))


def test_effects_are_on_as_many_texts_as_fit_into_half_an_hour(
    small_run, tmp_path, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "measure_speed", lambda _device: 1e12)
        config = stopped(small_run, patch, tmp_path / "fast")
    stages = pipeline._stages(config)
    assert stages["evaluate"][1].max_rollouts == 50
    assert stages["ablate"][1].max_rollouts == 32
    assert "instead of" not in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "measure_speed", lambda _device: 1e7)
        config = stopped(small_run, patch, tmp_path / "slow")
    (said,) = [line for line in caplog.messages if "instead of 32" in line]
    require_schema(config.output / "effects" / depth.FILE, "effect-texts")
    n = json.loads((config.output / "effects" / depth.FILE).read_text())["effect_texts"]
    assert 0 < n < 32
    assert said.startswith(f"effects are measured on {n} texts")
    kept = depth.noted(config.plan, config.output / "effects")
    assert (kept.effects, kept.parts) == (n, 4)
    with monkeypatch.context() as patch:  # a faster moment does not change what is under way
        patch.setattr(runtime, "measure_speed", lambda _device: 1e12)
        stopped(small_run, patch, config.output)
        assert depth.noted(config.plan, config.output / "effects").effects == n
        stopped(small_run, patch, config.output, overwrite=True)
        assert depth.noted(config.plan, config.output / "effects").effects == 32
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "measure_speed", lambda _device: 1e7)
        config = stopped(small_run, patch, tmp_path / "asked", effect_texts=32)
    assert depth.noted(config.plan, config.output / "effects").effects == 32


def test_the_budget_is_of_the_runs_on_texts():
    plan = depth.DEPTHS["standard"]
    n_sites = 100
    for n in (0, 2, 4, 5, 32):
        runs = 100 * n + 300 * min(n, 4)
        assert depth.effect_runs(plan._replace(effects=n), n_sites) == runs


def test_a_text_that_takes_longer_than_the_budget_is_said_and_the_page_is_made(
    small_run, tmp_path, caplog
):
    folder = tmp_path / "effects"
    fitted = depth.fit(depth.DEPTHS["standard"], 14, 1e6, folder)
    assert fitted.effects == 0
    with pytest.raises(ConfigError, match="one text takes more than 30 minutes"):
        depth.noted(depth.DEPTHS["standard"], folder)
    (folder / depth.FILE).write_text('{"effect_texts": 99}')
    with pytest.raises(ConfigError, match=r"texts\.json has no number of texts from 0 to 32"):
        depth.noted(depth.DEPTHS["standard"], folder)


def test_depths_and_explicit_numbers():
    def of(**given):
        config = RunConfig(lora_path="a", dataset="b", **given)
        stages = pipeline._stages(config)
        found = {name: stages[name][1] for name in ("evaluate", "ablate") if name in stages}
        return {name: one.max_rollouts for name, one in found.items()}, stages

    assert of(depth="quick")[0] == {"evaluate": 20}
    assert of()[0] == {"evaluate": 50, "ablate": 32}
    found, stages = of(depth="full")
    assert found == {"evaluate": 200, "ablate": 128}
    assert (stages["ablate"][1].part_rollouts, stages["ablate"][1].greedy) == (32, "projection")
    assert of(depth="quick", effect_texts=3)[0] == {"evaluate": 20, "ablate": 3}
    assert of(depth="full", evaluate_texts=0)[0] == {"ablate": 128}
    with pytest.raises(ConfigError, match="--effect-texts"):
        RunConfig(lora_path="a", dataset="b", effect_texts=-1)


@pytest.mark.slow
def test_a_deeper_run_replaces_what_a_quick_one_measured(small_run, monkeypatch):
    def texts(name):
        return read_manifest(small_run.output / name).settings["max_rollouts"]

    plan = depth.DEPTHS["quick"]
    monkeypatch.setitem(depth.DEPTHS, "quick", plan._replace(evaluate=1))
    monkeypatch.setitem(depth.DEPTHS, "standard", plan._replace(evaluate=2, effects=1))
    deeper = replace(small_run, evaluate_texts=None, effect_texts=None, overwrite=False)
    run(replace(deeper, depth="quick", overwrite=True))
    assert texts("evaluation.json") == 1
    run(replace(deeper, effect_texts=0))
    assert texts("evaluation.json") == 2
    with pytest.raises(ArtifactError, match=r"max_rollouts 2 there, 1 here"):
        run(replace(deeper, depth="quick"))
    with pytest.raises(ArtifactError, match=r"max_rollouts 2 there, 3 here"):
        run(replace(deeper, evaluate_texts=3))


@pytest.mark.slow
def test_a_report_of_other_settings_in_the_way_is_an_error(small_run):
    run(replace(small_run, effect_texts=2))
    with pytest.raises(ArtifactError, match=r"ablation\.json exists with other settings"):
        run(replace(small_run, effect_texts=3))
