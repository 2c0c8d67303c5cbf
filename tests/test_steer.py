"""Steering: doses mean what they say, dose 0 is no change, and the report is made once."""

import pytest
import torch
from builders.schemas import require_schema
from builders.studies import dictionary, make_texts, strengthen

from lorascope.activations.store import ActivationStore
from lorascope.causal.steer import SteerConfig, count_repeats, run
from lorascope.causal.study import open_report
from lorascope.cli import call
from lorascope.errors import ConfigError, DatasetError


@pytest.fixture(scope="module")
def dirs(make_subject, tmp_path_factory):
    return strengthen(make_subject(), tmp_path_factory.mktemp("strong"), 3.0)


@pytest.fixture(scope="module")
def store(dirs, dataset_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "store"
    return ActivationStore.open(make_texts(dirs, dataset_file, folder, num_examples=4))


@pytest.fixture(scope="module")
def sae(store):
    """Latent 0 is column 3 above its median, latent 1 never fires, latent 2 is column 5."""
    rows = torch.zeros(3, store.d_in)
    rows[0, 3], rows[1, 4], rows[2, 5] = 1, 1, 1
    x = torch.from_numpy(store.rows(0, store.n_rows).astype("float32"))[store.eligible]
    made = dictionary(store.layout, rows.T.contiguous(), rows.clone())
    made.threshold[:] = torch.tensor([float(x[:, 3].quantile(0.5)), 1e9, 0.0])
    return made.sealed()


@pytest.fixture
def steered(dirs, store, sae, tmp_path):
    def made(name="steering", **given):
        base, adapter = dirs
        if not (tmp_path / "sae").exists():
            sae.save(tmp_path / "sae")
        given = {"num_prompts": 3, "max_new_tokens": 6, "features": (0,), "doses": (1.0,), **given}
        return run(
            SteerConfig(
                lora_path=str(adapter),
                base_model=str(base),
                data_dir=store.path,
                sae=tmp_path / "sae",
                output=tmp_path / f"{name}.json",
                device="cpu",
                **given,
            )
        )

    return made


@pytest.mark.slow
def test_the_first_arm_is_no_change_and_doses_move_away_from_it(steered, store, sae):
    data = open_report(steered(doses=(0.0, 0.5, 4.0)))
    arms = data["arms"]
    assert [(a["kind"], a["dose"]) for a in arms] == [
        ("none", 0), ("feature", 0.5), ("control", 0.5), ("feature", 4), ("control", 4),
    ]  # fmt: skip
    assert arms[0]["kl"] == 0 and arms[0]["differ"] == 0
    assert 0 < arms[1]["kl"] < arms[3]["kl"]
    x = torch.from_numpy(store.rows(0, store.n_rows).astype("float32"))[store.eligible]
    assert data["unit"]["0"] == pytest.approx(float(sae.encode_dense(x)[:, 0].max()), rel=1e-3)
    assert [p["rollout"] for p in data["prompts"]] == store.rollout_id[:3].tolist()


@pytest.mark.slow
def test_texts_do_not_depend_on_which_prompts_and_doses_share_a_batch(steered):
    given = {"temperature": 1.0, "samples": 2, "doses": (1.0, 4.0)}
    found = [
        open_report(steered(f"of-{tokens}", batch_tokens=tokens, **given))["arms"]
        for tokens in (1, 400, 100_000)  # one condition at a time; some; all prompts at once
    ]
    texts = [[[one["token_ids"] for one in arm["texts"]] for arm in arms] for arms in found]
    assert texts[0] == texts[1] == texts[2]
    assert all(len(arm) == 6 for arm in texts[0])


@pytest.mark.slow
def test_a_feature_that_never_fires_does_nothing_in_any_dose(steered):
    for how in ("add", "remove", "clamp"):
        data = open_report(steered(how, features=(1,), how=how, doses=(1.0, 8.0)))
        for arm in data["arms"]:
            assert arm["kl"] == 0 and arm["differ"] == 0


@pytest.mark.slow
def test_removing_once_takes_the_value_out_and_clamping_below_it_does_nothing(steered):
    """A dose of 1 of two features that are whole columns: nothing of the columns is left."""
    removed = open_report(steered("removed", features=(0, 2), how="remove", where="all"))
    assert removed["arms"][1]["kl"] > 0
    clamped = open_report(steered("clamped", how="clamp", doses=(1e-9, 2.0)))
    assert clamped["arms"][1]["kl"] < 1e-6
    assert clamped["arms"][3]["kl"] > clamped["arms"][1]["kl"]


def test_own_prompts_are_continued(steered, dataset_file):
    out = steered(prompts=str(dataset_file), num_prompts=2)
    require_schema(out, "steering")
    data = open_report(out)
    assert [p["rollout"] for p in data["prompts"]] == [None, None]
    assert all(p["text"] for p in data["prompts"])


def test_repeats_are_runs_of_four_that_were_there_before():
    assert count_repeats(torch.tensor([1, 2, 3, 4, 1, 2, 3, 4, 1]).numpy()) == (2, 6)
    assert count_repeats(torch.tensor([1, 2, 3]).numpy()) == (0, 0)


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes_and_a_picture(steered):
    out = steered(temperature=1.0, samples=2)
    first, picture = out.read_bytes(), out.with_suffix(".png").read_bytes()
    assert steered(temperature=1.0, samples=2) == out
    out.unlink()
    assert steered(temperature=1.0, samples=2).read_bytes() == first
    assert out.with_suffix(".png").read_bytes() == picture
    assert call(["verify", str(out)]) == 0


def test_a_prompt_that_fills_the_context_is_one_line(steered, tmp_path):
    """Learned positions end there, and others were trained no further."""
    file = tmp_path / "long.txt"
    file.write_text("word " * 900)
    with pytest.raises(DatasetError, match=r"prompt 0 of .* no room in the model's context of 512"):
        steered(prompts=str(file))


def test_impossible_requests_are_one_line(steered, tmp_path):
    for given, words in (
        ({"features": ()}, "names no feature"),
        ({"features": (99,)}, "has features 0 to 2"),
        ({"doses": (float("nan"),)}, "finite"),
        ({"samples": 2}, "--samples above 1"),
        ({"num_prompts": 0}, "--num-prompts is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            steered(**given)
    assert not (tmp_path / "steering.json").exists()
