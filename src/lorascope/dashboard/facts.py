"""Numbers with their meaning: of the page's header, of how sure it is, and what is missing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorascope.causal.report_records import AblationReport, EvaluationReport
from lorascope.causal.study import format_interval
from lorascope.dashboard.reports import Reports
from lorascope.features.index import FeatureIndex
from lorascope.sites import TRAINING

VERDICTS = ("specific", "not distinguishable", "too few firings")


@dataclass(frozen=True)
class Fact:
    """A number with its meaning."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Gap:
    """What was not measured, and the command that measures it."""

    what: str
    command: str


def header(index: FeatureIndex, reports: Reports) -> list[Fact]:
    """Return what the page's header says; unknown facts are left out."""
    manifest, content, layout = index.manifest, index.content, index.manifest.layout

    def value_of(key: str) -> str | None:
        return _text(content.get(key))

    def with_digest(key: str, digest: str | None) -> str | None:
        short = digest and digest.removeprefix(TRAINING)[:12]
        return " · ".join(filter(None, (value_of(key), short)))

    def with_text(key: str) -> str | None:
        value, of_text = value_of(key), value_of(f"{key}_text")
        return f"{value} ({of_text} at text)" if value and of_text else value

    adapter = with_digest("adapter_name", layout and layout.adapter)
    sae = with_digest("sae_name", manifest.parents.get("sae"))
    columns = f"{layout.d_in:,} at {len(layout.sites):,} sites" if layout else None
    alive = f"{int(index.alive.sum()):,} of {len(index):,}"
    ordinary = (
        "tokens of text, which statistics and examples are of: no special tokens, no template "
        "headers"
    )
    template = "features that fire mostly at special tokens and template headers"
    rows = [
        ("Model", value_of("base_model"), "the subject model, without the adapter"),
        ("Adapter", adapter, "the LoRA that is studied, and its digest"),
        ("SAE", sae, "the sparse autoencoder whose latents are the features, and its digest"),
        ("Dataset", value_of("dataset"), "the texts that were read"),
        ("Columns", columns, "numbers that the adapter computes for each token"),
        ("Rollouts", value_of("n_rollouts"), "tokenised texts that were read"),
        ("Tokens", value_of("n_tokens"), "tokens in those rollouts"),
        ("Ordinary tokens", value_of("n_eligible"), ordinary),
        ("Features", alive, "features with an example, of all features"),
        ("Template features", value_of("n_template"), template),
        ("FVU", with_text("fvu"), "fraction of the variance that the SAE leaves unexplained"),
        ("L0", with_text("l0"), "average number of features that fire at a token"),
        *_recovered(reports.evaluation),
        ("lorascope", _text(manifest.version), "version that wrote the feature index"),
    ]
    return [Fact(name, value, meaning) for name, value, meaning in rows if value]


def _text(value: Any) -> str | None:
    """Return a manifest value as text, or None if it is not a number or a non-empty string."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) and value else None


def _recovered(evaluation: EvaluationReport | None) -> Iterator[tuple[str, str, str]]:
    """Yield how much of the adapter's effect is kept."""
    if evaluation is None:
        return
    sae, constant = (evaluation.faithfulness.runs[name] for name in ("sae", "constant"))
    what = "share (95 % interval) of the adapter's effect"
    written, predicted = "on the tokens that it writes", "on all tokens that it predicts"
    kept = "kept when each row is replaced by the SAE's reconstruction"
    same = "kept when each row is replaced by the mean row of its role and template position"
    for name, share, where, how in (
        ("Recovered", sae.generated, written, kept),
        ("Recovered, all tokens", sae, predicted, kept),
        ("Constant", constant.generated, written, same),
    ):
        if share is not None and share.recovered is not None:
            interval = format_interval(share.recovered_interval, ".3f")
            yield name, f"{share.recovered:.3f} ({interval})", f"{what} {where}, {how}"


def sureness(
    index: FeatureIndex, evaluation: EvaluationReport | None, ablation: AblationReport | None
) -> Iterator[Fact]:
    """Yield how sure the statements of the overview are."""
    content, n = index.content, len(index)
    for key, name, meaning in (
        ("fvu", "FVU", "share of the rows' variance that the SAE leaves unexplained, held out"),
        ("l0", "L0", "features that fire at a token, on average"),
    ):
        if isinstance(content.get(key), float):
            yield Fact(name, f"{content[key]:.3g}", meaning)
    n_dead = n - int(index.alive.sum())
    yield Fact("Dead features", f"{n_dead:,} of {n:,}", "features that never fire")
    if isinstance(content.get("n_tokens"), int):
        texts = f"{content.get('n_rollouts', 0):,} rollouts, {content['n_tokens']:,} tokens"
        yield Fact("Texts", texts, "what the examples and the statistics are from")
    said = {} if index.labels is None else index.labels.manifest.content
    if isinstance(said.get("balanced_accuracy"), float):
        yield Fact(
            "Labels",
            f"balanced accuracy {said['balanced_accuracy']:.2f}, wrong labels "
            f"{said.get('shuffled') or 0.5:.2f}",
            "how well labels tell, on texts that chose none of them, where features fire; 0.5 is "
            "chance",
        )
    if evaluation is not None:
        found = evaluation.faithfulness
        yield Fact(
            "Predictions",
            f"{found.n_tokens:,} in {found.n_rollouts:,} held-out rollouts",
            "what the effect and the recovered shares are measured on",
        )
        seeds = [found.runs[name].recovered for name in found.seeds]
        shares = [share for share in seeds if share is not None]
        if len(shares) > 1:
            spread = f"{min(shares):.3f} to {max(shares):.3f}"
            yield Fact(
                "Other seeds", spread, f"recovered of all predictions, in {len(shares)} seeds"
            )
    if ablation is not None and ablation.features:
        counts = [sum(one.verdict == verdict for one in ablation.features) for verdict in VERDICTS]
        yield Fact(
            "Removals",
            f"{counts[0]:,} specific, {counts[1]:,} not distinguishable, "
            f"{counts[2]:,} fire too rarely",
            f"effects of features against controls of the same size, on "
            f"{ablation.n_rollouts:,} rollouts",
        )


def gaps_of(index: FeatureIndex, reports: Reports) -> tuple[Gap, ...]:
    """Return what was not measured."""
    files = "--data-dir STORE --sae SAE --lora-path ADAPTER"
    effect = "what the adapter changes, and how much of it the features stand for"
    ablated = reports.ablation is not None and reports.ablation.features
    known = [
        (reports.evaluation, effect, f"evaluate {files}"),
        (ablated, "what each feature and each module does", f"ablate {files}"),
        (index.labels, "what each feature is, in words", "label --input features.h5"),
        (
            reports.direct,
            "the tokens that each feature promotes",
            "direct --sae SAE --lora-path ADAPTER",
        ),
        (reports.attribution, "the features behind single predictions", f"attribute {files}"),
    ]
    return tuple(Gap(what, f"lorascope {command}") for one, what, command in known if not one)
