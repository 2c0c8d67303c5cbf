"""SAE files of other libraries, in and out.

They differ in three ways, which are folded away so that `code = pre * (pre > threshold)` with
`pre = row @ W_enc + b_enc` gives their inference codes:

1. Some encode `row - b_dec`: then `b_enc - b_dec @ W_enc`, in float64, is our `b_enc`.
2. All put a ReLU before the threshold: a threshold below 0 acts as 0.
3. Some keep matrices turned (`torch.nn.Linear`), or one threshold for all latents.

A latent's value is compared as it was saved: decoder rows keep their norms. None of the files says
which column is which LoRA site, so a store says it, and has to be as wide.

- *published scripts*: one `.pt`, `model_state_dict` and `config`. It has no threshold and gets one
  calibrated on the store.
- *SAELens*: `cfg.json` and `sae_weights.safetensors`, architectures `standard` and `jumprelu`.
- *dictionary_learning*: `ae.pt` and `config.json`, the classes that have a threshold.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorascope.activations.store import ActivationStore
from lorascope.artifact import MANIFEST, make_manifest, replacing, write_text
from lorascope.errors import ArtifactError
from lorascope.sae.model import KIND, SAE, SAELENS_CONFIG, SCHEMA, WEIGHTS
from lorascope.sae.weights import NAMES, checked, read_object, read_pt, read_safetensors, section
from lorascope.sites import parse_adapter_types

log = logging.getLogger(__name__)

DICTIONARY = "ae.pt"
DICTIONARY_CONFIG = "config.json"
_READABLE = (
    f"lorascope reads its own folder ({MANIFEST}), SAELens ({SAELENS_CONFIG}, {WEIGHTS}), "
    f"dictionary_learning ({DICTIONARY}, {DICTIONARY_CONFIG}), and .pt files of its own or of the "
    "published scripts"
)
_SAELENS = ("standard", "jumprelu")
_WHY_NOT = {
    "topk": "a latent of it fires by its rank among the others, not above a threshold of its own",
    "batchtopk": "a checkpoint of its training; save_inference_model makes a jumprelu of it",
    "matryoshka_batchtopk": "a checkpoint of its training; save_inference_model makes a jumprelu",
    "gated": "its gate has an encoder of its own",
}
# Classes of dictionary_learning that have a threshold: what lorascope calls their training, and
# whether they encode `row - b_dec`.
_CLASSES = {
    "BatchTopKSAE": ("batchtopk", True),
    "MatryoshkaBatchTopKSAE": ("matryoshka", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
}
_TURNED = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}


def read_foreign(path: Path, store: ActivationStore | None) -> SAE:
    """Read an SAE file that lorascope did not make, on the CPU, with the layout of the store.

    Raises ArtifactError when it is of no known kind, damaged, cannot be said in lorascope's form,
    or is not as wide as the store.
    """
    if path.name == DICTIONARY and (path.parent / DICTIONARY_CONFIG).is_file():
        path = path.parent
    try:
        if path.suffix == ".pt" and path.is_file():
            return _read_published(path, store)
        files = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
        if MANIFEST in files:
            raise ArtifactError(f"{path / MANIFEST} is damaged or not of lorascope; get it anew")
        if {SAELENS_CONFIG, WEIGHTS} <= files and path.is_dir():
            return _read_saelens(path, store)
        if {DICTIONARY, DICTIONARY_CONFIG} <= files and path.is_dir():
            return _read_dictionary(path, store)
    except RecursionError as error:  # a config that holds itself
        raise ArtifactError(f"{path} has a config that is damaged; get it anew") from error
    held = ", ".join(sorted(files)[:5]) or "nothing"
    raise ArtifactError(f"{path} is no SAE file that is known here (found: {held}); {_READABLE}")


def save_dictionary_learning(sae: SAE, folder: Path) -> Path:
    """Write the folder that dictionary_learning's `BatchTopKSAE` and `load_dictionary` read.

    Its `k` is ours, rounded, which only its training uses. Raises ArtifactError when the
    thresholds are not one number of at least 0, or when there are other files in the folder.
    """
    threshold = sae.threshold
    if threshold is None or not (threshold == threshold[0]).all() or threshold[0] < 0:
        raise ArtifactError(
            "BatchTopKSAE of dictionary_learning has one threshold for all latents, of at least 0, "
            "and this SAE has not; save it as a folder, which SAELens reads"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} is there already, with other files; give another folder")
    content = sae.manifest["content"]
    k = max(1, round(content.get("k") or content.get("report", {}).get("l0") or 1))
    b_enc = sae.b_enc.double() + sae.b_dec.double() @ sae.W_enc.double()
    state = {
        "k": torch.tensor(k, dtype=torch.int32),
        "threshold": threshold[0],
        "decoder.weight": sae.W_dec.T,
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": b_enc.float(),
        "b_dec": sae.b_dec,
    }
    trainer = {
        "trainer_class": "BatchTopKTrainer",
        "dict_class": "BatchTopKSAE",
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "k": k,
        "layer": None,
        "lm_name": None,
        "submodule_name": "LoRA bottlenecks: " + ", ".join(sae.layout.adapter_types),
    }
    config = {"trainer": trainer, "lorascope_version": sae.manifest["version"]}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / DICTIONARY_CONFIG, json.dumps(config, indent=4) + "\n")
    with replacing(folder / DICTIONARY) as beside:
        torch.save({name: tensor.cpu().clone() for name, tensor in state.items()}, beside)
    return folder


def _read_published(path: Path, store: ActivationStore | None) -> SAE:
    data = read_pt(path)
    if "encoder.weight" in data:
        raise ArtifactError(
            f"{path} is an {DICTIONARY} of dictionary_learning; give the folder that holds it and "
            f"its {DICTIONARY_CONFIG}"
        )
    found = section(path, data, "model_state_dict")
    config = _plain(section(path, data, "config"))
    if "threshold" in data:
        tensors = checked(path, {**found, "threshold": data["threshold"]}, (*NAMES, "threshold"))
        return _join(path, tensors, store, config, content={"k": config.get("k")})
    tensors = checked(path, found, NAMES)
    k = config.get("k")
    if not isinstance(k, int | float) or not 0 < k <= len(tensors["b_enc"]):
        raise ArtifactError(
            f"{path} has k {k} in its config, expected 1 to {len(tensors['b_enc'])}"
        )
    content = {"k": k, "config": config, "published": True}
    parents = {"activations": store.digest} if store is not None else {}
    sae = _join(path, tensors, store, config, content=content, parents=parents)
    assert store is not None, "_join refuses it"
    store = sae.narrow(store)
    log.warning("%s has no threshold: calibrating one on %s at k %g", path, store.path, k)
    return sae.calibrated(store, np.flatnonzero(store.eligible), k)


def _read_saelens(path: Path, store: ActivationStore | None) -> SAE:
    """Read a folder of SAELens 6, or of 3 to 5, whose config has no version of the format."""
    config = read_object(path / SAELENS_CONFIG)
    kind = str(config.get("architecture", "standard"))
    activation = str(config.get("activation_fn_str") or config.get("activation_fn") or "relu")
    if activation != "relu":
        kind = activation
    if kind not in _SAELENS:
        raise ArtifactError(
            f"{path} is an SAE of SAELens of architecture {kind} "
            f"({_WHY_NOT.get(kind, 'not known here')}); lorascope reads {' and '.join(_SAELENS)}"
        )
    normalize = config.get("normalize_activations") or "none"
    if normalize != "none":
        raise ArtifactError(
            f"{path} normalizes its rows (normalize_activations: {normalize}), expected none: "
            "fold the factor into the weights in SAELens, and save it again"
        )
    found = read_safetensors(path / WEIGHTS)
    if not (found.pop("scaling_factor", torch.ones(1)) == 1).all():
        raise ArtifactError(f"{path} has a scaling_factor, which has no place in lorascope's form")
    if kind == "standard":
        found["threshold"] = torch.zeros(_width(found))
    tensors = checked(path / WEIGHTS, found, (*NAMES, "threshold"))
    if config.get("apply_b_dec_to_input", True):
        tensors["b_enc"] = _without_shift(tensors)
    tensors["threshold"].clamp_(min=0.0)
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    columns = metadata.get("columns") if "lorascope_version" in metadata else None
    if store is not None and columns not in (None, list(store.layout.column_names)):
        raise ArtifactError(
            f"{path} has other columns than {store.path}: they come from different adapters; use "
            "a matching pair"
        )
    content = {
        "architecture": str(metadata.get("training_architecture") or kind),
        "k": config.get("k", metadata.get("k")),
    }
    return _join(path, tensors, store, _plain(config), content=content)


def _read_dictionary(path: Path, store: ActivationStore | None) -> SAE:
    config = read_object(path / DICTIONARY_CONFIG)
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    name = str(trainer.get("dict_class"))
    if name not in _CLASSES:
        raise ArtifactError(
            f"{path} is a dictionary of class {name}, expected one with a threshold: "
            f"{', '.join(_CLASSES)}"
        )
    architecture, is_shifted = _CLASSES[name]
    found = read_pt(path / DICTIONARY)
    for ours, theirs in _TURNED.items():
        if isinstance(tensor := found.get(theirs), Tensor):
            found[ours] = tensor.T if tensor.ndim == 2 else tensor
    threshold = found.get("threshold")
    if isinstance(threshold, Tensor) and threshold.ndim == 0:
        if threshold < 0:
            log.warning("%s: its training has set no threshold; all positive values fire", path)
        found["threshold"] = threshold.expand(_width(found))
    tensors = checked(path / DICTIONARY, found, (*NAMES, "threshold"))
    if is_shifted:
        tensors["b_enc"] = _without_shift(tensors)
    tensors["threshold"].clamp_(min=0.0)
    content = {"architecture": architecture, "k": trainer.get("k")}
    return _join(path, tensors, store, _plain(config), content=content)


def _width(found: Mapping[str, Any]) -> int:
    b_enc = found.get("b_enc")
    return b_enc.numel() if isinstance(b_enc, Tensor) else 0


def _without_shift(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the `b_enc` of raw rows where the encoder expects `row - b_dec`."""
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
    return (tensors["b_enc"].double() - shift).float()


