"""Which rollouts are held out, how they are batched, and what must belong together."""

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.stores import planted_rows, write_published_store
from builders.studies import each_column, make_texts
from builders.subjects import N_TERMS
from builders.tolerance import assert_same_up_to_rounding, rounding

from lorascope.causal.effect_options import EffectOptions
from lorascope.causal.held_out import held_out_rollouts, open_held_out
from lorascope.errors import ArtifactError, ConfigError
from lorascope.sae.model import load_sae
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run as train
from lorascope.sites import PROJECTIONS
from lorascope.subject.intervene import RowEditor
from lorascope.texts.roles import ROLES


@pytest.fixture(scope="module")
def texts_dir(subject_dirs, dataset_file, tmp_path_factory):
    return make_texts(subject_dirs, dataset_file, tmp_path_factory.mktemp("texts") / "store")


def options(subject_dirs, texts_dir, **given):
    base, adapter = subject_dirs
    return EffectOptions(
        **{
            "lora_path": str(adapter),
            "base_model": str(base),
            "data_dir": texts_dir,
            "device": "cpu",
            **given,
        }
    )


def test_held_out_are_the_rollouts_that_the_training_reports_on(make_store, tmp_path):
    store = make_store(planted_rows(20 * 40), n_rollouts=20)
    out = train(
        TrainConfig(
            data_dir=store.path,
            output=tmp_path / "sae",
            expansion_factor=2,
            k=2,
            batch_size=64,
            epochs=1,
            holdout=0.3,
            device="cpu",
        )
    )
    sae = load_sae(out, store)
    rollouts = held_out_rollouts(sae, store)
    assert 2 <= len(rollouts) <= 4
    report = sae.manifest.content["report"]
    assert report["n_rows"] == 40 * len(rollouts)
    assert report["text"]["n_rows"] == 39 * len(rollouts)


def test_a_store_that_the_sae_was_not_trained_on_is_taken_whole_and_said(make_store, caplog):
    store = make_store()
    with caplog.at_level(logging.WARNING):
        rollouts = held_out_rollouts(each_column(store), store)
    assert rollouts.tolist() == list(range(store.n_rollouts))
    assert "was not trained on" in caplog.text


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_every_token_but_the_first_of_a_text_is_predicted_once(
    subject_dirs, texts_dir, batch_tokens
):
    held_out = open_held_out(options(subject_dirs, texts_dir, batch_tokens=batch_tokens), None)
    store, seen = held_out.store, []
    for batch in held_out.batches():
        assert batch.mask.shape == batch.token_ids.shape
        assert (batch.mask <= batch.own).all()
        assert batch.token_ids.numel() <= max(batch_tokens, batch.token_ids.shape[1])
        rows = batch.measured
        assert np.array_equal(store.token_ids[rows], batch.token_ids[batch.mask].numpy())
        assert np.array_equal(store.token_ids[rows + 1], batch.targets[batch.mask].numpy())
        assert np.array_equal(store.rollout_of(rows), store.rollout_of(rows + 1))
        seen.append(rows)
    everything = np.setdiff1d(np.arange(store.n_rows), store.rollout_start[1:] - 1)
    assert np.array_equal(np.sort(np.concatenate(seen)), everything)


@pytest.mark.slow
@torch.inference_mode()
def test_rollouts_read_in_windows_are_run_in_the_same_windows(subject_dirs, dataset_file, tmp_path):
    store_dir = make_texts(
        subject_dirs, dataset_file, tmp_path / "store", max_length=30, long_texts="window"
    )
    held_out = open_held_out(options(subject_dirs, store_dir), None)
    store, seen = held_out.store, []
    with RowEditor(held_out.subject) as editor:
        for batch in held_out.batches():
            assert batch.token_ids.shape[1] <= 30
            rows = editor.run(batch.token_ids).rows[batch.mask]
            stored = torch.from_numpy(np.array(store.take(batch.measured)))
            assert_same_up_to_rounding(rows, stored, n_terms=N_TERMS)
            seen.append(batch.measured)
    assert np.array_equal(
        np.sort(np.concatenate(seen)),
        np.setdiff1d(np.arange(store.n_rows), store.rollout_start[1:] - 1),
    )


def test_a_prediction_counts_under_the_role_of_the_token_that_is_predicted(subject_dirs, texts_dir):
    held_out = open_held_out(options(subject_dirs, texts_dir), None)
    rows = np.arange(held_out.store.n_rows - 1)
    roles = held_out.role_of(rows)
    assert np.array_equal(roles, held_out.store.roles[1:])  # special ones have that role here
    assert set(np.unique(roles)) >= {ROLES.index(name) for name in ("user", "think", "special")}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ROLES),
        ({"roles": list(ROLES)}, ROLES),
        ({"roles": ["think", "special"]}, ("think", "special")),
        ({"roles": []}, [role for role in ROLES if role != "special"]),  # of an older version
    ],
)
def test_an_sae_reads_the_rows_that_it_was_trained_on(subject_dirs, texts_dir, settings, expected):
    held_out = open_held_out(options(subject_dirs, texts_dir), None)
    sae = each_column(held_out.store)
    sae = replace(sae, manifest=replace(sae.manifest, settings=settings))
    store = held_out.store
    read = [ROLES[role] in expected for role in store.roles]
    assert held_out.is_read(sae, np.arange(store.n_rows)).tolist() == read


@torch.inference_mode()
def test_rows_of_another_model_are_an_error(subject_dirs, texts_dir):
    held_out = open_held_out(options(subject_dirs, texts_dir, max_rollouts=2), None)
    assert len(held_out.rollouts) == 2
    with RowEditor(held_out.subject) as editor:
        for batch in held_out.batches():
            rows = editor.run(batch.token_ids).rows
            assert held_out.require_rows(batch, rows) < rounding(N_TERMS)
            with pytest.raises(ArtifactError, match="made with another model"):
                held_out.require_rows(batch, 1.1 * rows)


def test_what_does_not_belong_together_is_one_line(subject_dirs, make_subject, texts_dir, tmp_path):
    base, _ = subject_dirs
    other = make_subject(seed=5)
    longer = make_subject(n_layers=3)
    cases = [
        (options((base, other[1]), texts_dir), ArtifactError, "has adapter"),
        (options((longer[0], longer[1]), texts_dir), ArtifactError, "another base model"),
        (options(subject_dirs, tmp_path / "none"), ArtifactError, "does not exist"),
    ]
    for config, kind, words in cases:
        with pytest.raises(kind, match=re.escape(words)) as caught:
            open_held_out(config, None)
        assert "\n" not in str(caught.value)
    for bad in ({"max_rollouts": 0}, {"batch_tokens": 0}):
        with pytest.raises(ConfigError):
            options(subject_dirs, texts_dir, **bad)


def test_a_folder_of_the_published_scripts_has_no_token_ids_to_run(subject_dirs, tmp_path):
    folder = write_published_store(tmp_path / "published", PROJECTIONS)
    with pytest.raises(ArtifactError, match="token ids"):
        open_held_out(options(subject_dirs, folder), None)
