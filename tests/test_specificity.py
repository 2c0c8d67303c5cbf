"""Estimated effects and verdicts: against real removals, and where the truth is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.studies import each_column, make_texts, strengthen
from builders.subjects import load

from lorascope.activations.store import ActivationStore
from lorascope.causal import specificity
from lorascope.causal.held_out import HeldOut
from lorascope.causal.removals import run_held
from lorascope.causal.specificity import Specificity, judge
from lorascope.subject.intervene import RowEditor
from lorascope.texts.roles import SPECIAL


@pytest.fixture(scope="module")
def dirs(make_subject, tmp_path_factory):
    return strengthen(make_subject(), tmp_path_factory.mktemp("strong"))


@pytest.fixture(scope="module")
def held_out(dirs, dataset_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "store"
    store = ActivationStore.open(make_texts(dirs, dataset_file, folder, num_examples=3))
    return HeldOut(load(dirs[1], dirs[0]), store, np.arange(store.n_rollouts), 2048)


def studied(held_out, sae, passes=None, monkeypatch=None):
    """Return the sums over all rollouts."""
    if passes is not None:
        monkeypatch.setattr(specificity, "_PASSES", passes)
    with torch.no_grad(), RowEditor(held_out.subject, fast=True) as editor:
        found = Specificity(editor, held_out, sae, 0)
        found.run()
    return found


def with_directions(sae, directions, rows=slice(None)):
    """Return an SAE whose latents fire as before and write other directions."""
    W_dec = sae.W_dec.clone()
    W_dec[rows] = directions
    return replace(sae, W_dec=W_dec).sealed()


@pytest.mark.slow
def test_estimates_of_small_removals_are_the_real_kl(held_out, monkeypatch):
    sae = each_column(held_out.store)
    sae = with_directions(sae, sae.W_dec / 100)
    found = studied(held_out, sae, 128, monkeypatch)
    real = np.zeros(sae.d_sae)
    with torch.no_grad(), RowEditor(held_out.subject, fast=True) as editor:
        for batch in held_out.batches(copies=2048):
            rows = editor.run(batch.token_ids).rows[0]
            code = found.code(batch.rows[0].numpy(), rows)
            changes = [found.removal(code, i) for i in range(sae.d_sae)]
            real += run_held(editor, held_out, batch, rows, changes).kl
    estimate = found.kl.sum(1)
    strong = real > 1e-8  # the others are near the rounding error of the real runs
    assert strong.sum() > 5
    # The mean of 128 squares of normal draws has a standard error of √(2 / 128) = 0.125.
    np.testing.assert_allclose(estimate[strong], real[strong], rtol=0.6)
    assert estimate.sum() == pytest.approx(real.sum(), rel=0.25)


def test_pull_is_by_how_much_the_raised_token_falls_at_the_features_own_tokens(
    held_out, monkeypatch
):
    """With as many passes as tokens no other token adds noise; then a removal of 1/1000 tells."""
    sae = each_column(held_out.store)
    longest = int(np.diff(held_out.store.rollout_start).max())
    found = studied(held_out, sae, longest, monkeypatch)
    small, expected, largest = 1e-3, np.zeros(sae.d_sae), 0.0
    store, chosen = held_out.store, range(0, sae.d_sae, 5)
    with torch.no_grad(), RowEditor(held_out.subject) as editor:
        for batch in held_out.batches(copies=2048):
            out = editor.run(batch.token_ids)
            log_p = out.logits[0].double().log_softmax(-1)
            base = editor.base(batch.token_ids)[0].double().log_softmax(-1)
            raised = (log_p.exp() * (log_p - base)).argmax(-1, keepdim=True)
            following = np.minimum(batch.rows[0].numpy() + 1, store.n_rows - 1)
            usual = batch.mask[0] & torch.from_numpy(np.array(store.roles)[following] != SPECIAL)
            code = found.code(batch.rows[0].numpy(), out.rows[0])
            for i in chosen:
                moved = [
                    editor.run(
                        batch.token_ids,
                        held=out.rows + sign * small * code[:, [i]] * sae.W_dec[i],
                    ).logits[0]
                    for sign in (1, -1)
                ]
                up, down = (x.double().log_softmax(-1).gather(1, raised)[:, 0] for x in moved)
                here = usual & (code[:, i] > 0)
                expected[i] += float((up - down)[here].sum()) / (2 * small)
                largest = max(largest, float(out.logits.abs().max()))
    pull = (found.pull * sae.W_dec).sum(1).numpy()[list(chosen)]
    assert np.abs(pull).max() > 0
    np.testing.assert_allclose(
        pull, expected[list(chosen)], rtol=0.05, atol=0.02 * np.abs(pull).max()
    )


@pytest.mark.slow
def test_rollouts_in_one_batch_give_what_each_gives_alone(held_out, monkeypatch):
    """What is drawn for a rollout depends on neither its batch nor how activations are kept."""
    sae = each_column(held_out.store)
    together = studied(held_out, sae)
    alone = studied(replace(held_out, batch_tokens=1), sae)
    with torch.no_grad(), RowEditor(held_out.subject, fast=True) as editor:
        lean = Specificity(editor, held_out, sae, 0)
        for batch in held_out.batches():
            lean.add(batch, lean=True)
    monkeypatch.setattr(specificity, "_GRADIENT_BYTES", 1)
    little_memory = studied(held_out, sae)
    for other in (alone, lean, little_memory):
        for one, same in (
            (together.kl, other.kl),
            (together.kl_controls, other.kl_controls),
            (together.pull.numpy(), other.pull.numpy()),
        ):
            np.testing.assert_allclose(one, same, rtol=1e-3, atol=1e-3 * np.abs(same).max())
        assert (together.n_here == other.n_here).all()
        assert (together.n_fired == other.n_fired).all()
    assert together.kl.any(0).sum() == held_out.store.n_rollouts == 3


def unit(n, d, seed):
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True)


def test_features_that_are_drawn_as_the_controls_are_not_specific():
    """Under the null p is uniform, and no feature at all is chosen in 95 of 100 studies."""
    false, ps = 0, []
    for seed in range(100):
        pull = unit(20, 30, 3 * seed) * torch.linspace(0.1, 10, 20)[:, None]
        found = judge(pull, 2 * unit(20, 30, 3 * seed + 1), unit(399, 30, 3 * seed + 2),
                      torch.full((20,), 2.0))  # fmt: skip
        false += any(one.verdict == "specific" for one in found)
        ps += [one.p for one in found]
    assert false <= 12  # binomial(100, 0.05): above this once in 1,000
    assert np.mean(ps) == pytest.approx(0.5, abs=0.03)
    assert np.mean(np.array(ps) <= 0.05) == pytest.approx(0.05, abs=0.015)


def test_features_that_write_what_the_model_reads_are_specific_and_few_others_are():
    shares = []
    for seed in range(40):
        pull, directions = unit(40, 30, 3 * seed), unit(40, 30, 3 * seed + 1)
        directions[:10] = pull[:10] + 0.3 * directions[:10]
        norms = directions.norm(dim=1)
        found = judge(pull, directions, unit(799, 30, 3 * seed + 2), norms)
        specific = [one.verdict == "specific" for one in found]
        assert all(specific[:10])
        shares.append(sum(specific[10:]) / sum(specific))
        for one in found:
            assert (one.interval[0] > 0) == (one.verdict == "specific")
            assert one.interval[0] < one.interval[1]
    # Expected is 0.05 · 30 / 40, and the mean of 40 such shares has a standard error of 0.013.
    assert np.mean(shares) <= 0.08
    alone = judge(pull[:1], directions[:1], unit(19, 30, 3), norms[:1])
    assert alone[0].verdict == "specific" and alone[0].p == pytest.approx(0.05)


def test_the_verdict_of_a_whole_study_where_the_truth_is_known(held_out):
    """Latents with drawn rows are not specific; the one that writes what its tokens read is."""
    sae = each_column(held_out.store)
    text = np.flatnonzero(held_out.store.eligible)
    drawn = np.random.default_rng(5).choice(text, (2, sae.d_sae))
    rows = [torch.from_numpy(held_out.store.take(some)) for some in drawn]
    null = with_directions(sae, rows[0] - rows[1])
    found = studied(held_out, null)
    latents = np.flatnonzero(found.n_here)
    verdicts = [one.verdict for one in found.judge(latents)]
    assert "not distinguishable" in verdicts
    assert "specific" not in verdicts
    best = int(found.n_here.argmax())
    length = float(null.W_dec[best].norm() / found.pull[best].norm())
    planted = studied(held_out, with_directions(null, length * found.pull[best], best))
    (one,) = planted.judge(np.array([best]))
    assert one.verdict == "specific" and one.pull > 0
    silent = int(found.n_here.argmin())
    if found.n_here[silent] < specificity.FEWEST:
        (one,) = planted.judge(np.array([silent]))
        assert one.verdict == "too few firings" and one.p is None
