"""SAEs on the Hugging Face hub: fetch one, or publish one with a card that says what it is.

The card is Markdown with a YAML head. Names in it come from manifests, so from whoever made the
adapter or the corpus: they are put on one line with every sign of Markdown and HTML escaped, and
only a base model's name that is a hub id goes into the head.
"""

import glob
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from lorascope.activations.store import ActivationStore
from lorascope.artifact import MANIFEST
from lorascope.errors import ArtifactError
from lorascope.hub import find_folder, reason_of
from lorascope.sae.interop import DICTIONARY, DICTIONARY_CONFIG
from lorascope.sae.model import SAE, SAELENS_CONFIG, WEIGHTS

CARD = "README.md"
_FILES = (MANIFEST, SAELENS_CONFIG, WEIGHTS, DICTIONARY, DICTIONARY_CONFIG)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SIGNS = re.compile(r"([!-/:-@\[-`{-~])")  # all that CommonMark lets a backslash stand before
_LONGEST = 200


def download(name: str, revision: str | None = None) -> Path:
    """Return the path of an SAE that is here, or the local copy of one of the hub.

    On the hub it is `owner/name` or `owner/name:inside`, a folder or a `.pt` file; only the files
    of the SAE are fetched. Raises ArtifactError when the hub cannot give it.
    """
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise ArtifactError(f"{name} is a path here, which has no revision {revision}")
        return path
    repo, _, inside = name.partition(":")
    if ".." in PurePosixPath(inside).parts or inside.startswith("/"):
        raise ArtifactError(f"{inside} is no path inside of the hub repository {repo}")
    where = glob.escape(inside.rstrip("/"))  # the hub's client takes names for patterns
    patterns = [where] if inside.endswith(".pt") else [
        f"{where}/{file}" if where else file for file in _FILES
    ]  # fmt: skip
    folder = find_folder(repo, "SAE", patterns, revision=revision, error_type=ArtifactError)
    if not (folder / inside).exists():
        raise ArtifactError(f"the hub repository {repo} holds no {inside}; check its files")
    return folder / inside


def upload(sae: SAE, repo_id: str, *, private: bool, store: ActivationStore | None) -> str:
    """Write an SAE's folder and its card into a hub repository, and return its URL.

    Raises ArtifactError when the store is another than that of its training, or the hub refuses.
    """
    if not _HUB_ID.fullmatch(repo_id):
        raise ArtifactError(f"{repo_id} is no name of a hub repository, expected owner/name")
    if store is not None and store.digest != sae.manifest["parents"].get("activations"):
        raise ArtifactError(
            f"{store.path} is not the store that the SAE was trained on; give that, or none"
        )
    card = describe(sae, repo_id, store.content if store is not None else {})
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        folder = sae.save(Path(scratch) / "sae")
        (folder / CARD).write_text(card, encoding="utf-8")
        api = HfApi()
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add the SAE")
        except Exception as error:  # any of a dozen types, all of which mean: it is refused
            raise ArtifactError(
                f"the hub does not take {repo_id} ({reason_of(error)}); check the name, the "
                "network and your login"
            ) from error
    return str(url)


def describe(sae: SAE, repo_id: str, corpus: Mapping[str, Any]) -> str:
    """Return the card of an SAE; `corpus` is what the manifest of its store says."""
    base = str(corpus.get("base_model", ""))
    head = ["---", "library_name: lorascope", "tags:"]
    head += [f"- {tag}" for tag in ("sparse-autoencoder", "lora", "interpretability", "saelens")]
    head += [f'base_model: "{base}"'] if _HUB_ID.fullmatch(base) else []
    rows = "\n".join(f"| {name} | {_escaped(value)} |" for name, value in _facts(sae, corpus))
    return "\n".join(head) + _BODY.format(rows=rows, repo_id=repo_id)


_BODY = """
---

# A sparse autoencoder of a LoRA

It reads what a LoRA adapter's bottlenecks carry at a token (`A·x` of every adapted module, one row)
and writes it as a few latents. Made with lorascope.

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

Both take raw rows: the units of training are folded into the weights. `manifest.json` has the
layout of the columns, the settings of training and a checksum of the weights.

The owner of this repository has not stated a licence here.
"""


def _facts(sae: SAE, corpus: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of the card's table; what nothing says is left out."""
    content = sae.manifest["content"]
    report = content.get("report")
    report = report if isinstance(report, dict) else {}
    adapter = sae.layout.adapter
    known = {
        "base model": corpus.get("base_model"),
        "adapter": corpus.get("adapter_name"),
        "adapter's SHA-256": adapter,
        "adapted": f"{', '.join(sae.layout.adapter_types)} in {sae.layout.n_layers} layers",
        "corpus": corpus.get("dataset"),
        "rollouts": corpus.get("n_rollouts"),
        "tokens": corpus.get("n_rows"),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": content.get("k"),
        "trained as": sae.architecture,
        "unit of a column in training": content.get("normalize"),
        "held-out tokens": report.get("n_rows"),
        "FVU, held out": report.get("fvu"),
        "L0, held out": report.get("l0"),
        "share of latents that never fired, held out": report.get("never_fired"),
        "lorascope": sae.manifest["version"],
    }
    for name, value in known.items():
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
