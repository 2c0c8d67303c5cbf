"""Batches, windows, memory, and that the fast forward is PEFT's."""

import itertools
import resource

import numpy as np
import pytest
import torch
from builders.subjects import N_TERMS, capture_of, captured, load
from builders.tolerance import assert_same_up_to_rounding
from torch import nn

from lorascope.activations.capture import plan_batches
from lorascope.errors import AdapterError, ConfigError, NumberError
from lorascope.subject.hooks import RowReader
from lorascope.texts.rollouts import Rollout


def load_dirs(dirs, dtype="auto", **given):
    return load(dirs[1], dirs[0], dtype, **given)


@pytest.fixture(scope="module")
def subject(subject_dirs):
    return load_dirs(subject_dirs)


def texts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Rollout(i, rng.integers(3, 320, n).astype(np.int32), np.zeros(n, np.uint8))
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("budget", [1, 10, 24, 1000])
def test_batches_hold_every_text_once_and_keep_to_the_budget(budget):
    lengths = np.random.default_rng(budget).integers(1, 30, 40).tolist()
    batches = plan_batches(lengths, budget, overhead=3)
    assert sorted(itertools.chain(*batches)) == list(range(40))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


def test_no_other_cut_into_batches_computes_fewer_places():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = sorted(rng.integers(1, 12, 8).tolist(), reverse=True)

        def cost(batches, lengths=lengths):
            return sum(max(lengths[i] for i in b) * len(b) + 4 for b in batches)

        cuts = []
        for marks in itertools.product([0, 1], repeat=7):
            edges = [0, *(i + 1 for i, m in enumerate(marks) if m), 8]
            cut = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
            if all(len(b) == 1 or lengths[b[0]] * len(b) <= 20 for b in cut):
                cuts.append(cost(cut))
        assert cost(plan_batches(lengths, 20, overhead=4)) == min(cuts)


def test_no_texts_make_no_batches():
    assert plan_batches([], 10, 1) == []


@pytest.mark.parametrize(
    "given", [{}, {"r": 3}, {"r": 2, "use_rslora": True}, {"r": 4, "rank_pattern": {"q_proj": 2}}]
)
def test_the_own_forward_gives_the_rows_of_pefts(make_subject, given):  # pitfalls 24, B5, B6
    subject = load_dirs(make_subject(seed=3, **given))
    rollouts = texts([5, 1, 17, 40, 2])
    mine, theirs = (captured(subject, rollouts, own_forward=own) for own in (True, False))
    assert_same_up_to_rounding(mine, theirs, n_terms=N_TERMS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_the_own_forward_is_pefts_to_that_types_rounding(make_subject, dtype):
    subject = load_dirs(make_subject(seed=3, r=2), dtype)
    layer = subject.causal.model.layers[0].mlp.gate_proj
    x = torch.randn(50, 16, dtype=subject.dtype)
    with torch.inference_mode():
        theirs = layer(x)
        with RowReader(subject):
            mine = layer(x)
        exact = layer.base_layer(x).double() + layer.scaling["default"] * (
            x.double()
            @ layer.lora_A["default"].weight.double().T
            @ layer.lora_B["default"].weight.double().T
        )
    assert mine.dtype == theirs.dtype == subject.dtype
    ulp = torch.finfo(subject.dtype).eps * exact.abs().clamp(min=1e-2)
    assert ((mine.double() - exact).abs() / ulp).max() < 1.01
    assert_same_up_to_rounding(mine, theirs, n_terms=4, dtype=subject.dtype)  # roundings of PEFT
    rows = [captured(subject, texts([30, 9]), own_forward=own) for own in (True, False)]
    assert np.linalg.norm(rows[0] - rows[1]) < 0.02 * np.linalg.norm(rows[1])


def test_leaving_the_reader_leaves_the_model_as_it_was(subject):
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        before = subject.model(input_ids=ids).logits
        with pytest.raises(IndexError), RowReader(subject) as reader:
            reader.read(torch.tensor([[10**6]]))
        assert not any(m._forward_hooks or "forward" in vars(m) for m in subject.model.modules())
        assert torch.equal(subject.model(input_ids=ids).logits, before)


def test_inside_the_reader_the_model_still_writes_what_the_adapter_makes_it_write(subject):
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        before = subject.model(input_ids=ids).logits
        with RowReader(subject):
            torch.testing.assert_close(subject.model(input_ids=ids).logits, before)


def test_rows_do_not_depend_on_the_batch(subject):  # pitfalls 3 and 36
    rollouts = texts([3, 30, 11, 29, 1, 64])
    one_by_one = captured(subject, rollouts, batch_tokens=1)
    for budget in (32, 64, 4096):
        assert_same_up_to_rounding(
            captured(subject, rollouts, batch_tokens=budget), one_by_one, n_terms=N_TERMS
        )


def test_windows_read_every_token_once_with_half_a_window_before_it(subject):  # pitfall 33
    rollouts = texts([50, 7, 21])
    windowed = captured(subject, rollouts, longest=20)
    whole = captured(subject, rollouts)
    assert_same_up_to_rounding(windowed[:20], whole[:20], n_terms=N_TERMS)
    assert_same_up_to_rounding(windowed[50:57], whole[50:57], n_terms=N_TERMS)
    second = Rollout(0, rollouts[0].token_ids[10:30], np.zeros(20, np.uint8))
    alone = captured(subject, [second])
    assert_same_up_to_rounding(windowed[20:30], alone[10:], n_terms=N_TERMS)


def test_a_batch_that_does_not_fit_is_halved_with_a_notice(subject, monkeypatch, caplog):
    rollouts = texts([8, 8, 8, 8, 7])  # pitfall 15
    expected = captured(subject, rollouts)
    read, sizes = RowReader.read, []

    def small(self, ids):
        sizes.append(ids.numel())
        if ids.numel() > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, ids)

    monkeypatch.setattr(RowReader, "read", small)
    assert_same_up_to_rounding(captured(subject, rollouts), expected, n_terms=N_TERMS)
    assert sizes[0] > 16 >= sizes[-1]
    assert "out of memory: batches of at most" in caplog.text
    with pytest.raises(ConfigError, match=r"17 tokens \(record 0\) does not fit.*--max-length"):
        captured(subject, texts([17]))


