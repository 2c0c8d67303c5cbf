"""Contributions of features to predictions: against theory, and against real removals."""

import json
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.schemas import require_schema
from builders.studies import dictionary, each_column, make_texts, strengthen
from builders.subjects import N_TERMS, load, save_adapter
from builders.tolerance import assert_same_up_to_rounding, rounding
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lorascope.activations.store import ActivationStore
from lorascope.causal.attribute import (
    AttributeConfig,
    measure_agreement,
    run,
)
from lorascope.causal.gradients import (
    RowDecomposition,
    Targets,
    input_gradients,
    path_gradients,
)
from lorascope.causal.study import open_report
from lorascope.cli import call
from lorascope.errors import ArtifactError, ConfigError, NumberError
from lorascope.features.collect import CollectConfig
from lorascope.features.collect import run as collect
from lorascope.sites import Site, SiteLayout
from lorascope.subject.adapter import Adapter
from lorascope.subject.adapter_files import WEIGHTS
from lorascope.subject.base import Base
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject


@pytest.fixture(scope="module")
def dirs(make_subject, tmp_path_factory):
    """A subject whose predictions are far from even, and whose adapter moves them moderately."""
    base, adapter = strengthen(make_subject(), tmp_path_factory.mktemp("strong"))
    tensors = load_file(adapter / WEIGHTS)
    for name in tensors:
        tensors[name] *= 0.02 if "lora_B" in name else 1.0
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    return base, adapter


