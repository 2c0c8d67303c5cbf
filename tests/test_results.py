"""`Study`: a run's results as an object say what the files say, and steer with the real model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from builders.effect_reports import ablation, direct, evaluation, write, write_all
from builders.hostile import HOSTILE, hostile_index
from builders.indexes import full_index, manifest_of
from builders.labels import label_of, save_labels
from builders.pages import Parsed
from builders.studies import each_column, make_texts, strengthen

from lorascope import Study
from lorascope.activations.store import ActivationStore
from lorascope.causal.steer import SteerConfig
from lorascope.causal.steer import run as steer
from lorascope.causal.study import open_report
from lorascope.dashboard.overview import ORDERS
from lorascope.dashboard.report import ReportConfig
from lorascope.dashboard.report import run as report
from lorascope.errors import AdapterError, ArtifactError, ConfigError, DatasetError
from lorascope.features.collect import CollectConfig
from lorascope.features.collect import run as collect
from lorascope.features.label_file import Labels
from lorascope.record_json import to_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of a run whose reports are made up."""
    index, out = full_index(), tmp_path_factory.mktemp("run")
    index.save(out / "features.h5")
    save_labels(out / "features.h5", {i: label_of(f"label {i}") for i in range(40)})
    (out / "effects").mkdir()
    write_all(out / "effects", index)
    write(out / "evaluation.json", "evaluation", index, evaluation())
    return out


def test_a_run_is_opened_by_its_folder_or_its_index_and_says_what_the_report_says(folder):
    study = Study.open(folder)
    assert len(study) == len(full_index())
    assert repr(study).endswith("60 features; evaluation, ablation, direct, attribution)")
    found = json.loads(report(ReportConfig(input=folder)).read_text(encoding="utf-8"))
    found.pop("metadata")
    assert json.loads(json.dumps(to_json(study.overview))) == found
    same = Study.open(str(folder / "features.h5"))
    assert same.overview == study.overview
    assert study.sae is None and study.data_dir is None


def test_each_question_has_the_numbers_of_the_files(folder):
    study, index = Study.open(folder), full_index()
    of_file = ablation(index)["features"]
    for latent in (0, 1, 4, 57):
        found = study.effect(latent)
        assert found is not None and json.loads(json.dumps(to_json(found))) == {
            key: value for key, value in of_file[latent].items() if value != []
        }
    assert study.effect(59) is None, "not measured"
    promoted = direct(index)["features"][3]
    tokens = study.tokens(3)
    assert tokens is not None and json.loads(json.dumps(to_json(tokens))) == promoted
    assert study[3].similar == index[3].similar
    label = study[3].label
    assert label is not None and label.name == "label 3"
    assert study.reports.evaluation is not None


def test_orders_are_those_of_the_numbers_and_leave_out_what_is_unknown_or_dead(folder):
    study, n = Study.open(folder), 1000
    removals = {one["feature"]: one for one in ablation(full_index())["features"]}
    shares = {f: one["kl"] for f, one in removals.items()}
    by_effect = [one.feature for one in study.top("effect", n)]
    alive = set(study.index.alive.nonzero()[0].tolist())
    assert set(by_effect) == alive & shares.keys()
    assert by_effect == sorted(by_effect, key=lambda f: (-shares[f], f))
    excess = {f: one["pull_excess"][0] for f, one in removals.items() if one["pull_excess"]}
    by_pull = [one.feature for one in study.top("specificity", n)]
    assert set(by_pull) == alive & excess.keys()
    assert by_pull == sorted(by_pull, key=lambda f: (-excess[f], f))
    assert study.top("specificity", 1)[0].verdict == "specific"
    densities = [one.density or 0 for one in study.top("density", n)]
    assert densities == sorted(densities, reverse=True) and len(densities) == len(alive)
    assert {one.feature for one in study.top("label", n)} == alive & set(range(40))
    for by in ORDERS:
        assert len(study.top(by, 3)) == 3
    top = study.top()[0]
    assert top.effect == pytest.approx(shares[top.feature] / 0.3)
    assert top == study.summary(top.feature)
    assert top in study.overview.features


def test_search_gives_the_features_of_the_index_in_its_order(folder):
    study = Study.open(folder)
    assert [one.feature for one in study.search("label 1", 3)] == study.index.search("label 1")[:3]
    assert study.search("no text has this") == ()


def test_what_was_not_measured_is_said_and_not_made_up(tmp_path):
    index = replace(full_index(), labels=None)
    index.save(tmp_path / "features.h5")
    study = Study.open(tmp_path)
    assert repr(study).endswith("no reports)")
    assert study.effect(0) is None and study.tokens(0) is None
    for by, words in (("effect", "lorascope ablate"), ("label", "lorascope label")):
        with pytest.raises(ConfigError, match=f"has no {by} of features beside it; {words}"):
            study.top(by)
    assert study.top("activation")
    with pytest.raises(ConfigError, match="no order is called efect; did you mean effect"):
        study.top("efect")
    for ask in (study.summary, study.effect, study.tokens, study.__getitem__):
        with pytest.raises(IndexError, match="latent 60 does not exist, expected 0 to 59"):
            ask(60)
    with pytest.raises(ConfigError, match="no model is loaded; call study = study.load"):
        study.steer(0)
    with pytest.raises(ArtifactError, match="has no store beside it; give Study.open its data_dir"):
        study.load("adapter")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"has no features.h5; give the folder of a run"):
        Study.open(tmp_path / "empty")


