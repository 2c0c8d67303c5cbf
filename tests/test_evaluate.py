"""What an SAE recovers of its adapter: where theory has an answer, and against another computation.

0 is the base model and 1 the adapter, exactly, where the dictionary writes nothing or everything.
"""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.schemas import require_schema
from builders.studies import ROUNDED, dictionary, each_column, make_texts, strengthen
from builders.subjects import N_TERMS, logits_of, reference
from builders.tolerance import assert_same_up_to_rounding, rounding
from transformers import AutoModelForCausalLM

from lorascope.activations.store import ActivationStore
from lorascope.causal import baselines
from lorascope.causal.effect_options import EffectOptions
from lorascope.causal.effects import kl_divergence
from lorascope.causal.evaluate import EvaluateConfig, run
from lorascope.causal.held_out import held_out_rollouts, open_held_out
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
        require_schema(out, "evaluation")
        return open_report(out)

    return evaluated


def test_reports_of_older_versions_without_a_curve_are_those_of_the_same_settings():
    assert EvaluateConfig(lora_path="a", sae=Path("s")).settings()["curve"] == []


def test_a_dictionary_that_rebuilds_every_row_recovers_everything(store, report_of):
    found = report_of(each_column(store), by_site=True)["faithfulness"]
    for name in ("sae", "sae closed"):
        run_ = found["runs"][name]
        for over in (run_, run_["generated"]):
            assert over["recovered"] == pytest.approx(1, abs=ROUNDED)
            assert over["conditional"] == pytest.approx(1, abs=ROUNDED)
    assert found["closed_change"] < rounding(N_TERMS), "the passes settle at once"
    for over in (found["runs"]["sae"], found["runs"]["sae"]["generated"]):
        assert over["recovered_interval"] == pytest.approx([1, 1], abs=ROUNDED)
        assert over["ce_recovered"] == pytest.approx(1, abs=1e-4)
    for kind in ("roles", "layers", "projections"):
        assert found[kind]
        for part in found[kind].values():
            assert part["recovered"] == pytest.approx(1, abs=ROUNDED)


def test_with_all_features_removed_it_is_the_base_model_exactly(store, report_of):
    """No latent reaches the threshold, so that every row written is zero."""
    found = report_of(each_column(store, threshold=1e9), by_site=True)["faithfulness"]
    runs = found["runs"]
    assert runs["sae"]["recovered"] == runs["base"]["recovered"] == 0.0
    closed = runs["sae closed"] | {"l0": runs["sae"]["l0"]}
    assert closed == runs["sae"], "what it writes does not depend on what it reads"
    assert runs["constant"]["conditional"] == 0.0
    assert "zero" not in runs, "for plain LoRA it is the base model"
    assert runs["sae"]["kl"] == runs["base"]["kl"] > 0
    assert runs["sae"]["ce"] == runs["base"]["ce"]
    for part in [*found["layers"].values(), *found["roles"].values()]:
        assert part["recovered"] == 0.0


@pytest.mark.slow
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


def check_shifts(shifts, model, bare, store):
    """The probabilities of examples are those of the two models; shares are of all KL."""
    assert 0 < sum(one["share"] for one in shifts) <= 1 + 1e-6
    assert [one["share"] for one in shifts] == sorted((s["share"] for s in shifts), reverse=True)
    for one in shifts[:5]:
        row = one["example"]["row"]
        rollout = int(store.rollout_of(np.array([row]))[0])
        first = int(store.rollout_start[rollout])
        assert one["example"]["position"] == row - first
        assert one["role"] == ROLES[store.roles[row + 1]]
        ids = torch.from_numpy(store.token_ids[first : row + 1].astype(np.int64))[None]
        for side, network in (("p_adapter", model), ("p_base", bare)):
            p = logits_of(network, ids)[0, -1].double().softmax(-1)[one["token_id"]]
            assert one["example"][side] == pytest.approx(float(p), rel=1e-3, abs=1e-6)
        rises = one["example"]["p_adapter"] > one["example"]["p_base"]
        assert one["side"] == ("rises" if rises else "falls")


