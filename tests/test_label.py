"""`lorascope label` on a store whose features are known: the words, the scores, the file."""

import json
import shutil

import numpy as np
import pytest
import torch
from builders.chat_server import chat_server
from builders.effect_reports import ablation, write
from builders.stores import layout_of, write_store
from builders.studies import dictionary

from lorascope.artifact import sealed
from lorascope.causal.report_records import DirectEffect, DirectReport, ScoredToken
from lorascope.cli import call
from lorascope.errors import ArtifactError, ConfigError, DatasetError
from lorascope.features import collect, export
from lorascope.features.collect import CollectConfig
from lorascope.features.export import ExportConfig
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import read_labels
from lorascope.inspection import verify
from lorascope.labels.label import LabelConfig, run
from lorascope.record_json import to_json

WAIT, AFTER_WAIT, SPECIAL, RANDOM, DEAD = range(5)  # what the latents fire on
D_SAE = 6  # the last one fires before "the", which only the output knows
N_ROLLOUTS, LENGTH = 60, 50
THE, WAITS = 1, (5, 6)  # token ids of `write_store`


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as `run` leaves it, with a column for each latent."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    n = N_ROLLOUTS * LENGTH
    ids = rng.integers(1, 8, n)
    begins = np.arange(n) % LENGTH == 0
    waits = np.isin(ids, WAITS) & ~begins
    rows = np.zeros((n, 14), np.float32)
    rows[:, WAIT] = waits
    rows[:, AFTER_WAIT] = np.concatenate([[False], waits[:-1]]) & ~begins
    rows[:, SPECIAL] = begins
    rows[:, RANDOM] = rng.random(n) < 0.05
    rows[:, D_SAE - 1] = np.append((ids == THE)[1:] & ~begins[1:], False)
    write_store(folder / "activations", 2 * rows, n_rollouts=N_ROLLOUTS, token_ids=ids)
    weights = torch.eye(14)[:D_SAE]
    sae = dictionary(layout_of(), weights.T.contiguous(), weights, threshold=1.0)
    sae.save(folder / "sae")
    config = CollectConfig(
        sae=folder / "sae", data_dir=folder / "activations", output=folder / "features.h5"
    )
    collect.run(config)
    return folder


@pytest.fixture
def label(made, tmp_path):
    def label(**given):
        values = {"input": made / "features.h5", "output": tmp_path / "labels.json", **given}
        return read_labels(run(LabelConfig(**values)))

    return label


def beside(made, tmp_path, by_hand):
    """A copy of the run with labels by hand next to the index."""
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    shutil.copy(by_hand, folder / "hand-labels.json")
    return folder / "features.h5"


def promotes(token_id, z=9.0, share=0.8):
    """A report of `direct` in which every latent promotes one token."""
    token = ScoredToken(token_id=token_id, token=" é", z=z)
    effects = tuple(
        DirectEffect(feature=i, share=share, promoted=(token,), suppressed=()) for i in range(D_SAE)
    )
    report = DirectReport(
        unit="standard deviations",
        n_tokens=1,
        writers=(),
        indirect=(),
        vocabulary={str(token_id): " é".encode().hex()},
        features=effects,
    )
    return to_json(report)


def test_known_features_get_their_words_and_scores(label):
    labels = label().features
    assert sorted(labels) == [WAIT, AFTER_WAIT, SPECIAL, RANDOM, D_SAE - 1]  # none for the dead
    assert labels[WAIT].name == '"wait"'
    assert labels[WAIT].sentence == 'Fires on the token "wait".'
    assert labels[WAIT].kind == "token"
    assert labels[AFTER_WAIT].sentence == 'Fires on a token right after "wait".'
    assert labels[AFTER_WAIT].kind == "context"
    assert labels[SPECIAL].kind == "position"
    assert labels[SPECIAL].category == "template"
    for latent in (WAIT, AFTER_WAIT, SPECIAL):
        assert labels[latent].balanced_accuracy == labels[latent].precision == 1
        assert labels[latent].author == "rule"
        assert labels[latent].interval is not None
        assert 0.8 < labels[latent].interval[0] < 1
    assert labels[RANDOM].kind == "unclear"
    assert labels[RANDOM].name.startswith("unclear")
    shuffled = [found.shuffled for found in labels.values() if found.shuffled is not None]
    assert 0.4 < np.mean(shuffled) < 0.6


