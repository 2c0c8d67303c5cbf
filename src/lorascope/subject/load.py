"""Load a base model with its PEFT LoRA adapter, and prove that it really loaded.

1. `inspect_adapter` reads the adapter's config and the header of its safetensors file, and refuses
   what is no LoRA, holds empty tensors, or is a pickle.
2. `load_subject` loads the base model, puts fresh LoRA modules into it, and compares the tensors
   that these need with those in the file, by name and shape, before it loads them. PEFT alone
   would leave a missing tensor at its random start and go on.
3. After loading: every adapter tensor equals the file's bit by bit, every module is in eval mode,
   nothing is merged, and at least one `lora_B` is not zero.
"""

import hashlib
import json
import logging
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorascope.errors import AdapterError, ConfigError
from lorascope.sites import Site, SiteLayout

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HOW = (
    "no adapter given: pass --lora-path FOLDER_OR_HUB_ID, or put lora_path = ... into "
    "lorascope.toml (examples/lorascope.toml names the shipped demo adapter)"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files tell it: `shapes` by tensor name, and `digest` over both files."""

    path: Path
    name: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    digest: str


@dataclass(frozen=True)
class Base:
    """A base model's files; `name` is a hub id or a folder's last part, `digest` identifies it."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Subject:
    """A loaded base model with its adapter on, in eval mode.

    `sites[i]` is the `lora_A` module of site i of `layout`. `tokenizer` is the adapter's own where
    its folder has one, else the base model's.
    """

    model: nn.Module
    tokenizer: Any
    layout: SiteLayout
    sites: tuple[nn.Module, ...]
    adapter: Adapter
    base: Base
    device: torch.device
    dtype: torch.dtype

    @property
    def causal(self) -> Any:
        """The causal language model inside PEFT's wrappers, its layers adapted."""
        return self.model.get_submodule("base_model.model")

    @cached_property
    def backbone(self) -> Callable[..., Any]:
        """The part to run: without the lm_head, unless the adapter sits on it."""
        causal = self.causal
        backbone = getattr(causal, str(causal.base_model_prefix), causal)
        inside = set(backbone.modules())
        return backbone if all(site in inside for site in self.sites) else causal

    @property
    def max_length(self) -> int | None:
        """Longest text in tokens that the model was made for, or None where it does not say."""
        return getattr(self.causal.config, "max_position_embeddings", None)


def inspect_adapter(lora_path: str | None) -> Adapter:
    """Read an adapter's config and tensor header. Raises AdapterError when it is no sound LoRA."""
    if not lora_path:
        raise AdapterError(_HOW)
    path = find_folder(lora_path, "adapter", [CONFIG, WEIGHTS, "*token*", "*.jinja", "vocab*"])
    if not (path / CONFIG).is_file():
        what = "it holds a full model" if (path / "config.json").exists() else "it has no " + CONFIG
        raise AdapterError(f"{path} is no PEFT adapter ({what}); give the folder that PEFT saved")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path / CONFIG} is not JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path} is an adapter of type {kind}, lorascope reads LORA adapters")
    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").exists()
        what = "only a pickled adapter_model.bin, which can run code" if pickled else "no weights"
        raise AdapterError(f"{path} holds {what}; save the adapter as {WEIGHTS}")
    shapes = _shapes_of(path / WEIGHTS)
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise AdapterError(
            f"{path / WEIGHTS} holds empty tensors ({empty[0]}): it was saved from sharded "
            "weights; gather them before saving"
        )
    if not any("lora_A" in name for name in shapes):
        raise AdapterError(f"{path / WEIGHTS} holds no lora_A tensor: it is no LoRA adapter")
    digest = hashlib.sha256()
    for file in (WEIGHTS, CONFIG):
        digest.update((path / file).read_bytes())
    return Adapter(path, Path(lora_path).name, config, shapes, digest.hexdigest())


