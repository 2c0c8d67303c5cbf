"""Find a base model's files, and tell them apart from those of other weights.

A base is a folder of safetensors, a GGUF file, or a repository on the hub, of which the files are
downloaded. Two bases are the same if config and weights are; of large files, blocks are compared.
"""

import hashlib
import importlib.util
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorascope.artifact import digest_in_part, require_content
from lorascope.errors import AdapterError, ArtifactError
from lorascope.hub import find_folder, similar
from lorascope.subject.adapter import CONFIG, Adapter, other_purpose
from lorascope.subject.adapter_files import TensorFile

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A base model's files; `name` is a hub id or a path's last part, `digest` identifies it.

    `path` is the folder. `gguf` names the file in it that holds the whole model, if it is a GGUF.
    """

    name: str
    path: Path
    digest: str
    gguf: str | None = None

    @property
    def location(self) -> Path:
        """The GGUF file, or the folder of safetensors."""
        return self.path / (self.gguf or "")

    @property
    def commit(self) -> str | None:
        """The commit on the hub, if the folder is in the hub's cache."""
        return self.path.name if self.path.parent.name == "snapshots" else None

    @property
    def source(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` needs to find model or tokenizer."""
        named = {"gguf_file": self.gguf} if self.gguf else {}
        return {"pretrained_model_name_or_path": str(self.path), **named}

    @property
    def n_parameters(self) -> int:
        """How many parameters its files hold; for a GGUF file, its number of bytes."""
        if self.gguf:
            return self.location.stat().st_size
        files = map(TensorFile, self.path.glob("model*.safetensors"))
        return sum(math.prod(shape) for file in files for shape in file.shapes.values())

    def model_class(self) -> Any:
        """Return transformers' class for it: a causal language model, or one that sees images too.

        Raises AdapterError if it is neither.
        """
        import transformers
        from transformers.models.auto import modeling_auto as auto

        causal, seeing = auto.AutoModelForCausalLM, auto.AutoModelForImageTextToText
        if self.gguf:
            return causal
        try:
            config: Any = transformers.AutoConfig.from_pretrained(
                str(self.path), trust_remote_code=False
            )
        except Exception:  # its classes check values in their own ways
            return causal  # it fails in the same way, and says why
        name = config.model_type
        decodes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
        if getattr(config, "is_encoder_decoder", False):
            kind = "a sequence-to-sequence model"
        elif name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
            kind = "an encoder"
        elif name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return causal
        elif name in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return seeing
        elif hasattr(config, "auto_map"):
            return causal
        else:
            kind = f"a {name}"
        raise AdapterError(
            f"base model {self.name} is {kind} ({', '.join(config.architectures or [name])}); "
            "lorascope studies causal language models"
        )

    def require_same(self, digest: str | None, path: Path) -> None:
        """Raise ArtifactError if `path` was made with a base of another digest, warn if of None."""
        if digest is None:
            log.warning(
                "%s does not say which weights its base model had: it is not compared with %s",
                path,
                self.name,
            )
        elif digest != self.digest:
            raise ArtifactError(
                f"{path} was made with another base model than {self.name}, or with other weights "
                "of it; name its base model with --base-model and --base-revision"
            )


def find_base(adapter: Adapter, base_model: str | None, revision: str | None = None) -> Base:
    """Find the base model: the given one, else the one that the adapter names.

    `revision` is a version of it on the hub: a branch, tag or commit. The adapter's config may name
    one, which belongs to the base model that it names.
    """
    if purpose := other_purpose(adapter):
        raise AdapterError(
            f"adapter {adapter.name} was made for {purpose}; lorascope studies causal language "
            "models"
        )
    own = adapter.config.get("base_model_name_or_path")
    named = base_model or own
    if not named:
        raise AdapterError(
            f"{adapter.path / CONFIG} names no base model; give one with --base-model"
        )
    relative = adapter.path / str(named)
    is_beside = relative.exists() or (str(named).startswith(".") and not Path(named).exists())
    source = str(relative.resolve()) if not base_model and is_beside else str(named)
    is_here = Path(source).expanduser().exists()
    if revision and is_here:
        raise AdapterError(
            f"base model {source} is on this machine, where it has one version; give "
            "--base-revision with a hub id"
        )
    if named == own and not is_here:
        revision = revision or adapter.config.get("revision")
    gguf = _find_gguf(Path(source).expanduser())
    if gguf is not None:
        with gguf.open("rb") as file:  # it holds config and tokenizer too
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Base(gguf.name, gguf.parent, digest, gguf.name)
    name = Path(source).expanduser().name if is_here else source
    try:
        folder = find_folder(source, "base model", ["config.json"], revision=revision)
        if not (folder / "config.json").is_file():
            raise AdapterError(
                f"base model {source} has no config.json; give the folder of a model"
            )
        Base(name, folder, "").model_class()  # raises before weights are downloaded
        patterns = ["*.json", "*.safetensors", "*token*", "*.jinja", "merges.txt"]
        folder = find_folder(source, "base model", patterns, revision=revision)
    except AdapterError as error:
        raise AdapterError(f"{error}; --base-model names the base of {adapter.name}") from error
    return Base(name, folder, digest_base(folder))


def other_base(adapter: Adapter, base: Base) -> str | None:
    """Return the base that an adapter names, if it seems to be another one than `base`.

    A base at the place that it names is compared by its weights, any other by the last part of its
    name: a folder, a hub id, or the beginning of a GGUF file's name.
    """
    own = adapter.config.get("base_model_name_or_path")
    if not own or own == base.name:
        return None
    for path in (adapter.path / str(own), Path(str(own)).expanduser()):
        if path.exists() and path.resolve() == base.location.resolve():
            return None
        if (path / "config.json").is_file():
            return None if digest_base(path) == base.digest else str(own)
    wanted = Path(str(own)).name.casefold()
    parts = {part.casefold().rpartition("--")[2] for part in (*base.path.parts, base.name)}
    parts |= {part.rpartition("/")[2] for part in parts}
    is_same = wanted in parts or (base.gguf or "").casefold().startswith(wanted)
    return None if is_same else str(own)


def _find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that a path names, or that is the only model in the folder it names."""
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise AdapterError(
                f"{path} holds {len(files)} GGUF files ({', '.join(f.name for f in files[:5])}); "
                "give one of them with --base-model"
            )
        path = files[0] if files else path
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        hint = similar(path, lambda other: other.suffix == ".gguf")
        raise AdapterError(
            f"base model {path} does not exist{hint}; give its file with --base-model"
        )
    require_content(path, AdapterError)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise AdapterError(f"base model {path} is not a GGUF file: it begins with {magic!r}")
    if importlib.util.find_spec("gguf") is None:
        raise AdapterError(
            f"base model {path} is a GGUF file, which needs the package gguf: "
            "pip install 'lorascope[gguf]'"
        )
    return path


def digest_base(folder: Path) -> str:
    """Return a digest of a base model's config and of its weights, which may be 60 GB.

    Of each shard it reads the header and some blocks of every tensor. A copy has the same digest,
    wherever it comes from.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        try:
            ranges = TensorFile(file).ranges
        except AdapterError as error:
            raise AdapterError(f"base model {folder} cannot be loaded ({error})") from error
        digest.update(f"{file.name} {digest_in_part(file, ranges)}".encode())
    return digest.hexdigest()
