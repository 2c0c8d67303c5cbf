"""Write what an adapter learned as a report to send: the page's overview as text.

In: the folder of a run, with `features.h5` and those reports there that are of the same SAE and
store. Out: `report.json`, the `Overview` for programs, and `report.md` next to it for people. Both
say what was not measured and which command measures it. No model runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorascope.artifact import digest_file
from lorascope.causal.report_records import AttendedToken, Interval
from lorascope.causal.study import Made, report_at, reports_beside
from lorascope.config import Config, option
from lorascope.dashboard.headline import percent, probability, quoted
from lorascope.dashboard.overview import Overview, overview_of
from lorascope.dashboard.reports import Reports
from lorascope.dashboard.sections import Document, Section, plain, write_sealed
from lorascope.errors import ArtifactError
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import read_index

NO_FEATURE = "No single feature has a measurable part of the effect."
_SHARE = "Share: part of KL(adapter ‖ base) that the rise (▲) or fall (▼) of the token makes."
_SAME_NOISE = "Both answer the same prompts with the same noise; ▸ marks where they part."
_EFFECT = (
    "Effect: KL after removal of the feature, as a share of KL after removal of the adapter. "
    "Shares of several features do not add up."
)
_ATTENTION = (
    "Moved: share of a head's attention that goes to other tokens than in the base model, a mean "
    "over tokens; then the token at which most moves, and shares of attention in base → adapter."
)
_PROMPT_SHOWN = 120  # characters
_ARROWS = {"rises": "▲", "falls": "▼"}


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """Options of `lorascope report`."""

    input: Path = option(help="folder of a run, or its features.h5", identity=False)
    output: Path | None = option(
        None,
        help="JSON file to write; default: report.json in that folder",
        identity=False,
        suffix=".json",
    )
    overwrite: bool = option(False, help="replace an output of another input", identity=False)


def run(config: ReportConfig) -> Path:
    """Write the report unless it is finished already, and return `report.json`.

    Raises ArtifactError if the folder has no feature index, or if a report belongs to another.
    """
    source, index, reports = open_results(config.input.expanduser())
    layout = index.manifest.layout
    if layout is None:
        raise ArtifactError(
            f"{source} does not name the sites of its features; give a features.h5 of "
            "lorascope collect"
        )
    labels = {} if index.labels is None else {"labels": index.labels.manifest.digest}
    out = config.output or source.with_name("report.json")

    def make() -> Made:
        return Made(overview_of(index, reports), layout, {"n_features": len(index)})

    return report_at(
        out,
        Overview,
        settings=config.settings(),
        parents={"features": digest_file(source), **labels, **reports.parents},
        overwrite=config.overwrite,
        make=make,
        table=lambda overview: "\n".join(overview.headline),
        draw=lambda overview, manifest, out: write_sealed(
            out.with_suffix(".md"), markdown(overview), manifest
        ),
    )


def open_results(
    path: Path, effects: Sequence[Path] | None = None
) -> tuple[Path, FeatureIndex, Reports]:
    """Return the path of an index, the index, and its reports; `path` may be the folder of a run.

    Reports are those of `effects`, or else those beside the index. Raises ArtifactError if there is
    no index, or if a report is damaged or does not fit it.
    """
    source = path / "features.h5" if path.is_dir() else path
    if not source.exists():
        raise ArtifactError(
            f"{source.parent} has no {source.name}; give the folder of a run, or a feature index"
        )
    index = read_index(source)
    if effects is None:
        effects = list(reports_beside(source, index.manifest).values())
    return source, index, Reports.open(effects, index, source)


def markdown(overview: Overview) -> str:
    """Return the report as Markdown, in which text of the corpus is escaped."""
    subject, *sentences = overview.headline
    lead = [plain(subject), *(f"**{plain(sentence)}**" for sentence in sentences)]
    text = Document("What the adapter learned", [*_sections(overview)]).as_markdown(lead)
    gaps = [f"- {plain(gap.what)}: `{gap.command}`" for gap in overview.gaps]
    return "\n".join([text, "## Not measured", "", *gaps, ""]) if gaps else text


def _sections(overview: Overview) -> Iterator[Section]:
    if overview.shifts:
        head = ("where", "token", "", "share", "base → adapter", "example")
        rows = [
            (
                shift.role,
                quoted(shift.token),
                _ARROWS[shift.side],
                percent(shift.share),
                f"{probability(shift.example.p_base)} → {probability(shift.example.p_adapter)}",
                f"{quoted(shift.example.before[-40:])} → {quoted(shift.token)}",
            )
            for shift in overview.shifts
        ]
        yield Section("What it does to predictions", [_SHARE], [(head, rows)])
    if overview.answers:
        rows = [
            (
                quoted(one.prompt[-_PROMPT_SHOWN:]),
                *(f"{quoted(one.same)} ▸ {quoted(own)}" for own in (one.base, one.adapter)),
            )
            for one in overview.answers
        ]
        head = ("after", "base", "with the adapter")
        yield Section("Base and adapter side by side", [_SAME_NOISE], [(head, rows)])
    if overview.gauges:
        names = sorted({name for gauge in overview.gauges for name in gauge.baselines})
        rows = [
            (
                gauge.over,
                percent(gauge.recovered),
                _range(gauge.interval),
                *(_percent(gauge.baselines.get(name)) for name in names),
            )
            for gauge in overview.gauges
        ]
        head = ("effect on", "features", "95 % interval", *names)
        yield Section("How far the features stand for it", [], [(head, rows)])
    if overview.facts:
        order = f"Features by {overview.ranked_by}." if overview.features else NO_FEATURE
        is_effect = any(one.effect is not None for one in overview.features)
        head = ("feature", "label", "fires", "site", "effect", "verdict", "strongest example")
        rows = [
            (
                str(one.feature),
                one.name or "—",
                one.role,
                one.site,
                _percent(one.effect),
                one.verdict or "—",
                " ".join(map(quoted, (one.before, one.token, one.after))),
            )
            for one in overview.features
        ]
        yield Section(
            "What it learned", [order, *[_EFFECT] * is_effect], [(head, rows)] * bool(rows)
        )
    if overview.groups:
        note = f"Share: part of the sum of all features ({overview.ranked_by})."
        rows = [
            (
                one.name,
                percent(one.share),
                _range(one.interval),
                f"{one.n_features:,}",
                ", ".join(map(str, one.features)),
            )
            for one in overview.groups
        ]
        head = ("group", "share", "95 % interval", "features", "the largest")
        yield Section("Groups of features", [note], [(head, rows)])
    if overview.places:
        layers = sorted({place.layer for place in overview.places})
        kl = {(place.projection, place.layer): f"{place.kl:.2g}" for place in overview.places}
        rows = [
            (kind, *(kl.get((kind, layer), "—") for layer in layers))
            for kind in dict.fromkeys(place.projection for place in overview.places)
        ]
        head = ("projection", *map(str, layers))
        note = "KL in nats a token after the module is off."
        yield Section("Where it lives", [note], [(head, rows)])
    if overview.attention is not None and overview.attention.heads:
        rows = [
            (
                str(one.layer),
                str(one.head),
                percent(one.moved),
                f"{quoted(one.example.before[-40:])} → {quoted(one.example.token)}",
                _attended(one.example.gains),
                _attended(one.example.losses),
            )
            for one in overview.attention.heads
        ]
        head = ("layer", "head", "moved", "most at", "looks more at", "less at")
        yield Section("Where its heads look", [_ATTENTION], [(head, rows)])
    if overview.facts:
        rows = [(fact.name, fact.value, fact.meaning) for fact in overview.facts]
        yield Section("How sure this is", [], [(("", "", ""), rows)])


def _attended(tokens: Sequence[AttendedToken]) -> str:
    return ", ".join(
        f"{quoted(one.token)} {percent(one.base)} → {percent(one.adapter)}" for one in tokens
    )


def _range(interval: Interval) -> str:
    return " to ".join(map(percent, interval)) if interval else "—"


def _percent(share: float | None) -> str:
    return "—" if share is None else percent(share)
