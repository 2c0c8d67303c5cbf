"""Tokens that a feature promotes: against the real model, and features that promote none."""

import json

import pytest
import torch
from builders.schemas import require_schema
from builders.studies import dictionary, strengthen
from builders.subjects import IDS, N_TERMS, load, save_adapter
from builders.tolerance import assert_same_up_to_rounding

from lorascope.causal.direct import DirectConfig, measure, run
from lorascope.causal.study import open_report
from lorascope.cli import call
from lorascope.errors import ArtifactError, ConfigError
from lorascope.record_json import to_json
from lorascope.subject.intervene import RowEditor
from lorascope.subject.unembedding import residual_writes


@pytest.fixture(scope="module")
def dirs(make_subject, tmp_path_factory):
    return strengthen(make_subject(), tmp_path_factory.mktemp("strong"))


def of_columns(subject, names):
    """A dictionary whose latent i is the column of that name."""
    layout = subject.layout
    rows = torch.zeros(len(names), layout.d_in)
    for i, name in enumerate(names):
        rows[i, layout.column_names.index(name)] = 1
    return dictionary(layout, rows.T.clone(), rows)


@torch.inference_mode()
def test_promoted_tokens_are_those_that_a_last_write_raises_in_the_real_model(dirs):
    """A little more of the last down_proj's row: logits move as the report says, up to a factor.

    What the write does along the stream itself is only its length, which the norm divides away; the
    report does not know the stream, so the order is compared where that part is taken out.
    """
    subject = load(dirs[1], dirs[0])
    sae = of_columns(subject, ["1.down_proj"])
    report = to_json(measure(subject, sae, 320))
    entry = report["features"][0]
    column = subject.layout.column_names.index("1.down_proj")
    streams = []
    hook = subject.causal.model.norm.register_forward_hook(lambda m, a, o: streams.append(a[0]))
    bump = 0.05
    with RowEditor(subject) as editor:
        rows = editor.run(IDS).rows
        moved = []
        for sign in (1, -1):
            given = rows.clone()
            given[..., column] += sign * bump
            moved.append(editor.run(IDS, lambda c, _, g=given: g[..., c]).logits[0, -1])
    hook.remove()
    x = streams[0][0, -1]
    (writer,) = [w for w in residual_writes(subject, sae.layout) if w.name == "1.down_proj"]
    v = writer.matrix[:, 0]
    along = x * (x @ v) / (x @ x)
    gain, unembedding = subject.causal.model.norm.weight, subject.causal.lm_head.weight
    real = (moved[0] - moved[1]) / (2 * bump) * x.square().mean().sqrt()
    real = real + unembedding @ (gain * along)
    z = (real - real.mean()) / real.std(unbiased=False)
    for side in ("promoted", "suppressed"):
        for token in entry[side][:10]:
            assert token["z"] == pytest.approx(float(z[token["token_id"]]), abs=0.02)
    assert entry["promoted"][0]["z"] > 0 > entry["suppressed"][0]["z"]
    assert entry["share"] == 1


def test_a_feature_that_writes_inside_layers_only_is_said_to_be_indirect(dirs):
    subject = load(dirs[1], dirs[0])
    report = to_json(
        measure(subject, of_columns(subject, ["0.gate_proj", "1.q_proj", "0.o_proj"]), 5)
    )
    shares = [one["share"] for one in report["features"]]
    assert shares == [0, 0, 1]
    assert [len(one["promoted"]) for one in report["features"]] == [0, 0, 5]
    assert set(report["writers"]) == {f"{i}.{p}" for i in (0, 1) for p in ("down_proj", "o_proj")}
    assert len(report["writers"]) + len(report["indirect"]) == len(subject.layout.sites)


def test_every_named_token_is_spelled_and_none_is_special(dirs):
    subject = load(dirs[1], dirs[0])
    report = to_json(measure(subject, of_columns(subject, ["0.down_proj", "1.o_proj"]), 300))
    special = set(subject.tokenizer.all_special_ids)
    for one in report["features"]:
        for token in [*one["promoted"], *one["suppressed"]]:
            raw = bytes.fromhex(report["vocabulary"][str(token["token_id"])])
            assert raw.decode(errors="replace") == token["token"]
            assert raw
            assert token["token_id"] not in special


@torch.inference_mode()
def test_what_is_written_does_not_depend_on_the_gauge(make_subject):
    base, adapter = make_subject(r=3, targets=["down_proj"])
    written = []
    for gauge in ("raw", "svd"):
        subject = load(adapter, base, gauge=gauge)
        with RowEditor(subject) as editor:
            row = editor.run(IDS).rows[0, -1]
        written.append(
            [w.matrix @ row[w.columns] for w in residual_writes(subject, subject.layout)]
        )
    for raw, svd in zip(*written, strict=True):
        assert_same_up_to_rounding(raw, svd, n_terms=N_TERMS)


def test_an_adapter_that_writes_nothing_promotes_nothing(dirs, tmp_path):
    def silence(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()

    save_adapter(dirs[0], tmp_path / "adapter", change=silence, target_modules=["down_proj"], r=1)
    subject = load(tmp_path / "adapter", dirs[0])
    report = to_json(measure(subject, of_columns(subject, ["0.down_proj"]), 5))
    assert report["features"] == [{"feature": 0, "share": 0.0, "promoted": [], "suppressed": []}]


def options(dirs, tmp_path, **given):
    base, adapter = dirs
    given = {"lora_path": str(adapter), "base_model": str(base), "device": "cpu", **given}
    return DirectConfig(sae=tmp_path / "sae", output=tmp_path / "direct.json", **given)


def test_the_report_is_made_once_and_to_the_same_bytes(dirs, tmp_path, capsys):
    of_columns(load(dirs[1], dirs[0]), ["0.down_proj"]).save(tmp_path / "sae")
    out = run(options(dirs, tmp_path))
    first = out.read_bytes()
    assert open_report(out)["unit"] == "standard deviations over the vocabulary"
    assert run(options(dirs, tmp_path)) == out
    out.unlink()
    assert run(options(dirs, tmp_path)).read_bytes() == first
    assert call(["verify", str(out)]) == 0
    require_schema(out, "direct")
    data = json.loads(first)
    data["features"][0]["share"] = 0.5
    out.write_text(json.dumps(data))
    assert call(["verify", str(out)]) == 1
    assert "direct.json" in capsys.readouterr().err


def test_an_sae_of_a_base_with_other_weights_is_refused(dirs, tmp_path):
    subject = load(dirs[1], dirs[0])
    sae = of_columns(subject, ["0.down_proj"])
    sae.sealed(base_weights=subject.base.digest).save(tmp_path / "sae")
    assert run(options(dirs, tmp_path)).exists()
    sae.sealed(base_weights="0" * 64).save(tmp_path / "sae", overwrite=True)
    with pytest.raises(ArtifactError, match="sae was made with another base model than"):
        run(options(dirs, tmp_path))


def test_an_sae_of_another_adapter_and_impossible_options_are_refused(dirs, make_subject, tmp_path):
    base, adapter = make_subject(seed=1)
    of_columns(load(adapter, base), ["0.down_proj"]).save(tmp_path / "sae")
    with pytest.raises(ArtifactError, match="adapter"):
        run(options(dirs, tmp_path))
    assert not (tmp_path / "direct.json").exists()
    with pytest.raises(ConfigError, match="--top is 0"):
        options(dirs, tmp_path, top=0)
