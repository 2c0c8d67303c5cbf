"""Reading and writing rows at one place: replaced by themselves, by nothing, and put back."""

import pytest
import torch
from builders.subjects import IDS, N_TERMS, load, logits_of, reference, rows_of, save_adapter
from builders.tolerance import assert_same_up_to_rounding
from transformers import AutoModelForCausalLM, DynamicCache

from lorascope.errors import AdapterError
from lorascope.subject.hooks import RowReader
from lorascope.subject.intervene import RowEditor, adapter_off

BATCH = torch.tensor([[5, 9, 200, 31, 7, 64], [3, 3, 17, 250, 8, 1]])


def held(rows):
    return lambda columns, _values: rows[..., columns]


def nothing(_columns, values):
    return torch.zeros_like(values)


@pytest.fixture(scope="module", params=["rank 1", "raw, rank 3", "svd, ranks 2 and 3", "dora"])
def subject(request, subject_dirs, make_subject):
    if request.param == "rank 1":
        return load(subject_dirs[1], subject_dirs[0])
    if request.param == "raw, rank 3":
        base, adapter = make_subject(r=3, targets=["up_proj", "o_proj"])
        return load(adapter, base, gauge="raw")
    if request.param == "dora":
        base, adapter = make_subject(r=2, use_dora=True, targets=["q_proj", "down_proj"])
        return load(adapter, base)
    base, adapter = make_subject(r=2, rank_pattern={"q_proj": 3}, targets=["q_proj", "gate_proj"])
    return load(adapter, base, gauge="svd")


@torch.inference_mode()
def test_rows_are_those_that_are_captured_and_the_logits_those_of_the_model(subject):
    with RowEditor(subject) as editor:
        seen = editor.run(BATCH)
    with RowReader(subject, own_forward=False) as reader:
        captured = reader.read(BATCH)
    assert torch.equal(seen.rows, captured)
    assert torch.equal(seen.rows[0], rows_of(subject, BATCH)[: len(BATCH[0])])
    assert torch.equal(seen.logits, logits_of(subject.causal, BATCH))


@torch.inference_mode()
def test_rows_replaced_by_themselves_change_no_bit(subject):
    with RowEditor(subject) as editor:
        before = editor.run(BATCH)
        after = editor.run(BATCH, held(before.rows))
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.rows, after.rows)


@torch.inference_mode()
def test_rows_of_zeros_are_the_base_model_to_the_bit(subject_dirs, make_subject):
    svd = make_subject(r=3, targets=["q_proj", "down_proj", "up_proj"])
    for base, adapter in (subject_dirs, svd):
        subject = load(adapter, base)
        with RowEditor(subject) as editor:
            without = editor.run(BATCH, nothing).logits
            off = editor.base(BATCH)
        assert torch.equal(without, off)
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        assert torch.equal(off, logits_of(bare, BATCH))
        assert not torch.equal(off, logits_of(subject.causal, BATCH))


@torch.inference_mode()
def test_a_site_edited_alone_is_the_model_with_that_lora_taken_out(subject_dirs):
    base, adapter = subject_dirs
    subject = load(adapter, base)
    names = subject.layout.column_names
    chosen = names.index("1.up_proj")
    keep = torch.ones(len(names))
    keep[chosen] = 0
    with RowEditor(subject) as editor:
        edited = editor.run(BATCH, lambda columns, values: values * keep[columns]).logits
    model = reference(adapter, base)
    layer = model.get_submodule("base_model.model." + subject.layout.sites[chosen].module)
    layer.lora_B["default"].weight.zero_()
    assert_same_up_to_rounding(edited, logits_of(model, BATCH), n_terms=N_TERMS)


@torch.inference_mode()
def test_an_edit_in_the_svd_gauge_writes_what_its_singular_direction_writes(make_subject):
    """Half of column 0: the update loses half of its first singular part, and nothing else."""
    base, adapter = make_subject(r=3, n_layers=1, targets=["up_proj"])
    subject = load(adapter, base, gauge="svd")

    def halve(_columns, values):
        return values * torch.tensor([0.5, 1.0, 1.0])

    with RowEditor(subject) as editor:
        edited = editor.run(BATCH, halve).logits
    model = reference(adapter, base)
    layer = model.get_submodule("base_model.model." + subject.layout.sites[0].module)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    s[0] /= 2
    layer.lora_A["default"].weight.copy_(vh[:3])
    layer.lora_B["default"].weight.copy_(u[:, :3] * s[:3])
    assert_same_up_to_rounding(edited, logits_of(model, BATCH), n_terms=N_TERMS)


