"""Read the weights of SAE files: lorascope's own and those of other libraries.

Files may come from strangers: no code in them runs, and nothing is guessed. Other libraries' files
differ in three ways. Reading folds the differences away, so that `code = pre * (pre > threshold)`
with `pre = row @ W_enc + b_enc` gives the codes that the library computes at inference:

1. Some encode `row - b_dec`: then `b_enc - b_dec @ W_enc`, in float64, becomes `b_enc`.
2. All apply a ReLU before the threshold: a threshold below 0 acts as 0.
3. Some store matrices transposed (`torch.nn.Linear`), or one threshold for all latents.

A latent's value is compared as it was saved: decoder rows keep their norms. None of the files says
which column belongs to which LoRA site, so a store of the same width must be given.

- *published scripts*: one `.pt` with `model_state_dict` and `config`. It has no threshold;
  `load_sae` calibrates one on the store.
- *SAELens*: `cfg.json` and `sae_weights.safetensors`, architectures `standard` and `jumprelu`.
- *dictionary_learning*: `ae.pt` and `config.json`, the classes that have a threshold.
"""

import glob
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorascope.artifact import MANIFEST
from lorascope.errors import ArtifactError, NumberError, first_line
from lorascope.hub import find_folder, read_json_object

log = logging.getLogger(__name__)

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "bool")
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError)
WEIGHTS = "sae_weights.safetensors"
SAELENS_CONFIG = "cfg.json"
DICTIONARY = "ae.pt"
DICTIONARY_CONFIG = "config.json"
_READABLE = (
    f"lorascope reads its own folder ({MANIFEST}), SAELens ({SAELENS_CONFIG}, {WEIGHTS}), "
    f"dictionary_learning ({DICTIONARY}, {DICTIONARY_CONFIG}), and .pt files of its own or of the "
    "published scripts"
)
_SAELENS = ("standard", "jumprelu")
_WHY_NOT = {
    "topk": "its latents fire by their rank in a row, not above a threshold",
    "batchtopk": "a training checkpoint; save_inference_model turns it into a jumprelu",
    "matryoshka_batchtopk": "a training checkpoint; save_inference_model turns it into a jumprelu",
    "gated": "its gate has a separate encoder",
}
# Classes of dictionary_learning with a threshold: lorascope's name of the architecture, and whether
# they encode `row - b_dec`.
_CLASSES = {
    "BatchTopKSAE": ("batchtopk", True),
    "MatryoshkaBatchTopKSAE": ("matryoshka", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
}
_TRANSPOSED = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}


