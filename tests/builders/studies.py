"""Stores, dictionaries and subjects that belong together, for tests of effects."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from builders.saes import dictionary
from builders.subjects import N_TERMS
from builders.tolerance import kl_rounding, rounding
from lorascope.activations.generate import GenerateConfig, run
from lorascope.activations.store import ActivationStore
from lorascope.sae.model import SAE

# What rounding of the logits makes of a KL of order 1, and of a share of the adapter's KL.
ROUNDED = kl_rounding(1.0, rounding(N_TERMS))


def make_texts(dirs: tuple[Path, Path], dataset: Path, out: Path, **options) -> Path:
    """Make the activation store of a subject, in float32, and return its folder."""
    base, adapter = dirs
    given = {"num_examples": 6, "store_dtype": "float32", "output": out, **options}
    return run(
        GenerateConfig(
            lora_path=str(adapter),
            base_model=str(base),
            dataset=str(dataset),
            device="cpu",
            **given,
        )
    )


def strengthen(dirs: tuple[Path, Path], folder: Path, factor: float = 8.0) -> tuple[Path, Path]:
    """Copy a subject such that its predictions are far from even and its adapter moves them."""
    for kind, source in zip(("base", "adapter"), dirs, strict=True):
        shutil.copytree(source, folder / kind)
    base, adapter = folder / "base", folder / "adapter"
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= factor
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        tensors[name] *= factor if "lora_B" in name else 1.0
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    return base, adapter


def each_column(store: ActivationStore, threshold: float = 0.0, **given) -> SAE:
    """An SAE with a latent for each sign of each column: above threshold 0 it rebuilds any row."""
    eye = torch.eye(store.d_in)
    both = torch.cat([eye, -eye])
    return dictionary(store.layout, both.T.contiguous(), both, threshold=threshold, **given)
