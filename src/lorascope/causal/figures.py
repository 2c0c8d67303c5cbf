"""Pictures of reports, as PNG or SVG: shares recovered, removals of parts, dose curves.

The same report gives the same bytes: fonts are those that matplotlib ships, the user's settings
are ignored and no date is written. An undefined value is labelled, never drawn as zero.
"""

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.artifact import Manifest, replacing
from lorascope.causal.report_records import (
    AblationReport,
    EvaluationReport,
    PartRemoval,
    Recovered,
    SteeringReport,
    TokensRecovered,
)
from lorascope.sites import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and orange after Okabe and Ito: distinct for colour-blind readers.
MAIN, OTHER, INK, SOFT, LINE = "#2f6f9f", "#b35a10", "#1d2630", "#5d6873", "#c3cad1"
_STYLE: dict[str, Any] = {
    "font.sans-serif": ["DejaVu Sans"],  # shipped with matplotlib, so the same everywhere
    "font.size": 8,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{axis}tick.color": LINE for axis in "xy"},
    **{f"{axis}tick.labelcolor": SOFT for axis in "xy"},
    "svg.hashsalt": "lorascope",
}
_DPI = 150
_HEADER = 0.55  # inches above the panels
_NO_METADATA: Mapping[str, Any] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}
_ABOVE_FLOOR = 10.0  # times the floor: a smaller effect is crossed out
_LOWEST_SHARE = -0.05  # where the axis begins
_LONGEST_NAME = 40  # characters