@pytest.fixture(scope="module")
def store(dirs, dataset_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "store"
    return ActivationStore.open(make_texts(dirs, dataset_file, folder, num_examples=3))


@pytest.fixture(scope="module")
def sae(store):
    return each_column(store)


@pytest.fixture
def attributed(dirs, store, sae, tmp_path):
    """Return a function that makes a report."""

    def made(name="attribution", **given):
        base, adapter = dirs
        sae.save(tmp_path / "sae")
        given = {"base_model": str(base), "data_dir": store.path, "device": "cpu", **given}
        return run(
            AttributeConfig(
                lora_path=str(adapter),
                sae=tmp_path / "sae",
                output=tmp_path / f"{name}.json",
                **given,
            )
        )

    return made


class Toy(torch.nn.Module):
    """A linear model: a running sum of embeddings, two modules that add to it, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.one, self.two = (torch.nn.Linear(6, 6, bias=False) for _ in range(2))
        self.head = torch.nn.Linear(6, 11, bias=False)

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids).cumsum(1)
        x = x + self.one(x)
        x = x + self.two(x).cumsum(1)
        return _Out(self.head(x))


class _Out(dict):
    def __init__(self, logits):
        super().__init__(logits=logits)
        self.logits = logits


@pytest.fixture(scope="module")
def toy():
    """A linear subject with LoRA of rank 2 on both modules."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False)
    model = get_peft_model(Toy(), config).eval()
    causal = model.base_model.model
    layout = SiteLayout.from_sites(
        [Site(layer=-1, projection=n, module=n, rank=2) for n in ("one", "two")]
    )
    return Subject(
        model=model,
        tokenizer=None,
        adapter=Adapter(Path("toy"), "toy", {}, {}, "a" * 64),
        base=Base("toy", Path("toy"), "b" * 64),
        dtype=torch.float32,
        layout=layout,
        sites=tuple(causal.get_submodule(s.module).lora_A["default"] for s in layout.sites),
        mixes=(None, None),
        device=torch.device("cpu"),
    )


IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def mean_gradients(editor, ids, rows, targets, steps):
    """The mean over `steps` points of the path; with 0, the gradient at the adapter's rows."""
    both = path_gradients(editor, ids, rows, targets, max(steps, 1), ids.shape[1])
    return both[0 if steps else 1]


def decompose(subject, editor, ids, kind, positions, sae=None):
    """Return the targets, the decomposition and the rows of one rollout."""
    with torch.no_grad():
        rows = editor.run(ids).rows[0]
        targets = Targets.at(kind, torch.tensor(positions), ids, editor.base(ids))
        if sae is None:
            eye = torch.eye(rows.shape[1])
            both = torch.cat([eye, -eye])
            sae = dictionary(subject.layout, both.T.contiguous(), both)
        everywhere = torch.ones(len(rows), dtype=torch.bool)
        parts = RowDecomposition(sae, rows, np.arange(rows.shape[1]), everywhere)
    return targets, parts, rows


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_on_a_linear_model_contributions_are_the_real_removals_and_add_up(toy, steps):
    with RowEditor(toy) as editor:
        targets, parts, rows = decompose(toy, editor, IDS, "logit-difference", [2, 5, 7])
        gradients = mean_gradients(editor, IDS, rows, targets, steps)
        firings = parts.firing_contributions(gradients)
        with torch.no_grad():
            logits = editor.run(IDS).logits
            largest = float(logits.abs().max())
            y = targets.values(logits[0, targets.positions - 1])
            y_base = targets.values(editor.base(IDS)[0, targets.positions - 1])
            for i in range(len(parts.latent)):
                changed = rows.clone()
                changed[parts.position[i]] -= parts.value[i] * parts.sae.W_dec[parts.latent[i]]
                logits = editor.run(IDS, lambda c, _, r=changed: r[None][..., c]).logits
                gone = y - targets.values(logits[0, targets.positions - 1])
                assert_same_up_to_rounding(firings[:, i], gone, n_terms=N_TERMS, scale=largest)
    assert_same_up_to_rounding(firings.sum(1), y - y_base, n_terms=N_TERMS, scale=largest)
    for values in parts.other_contributions(gradients).values():
        assert float(values.abs().max()) < rounding(N_TERMS, largest)


@pytest.mark.parametrize("kind", ["kl", "logprob", "logit-difference"])
def test_shares_add_up_to_the_effect_of_the_whole_adapter(dirs, kind):
    subject = load(dirs[1], dirs[0])
    ids = torch.tensor([[5, 9, 200, 31, 7, 64, 12, 90]])
    gaps = {}
    with RowEditor(subject) as editor:
        targets, parts, rows = decompose(subject, editor, ids, kind, [3, 5, 7])
        with torch.no_grad():
            y, y_base = (
                targets.values(logits[0, targets.positions - 1])
                for logits in (editor.run(ids).logits, editor.base(ids))
            )
        for steps in (2, 40):
            gradients = mean_gradients(editor, ids, rows, targets, steps)
            whole = parts.firing_contributions(gradients).sum(1) + sum(
                parts.other_contributions(gradients).values()
            )
            gaps[steps] = float((whole - (y - y_base)).abs().sum() / (y - y_base).abs().sum())
            assert_same_up_to_rounding(
                parts.row_contributions(gradients).sum(1), whole, n_terms=N_TERMS
            )
    assert float((y - y_base).abs().min()) > 1e-3
    assert gaps[40] < 0.02
    assert gaps[40] < gaps[2]


def test_a_gradient_at_the_adapters_rows_is_the_slope_of_the_prediction(dirs):
    subject = load(dirs[1], dirs[0])
    ids = torch.tensor([[5, 9, 200, 31, 7, 64]])
    with RowEditor(subject) as editor:
        targets, _, rows = decompose(subject, editor, ids, "logprob", [5])
        gradient = mean_gradients(editor, ids, rows, targets, 0)[0]
        for place, column in ((0, 2), (3, 5), (4, 12)):
            moved = []
            for sign in (1, -1):
                given = rows.clone()
                given[place, column] += sign * 0.02
                with torch.no_grad():
                    logits = editor.run(ids, lambda c, _, g=given: g[None][..., c]).logits
                moved.append(float(targets.values(logits[0, targets.positions - 1])))
            slope = (moved[0] - moved[1]) / 0.04
            assert float(gradient[place, column]) == pytest.approx(slope, rel=0.02, abs=2e-4)


def test_a_gradient_keeps_tiny_factors_and_fits_into_float16(toy):
    x = torch.tensor([0.5, -2.0], requires_grad=True)
    y = (x * 1e20 * 1e-20 * 1e-25).sum()  # backward, 1e-25 · 1e-20 has hardly any digits
    (gradient,) = input_gradients(toy, y, [x], keep_graph=True)
    assert_same_up_to_rounding(gradient * 1e25, torch.ones(2), n_terms=4)
    assert not torch.allclose(torch.autograd.grad(y, x)[0] * 1e25, torch.ones(2))
    half = replace(toy, dtype=torch.float16)
    (gradient,) = input_gradients(half, x.half().square().sum().float(), [x])
    assert_same_up_to_rounding(gradient, 2 * x.detach(), n_terms=1)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0, 1e3])
