import shutil

import pytest
import torch
from builders.subjects import CPU, N_TERMS, load, logits_of, refused, rows_of, save_adapter
from builders.tolerance import assert_same_up_to_rounding
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lorascope.errors import AdapterError
from lorascope.subject.adapter_files import WEIGHTS
from lorascope.subject.bottlenecks import Bottleneck, find_bottlenecks, probe, unmix


def test_lora_on_embeddings_is_refused_by_name_or_left_active_and_unread(subject_dirs, tmp_path):
    # pitfall 26, B6
    base, _ = subject_dirs
    model = save_adapter(base, tmp_path, target_modules=["embed_tokens", "k_proj"])
    refused(tmp_path, base, "model.embed_tokens: LoRA on an embedding", "--skip-unhookable")
    subject = load(tmp_path, base, skip_unhookable=True)
    assert subject.unhooked == ("model.embed_tokens",)
    assert [site.name for site in subject.layout.sites] == ["0.k_proj", "1.k_proj"]
    assert torch.equal(logits_of(subject.model), logits_of(model))
    save_adapter(base, tmp_path / "only", target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match="adapts no module"):
        load(tmp_path / "only", base, skip_unhookable=True)


class Routed(nn.Module):
    """A model of three LoRA layers: one for every token, one for some, one for none."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("all", "some", "none")})
        self.layers["experts"] = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, input_ids, **_):
        x = torch.ones(*input_ids.shape, 4)
        x = x + self.layers["all"](x).reshape(x.shape)
        return x.reshape(-1, 4)[:2] + self.layers["some"](x.reshape(-1, 4)[:2])


def test_layers_that_see_other_tokens_than_the_texts_are_found_by_running_them():
    # pitfall 26: nothing in the class of a module says it
    config = LoraConfig(r=2, target_modules=["all", "some", "none", "0"], init_lora_weights=False)
    model = get_peft_model(Routed(), config).eval()
    found, unhooked = find_bottlenecks(model.get_submodule("base_model.model"), "default")
    assert list(unhooked) == ["layers.experts.0"]
    assert probe(found, model, CPU) == {
        "layers.some": "called for 2 of 3 tokens",
        "layers.none": "never called",
    }
    twice = Bottleneck("x", nn.Identity(), torch.ones(1, 1), torch.ones(1, 1), 1.0)
    hidden = torch.ones(3, 1)
    reasons = probe([twice], lambda **_: (twice.read(hidden), twice.read(hidden)), CPU)
    assert reasons == {"x": "called 2 times in a forward"}


# The gauge: pitfall 24, B5


@pytest.mark.parametrize("ranks", [{}, {"q_proj": 1}])
def test_rows_in_the_svd_gauge_do_not_depend_on_the_factors(ranks, make_subject, tmp_path):
    base, adapter = make_subject(r=4, targets=["q_proj", "up_proj"], rank_pattern=ranks)
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(adapter / WEIGHTS)
    mixed = dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for name in (name for name in tensors if "lora_A" in name):
        rank = len(tensors[name])
        m = torch.eye(rank) + 0.2 * torch.randn(rank, rank, generator=generator)
        mixed[name] = m @ tensors[name]
        back = name.replace("lora_A", "lora_B")
        mixed[back] = tensors[back] @ torch.linalg.inv(m)
    save_file(mixed, other / WEIGHTS)
    one, two = load(adapter, base, gauge="svd"), load(other, base, gauge="svd")
    assert_same_up_to_rounding(rows_of(one), rows_of(two), n_terms=N_TERMS)
    for here, there in zip(one.layout.sites, two.layout.sites, strict=True):
        assert here.b_norms == pytest.approx(there.b_norms, rel=1e-4)
        assert list(here.b_norms) == sorted(here.b_norms, reverse=True)


def test_auto_fixes_the_gauge_where_the_rank_is_more_than_one(make_subject):
    base, adapter = make_subject(r=3, targets=["q_proj", "up_proj"], rank_pattern={"q_proj": 1})
    subject = load(adapter, base)
    raw = load(adapter, base, gauge="raw")
    assert {(s.projection, s.gauge) for s in subject.layout.sites} == {
        ("q_proj", "raw"),
        ("up_proj", "svd"),
    }
    assert {site.gauge for site in raw.layout.sites} == {"raw"}
    assert raw.mixes == (None,) * 4
    h, rows, start = rows_of(raw), rows_of(subject), 0
    for site, mix in zip(subject.layout.sites, subject.mixes, strict=True):
        columns = slice(start, start + site.rank)
        start += site.rank
        if mix is None:
            assert torch.equal(h[:, columns], rows[:, columns])
            continue
        assert mix.dtype == torch.float32
        layer = subject.causal.get_submodule(site.module)
        b = layer.lora_B["default"].weight.detach()
        writes = rows[:, columns] @ (b @ unmix(mix)).T
        assert_same_up_to_rounding(writes, h[:, columns] @ b.T, n_terms=N_TERMS)
