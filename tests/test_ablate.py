"""Effects of removing parts and features: against deleted weights, and against theory."""

import json
import logging
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from builders.schemas import require_schema
from builders.studies import ROUNDED, dictionary, each_column, make_texts, strengthen
from builders.subjects import N_TERMS, load, logits_of, reference, save_adapter
from builders.tolerance import kl_rounding, rounding

from lorascope.activations.store import ActivationStore
from lorascope.causal import removals
from lorascope.causal.ablate import AblateConfig, run
from lorascope.causal.effects import cross_entropy, kl_divergence
from lorascope.causal.held_out import HeldOut
from lorascope.causal.removals import (
    HeldChange,
    LiveChange,
    adapter_parts,
    run_held,
    run_live,
)
from lorascope.causal.report_records import N_SLICES
from lorascope.causal.study import open_report
from lorascope.errors import ConfigError
from lorascope.subject.intervene import RowEditor

DIGITS = 0.02  # of a term p·d²/2: d is 1e-3 or more, and rounded by some 1e-6 in each logit


@pytest.fixture(scope="module")
def dirs(make_subject, tmp_path_factory):
    return strengthen(make_subject(), tmp_path_factory.mktemp("strong"))


@pytest.fixture(scope="module")
def store(dirs, dataset_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "store"
    return ActivationStore.open(make_texts(dirs, dataset_file, folder, num_examples=3))


def ablated(dirs, store, tmp_path, sae=None, name="ablation", **given):
    base, adapter = dirs
    if sae is not None:
        sae.save(tmp_path / "sae")
        given["sae"] = tmp_path / "sae"
    return open_report(
        run(
            AblateConfig(
                lora_path=str(adapter),
                base_model=str(base),
                data_dir=store.path,
                output=tmp_path / f"{name}.json",
                device="cpu",
                **given,
            )
        )
    )


@pytest.fixture(scope="module")
def report(dirs, store, tmp_path_factory):
    return ablated(dirs, store, tmp_path_factory.mktemp("out"), greedy="site")


@torch.inference_mode()
def by_hand(dirs, store, change):
    """Mean KL and rise of the loss when `change(name, parameter)` has altered the weights."""
    base, adapter = dirs
    whole, changed = reference(adapter, base), reference(adapter, base)
    for name, parameter in changed.named_parameters():
        if "lora_B" in name:
            change(name, parameter)
    kl = rise = n = 0.0
    for i in range(store.n_rollouts):
        first, last = store.rollout_start[i : i + 2]
        ids = torch.from_numpy(store.token_ids[first:last].astype(np.int64))
        usual = torch.from_numpy(store.eligible[first + 1 : last])
        p, q = (logits_of(model, ids[None])[0, :-1][usual] for model in (whole, changed))
        kl += float(kl_divergence(p, q).sum())
        rise += float((cross_entropy(q, ids[1:][usual]) - cross_entropy(p, ids[1:][usual])).sum())
        n += int(usual.sum())
    return kl / n, rise / n


@pytest.mark.parametrize(
    ("kind", "name", "gone"),
    [
        ("sites", "1.up_proj", lambda n: "layers.1.mlp.up_proj" in n),
        ("projections", "v_proj", lambda n: "v_proj" in n),
        ("layers", "0", lambda n: "layers.0." in n),
        ("blocks", "mlp", lambda n: ".mlp." in n),
        ("blocks", "attention", lambda n: ".self_attn." in n),
    ],
)
def test_taking_a_part_out_is_deleting_its_weights_and_alone_the_others(
    dirs, store, report, kind, name, gone
):
    part = report[kind][name]
    kl, rise = by_hand(dirs, store, lambda n, b: b.zero_() if gone(n) else None)
    assert part["kl"] == pytest.approx(kl, rel=1e-3)
    assert part["ce_rise"] == pytest.approx(rise, rel=1e-2, abs=1e-5)
    kl, _ = by_hand(dirs, store, lambda n, b: None if gone(n) else b.zero_())
    assert part["alone"]["kl"] == pytest.approx(kl, rel=1e-3)
    whole = report["without_adapter"]["kl"]
    assert part["alone"]["recovered"] == pytest.approx(1 - kl / whole, abs=1e-3)


def test_without_any_part_it_is_the_base_and_blocks_complement_each_other(dirs, store, report):
    kl, _ = by_hand(dirs, store, lambda n, b: b.zero_())
    assert report["without_adapter"]["kl"] == pytest.approx(kl, rel=1e-3)
    blocks = report["blocks"]
    assert blocks["mlp"]["alone"]["kl"] == pytest.approx(blocks["attention"]["kl"], rel=1e-3)


def test_nothing_taken_out_is_the_floor_and_controls_are_above_it(report):
    assert 0 <= report["floor"]["null"] < ROUNDED * report["without_adapter"]["kl"]
    assert 0 <= report["floor"]["rounding"] < ROUNDED * report["without_adapter"]["kl"]
    for part in report["sites"].values():
        assert part["kl_random"] > report["floor"]["rounding"]
        low, high = part["kl_interval"]
        assert low <= part["kl"] <= high


def test_one_after_the_other_takes_the_cheapest_and_ends_with_the_base(report):
    steps = report["greedy"]
    assert sorted(step["part"] for step in steps) == sorted(report["sites"])
    cheapest = min(report["sites"], key=lambda name: report["sites"][name]["kl"])
    assert steps[0]["part"] == cheapest
    assert steps[0]["kl"] == pytest.approx(report["sites"][cheapest]["kl"], rel=1e-3)
    assert steps[-1]["kl"] == pytest.approx(report["without_adapter"]["kl"], rel=1e-3)


@pytest.mark.slow
def test_the_batch_changes_numbers_by_rounding_only(dirs, store, report, tmp_path):
    alone = ablated(dirs, store, tmp_path, each_column(store), batch_tokens=1, greedy="none")
    many = ablated(
        dirs, store, tmp_path, each_column(store), "many", batch_tokens=9999, greedy="none"
    )
    for kind in ("sites", "layers", "blocks"):
        for name, part in alone[kind].items():
            for key in ("kl", "kl_random", "ce_rise", "kl_special"):
                for other in (report, many):
                    assert part[key] == pytest.approx(other[kind][name][key], rel=1e-3, abs=ROUNDED)
    for one, other in zip(alone["features"], many["features"], strict=True):
        near = kl_rounding(other["kl"], rounding(N_TERMS))
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3, abs=near)


