"""The sparse autoencoder (SAE) that every stage after training uses, and its file formats.

    pre   = row @ W_enc + b_enc              (batch, d_sae)
    code  = pre * (pre > threshold)
    x_hat = code @ W_dec + b_dec             (batch, d_in)

It takes raw rows: the column scale of training is folded into the weights. Latents are scaled so
that decoder rows have unit norm in scaled columns, so a latent's value is its score, which is
compared with the threshold. A token's code depends on its own row only, to the last bit
(`kernels/encoder.py`).

An SAE is saved as a folder (`cfg.json` and `sae_weights.safetensors`, which SAELens 6 reads, and
`manifest.json`), or as a `.pt` with the keys of the published scripts. `files.py` reads the weights
of these files and of other libraries' files.
"""

import hashlib
import io
import json
import logging
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from lorascope import kernels
from lorascope.activations.batches import RowNumbers, read_blocks
from lorascope.activations.store import ActivationStore
from lorascope.artifact import (
    EMPTY_SEAL,
    Identity,
    Manifest,
    canonical,
    open_manifest,
    read_manifest,
    write_text,
)
from lorascope.errors import ArtifactError, NumberError
from lorascope.kernels.encoder import BLOCK, Encoder
from lorascope.remote import as_path
from lorascope.sae.files import (
    NAMES,
    SAELENS_CONFIG,
    WEIGHTS,
    ForeignSAE,
    checked,
    download,
    read_foreign,
    read_pt,
    read_safetensors,
    section,
)
from lorascope.sae.sparsity import SparseCode, calibrate_threshold
from lorascope.sites import SiteLayout, parse_adapter_types
from lorascope.stage import Build, built

log = logging.getLogger(__name__)

KIND = "sae"
SCHEMA = 1
CALIBRATION_ROWS = 131_072  # with these, the standard error of the mean L0 is far below 1 %