@dataclass(frozen=True)
class ForeignSAE:
    """What a file of another library holds, in lorascope's form.

    `tensors` has `NAMES`, and `threshold` unless one must be calibrated. `config` is the file's
    own, as JSON values; `content` goes into the manifest. `columns` are the column names if
    lorascope wrote the file.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    content: dict[str, Any]
    columns: list[str] | None = None


def download(name: str, revision: str | None = None) -> Path:
    """Return the path of a local SAE, or of the local copy of one on the hub.

    A hub name is `owner/name` or `owner/name:inside`, a folder or a `.pt` file; only the files of
    the SAE are downloaded. Raises ArtifactError if the hub does not have it.
    """
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise ArtifactError(f"{name} is a local path, which has no revision {revision}")
        return path
    repo, _, inside = name.partition(":")
    if ".." in PurePosixPath(inside).parts or inside.startswith("/"):
        raise ArtifactError(f"{inside} is not a path inside the hub repository {repo}")
    files = (MANIFEST, SAELENS_CONFIG, WEIGHTS, DICTIONARY, DICTIONARY_CONFIG)
    escaped = glob.escape(inside.rstrip("/"))  # the hub's client treats names as patterns
    if inside.endswith(".pt"):
        patterns = [escaped]
    else:
        patterns = [f"{escaped}/{file}" if escaped else file for file in files]
    folder = find_folder(repo, "SAE", patterns, revision=revision, error_type=ArtifactError)
    if not (folder / inside).exists():
        raise ArtifactError(f"the hub repository {repo} has no {inside}; check its files")
    return folder / inside


def read_foreign(path: Path) -> ForeignSAE:
    """Read an SAE file that is not an artifact of lorascope, on the CPU.

    Raises ArtifactError if it is of an unknown kind, damaged, or cannot be expressed in lorascope's
    form.
    """
    if path.name == DICTIONARY and (path.parent / DICTIONARY_CONFIG).is_file():
        path = path.parent
    try:
        if path.suffix == ".pt" and path.is_file():
            return _read_published(path)
        files = {file.name for file in path.iterdir()} if path.is_dir() else {path.name}
        if MANIFEST in files:
            raise ArtifactError(
                f"{path / MANIFEST} is damaged or not of lorascope; download it again"
            )
        if {SAELENS_CONFIG, WEIGHTS} <= files and path.is_dir():
            return _read_saelens(path)
        if {DICTIONARY, DICTIONARY_CONFIG} <= files and path.is_dir():
            return _read_dictionary(path)
    except RecursionError as error:  # a config that contains itself
        raise ArtifactError(f"{path} has a damaged config; download it again") from error
    held = ", ".join(sorted(files)[:5]) or "nothing"
    raise ArtifactError(f"{path} is not a known SAE file (found: {held}); {_READABLE}")


def _read_published(path: Path) -> ForeignSAE:
    data = read_pt(path)
    if "encoder.weight" in data:
        raise ArtifactError(
            f"{path} is an {DICTIONARY} of dictionary_learning; give the folder that holds it and "
            f"its {DICTIONARY_CONFIG}"
        )
    weights = section(path, data, "model_state_dict")
    config = _json_values(section(path, data, "config"))
    if "threshold" in data:
        tensors = checked(path, {**weights, "threshold": data["threshold"]}, (*NAMES, "threshold"))
        return ForeignSAE(tensors, config, {"k": config.get("k")})
    tensors = checked(path, weights, NAMES)
    k = config.get("k")
    if not isinstance(k, int | float) or not 0 < k <= len(tensors["b_enc"]):
        raise ArtifactError(
            f"{path} has k {k} in its config, expected 1 to {len(tensors['b_enc'])}"
        )
    return ForeignSAE(tensors, config, {"k": k, "config": config, "published": True})


def _read_saelens(path: Path) -> ForeignSAE:
    """Read a folder of SAELens 6, or of SAELens 3 to 5, whose config has no format version."""
    config = read_json_object(path / SAELENS_CONFIG, ArtifactError)
    kind = str(config.get("architecture", "standard"))
    activation = str(config.get("activation_fn_str") or config.get("activation_fn") or "relu")
    if activation != "relu":
        kind = activation
    if kind not in _SAELENS:
        raise ArtifactError(
            f"{path} is an SAE of SAELens of architecture {kind} "
            f"({_WHY_NOT.get(kind, 'unknown to lorascope')}); "
            f"lorascope reads {' and '.join(_SAELENS)}"
        )
    normalize = config.get("normalize_activations") or "none"
    if normalize != "none":
        raise ArtifactError(
            f"{path} normalizes its rows (normalize_activations: {normalize}), expected none: "
            "fold the factor into the weights in SAELens and save it again"
        )
    weights = read_safetensors(path / WEIGHTS)
    if not (weights.pop("scaling_factor", torch.ones(1)) == 1).all():
        raise ArtifactError(f"{path} has a scaling_factor, which lorascope's form cannot express")
    if kind == "standard":
        weights["threshold"] = torch.zeros(_width(weights))
    tensors = checked(path / WEIGHTS, weights, (*NAMES, "threshold"))
    if config.get("apply_b_dec_to_input", True):
        tensors["b_enc"] = _without_shift(tensors)
    tensors["threshold"].clamp_(min=0.0)
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    columns = metadata.get("columns") if "lorascope_version" in metadata else None
    content = {
        "architecture": str(metadata.get("training_architecture") or kind),
        "k": config.get("k", metadata.get("k")),
    }
    return ForeignSAE(tensors, _json_values(config), content, columns)


def _read_dictionary(path: Path) -> ForeignSAE:
    config = read_json_object(path / DICTIONARY_CONFIG, ArtifactError)
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    name = str(trainer.get("dict_class"))
    if name not in _CLASSES:
        raise ArtifactError(
            f"{path} is a dictionary of class {name}, expected a class with a threshold: "
            f"{', '.join(_CLASSES)}"
        )
    architecture, is_shifted = _CLASSES[name]
    weights = read_pt(path / DICTIONARY)
    for name, name_there in _TRANSPOSED.items():
        if isinstance(tensor := weights.get(name_there), Tensor):
            weights[name] = tensor.T if tensor.ndim == 2 else tensor
    threshold = weights.get("threshold")
    if isinstance(threshold, Tensor) and threshold.ndim == 0:
        if threshold < 0:
            log.warning("%s: training has not set a threshold; all positive values fire", path)
        weights["threshold"] = threshold.expand(_width(weights))
    tensors = checked(path / DICTIONARY, weights, (*NAMES, "threshold"))
    if is_shifted:
        tensors["b_enc"] = _without_shift(tensors)
    tensors["threshold"].clamp_(min=0.0)
    content = {"architecture": architecture, "k": trainer.get("k")}
    return ForeignSAE(tensors, _json_values(config), content)


def _width(weights: Mapping[str, Any]) -> int:
    b_enc = weights.get("b_enc")
    return b_enc.numel() if isinstance(b_enc, Tensor) else 0


def _without_shift(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the `b_enc` for raw rows of an encoder that expects `row - b_dec`."""
    shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
    return (tensors["b_enc"].double() - shift).float()


