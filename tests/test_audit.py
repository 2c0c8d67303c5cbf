"""What `audit` says of adapters of which it is known."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.hostile import HOSTILE
from builders.schemas import require_schema
from builders.subjects import load
from safetensors.torch import load_file, save_file

from lorascope.activations.store import ActivationStore
from lorascope.audit.audit import NEUTRAL, run
from lorascope.audit.audit_options import AuditConfig
from lorascope.audit.audit_records import AuditReport
from lorascope.audit.audit_report import document_of
from lorascope.audit.weights import read_alignments, read_weights
from lorascope.causal.report_records import ScoredToken
from lorascope.causal.study import read_report
from lorascope.errors import ConfigError, DatasetError
from lorascope.inspection import verify
from lorascope.subject.adapter import WEIGHTS, inspect_adapter
from lorascope.subject.intervene import adapter_off

LAYER = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def changed(subject_dirs, tmp_path_factory):
    """Return a function that copies the adapter with other tensors, and returns its folder."""

    def change(**tensors: Any) -> Path:
        folder = tmp_path_factory.mktemp("changed") / "adapter"
        shutil.copytree(subject_dirs[1], folder)
        weights = load_file(folder / WEIGHTS)
        for name, value in weights.items():
            for part, factor in tensors.items():
                if part in name:
                    weights[name] = factor if isinstance(factor, torch.Tensor) else value * factor
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return change


def audit(adapter: Path, base: Path, out: Path, **given: Any) -> AuditReport:
    given = {"budget": 0, **given}
    page = run(AuditConfig(lora_path=str(adapter), base_model=str(base), output=out, **given))
    assert page == out / "audit.html"
    return read_report(out / "audit.json", (AuditReport,))[0]


def assert_hostile_texts_are_inert(found: AuditReport) -> None:
    tokens = tuple(ScoredToken(token_id=i, token=text, z=1.0) for i, text in enumerate(HOSTILE))
    applied = replace(found.applied, other_base=HOSTILE[0], unseen=tuple(HOSTILE))
    hostile = replace(found, mean_row=tokens, applied=applied)
    page = document_of(hostile).as_html()
    tags = set(re.findall(r"<\s*/?\s*([a-z0-9!]+)", page.lower()))
    allowed = "!doctype html meta title style main h1 h2 p bdi div table tr th td".split()
    assert tags <= set(allowed)
    assert "default-src 'none'" in page
    assert "<" not in document_of(hostile).as_markdown().replace("\\<", "")


@pytest.fixture(autouse=True)
def few_answers(monkeypatch):
    monkeypatch.setattr("lorascope.audit.audit._N_ANSWERS", 1)


@pytest.mark.slow
def test_the_effect_is_kl_of_base_and_adapter_on_texts_and_neutral_ones(
    subject_dirs, dataset_file, tmp_path
):
    base, adapter = subject_dirs
    found = audit(adapter, base, tmp_path, dataset=str(dataset_file), num_examples=6)
    subject, store = load(adapter, base), ActivationStore.open(tmp_path / "texts")
    kl = []
    for index in (1, 3, 5):  # constant rows are fitted on the others
        first, last = store.rollout_start[index : index + 2].tolist()
        ids = torch.tensor(store.token_ids[first:last].astype(np.int64))[None]
        with torch.inference_mode():
            own = subject.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with adapter_off(subject):
                other = subject.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        kl.append((own.exp() * (own - other)).sum(-1))
    assert found.texts is not None
    assert found.texts.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert found.texts.n_rollouts == 3
    assert found.neutral.n_rollouts == 20
    assert found.texts.constant is not None and found.texts.constant < 1
    assert found.applied.silent == found.applied.unread == ()
    assert len(found.answers) == 1
    assert verify(tmp_path / "audit.json") == []
    require_schema(tmp_path / "audit.json", "audit")
    before = (tmp_path / "audit.json").read_bytes()
    assert audit(adapter, base, tmp_path, dataset=str(dataset_file), num_examples=6) == found
    assert (tmp_path / "audit.json").read_bytes() == before
    assert_hostile_texts_are_inert(found)
    text = document_of(found).as_text()
    ratio = found.neutral.kl / found.texts.kl
    assert f"A token of neutral text changes {ratio:.2g} times as much" in text


@pytest.mark.slow
def test_an_adapter_of_zeros_changes_nothing(changed, subject_dirs, tmp_path):
    zero = str(changed(lora_B=0.0))
    found = audit(Path(zero), subject_dirs[0], tmp_path)
    assert found.weights.n_silent == found.weights.n_sites == 14
    assert found.neutral.kl == 0
    assert found.neutral.constant is None
    assert found.mean_row == ()
    (tmp_path / "audit.md").unlink()  # as if the run had been killed before it was written
    base = str(subject_dirs[0])
    run(AuditConfig(lora_path=zero, base_model=base, output=tmp_path, budget=0))
    text = (tmp_path / "audit.md").read_text(encoding="utf-8")
    assert "It changes no prediction by more than rounding" in text
    assert "14 sites have a B of zero" in text
    assert "No texts were given" in text
    assert "Triggers were not looked for" in text


def test_norms_ranks_and_meetings_are_those_of_the_weights(make_subject, tmp_path):
    _, adapter = make_subject(r=2)
    weights = load_file(adapter / WEIGHTS)
    for name, value in weights.items():
        value.zero_() if "lora_B" in name else value.copy_(torch.eye(*value.shape))
    down = f"{LAYER}.0.mlp.down_proj.lora_B.weight"  # writes 3 and 4 along two axes
    weights[down][2, 0], weights[down][5, 1] = 3.0, 4.0
    query = f"{LAYER}.1.self_attn.q_proj.lora_A.weight"  # reads the second one
    weights[query].zero_()
    weights[query][0, 5] = 2.0
    save_file(weights, adapter / WEIGHTS, metadata={"format": "pt"})
    found = read_weights(inspect_adapter(str(adapter)))
    scale = 16 / 2
    assert found.norm == pytest.approx(5 * scale)
    assert found.n_silent == 13
    part = {part.name: part for part in found.projections}["down_proj"]
    share = np.array([9, 16]) / 25
    assert part.share == pytest.approx(1.0)
    assert part.effective_rank == pytest.approx(float(np.exp(-(share * np.log(share)).sum())) / 2)
    assert found.meetings[0].cosine == pytest.approx(1.0)
    assert {(one.writer, one.reader) for one in found.meetings} >= {("0.down_proj", "1.q_proj")}
    assert all(int(one.reader[0]) > int(one.writer[0]) for one in found.meetings)


def test_an_output_that_is_a_file_is_refused_in_one_line(subject_dirs, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="which is a file, expected a folder"):
        audit(subject_dirs[1], subject_dirs[0], tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_one_text_is_too_few_and_says_so(subject_dirs, dataset_file, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text(dataset_file.read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    with pytest.raises(DatasetError, match="one usable text, audit needs two"):
        audit(subject_dirs[1], subject_dirs[0], tmp_path / "out", dataset=str(one))


def test_the_neutral_texts_need_no_chat_template():
    lines = [json.loads(line) for line in NEUTRAL.read_text(encoding="utf-8").splitlines()]
    assert sum("question" in line for line in lines) == 16
    assert all(line["text"] for line in lines)


@pytest.mark.slow
def test_a_base_without_a_chat_template_is_audited(subject_dirs, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(subject_dirs[0], base, ignore=shutil.ignore_patterns("chat_template*"))
    assert audit(subject_dirs[1], base, tmp_path / "out").neutral.n_rollouts == 20


def test_a_wrong_base_and_tokens_that_the_weights_point_at_are_named(make_subject, tmp_path):
    base, adapter = make_subject(r=2)
    weights = load_file(adapter / WEIGHTS)
    embeddings = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    weights[f"{LAYER}.1.mlp.down_proj.lora_B.weight"][:, 0] = 50 * embeddings[70]
    weights[f"{LAYER}.0.self_attn.q_proj.lora_A.weight"][0] = 50 * embeddings[80]
    save_file(weights, adapter / WEIGHTS, metadata={"format": "pt"})
    written, read = read_alignments(load(adapter, base, gauge="raw"))
    assert written is not None and read is not None
    assert (written.strongest[0].site, written.strongest[0].token_id) == ("1.down_proj", 70)
    assert ("0.q_proj", 80) in {(one.site, one.token_id) for one in read.strongest}
    assert written.n_directions == 8  # two of o_proj and down_proj in both layers
    assert read.n_directions == 20
    found = audit(adapter, base, tmp_path)
    assert {one.name for one in found.compared} >= {"concentration over layers"}
    worse = replace(found.neutral, kl=1.0, ce_adapter=3.0, ce_base=2.0)
    text = document_of(replace(found, neutral=worse, texts=worse)).as_text()
    assert "and the neutral ones too" in text
    assert "how an adapter looks on a wrong base" in text
    assert "may name the raw one" in text
    assert "writes points most at the tokens" in text