@contextmanager
def drawing(
    out: Path,
    size: tuple[float, float],
    title: str,
    text: str,
    kinds: Sequence[str] = (".png",),
) -> Generator["Figure"]:
    """Yield a figure of `size` inches, and write it beside a report at the end, in all `kinds`.

    Above the panels are a title and a line of text.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - _HEADER / size[1]))
    with mpl.rc_context(), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing|Matplotlib currently does not")
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
        figure = Figure(figsize=size, dpi=_DPI, layout=layout)
        figure.text(0.01, 1 - 0.2 / size[1], title, size=11, weight="bold", va="center")
        figure.text(0.01, 1 - 0.42 / size[1], text, color=SOFT, va="center")
        yield figure
        for kind in kinds:
            with replacing(out.with_suffix(kind)) as temporary:
                figure.savefig(temporary, format=kind[1:], metadata=_NO_METADATA[kind])


def draw_evaluation(report: EvaluationReport, manifest: Manifest, out: Path) -> None:
    """Draw the share recovered by each run and role, and by layer and projection if measured."""
    found, content = report.faithfulness, manifest.content
    runs = {name: run for name, run in found.runs.items() if name not in ("base", "adapter")}
    generated = {name: run.generated for name, run in runs.items() if run.generated is not None}
    panels = {
        "rows written; generated tokens": generated,
        "the SAE in one layer, share of that layer": found.layers,
        "rows written; all predicted tokens": runs,
        "the SAE in one projection, share of that projection": found.projections,
        "the SAE, by role of the predicted token": found.roles,
        "the SAE in a subset of the sites, share of that subset": {
            f"{i}: {one.how}": one for i, one in enumerate(found.subsets, 1)
        },
    }
    panels = {title: parts for title, parts in panels.items() if parts}
    sizes = [len(parts) for parts in panels.values()]
    n_rows = -(-len(sizes) // 2)
    heights = [max(sizes[2 * i : 2 * i + 2]) + 2 for i in range(n_rows)]
    with drawing(
        out,
        (10, 0.8 + 0.19 * sum(heights)),
        f"{plain(content['sae_name'])} on {plain(content['adapter_name'])}: share of the "
        "adapter's effect that is recovered",
        f"1 − KL(adapter ‖ run) / KL(adapter ‖ 0), 0 is {found.zero_is}; "
        f"{found.n_rollouts} held-out rollouts, {found.n_tokens:,} tokens, "
        f"lines: 95 % intervals; L0 {report.reconstruction['l0']:.1f}; "
        f"floor {found.floor.rounding:.1e} nats a token",
    ) as figure:
        grid = figure.add_gridspec(n_rows, 2, height_ratios=heights)
        for i, (title, parts) in enumerate(panels.items()):
            _draw_shares(figure.add_subplot(grid[i // 2, i % 2]), title, parts)


def _draw_shares(axes: "Axes", title: str, parts: Mapping[str, Recovered]) -> None:
    """Draw the share of each part as a bar with its interval, the first on top."""
    axes.set_title(title)
    names = [plain(name) for name in parts]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(_LOWEST_SHARE, 1.25)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.axvline(0, color=LINE, linewidth=0.8)
    axes.axvline(1, color=LINE, linewidth=0.8, linestyle=(0, (3, 3)))
    for i, (name, part) in enumerate(parts.items()):
        is_baseline = isinstance(part, TokensRecovered) and not name.startswith("sae")
        if part.recovered is None:
            axes.text(0.01, i, "undefined", color=SOFT, va="center")
            continue
        color = OTHER if is_baseline else MAIN
        axes.barh(i, _inside(part.recovered), height=0.5, color=color)
        if part.recovered_interval is not None:
            edges = [_inside(edge) for edge in part.recovered_interval]
            axes.plot(edges, [i, i], color=INK, linewidth=1)
        axes.text(1.24, i, f"{part.recovered:.3f}", ha="right", va="center", color=SOFT)


def draw_ablation(report: AblationReport, manifest: Manifest, out: Path) -> None:
    """Draw the cost of removing each layer as bars, and of each site as a map of the network.

    In the bars, ticks are the controls of the same norm and the dashed line is the rounding floor.
    In the map, a site whose effect is at most ten times that floor is crossed out.
    """
    layers, floor = report.layers, report.floor.rounding
    kinds = list(report.projections)
    width = max(8.0, 2.2 + 0.16 * len(layers))
    with drawing(
        out,
        (width, 4.2 + 0.2 * len(kinds)),
        f"{plain(manifest.content['adapter_name'])}: what removing each part changes",
        f"KL(adapter ‖ without) in nats a token; {report.parts_on.n_rollouts} rollouts, "
        f"{report.parts_on.n_tokens:,} tokens; without all {report.parts_on.kl:.3g}; "
        f"floor {floor:.1e} ({manifest.content['compute_dtype']})",
        (".png", ".svg"),
    ) as figure:
        heights = (2.2, 0.25 * len(kinds) + 0.5)
        grid = figure.add_gridspec(2, 2, height_ratios=heights, width_ratios=(40, 1))
        _draw_layers(figure.add_subplot(grid[0, 0]), layers, floor)
        sites = manifest.columns.sites
        axes, colors = figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[1, 1])
        _draw_sites(figure, axes, colors, sites, report)


def _draw_layers(axes: "Axes", layers: Mapping[str, PartRemoval], floor: float) -> None:
    axes.set_title("without one layer; ticks: a random direction of the same norm instead")
    axes.set_xlim(-0.5, len(layers) - 0.5)  # the same as the map below
    for i, part in enumerate(layers.values()):
        axes.bar(i, part.kl, width=0.7, color=MAIN)
        if part.kl_interval is not None:
            axes.plot([i, i], part.kl_interval, color=INK, linewidth=1)
        axes.plot([i - 0.42, i + 0.42], [part.kl_random] * 2, color=OTHER, linewidth=2)
    axes.axhline(floor, color=SOFT, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    axes.annotate(
        f"floor\n{floor:.1e}", (1, floor), xycoords=axes.get_yaxis_transform(), color=SOFT,
        xytext=(4, 0), textcoords="offset points", va="center",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_ylabel("nats a token")
    _layer_ticks(axes, list(layers))


def _draw_sites(
    figure: "Figure", axes: "Axes", colors: "Axes", sites: Sequence[Site], report: AblationReport
) -> None:
    import numpy as np

    kinds, layers = list(report.projections), list(report.layers)
    cells = np.full((len(kinds), len(layers)), np.nan)
    for site, part in zip(sites, report.sites.values(), strict=True):
        row, column = kinds.index(site.projection), layers.index(str(site.layer))
        cells[row, column] = part.kl
        if part.kl <= _ABOVE_FLOOR * report.floor.rounding:
            axes.plot(column, row, marker="x", color=SOFT, markersize=4)
    axes.set_title("without one site; crossed out: not above ten times the floor")
    image = axes.imshow(cells, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    figure.colorbar(image, cax=colors)
    axes.set_yticks(range(len(kinds)), [plain(kind) for kind in kinds])
    axes.spines[:].set_visible(False)
    _layer_ticks(axes, layers)
    axes.set_xlabel("layer")


def _layer_ticks(axes: "Axes", layers: "list[str]") -> None:
    """Name at most 32 layers, at equal steps; -1 is outside any layer."""
    step = -(-len(layers) // 32)
    names = ["none" if name == "-1" else name for name in layers]
    axes.set_xticks(range(0, len(layers), step), names[::step])


def draw_steering(report: SteeringReport, manifest: Manifest, out: Path) -> None:
    """Draw the dose curves: how different, how unlikely and how repetitive the texts are."""
    named = plain(", ".join(map(str, report.features)))
    panels = {
        "KL(adapter ‖ steered), nats a token": "kl",
        "−log p of the text by the adapter, nats a token": "surprise_adapter",
        "share of four-token runs that occurred before": "repeats",
    }
    unchanged = report.arms[0]
    with drawing(
        out,
        (10, 3.4),
        f"{plain(manifest.content['adapter_name'])}: features {named}, {report.how}",
        f"{len(report.prompts)} prompts, changed at {report.where} tokens; 0 is no change; "
        "dashed: a random direction of the same norm instead; lines: 95 % intervals",
    ) as figure:
        all_axes = figure.subplots(1, len(panels))
        for axes, (title, name) in zip(all_axes, panels.items(), strict=True):
            axes.set_title(title, fontsize=8)
            axes.set_xlabel("dose")
            for kind, color, line in (("control", OTHER, (0, (4, 3))), ("feature", MAIN, "-")):
                arms = [unchanged, *(arm for arm in report.arms if arm.kind == kind)]
                arms = [arm for arm in arms if getattr(arm, name) is not None]
                arms.sort(key=lambda arm: arm.dose)
                doses = [arm.dose for arm in arms]
                values = [getattr(arm, name) for arm in arms]
                axes.plot(doses, values, "o", color=color, linestyle=line, markersize=3)
                for arm in arms:
                    edges = getattr(arm, f"{name}_interval", None)
                    if edges is not None:
                        axes.plot([arm.dose] * 2, edges, color=color, linewidth=1, alpha=0.6)
            axes.set_ylim(bottom=0)


def _inside(share: float) -> float:
    """Return a share limited to the axis; its full number is written next to the bar."""
    return min(max(share, _LOWEST_SHARE), 1.0)


def plain(text: Any) -> str:
    """Return text as one line of printable characters, shortened if it is long."""
    text = str(text)
    text = text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
