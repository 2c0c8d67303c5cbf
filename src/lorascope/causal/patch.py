"""An edit of features that is made while the model runs.

A feature's value at a token depends on its whole row, of which late layers have a part, while its
decoder row is written from the first layer on. So each text takes two passes:

1. The adapter runs as it is, which gives the rows that the store would hold, and their code.
2. It runs again, and `(1 − factor) · value · decoder row` of the edit's features is subtracted from
   what each site reads then (live: later sites answer to what is left).

Only tokens that count are changed; features are of tokens of text, not of special ones.
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

from lorascope.artifact import canonical
from lorascope.errors import ArtifactError
from lorascope.sae.model import SAE
from lorascope.sae.weights import NAMES
from lorascope.sites import SiteLayout
from lorascope.subject.intervene import Edit, RowEditor

PATCH = "patch.safetensors"


def only(sae: SAE, features: Sequence[int]) -> SAE:
    """Return an SAE of some latents, in the order given. Raises ArtifactError without threshold.

    Its codes are those of the whole to the last bit, and its encoder is built once.
    """
    some = torch.tensor(features)
    if sae.threshold is None:
        raise ArtifactError("the SAE has no threshold; load it with load_sae(path, store)")
    return replace(
        sae,
        W_enc=sae.W_enc[:, some].contiguous(),
        b_enc=sae.b_enc[some],
        W_dec=sae.W_dec[some],
        threshold=sae.threshold[some],
    )


@dataclass(frozen=True)
class Patch:
    """Some features of an SAE, and by what factor their part of a row is multiplied.

    `sae` holds just these latents, `features` are their numbers in the SAE that they were taken
    from. `factor` 0 takes them out, 1 changes nothing.
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
        """Take features out of an SAE, which must have its threshold."""
        return cls(tuple(features), factor, only(sae, features))

    @classmethod
    def open(cls, folder: Path) -> "Patch":
        """Read the patch of a folder that `edit` made. Raises ArtifactError where it holds none."""
        try:
            with safe_open(folder / PATCH, framework="pt") as file:
                said = json.loads((file.metadata() or {})["lorascope"])
                tensors = {name: file.get_tensor(name) for name in (*NAMES, "threshold")}
            layout = SiteLayout.from_json(said["layout"])
            sae = SAE(**tensors, layout=layout, manifest={"content": {}})
            return cls(tuple(said["features"]), float(said["factor"]), sae)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{folder} holds no runtime patch ({error}); lorascope edit writes one where an "
                "edit cannot be folded into weights"
            ) from error

    def save(self, path: Path) -> None:
        """Write the patch's file."""
        tensors = {name: tensor.clone() for name, tensor in self.sae.tensors().items()}
        said = {
            "features": list(self.features),
            "factor": self.factor,
            "layout": self.layout.to_json(),
        }
        safetensors.torch.save_file(tensors, path, metadata={"lorascope": canonical(said)})

    def change(
        self, rows: Float[Tensor, "*batch d_in"], counts: Bool[Tensor, "*batch"]
    ) -> Float32[Tensor, "*batch d_in"]:
        """Return what is to be added to rows; nothing at tokens that do not count."""
        code = self.sae.encode_dense(rows.cpu()) * counts.cpu()[..., None]
        return (self.factor - 1) * code @ self.sae.W_dec

    def edit(
        self,
        editor: RowEditor,
        rows: Float[Tensor, "batch seq d_row"],
        counts: Bool[Tensor, "batch seq"],
    ) -> Edit:
        """Return the edit of step 2 for texts of which step 1 gave the rows.

        Raises ArtifactError where the adapter has not got the patch's columns.
        """
        mine, columns = editor.subject.layout.select(self.layout.adapter_types)
        self.layout.require_same(mine, "the patch", f"adapter {editor.subject.adapter.name}")
        added = torch.zeros_like(rows)
        added[..., columns] = self.change(rows[..., columns], counts).to(rows.device)
        return lambda here, values: values + added[..., here].to(values.device)

    def logits(
        self,
        editor: RowEditor,
        token_ids: Int[Tensor, "batch seq"],
        counts: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Run texts under the patch. `counts` are the tokens of text; default: all but special."""
        if counts is None:
            from lorascope.texts.tokens import special_ids

            counts = ~torch.isin(token_ids, torch.tensor(special_ids(editor.subject.tokenizer)))
        rows = editor.run(token_ids).rows
        return editor.run(token_ids, self.edit(editor, rows, counts)).logits
