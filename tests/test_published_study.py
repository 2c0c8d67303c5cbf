"""`lorascope study`: planted features have one meaning and columns that mix them do not."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import effect_reports
from builders.labels import label_of, save_labels
from builders.schemas import require_schema
from builders.stores import write_store
from builders.studies import dictionary, each_column, make_texts
from builders.subjects import reference

from lorascope.activations.store import ActivationStore
from lorascope.causal.held_out import HeldOut, load_subject_of
from lorascope.causal.study import read_report
from lorascope.cli import call
from lorascope.errors import AdapterError, ArtifactError, ConfigError, DatasetError, Interrupted
from lorascope.features import collect
from lorascope.features.collect import CollectConfig
from lorascope.features.index import FeatureIndex
from lorascope.inspection import verify
from lorascope.labels import directions, published_study
from lorascope.labels.published_study import StudyConfig, StudyReport, run

N_ROLLOUTS, LENGTH = 60, 50
MIXES = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1], [0, 1, 0.5, 0]])  # latent, column


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as `run` leaves it: four features, two of tokens and two of contexts, mixed."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    n = N_ROLLOUTS * LENGTH
    ids = rng.choice(np.arange(1, 8), n, p=[0.07, 0.35, 0.07, 0.07, 0.18, 0.18, 0.08])
    begins = np.arange(n) % LENGTH == 0
    before = np.concatenate([[0], ids[:-1]])
    fires = [ids == 1, ids == 3, before == 4, before == 7]
    code = np.stack([some & ~begins for some in fires], 1) * rng.uniform(1, 2, (n, 4))
    rows = np.zeros((n, 14), np.float32)
    rows[:, :4] = code @ MIXES.numpy()
    store = write_store(folder / "activations", rows, n_rollouts=N_ROLLOUTS, token_ids=ids)
    W_enc, W_dec = torch.zeros(14, 4), torch.zeros(4, 14)
    W_enc[:4], W_dec[:, :4] = torch.linalg.inv(MIXES), MIXES
    sae = dictionary(
        store.layout, W_enc, W_dec, threshold=0.5, parents={"activations": store.digest}
    )
    sae.save(folder / "sae")
    config = CollectConfig(sae=folder / "sae", data_dir=store.path, output=folder / "features.h5")
    collect.run(config)
    return folder


@pytest.fixture
def study(made, tmp_path):
    def study(**given):
        values = {"input": made / "features.h5", "output": tmp_path / "study.json", **given}
        return read_report(run(StudyConfig(**values)), (StudyReport,))

    return study


def test_features_have_one_meaning_and_columns_that_mix_them_several(study, made):
    report, manifest = study()
    features, columns = report.features, report.columns
    assert (features.n_all, features.n_drawn, features.n_scored) == (4, 4, 4)
    assert (columns.n_all, columns.n_drawn, columns.n_scored) == (28, 28, 4), "others are never > 0"
    assert features.monosemantic.value == 1
    assert columns.monosemantic.value <= 0.5
    assert columns.below_features.low > 0
    assert columns.polysemantic.value >= 0.5
    assert features.shuffled == 0
    assert features.balanced_accuracy.value > 0.95 > features.shuffled_accuracy
    for kind in (features, columns):
        assert kind.monosemantic.value + kind.broad.value + kind.polysemantic.value == 1
        for estimate in (kind.monosemantic, kind.unclear, kind.balanced_accuracy):
            assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert report.neurons is None
    index = FeatureIndex.open(made / "features.h5")
    assert manifest.parents == {"features": index.manifest.digest}
    assert report.n_rollouts_scoring == N_ROLLOUTS / 2


def test_shares_of_groups_are_those_of_all_firings(study, made):
    report, _ = study()
    index = FeatureIndex.open(made / "features.h5")
    fired = index.latent_n_active
    assert sorted(latent for one in report.groups for latent in one.features) == [0, 1, 2, 3]
    for one in report.groups:
        expected = fired[list(one.features)].sum() / fired.sum()
        assert one.firings.value == pytest.approx(expected, rel=1e-9)
        assert one.firings.low <= expected <= one.firings.high
        assert one.effect is None


def test_shares_of_effect_are_those_of_the_sum_of_removals(study, made, tmp_path):
    index = FeatureIndex.open(made / "features.h5")
    removals = effect_reports.ablation(index)
    path = effect_reports.write(tmp_path / "ablation.json", "ablation", index, removals)
    report, manifest = study(effects=(path,))
    assert "ablation" in manifest.parents
    assert sum(one.effect or 0 for one in report.groups) == pytest.approx(1)
    nats = {one["feature"]: 400 * one["kl"] for one in removals["features"]}
    for one in report.groups:
        expected = sum(nats.get(latent, 0) for latent in one.features) / sum(nats.values())
        assert one.effect == pytest.approx(expected)
        assert one.effect_interval is not None
        assert one.effect_interval[0] <= one.effect <= one.effect_interval[1]


@pytest.mark.parametrize("schema", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_report_of_ablate_from_before_slices_gives_shares_without_an_interval(
    study, made, tmp_path, schema
):
    index = FeatureIndex.open(made / "features.h5")
    removals = effect_reports.ablation(index)
    for entry in removals["features"]:
        del entry["spread"]
    path = effect_reports.write(tmp_path / "ablation.json", "ablation", index, removals, schema)
    report, _ = study(effects=(path,))
    assert sum(one.effect or 0 for one in report.groups) == pytest.approx(1)
    assert {one.effect_interval for one in report.groups} == {None}


def test_labels_name_groups(study, made, tmp_path):
    for name in ("activations", "sae"):
        (tmp_path / name).symlink_to(made / name)
    source = tmp_path / "features.h5"
    source.write_bytes((made / "features.h5").read_bytes())
    save_labels(source, {i: label_of("a") for i in range(4)})
    report, manifest = study(input=source)
    assert {one.name.split()[0] for one in report.groups} == {"words"}
    assert "labels" in manifest.parents


@pytest.mark.slow
def test_a_stopped_and_repeated_command_gives_the_same_bytes(made, tmp_path, monkeypatch):
    def command(name):
        return StudyConfig(input=made / "features.h5", output=tmp_path / name)

    calm = run(command("calm.json"))

    def stop(*_):
        raise Interrupted(15)

    for step in ("draw_study", "_shares"):
        with monkeypatch.context() as patch:
            patch.setattr(published_study, step, stop)
            with pytest.raises(Interrupted):
                run(command("stopped.json"))
        assert not (tmp_path / "stopped.json").exists()
    assert run(command("stopped.json")).read_bytes() == calm.read_bytes()
    for suffix in (".png", ".svg"):
        drawn = [(tmp_path / name).with_suffix(suffix) for name in ("calm", "stopped")]
        assert drawn[0].read_bytes() == drawn[1].read_bytes()
    assert verify(calm) == []
    with pytest.raises(ArtifactError, match="directions 500 there, 3 here"):
        run(replace(command("calm.json"), directions=3))


def test_verify_names_what_is_not_a_study(study, tmp_path):
    study()
    path = tmp_path / "study.json"
    require_schema(path, "study")
    path.write_text(path.read_text().replace('"n_scored": 4', '"n_scored": 5', 1))
    assert verify(path)


@pytest.mark.slow
def test_the_command_prints_its_tables_and_refuses_what_does_not_fit(made, tmp_path, capsys):
    out = tmp_path / "study.json"
    command = ["study", "--input", str(made / "features.h5"), "--output", str(out)]
    assert call(command) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out)
    for word in ("monosemantic", "columns", "features more by", "shuffled", "group of features"):
        assert word in captured.err
    index = FeatureIndex.open(made / "features.h5")
    other = replace(index, manifest=replace(index.manifest, parents={"sae": "0" * 64}))
    foreign = effect_reports.write(
        tmp_path / "foreign.json", "ablation", other, effect_reports.ablation(index)
    )
    beside = shutil.copytree(made, tmp_path / "copy") / "effects" / "ablation.json"
    beside.parent.mkdir()
    shutil.copy(foreign, beside)
    found = run(StudyConfig(input=beside.parents[1] / "features.h5", directions=4))
    assert read_report(found, (StudyReport,))[1].parents.keys() == {"features"}
    assert f"{beside} is left out: it is not of the index's SAE" in capsys.readouterr().err
    given = {"input": made / "features.h5", "output": out}
    with pytest.raises(ArtifactError, match="of another SAE"):
        run(StudyConfig(effects=(foreign,), **given))
    with pytest.raises(ConfigError, match="expected one of ablate"):
        StudyConfig(effects=(foreign, foreign), **given)
    with pytest.raises(DatasetError, match="four rollouts"):
        run(StudyConfig(label_tokens=1, **{**given, "output": tmp_path / "few.json"}))
    assert json.loads(out.read_text())["features"]["n_scored"] == 4


@pytest.fixture(scope="module")
def neurons(subject_dirs, dataset_file, tmp_path_factory):
    """A store of a real adapter with an index, and the config of its study."""
    folder = tmp_path_factory.mktemp("neurons")
    store = ActivationStore.open(make_texts(subject_dirs, dataset_file, folder / "activations"))
    each_column(store, parents={"activations": store.digest}).save(folder / "sae")
    collect.run(
        CollectConfig(sae=folder / "sae", data_dir=store.path, output=folder / "features.h5")
    )
    base, adapter = subject_dirs
    return StudyConfig(
        lora_path=str(adapter), base_model=str(base), input=folder / "features.h5", device="cpu"
    )


@torch.inference_mode()
def test_neurons_are_what_the_gate_lets_through_of_up_in_the_adapted_model(neurons, subject_dirs):
    store = ActivationStore.open(neurons.input.parent / "activations")
    subject = load_subject_of(store, neurons, device="cpu", dtype="float32")
    readers = directions.mlp_readers(subject.causal)
    assert [width for _, width in readers] == [32, 32]
    n = int(store.rollout_start[3])
    drawn = directions.Drawn(128, np.array([5, 31, 32, 60]), np.ones(4, np.int64))
    replay = HeldOut(subject, store, np.arange(3), batch_tokens=64)
    found = directions.neuron_values(replay, readers, np.arange(1, n, 2), drawn)
    model = reference(subject_dirs[1], subject_dirs[0])
    mlps = [layer.mlp for layer in model.base_model.model.model.layers]
    seen = []
    for mlp in mlps:
        mlp.register_forward_pre_hook(
            lambda m, args: seen.append(m.act_fn(m.gate_proj(args[0])) * m.up_proj(args[0]))
        )
    expected = []
    for i in range(3):
        first, last = store.rollout_start[i : i + 2]
        seen.clear()
        model(torch.from_numpy(store.token_ids[first:last].astype(np.int64))[None])
        expected.append(torch.cat([some[0] for some in seen], dim=-1)[:, drawn.units])
    values = torch.cat(expected).numpy()[1::2]
    np.testing.assert_allclose(found, values, rtol=2e-3, atol=1e-5)  # float16


@pytest.mark.slow
def test_a_study_with_neurons_has_all_three_kinds(neurons):
    report, manifest = read_report(run(replace(neurons, directions=20)), (StudyReport,))
    assert report.neurons is not None
    assert report.neurons.n_all == 2 * 64
    assert list(report.kinds()) == ["features", "columns", "neurons"]
    assert manifest.settings["neurons"] is True


def test_models_whose_neurons_see_some_tokens_only_are_refused():
    class Model(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.mlp = torch.nn.ModuleDict(
                {name: torch.nn.ModuleDict({"w2": torch.nn.Linear(3, 2)})}
            )

    assert directions.mlp_readers(Model("dense"))[0][1] == 3
    with pytest.raises(AdapterError, match="has experts"):
        directions.mlp_readers(Model("experts"))
    with pytest.raises(AdapterError, match="no known MLP"):
        directions.mlp_readers(torch.nn.Linear(2, 2))