@dataclass(frozen=True)
class SAE:
    """A trained dictionary for raw rows. `threshold` is None only before it is calibrated."""

    W_enc: Float32[Tensor, "d_in latent"]
    b_enc: Float32[Tensor, "latent"]
    W_dec: Float32[Tensor, "latent d_in"]
    b_dec: Float32[Tensor, "d_in"]
    threshold: Float32[Tensor, "latent"] | None
    layout: SiteLayout
    manifest: Manifest

    @property
    def d_in(self) -> int:
        """Number of columns of a row."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def scale(self) -> Float32[Tensor, "d_in"]:
        """Factor by which training multiplied each column; 0 for columns that were left out."""
        scale = self.manifest.content.get("scale") or [1.0] * self.d_in
        return torch.tensor(scale, dtype=torch.float32, device=self.b_dec.device)

    @property
    def architecture(self) -> str:
        """How the SAE was trained: `batchtopk`, `topk`, `jumprelu`, `matryoshka` or another."""
        return str(self.manifest.content.get("architecture", "batchtopk"))

    @property
    def stability(self) -> Float32[Tensor, "latent"] | None:
        """How well other seeds find each latent again; None if training did not measure it."""
        values = self.manifest.content.get("stability")
        return None if values is None else torch.tensor(values, dtype=torch.float32)

    @property
    def digest(self) -> str:
        """Digest of the whole SAE; the same in each of its file formats."""
        return replace(self.manifest, files={}).digest

    def to(self, device: torch.device | str) -> "SAE":
        """Return the SAE on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights by name; `threshold` only if there is one."""
        named = {name: getattr(self, name) for name in (*NAMES, "threshold")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def narrow(self, store: ActivationStore) -> ActivationStore:
        """Return the store with only the columns that this SAE reads.

        Raises ArtifactError if the store lacks some of them, or belongs to another adapter.
        """
        if set(self.layout.adapter_types) < set(store.layout.adapter_types):
            store = store.select(self.layout.adapter_types)
        self.layout.require_same(store.layout, "the SAE", str(store.path))
        return store

    @torch.no_grad()
    def encode(self, rows: Float[Tensor, "*batch d_in"]) -> SparseCode:
        """Return the code of raw rows, float16 or float32, with any leading axes.

        Raises ArtifactError without a threshold, NumberError if a row is not finite.
        """
        flat = self._checked(rows)
        fired = self.encoder(flat)
        return SparseCode(
            offsets=kernels.for_device(flat.device).row_offsets(fired.rows, len(flat)),
            latents=fired.latents,
            values=fired.values,
            shape=(*rows.shape[:-1], self.d_sae),
        )

    @torch.no_grad()
    def encode_dense(self, rows: Float[Tensor, "*batch d_in"]) -> Float32[Tensor, "*batch latent"]:
        """Return the dense code of raw rows: that of `encode`, bit for bit."""
        return self.encode(rows).to_dense()

    @cached_property
    def encoder(self) -> Encoder:
        """Turns raw rows into the pairs that fire. Raises ArtifactError without a threshold."""
        return Encoder(self.W_enc, self.b_enc, self._require_threshold())

    def decode(
        self, code: SparseCode | Float32[Tensor, "*batch latent"]
    ) -> Float32[Tensor, "*batch d_in"]:
        """Return the reconstruction of a code as raw rows."""
        if isinstance(code, Tensor):
            return code @ self.W_dec + self.b_dec
        flat = torch.nn.functional.embedding_bag(
            code.latents,
            self.W_dec,
            code.offsets,
            mode="sum",
            per_sample_weights=code.values,
            include_last_offset=True,
        )
        return (flat + self.b_dec).view(*code.shape[:-1], self.d_in)

    def _require_threshold(self) -> Tensor:
        if self.threshold is None:
            raise ArtifactError(
                "the SAE has no threshold, so a code would depend on its batch; load it with "
                "load_sae(path, store), which calibrates one"
            )
        return self.threshold

    def _checked(self, rows: Tensor) -> Float[Tensor, "batch d_in"]:
        """Return rows with one leading axis. Raises if their width or a value is wrong."""
        if rows.shape[-1] != self.d_in:
            raise ArtifactError(
                f"rows have {rows.shape[-1]} columns, the SAE expects {self.d_in}: they come from "
                "different adapters; use a matching pair"
            )
        flat = rows.reshape(-1, self.d_in)
        if flat.numel() and not all(map(math.isfinite, flat.aminmax())):
            bad = int((~torch.isfinite(flat)).any(1).nonzero()[0])
            raise NumberError(f"row {bad} of the rows to encode is not finite; check the store")
        return flat

    @torch.no_grad()
    def calibrated(self, store: ActivationStore, rows: RowNumbers, k: float) -> "SAE":
        """Return the SAE with the threshold at which `k` latents per row fire on average.

        The mean is taken over `rows`, or over `CALIBRATION_ROWS` evenly spread ones of them.
        Learned thresholds of latents keep their ratios. Raises ArtifactError if one of them is not
        above 0, as in an SAE of another library with plain ReLU: it has no ratio.
        """
        ratios = torch.ones_like(self.b_enc) if self.threshold is None else self.threshold
        if not (ratios > 0).all():
            raise ArtifactError(
                f"{int((ratios <= 0).sum())} of {self.d_sae} latents have a threshold of 0 or "
                "less, so the SAE cannot be calibrated; give one whose thresholds are all above 0"
            )
        if len(rows) > CALIBRATION_ROWS:
            rows = rows[np.linspace(0, len(rows) - 1, CALIBRATION_ROWS).astype(np.int64)]

        weight, product = self.W_enc.T.contiguous(), kernels.for_device(self.b_enc.device).product
        out = self.W_enc.new_empty(BLOCK, self.d_sae)

        def scores() -> Iterator[Tensor]:
            for block in read_blocks(store, rows, BLOCK):
                pre = product(block.to(weight.device), weight, out[: len(block)])
                yield pre.add_(self.b_enc).div_(ratios)

        return replace(self, threshold=calibrate_threshold(scores, k) * ratios).sealed()

    def sealed(self, **content: Any) -> "SAE":
        """Return the SAE with `content` and the checksum of its weights in its manifest."""
        hasher = hashlib.sha256()
        for name, tensor in self.tensors().items():
            hasher.update(f"{name} {tuple(tensor.shape)}\n".encode())
            hasher.update(tensor.contiguous().cpu().numpy().tobytes())
        content = {**self.manifest.content, **content, "weights_sha256": hasher.hexdigest()}
        return replace(self, manifest=replace(self.manifest, content=content))

    def save(self, out: Path, *, overwrite: bool = False) -> Path:
        """Write the SAE as one file if the name ends in `.pt`, else as a folder."""
        return built(out, self.manifest.identity, self.publish, overwrite=overwrite)

    def publish(self, build: Build) -> Path:
        """Write the SAE into a folder opened by `stage.building`, and publish it."""
        self._require_threshold()
        if build.out.suffix == ".pt":
            (build.path / "sae.pt").write_bytes(self._archive())
            return build.publish_file("sae.pt")
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors().items()}
        # save_file() makes a file that only its owner can read
        weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
        (build.path / WEIGHTS).write_bytes(weights)
        write_text(build.path / SAELENS_CONFIG, json.dumps(self._saelens_config(), indent=1) + "\n")
        return build.publish_directory(self.manifest, (SAELENS_CONFIG, WEIGHTS))

    @staticmethod
    def from_pretrained(
        name: str | Path, store: ActivationStore | None = None, revision: str | None = None
    ) -> "SAE":
        """Load an SAE from a path or the hub: `owner/name`, `owner/name:folder_or_pt_file`."""
        return load_sae(download(str(name), revision), store)

    def _archive(self) -> bytes:
        """Return the bytes of the `.pt` file: published keys, threshold and manifest."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.tensors().items()}
        config = {"d_model": self.d_in, "dict_size": self.d_sae}
        data = {
            "config": {**self.manifest.content.get("config", {}), **config},
            "threshold": tensors.pop("threshold"),
            "model_state_dict": tensors,
        }
        buffer = io.BytesIO()  # if saved to a path, the archive would contain the file's name
        torch.save(data, buffer)
        with zipfile.ZipFile(buffer, "a") as archive:
            entry = zipfile.ZipInfo("archive/lorascope.json", (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, canonical(replace(self.manifest, files={}).to_json()))
            archive.comment = EMPTY_SEAL  # in the entry, it would change the entry's checksum
        return buffer.getvalue()

    def _saelens_config(self) -> dict[str, Any]:
        content = self.manifest.content
        return {
            "architecture": "jumprelu",
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "sae_lens_version": "6.0.0",  # of the format; else SAELens assumes an older one
                "lorascope_version": self.manifest.version,
                "training_architecture": self.architecture,
                "k": content.get("k"),
                "columns": list(self.layout.column_names),
            },
        }