def test_scores_are_of_rollouts_that_did_not_choose(label, made):
    labels = label()
    content = labels.manifest.content
    assert content["n_rollouts_choosing"] == content["n_rollouts_scoring"] == N_ROLLOUTS / 2
    index = FeatureIndex.open(made / "features.h5")
    n_wait = labels.features[WAIT].n_fired
    assert 0.4 < n_wait / index[WAIT].stats.n_active < 0.6
    assert content["n_labels"] == 5
    assert content["n_by_kind"]["unclear"] == 2
    assert content["chance"] == 0.5


def test_what_a_feature_promotes_describes_it_where_no_rule_does(label, made, tmp_path):
    index = FeatureIndex.open(made / "features.h5")
    path = write(tmp_path / "direct.json", "direct", index, promotes(THE))
    labels = label(effects=(path,)).features
    before_the = labels[D_SAE - 1]
    assert before_the.kind == "output"
    assert before_the.name == 'before " é"'
    assert before_the.balanced_accuracy == before_the.output.balanced_accuracy > 0.9
    assert labels[WAIT].kind == "token"  # the rule is better
    assert labels[WAIT].sentence == 'Fires on the token "wait". Promotes " é".'
    weak = write(tmp_path / "weak.json", "direct", index, promotes(THE, z=1.0))
    assert label(effects=(weak,), output=tmp_path / "b.json").features[WAIT].output is None


def test_promoted_tokens_are_tested_on_what_removing_the_feature_changes(
    label, made, tmp_path, caplog
):
    """Each feature promotes its own token, which falls when it is removed, but one's does not."""
    index = FeatureIndex.open(made / "features.h5")
    report = promotes(THE)
    for effect in report["features"]:
        effect["promoted"][0]["token_id"] = effect["feature"]
    direct = write(tmp_path / "direct.json", "direct", index, report)
    removals = ablation(index)
    removals["features"] = [
        {
            **removals["features"][0],
            "feature": latent,
            "falls": [{"token_id": 99 if latent == RANDOM else latent, "token": "x", "share": 0.5}],
        }
        for latent in (WAIT, AFTER_WAIT, SPECIAL, RANDOM, D_SAE - 1)
    ]
    removed = write(tmp_path / "ablation.json", "ablation", index, removals)
    labels = label(effects=(direct, removed))
    assert "picked_effect" not in caplog.text
    found = {i: one.picked_effect for i, one in labels.features.items()}
    assert found == {WAIT: 1, AFTER_WAIT: 1, SPECIAL: 1, RANDOM: 0.2, D_SAE - 1: 1}
    content = labels.manifest.content
    assert content["picked_effect"] == 0.84
    assert content["n_picked_effect"] == 5
    assert content["picked_effect_shuffled"] < 0.2
    assert {"direct", "ablation"} <= labels.manifest.parents.keys()
    alone = label(effects=(direct,), output=tmp_path / "b.json")
    assert {one.picked_effect for one in alone.features.values()} == {None}
    assert "picked_effect" not in alone.manifest.content
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    (folder / "effects").mkdir()
    data = json.loads(removed.read_text())
    del data["metadata"]["lorascope"]["parents"]["sae"]  # of parts of the adapter alone
    data["metadata"]["lorascope"]["seal"] = "lorascope-sha256:" + "0" * 64
    (folder / "effects" / "ablation.json").write_text(sealed(json.dumps(data)))
    found = label(input=folder / "features.h5", output=None)
    assert found.manifest.parents.keys() == {"features"}
    for entry in removals["features"]:
        del entry["falls"]
    old = write(tmp_path / "old.json", "ablation", index, removals)
    caplog.clear()
    label(effects=(direct, old), output=tmp_path / "old-labels.json")
    assert [text for text in caplog.messages if "picked_effect" in text] == [
        f"{old} has no tokens that fall, so picked_effect stays empty: it is of an older version; "
        "run lorascope ablate again with --overwrite"
    ]
    with pytest.raises(ConfigError, match="expected one report of direct and one of ablate"):
        label(effects=(direct, direct), output=tmp_path / "c.json")


def test_values_rank_the_tokens_of_a_true_rule_first(label):
    labels = label()
    for latent in (WAIT, AFTER_WAIT, SPECIAL):
        found = labels.features[latent]
        assert found.clarity == found.purity == 1
        assert found.clarity_interval[0] < 1
    assert labels.features[WAIT].covered == pytest.approx(2 / 7, abs=0.05)
    content = labels.manifest.content
    assert content["purity_chance"] < content["purity"] <= 1


