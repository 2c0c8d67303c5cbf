"""Write what an adapter learned as a report to send: the page's overview as text.

In: the folder of a run, with `features.h5` and those reports there that are of the same SAE and
store. Out: `report.json`, the `Overview` for programs, and `report.md` next to it for people. Both
say what was not measured and which command measures it. No model runs.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorascope.artifact import digest_file
from lorascope.causal.report_records import AttendedToken
from lorascope.causal.study import Made, is_of_index, report_at
from lorascope.config import Config, option
from lorascope.dashboard.headline import percent, probability, quoted
from lorascope.dashboard.overview import Overview, overview_of
from lorascope.dashboard.reports import Reports
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import read_index

REPORTS = (
    "evaluation.json",
    "effects/direct.json",
    "effects/ablation.json",
    "effects/attribution.json",
)
_MARKDOWN = re.compile(r"[\\`*_\[\]<>#|~$&@!]|:(?=//)|(?<=www)\.")  # signs; begins of links
NO_FEATURE = "No single feature has a measurable part of the effect."
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
        None, help="JSON file to write; default: report.json in that folder", identity=False
    )
    overwrite: bool = option(False, help="replace an output of another input", identity=False)

    def check(self) -> None:
        """Check the output's suffix: the text is written beside it."""
        super().check()
        if self.output is not None and self.output.suffix != ".json":
            raise ConfigError(f"--output is {self.output}, expected a .json file")


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
        draw=lambda overview, _: out.with_suffix(".md").write_text(
            markdown(overview), encoding="utf-8"
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
    paths = list(_own_reports(source.parent, index)) if effects is None else effects
    return source, index, Reports.open(paths, index, source)


def _own_reports(folder: Path, index: FeatureIndex) -> Iterator[Path]:
    """Yield the reports of a folder that are of the index's SAE and store."""
    for path in (folder / name for name in REPORTS):
        if path.exists() and is_of_index(path, index.manifest):
            yield path


def markdown(overview: Overview) -> str:
    """Return the report as Markdown, in which text of the corpus is escaped."""
    subject, *sentences = overview.headline
    lines = ["# What the adapter learned", "", plain(subject), ""]
    for sentence in sentences:
        lines += [f"**{plain(sentence)}**", ""]
    if overview.shifts:
        lines += ["## What it does to predictions", ""]
        lines += table(
            ("where", "token", "", "share", "base → adapter", "example"),
            (
                (
                    shift.role,
                    quoted(shift.token),
                    _ARROWS[shift.side],
                    percent(shift.share),
                    f"{probability(shift.example.p_base)} → {probability(shift.example.p_adapter)}",
                    f"{quoted(shift.example.before[-40:])} → {quoted(shift.token)}",
                )
                for shift in overview.shifts
            ),
        )
        lines += [
            "Share: part of KL(adapter ‖ base) that the rise (▲) or fall (▼) of the token makes.",
            "",
        ]
    if overview.answers:
        lines += ["## Base and adapter side by side", ""]
        lines += ["Both answer the same prompts with the same noise; ▸ marks where they part.", ""]
        lines += table(
            ("after", "base", "with the adapter"),
            (
                (
                    quoted(one.prompt[-_PROMPT_SHOWN:]),
                    *(f"{quoted(one.same)} ▸ {quoted(own)}" for own in (one.base, one.adapter)),
                )
                for one in overview.answers
            ),
        )
    if overview.gauges:
        lines += ["## How far the features stand for it", ""]
        names = sorted({name for gauge in overview.gauges for name in gauge.baselines})
        lines += table(
            ("effect on", "features", "95 % interval", *names),
            (
                (
                    gauge.over,
                    percent(gauge.recovered),
                    " to ".join(map(percent, gauge.interval)) if gauge.interval else "—",
                    *(_percent(gauge.baselines.get(name)) for name in names),
                )
                for gauge in overview.gauges
            ),
        )
    if overview.facts:
        lines += ["## What it learned", ""]
        lines += [f"Features by {overview.ranked_by}." if overview.features else NO_FEATURE, ""]
        if any(one.effect is not None for one in overview.features):
            lines += [_EFFECT, ""]
    if overview.features:
        lines += table(
            ("feature", "label", "fires", "site", "effect", "verdict", "strongest example"),
            (
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
            ),
        )
    if overview.groups:
        lines += ["## Groups of features", ""]
        lines += [f"Share: part of the sum of all features ({overview.ranked_by}).", ""]
        lines += table(
            ("group", "share", "95 % interval", "features", "the largest"),
            (
                (
                    one.name,
                    percent(one.share),
                    " to ".join(map(percent, one.interval)) if one.interval else "—",
                    f"{one.n_features:,}",
                    ", ".join(map(str, one.features)),
                )
                for one in overview.groups
            ),
        )
    if overview.places:
        lines += ["## Where it lives", "", "KL in nats a token after the module is off.", ""]
        layers = sorted({place.layer for place in overview.places})
        kl = {(place.projection, place.layer): f"{place.kl:.2g}" for place in overview.places}
        lines += table(
            ("projection", *map(str, layers)),
            (
                (kind, *(kl.get((kind, layer), "—") for layer in layers))
                for kind in dict.fromkeys(place.projection for place in overview.places)
            ),
        )
    if overview.attention is not None and overview.attention.heads:
        lines += ["## Where its heads look", "", _ATTENTION, ""]
        lines += table(
            ("layer", "head", "moved", "most at", "looks more at", "less at"),
            (
                (
                    str(one.layer),
                    str(one.head),
                    percent(one.moved),
                    f"{quoted(one.example.before[-40:])} → {quoted(one.example.token)}",
                    _attended(one.example.gains),
                    _attended(one.example.losses),
                )
                for one in overview.attention.heads
            ),
        )
    if overview.facts:
        lines += ["## How sure this is", ""]
        facts = ((fact.name, fact.value, fact.meaning) for fact in overview.facts)
        lines += table(("", "", ""), facts)
    if overview.gaps:
        lines += ["## Not measured", ""]
        lines += [f"- {plain(gap.what)}: `{gap.command}`" for gap in overview.gaps] + [""]
    return "\n".join(lines)


def _attended(tokens: Sequence[AttendedToken]) -> str:
    return ", ".join(
        f"{quoted(one.token)} {percent(one.base)} → {percent(one.adapter)}" for one in tokens
    )


def _percent(share: float | None) -> str:
    return "—" if share is None else percent(share)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, with an empty line after it."""
    lines = [head, ["---"] * len(head), *([plain(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def plain(text: str) -> str:
    """Return text on one line that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split("\n")))
