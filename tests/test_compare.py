"""What `compare` says of adapters of which it is known."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders.hostile import HOSTILE
from builders.schemas import require_schema
from builders.subjects import load, save_adapter
from safetensors.torch import load_file, save_file

from lorascope.activations.store import ActivationStore
from lorascope.artifact import Manifest
from lorascope.causal.held_out import HeldOut
from lorascope.causal.shifts import ShiftAccumulator
from lorascope.causal.study import read_report
from lorascope.cli import call
from lorascope.compare import compare
from lorascope.compare.compare_options import CompareConfig
from lorascope.compare.compare_page import document_of
from lorascope.compare.compare_records import (
    AdapterRecord,
    ComparisonReport,
    JointFeature,
    PairDifference,
)
from lorascope.compare.differences import BASE, ITSELF, Contributions, Differences, Predictions
from lorascope.compare.growth import growth_of
from lorascope.compare.joint import find_members
from lorascope.compare.judge import Judge, kind_of
from lorascope.dashboard.headline import percent
from lorascope.dashboard.overview import overview_of
from lorascope.dashboard.reports import Reports
from lorascope.errors import AdapterError, ArtifactError, ConfigError
from lorascope.features.index import FeatureIndex
from lorascope.inspection import artifacts_in, verify
from lorascope.sae.model import SAE, load_sae
from lorascope.sites import SiteLayout
from lorascope.subject.adapter import WEIGHTS, inspect_adapter
from lorascope.subject.base import find_base
from lorascope.subject.load import SharedBase, load_tokenizer
from lorascope.texts.roles import ROLES

SMALL = {
    "num_examples": 24, "epochs": 2, "batch_size": 128, "k": 3, "expansion_factor": 2,
    "holdout": 0.4, "verify": 3, "device": "cpu", "max_fvu": float("inf"),
}  # fmt: skip


def changed(adapter: Path, folder: Path, **factors: float) -> Path:
    """Copy an adapter with some tensors times a factor, and return its folder."""
    shutil.copytree(adapter, folder)
    weights = load_file(folder / WEIGHTS)
    for name, value in weights.items():
        for part, factor in factors.items():
            if part in name:
                weights[name] = value * factor
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def compared(
    adapters: Sequence[Path], base: Path, texts: Path, out: Path, **given: Any
) -> ComparisonReport:
    options = {**SMALL, "base_model": str(base), "dataset": str(texts), "output": out, **given}
    page = compare.run(CompareConfig(adapters=tuple(map(str, adapters)), **options))
    assert page == out / "compare.html"
    return read_report(out / "compare.json", (ComparisonReport,))[0]


@pytest.fixture(scope="module")
def three(subject_dirs, dataset_file, tmp_path_factory):
    """The first adapter, itself again under another digest, and with B = 0; one rank-2 adapter."""
    base, adapter = subject_dirs
    folder = tmp_path_factory.mktemp("three")
    twin = changed(adapter, folder / "twin", lora_A=2.0, lora_B=0.5)
    zero = changed(adapter, folder / "zero", lora_B=0.0)
    save_adapter(base, folder / "other", r=2, target_modules=["q_proj", "up_proj"])
    adapters = [adapter, twin, zero, folder / "other"]
    return adapters, compared(adapters, base, dataset_file, folder / "out"), folder / "out"


@pytest.mark.slow
def test_an_adapter_against_itself_differs_by_rounding_and_has_no_news(three):
    _, report, _ = three
    pair = report.pairs[0]
    assert (pair.first, pair.second) == ("A", "B")
    eps = torch.finfo(torch.float32).eps
    assert 0 <= pair.kl < 1000 * eps * report.adapters[0].kl_base
    assert pair.n_news == 0
    assert pair.n_kinds.keys() == {"shared"}
    assert all(abs(one.share - 0.5) < 1e-3 for one in pair.features)
    assert "they predict the same" in document_of(report).as_text()


@pytest.mark.slow
def test_the_difference_from_an_adapter_that_writes_nothing_is_the_kl_to_the_base(three):
    _, report, _ = three
    pair = report.pairs[1]
    assert pair.kl == pytest.approx(report.adapters[0].kl_base, rel=1e-4)
    assert report.adapters[2].kl_base == pytest.approx(0, abs=1e-4 * pair.kl)
    assert pair.n_kinds.keys() == {"only in the first"}


@pytest.mark.slow
def test_contributions_that_miss_most_of_the_difference_are_said_to_rank_nothing(three):
    _, report, _ = three
    pair = report.pairs[1]

    def said(missed: float) -> str:
        of_features = (1 + missed) * pair.kl - pair.bias - pair.unexplained
        return document_of(
            replace(report, pairs=(replace(pair, contributions=of_features),))
        ).as_text()

    assert "too much to rely on" in said(0.51)
    assert "too much to rely on" in said(-0.51)
    assert "too much to rely on" not in said(0.49)


@pytest.mark.slow
@pytest.mark.parametrize(("explained", "word"), [(0.3, "not sure"), (0.1, "")])
def test_a_feature_above_chance_in_part_of_its_interval_only_is_said_to_be_not_sure(
    explained, word, three
):
    _, report, _ = three
    pair = report.pairs[1]
    one = replace(pair.features[0], is_news=False, chance=0.2, explained=explained, kind="shared")
    pair = replace(pair, features=(one,), level=0.1, n_news=0)
    row = next(
        line.split()
        for line in document_of(replace(report, pairs=(pair,))).as_text().split("\n")
        if line.split()[:1] == [str(one.feature)]
    )
    assert row[1 : 1 + len(word.split())] == word.split()
    assert row[1 + len(word.split())] == "shared"


@pytest.mark.slow
def test_joint_rows_are_those_of_the_first_adapter_then_of_the_second(three):
    _, report, out = three
    joint = ActivationStore.open(out / "activations")
    stores = [ActivationStore.open(out / "rows" / name) for name in "ABCD"]
    whole = np.concatenate([one.rows(0, one.n_rows) for one in stores], axis=1)
    np.testing.assert_array_equal(joint.rows(0, joint.n_rows), whole)
    np.testing.assert_array_equal(joint.token_ids, stores[0].token_ids)
    np.testing.assert_array_equal(joint.roles, stores[0].roles)
    begin = stores[0].d_in
    assert joint.layout.column_names[0] == "A:0.gate_proj"
    assert joint.layout.column_names[begin] == "B:0.gate_proj"
    assert joint.layout.column_names[-2:] == ("D:1.q_proj:0", "D:1.q_proj:1")
    np.testing.assert_array_equal(joint.layout.columns_of("B"), np.arange(begin, 2 * begin))
    assert SiteLayout.from_json(joint.layout.to_json()) == joint.layout
    assert [one.n_columns for one in report.adapters] == [14, 14, 14, 8]
    for name in ("activations", "sae", "features.h5", "labels.json", "dashboard.html"):
        assert verify(out / name) == []
    for name in ("compare.json", "compare.md", "compare.html"):
        assert verify(out / name) == []
    assert {out / "compare.md", out / "compare.html"} <= set(artifacts_in(out))
    assert {out / "rows" / "A", out / "rows" / "B"} <= set(artifacts_in(out))
    index = FeatureIndex.open(out / "features.h5")
    subject, where = overview_of(index, Reports.open([], index, out)).headline
    assert re.match(r"4 LoRAs .*together \(A, B, C, D\): 50 numbers a token", subject)
    assert "compare.html" in where
    require_schema(out / "compare.json", "comparison")


@pytest.mark.slow
def test_one_adapter_never_goes_with_a_joint_store(three, capsys):
    adapters, _, out = three
    words = ["ablate", "--lora-path", str(adapters[0]), "--data-dir", str(out / "activations")]
    assert call([*words, "--output", str(out / "no.json")]) == 2
    assert "use a matching pair" in capsys.readouterr().err


@pytest.fixture
def differences(three, subject_dirs):
    adapters, _, out = three
    store = ActivationStore.open(out / "activations")
    subjects = {
        name: load(folder, subject_dirs[0]) for name, folder in zip("ABCD", adapters, strict=True)
    }
    held_out = HeldOut(subjects["A"], store, np.array([0, 5]), 512)
    with Differences(subjects, held_out, load_sae(out / "sae")) as found:
        yield found


def total_kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = (logits.double().log_softmax(-1) for logits in (p, q))
    return float((p.exp() * (p - q)).sum())


@pytest.mark.slow
@torch.no_grad()
def test_an_exchange_writes_the_part_of_the_first_in_place_of_the_second(differences, monkeypatch):
    """PEFT runs the second with its rows less its part; hooks add what B of the first writes."""
    found, sae, store = differences, differences.sae, differences.held_out.store
    first, second = (found.subjects[name] for name in "AD")
    rows = torch.from_numpy(store.rows(0, store.n_rows).astype(np.float32))
    latents = sae.encode_dense(rows).sum(0).topk(3).indices.numpy()
    lost = found.exchanges(("A", "D"), [latents[:1], latents])
    removed = {name: found.removals(name, [latents[:1], latents]) for name in "AD"}
    for i, rollout in enumerate(found.held_out.rollouts):
        begin, end = store.rollout_start[rollout : rollout + 2].tolist()
        ids = torch.from_numpy(store.token_ids[begin:end].astype(np.int64))[None]
        runs = {name: editor.run(ids) for name, editor in found.editors.items()}
        live = torch.cat([run.rows[0] for run in runs.values()], dim=1)
        code, written = sae.encode_dense(live), torch.from_numpy(found.written[begin:end])
        plain = {name: run.logits[0, written] for name, run in runs.items()}
        for number, taken in enumerate((latents[:1], latents)):
            parts = code[:, taken] @ sae.W_dec[taken]
            left = live - parts
            for name in "AD":
                held = left[None, :, found.columns[name]]
                after = found.editors[name].run(ids, held=held).logits[0, written]
                near = pytest.approx(total_kl(plain[name], after), rel=1e-3)
                assert removed[name][number, i] == near
            hooks = []
            for site, here in zip(first.layout.sites, first.layout.slices, strict=True):
                layer = first.causal.get_submodule(site.module)
                b = layer.lora_B[layer.active_adapters[0]].weight * site.scale
                delta = parts[:, found.columns["A"]][:, here] @ b.T
                hooks.append(
                    second.causal.get_submodule(site.module).register_forward_hook(
                        lambda _module, _args, out, delta=delta: out + delta
                    )
                )
            held = left[None, :, found.columns["D"]]
            after = found.editors["D"].run(ids, held=held).logits[0, written]
            for hook in hooks:
                hook.remove()
            size = total_kl(plain["A"], plain["D"])
            right = size - total_kl(plain["A"], after)
            assert lost[number, i] == pytest.approx(right, rel=1e-3, abs=1e-4 * size)


@pytest.mark.slow
def test_the_features_of_the_one_module_that_differs_are_named(
    subject_dirs, dataset_file, tmp_path
):
    """The dictionary has two latents for each column, one for each sign, with the same parts."""
    base, adapter = subject_dirs
    copy = changed(adapter, tmp_path / "copy", **{"layers.1.mlp.down_proj.lora_B": 0.9})
    twin = changed(adapter, tmp_path / "twin", lora_A=2.0, lora_B=0.5)
    report = compared([adapter, copy], base, dataset_file, tmp_path / "out", null=(str(twin),))
    whole = report.pairs[0]
    assert whole.kl < 0.05 * report.adapters[0].kl_base  # small beside what both do
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "--d:1.00" in page  # the largest difference has the full colour, however small
    parts = whole.contributions + whole.unexplained + whole.bias
    assert parts == pytest.approx(whole.kl, rel=0.02)
    store = ActivationStore.open(tmp_path / "out" / "activations")
    subjects = {"A": load(adapter, base), "B": load(copy, base), "C": load(twin, base)}
    one = torch.eye(store.d_in // 3).repeat_interleave(2, 0)
    one[1::2] *= -1
    sae = SAE(
        W_enc=torch.cat([one, torch.zeros(len(one), 2 * one.shape[1])], 1).T.contiguous(),
        b_enc=torch.zeros(len(one)),
        W_dec=torch.cat([one, one, 2 * one], 1),
        b_dec=torch.zeros(store.d_in),
        threshold=torch.zeros(len(one)),
        layout=store.layout,
        manifest=Manifest(
            kind="sae", schema=1, settings={}, parents={}, layout=store.layout, content={}
        ),
    )
    column = store.layout.column_names.index("A:1.down_proj")
    planted = {2 * column, 2 * column + 1}
    config = CompareConfig(adapters=("A", "B"), verify=4)
    with Differences(subjects, HeldOut(subjects["A"], store, np.arange(12), 512), sae) as found:
        judge = Judge(config, found, found.predictions([("A", "C"), ("A", "B")]), 0)
        judge.seeds([("A", "C")])
        pair = judge.pair(("A", "B"))
        lost = found.exchanges(("A", "B"), [np.array(sorted(planted)), np.arange(2 * column)])
    n = int(found.written[: store.rollout_start[12]].sum())
    assert lost.sum(1) / n == pytest.approx([pair.kl, 0], rel=1e-3, abs=1e-3 * pair.kl)
    assert pair.contributions == pytest.approx(pair.kl, rel=0.02)
    named = {one.feature for one in pair.features if abs(one.contribution) > 1e-3 * pair.kl}
    assert pair.features[0].feature in named <= planted
    news = {one.feature: one.kind for one in pair.features if one.is_news}
    assert news.keys() == named
    assert set(news.values()) == {"changed"}


@pytest.mark.parametrize(
    ("effects", "sizes", "kind"),
    [
        (0.09, 0.3, "only in the first"),
        (0.91, 0.7, "only in the second"),
        (0.5, 0.01, "shared"),
        (0.91, 0.3, "shared"),  # the first writes more of it
        (0.09, 0.7, "shared"),
    ],
)
def test_a_feature_is_not_said_to_be_only_in_the_adapter_that_writes_less_of_it(
    effects, sizes, kind
):
    assert kind_of(effects, sizes) == kind
    assert kind_of(0.09, 0.09) == "only in the first"


@pytest.mark.slow
def test_predictions_of_what_users_say_do_not_count(differences):
    store = differences.held_out.store
    roles = [ROLES[role] for role in store.roles]
    for rollout in differences.held_out.rollouts.tolist():
        first, last = store.rollout_start[rollout : rollout + 2].tolist()
        here = [roles[row + 1] for row in range(first, last - 1) if differences.written[row]]
        assert {"think", "answer"} <= set(here) <= {"think", "answer", "special"}
        n = sum(role in ("think", "answer") for role in roles[first:last])
        assert sum(role != "special" for role in here) == n
        opening = [store.vocabulary[i] for i in store.token_ids[first:last]]
        begin = int(np.flatnonzero(differences.written[first:last])[0]) + 1
        assert b"".join(opening[begin:]).startswith(b"<|im_start|>think")
        assert not differences.written[last - 1]


@pytest.mark.slow
def test_contributions_of_features_bias_and_rest_add_up_to_the_difference(
    three, subject_dirs, tmp_path, monkeypatch
):
    """The adapters are made weak: a random model saturates before the second point of the path."""
    monkeypatch.setattr("lorascope.causal.held_out._LARGEST_DRIFT", np.inf)
    adapters, _, out = three
    weak = {
        name: load(changed(adapters[i], tmp_path / name, lora_B=0.01), subject_dirs[0])
        for i, name in enumerate("ABCD")
    }
    held_out = HeldOut(weak["A"], ActivationStore.open(out / "activations"), np.arange(3), 512)
    with Differences(weak, held_out, load_sae(out / "sae")) as found:
        measured = found.predictions([("A", "C"), ("A", "D"), ("D", "B")])
        for pair in measured.shifts:
            parts = found.contributions(pair, 4, 0)
            total = parts.of_latent.sum(0) + parts.bias + parts.unexplained
            owner = held_out.store.rollout_of(measured.rows)
            by_rollout = np.bincount(owner, measured.kl[pair] * measured.written)
            np.testing.assert_allclose(total, by_rollout, rtol=0.02)


@pytest.mark.slow
def test_what_parts_write_is_what_their_columns_of_b_write(differences):
    writes, sae = differences.writes, differences.sae
    rank_1 = differences.subjects["A"].layout.effect_scale
    part = sae.W_dec[:, differences.columns["A"]].double().numpy()
    np.testing.assert_allclose(writes.size("A"), np.sqrt(((part * rank_1) ** 2).sum(1)), rtol=1e-4)
    # the twin writes the same into the same modules, though its A and B are scaled
    alive = writes.size("A") > 1e-3 * writes.size("A").max()
    assert writes.cosine("A", "B")[alive].min() > 0.99
    assert (writes.cosine("A", "C") == 0).all()
    # in the SVD gauge columns of B are orthogonal: the norm is that of the values
    svd = differences.subjects["D"].layout.effect_scale
    part = sae.W_dec[:, differences.columns["D"]].double().numpy()
    np.testing.assert_allclose(writes.size("D"), np.sqrt(((part * svd) ** 2).sum(1)), rtol=1e-3)


@pytest.mark.slow
def test_adapters_of_one_base_share_its_weights_and_predict_as_if_alone(three, subject_dirs):
    adapters, _, _ = three
    shared, subjects = SharedBase(), []
    for folder in adapters:
        adapter = inspect_adapter(str(folder))
        base = find_base(adapter, str(subject_dirs[0]))
        tokenizer = load_tokenizer(adapter, base)
        subjects.append(shared.load(adapter, base, tokenizer, torch.device("cpu"), "auto"))
    weights = {subject.causal.get_input_embeddings().weight.data_ptr() for subject in subjects}
    assert len(weights) == 1
    ids = torch.arange(5, 25)[None]
    for folder, subject in zip(adapters, subjects, strict=True):
        with torch.inference_mode():
            alone = load(folder, subject_dirs[0]).model(input_ids=ids).logits
            assert torch.equal(subject.model(input_ids=ids).logits, alone)


def test_an_adapter_that_trained_embeddings_gets_a_base_of_its_own(subject_dirs, tmp_path):
    base, adapter = subject_dirs
    save_adapter(base, tmp_path / "trained", modules_to_save=["embed_tokens"])
    shared, pointers = SharedBase(), set()
    for folder in (adapter, tmp_path / "trained"):
        found = inspect_adapter(str(folder))
        where = find_base(found, str(base))
        tokenizer = load_tokenizer(found, where)
        subject = shared.load(found, where, tokenizer, torch.device("cpu"), "auto")
        pointers.add(subject.causal.get_submodule("model.norm").weight.data_ptr())
    assert len(pointers) == 2


def test_adapters_of_different_bases_are_refused_in_one_line(
    make_subject, subject_dirs, dataset_file, tmp_path
):
    _, other = make_subject(seed=1)
    options = {**SMALL, "dataset": str(dataset_file), "output": tmp_path / "out"}
    with pytest.raises(AdapterError, match="compare takes adapters of one base") as caught:
        compare.run(CompareConfig(adapters=(str(subject_dirs[1]), str(other)), **options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ['<img src=x onerror="alert(1)">', "--output", "A\n| B |"])
def test_names_of_adapters_are_inert_and_decide_no_path(name, subject_dirs, three, tmp_path):
    _, report, _ = three
    tokens = tuple(HOSTILE)
    hostile = replace(
        report,
        base=name,
        adapters=(replace(report.adapters[0], folder=name), *report.adapters[1:]),
        features=tuple(replace(one, label=HOSTILE[0]) for one in report.features),
        texts=(replace(report.texts[0], tokens=tokens, kl=(1.0,) * len(tokens)),),
    )
    page = document_of(hostile).as_html()
    tags = set(re.findall(r"<\s*/?\s*([a-z0-9!]+)", page.lower()))
    allowed = "!doctype html meta title style main h1 h2 h3 p a bdi div span table tr th td".split()
    assert tags <= set(allowed)
    assert "default-src 'none'" in page
    assert 'onerror="' not in page
    assert "<" not in document_of(hostile).as_markdown().replace("\\<", "")
    shutil.copytree(subject_dirs[1], tmp_path / name)
    members, _ = find_members((str(tmp_path / name), f"{tmp_path / name}/../{name}"), ())
    assert [member.name for member in members] == ["A", "B"]  # of the folders in the output


@pytest.mark.slow
def test_a_killed_comparison_goes_on_and_a_finished_one_is_kept(
    subject_dirs, dataset_file, tmp_path, monkeypatch
):
    base, adapter = subject_dirs
    zero = changed(adapter, tmp_path / "zero", lora_B=0.0)
    out = tmp_path / "out"

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for target in ("write_shard", "shutil.copytree"):
        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            broken.setattr(f"lorascope.compare.joint.{target}", stop)
            compared([adapter, zero], base, dataset_file, out)
        assert not (out / "activations").exists()
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("lorascope.compare.compare.Judge", stop)
        compared([adapter, zero], base, dataset_file, out)
    assert not (out / "compare.json").exists()
    report = compared([adapter, zero], base, dataset_file, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert compared([adapter, zero], base, dataset_file, out) == report
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    again = compared([adapter, zero], base, dataset_file, tmp_path / "again")
    assert again == report
    with pytest.raises(ArtifactError, match="other settings"):
        compared([adapter, zero], base, dataset_file, out, steps=8)


@pytest.mark.slow
def test_what_two_seeds_show_as_well_is_no_news(subject_dirs, dataset_file, tmp_path):
    """The null is as far from the first adapter as the second is: nothing is news."""
    base, adapter = subject_dirs
    zeros = [changed(adapter, tmp_path / name, lora_B=0.0) for name in ("zero", "null")]
    twin = changed(adapter, tmp_path / "twin", lora_A=2.0, lora_B=0.5)
    nulls = (str(zeros[1]), str(twin))
    same = compared([adapter, zeros[0]], base, dataset_file, tmp_path / "same", null=nulls)
    pair, *of_seeds = same.pairs
    assert same.nulls == tuple(null.second for null in of_seeds) == ("C", "D")
    assert pair.seeds == pytest.approx(pair.kl, rel=1e-6)
    assert pair.n_different == 0
    assert [one.n_news for one in same.pairs] == [0, 0, 0]
    assert [(one.n_different, one.seeds) for one in of_seeds] == [(None, None)] * 2
    exchanged = [one for one in pair.features if one.explained is not None]
    assert len(exchanged) == SMALL["verify"]
    for one in exchanged:
        assert one.seeds == pytest.approx(max(one.explained, 0), abs=0.02 * pair.kl)
        assert one.at_different == one.seeds_at_different == 0
    other = compared([adapter, zeros[0]], base, dataset_file, tmp_path / "other", null=(str(twin),))
    pair, null = other.pairs
    assert null.kl < 1e-6 * pair.kl
    assert pair.level < 1e-3 * pair.kl
    assert pair.n_different == other.n_rollouts  # seeds do not differ, so each text is different
    assert pair.n_news > 0
    for one in pair.features:
        if one.explained is not None:
            assert one.at_different == pytest.approx(one.explained, rel=1e-12)
            surely = one.explained_interval is not None and one.explained_interval[0] > 0
            assert one.is_news == (surely and one.explained > one.seeds)
    text = document_of(other).as_text()
    assert "C is another seed of A" in text
    assert "One seed says little" in text
    assert "C and D are other seeds of A" in document_of(same).as_text()


class Made(Differences):
    """Differences of which everything is given, for a judge. Each of ten texts has one prediction.

    The first adapter is A, the second B; C and D are other seeds of A. Three features are
    exchanged.
    """

    n_rollouts = 10
    n_fired = np.ones(3, np.int64)

    def __init__(self, kl: dict[str, list[float]], lost: dict[str, list[list[float]]]) -> None:
        given: Any = SimpleNamespace(role_of=lambda rows: np.zeros(len(rows), int))
        self.held_out = given
        given = SimpleNamespace(size=lambda _: np.ones(3), cosine=lambda *_: np.ones(3))
        self.writes = given
        self.kl = {("A", name): np.array(values) for name, values in kl.items()}
        self.lost = {("A", name): np.array(values) for name, values in lost.items()}

    def owners(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def found(self) -> Predictions:
        rows, noise = np.arange(self.n_rollouts), np.full(self.n_rollouts, 1e-9)
        shifts = {pair: ShiftAccumulator() for pair in self.kl}
        kl = {("A", BASE): noise, ("A", ITSELF): noise, **self.kl}
        kl |= {pair[::-1]: values for pair, values in self.kl.items()}
        return Predictions(rows, rows >= 0, kl, shifts)

    def contributions(self, pair: tuple[str, str], steps: int, seed: int) -> Contributions:
        none = np.zeros(self.n_rollouts)
        return Contributions(np.ones((3, self.n_rollouts)), none, none, np.zeros((3, 64)))

    def exchanges(self, pair: tuple[str, str], sets: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([self.lost[pair][latents].sum(0) for latents in sets])

    def removals(self, name: str, sets: Sequence[np.ndarray]) -> np.ndarray:
        return np.ones((len(sets), self.n_rollouts))


def judged(kl: dict[str, list[float]], lost: dict[str, list[list[float]]]) -> PairDifference:
    made = Made(kl, lost)
    judge = Judge(CompareConfig(adapters=("A", "B"), verify=3), made, made.found(), 0)
    judge.seeds([("A", "C"), ("A", "D")])
    return judge.pair(("A", "B"))


SEEDS = {"C": [0.2] * 9 + [0.8], "D": [0.4] * 10}
NOTHING = [[0.0] * 10] * 3


def test_a_weak_feature_of_texts_that_differ_more_than_between_seeds_is_news():
    """It explains less than another feature does between seeds; one of old texts is no news."""
    kl = {"B": [1.01] * 5 + [0.99] * 5, **SEEDS}
    lost = {
        "B": [[0.01] * 5 + [0.0] * 5, [0.0] * 5 + [0.01] * 5, [0.02] * 5 + [0.0] * 5],
        "C": [[0.0] * 10, [0.0] * 10, [0.05] * 10],
        "D": NOTHING,
    }
    pair = judged(kl, lost)
    assert pair.text_level == pytest.approx(1.25 * 0.8)
    assert pair.n_different == 5
    assert pair.level == pytest.approx(0.05)
    assert pair.seeds == pytest.approx(0.4)
    first, second, third = sorted(pair.features, key=lambda one: one.feature)
    assert (first.at_different, first.seeds_at_different) == (pytest.approx(0.005), 0)
    assert (second.explained, second.at_different) == (pytest.approx(0.005), 0)
    assert (third.at_different, third.seeds_at_different) == pytest.approx((0.01, 0.0125))
    assert [one.is_news for one in (first, second, third)] == [True, False, False]


def test_what_explains_two_different_texts_is_not_sure():
    kl = {"B": [1.5] * 2 + [0.1] * 8, **SEEDS}
    lost = {"B": [[0.5] * 2 + [0.0] * 8] * 3, "C": NOTHING, "D": [[0.2] * 10] * 3}
    pair = judged(kl, lost)
    assert pair.n_different == 2
    for one in pair.features:
        assert (one.at_different, one.seeds_at_different) == pytest.approx((0.1, 0.02))
        assert one.at_different_interval is not None
        assert one.at_different_interval[0] == 0
        assert not one.is_news


def test_a_feature_is_news_beside_seeds_that_differ_more_if_it_explains_more_than_any_of_theirs():
    kl = {"B": [0.1] * 10, **SEEDS}
    lost = {
        "B": [[0.06] * 10, [0.04] * 10, [0.06] * 10],
        "C": [[0.01] * 10, [0.01] * 10, [0.05] * 10],
        "D": NOTHING,
    }
    pair = judged(kl, lost)
    assert (pair.n_different, pair.level) == (0, pytest.approx(0.05))
    first, second, third = sorted(pair.features, key=lambda one: one.feature)
    assert [one.is_news for one in (first, second, third)] == [True, False, True]
    assert third.excess_interval == pytest.approx((0.01, 0.01))
    lost["D"] = [[0.0] * 10, [0.0] * 10, [0.07] * 10]
    assert judged(kl, lost).n_news == 0  # the level is 0.07


@pytest.mark.slow
def test_checkpoints_say_when_a_feature_is_born_beside_the_loss(
    subject_dirs, dataset_file, tmp_path
):
    base, adapter = subject_dirs
    run = tmp_path / "run"
    for step, factor in ((20, 0.0), (100, 0.9), (1000, 1.0)):
        changed(adapter, run / f"checkpoint-{step}", lora_B=factor)
    (run / "checkpoint-7").mkdir()  # not finished
    history = [{"step": 10, "loss": 3.0}, {"step": 90, "loss": 2.0}, {"step": "x", "loss": 1.0}]
    history += [{"step": 95, "eval_loss": 9.0}, {"step": 96, "loss": float("nan")}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    report = compared([run], base, dataset_file, tmp_path / "out")
    assert [one.name for one in report.adapters] == ["0020", "0100", "1000"]
    assert [one.loss for one in report.adapters] == [3.0, 2.0, 2.0]
    assert [(one.first, one.second) for one in report.pairs] == [("0020", "0100"), ("0100", "1000")]
    assert report.adapters[0].kl_base < 1e-6 < report.adapters[1].kl_base
    assert min(one.born for one in report.features) == 100  # before, B is 0
    assert {one.born for one in report.features} <= {100, 1000}
    assert {one.died for one in report.features} == {None}
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "loss: 3 at step 20, 2 at step 100, 2 at step 1000" in page
    assert page.count("<polyline") == 2 + min(len(report.features), 24)
    assert f"{len(report.features)} features, the strongest" in page


def test_the_page_of_checkpoints_says_when_features_are_born_and_gone():
    steps = (10, 50, 200)
    lives = {7: (1, 1, 1), 8: (0, 1, 1), 9: (1, 0.05, 0), 4: (0, 0, 1)}
    features = []
    for number, sizes in lives.items():
        there = [step for step, size in zip(steps, sizes, strict=True) if size >= 0.1]
        features.append(
            JointFeature(
                feature=number,
                label=HOSTILE[0],
                n_fired=5,
                mean=1.0,
                sizes=dict(zip(("010", "050", "200"), map(float, sizes), strict=True)),
                examples=(),
                born=there[0],
                peak=there[0],
                died=None if there[-1] == 200 else there[-1],
            )
        )
    adapters = tuple(
        AdapterRecord(
            name=f"{step:03}",
            folder="run",
            digest="a" * 64,
            n_columns=2,
            ranks=(1, 1),
            kl_base=0.5,
            kl_base_interval=(0.4, 0.6),
            floor=0.0,
            step=step,
            loss=2.0,
        )
        for step in steps
    )
    report = ComparisonReport(
        base="b", nulls=(), adapters=adapters, n_rollouts=3, n_tokens=9, n_features=20,
        n_fired=4, fvu=0.1, l0=2.0, pairs=(), features=tuple(features), texts=(),
    )  # fmt: skip
    when, table = growth_of(report, "page.html")
    assert (
        "2 are there at the first checkpoint (learnt by step 10), 2 are born" in when.sentences[0]
    )
    assert "and 1 are gone" in when.sentences[0]
    head, rows = when.tables[0]
    assert head == ("step", "loss", "KL to the base", "features born", "largest here", "gone after")
    assert [row[0] for row in rows] == ["10", "50", "200"]
    assert [row[3:] for row in rows] == [
        ("2 here or before", "2", "1"), ("1", "1", "0"), ("1", "1", "0"),
    ]  # fmt: skip
    assert [(row[0], *row[2:5]) for row in table.tables[0][1]] == [
        ("9", "≤ 10", "10", "10"), ("7", "≤ 10", "10", "—"), ("8", "50", "50", "—"),
        ("4", "200", "200", "—"),
    ]  # fmt: skip
    assert table.tables[0][1][0][6:] == tuple(map(percent, (1.0, 0.05, 0.0)))
    figures = when.figures.split("<figure>")[1:]
    assert [figure.count("class=off") for figure in figures] == [0, 0, 2, 0, 1, 2]
    assert 'href="page.html#/feature/9"' in figures[2] and "gone after 10" in figures[2]
    assert "<script" not in when.figures
    silent = replace(report, adapters=tuple(replace(one, loss=None) for one in adapters))
    when, _ = growth_of(silent, "page.html")
    assert "loss" not in when.tables[0][0] and "loss" not in when.figures


def test_what_cannot_be_compared_is_refused_in_one_line(subject_dirs, tmp_path):
    adapter = str(subject_dirs[1])
    (tmp_path / "checkpoint-1").mkdir()
    for alone, what in (
        (adapter, "is one adapter"),
        (str(tmp_path), "has 0 checkpoints"),
        (str(tmp_path / "none"), "is not a folder"),
    ):
        with pytest.raises(ConfigError, match=f"{what}.*, expected two or more adapters"):
            find_members((alone,), ())
    with pytest.raises(ConfigError, match="no adapter is given"):
        CompareConfig(adapters=())
    with pytest.raises(ConfigError, match="compare trains one SAE, --k has 2"):
        CompareConfig(adapters=(adapter, adapter), k=(2, 3))
    with pytest.raises(ConfigError, match="26 or fewer"):
        find_members((adapter,) * 27, ())
    with pytest.raises(ConfigError, match="has the weights of .*, expected another seed"):
        find_members((adapter, adapter), (adapter,))
    twin = str(changed(Path(adapter), tmp_path / "twin", lora_A=2.0, lora_B=0.5))
    with pytest.raises(ConfigError, match="twin has the weights of .*twin, expected another seed"):
        find_members((adapter, adapter), (twin, twin))
    with pytest.raises(ConfigError, match="is the only adapter before --null"):
        find_members((adapter,), (twin, adapter))
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="which is a file, expected a folder"):
        compare.run(CompareConfig(adapters=(adapter, adapter), output=tmp_path / "out"))


def test_adapters_may_stand_before_and_after_flags(monkeypatch, capsys):
    seen: list[CompareConfig] = []
    monkeypatch.setattr(compare, "run", lambda config: seen.append(config) or Path("page"))
    assert call(["compare", "one", "--dataset", "x.jsonl", "two", "three", "--verify", "3"]) == 0
    assert seen[0].adapters == ("one", "two", "three")
    assert call(["compare", "one", "two", "--null", "three", "four", "--dataset", "x.jsonl"]) == 0
    assert (seen[1].adapters, seen[1].null) == (("one", "two"), ("three", "four"))
    assert call(["compare", "--dataset", "x.jsonl"]) == 2
    assert "adapters" in capsys.readouterr().err