def _join(
    path: Path,
    tensors: dict[str, Tensor],
    store: ActivationStore | None,
    config: dict[str, Any],
    *,
    content: dict[str, Any],
    parents: Mapping[str, str] | None = None,
) -> SAE:
    """Return the SAE of foreign weights over the columns of the store."""
    threshold = tensors.pop("threshold", None)
    if store is None:
        also = "" if threshold is not None else ", and has no threshold"
        raise ArtifactError(
            f"{path} does not say what its columns are{also}; give the activation store too"
        )
    types = config.get("adapter_types") or []
    if types := parse_adapter_types(
        [str(t) for t in (types if isinstance(types, list) else [types])]
    ):
        store = store.select(types)
    if store.d_in != len(tensors["b_dec"]):
        raise ArtifactError(
            f"{path} expects d_in {len(tensors['b_dec'])}, {store.path} has {store.d_in}: they "
            "come from different adapters; use a matching pair"
        )
    if not isinstance(content["k"], int | float):
        del content["k"]
    manifest = make_manifest(
        KIND,
        SCHEMA,
        settings=config,
        parents=parents or {},
        layout=store.layout.to_json(),
        content=content,
    )
    sae = SAE(**tensors, threshold=threshold, layout=store.layout, manifest=manifest)
    return sae.sealed()


def _plain(value: Any) -> Any:
    """Return a value of a foreign config as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    exact = isinstance(value, str | int | None) or (isinstance(value, float) and np.isfinite(value))
    return value if exact else str(value)
