"""The demo whole, and what its features are worth against the generator's ground truth."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from demo_problems import CLASSES, make_problem

from lorascope.activations.store import ActivationStore
from lorascope.artifact import read_manifest
from lorascope.causal.study import open_report
from lorascope.cli import call
from lorascope.demo import demo
from lorascope.demo.demo import DemoConfig
from lorascope.features import collect
from lorascope.features.collect import CollectConfig
from lorascope.features.index import FeatureIndex
from lorascope.inspection import verify
from lorascope.labels.clues import CLUES, STREAMS, read_clues
from lorascope.labels.rules import Condition, covers
from lorascope.sae.model import load_sae
from lorascope.texts.tokens import visible

_EXAMPLE = Path(__file__).parent.parent / "examples" / "feature_meaning.py"
meaning = SimpleNamespace(**runpy.run_path(str(_EXAMPLE)))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    page = demo.run(DemoConfig(output=out))
    assert page == out / "dashboard.html"
    return out


@pytest.fixture(scope="module")
def store(folder):
    return ActivationStore.open(folder / "activations")


@pytest.fixture(scope="module")
def labels(store):
    problems = [make_problem("demo", i) for i in range(store.n_rollouts)]
    return meaning.label_tokens(store, problems)


def test_a_thousand_fresh_rollouts_go_through_everything(folder, store):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rollouts"] == 1000
    assert summary["columns"] == 56
    assert summary["tokens"] == store.n_rows > 100_000
    assert summary["features_alive"] > 0.9 * summary["features"]
    assert summary["fvu"] < 0.5
    assert 0.7 < summary["recovered_generated"] < summary["recovered"] < 1
    assert verify(folder / "activations") == []
    FeatureIndex.open(folder / "features.h5").verify()


def test_the_report_begins_with_what_the_adapter_was_trained_to_do(folder):
    """It opens a think segment, works in steps, and then answers; the base answers at once."""
    report = open_report(folder / "report.json")
    _, opens, inside, _ = report["headline"]
    assert opens.startswith("It makes the model open think and answer segments")
    assert re.search(r"In think segments it makes .*“(Hmm|Let|First|Okay|We)”", inside)
    openings = open_report(folder / "evaluation.json")["openings"]
    assert [one["role"] for one in openings] == ["think", "answer"]
    for one in openings:
        assert one["p_base"] < 0.01
        assert one["p_adapter"] > 0.9
    assert len(report["answers"]) == 4
    for one in report["answers"]:
        assert (one["same"] + one["adapter"]).startswith("<|im_start|>think")
        assert "<|im_start|>think" not in one["same"] + one["base"]


def test_the_page_shows_what_the_features_do(folder, store):
    names = [f"effects/{name}.json" for name in ("direct", "ablation", "attribution")]
    for name in ["evaluation.json", *names]:
        report = open_report(folder / name)
        assert report["metadata"]["lorascope"]["parents"]["sae"]
    manifest = read_manifest(folder / "dashboard.html")
    assert manifest is not None
    assert sum(parent.startswith("effects ") for parent in manifest.parents) == 4
    ablation = open_report(folder / "effects" / "ablation.json")
    measured = [one for one in ablation["features"] if one["kl"] > 0]
    assert len(measured) > 0.5 * store.d_in
    assert ablation["floor"]["rounding"] < min(one["kl"] for one in measured)


def test_labels_tell_where_features_fire_on_rollouts_that_did_not_choose_them(folder):
    content = FeatureIndex.open(folder / "features.h5").labels.manifest.content
    assert content["n_labels"] >= content["n_features"] * 0.9
    assert content["share_above_0.85"] >= 0.7
    assert content["balanced_accuracy"] >= 0.8
    assert 0.47 < content["shuffled"] < 0.53  # chance is 0.5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("name", {"in a name", "anna", "ben", "carla", "chloé", "david", "emma", "grace", "hugo"}),
        ("operator", {"+", "−", "×", "÷", "plus", "minus", "times"}),
        ("check", {"check", "wait", "verify", "right", "hmm", "✓"}),
        ("answer_marker", {"answer", "final", "swer", ":"}),
    ],
)
def test_rules_of_features_name_what_the_generator_says_they_are(
    folder, store, labels, name, words
):
    """The rule of a class's best feature fits the class as well as the feature itself does."""
    index = FeatureIndex.open(folder / "features.h5")
    best = meaning.score_latents(load_sae(folder / "sae", store), store, labels)[name]
    label = index[int(best.candidate.removeprefix("latent "))].label
    said = {word for term in label.rule for part in term for word in (part.of, *part.values)}
    assert said & words
    rollout = store.rollout_of(np.arange(store.n_rows))
    spelling = {i: store.vocabulary[i] for i in np.unique(store.token_ids).tolist()}
    corpus = read_clues(store.token_ids, store.roles, rollout, spelling)
    rule = tuple(tuple(condition(part, corpus.texts) for part in term) for term in label.rule)
    held_out = store.eligible & (rollout % 2 == 1)  # as in `score_latents`
    covered = covers(corpus, rule)[held_out]
    truth = labels[name][held_out]
    f1 = 2 * (covered & truth).sum() / (covered.sum() + truth.sum())
    assert f1 > 0.9 * best.f1