@torch.inference_mode()
def test_each_row_of_a_batch_has_its_own_edit(subject):
    ids = BATCH[:1].expand(3, -1)
    with RowEditor(subject) as editor:
        rows = editor.run(ids).rows
        given = torch.stack([rows[0], 0 * rows[0], 2 * rows[0]])
        together = editor.run(ids, held(given)).logits
        alone = [editor.run(ids, held(given[i : i + 1])).logits[0] for i in range(3)]
    assert_same_up_to_rounding(together, torch.stack(alone), n_terms=N_TERMS)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@torch.inference_mode()
def test_a_push_has_the_norm_of_what_the_site_writes_and_another_direction(subject_dirs):
    subject = load(subject_dirs[1], subject_dirs[0])
    site = subject.layout.sites[-1]  # what it writes passes nothing but itself
    layer = subject.causal.get_submodule(site.module)
    seen = []
    push = torch.zeros(2, len(subject.sites))
    push[1, -1] = 1.0
    with RowEditor(subject) as editor:
        handle = layer.lora_B["default"].register_forward_hook(lambda m, a, out: seen.append(out))
        editor.run(BATCH[:1].expand(2, -1), push=push)
        handle.remove()
    written, pushed = seen[0]
    torch.testing.assert_close((pushed - written).norm(dim=-1), written.norm(dim=-1))
    cosine = torch.cosine_similarity(pushed - written, written, dim=-1).abs()
    assert (cosine < 0.95).all()


