"""Tensors out of files that somebody else may have made: nothing in them runs, nothing is guessed.

A `.pt` file is a pickle, which can name any function to call. It is read with torch's
`weights_only`, which knows a short list of names; added here are NumPy arrays of numbers and NumPy
scalars, because the published scripts save them beside the tensors.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from lorascope.errors import ArtifactError, NumberError

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "bool")
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError)


def read_pt(path: Path) -> dict[str, Any]:
    """Return what a `.pt` file holds, on the CPU, NumPy scalars as Python's.

    Raises ArtifactError where it is missing, damaged, no dictionary, or names anything but
    tensors, NumPy arrays of numbers and NumPy scalars.
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
            f"{path} is refused: it is no plain file of tensors and may run code when it is read"
        ) from error
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise ArtifactError(f"{path} is damaged or no .pt file ({reason})") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds a {type(data).__name__}, expected an SAE")
    return data


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises ArtifactError where it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); train or download it again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds. Raises ArtifactError where it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged or not JSON ({error}); get it anew") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds a {type(data).__name__}, expected an SAE's config")
    return data


def section(path: Path, data: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the dictionary that a file holds under `key`."""
    if not isinstance(found := data.get(key), dict):
        held = ", ".join(sorted(str(name) for name in data)[:5]) or "nothing"
        raise ArtifactError(
            f"{path} holds {held}, and no {key}: it is no SAE of lorascope or the published scripts"
        )
    return found


def checked(path: Path, found: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the named tensors as float32 once they have the shapes that belong together."""
    for name in names:
        tensor = found.get(name)
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_complex():
            raise ArtifactError(f"{path} has no tensor {name}: it is no SAE, or damaged")
    shape = tuple(found["W_enc"].shape)
    d_in, d_sae = shape if len(shape) == 2 else (0, 0)
    expected = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    weights = {name: found[name].detach().to(torch.float32).contiguous() for name in names}
    for name, tensor in weights.items():
        if tuple(tensor.shape) != expected[name]:
            raise ArtifactError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, W_enc {shape} asks for "
                f"{expected[name]}"
            )
        if not torch.isfinite(tensor).all():
            raise NumberError(f"{path}: {name} is not finite; train again with a lower --lr")
    return weights


def _scalar(dtype: Any, data: Any = None) -> float | int:
    """Make of a pickled NumPy scalar a Python number; stands in for NumPy's own function.

    NumPy's would also build what holds other objects; here a dtype and as many bytes are all.
    """
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biuf" or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a NumPy scalar that is no number")
    if len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("a NumPy scalar of another size than its type")
    return np.frombuffer(data, dtype)[0].item()