@pytest.mark.slow
def test_parts_can_be_removed_on_fewer_rollouts_than_features(dirs, store, report, tmp_path):
    sae = each_column(store)
    few = ablated(dirs, store, tmp_path, sae, "few", part_rollouts=1, greedy="none")
    one = ablated(dirs, store, tmp_path, sae, "one", max_rollouts=1, greedy="none")
    for name, part in few["sites"].items():
        assert part["kl"] == pytest.approx(one["sites"][name]["kl"], rel=1e-3, abs=ROUNDED)
    assert few["parts_on"]["n_tokens"] == one["n_tokens"] < few["n_tokens"]
    for key in ("without_adapter", "floor", "n_rollouts", "n_tokens"):
        assert few[key] == report[key]
    fired = [sum(feature["n_fired"] for feature in found["features"]) for found in (few, one)]
    assert fired[0] > fired[1]
    assert report["parts_on"]["n_rollouts"] == report["n_rollouts"] == store.n_rollouts
    assert report["parts_on"]["kl"] == pytest.approx(report["without_adapter"]["kl"], rel=1e-3)


@pytest.mark.slow
def test_an_adapter_that_writes_nothing_has_no_effect_anywhere(dirs, dataset_file, tmp_path):
    """Copies of a batch may differ by rounding, as a product sums each of its rows in its way."""

    def untrained(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()

    save_adapter(dirs[0], tmp_path / "adapter", change=untrained, r=2)
    both = dirs[0], tmp_path / "adapter"
    texts = ActivationStore.open(
        make_texts(both, dataset_file, tmp_path / "store", num_examples=2, gauge="raw")
    )
    found = ablated(both, texts, tmp_path, each_column(texts))
    nothing = kl_rounding(0.0, rounding(N_TERMS))

    def assert_nothing(removal):
        assert removal["kl"] <= nothing
        assert abs(removal["ce_rise"]) <= 2 * rounding(N_TERMS)

    assert_nothing(found["without_adapter"])
    for kind in ("sites", "projections", "layers", "blocks"):
        for part in found[kind].values():
            assert_nothing(part)
            assert max(part["kl_random"], part["alone"]["kl"]) <= nothing
            assert part["alone"]["recovered"] is None
    assert found["features"]
    for one in found["features"]:
        assert_nothing(one)
        assert one["kl_control"] == one["kl_estimate"] == one["pull"] == 0.0
        assert one["verdict"] != "specific"
    for step in found["greedy"]:
        assert_nothing(step)


@torch.no_grad()
def test_a_feature_is_taken_out_at_every_token_on_which_it_fires(dirs, store, tmp_path):
    """Latent 3 is the positive part of column 3; the other rows are held as they were."""
    found = ablated(dirs, store, tmp_path, each_column(store), features=(3,), greedy="none")
    (entry,) = found["features"]
    subject = load(dirs[1], dirs[0])
    total, here, n, n_fired, by_rollout = 0.0, 0.0, 0, 0, []
    surely, at_most = bounds = torch.zeros(2, subject.causal.config.vocab_size, dtype=torch.float64)
    with RowEditor(subject) as editor:
        for i in range(store.n_rollouts):
            first, last = store.rollout_start[i : i + 2]
            ids = torch.from_numpy(store.token_ids[first:last].astype(np.int64))
            text = torch.from_numpy(store.eligible[first:last])
            out = editor.run(ids[None])
            rows = out.rows.clone()
            fires = rows[0, :, 3] > 0
            rows[0, fires, 3] = 0
            other = editor.run(ids[None], lambda columns, _, rows=rows: rows[..., columns]).logits
            kl = kl_divergence(out.logits[0, :-1], other[0, :-1])
            usual = text[1:]
            total += float(kl[usual].sum())
            by_rollout.append(float(kl.sum()))
            here += float(kl[usual & fires[:-1]].sum())
            n, n_fired = n + int(usual.sum()), n_fired + int(fires[:-1].sum())
            p, q = (x[0, :-1].double().softmax(-1) for x in (out.logits, other))
            terms = torch.where(q < p, p * (p / q).log() - p + q, 0.0)[usual]
            for i_bound, factor in enumerate((1 + DIGITS, 1 - DIGITS)):
                differs = kl[usual] >= factor * kl[usual].topk(16).values[-1]
                falls = terms >= factor * terms.topk(3).values[:, -1:]
                bounds[i_bound] += (terms * falls)[differs].sum(0)
    assert entry["feature"] == 3
    assert entry["n_fired"] == n_fired
    assert entry["kl"] == pytest.approx(total / n, rel=1e-3)
    assert entry["kl_each"] == pytest.approx(total / n_fired, rel=1e-3)
    assert entry["share_here"] == pytest.approx(here / total, rel=1e-3)
    assert entry["kl_control"] > 0
    assert store.n_rollouts <= N_SLICES
    permille = 1000 * np.array(by_rollout) / sum(by_rollout)
    assert np.abs(entry["spread"] - permille).max() <= 0.5 + 2, "rounded, and of sums to 1e-3"
    assert len(entry["falls"]) == 10
    shares = {fall["token_id"]: fall["share"] * total for fall in entry["falls"]}
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    for token, nats in shares.items():
        assert (1 - DIGITS) * surely[token] <= nats <= (1 + DIGITS) * at_most[token]
    others = [nats for i, nats in enumerate(surely.tolist()) if i not in shares]
    assert max(others) <= (1 + DIGITS) * min(shares.values())


@pytest.mark.slow
@torch.inference_mode()
def test_what_is_shared_between_runs_changes_numbers_by_rounding_only(dirs, store, monkeypatch):
    """Layers below a change, and tokens before it, are not run again."""
    held_out = HeldOut(load(dirs[1], dirs[0]), store, np.arange(store.n_rollouts), 64)
    parts = adapter_parts(store.layout)
    keep, push = torch.ones(store.d_in), torch.zeros(len(parts[0].sites))
    live = [
        change
        for part in parts
        for change in (
            LiveChange((~part.columns).float(), push),
            LiveChange(part.columns.float(), push),
            LiveChange(keep, part.sites.float()),
        )
    ]
    with RowEditor(held_out.subject, fast=True) as editor:
        for batch in held_out.batches(copies=64):
            fast, plain = (
                run_live(editor, held_out, batch, live, skip_layers=skip)[0]
                for skip in (True, False)
            )
            same_sums(fast, plain)
            rows = editor.run(batch.token_ids).rows[0]
            n = len(rows)
            held = []
            for first in (0, n // 2, n - 1, 1, n - 2):
                added = torch.zeros(n - first, store.d_in)
                added[:, first % store.d_in] = -rows[first:, first % store.d_in]
                held.append(HeldChange(torch.arange(first, n), added))
            fast = run_held(editor, held_out, batch, rows, held)
            with monkeypatch.context() as patch:
                patch.setattr(removals, "repeat_cache", lambda *_: None)
                same_sums(fast, run_held(editor, held_out, batch, rows, held))


def same_sums(fast, plain):
    for name in ("kl", "special", "here"):
        for one, other in zip(getattr(fast, name), getattr(plain, name), strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=100 * ROUNDED)
    np.testing.assert_allclose(fast.ce, plain.ce, rtol=1e-3, atol=100 * rounding(N_TERMS, 10))


@pytest.mark.slow
def test_a_feature_that_never_fires_has_exactly_no_effect(dirs, store, tmp_path):
    sae = each_column(store)
    threshold = sae.threshold.clone()
    threshold[5] = 1e9
    dead = type(sae)(**{**vars(sae), "threshold": threshold}).sealed()
    entry, other = ablated(dirs, store, tmp_path, dead, features=(5, 6), greedy="none")["features"]
    assert (entry["feature"], entry["n_fired"], entry["kl"], entry["ce_rise"]) == (5, 0, 0.0, 0.0)
    assert entry["kl_each"] is None
    assert other["kl"] > 0
    everything = ablated(dirs, store, tmp_path, dead, "all", greedy="none", overwrite=True)
    assert 5 not in [one["feature"] for one in everything["features"]]
    assert len(everything["features"]) > store.d_in


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
@torch.inference_mode()
def test_features_add_up_where_the_model_is_linear_in_its_rows(make_subject, tmp_path):
    """LoRA on the lm_head alone: logits are linear in the rows, so effects of features add."""
    base, adapter = make_subject(r=3, targets=["lm_head"], n_layers=1)
    subject = load(adapter, base)
    ids = torch.tensor([[5, 9, 200, 31, 7, 64]])
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(4, 1, 6, 3, generator=generator)
    with RowEditor(subject) as editor:
        x = editor.run(ids).rows

        def effect(taken_out):
            rows = x - taken_out
            return editor.run(ids, lambda columns, _: rows[..., columns]).logits

        whole = effect(torch.zeros_like(x))
        alone = sum(effect(part) - whole for part in parts)
        together = effect(parts.sum(0)) - whole
        torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-4)
        assert float(together.abs().max()) > 0.01
        torch.testing.assert_close(effect(x), editor.base(ids), rtol=0, atol=0)


def test_parts_are_the_sites_of_a_layout_whatever_their_ranks(make_subject):
    base, adapter = make_subject(r=2, rank_pattern={"q_proj": 3}, targets=["q_proj", "up_proj"])
    layout = load(adapter, base).layout
    parts = {(part.kind, part.name): part for part in adapter_parts(layout)}
    assert int(parts["site", "0.q_proj"].columns.sum()) == 3
    assert int(parts["layer", "1"].columns.sum()) == 5
    assert int(parts["projection", "up_proj"].sites.sum()) == 2
    for block, columns in (("mlp", 4), ("attention", 6)):
        assert int(parts["block", block].columns.sum()) == columns
    sites = [part.columns for part in parts.values() if part.kind == "site"]
    assert torch.equal(torch.stack(sites).sum(0), torch.ones(layout.d_in, dtype=torch.int64))


def test_a_layout_without_attention_has_no_blocks(make_subject):
    base, adapter = make_subject(targets=["up_proj"])
    assert {part.kind for part in adapter_parts(load(adapter, base).layout)} == {
        "site",
        "projection",
        "layer",
    }


@pytest.mark.slow
def test_the_report_its_pictures_and_a_table_are_left_and_made_once(dirs, store, tmp_path, caplog):
    sae = dictionary(store.layout, each_column(store).W_enc, each_column(store).W_dec)
    with caplog.at_level(logging.INFO):
        first = ablated(dirs, store, tmp_path, sae)
    require_schema(tmp_path / "ablation.json", "ablation")
    for words in ("without, layers", "without, features", "removed one after the other"):
        assert words in caplog.text
    pictures = [(tmp_path / f"ablation{end}").read_bytes() for end in (".png", ".svg")]
    assert pictures[0][:8] == b"\x89PNG\r\n\x1a\n"
    assert ET.fromstring(pictures[1]).tag.endswith("svg")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ablated(dirs, store, tmp_path, sae)
    assert "already exists" in caplog.text
    again = ablated(dirs, store, tmp_path, sae, overwrite=True)
    assert json.dumps(again) == json.dumps(first)
    assert [(tmp_path / f"ablation{end}").read_bytes() for end in (".png", ".svg")] == pictures


def test_bad_choices_are_one_line(dirs, store, tmp_path):
    with pytest.raises(ConfigError, match=r"\.json"):
        AblateConfig(output=tmp_path / "report.html")
    with pytest.raises(ConfigError, match="--sae"):
        AblateConfig(features=(1,))
    for bad in ((-1,), (2, 2)):
        with pytest.raises(ConfigError, match="different numbers"):
            AblateConfig(features=bad, sae=tmp_path)
    with pytest.raises(ConfigError, match="the SAE has features 0 to 27"):
        ablated(dirs, store, tmp_path, each_column(store), features=(28,))
