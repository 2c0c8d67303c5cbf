"""Read the tensors of an adapter: a safetensors file, a pickle of older PEFT, or a file of MLX.

Pickles and MLX files become the bytes of a safetensors file with PEFT's names; nothing is written.

1. A pickle, `adapter_model.bin`, is read with torch's `weights_only`, which runs no code.
2. MLX saves `adapters.safetensors`. Its `lora_a` is `(d_x, rank)` and its `lora_b` `(rank, d_y)`:
   the transposes of PEFT's `A` and `B`. It adds `scale·B·A·x`, so `lora_alpha` is `scale·rank`.
"""

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from lorascope.artifact import BLOCK
from lorascope.errors import AdapterError, first_line

log = logging.getLogger(__name__)

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MLX = "adapters.safetensors"
READABLE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MLX_NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[ab])$")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")


class TensorFile:
    """Reads a safetensors file tensor by tensor, without torch: NumPy has no bfloat16.

    The file is a path, or its bytes. `shapes` and `dtypes` are by tensor name. Raises AdapterError
    if the file is damaged.
    """

    def __init__(self, file: Path | bytes) -> None:
        self.file = file
        if isinstance(file, Path):
            _require_whole(file)
        with self._stream() as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        self._header, self._start = header, 8 + length
        self.shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes = {name: str(entry["dtype"]) for name, entry in header.items()}

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The bytes of the header, in blocks, and of each tensor: first, and after the last."""
        headers = [(i, min(i + BLOCK, self._start)) for i in range(0, self._start, BLOCK)]
        offsets = sorted(tuple(entry["data_offsets"]) for entry in self._header.values())
        return [*headers, *((self._start + first, self._start + end) for first, end in offsets)]

    def _stream(self) -> io.BufferedReader | io.BytesIO:
        return io.BytesIO(self.file) if isinstance(self.file, bytes) else self.file.open("rb")

    def read(self, name: str) -> npt.NDArray[np.float64]:
        """Return a tensor in float64, which represents every value of the file exactly."""
        entry = self._header[name]
        begin, end = entry["data_offsets"]
        with self._stream() as stream:
            stream.seek(self._start + begin)
            flat = np.frombuffer(stream.read(end - begin), READABLE[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.astype(np.float64).reshape(entry["shape"])


def _require_whole(file: Path) -> None:
    """Raise AdapterError if a safetensors file is damaged."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged or not a safetensors file ({error})") from error


def unpickle(file: Path) -> bytes:
    """Return the tensors of a pickle as a safetensors file, or raise AdapterError."""
    import torch
    from safetensors.torch import save

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for damaged and for forbidden pickles
        raise AdapterError(
            f"{file} cannot be read as tensors alone ({first_line(error)}); load the adapter with "
            "PEFT and save it as adapter_model.safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise AdapterError(f"{file} holds other values than tensors by name; expected an adapter")
    return save({str(name): tensor.detach().clone().contiguous() for name, tensor in state.items()})


def from_mlx(config: dict[str, Any], file: Path) -> tuple[dict[str, Any], bytes]:
    """Return the config and the tensors of an MLX adapter as PEFT has them."""
    kind, parameters = config.get("fine_tune_type", "lora"), config["lora_parameters"]
    if kind != "lora":
        raise AdapterError(f"{file.parent} is an MLX adapter of type {kind}, expected lora")
    if not file.is_file():
        raise AdapterError(f"{file.parent} is an MLX adapter without {MLX}; fuse or save it again")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise AdapterError(f"{file.parent} is an MLX adapter whose config names no scale")
    tensors: dict[str, Any] = {}
    ranks, modules = set[int](), dict[str, None]()
    held = TensorFile(file)
    if other := set(held.dtypes.values()) - READABLE.keys():
        raise AdapterError(f"{file} holds {min(other)} values, expected {', '.join(READABLE)}")
    for name in held.shapes:
        match, value = _MLX_NAME.match(name), held.read(name).astype(np.float32)
        if not match or value.ndim != 2:
            raise AdapterError(
                f"{file} holds {name} of shape {value.shape}, expected lora_a and lora_b matrices; "
                "save the adapter with PEFT's names"
            )
        module, part = match["module"], match["part"].upper()
        modules[module] = None
        ranks.add(value.shape[1 if part == "A" else 0])
        suffix = f"embedding_{part}" if module.endswith(_EMBEDDINGS) else f"{part}.weight"
        tensors[f"base_model.model.{module}.lora_{suffix}"] = np.ascontiguousarray(value.T)
    if len(ranks) != 1:
        raise AdapterError(f"{file} has the ranks {sorted(ranks)}, expected one; is it damaged?")
    (rank,) = ranks
    log.info("%s is an MLX adapter: A and B are transposed, scale is %g", file.parent, scale)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.get("model"),
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": list(modules),
    }, safetensors.numpy.save(tensors)