@torch.inference_mode()
def check_openings(openings, held, model, bare, store):
    """Each is the product of the probabilities of the tokens from the last tag to the segment."""
    text = [store.vocabulary[i].decode(errors="replace") for i in range(len(store.vocabulary))]
    found = {"think": [], "answer": []}
    for i in held:
        first, last = store.rollout_start[i : i + 2]
        ids = torch.from_numpy(store.token_ids[first:last].astype(np.int64))[None]
        roles = [ROLES[role] for role in store.roles[first:last]]
        log_p = [logits_of(network, ids)[0].double().log_softmax(-1) for network in (bare, model)]
        for role, at in ((role, at) for at, role in enumerate(roles) if role in found):
            start = at
            while roles[start - 1] == "special" and text[ids[0, start]] != "<|im_start|>":
                start -= 1
            if start < at and "assistant" not in [text[j] for j in ids[0, start:at]]:
                p = [sum(one[j - 1, ids[0, j]] for j in range(start, at)).exp() for one in log_p]
                found[role].append(p)
    assert [one["role"] for one in openings] == [role for role in found if found[role]]
    for one in openings:
        assert one["n"] == len(found[one["role"]])
        mean = np.mean(found[one["role"]], axis=0)
        assert [one["p_base"], one["p_adapter"]] == pytest.approx(mean, rel=1e-3)


@torch.inference_mode()
def test_the_numbers_are_those_of_scaled_lora_weights_run_by_hand(subject_dirs, store, report_of):
    """Writing half of each row that the adapter has is no model's weights; text by text it is
    the base with `scale·B·h/2` added, computed here by hooks on whole layers."""
    base_dir, adapter_dir = subject_dirs
    report = report_of(half(store))
    found = report["faithfulness"]
    model = reference(adapter_dir, base_dir)
    bare = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    sites = store.layout.sites
    totals = {"sae": np.zeros(2), "base": np.zeros(2)}  # all predicted tokens, generated ones
    n = np.zeros(2, int)
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
        wanted = [ROLES.index("think"), ROLES.index("answer")]
        written = np.isin(store.roles[following], wanted)
        for name, other in (("sae", halved), ("base", off)):
            kl = (full.exp() * (full - other)).sum(-1)[:-1].numpy()
            totals[name] += [kl.sum(), kl[written].sum()]
        n += [len(written), written.sum()]
    assert [found["n_tokens"], found["n_generated"]] == n.tolist()
    check_shifts(report["shifts"], model, bare, store)
    check_openings(report["openings"], range(store.n_rollouts), model, bare, store)
    expected = {name: total / n for name, total in totals.items()}
    for name, run_ in found["runs"].items():
        if name in totals:
            shares = 1 - totals[name] / totals["base"]
            for over, kl, share in zip(
                (run_, run_["generated"]), expected[name], shares, strict=True
            ):
                assert over["kl"] == pytest.approx(kl, rel=1e-3)
                assert over["recovered"] == pytest.approx(share, abs=1e-3)


@torch.inference_mode()
def test_the_closed_loop_writes_what_it_makes_of_the_rows_of_the_pass_before(
    subject_dirs, store, report_of
):
    found = report_of(half(store))["faithfulness"]
    base, adapter = subject_dirs
    options = EffectOptions(lora_path=str(adapter), base_model=str(base), data_dir=store.path)
    total, n, step, size = 0.0, 0, 0.0, 0.0
    subject = open_held_out(options, None).subject
    with RowEditor(subject) as editor:
        for start, stop in itertools.pairwise(store.rollout_start):
            ids = torch.from_numpy(store.token_ids[start:stop].astype(np.int64))[None]
            first = out = editor.run(ids)
            for _ in range(found["closed_passes"]):
                before = out.rows
                out = editor.run(ids, lambda columns, _, rows=before / 2: rows[..., columns])
            kl = kl_divergence(first.logits[0, :-1], out.logits[0, :-1])
            total, n = total + float(kl.sum()), n + len(kl)
            step += float((out.rows - before).square().sum())
            size += float(before.square().sum())
    assert found["runs"]["sae closed"]["kl"] == pytest.approx(total / n, rel=1e-3)
    assert found["runs"]["sae closed"]["kl"] != found["runs"]["sae"]["kl"]
    assert found["closed_change"] == pytest.approx((step / size) ** 0.5, rel=1e-3)


@pytest.mark.slow
def test_the_batch_changes_numbers_by_rounding_only(store, report_of):
    one = report_of(half(store), "one", batch_tokens=1)["faithfulness"]
    many = report_of(half(store), "many", batch_tokens=4096)["faithfulness"]
    assert one["n_tokens"] == many["n_tokens"]
    for name, run_ in one["runs"].items():
        for key in ("kl", "recovered", "ce"):
            assert run_[key] == pytest.approx(many["runs"][name][key], rel=1e-3, abs=ROUNDED)