def test_an_error_that_is_not_about_memory_is_raised(subject, monkeypatch):
    def broken(self, ids):
        raise RuntimeError("something else")

    monkeypatch.setattr(RowReader, "read", broken)
    with pytest.raises(RuntimeError, match="something else"):
        captured(subject, texts([4]))


def test_a_value_that_float16_cannot_hold_is_named(subject):  # pitfall 16, B24
    with RowReader(subject) as reader:
        capture = capture_of(reader, store_dtype="float16")
        pending = capture.run(texts([4, 6]))
        pending.parts[1][1][2, 3] = 1e6
        with pytest.raises(NumberError, match=r"site 0.q_proj reads 1000000.0 at token 2 of"):
            capture.finish(pending)


@pytest.mark.parametrize(
    ("offset", "factor", "fits"),
    [(0, 1, True), (0, 1e-8, False), (0, 1e-4, True), (1000, 1, False), (3, 1, True), (3, 0, True)],
)
def test_a_column_that_float16_makes_constant_is_named(subject, offset, factor, fits):
    with RowReader(subject) as reader:
        capture = capture_of(reader, store_dtype="float16")
        pending = capture.run(texts([40, 60]))
        for _, rows in pending.parts:
            rows[:, 2] = offset + factor * rows[:, 2] / rows[:, 2].std()
        if fits:
            assert capture.finish(pending).dtype == np.float16
        else:
            with pytest.raises(NumberError, match=r"1 of 14 columns.*0.down_proj.*--store-dtype"):
                capture.finish(pending)


def test_dropout_that_stayed_on_is_found_by_running_twice(make_subject):  # pitfall 4, B49
    subject = load_dirs(make_subject(seed=1, dropout=0.5))
    subject.causal.model.layers[0].register_forward_pre_hook(
        lambda _m, args: (torch.nn.functional.dropout(args[0], 0.5), *args[1:])
    )
    with RowReader(subject) as reader, pytest.raises(NumberError, match="in the model is random"):
        capture_of(reader).check(texts([20])[0])


def test_where_the_own_forward_is_wrong_pefts_is_taken(subject, monkeypatch, caplog):
    from lorascope.subject import hooks

    expected = captured(subject, texts([9]), own_forward=False)
    right = hooks._fast_forward
    monkeypatch.setattr(
        hooks, "_fast_forward", lambda layer, keep: right(layer, lambda h: keep(h * 1.5))
    )
    with RowReader(subject) as reader:
        capture = capture_of(reader)
        capture.check(texts([20])[0])
        assert "using PEFT's" in caplog.text
        rows = capture.finish(capture.run(texts([9])))
    np.testing.assert_array_equal(rows, expected)


def test_a_site_that_does_not_run_once_for_every_token_is_named(subject):  # pitfall 26
    layers = subject.causal.model.layers
    with RowReader(subject) as reader:
        real = layers[0].mlp.forward
        layers[0].mlp.forward = lambda x: x
        try:
            with pytest.raises(AdapterError, match=r"mlp.gate_proj ran 0 times in one forward"):
                reader.read(torch.ones(1, 3, dtype=torch.int64))
            layers[0].mlp.forward = lambda x: nn.functional.pad(real(x[:, :2]), (0, 0, 0, 1))
            with pytest.raises(AdapterError, match=r"saw 2 of 3 tokens.*--skip-unhookable"):
                reader.read(torch.ones(1, 3, dtype=torch.int64))
        finally:
            del layers[0].mlp.forward


def test_memory_stays_flat_over_200_batches(subject):  # pitfall 15
    rollouts = texts([16] * 4)
    peaks = []
    with RowReader(subject) as reader:
        capture = capture_of(reader)
        for _ in range(200):
            capture.finish(capture.run(rollouts))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    slope = np.polyfit(np.arange(100), peaks[100:], 1)[0]  # KiB for each batch
    assert slope < 8
