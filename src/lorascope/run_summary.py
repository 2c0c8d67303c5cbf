"""The figures of a finished run: `summary.json` in its folder, for programs and the terminal."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lorascope.artifact import read_manifest
from lorascope.features.label_file import FILE as LABELS
from lorascope.features.label_file import Count, Share
from lorascope.record_json import Range

SUMMARY = "summary.json"

Amount = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The figures of a run.

    `fvu` and `l0` are of held-out rows. `recovered` is the share of the adapter's effect that the
    SAE recovers, over all predictions and over generated ones: None if it was not measured or is
    undefined. Scores of labels are None if none was scored. `failed` has the message
    of each stage whose report could not be made, `seconds` the time of each stage in this run.
    """

    rollouts: Count
    tokens: Count
    columns: Count
    features: Count
    features_alive: Count
    fvu: Amount | None
    l0: Amount
    recovered: float | None
    recovered_generated: float | None
    label_score: Share | None
    label_score_shuffled: Share | None
    labels_unclear: Count
    page: str
    page_bytes: Count
    failed: Mapping[str, str]
    seconds: Mapping[str, Amount]


def summarize(folder: Path, failed: Mapping[str, str], seconds: Mapping[str, float]) -> RunSummary:
    """Return the figures of a finished run, from the manifests of its artifacts."""

    def content(name: str) -> Mapping[str, Any]:
        manifest = read_manifest(folder / name)
        assert manifest is not None, "its stage has finished"
        return manifest.content

    store, sae, index = content("activations"), content("sae"), content("features.h5")
    labels = content(LABELS)
    recovered, of_generated = _recovered(folder / "evaluation.json")
    return RunSummary(
        rollouts=store["n_rollouts"],
        tokens=store["n_rows"],
        columns=store["d_in"],
        features=index["n_features"],
        features_alive=index["n_alive"],
        fvu=sae["report"]["fvu"],
        l0=sae["report"]["l0"],
        recovered=recovered,
        recovered_generated=of_generated,
        label_score=labels["balanced_accuracy"],
        label_score_shuffled=labels["shuffled"],
        labels_unclear=labels["n_by_kind"]["unclear"],
        page="dashboard.html",
        page_bytes=(folder / "dashboard.html").stat().st_size,
        failed=failed,
        seconds=seconds,
    )


def _recovered(path: Path) -> tuple[float | None, float | None]:
    """Return the shares of the adapter's effect that the SAE recovers, if they were measured."""
    from lorascope.causal.report_records import EvaluationReport
    from lorascope.causal.study import read_report

    if not path.exists():
        return None, None
    sae = read_report(path, (EvaluationReport,))[0].faithfulness.runs["sae"]
    return sae.recovered, None if sae.generated is None else sae.generated.recovered


def as_table(summary: RunSummary) -> str:
    """Return the summary as a table to read."""
    recovered = {
        "effect recovered": summary.recovered,
        "of generated tokens": summary.recovered_generated,
    }
    rows = {
        "rollouts": f"{summary.rollouts:,}",
        "tokens": f"{summary.tokens:,}",
        "columns": f"{summary.columns:,}",
        "features alive": f"{summary.features_alive:,} of {summary.features:,}",
        "FVU (held out)": f"{summary.fvu:.4f}",
        "L0 (held out)": f"{summary.l0:.2f}",
        **{name: f"{value:.1%}" for name, value in recovered.items() if value is not None},
        "labels, score": f"{summary.label_score or 0.5:.3f}",
        "of shuffled labels": f"{summary.label_score_shuffled or 0.5:.3f}",
        "unclear labels": f"{summary.labels_unclear:,}",
        **{
            f"{name}, seconds": "failed" if name in summary.failed else f"{value:.1f}"
            for name, value in summary.seconds.items()
        },
        "page": f"{summary.page_bytes / 1e6:.1f} MB",
    }
    return "\n".join(f"  {name:<20} {value:>16}" for name, value in rows.items())