def find_folder(name: str, what: str, patterns: list[str]) -> Path:
    """Return a local folder, or the local copy of a hub repository of that name.

    Raises AdapterError when a path does not exist (a path never becomes a hub request), or when
    the hub cannot give the repository.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") != 1
    if is_path or path.exists():
        raise AdapterError(f"{what} folder {name} does not exist{_similar(path)}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # any of a dozen types, all of which mean: it cannot be had
        raise AdapterError(
            f"{what} {name} is no folder here, and the hub does not give it "
            f"({_first_line(error)}); check the name, the network and your login"
        ) from error


def find_base(adapter: Adapter, base_model: str | None) -> Base:
    """Find the base model asked for, else the one that the adapter names, in full or relatively."""
    named = base_model or adapter.config.get("base_model_name_or_path")
    if not named:
        raise AdapterError(
            f"{adapter.path / CONFIG} names no base model; give one with --base-model"
        )
    beside = adapter.path / str(named)
    place = str(beside.resolve()) if not base_model and beside.is_dir() else str(named)
    patterns = ["*.json", "*.safetensors", "*token*", "*.jinja", "merges.txt"]
    try:
        folder = find_folder(place, "base model", patterns)
    except AdapterError as error:
        raise AdapterError(f"{error}; --base-model names the base of {adapter.name}") from error
    if not (folder / "config.json").is_file():
        raise AdapterError(f"base model {place} has no config.json; give the folder of a model")
    return Base(folder.name if Path(place).exists() else place, folder, _digest_base(folder))


def load_tokenizer(adapter: Adapter, base: Base) -> Any:
    """Return the adapter's own tokenizer where its folder has one, else the base model's."""
    own = (adapter.path / "tokenizer_config.json").is_file()
    source = str(adapter.path if own else base.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except (OSError, ValueError) as error:
        raise AdapterError(f"no tokenizer in {source} ({_first_line(error)})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise AdapterError(f"the tokenizer of {source} has no fast form, which offsets need")
    return tokenizer


def load_subject(
    adapter: Adapter, base: Base, tokenizer: Any, device: torch.device, dtype: str
) -> Subject:
    """Load base and adapter, and check everything that step 2 and 3 of the module's text name.

    `dtype` is `auto` (float32 on the CPU, else what the checkpoint says) or a key of `DTYPES`.
    """
    model = _wrap(_load_base(base.path, device, dtype), adapter, base.name)
    tensors = load_file(adapter.path / WEIGHTS)
    _compare(model, adapter, base.name)
    set_peft_model_state_dict(model, tensors)
    _require_equal(model, tensors, adapter)
    model.to(device)
    model.eval()
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise AdapterError(
            f"module {training[0]} stays in training mode: dropout would change rows"
        )
    layout, sites = _sites_of(model, adapter)
    return Subject(
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        sites=sites,
        adapter=adapter,
        base=base,
        device=device,
        dtype=next(model.parameters()).dtype,
    )


def _load_base(folder: Path, device: torch.device, dtype: str) -> nn.Module:
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype is {dtype}, expected auto, {', '.join(DTYPES)}")
    wanted = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else "auto")
    try:
        AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise AdapterError(
            f"base model {folder} cannot be loaded ({_first_line(error)})"
        ) from error
    return model


def _wrap(base: nn.Module, adapter: Adapter, base_model: str) -> PeftModel:
    try:
        config = LoraConfig.from_pretrained(str(adapter.path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel(base, config)  # type: ignore[arg-type]  # any nn.Module will do
    except ValueError as error:
        raise AdapterError(
            f"adapter {adapter.name} does not fit base model {base_model}: {_first_line(error)}"
        ) from error
    except TypeError as error:
        raise AdapterError(
            f"{adapter.path / CONFIG} has keys that this PEFT does not know "
            f"({_first_line(error)}); install a newer peft"
        ) from error
    return model


def _compare(model: PeftModel, adapter: Adapter, base_model: str) -> None:
    """Raise AdapterError unless the file holds exactly the tensors that the model needs."""
    found = adapter.shapes
    expected = {name: tuple(tensor.shape) for name, tensor in _state_of(model).items()}
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if wrong:
        name = wrong[0]
        raise AdapterError(
            f"adapter {adapter.name} is for another base than {base_model}: {name} is "
            f"{found[name]} in the file, {expected[name]} in the model ({len(wrong)} such tensors)"
        )
    if missing or extra:
        kind, names = ("lacks", missing) if missing else ("has unknown", extra)
        hint = "another base model, a custom adapter name or a wrapper's prefix are likely causes"
        raise AdapterError(
            f"adapter {adapter.name} {kind} {len(names)} tensors ({', '.join(names[:5])}); {hint}"
        )


def _require_equal(model: PeftModel, tensors: dict[str, Tensor], adapter: Adapter) -> None:
    for name, loaded in _state_of(model).items():
        if not torch.equal(loaded.cpu(), tensors[name].to(loaded.dtype)):
            raise AdapterError(f"after loading, {name} differs from the file of {adapter.name}")
    if all(not tensor.any() for name, tensor in tensors.items() if "lora_B" in name):
        log.warning("every lora_B of %s is zero: the adapter has no effect", adapter.name)


def _state_of(model: PeftModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _sites_of(model: PeftModel, adapter: Adapter) -> tuple[SiteLayout, tuple[nn.Module, ...]]:
    """Find every `lora_A` of the live model, with the scale that PEFT applies there."""
    name = str(model.active_adapter)
    found: list[tuple[Site, nn.Module]] = []
    for path, module in model.get_submodule("base_model.model").named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if module.merged:
            raise AdapterError(f"{path} is merged into the base: its lora_A never runs")
        if name in module.lora_embedding_A:
            raise AdapterError(f"{path} is an adapted embedding, which has no A·x to read")
        if module.use_dora.get(name):
            log.warning("%s is DoRA: its output is not base + scale·B·A·x", path)
        b_matrix = (
            model.get_parameter(f"base_model.model.{path}.lora_B.{name}.weight").detach().double()
        )
        layer = re.search(r"\.(\d+)\.", path)
        site = Site(
            layer=int(layer.group(1)) if layer else -1,
            projection=path.rsplit(".", 1)[-1],
            rank=int(module.r[name]),
            module=path,
            scale=float(module.scaling[name]),
            b_norms=tuple(b_matrix.norm(dim=0).tolist()),
        )
        if not math.isfinite(sum(site.b_norms)):
            raise AdapterError(f"lora_B of {path} is not finite: the adapter is damaged")
        found.append((site, model.get_submodule(f"base_model.model.{path}.lora_A.{name}")))
    if not found:
        raise AdapterError(f"adapter {adapter.name} adapts no module of this base model")
    found.sort(key=lambda item: item[0].order)
    layout = SiteLayout(tuple(site for site, _ in found), adapter.digest)
    return layout, tuple(module for _, module in found)


def _shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="np") as tensors:
            names = tensors.keys()
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged or no safetensors file ({error})") from error


def _digest_base(folder: Path) -> str:
    """Identify a base model by its config and the headers' sizes: its weights may be 60 GB."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()


def _similar(path: Path) -> str:
    from lorascope.config import nearest

    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [child.name for child in path.parent.iterdir() if child.is_dir()])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