def test_a_gradient_in_float16_has_the_digits_of_float16_whatever_its_size(toy, size):
    half = replace(toy, dtype=torch.float16)
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 64, generator=g).half(), torch.randn(64, 5000, generator=g).half()
    shift = size * torch.randn(5000, generator=g, dtype=torch.float64)

    def kl(leaf):
        logits = (leaf @ weight.to(leaf.dtype) / 8).double()
        log_p, log_q = logits.log_softmax(-1), (logits + shift).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    leaf, exact = x.requires_grad_(), x.detach().double().requires_grad_()
    (gradient,), (wanted,) = (
        input_gradients(half, kl(leaf), [leaf]),
        torch.autograd.grad(kl(exact), exact),
    )
    # logits and gradients are rounded to float16, by 2**-11 of their size, which is up to 10
    assert float((gradient - wanted).norm() / wanted.norm()) < 2**-6


def test_gradients_are_the_same_however_points_and_targets_are_grouped(dirs):
    subject = load(dirs[1], dirs[0])
    ids = IDS
    with RowEditor(subject, fast=True) as editor:
        with torch.no_grad():
            rows, base = editor.run(ids).rows[0], editor.base(ids)
        n = ids.shape[1]
        targets = Targets.at("kl", torch.arange(1, n), ids, base)
        whole = path_gradients(editor, ids, rows, targets, 5, 100 * n)
        for kept_tokens in (2 * n, n, 1):  # several points share a batch; one; layers run again
            parts = path_gradients(editor, ids, rows, targets, 5, kept_tokens)
            assert_same_up_to_rounding(parts, whole, n_terms=100 * N_TERMS)
        for group in targets.groups():
            parts = path_gradients(editor, ids, rows, group, 5, n)
            at = [int((targets.positions == p).nonzero()) for p in group.positions]
            before = parts.shape[2]
            expected = whole[:, at, :before]
            assert_same_up_to_rounding(parts, expected, n_terms=100 * N_TERMS)
            assert not whole[:, at, before:].any()


def test_groups_hold_each_target_once_and_cost_least():
    positions = torch.tensor([3, 90, 4, 50, 88, 2, 100])
    targets = Targets("logprob", positions, positions, torch.zeros(7, 2))

    def cost(groups):
        return sum((1 + len(group)) * max(group) for group in groups)

    found = [group.positions.tolist() for group in targets.groups()]
    assert sorted(p for group in found for p in group) == sorted(positions.tolist())
    last = sorted(positions.tolist(), reverse=True)
    ways = [
        [last[i:j] for i, j in pairwise([0, *cuts, len(last)])]
        for n in range(len(last))
        for cuts in combinations(range(1, len(last)), n)
    ]
    assert cost(found) == min(map(cost, ways))


def test_only_tokens_before_a_target_contribute_to_it(dirs):
    subject = load(dirs[1], dirs[0])
    ids = torch.tensor([[5, 9, 200, 31, 7, 64]])
    with RowEditor(subject) as editor:
        targets, parts, rows = decompose(subject, editor, ids, "kl", [2, 5])
        firings = parts.firing_contributions(mean_gradients(editor, ids, rows, targets, 3))
    for i, place in enumerate(targets.positions.tolist()):
        assert not firings[i, parts.position >= place].any()
        assert firings[i, parts.position < place].abs().max() > 0