def test_labels_by_hand_win_and_have_no_scores(label, made, tmp_path):
    path = tmp_path / "mine.json"
    entries = {
        str(WAIT): {"label": " stop\nand think </script>", "note": "sees it before checks"},
        str(RANDOM): {"label": "noise", "note": "", "star": True},
        str(AFTER_WAIT): {"label": "", "note": "only a note"},
        str(DEAD): {"label": "never"},
    }
    sae = FeatureIndex.open(made / "features.h5").manifest.parents["sae"]
    data = {"format": "lorascope labels 1", "sae": sae, "features": entries}
    path.write_text(json.dumps(data))
    labels = label(by_hand=path)
    mine = labels.features[WAIT]
    assert mine.name == "stop\\nand think </script>"
    assert mine.sentence == "sees it before checks"
    assert (mine.author, mine.kind) == ("person", "token")
    assert mine.balanced_accuracy is mine.interval is mine.recall is None
    assert labels.features[RANDOM].sentence == "noise"
    assert labels.features[AFTER_WAIT].author == "rule"
    assert labels.features[DEAD].name == "never"
    assert labels.manifest.content["n_by_hand"] == 3
    with pytest.raises(ArtifactError, match="exported, expected labels.json"):
        read_labels(path)  # as lorascope dashboard --labels does
    found = label(input=beside(made, tmp_path, path), output=None)
    assert mine == found.features[WAIT]  # found by its name
    for change, fault in (
        ({"sae": "0" * 64}, "of another SAE"),
        ({"format": "labels"}, "no labels by hand"),
        ({"features": {"999": {"label": "x"}}}, f"feature 999, the SAE has {D_SAE}"),
        ({"features": []}, "no labels by hand"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ArtifactError, match=fault):
            label(by_hand=path, output=tmp_path / "other.json")


def test_the_same_command_gives_the_same_bytes_and_other_settings_are_refused(made, tmp_path):
    paths = [
        run(LabelConfig(input=made / "features.h5", output=tmp_path / name))
        for name in ("a.json", "b.json")
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert verify(paths[0]) == []
    before = paths[0].stat().st_mtime_ns
    run(LabelConfig(input=made / "features.h5", output=paths[0]))
    assert paths[0].stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match="label_tokens 300000 there, 2000 here"):
        run(LabelConfig(input=made / "features.h5", output=paths[0], label_tokens=2000))


def test_the_command_leaves_labels_that_index_and_exports_read(made, tmp_path, capsys):
    index = tmp_path / "features.h5"
    index.write_bytes((made / "features.h5").read_bytes())
    places = ["--data-dir", str(made / "activations"), "--sae", str(made / "sae")]
    assert call(["label", "--input", str(index), *places]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "labels.json")
    assert "shuffled labels" in captured.err
    found = FeatureIndex.open(index)[WAIT].label
    assert found is not None
    assert found.name == '"wait"'
    to_json, to_csv = tmp_path / "out.json", tmp_path / "out.csv"
    export.run(ExportConfig(input=index, output=to_json))
    data = json.loads(to_json.read_text())
    assert data["features"][str(WAIT)]["label"]["name"] == '"wait"'
    assert "label" not in data["features"][str(DEAD)]
    assert "labels" in data["metadata"]["lorascope"]["parents"]
    export.run(ExportConfig(input=index, output=to_csv))
    assert "Fires" not in to_csv.read_text()
    assert '""wait""' in to_csv.read_text()
    again = LabelConfig(
        input=to_json,
        output=tmp_path / "again.json",
        data_dir=made / "activations",
        sae=made / "sae",
    )
    assert read_labels(run(again)).features[WAIT].name == '"wait"'


def test_the_halves_read_the_roles_and_rollouts_of_the_index(made, tmp_path):
    index = tmp_path / "features.h5"
    places = {"data_dir": made / "activations", "sae": made / "sae"}
    collect.run(CollectConfig(**places, output=index, roles=("think",), max_rollouts=20))
    labels = read_labels(run(LabelConfig(input=index, **places)))
    assert SPECIAL not in labels.features
    content = labels.manifest.content
    assert content["n_tokens_choosing"] + content["n_tokens_scoring"] == 20 * (LENGTH - 1)
    few = LabelConfig(input=index, output=tmp_path / "few.json", label_tokens=100, **places)
    assert read_labels(run(few)).manifest.content["n_rollouts_scoring"] == 1


def test_inputs_that_do_not_belong_together_are_refused_in_one_line(made, label, tmp_path):
    other = write_store(tmp_path / "other", n_rollouts=2)
    with pytest.raises(ArtifactError, match="made from another one: activations"):
        label(data_dir=other.path)
    with pytest.raises(ConfigError, match="ends in .json"):
        LabelConfig(input=made / "features.h5", output=tmp_path / "labels.txt")
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"features": {"0": {"examples": []}}}')
    with pytest.raises(ArtifactError, match="does not say activations"):
        label(input=foreign, data_dir=made / "activations", sae=made / "sae")
    lonely = CollectConfig(
        sae=made / "sae",
        data_dir=made / "activations",
        output=tmp_path / "one.h5",
        max_rollouts=1,
    )
    collect.run(lonely)
    places = {"data_dir": made / "activations", "sae": made / "sae"}
    with pytest.raises(DatasetError, match="one rollout: labels need two"):
        label(input=tmp_path / "one.h5", **places)