def test_hooks_are_gone_after_a_forward_that_raised(subject):
    before = logits_of(subject.causal)
    with pytest.raises(ZeroDivisionError), RowEditor(subject) as editor:
        editor.run(IDS, lambda columns, values: values / (1 // 0))
    hooked = [m for m in subject.causal.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []
    assert torch.equal(before, logits_of(subject.causal))


@torch.inference_mode()
def test_an_open_editor_changes_nothing_for_others_that_run_the_model(subject):
    before = logits_of(subject.causal)
    with RowEditor(subject) as editor:
        editor.run(IDS, nothing)
        assert torch.equal(before, logits_of(subject.causal))


def test_the_base_model_leaves_the_adapter_on_and_its_weights_as_fixed_as_before(subject):
    before = logits_of(subject.causal)
    marks = [parameter.requires_grad for parameter in subject.model.parameters()]
    with pytest.raises(ZeroDivisionError), adapter_off(subject):
        raise ZeroDivisionError
    assert torch.equal(before, logits_of(subject.causal))
    assert [parameter.requires_grad for parameter in subject.model.parameters()] == marks


@torch.inference_mode()
def test_token_by_token_with_a_cache_is_the_pass_over_the_whole_text(subject):
    keep = torch.rand(subject.layout.d_in, generator=torch.Generator().manual_seed(0))

    def fade(columns, values):
        return values * keep[columns]

    with RowEditor(subject) as editor:
        whole = editor.run(IDS, fade)
        cache, steps = DynamicCache(config=subject.causal.config), []
        for i in range(IDS.shape[1]):
            step = editor.run(IDS[:, i : i + 1], fade, cache=cache)
            assert step.rows.shape == (1, 1, subject.layout.d_in)
            cache = step.cache
            steps.append(step)
    logits = torch.cat([step.logits for step in steps], dim=1)
    assert_same_up_to_rounding(logits, whole.logits, n_terms=N_TERMS)
    rows = torch.cat([step.rows for step in steps], dim=1)
    assert_same_up_to_rounding(rows, whole.rows, n_terms=N_TERMS)


@torch.inference_mode()
def test_a_compiled_module_that_passes_over_its_hooks_is_an_error(subject_dirs):
    subject = load(subject_dirs[1], subject_dirs[0])
    layer = subject.sites[3]
    layer._compiled_call_impl = layer.forward  # what Module.compile leaves: no hook runs there
    refused = pytest.raises(AdapterError, match="ran 0 times in one forward")
    with refused as caught, RowEditor(subject) as editor:
        editor.run(IDS, nothing)
    assert subject.layout.sites[3].module in str(caught.value)


@torch.inference_mode()
def test_an_adapter_whose_b_is_zero_has_no_effect_whatever_is_written(subject_dirs, tmp_path):
    def untrained(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()

    save_adapter(subject_dirs[0], tmp_path / "adapter", change=untrained, r=1)
    subject = load(tmp_path / "adapter", subject_dirs[0])
    with RowEditor(subject) as editor:
        base = editor.base(BATCH)
        for factor in (0.0, 1.0, 100.0):
            edited = editor.run(BATCH, lambda _, values, factor=factor: factor * values).logits
            assert torch.equal(edited, base)
        pushed = editor.run(BATCH, push=torch.ones(2, len(subject.sites))).logits
    assert torch.equal(pushed, base)


def test_a_gradient_reaches_the_rows_in_every_gauge(subject):
    with RowEditor(subject) as editor, torch.enable_grad():
        with torch.no_grad():
            rows = editor.run(IDS).rows
        leaf = rows.clone().requires_grad_()
        target = editor.run(IDS, held(leaf)).logits[0, -1, 7]
        (gradient,) = torch.autograd.grad(target, leaf)
        step = 3e-4 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            moved = [editor.run(IDS, held(rows + sign * step)).logits[0, -1, 7] for sign in (1, -1)]
    expected = float(moved[0] - moved[1]) / 2
    assert float((gradient * step).sum()) == pytest.approx(expected, rel=2e-2, abs=2e-6)


@torch.inference_mode()
def test_the_fast_forward_is_pefts_up_to_rounding(subject):
    halve = lambda _columns, values: values / 2  # noqa: E731
    push = torch.full((2, len(subject.layout.sites)), 0.3)
    with RowEditor(subject, seed=3) as editor:
        plain = [editor.run(BATCH), editor.run(BATCH, halve), editor.run(BATCH, push=push)]
        rows = plain[0].rows.flip(0)
        plain.append(editor.run(BATCH, held(rows)))
        off = editor.base(BATCH)
    with RowEditor(subject, seed=3, fast=True) as editor:
        fast = [editor.run(BATCH), editor.run(BATCH, halve), editor.run(BATCH, push=push)]
        fast.append(editor.run(BATCH, held=rows))
        assert torch.equal(editor.base(BATCH), off)
        some = torch.tensor([1, 4])
        assert_same_up_to_rounding(
            editor.run(BATCH, held=rows, logits_at=some).logits,
            fast[3].logits[:, some],
            n_terms=N_TERMS,
        )
    for one, other in zip(fast, plain, strict=True):
        assert_same_up_to_rounding(one.logits, other.logits, n_terms=N_TERMS)
    assert_same_up_to_rounding(fast[1].rows, plain[1].rows, n_terms=N_TERMS)


@torch.inference_mode()
def test_the_fast_forward_has_the_gradients_of_pefts(subject):
    rows = {}
    for fast in (False, True):
        with torch.inference_mode(False), RowEditor(subject, fast=fast) as editor:
            values = editor.run(BATCH).rows.detach()
            with torch.enable_grad():
                leaf = values.clone().requires_grad_()
                given = {"held": leaf} if fast else {"edit": held(leaf)}
                loss = editor.run(BATCH, **given).logits.log_softmax(-1)[..., 7].sum()
                (rows[fast],) = torch.autograd.grad(loss, leaf)
    assert rows[True].abs().max() > 0
    assert_same_up_to_rounding(rows[True], rows[False], n_terms=10 * N_TERMS)


@torch.inference_mode()
def test_layers_that_run_again_for_the_backward_pass_give_the_same_gradients(subject):
    """Also where several gradients are taken of one run, and another run lies between.

    Without `lean`, everything inside the layers is kept as well: attention, MLP, norms.
    """
    found, kept = {}, dict.fromkeys((False, True), 0)

    def measure(tensor):
        kept[lean] += tensor.numel()
        return tensor

    with torch.inference_mode(False), RowEditor(subject, fast=True) as editor:
        values = editor.run(BATCH).rows.detach()
        for lean in (False, True):
            hooks = torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor)
            with torch.enable_grad():
                leaf = values.clone().requires_grad_()
                with hooks:
                    out = editor.run(BATCH, held=leaf, lean=lean)
                logits = out.logits.log_softmax(-1)
                with torch.no_grad():
                    editor.run(BATCH[:1], nothing)
                found[lean] = torch.stack(
                    [
                        torch.autograd.grad(logits[..., token].sum(), leaf, retain_graph=True)[0]
                        for token in (7, 200)
                    ]
                )
    assert 0 < kept[True] < kept[False] / 2
    assert found[True].abs().max() > 0
    assert_same_up_to_rounding(found[True], found[False], n_terms=10 * N_TERMS)