def test_an_adapter_that_writes_nothing_contributes_nothing(dirs, tmp_path):
    def silence(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()

    save_adapter(dirs[0], tmp_path / "adapter", change=silence, r=1)
    subject = load(tmp_path / "adapter", dirs[0])
    ids = torch.tensor([[5, 9, 200, 31]])
    with RowEditor(subject) as editor:
        for kind in ("kl", "logprob", "logit-difference"):
            targets, parts, rows = decompose(subject, editor, ids, kind, [1, 3])
            assert rows.abs().max() > 0
            for steps in (0, 4):
                gradients = mean_gradients(editor, ids, rows, targets, steps)
                assert not parts.firing_contributions(gradients).any()
                assert not parts.row_contributions(gradients).any()


def test_tokens_that_both_models_rule_out_leave_a_kl_and_its_gradient_finite():
    # B52
    logits = torch.tensor([[1.0, 2.0, -torch.inf, 0.0]], requires_grad=True)
    base = torch.tensor([[0.5, 0.0, -torch.inf, 1.0]]).log_softmax(-1)
    targets = Targets("kl", torch.tensor([1]), torch.tensor([0]), base)
    value = targets.values(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    p, q = logits[0, [0, 1, 3]].softmax(-1), base[0, [0, 1, 3]].softmax(-1)
    assert float(value.detach()) == pytest.approx(float((p * (p / q).log()).sum().detach()))
    assert torch.isfinite(gradient).all()
    impossible = Targets("kl", targets.positions, targets.tokens, base.roll(1, -1))
    with pytest.raises(NumberError, match="KL is infinite"):
        impossible.values(logits)


def test_agreement_knows_what_agrees_and_what_does_not():
    values = np.array([3.0, -1.0, 0.5, 0.2, 0.1, -2.0])

    def compared_with(removed):
        return measure_agreement([(values, -values, np.array(removed, float))])

    agreed = compared_with(2 * values)
    assert agreed.contribution.rank == pytest.approx(1)
    assert agreed.contribution.pearson == pytest.approx(1)
    assert agreed.contribution.top == 1
    assert agreed.removal.rank == pytest.approx(-1)
    by_hand = [4, 1, 3, 2, 0, 5]  # ranks of the real removals; those of values: 5 1 4 3 2 0
    expected = 1 - 6 * (1 + 0 + 1 + 1 + 4 + 25) / (6 * 35)
    assert compared_with(by_hand).contribution.rank == pytest.approx(expected)
    assert measure_agreement([]) is None


def test_the_report_says_where_adapter_and_base_differ_and_which_features_contribute(
    attributed, store
):
    data = open_report(attributed(steps=24, check_rollouts=1, tokens=4, top=30))
    assert data["n_rollouts"] == 3 and data["n_targets"] == 12
    assert data["completeness"]["gap"] < 0.1
    assert abs(data["completeness"]["unexplained"]) < 1e-4  # this dictionary rebuilds every row
    assert data["agreement"]["n_targets"] == 4
    assert data["agreement"]["removal"]["rank"] > 0.5
    for text in data["rollouts"]:
        index = list(store.rollout_id).index(text["rollout"])
        n = int(np.diff(store.rollout_start)[index])
        assert len(text["kl"]) == len(text["rise"]) == n
        assert text["kl"][0] is None and None not in text["kl"][1:]
        usual = [
            text["kl"][i] for i in range(1, n) if store.eligible[store.rollout_start[index] + i]
        ]
        explained = [text["kl"][one["token"]] for one in text["targets"]]
        assert sorted(explained) == sorted(usual)[-4:]
        for one in text["targets"]:
            assert one["adapter"] - one["base"] == pytest.approx(text["kl"][one["token"]], rel=1e-3)
            parts = sum(one[name] for name in ("features", "bias", "unexplained", "special"))
            assert sum(x for _, x, _, _ in one["behind"]) == pytest.approx(
                one["features"], rel=0.5, abs=0.1
            )
            assert parts == pytest.approx(one["adapter"] - one["base"], rel=0.2, abs=0.05)
            assert all(place < one["token"] for _, _, place, _ in one["behind"])


def test_the_complete_rollouts_of_an_index_are_compared_and_the_first_explained(
    attributed, dirs, store, sae, tmp_path
):
    """What both predict is what the two models give by themselves."""
    sae.save(tmp_path / "sae")
    index = collect(
        CollectConfig(data_dir=store.path, sae=tmp_path / "sae", output=tmp_path / "features.h5")
    )
    out = attributed(rollouts_of=index, max_rollouts=1, steps=1, check_rollouts=0, tokens=2)
    data = open_report(out)
    assert [len(one["targets"]) for one in data["rollouts"]] == [2, 0, 0]
    subject, text = load(dirs[1], dirs[0]), data["rollouts"][2]
    at = list(store.rollout_id).index(text["rollout"])
    ids = store.token_ids[slice(*store.rollout_start[at : at + 2].tolist())]
    with torch.no_grad(), RowEditor(subject) as editor:
        tokens = torch.from_numpy(ids.astype(np.int64))[None]
        logits = {"adapter": editor.run(tokens).logits, "base": editor.base(tokens)}
    likely, n = text["likely"], len(ids)
    stops = np.cumsum(likely["count"])
    assert len(stops) == n and likely["count"][0] == 0 and min(likely["count"][1:]) > 0
    for t in (1, n // 2, n - 1):
        run = slice(stops[t - 1], stops[t])
        named = likely["token_id"][run]
        assert {str(i) for i in named} <= data["vocabulary"].keys()
        for who, values in logits.items():
            p = values[0, t - 1].double().softmax(-1)
            np.testing.assert_allclose(likely[who][run], p[named], atol=1e-4)  # four digits
            assert int(p.argmax()) in named


def test_rise_is_what_the_adapter_adds_to_the_tokens_log_probability(attributed, dirs, store):
    data = open_report(attributed(check_rollouts=0, target="logprob", steps=1))
    assert data["agreement"] is None
    for text in data["rollouts"]:
        for one in text["targets"]:
            assert one["adapter"] - one["base"] == pytest.approx(
                text["rise"][one["token"]], rel=1e-3, abs=1e-4
            )


def test_the_same_command_gives_the_same_bytes_and_verify_reads_it(attributed):
    out = attributed(steps=2)
    first = out.read_bytes()
    assert attributed(steps=2) == out
    out.unlink()
    assert attributed(steps=2).read_bytes() == first
    assert call(["verify", str(out)]) == 0
    require_schema(out, "attribution")
    text = json.loads(first)
    text["rollouts"][0]["kl"][1] = 7.0
    out.write_text(json.dumps(text))
    assert call(["verify", str(out)]) == 1


def test_a_token_that_is_asked_for_is_explained(attributed, store):
    rollout = int(store.rollout_id[1])
    data = open_report(attributed(rollouts=(rollout,), positions=(4, 7), steps=2, check_rollouts=0))
    assert [text["rollout"] for text in data["rollouts"]] == [rollout]
    assert [one["token"] for one in data["rollouts"][0]["targets"]] == [4, 7]


def test_impossible_requests_are_one_line(attributed, store, tmp_path):
    for given, words in (
        ({"rollouts": (10**6,)}, "no rollout 1000000"),
        ({"positions": (3,)}, "names 0"),
        (
            {"rollouts": (int(store.rollout_id[0]),), "positions": (0,)},
            "1 or more",
        ),
        ({"rollouts": (int(store.rollout_id[0]),), "positions": (9999,)}, "tokens"),
        ({"rollouts": (0,), "rollouts_of": tmp_path / "features.h5"}, "give one"),
        ({"steps": 0}, "--steps is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            attributed(**given)
    with pytest.raises(ArtifactError):
        attributed(rollouts_of=tmp_path / "features.h5")
    assert not (tmp_path / "attribution.json").exists()
