"""Edit features while the model runs.

A feature's value at a token depends on the whole row, late layers included, but its decoder row is
written from the first layer on. So each text takes two passes:

1. The unchanged adapter gives the rows that a store would hold, and their code.
2. It runs again, and `(1 − factor) · value · decoder row` of the edit's features is subtracted from
   what each site reads then (live: later sites respond).

Only tokens of text are edited, because features are read at these tokens only.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Bool, Float, Float32, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorascope.artifact import Identity, canonical, replacing
from lorascope.errors import ArtifactError
from lorascope.sae.files import NAMES, checked
from lorascope.sae.model import KIND, SAE, SCHEMA
from lorascope.sites import SiteLayout
from lorascope.subject.intervene import Edit, RowEditor

PATCH = "patch.safetensors"


def select_latents(sae: SAE, features: Sequence[int]) -> SAE:
    """Return an SAE with these latents only, in this order.

    Its code is bit for bit that of the whole SAE. Raises ArtifactError if the SAE has no threshold.
    """
    latents = torch.tensor(features)
    if sae.threshold is None:
        raise ArtifactError("the SAE has no threshold; load it with load_sae(path, store)")
    return replace(
        sae,
        W_enc=sae.W_enc[:, latents].contiguous(),
        b_enc=sae.b_enc[latents],
        W_dec=sae.W_dec[latents],
        threshold=sae.threshold[latents],
    )


@dataclass(frozen=True)
class Patch:
    """Some features of an SAE, and the factor that multiplies their part of a row.

    `sae` has only these latents; `features` are their numbers in the SAE that they come from.
    `factor` 0 removes them, 1 changes nothing.
    """

    features: tuple[int, ...]
    factor: float
    sae: SAE

    @property
    def layout(self) -> SiteLayout:
        """The columns that the features read and write."""
        return self.sae.layout

    @classmethod
    def from_features(cls, sae: SAE, features: Sequence[int], factor: float) -> "Patch":
        """Return a patch of some features of an SAE, which must have its threshold."""
        return cls(tuple(features), factor, select_latents(sae, features))

    @classmethod
    def open(cls, folder: Path) -> "Patch":
        """Read the patch from a folder that `edit` made. Raises ArtifactError if it has none."""
        try:
            with safe_open(folder / PATCH, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["lorascope"])
                tensors = {name: file.get_tensor(name) for name in (*NAMES, "threshold")}
            tensors = checked(folder / PATCH, tensors, (*NAMES, "threshold"))
            layout = SiteLayout.from_json(metadata["layout"])
            identity = Identity(kind=KIND, schema=SCHEMA, settings={}, parents={})
            sae = SAE(**tensors, layout=layout, manifest=identity.manifest(layout, {}))
            return cls(tuple(metadata["features"]), float(metadata["factor"]), sae)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{folder} has no readable runtime patch ({error}); lorascope edit writes one when "
                "weights miss more of an edit than --tolerance"
            ) from error

    def save(self, path: Path) -> None:
        """Write the patch's file."""
        tensors = {name: tensor.clone() for name, tensor in self.sae.tensors().items()}
        metadata = {
            "features": list(self.features),
            "factor": self.factor,
            "layout": self.layout.to_json(),
        }
        with replacing(path) as temporary:
            text = {"lorascope": canonical(metadata)}
            safetensors.torch.save_file(tensors, temporary, metadata=text)

    def change(
        self, rows: Float[Tensor, "*batch d_in"], is_edited: Bool[Tensor, "*batch"]
    ) -> Float32[Tensor, "*batch d_in"]:
        """Return what to add to the rows: zeros at tokens that `is_edited` does not mark."""
        code = self.sae.encode_dense(rows.cpu()) * is_edited.cpu()[..., None]
        return (self.factor - 1) * code @ self.sae.W_dec

    def edit(
        self,
        editor: RowEditor,
        rows: Float[Tensor, "batch seq d_row"],
        is_edited: Bool[Tensor, "batch seq"],
    ) -> Edit:
        """Return the edit of step 2, given the rows of step 1.

        Raises ArtifactError if the adapter lacks the patch's columns.
        """
        own_layout, columns = editor.subject.layout.select(self.layout.adapter_types)
        self.layout.require_same(own_layout, "the patch", f"adapter {editor.subject.adapter.name}")
        added = torch.zeros_like(rows)
        added[..., columns] = self.change(rows[..., columns], is_edited).to(rows.device)
        return lambda here, values: values + added[..., here].to(values.device)

    def logits(
        self,
        editor: RowEditor,
        token_ids: Int[Tensor, "batch seq"],
        is_edited: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return the logits under the patch; by default all tokens but special ones are edited."""
        if is_edited is None:
            from lorascope.texts.tokens import special_ids

            is_edited = ~torch.isin(token_ids, torch.tensor(special_ids(editor.subject.tokenizer)))
        rows = editor.run(token_ids).rows
        return editor.run(token_ids, self.edit(editor, rows, is_edited)).logits
