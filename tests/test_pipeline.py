"""`lorascope run` says first what does not fit, and makes the page without what fails."""

import json
from dataclasses import replace

import pytest

from lorascope import runtime
from lorascope.activations import generate
from lorascope.artifact import read_manifest
from lorascope.causal import direct
from lorascope.errors import AdapterError, ArtifactError, ConfigError, Interrupted
from lorascope.features.index import FeatureIndex
from lorascope.pipeline import RunConfig, run


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


@pytest.mark.parametrize(
    ("error", "raised"), [(AdapterError("no norm"), None), (KeyError("a bug"), KeyError)]
)
def test_a_report_that_fails_is_named_and_the_page_is_made(
    error, raised, small_run, monkeypatch, caplog
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
    assert f"direct failed: {error}; the page is made without it" in caplog.text
    summary = json.loads((config.output / "summary.json").read_text())
    assert summary["failed"] == {"direct": str(error)}
    without = reports_of(page)
    assert len(without) == 2
    run(config)  # and when it can be made, the page has it
    assert len(reports_of(page)) == 3
    assert reports_of(page) > without


def test_labels_are_made_once_and_again_when_what_they_say_changes(small_run):
    labels = small_run.output / "labels.json"
    run(small_run)
    before = labels.stat().st_mtime_ns
    run(small_run)
    assert labels.stat().st_mtime_ns == before
    summary = json.loads((small_run.output / "summary.json").read_text())
    assert 0.3 < summary["label_score_shuffled"] < 0.7
    sae = read_manifest(small_run.output / "features.h5").parents["sae"]
    mine = {"format": "lorascope labels 1", "sae": sae, "features": {"0": {"label": "by hand"}}}
    (small_run.output / "hand-labels.json").write_text(json.dumps(mine))
    page = run(small_run)
    index = FeatureIndex.open(small_run.output / "features.h5")
    assert index[0].label.name == "by hand"
    assert read_manifest(page).parents["labels"] == index.labels.manifest.digest


def test_a_dictionary_that_cannot_fit_is_refused_before_the_first_stage(
    small_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "free_memory", lambda _device: 1 << 20)
    config = replace(small_run, output=tmp_path / "out")
    with pytest.raises(ConfigError, match=r"training 56 latents on 14 columns needs .* 0\.0 GB"):
        run(config)
    assert not (tmp_path / "out").exists()


def test_the_estimate_of_every_stage_comes_before_the_first(
    small_run, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="lorascope")
    monkeypatch.setattr(runtime, "measure_speed", lambda _device: 1e9)
    monkeypatch.setattr(generate, "load_corpus", lambda *_: ([], {}))  # which makes no store

    def stop(*_args, **_kwargs):
        raise Interrupted(15)

    monkeypatch.setattr(generate, "built", stop)
    with pytest.raises(Interrupted):
        run(replace(small_run, output=tmp_path / "out", evaluate_texts=5, sample=10))
    # 10 texts of 512 tokens
    (line,) = [line for line in caplog.messages if "for 5,120 tokens" in line]
    assert "14 columns and 56 latents on cpu (1 GFLOP/s)" in line
    assert all(f"{stage} 0." in line for stage in ("generate", "train", "collect", "evaluate"))


def test_a_report_of_other_settings_in_the_way_is_an_error(small_run):
    run(replace(small_run, effect_texts=2))
    with pytest.raises(ArtifactError, match=r"ablation\.json exists with other settings"):
        run(replace(small_run, effect_texts=3))