def _json_values(value: Any) -> Any:
    """Return a value of a foreign config as JSON values; anything else becomes text."""
    if isinstance(value, dict):
        return {str(key): _json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_values(item) for item in value]
    exact = isinstance(value, str | int | None) or (isinstance(value, float) and np.isfinite(value))
    return value if exact else str(value)


def read_pt(path: Path) -> dict[str, Any]:
    """Return the contents of a `.pt` file on the CPU, with NumPy scalars as Python numbers.

    A `.pt` file is a pickle, which can name any function to call. It is read with torch's
    `weights_only`, which allows a short list of names. NumPy arrays of numbers and NumPy scalars
    are allowed too, because the published scripts save them next to the tensors.

    Raises ArtifactError if the file is missing, damaged, not a dictionary, or names anything else.
    """
    rebuild: Any = np.zeros(1, np.float32).__reduce__()[0]
    allowed: list[Any] = [np.ndarray, np.dtype]
    allowed += [type(np.dtype(name)) for name in _NUMBERS]
    for core in ("core", "_core"):  # of NumPy 1 and of NumPy 2
        allowed.append((rebuild, f"numpy.{core}.multiarray._reconstruct"))
        allowed.append((_scalar, f"numpy.{core}.multiarray.scalar"))
    try:
        with torch.serialization.safe_globals(allowed):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path} is refused: it holds more than plain tensors and may run code when it is read"
        ) from error
    except _DAMAGED as error:
        raise ArtifactError(f"{path} is damaged or not a .pt file ({first_line(error)})") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds a {type(data).__name__}, expected an SAE")
    return data


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises ArtifactError if it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); train or download it again") from error


def section(path: Path, data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the dictionary that a file holds under `key`."""
    if not isinstance(value := data.get(key), dict):
        held = ", ".join(sorted(str(name) for name in data)[:5]) or "nothing"
        raise ArtifactError(
            f"{path} holds {held}, expected {key}: it is not an SAE of lorascope or of the "
            "published scripts"
        )
    return value


def checked(path: Path, data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the named tensors as float32. Raises ArtifactError if their shapes do not match."""
    for name in names:
        tensor = data.get(name)
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_complex():
            raise ArtifactError(f"{path} has no tensor {name}: it is damaged or not an SAE")
    shape = tuple(data["W_enc"].shape)
    d_in, d_sae = shape if len(shape) == 2 else (0, 0)
    expected = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    weights = {name: data[name].detach().to(torch.float32).contiguous() for name in names}
    for name, tensor in weights.items():
        if tuple(tensor.shape) != expected[name]:
            raise ArtifactError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]} for "
                f"W_enc {shape}"
            )
        if not torch.isfinite(tensor).all():
            raise NumberError(f"{path}: {name} is not finite; train again with a lower --lr")
    return weights


def _scalar(dtype: Any, data: Any = None) -> float | int:
    """Return a pickled NumPy scalar as a Python number, in place of NumPy's own function.

    NumPy's function can also build objects; this one accepts a dtype and as many bytes only.
    """
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a NumPy scalar that is not a number")
    if len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("a NumPy scalar whose size does not fit its dtype")
    return np.frombuffer(data, dtype)[0].item()
