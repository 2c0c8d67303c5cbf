"""Fine-tuning lowers what the reconstruction changes in the model's output, and keeps the L0."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.studies import make_texts, strengthen

from lorascope.artifact import digest_file
from lorascope.causal.effect_options import EffectOptions
from lorascope.causal.held_out import open_held_out
from lorascope.errors import ArtifactError, ConfigError
from lorascope.sae import train, trainer
from lorascope.sae.model import load_sae
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run
from lorascope.subject.intervene import RowEditor
from lorascope.texts.roles import ROLES


@pytest.fixture(scope="module")
def strong(subject_dirs, tmp_path_factory):
    return strengthen(subject_dirs, tmp_path_factory.mktemp("strong"))


@pytest.fixture
def config(strong, dataset_file, tmp_path):
    base, adapter = strong
    return TrainConfig(
        data_dir=make_texts(strong, dataset_file, tmp_path / "store", num_examples=30),
        output=tmp_path / "sae.pt",
        lora_path=str(adapter),
        base_model=str(base),
        expansion_factor=2,
        k=3,
        batch_size=64,
        epochs=3,
        holdout=0.3,
        kl_passes=3,
        device="cpu",
    )


@torch.no_grad()
def held_out_kl(config, path):
    """Return the mean divergence of the spliced run from the adapter's, of generated tokens."""
    sae, total, n_tokens = load_sae(path), 0.0, 0
    generated = [ROLES.index(role) for role in ("think", "answer")]
    held_out = open_held_out(
        EffectOptions(
            lora_path=config.lora_path,
            base_model=config.base_model,
            data_dir=config.data_dir,
            device="cpu",
        ),
        sae,
    )
    with RowEditor(held_out.subject) as editor:
        for batch in held_out.batches():
            out = editor.run(batch.token_ids)
            rows = sae.decode(sae.encode(out.rows))
            other = editor.run(batch.token_ids, lambda here, _, rows=rows: rows[..., here])
            p, q = (run.logits[batch.mask].double().log_softmax(-1) for run in (out, other))
            counts = torch.from_numpy(np.isin(held_out.role_of(batch.measured), generated))
            total += float((p.exp() * (p - q)).sum(-1)[counts].sum())
            n_tokens += int(counts.sum())
    return total / n_tokens


@pytest.mark.slow
def test_it_lowers_the_divergence_on_held_out_rollouts_and_keeps_the_l0(config, tmp_path):
    before = run(config)
    after = run(replace(config, objective="kl", kl_passes=20, output=tmp_path / "kl.pt"))
    assert held_out_kl(config, after) < 0.95 * held_out_kl(config, before)
    report = load_sae(after).manifest.content["report"]
    assert report["l0"] == pytest.approx(3, rel=0.2)
    assert report["train"]["l0"] == pytest.approx(3, rel=0.05)
    assert "kl" in load_sae(after).manifest.content["fine_tuning"]["log"][-1]


def test_a_step_keeps_the_inputs_of_layers_and_nothing_inside_them(config, monkeypatch):
    """With `lean` off, everything inside the layers is kept as well: attention, MLP, norms."""
    config = replace(config, objective="kl", kl_passes=0.1, epochs=1)
    kept = dict.fromkeys((True, False), 0)

    def measure(tensor):
        kept[is_lean] += tensor.numel() * tensor.element_size()
        return tensor

    own = RowEditor.run
    for is_lean in kept:
        monkeypatch.setattr(
            RowEditor,
            "run",
            lambda *args, lean=False, _on=is_lean, **how: own(*args, lean=lean and _on, **how),
        )
        with torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor):
            run(replace(config, output=config.output.with_name(f"{is_lean}.pt")))
    assert 0 < kept[True] < kept[False] / 2


@pytest.mark.slow
def test_broken_off_and_continued_it_gives_the_same_bytes_and_the_same_log(
    config, tmp_path, monkeypatch
):
    config = replace(config, objective="kl", checkpoint_every=0)
    straight = run(config)
    broken = replace(config, output=tmp_path / "broken.pt")
    take = trainer.Trainer.take

    def breaks(self, x):
        if self.running.numel() == 4 and self.step == 2:  # while fine-tuning
            raise RuntimeError("power cut")
        return take(self, x)

    monkeypatch.setattr(trainer.Trainer, "take", breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        run(broken)
    monkeypatch.setattr(trainer.Trainer, "take", take)
    assert digest_file(run(broken)) == digest_file(straight)
    logs = [
        path.with_suffix(".jsonl").read_text().splitlines() for path in (straight, broken.output)
    ]
    assert len(logs[0]) == len(logs[1])
    assert sum('"kl"' in line for line in logs[1]) == sum('"kl"' in line for line in logs[0]) > 2


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "matryoshka"])
@pytest.mark.slow
def test_every_architecture_can_be_fine_tuned(config, architecture):
    report = load_sae(run(replace(config, objective="kl", architecture=architecture)))
    assert report.manifest.content["report"]["l0"] == pytest.approx(3, rel=0.3)


def test_without_a_model_or_with_another_one_it_is_refused(config, subject_dirs, monkeypatch):
    with pytest.raises(ConfigError, match="--objective kl runs the model: .* --lora-path"):
        replace(config, objective="kl", lora_path=None)
    base, adapter = subject_dirs
    other = replace(config, objective="kl", lora_path=str(adapter), base_model=str(base))
    with pytest.raises(ArtifactError, match="another base model than base"):
        run(other)
    monkeypatch.setattr(train, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="one process"):
        run(replace(config, objective="kl"))
