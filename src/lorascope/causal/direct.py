"""Say which tokens each feature promotes and suppresses by what it writes, from weights alone.

1. A site writes to the residual stream where its module's output is added to it: the down and
   output projections. The others write inside a layer, and their effect is indirect.
2. What a unit of a feature writes there is `v = Σ scale · B · (its decoder row at the site)`.
3. The final norm, up to the length by which it divides, is linear: `w = g ∘ v`, less the mean of
   `v` first where it is a LayerNorm. The unembedding makes logits of it: `U·w`.
4. Only differences of logits matter, and the length of the residual stream is not known from
   weights: so a token's score is how many standard deviations over the vocabulary its logit is
   above the mean (the "logit lens" of a direction: nostalgebraist 2020; Bloom and Lin 2024).

In: adapter, base model, SAE. Out: a report (JSON); the table goes to stderr. No forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorascope import runtime
from lorascope.causal.study import Report, report_at
from lorascope.config import option
from lorascope.errors import ConfigError
from lorascope.subject.options import AdapterOptions

if TYPE_CHECKING:
    from lorascope.sae.model import SAE
    from lorascope.subject.load import Subject

KIND = "direct"
SCHEMA = 1
UNIT = "standard deviations over the vocabulary"
_LOGITS = 1 << 25  # at a time
_SHOWN = 12  # features in the table
_NAMED = 4  # tokens of each


@dataclass(frozen=True, kw_only=True)
class DirectConfig(AdapterOptions):
    """Options of `direct`."""

    sae: Path = option(
        Path("trained_sae_adapters_g-u-d-q-k-v-o.pt"), help="SAE of the features", identity=False
    )
    top: int = option(10, help="tokens to name that a feature promotes, and as many it suppresses")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", help="type in which the weights are loaded; auto: float32 on the CPU"
    )
    output: Path = option(Path("direct.json"), help="report to make", identity=False)
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace an output of other settings", identity=False)

    def check(self) -> None:
        """Refuse impossible numbers."""
        super().check()
        self.require("top", 1)
        if self.output.suffix != ".json":
            raise ConfigError(f"--output is {self.output}, expected a .json file")


def run(config: DirectConfig) -> Path:
    """Make a report, or find the finished one, and return its file."""
    from lorascope.sae.model import load_sae
    from lorascope.subject.load import find_base, inspect_adapter, load_subject, load_tokenizer

    sae = load_sae(config.sae)
    adapter = inspect_adapter(config.lora_path, config.adapter_name)
    base = find_base(adapter, config.base_model)

    def make() -> Report:
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
        mine, _ = subject.layout.select(sae.layout.adapter_types)
        sae.layout.require_same(mine, str(config.sae), f"adapter {adapter.name}")
        content = {"sae_name": config.sae.name, "adapter_name": adapter.name}
        return Report(measure(subject, sae, config.top), sae.layout, content)

    return report_at(
        config.output,
        KIND,
        SCHEMA,
        settings=config.settings(),
        parents={"sae": sae.digest, "adapter": adapter.digest, "base_model": base.digest},
        overwrite=config.overwrite,
        make=make,
        table=table,
    )


@torch.inference_mode()
def measure(subject: "Subject", sae: "SAE", top: int) -> dict[str, Any]:
    """Return the report's parts as JSON values: `top` tokens on each side, of every latent."""
    from lorascope.subject.unembedding import Unembedding, residual_writes
    from lorascope.texts.tokens import special_ids, token_bytes

    writers, head = residual_writes(subject, sae.layout), Unembedding(subject)
    names = {writer.name for writer in writers}
    writes = np.array([site.name in names for site in sae.layout.sites])
    share = _shares(sae)[:, writes].sum(1)
    written = torch.zeros(sae.d_sae, head.width)
    for writer in writers:
        written += sae.W_dec[:, writer.columns] @ writer.matrix.T
    spelled = token_bytes(subject.tokenizer, head.weight.shape[0])
    nameless = torch.tensor([not token for token in spelled[: head.weight.shape[0]]])
    nameless[[i for i in special_ids(subject.tokenizer) if i < len(nameless)]] = True
    top = min(top, int((~nameless).sum()))
    sides: dict[int, list[list[dict[str, Any]]]] = {i: [[], []] for i in range(sae.d_sae)}
    named: set[int] = set()
    direct = (written.norm(dim=1) > 0).nonzero()[:, 0]
    for some in direct.split(max(1, _LOGITS // len(nameless))):
        z = _standardised(head.logits(written[some]))
        for side, sign in enumerate((1, -1)):
            best = (sign * z).masked_fill(nameless, -torch.inf).topk(top, dim=1)
            for latent, ids, scores in zip(
                some.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
            ):
                named.update(ids)
                sides[latent][side] = [
                    {"token_id": i, "token": spelled[i].decode(errors="replace"), "z": sign * score}
                    for i, score in zip(ids, scores, strict=True)
                ]
    return {
        "unit": UNIT,
        "n_tokens": top,
        "writers": [site.name for site in sae.layout.sites if site.name in names],
        "indirect": [site.name for site in sae.layout.sites if site.name not in names],
        "vocabulary": {str(i): spelled[i].hex() for i in sorted(named)},
        "features": [
            {
                "feature": latent,
                "share": float(share[latent]),
                "promoted": sides[latent][0],
                "suppressed": sides[latent][1],
            }
            for latent in range(sae.d_sae)
        ],
    }


def _shares(sae: "SAE") -> npt.NDArray[np.float64]:
    """Return the share of each latent's effect at each site, as the feature index has it."""
    from lorascope.features.neighbours import effect_rows, fingerprint

    return fingerprint(effect_rows(sae)[0], sae.layout).astype(np.float64)


def _standardised(logits: Tensor) -> Tensor:
    """Return how many standard deviations each logit is from the mean of its row."""
    centred = logits - logits.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)


def table(report: Mapping[str, Any]) -> str:
    """Return the features of the most direct effect as a table for the terminal."""
    features = sorted(report["features"], key=lambda one: (-one["share"], one["feature"]))
    direct = [one for one in features if one["promoted"]]
    lines = [
        f"{len(report['writers'])} sites write to the residual stream, {len(report['indirect'])} "
        f"only inside layers; {len(direct):,} of {len(features):,} features write directly",
        f"{'feature':>8}{'direct':>8}  tokens that it promotes (+) and suppresses (-), in {UNIT}",
    ]
    for one in direct[:_SHOWN]:
        tokens = [
            f"{token['token']!a} {token['z']:+.1f}"
            for side in ("promoted", "suppressed")
            for token in one[side][:_NAMED]
        ]
        lines.append(f"{one['feature']:>8}{one['share']:>8.0%}  {', '.join(tokens)}")
    return "\n".join(lines)
