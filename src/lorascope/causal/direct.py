"""Find the tokens that each feature promotes and suppresses, from weights alone.

1. A site writes to the residual stream if its module's output is added to it: the down and output
   projections. The other sites write inside a layer, and their effect is indirect.
2. One unit of a feature writes `v = Σ scale · B · (its decoder row at the site)`.
3. The final norm is linear except for the length by which it divides: `w = g ∘ v`, where a
   LayerNorm first subtracts the mean of `v`. The unembedding turns it into logits: `U·w`.
4. Only differences of logits matter, and weights do not say the length of the residual stream. So
   a token's score `z` is how many standard deviations over the vocabulary its logit is above the
   mean (the "logit lens" of a direction: nostalgebraist 2020; Bloom and Lin 2024).

In: adapter, base model, SAE. Out: a report (JSON); the table goes to stderr. The model runs on two
tokens only, which shows where its final norm is.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lorascope import runtime
from lorascope.causal.effect_options import DirectConfig
from lorascope.causal.report_records import DirectEffect, DirectReport, ScoredToken
from lorascope.causal.study import Made, format_table, report_at
from lorascope.features.neighbours import effect_rows, fingerprint
from lorascope.sae.model import SAE, load_sae
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.base import find_base
from lorascope.subject.load import Subject, load_subject, load_tokenizer
from lorascope.subject.unembedding import Unembedding, residual_writes
from lorascope.texts.tokens import special_ids, token_bytes

UNIT = "standard deviations over the vocabulary"
_CHUNK = 1 << 25  # logits at a time
_N_SHOWN = 12  # features in the table
_N_NAMED = 4  # tokens of each

Sides = tuple[tuple[ScoredToken, ...], tuple[ScoredToken, ...]]


def run(config: DirectConfig) -> Path:
    """Find the tokens that each feature promotes directly, and return the report's file (JSON).

    It reads weights alone: no texts and no store. A finished report of the same settings is kept.
    Raises ArtifactError if inputs do not belong together.
    """
    sae = load_sae(config.sae)
    adapter = inspect_adapter(config.lora_path, config.adapter_name)
    base = find_base(adapter, config.base_model, config.base_revision)

    base.require_same(sae.manifest.content.get("base_weights"), config.sae)

    def make() -> Made:
        gauges = {site.gauge for site in sae.layout.sites}
        subject = load_subject(
            adapter,
            base,
            load_tokenizer(adapter, base),
            runtime.pick_device(config.device),
            config.dtype,
            gauge="auto" if len(gauges) > 1 else gauges.pop(),
            skip_unhookable=True,
        )
        own_layout, _ = subject.layout.select(sae.layout.adapter_types)
        sae.layout.require_same(own_layout, str(config.sae), f"adapter {adapter.name}")
        content = {"sae_name": config.sae.name, "adapter_name": adapter.name}
        return Made(measure(subject, sae, config.top), sae.layout, content)

    return report_at(
        config.output,
        DirectReport,
        settings=config.settings(),
        parents={"sae": sae.digest, "adapter": adapter.digest, "base_weights": base.digest},
        overwrite=config.overwrite,
        make=make,
        table=table,
    )


class Readout:
    """Names the tokens that directions of the residual stream promote and suppress most.

    `n_tokens` is how many tokens can be named: those that have a text and are not special. Raises
    AdapterError if the model has no unembedding, or none that reads a norm.
    """

    def __init__(self, subject: Subject) -> None:
        self._head = Unembedding(subject)
        self.width = self._head.width
        n_vocab = self._head.weight.shape[0]
        self.spelled = token_bytes(subject.tokenizer, n_vocab)[:n_vocab]
        self._nameless = torch.tensor([not token for token in self.spelled])
        self._nameless[[i for i in special_ids(subject.tokenizer) if i < n_vocab]] = True
        self.n_tokens = int((~self._nameless).sum())

    def strongest(self, directions: Float[Tensor, "n d_model"], top: int) -> list[Sides]:
        """Return the `top` tokens that each direction promotes, and those that it suppresses."""
        found: list[Sides] = []
        for some in directions.split(max(1, _CHUNK // len(self._nameless))):
            z = standardise(self._head.logits(some))
            sides = [(sign * z).masked_fill(self._nameless, -torch.inf) for sign in (1, -1)]
            best = [side.topk(min(top, self.n_tokens)).indices for side in sides]
            for scores, *of_both in zip(z, *best, strict=True):
                promoted, suppressed = (
                    tuple(
                        ScoredToken(token_id=i, token=self.spelled[i].decode(errors="replace"), z=z)
                        for i, z in zip(ids.tolist(), scores[ids].tolist(), strict=True)
                    )
                    for ids in of_both
                )
                found.append((promoted, suppressed))
        return found


def standardise(logits: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
    """Return how many standard deviations each logit is above the mean of its row."""
    centred = logits - logits.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)


@torch.inference_mode()
def measure(subject: Subject, sae: SAE, top: int) -> DirectReport:
    """Return the report, with at most `top` tokens on each side of every latent."""
    writers, readout = residual_writes(subject, sae.layout), Readout(subject)
    names = {writer.name for writer in writers}
    writes = np.array([site.name in names for site in sae.layout.sites])
    shares = fingerprint(effect_rows(sae)[0], sae.layout)  # of each site, as in the feature index
    share = shares.astype(np.float64)[:, writes].sum(1)
    written = torch.zeros(sae.d_sae, readout.width)
    for writer in writers:
        written += sae.W_dec[:, writer.columns] @ writer.matrix.T
    direct = (written.norm(dim=1) > 0).nonzero()[:, 0]
    sides = dict(zip(direct.tolist(), readout.strongest(written[direct], top), strict=True))
    named = {one.token_id for both in sides.values() for side in both for one in side}
    return DirectReport(
        unit=UNIT,
        n_tokens=min(top, readout.n_tokens),
        writers=tuple(site.name for site in sae.layout.sites if site.name in names),
        indirect=tuple(site.name for site in sae.layout.sites if site.name not in names),
        vocabulary={str(i): readout.spelled[i].hex() for i in sorted(named)},
        features=tuple(
            DirectEffect(
                feature=latent, share=float(share[latent]), promoted=promoted, suppressed=suppressed
            )
            for latent in range(sae.d_sae)
            for promoted, suppressed in [sides.get(latent, ((), ()))]
        ),
    )


def table(report: DirectReport) -> str:
    """Return the features of the most direct effect as a table for the terminal."""
    features = sorted(report.features, key=lambda feature: (-feature.share, feature.feature))
    direct = [feature for feature in features if feature.promoted]
    lines = [
        f"{len(report.writers)} sites write to the residual stream, {len(report.indirect)} only "
        f"inside layers; {len(direct):,} of {len(features):,} features write directly",
    ]
    lines += format_table(
        ("feature", "direct", f"tokens that it promotes (+) and suppresses (-), in {UNIT}"),
        (
            (
                str(feature.feature),
                f"{feature.share:.0%}",
                ", ".join(
                    f"{token.token!r} {token.z:+.1f}"
                    for side in (feature.promoted, feature.suppressed)
                    for token in side[:_N_NAMED]
                ),
            )
            for feature in direct[:_N_SHOWN]
        ),
        left=(2,),
    )
    return "\n".join(lines)
