"""SAEs on the Hugging Face hub: download one, or upload one with a model card.

The card is Markdown with a YAML head. Names in it come from manifests, so from whoever made the
adapter or the corpus: they are put on one line with all Markdown and HTML characters escaped, and
only a base model's name that is a hub id goes into the head.
"""

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lorascope.artifact import MANIFEST
from lorascope.errors import ArtifactError
from lorascope.hub import find_folder, reason_of
from lorascope.sae.files import DICTIONARY, DICTIONARY_CONFIG, SAELENS_CONFIG, WEIGHTS
from lorascope.sites import SiteLayout

CARD = "README.md"
_FILES = (MANIFEST, SAELENS_CONFIG, WEIGHTS, DICTIONARY, DICTIONARY_CONFIG)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SIGNS = re.compile(r"([!-/:-@\[-`{-~])")  # all characters that CommonMark lets a backslash escape
_LONGEST = 200


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
    escaped = glob.escape(inside.rstrip("/"))  # the hub's client treats names as patterns
    if inside.endswith(".pt"):
        patterns = [escaped]
    else:
        patterns = [f"{escaped}/{file}" if escaped else file for file in _FILES]
    folder = find_folder(repo, "SAE", patterns, revision=revision, error_type=ArtifactError)
    if not (folder / inside).exists():
        raise ArtifactError(f"the hub repository {repo} has no {inside}; check its files")
    return folder / inside


def upload(folder: Path, card: str, repo_id: str, *, private: bool) -> str:
    """Upload an SAE's folder and its card to a hub repository, and return its URL.

    Raises ArtifactError if the hub refuses.
    """
    from huggingface_hub import HfApi

    (folder / CARD).write_text(card, encoding="utf-8")
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add the SAE")
    except Exception as error:  # one of a dozen types, all of which mean that the hub refuses
        raise ArtifactError(
            f"the hub does not accept {repo_id} ({reason_of(error)}); check the name, the "
            "network and your login"
        ) from error
    return str(url)


def model_card(
    manifest: Mapping[str, Any], d_sae: int, repo_id: str, corpus: Mapping[str, Any]
) -> str:
    """Return the card of an SAE; `corpus` is the content of its store's manifest.

    Raises ArtifactError if `repo_id` cannot be the name of a hub repository.
    """
    if not _HUB_ID.fullmatch(repo_id):
        raise ArtifactError(f"{repo_id} is not a hub repository name, expected owner/name")
    base = str(corpus.get("base_model", ""))
    head = ["---", "library_name: lorascope", "tags:"]
    head += [f"- {tag}" for tag in ("sparse-autoencoder", "lora", "interpretability", "saelens")]
    head += [f'base_model: "{base}"'] if _HUB_ID.fullmatch(base) else []
    facts = _facts(manifest, d_sae, corpus)
    rows = "\n".join(f"| {name} | {_escaped(value)} |" for name, value in facts)
    return "\n".join(head) + _BODY.format(rows=rows, repo_id=repo_id)


_BODY = """
---

# A sparse autoencoder of a LoRA

It decomposes the bottleneck activations of a LoRA adapter at a token (one row: `A·x` of every
adapted module) into a few latents. Made with lorascope.

| what | value |
|---|---|
{rows}

    code = pre * (pre > threshold),  pre = row @ W_enc + b_enc
    reconstruction = code @ W_dec + b_dec

With lorascope:

```python
from lorascope import SAE

sae = SAE.from_pretrained("{repo_id}")
```

With SAELens 6:

```python
from huggingface_hub import snapshot_download
from sae_lens import SAE

sae = SAE.load_from_disk(snapshot_download("{repo_id}"))
```

Both take raw rows: the column scale of training is folded into the weights. `manifest.json` has the
layout of the columns, the training settings and a checksum of the weights.

The owner of this repository has not stated a licence here.
"""


def _facts(
    manifest: Mapping[str, Any], d_sae: int, corpus: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the card's table; unknown facts are left out."""
    content, layout = manifest["content"], SiteLayout.from_json(manifest["layout"])
    report = content.get("report")
    report = report if isinstance(report, dict) else {}
    facts = {
        "base model": corpus.get("base_model"),
        "adapter": corpus.get("adapter_name"),
        "adapter's SHA-256": layout.adapter,
        "adapted": f"{', '.join(layout.adapter_types)} in {layout.n_layers} layers",
        "corpus": corpus.get("dataset"),
        "rollouts": corpus.get("n_rollouts"),
        "tokens": corpus.get("n_rows"),
        "d_in": layout.d_in,
        "d_sae": d_sae,
        "k": content.get("k"),
        "trained as": content.get("architecture", "batchtopk"),
        "column scale in training": content.get("normalize"),
        "held-out tokens": report.get("n_rows"),
        "FVU, held out": report.get("fvu"),
        "L0, held out": report.get("l0"),
        "share of latents that never fired, held out": report.get("never_fired"),
        "lorascope": manifest["version"],
    }
    for name, value in facts.items():
        if isinstance(value, float):
            yield name, f"{value:.4g}"
        elif isinstance(value, str | int):
            yield name, value


def _escaped(value: Any) -> str:
    """Return a value as plain text in a Markdown table, on one line."""
    text = "".join(sign if sign.isprintable() else " " for sign in str(value))
    text = " ".join(text.split())
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return _SIGNS.sub(r"\\\1", text)