@pytest.mark.slow
def test_where_every_place_has_one_row_the_constant_row_recovers_everything(subject_dirs, tmp_path):
    """Six times the same text, of one token a role: the adapter writes a constant."""
    said = [("system", "c"), ("user", "a"), ("assistant", "b")]
    record = {"messages": [{"role": role, "content": text} for role, text in said]}
    dataset = tmp_path / "same.jsonl"
    dataset.write_text(6 * (json.dumps(record) + "\n"))
    texts = ActivationStore.open(
        make_texts(subject_dirs, dataset, tmp_path / "same", template="chat", duplicates="keep")
    )
    place, _ = baselines._places(texts)
    first, second = texts.rollout_start[:2]
    assert len(set(place[first:second])) == second - first, "one token for each place"
    half(texts).save(tmp_path / "sae")
    base, adapter = subject_dirs
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
    runs = open_report(out)["faithfulness"]["runs"]
    for name in ("constant", "pca", "columns", "random"):
        assert runs[name]["recovered"] == pytest.approx(1, abs=ROUNDED)
    assert runs["base"]["kl"] > 0


def test_places_are_roles_and_positions_in_headers(store):
    place, role_of_place = baselines._places(store)
    special = ROLES.index("special")
    role = store.roles
    assert (role_of_place[place] == role).all()
    for text_role in set(role.tolist()) - {special}:
        assert len(set(place[role == text_role])) == 1
    first, second = store.rollout_start[:2]
    other = store.rollout_start[1]
    n = int(np.argmax(role[first:second] != special))  # the header at the beginning
    assert len(set(place[first : first + n])) == n > 1
    assert (place[first : first + n] == place[other : other + n]).all()


def test_the_constant_row_is_the_mean_of_its_place_or_of_its_role_where_that_is_rare(store):
    everything = np.arange(store.n_rows)
    rows = torch.from_numpy(np.array(store.rows(0, store.n_rows)))
    place, role_of_place = baselines._places(store)
    found = baselines.ConstantRows(store, everything, rows).at(everything)
    for i in np.unique(place):
        here = torch.from_numpy(place == i)
        if int(here.sum()) < baselines._FEWEST:
            here = torch.from_numpy(role_of_place[place] == role_of_place[i])
        expected = rows[here].double().mean(0)
        assert_same_up_to_rounding(
            found[int(np.flatnonzero(place == i)[0])],
            expected,
            n_terms=2,
            scale=float(rows[here].abs().max()),
        )


def test_the_baselines_keep_as_many_numbers_as_the_sae(store):
    sae = each_column(store)
    rows = torch.from_numpy(np.array(store.rows(0, store.n_rows)))
    everything = np.arange(store.n_rows)
    mean = baselines.ConstantRows(store, everything, rows).at(everything)
    made = {k: baselines.baselines(sae, rows, mean, k, seed=0) for k in (1, 3, store.d_in)}
    assert torch.equal(made[1]["constant"].rows(rows, mean), mean)
    kept = made[3]["columns"].rows(rows, mean)
    assert ((kept != mean).sum(1) <= 3).all()
    changed = kept != mean
    assert_same_up_to_rounding(kept[changed], rows[changed], n_terms=store.d_in * len(rows))
    assert torch.linalg.matrix_rank(made[3]["pca"].rows(rows, mean) - mean, rtol=1e-4) == 3
    loss = {
        (k, name): float((rows - arm.rows(rows, mean)).square().sum())
        for k, arms in made.items()
        for name, arm in arms.items()
    }
    for name in ("pca", "columns", "random"):
        assert loss[3, name] < loss[1, name] < loss[1, "constant"]
    for name in ("pca", "columns"):  # with all columns nothing is lost
        assert loss[store.d_in, name] < 1e-8 * loss[1, "constant"]


@pytest.mark.slow
def test_every_subset_of_the_sites_recovers_all_with_an_exact_dictionary_and_nothing_without_one(
    store, report_of
):
    exact = report_of(each_column(store), "exact", subsets=2)["faithfulness"]["subsets"]
    nothing = report_of(each_column(store, threshold=1e9), "nothing", subsets=2)
    for one in exact:
        assert one["recovered"] == pytest.approx(1, abs=ROUNDED)
    for one in nothing["faithfulness"]["subsets"]:
        assert one["recovered"] == 0.0
        assert one["kl"] == one["kl_zero"] > 0
    assert [one["how"] for one in exact] == ["drawn", "drawn", "worst"]


