"""SAEs as other libraries and the published script save them."""

import json

import numpy as np
import safetensors.torch
import torch


def published(path, d_in=14, d_sae=40, seed=0, **changes):
    """Write a file as the published training script does: with NumPy arrays beside tensors."""
    generator = torch.Generator().manual_seed(seed)
    data = {
        "model_state_dict": {
            "W_enc": torch.randn(d_in, d_sae, generator=generator),
            "b_enc": torch.zeros(d_sae),
            "W_dec": torch.randn(d_sae, d_in, generator=generator),
            "b_dec": torch.zeros(d_in),
        },
        "config": {"d_model": d_in, "dict_size": d_sae, "k": 4, "adapter_types": None},
        "final_metrics": {"loss": 0.5, "fvu": 0.1},
        "activation_rates": np.linspace(0, 1, d_sae, dtype=np.float32),
        "dead_latents": np.arange(3),
        **changes,
    }
    torch.save(data, path)
    return path


def foreign_weights(d_in=14, d_sae=40, seed=0):
    """Weights of no particular scale: decoder rows of other norms than 1, b_dec far from 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(d_in, d_sae, generator=generator),
        "b_enc": torch.randn(d_sae, generator=generator),
        "W_dec": torch.randn(d_sae, d_in, generator=generator)
        * torch.rand(d_sae, 1, generator=generator)
        * 5,
        "b_dec": 3 * torch.randn(d_in, generator=generator),
    }


def saelens_folder(folder, threshold=0.7, d_in=14, **changes):
    """Write a folder as SAELens 6 saves an SAE; without a threshold it is a standard one."""
    tensors = foreign_weights(d_in)
    config = {
        "architecture": "standard",
        "d_in": d_in,
        "d_sae": 40,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2"},
    }
    if threshold is not None:
        config["architecture"] = "jumprelu"
        tensors["threshold"] = threshold + torch.linspace(0, 1, 40)
    folder.mkdir()
    config |= changes
    safetensors.torch.save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder, config, tensors


def dictionary_folder(folder, name="BatchTopKSAE", threshold=0.7, d_in=14, **changes):
    """Write a folder as dictionary_learning saves a dictionary of a class."""
    weights = foreign_weights(d_in)
    if name in ("BatchTopKSAE", "AutoEncoderTopK"):
        state = {
            "encoder.weight": weights["W_enc"].T,
            "encoder.bias": weights["b_enc"],
            "decoder.weight": weights["W_dec"].T,
            "b_dec": weights["b_dec"],
        }
    else:
        state = dict(weights)
    state["threshold"] = torch.as_tensor(threshold, dtype=torch.float32)
    if name != "JumpReluAutoEncoder":
        state["k"] = torch.tensor(5, dtype=torch.int32)
    if name == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([10, 30])
    folder.mkdir()
    torch.save({**state, **changes}, folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": d_in, "dict_size": 40, "k": 5, "lr": 1e-3}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d": d_in}}))
    return folder