def test_given_reports_are_read_and_those_of_another_sae_refused(folder, tmp_path):
    index = full_index()
    index.save(tmp_path / "features.h5")
    study = Study.open(tmp_path, effects=[folder / "effects" / "direct.json"])
    assert study.reports.direct is not None and study.reports.ablation is None
    other = replace(index, manifest=replace(index.manifest, parents={"sae": "another"}))
    path = write(tmp_path / "direct.json", "direct", other, direct(index))
    with pytest.raises(ArtifactError, match="was made with another SAE"):
        Study.open(tmp_path, effects=[path])


def test_a_feature_that_never_fires_has_a_summary_without_an_example(folder):
    study = Study.open(folder)
    dead = int((~study.index.alive).nonzero()[0][0])
    found = study.summary(dead)
    assert (found.before, found.token, found.after) == ("", "", "")


def test_a_study_shows_itself_in_a_notebook_and_hostile_text_is_text(folder):
    study = Study.open(folder)
    shown = Parsed(study._repr_html_())
    assert study.overview.headline[1].split("“")[0] in shown.text
    assert study.top()[0].name in shown.text
    labels = {i: label_of(HOSTILE[i % len(HOSTILE)]) for i in range(70)}
    index = replace(hostile_index(70), labels=Labels(labels, manifest_of(70)))
    html = replace(study, index=index, reports=replace(study.reports, n_features=70))._repr_html_()
    assert html.isascii()
    assert Parsed(html).tags <= set("p b table thead tbody tr th td bdi mark".split())


@pytest.fixture(scope="module")
def run_dirs(make_subject, dataset_file, tmp_path_factory):
    """A base, a strong adapter, and the folder of their store, SAE and index."""
    out = tmp_path_factory.mktemp("real")
    base, adapter = strengthen(make_subject(), tmp_path_factory.mktemp("strong"), 3.0)
    store = make_texts((base, adapter), dataset_file, out / "activations", num_examples=4)
    each_column(ActivationStore.open(store), 0.05).save(out / "sae")
    collect(CollectConfig(sae=out / "sae", data_dir=store, output=out / "features.h5"))
    return base, adapter, out


@pytest.fixture(scope="module")
def loaded(run_dirs):
    base, adapter, out = run_dirs
    return Study.open(out).load(adapter, base_model=str(base), device="cpu")


def test_steering_writes_what_the_command_writes_and_no_file(loaded, run_dirs, tmp_path):
    base, adapter, out = run_dirs
    before = sorted(out.rglob("*"))
    options = {"doses": (2.0,), "num_prompts": 2, "max_new_tokens": 5}
    found = loaded.steer([3, 5], **options)
    made = steer(
        SteerConfig(
            lora_path=str(adapter),
            base_model=str(base),
            data_dir=out / "activations",
            sae=out / "sae",
            features=(3, 5),
            device="cpu",
            output=tmp_path / "steering.json",
            **options,
        )
    )
    of_file = open_report(made)
    of_file.pop("metadata")
    assert json.loads(json.dumps(to_json(found))) == of_file
    assert sorted(out.rglob("*")) == before


def test_prompts_are_texts_records_or_a_file(loaded, dataset_file, tmp_path):
    options = {"how": "remove", "doses": (1.0,), "max_new_tokens": 3}
    texts = loaded.steer(3, prompts=["What is 2 + 3?", "Why?"], **options)
    assert len(texts.prompts) == 2 and "What is 2 + 3?" in texts.prompts[0].text
    assert texts.prompts[0].text.endswith("assistant\n"), "the chat template was applied"
    messages = [{"messages": [{"role": "user", "content": "Why?"}]}]
    records = loaded.steer(3, prompts=messages, **options)
    assert records.prompts[0].text == texts.prompts[1].text
    of_file = loaded.steer(3, prompts=dataset_file, num_prompts=2, **options)
    assert len(of_file.prompts) == 2
    with pytest.raises(DatasetError, match="no room in the model's context of 512"):
        loaded.steer(3, prompts=["word " * 900], **options)


@pytest.mark.slow
def test_base_and_adapter_answer_the_same_prompts(loaded):
    asked = loaded.answers(["What is 2 + 3?", "Why?"])
    assert [one.rollout for one in asked] == [0, 1]
    assert any(one.base != one.adapter for one in asked)
    (own,) = loaded.answers(n=1)
    assert own.rollout in loaded._loaded.held_out.store.rollout_id
    layout = loaded._loaded.held_out.subject.layout
    dora = replace(layout, sites=tuple(replace(s, lora_kind="dora") for s in layout.sites))
    held_out = replace(
        loaded._loaded.held_out, subject=replace(loaded._loaded.held_out.subject, layout=dora)
    )
    other = replace(loaded, _loaded=replace(loaded._loaded, held_out=held_out))
    with pytest.raises(AdapterError, match="is not plain LoRA"):
        other.answers(n=1)


def test_impossible_requests_are_one_line(loaded, run_dirs, tmp_path):
    base, adapter, out = run_dirs
    for ask, words in (
        (lambda: loaded.steer(3, dose=1), "steer has no option dose; did you mean doses"),
        (lambda: loaded.steer(10**6), "has features 0 to"),
        (lambda: loaded.steer(()), "names no feature"),
        (lambda: Study.open(out).load(adapter, base="x"), "load has no option base"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            ask()
        assert "\n" not in str(caught.value)
    each_column(ActivationStore.open(out / "activations"), 0.5).save(tmp_path / "other")
    with pytest.raises(ArtifactError, match="is another SAE than that of"):
        Study.open(out, sae=tmp_path / "other").load(adapter, base_model=str(base))
    with pytest.raises(AdapterError, match="does not exist"):
        Study.open(out).load(tmp_path / "nothing", base_model=str(base))