@pytest.mark.slow
def test_the_worst_subset_loses_more_than_the_whole_and_its_kl_is_that_of_its_sites(
    subject_dirs, store, report_of
):
    """The same error at all sites but two, which have the opposite one: they make up for it."""
    factor = torch.full((store.d_in,), 1.5)
    factor[[3, 7]] = 0.5
    sae = each_column(store)
    sae = dictionary(store.layout, sae.W_enc, sae.W_dec * factor)
    found = report_of(sae, subsets=6)["faithfulness"]
    worst = found["subsets"][-1]
    assert worst["how"] == "worst"
    assert worst["kl"] >= found["runs"]["sae"]["generated"]["kl"] * (1 - 1e-3)
    assert worst["kl"] >= max(one["kl"] for one in found["subsets"][:-1]) * 0.5
    base, adapter = subject_dirs
    options = EffectOptions(lora_path=str(adapter), base_model=str(base), data_dir=store.path)
    held_out, total, n = open_held_out(options, None), 0.0, 0
    inside = torch.tensor([site.name in worst["sites"] for site in store.layout.sites])
    assert 0 < int(inside.sum()) <= store.d_in
    with torch.inference_mode(), RowEditor(held_out.subject) as editor:
        for start, stop in itertools.pairwise(store.rollout_start):
            ids = torch.from_numpy(store.token_ids[start:stop].astype(np.int64))[None]
            out = editor.run(ids)
            rows = torch.where(inside, out.rows * factor, out.rows)
            other = editor.run(ids, lambda columns, _, rows=rows: rows[..., columns])
            kl = kl_divergence(out.logits[0, :-1], other.logits[0, :-1])
            counts = torch.from_numpy(held_out.is_generated(np.arange(start, stop - 1)))
            total, n = total + float(kl[counts].sum()), n + int(counts.sum())
    assert worst["kl"] == pytest.approx(total / n, rel=1e-3)


@pytest.mark.slow
def test_saes_that_differ_in_their_seed_only_are_named_together(store, report_of, tmp_path):
    def trained(seed, **other):
        sae = half(store)
        settings = {"seed": seed, "k": 3, **other}
        return dictionary(store.layout, sae.W_enc, sae.W_dec, settings=settings)

    trained(1).save(tmp_path / "one")
    trained(1, k=4).save(tmp_path / "other")
    against = (tmp_path / "one", tmp_path / "other")
    found = report_of(trained(0), against=against)["faithfulness"]
    assert found["seeds"] == ["sae", "against one"]


@pytest.mark.slow
def test_an_sae_that_was_trained_on_what_is_measured_is_warned_of(
    store, report_of, tmp_path, caplog
):
    def split(seed):
        settings = {"holdout": 0.5, "data_seed": seed, "seed": seed}
        sae = half(store)
        parents = {"activations": store.digest}
        return dictionary(store.layout, sae.W_enc, sae.W_dec, settings=settings, parents=parents)

    mine = held_out_rollouts(split(0), store)
    seed = next(s for s in range(1, 9) if set(held_out_rollouts(split(s), store)) != set(mine))
    split(seed).save(tmp_path / "other")
    with caplog.at_level(logging.WARNING):
        report_of(split(0), against=(tmp_path / "other",))
    assert "against other did not hold out" in caplog.text


@pytest.mark.slow
def test_reconstruction_is_of_all_rows_and_other_saes_are_compared(store, report_of, tmp_path):
    half(store).save(tmp_path / "seed-1")
    report = report_of(each_column(store), against=(tmp_path / "seed-1",))
    rows = torch.from_numpy(np.array(store.rows(0, store.n_rows)))
    assert report["reconstruction"]["n_rows"] == store.n_rows
    assert report["reconstruction"]["l0"] == evaluate(each_column(store), [rows])["l0"]
    other = report_of(half(store), "alone")["faithfulness"]["runs"]["sae"]
    against = report["faithfulness"]["runs"]["against seed-1"]
    assert against["recovered"] == pytest.approx(other["recovered"], abs=ROUNDED)


@pytest.mark.slow
def test_an_sae_of_some_columns_is_measured_against_those_at_zero(store, report_of):
    narrow = store.select(("gate_proj", "up_proj", "down_proj"))
    found = report_of(each_column(narrow), "perfect", by_site=True)["faithfulness"]
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
            by_site=True,
            device="cpu",
        )
    )
    report = open_report(out)
    assert "shifts" not in report
    found = report["faithfulness"]
    for run_ in found["runs"].values():
        assert run_["kl"] == 0.0
        assert run_["recovered"] is None
        assert run_["recovered_interval"] is None
    assert all(part["kl_zero"] == 0.0 for part in found["layers"].values())
    assert (tmp_path / "report.png").exists()


@pytest.mark.slow
def test_the_report_a_picture_and_a_table_are_left_and_made_once(
    store, report_of, tmp_path, caplog
):
    with caplog.at_level(logging.INFO):
        first = report_of(half(store))
    assert "recovered: 0 is the base model" in caplog.text
    assert "is constant (the mean row" in caplog.text
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
