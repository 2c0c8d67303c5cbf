"""What an SAE recovers of its adapter: where theory has an answer, and against another computation.

0 is the base model and 1 the adapter, exactly, where the dictionary writes nothing or everything.
"""

import itertools
import json
import logging

import numpy as np
import pytest
import torch
from builders.studies import ROUNDED, dictionary, each_column, make_texts, strengthen
from builders.subjects import N_TERMS, logits_of, reference
from builders.tolerance import assert_same_up_to_rounding, rounding
from transformers import AutoModelForCausalLM

from lorascope.activations.store import ActivationStore
from lorascope.causal.effect_options import EffectOptions
from lorascope.causal.effects import kl_divergence
from lorascope.causal.evaluate import EvaluateConfig, run
from lorascope.causal.held_out import open_held_out
from lorascope.causal.study import open_report
from lorascope.errors import ArtifactError, ConfigError
from lorascope.sae.metrics import evaluate
from lorascope.subject.intervene import RowEditor
from lorascope.texts.roles import ROLES


@pytest.fixture(scope="module")
def subject_dirs(make_subject, tmp_path_factory):
    return strengthen(make_subject(), tmp_path_factory.mktemp("strong"))


@pytest.fixture(scope="module")
def store(subject_dirs, dataset_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "store"
    return ActivationStore.open(make_texts(subject_dirs, dataset_file, folder))


@pytest.fixture
def report_of(subject_dirs, store, tmp_path):
    """Return a function that saves an SAE, evaluates it and returns the report."""
    base, adapter = subject_dirs

    def evaluated(sae, name="sae", **given):
        sae.save(tmp_path / name)
        out = run(
            EvaluateConfig(
                lora_path=str(adapter),
                base_model=str(base),
                data_dir=store.path,
                sae=tmp_path / name,
                output=tmp_path / f"{name}.json",
                device="cpu",
                **given,
            )
        )
        return open_report(out)

    return evaluated


def test_a_dictionary_that_rebuilds_every_row_recovers_everything(store, report_of):
    found = report_of(each_column(store))["faithfulness"]
    assert found["runs"]["sae"]["recovered"] == pytest.approx(1, abs=ROUNDED)
    assert found["runs"]["sae"]["recovered_interval"] == pytest.approx([1, 1], abs=ROUNDED)
    assert found["runs"]["sae"]["ce_recovered"] == pytest.approx(1, abs=1e-4)
    for kind in ("roles", "layers", "projections"):
        assert found[kind]
        for part in found[kind].values():
            assert part["recovered"] == pytest.approx(1, abs=ROUNDED)


def test_with_all_features_removed_it_is_the_base_model_exactly(store, report_of):
    """No latent reaches the threshold, so that every row written is zero."""
    found = report_of(each_column(store, threshold=1e9))["faithfulness"]
    runs = found["runs"]
    assert runs["sae"]["recovered"] == runs["zero"]["recovered"] == runs["base"]["recovered"] == 0.0
    assert runs["sae"]["kl"] == runs["base"]["kl"] > 0
    assert runs["sae"]["ce"] == runs["base"]["ce"]
    for part in [*found["layers"].values(), *found["roles"].values()]:
        assert part["recovered"] == 0.0


def test_rows_written_as_they_are_have_a_floor_of_exactly_zero(store, report_of):
    found = report_of(each_column(store))["faithfulness"]
    assert found["floor"]["null"] == 0.0
    assert abs(found["floor"]["rounding"]) < ROUNDED * found["runs"]["base"]["kl"]
    assert found["runs"]["adapter"]["recovered"] == 1.0
    assert found["rows_drift"] < rounding(N_TERMS)


def half(store):
    """An SAE that writes half of every row."""
    sae = each_column(store)
    return dictionary(store.layout, sae.W_enc, sae.W_dec / 2)


@torch.inference_mode()
def test_the_numbers_are_those_of_scaled_lora_weights_run_by_hand(subject_dirs, store, report_of):
    """Writing half of each row that the adapter has is no model's weights; text by text it is
    the base with `scale·B·h/2` added, computed here by hooks on whole layers."""
    base_dir, adapter_dir = subject_dirs
    found = report_of(half(store))["faithfulness"]
    model = reference(adapter_dir, base_dir)
    bare = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    sites = store.layout.sites
    totals = {"sae": 0.0, "base": 0.0}
    n = 0
    for i in range(store.n_rollouts):
        first, last = store.rollout_start[i : i + 2]
        ids = torch.from_numpy(store.token_ids[first:last].astype(np.int64))[None]
        rows = torch.from_numpy(np.array(store.rows(first, last)))
        full = logits_of(model, ids)[0].double().log_softmax(-1)
        handles = []
        for c, site in enumerate(sites):
            layer = model.get_submodule("base_model.model." + site.module)
            write = site.scale * rows[:, c : c + 1] @ layer.lora_B["default"].weight.T / 2
            plain = bare.get_submodule(site.module)
            handles.append(plain.register_forward_hook(lambda m, a, out, write=write: out + write))
        halved = logits_of(bare, ids)[0].double().log_softmax(-1)
        for handle in handles:
            handle.remove()
        off = logits_of(bare, ids)[0].double().log_softmax(-1)
        following = np.arange(first + 1, last)
        usual = store.eligible[following] & (store.roles[following] != ROLES.index("special"))
        for name, other in (("sae", halved), ("base", off)):
            kl = (full.exp() * (full - other)).sum(-1)[:-1]
            totals[name] += float(kl[torch.from_numpy(usual)].sum())
        n += int(usual.sum())
    assert found["n_tokens"] == n
    assert found["runs"]["sae"]["kl"] == pytest.approx(totals["sae"] / n, rel=1e-3)
    assert found["runs"]["base"]["kl"] == pytest.approx(totals["base"] / n, rel=1e-3)
    assert found["runs"]["sae"]["recovered"] == pytest.approx(
        1 - totals["sae"] / totals["base"], abs=1e-3
    )


@pytest.mark.slow
def test_the_batch_changes_numbers_by_rounding_only(store, report_of):
    one = report_of(half(store), "one", batch_tokens=1)["faithfulness"]
    many = report_of(half(store), "many", batch_tokens=4096)["faithfulness"]
    assert one["n_tokens"] == many["n_tokens"]
    for name, run_ in one["runs"].items():
        for key in ("kl", "recovered", "ce"):
            assert run_[key] == pytest.approx(many["runs"][name][key], rel=1e-3, abs=ROUNDED)


@torch.inference_mode()
def test_with_special_kept_only_rows_of_text_are_rebuilt(subject_dirs, store, report_of):
    """A dictionary that writes nothing: text by text, rows are zero but at special tokens."""
    run_ = report_of(each_column(store, threshold=1e9))["faithfulness"]["runs"]["sae"]
    base, adapter = subject_dirs
    options = EffectOptions(lora_path=str(adapter), base_model=str(base), data_dir=store.path)
    held_out, total, n = open_held_out(options, None), 0.0, 0
    with RowEditor(held_out.subject) as editor:
        for start, stop in itertools.pairwise(store.rollout_start):
            ids = torch.from_numpy(store.token_ids[start:stop].astype(np.int64))[None]
            special = torch.from_numpy(~store.eligible[start:stop])[None, :, None]
            out = editor.run(ids)
            rows = out.rows * special
            other = editor.run(ids, lambda columns, _, rows=rows: rows[..., columns]).logits
            kl = kl_divergence(out.logits[0, :-1], other[0, :-1])
            usual = torch.from_numpy(store.eligible[start + 1 : stop])
            total, n = total + float(kl[usual].sum()), n + int(usual.sum())
    assert run_["special_kept"]["kl"] == pytest.approx(total / n, rel=1e-3)
    assert 0.01 < run_["special_kept"]["recovered"] < 1
    assert run_["recovered"] == 0.0


def test_the_baselines_keep_as_many_numbers_as_the_sae(store):
    from lorascope.causal.baselines import baselines

    sae = each_column(store)
    rows = torch.from_numpy(np.array(store.rows(0, store.n_rows)))
    made = {k: baselines(sae, rows, k, seed=0) for k in (1.0, 3.4, store.d_in)}
    mean = rows.mean(0)
    assert torch.equal(made[1.0]["mean"](rows), mean.expand_as(rows))
    kept = made[3.4]["columns"](rows)
    assert ((kept != mean).sum(1) <= 3).all()
    changed = kept != mean.expand_as(kept)
    assert_same_up_to_rounding(kept[changed], rows[changed], n_terms=store.d_in * len(rows))
    assert torch.linalg.matrix_rank(made[3.4]["pca"](rows) - mean, rtol=1e-4) == 3
    loss = {
        (k, name): float((rows - arm(rows)).square().sum())
        for k, arms in made.items()
        for name, arm in arms.items()
    }
    for name in ("pca", "columns", "random"):
        assert loss[3.4, name] < loss[1.0, name] < loss[1.0, "mean"]
    for name in ("pca", "columns"):  # with all columns nothing is lost
        assert loss[store.d_in, name] < 1e-8 * loss[1.0, "mean"]


def test_reconstruction_is_what_training_reports_and_other_saes_are_compared(
    store, report_of, tmp_path
):
    half(store).save(tmp_path / "seed-1")
    report = report_of(each_column(store), against=(tmp_path / "seed-1",))
    rows = torch.from_numpy(np.array(store.rows(0, store.n_rows)))
    assert report["reconstruction"]["n_rows"] == len(rows)
    assert report["reconstruction"]["l0"] == evaluate(each_column(store), [rows])["l0"]
    other = report_of(half(store), "alone")["faithfulness"]["runs"]["sae"]
    against = report["faithfulness"]["runs"]["against seed-1"]
    assert against["recovered"] == pytest.approx(other["recovered"], abs=ROUNDED)


@pytest.mark.slow
def test_an_sae_of_some_columns_is_measured_against_those_at_zero(store, report_of):
    narrow = store.select(("gate_proj", "up_proj", "down_proj"))
    found = report_of(each_column(narrow), "perfect")["faithfulness"]
    assert found["zero_is"] == "the SAE's columns at zero"
    assert found["runs"]["sae"]["recovered"] == pytest.approx(1, abs=ROUNDED)
    off = report_of(each_column(narrow, threshold=1e9), "off")["faithfulness"]["runs"]
    assert off["sae"]["recovered"] == off["zero"]["recovered"] == 0.0
    assert off["base"]["kl"] != off["zero"]["kl"]  # the other columns are still there
    assert set(found["projections"]) == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.slow
def test_an_adapter_that_does_nothing_has_no_share_to_recover(subject_dirs, dataset_file, tmp_path):
    from builders.subjects import save_adapter

    def untrained(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()

    base, adapter = subject_dirs[0], tmp_path / "adapter"
    save_adapter(base, adapter, change=untrained, r=1)
    texts = ActivationStore.open(make_texts((base, adapter), dataset_file, tmp_path / "store"))
    each_column(texts, threshold=0.5).save(tmp_path / "sae")
    out = run(
        EvaluateConfig(
            lora_path=str(adapter),
            base_model=str(base),
            data_dir=texts.path,
            sae=tmp_path / "sae",
            output=tmp_path / "report.json",
            device="cpu",
        )
    )
    found = open_report(out)["faithfulness"]
    for run_ in found["runs"].values():
        assert run_["kl"] == 0.0
        assert run_["recovered"] is None
        assert run_["recovered_interval"] is None
    assert all(part["kl_zero"] == 0.0 for part in found["layers"].values())
    assert (tmp_path / "report.png").exists()


def test_the_report_a_picture_and_a_table_are_left_and_made_once(
    store, report_of, tmp_path, caplog
):
    with caplog.at_level(logging.INFO):
        first = report_of(half(store))
    assert "recovered: 0 is the base model" in caplog.text
    assert "by predicted role" in caplog.text
    picture = (tmp_path / "sae.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        report_of(half(store))
    assert "already exists" in caplog.text
    again = report_of(half(store), overwrite=True)
    assert json.dumps(again) == json.dumps(first)
    assert (tmp_path / "sae.png").read_bytes() == picture
    with pytest.raises(ArtifactError, match="other settings"):
        report_of(half(store), seed=1)


def test_bad_input_is_one_line(store, report_of, tmp_path):
    with pytest.raises(ConfigError, match=r"\.json"):
        EvaluateConfig(output=tmp_path / "report.html")
    for folder in ("a", "b"):
        half(store).save(tmp_path / folder / "sae")
    same = (tmp_path / "a" / "sae", tmp_path / "b" / "sae")
    with pytest.raises(ConfigError, match="--against"):
        report_of(half(store), against=same)
    narrow = each_column(store.select(("gate_proj",)))
    narrow.save(tmp_path / "narrow")
    with pytest.raises(ArtifactError, match="d_in"):
        report_of(half(store), "wide", against=(tmp_path / "narrow",))