@pytest.mark.slow
@pytest.mark.needs("openai")
def test_a_models_label_replaces_an_unclear_rule_but_no_clear_one_that_its_judge_refutes(
    made, label, tmp_path, caplog
):
    def server_says(body, _):
        data = json.loads(body["messages"][1]["content"])
        if "strongest" in data:
            return json.dumps({"name": "anything", "sentence": "Fires.", "kind": "context"})
        return json.dumps({"fires": [True] * len(data["excerpts"])})

    rules = label().features
    assert rules[RANDOM].kind == "unclear"
    with chat_server(server_says) as server:
        given = {"llm_model": "a", "judge_model": "b", "llm_base_url": server.url}
        found = label(output=tmp_path / "by-model.json", **given).features
        n_asked = len(server.requests)
        assert {body["model"] for body in server.requests} == {"a", "b"}
        again = label(output=tmp_path / "by-model.json", overwrite=True, **given).features
        assert len(server.requests) == n_asked, "answers are kept beside the labels"
    assert again == found
    assert found[WAIT] == rules[WAIT]
    assert found[RANDOM].name == "unclear: anything"
    assert (found[RANDOM].author, found[RANDOM].judge) == ("a", "b")
    assert found[RANDOM].balanced_accuracy == 0.5
    assert "grades its own" not in caplog.text


@pytest.mark.needs("openai")
def test_a_model_that_the_judge_confirms_replaces_the_rule(label, tmp_path, caplog):
    def marked(text):
        return text.split("«")[1].split("»")[0].split("|")[0].strip().lower()

    def server_says(body, _):
        data = json.loads(body["messages"][1]["content"])
        if "strongest" in data:
            word = marked(data["strongest"][0])
            return json.dumps({"name": f"it is {word}", "sentence": word, "kind": "token"})
        return json.dumps({"fires": [marked(t) == data["description"] for t in data["excerpts"]]})

    with chat_server(server_says) as server:
        given = {"llm_model": "a", "llm_base_url": server.url}
        found = label(output=tmp_path / "by-model.json", **given).features[WAIT]
    assert (found.name, found.author, found.judge) == ("it is wait", "a", "a")
    assert found.balanced_accuracy is not None and found.balanced_accuracy >= 0.9
    assert found.rule, "the rule stays beside it"
    assert "grades its own labels" in caplog.text


@pytest.mark.needs("openai")
def test_the_model_is_asked_about_the_features_that_are_named(label, tmp_path):
    says = json.dumps({"name": "a", "sentence": "b", "kind": "token", "fires": [True] * 10})
    with chat_server(lambda *_: says) as server:
        given = {"llm_model": "a", "llm_base_url": server.url, "features": (RANDOM,)}
        label(output=tmp_path / "by-model.json", **given)
        described = [m for m in server.requests if "strongest" in m["messages"][1]["content"]]
        assert len(described) == 1
    for numbers in ((DEAD,), (99,)):
        with pytest.raises(ConfigError, match=f"--features has {numbers[0]}, expected"):
            label(output=tmp_path / "other.json", **{**given, "features": numbers})


def test_a_model_without_a_server_is_refused(label, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="--llm-base-url"):
        label(llm_model="a")
    with pytest.raises(ConfigError, match="need --llm-model"):
        label(judge_model="a")
