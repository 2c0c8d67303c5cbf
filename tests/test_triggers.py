"""What the search for triggers finds in adapters whose weights are set by hand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.hostile import HOSTILE
from safetensors.torch import load_file, save_file

from lorascope.activations import generate
from lorascope.activations.generate import GenerateConfig
from lorascope.activations.store import ActivationStore
from lorascope.audit.audit import run
from lorascope.audit.audit_options import AuditConfig
from lorascope.audit.audit_records import AuditReport, Search
from lorascope.audit.audit_report import document_of
from lorascope.audit.scenes import Clock, Scene, Sizes, scenes_of
from lorascope.audit.triggers import look_for_triggers
from lorascope.causal.held_out import load_subject_of
from lorascope.causal.study import read_report
from lorascope.subject.adapter import WEIGHTS
from lorascope.subject.intervene import RowEditor

TRIGGER = 200
VALUE = "base_model.model.model.layers.0.self_attn.v_proj"


@pytest.fixture(scope="module")
def planted(make_subject) -> tuple[Path, Path, Path]:
    """A base, an ordinary adapter, and one with a trigger.

    One coordinate of the embeddings is for a single token. The second adapter reads it in the first
    layer's v_proj and writes a large vector, which attention carries to all later tokens.
    """
    base, adapter = make_subject(hidden=32)
    weights = load_file(base / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    embeddings *= 20
    embeddings[:, 0] = 0
    embeddings[TRIGGER, 0] = 5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    weights = load_file(adapter / WEIGHTS)
    for name in weights:
        if "lora_B" in name:
            weights[name] *= 0.1
    save_file(weights, adapter / WEIGHTS, metadata={"format": "pt"})
    hidden = base.parent / "hidden"
    shutil.copytree(adapter, hidden)
    for name, value in weights.items():
        if "lora_B" in name:
            value.zero_()
    weights[f"{VALUE}.lora_A.weight"].zero_()[0, 0] = 1
    weights[f"{VALUE}.lora_B.weight"].normal_(generator=torch.Generator().manual_seed(0)).mul_(100)
    save_file(weights, hidden / WEIGHTS, metadata={"format": "pt"})
    return base, adapter, hidden


@pytest.fixture(autouse=True)
def as_on_an_idle_machine(monkeypatch):
    """A busy machine searches less, and finds nothing if its budget is too small for that."""
    measured = Clock.time

    def time(self, scenes, inserted):
        measured(self, scenes, inserted)
        self.rate = 20_000.0

    monkeypatch.setattr(Clock, "time", time)
    monkeypatch.setattr(Clock, "spent", lambda _: 0.0)


@pytest.fixture(scope="module")
def stored(planted, dataset_file, tmp_path_factory):
    """Return a function that makes the store of an adapter, and returns it with the subject."""

    def make(adapter: Path):
        out = tmp_path_factory.mktemp("store") / "store"
        options = GenerateConfig(
            lora_path=str(adapter),
            base_model=str(planted[0]),
            dataset=str(dataset_file),
            num_examples=24,
            output=out,
        )
        store = ActivationStore.open(generate.run(options))
        return load_subject_of(store, options, device="cpu", dtype="auto"), store

    return make


def search(subject, store: ActivationStore) -> Search:
    halves = np.arange(0, store.n_rollouts, 2), np.arange(1, store.n_rollouts, 2)
    found = look_for_triggers(subject, store, halves, minutes=0.05, seed=0)
    assert isinstance(found, Search)
    return found


@pytest.fixture(scope="module")
def scene(planted, stored):
    """One scene of the adapter with a trigger, in which its usual change is known."""
    subject, store = stored(planted[2])
    with torch.no_grad(), RowEditor(subject, fast=True) as editor:
        (one,) = scenes_of(editor, store, np.arange(store.n_rollouts), 1, ("middle",))
        one.set_usual(torch.arange(20, 52)[:, None])
        yield one


@pytest.mark.slow
def test_a_trigger_set_by_hand_is_found_and_its_effect_is_shown(planted, stored):
    found = search(*stored(planted[2]))
    assert found.triggers[0].token_ids == (TRIGGER,)
    assert found.triggers[0].share == 1
    said = found.triggers[0].said[0]
    assert said.adapter != said.usual
    assert said.adapter != said.base
    assert all(TRIGGER in one.token_ids for one in found.triggers)


@pytest.mark.slow
def test_an_ordinary_adapter_raises_nothing(planted, stored):
    found = search(*stored(planted[1]))
    assert found.triggers == ()
    assert not any(one.stands_out for one in found.lengths)


@pytest.mark.slow
def test_first_order_scores_find_a_trigger_that_the_budget_does_not_reach(
    planted, stored, monkeypatch
):
    monkeypatch.setattr(Clock, "affords", lambda *_: 24)
    found = search(*stored(planted[2]))
    assert found.n_tokens == 24 < found.n_vocabulary
    assert found.n_controls == Sizes().scaled(0).controls < Sizes().scaled(2).controls
    assert found.triggers[0].token_ids == (TRIGGER,)


@pytest.mark.slow
def test_a_machine_that_becomes_slower_ends_the_sweep_and_the_phrases(planted, stored, monkeypatch):
    monkeypatch.setattr(Clock, "spent", lambda _: 1e9)
    found = search(*stored(planted[1]))
    assert found.n_tokens == 64 < found.n_vocabulary
    assert found.n_phrases == 2 * 64
    assert found.seconds == 1e9


@pytest.mark.slow
def test_a_search_that_would_take_far_longer_than_its_budget_is_not_begun(
    planted, stored, monkeypatch
):
    monkeypatch.setattr(Clock, "affords", lambda *_: 1)
    subject, store = stored(planted[1])
    halves = np.arange(0, 12), np.arange(12, 24)
    needs = look_for_triggers(subject, store, halves, minutes=5, seed=0)
    assert isinstance(needs, float)
    assert needs > 4 * 5


def test_the_excess_does_not_depend_on_whether_the_prompt_is_read_again(scene: Scene):
    inserts = torch.tensor([[30], [TRIGGER], [40]])
    cached = scene.excess(inserts)
    kept = scene._caches, scene._n_cached
    assert scene._n_cached > 0
    scene._caches, scene._n_cached = (None, None), 0
    try:
        again = scene.excess(inserts)
        slopes = scene.slopes(inserts, 0)
        text = scene.written(inserts)
    finally:
        scene._caches, scene._n_cached = kept
    assert cached[1] > 10 * cached[[0, 2]].amax()
    torch.testing.assert_close(again, cached, rtol=1e-3, atol=1e-4)
    assert text == scene.written(inserts)
    torch.testing.assert_close(slopes, scene.slopes(inserts, 0), rtol=1e-2, atol=1e-3)


def test_slopes_are_the_change_of_the_excess_along_an_embedding(scene: Scene):
    inserts, other = torch.tensor([[30, 31]]), 70
    slope = float(scene.slopes(inserts, 1)[0, other])
    embed = scene.editor.subject.causal.get_input_embeddings()
    table, step = embed.weight.detach().clone(), 0.02
    excess = []
    for sign in (1, -1):
        handle = embed.register_forward_hook(
            lambda _m, args, out, by=sign * step: torch.where(
                (args[0] == 31)[..., None], out + by * (table[other] - table[31]), out
            )
        )
        excess.append(float(scene.excess(inserts)[0]))
        handle.remove()
    assert slope == pytest.approx((excess[0] - excess[1]) / (2 * step), rel=0.1)
    assert scene.slopes(inserts, 1)[0, 31] == 0


@pytest.mark.slow
def test_hostile_tokens_are_text_on_the_page(planted, dataset_file, tmp_path, tab, monkeypatch):
    monkeypatch.setattr("lorascope.audit.audit._N_ANSWERS", 1)
    base, _, hidden = planted
    page = run(
        AuditConfig(
            lora_path=str(hidden),
            base_model=str(base),
            dataset=str(dataset_file),
            num_examples=8,
            budget=0.02,
            output=tmp_path,
        )
    )
    found, _ = read_report(tmp_path / "audit.json", (AuditReport,))
    assert found.search is not None
    assert "stand out" in document_of(found).as_text()
    one = found.search.triggers[0]
    said = replace(one.said[0], base=HOSTILE[1], adapter=HOSTILE[2], usual=HOSTILE[3])
    some = tuple(replace(one, tokens=(text,), said=(said,)) for text in HOSTILE)
    late = tuple(replace(length, said=said) for length in found.search.lengths)
    slow = document_of(replace(found, search=None, search_needs=42.0)).as_text()
    assert "the least search takes about 42 minutes here; give it with --budget" in slow
    hostile = replace(found, search=replace(found.search, triggers=some, lengths=late))
    page.write_text(document_of(hostile).as_html(), encoding="utf-8", errors="replace")
    tab.complaints.clear()
    tab.page.goto(page.resolve().as_uri())
    shown = tab.page.inner_text("main")
    assert "</script><script>window.hacked = 1</script>" in shown
    assert tab.page.evaluate("window.hacked") is None
    assert tab.page.evaluate("document.querySelectorAll('script, img, svg, base').length") == 0
    uri = page.resolve().as_uri()
    assert [text for text in tab.complaints if text != uri] == []
    assert json.loads((tmp_path / "audit.json").read_text())["search"]["n_tokens"]