def condition(part, texts):
    """The condition of a rule that `labels.json` writes as this part."""
    clues, streams = ([one.name for one in of] for of in (CLUES, STREAMS))
    if not part.values:
        return Condition(clue=clues.index(part.of))
    values = tuple(i for i, text in enumerate(texts) if visible(text) in part.values)
    return Condition(stream=streams.index(part.of), values=values)


def test_the_same_command_again_changes_no_byte(folder, capsys):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert call(["demo", "--output", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'dashboard.html'}\n"
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    changed = {p.name for p in before if before[p] != after[p]}
    assert changed <= {"summary.json"}  # it holds the seconds
    assert before.keys() == after.keys()


def test_the_examples_are_the_brute_force_argsort_of_the_demos_store(folder, store, tmp_path):
    sae = load_sae(folder / "sae", store)
    plain = CollectConfig(
        data_dir=store.path,
        sae=folder / "sae",
        output=tmp_path / "features.h5",
        max_per_rollout=0,
        same_context="keep",
        rollout_tokens=0,
    )
    index = FeatureIndex.open(collect.run(plain))
    code = np.concatenate(
        [
            sae.encode_dense(torch.from_numpy(np.array(rows))).numpy()
            for _, rows in store.blocks(8192)
        ]
    )
    code[~store.eligible] = 0
    n_ties = 0
    for latent in range(sae.d_sae):
        values = code[:, latent]
        order = np.lexsort((np.arange(len(values)), -values))[: index.content["top_k"]]
        best = [row for row in order if values[row] > 0]
        examples = index[latent].examples
        assert [e.row for e in examples] == best
        assert [e.value for e in examples] == values[best].tolist()
        n_ties += len(best) - len({e.value for e in examples})
    assert n_ties > 0, "equal texts begin equally, so there must be ties"


def test_labels_lie_on_tokens_that_hold_such_characters(store, labels):
    texts = np.array([store.vocabulary[i] for i in range(len(store.vocabulary))], object)
    of_token = texts[store.token_ids]
    assert all(
        re.search(r"[+−×÷=]", t.decode("utf-8", "replace")) for t in of_token[labels["operator"]]
    )
    assert all(re.search(rb"\d", t) for t in of_token[labels["digit"]])
    assert (labels["digit"] | ~labels["carried"]).all(), "a carried number is made of digits"
    assert {b" Wait", b"Wait"} & set(of_token[labels["check"]])
    for name in CLASSES:
        assert 100 < labels[name].sum() < 0.5 * store.n_rows, name


def test_the_features_match_known_classes_better_than_chance_and_no_worse_than_columns(
    folder, store, labels, capsys
):
    sae = load_sae(folder / "sae", store)
    scores = {
        "SAE": meaning.score_latents(sae, store, labels),
        "best raw column": meaning.score_columns(store, labels),
        "random dictionary": meaning.score_latents(
            meaning.random_dictionary(sae, store, seed=0), store, labels
        ),
    }
    with capsys.disabled():
        print("\n" + meaning.meaning_table(scores))
    means = {kind: meaning.mean_f1(found) for kind, found in scores.items()}
    assert means["SAE"] > 0.9 * means["best raw column"]  # seeds differ by 0.02
    assert means["SAE"] > 1.3 * means["random dictionary"]