def load_sae(path: Path | str, store: ActivationStore | None = None) -> SAE:
    """Read an SAE of lorascope or of another library (`files.py`), on the CPU.

    A store's columns are compared with the SAE's; other libraries' files need a store, because they
    do not name their columns. Raises ArtifactError if the file is missing, damaged, not an SAE, or
    belongs to another adapter.
    """
    path = as_path(path)
    manifest = read_manifest(path)
    if manifest is None:
        return _with_columns(path, read_foreign(path), store)
    manifest = open_manifest(path, KIND, SCHEMA)
    if path.is_dir():
        tensors: dict[str, Any] = {**read_safetensors(path / WEIGHTS)}
    else:
        data = read_pt(path)
        tensors = {**section(path, data, "model_state_dict"), "threshold": data.get("threshold")}
    sae = SAE(
        **checked(path, tensors, (*NAMES, "threshold")),
        layout=manifest.columns,
        manifest=manifest,
    )
    if sae.layout.d_in != sae.d_in or sae.sealed().manifest != manifest:
        raise ArtifactError(
            f"{path} holds other weights than its manifest says; train or download it again"
        )
    if store is not None:
        sae.narrow(store)
    return sae


def _with_columns(path: Path, foreign: ForeignSAE, store: ActivationStore | None) -> SAE:
    """Return the SAE of foreign weights over the columns of the store, with a threshold."""
    tensors, config, content = dict(foreign.tensors), foreign.config, dict(foreign.content)
    threshold = tensors.pop("threshold", None)
    if store is None:
        also = "" if threshold is not None else " and has no threshold"
        raise ArtifactError(
            f"{path} does not say what its columns are{also}; give the activation store too"
        )
    if foreign.columns not in (None, list(store.layout.column_names)):
        raise ArtifactError(
            f"{path} has other columns than {store.path}: they come from different adapters; use "
            "a matching pair"
        )
    parents = {} if threshold is not None else {"activations": store.digest}
    types = config.get("adapter_types") or []
    if types := parse_adapter_types(
        [str(t) for t in (types if isinstance(types, list) else [types])],
        store.layout.adapter_types,
    ):
        store = store.select(types)
    if store.d_in != len(tensors["b_dec"]):
        raise ArtifactError(
            f"{path} expects d_in {len(tensors['b_dec'])}, {store.path} has {store.d_in}: they "
            "come from different adapters; use a matching pair"
        )
    k = content["k"]
    if not isinstance(k, int | float):
        del content["k"]
    identity = Identity(kind=KIND, schema=SCHEMA, settings=config, parents=parents)
    manifest = identity.manifest(store.layout, content)
    sae = SAE(**tensors, threshold=threshold, layout=store.layout, manifest=manifest).sealed()
    if threshold is not None:
        return sae
    log.warning("%s has no threshold: calibrating one on %s at k %g", path, store.path, k)
    return sae.calibrated(store, np.arange(store.n_rows), k)
