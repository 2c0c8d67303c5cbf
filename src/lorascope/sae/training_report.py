"""One page that shows how an SAE was trained and what came of it, as PNG or SVG.

A header with the facts, then six panels: unexplained variance, L0 and learning rate over the tokens
trained on; dead latents with the loss that revives them; how often latents fire; and the columns
that are explained worst. A value that is missing or undefined is left out or named so, never drawn
as zero.

The same numbers give the same bytes: fonts are those that matplotlib ships, the user's matplotlib
settings do not count, and no date or version is written. Text is drawn as it is: a column's name
may hold `$`, `<` or a line break.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.artifact import replacing
from lorascope.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = Sequence[Mapping[str, float | None]]

# A muted part of the palette of Okabe and Ito, which the colour-blind can tell apart.
_BLUE, _ORANGE, _GREEN, _ROSE = "#2f6f9f", "#c26a1d", "#2a8a74", "#a9577c"
_INK, _SOFT, _LINE, _FAINT = "#1d2630", "#66717d", "#c3cad1", "#e9ecef"
_STYLE: dict[str, Any] = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # shipped with matplotlib, so everywhere the same
    "font.size": 8.5,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "lorascope",
}
_SIZE, _DPI = (11.69, 8.27), 150  # A4 landscape, inches
_DROPPED: dict[str, dict[str, None]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}
_NAME = 24  # characters of a column's name
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_training(manifest: Mapping[str, Any], log: Log, path: Path) -> Path:
    """Draw an SAE's training run, and return the picture's path.

    `manifest` is the SAE's, `log` the lines of its training log in order of their step (none is
    allowed). The end of `path` chooses the form: .png, 1754 pixels wide, or .svg. Raises
    ConfigError at any other end.
    """
    if path.suffix not in _DROPPED:
        raise ConfigError(f"{path} ends in {path.suffix!r}, expected .png or .svg")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # drawn as a box
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
        figure = Figure(figsize=_SIZE, dpi=_DPI)
        _draw_page(figure, manifest, log)
        with replacing(path) as beside:
            figure.savefig(beside, format=path.suffix[1:], metadata=_DROPPED[path.suffix])
    return path


def _draw_page(figure: "Figure", manifest: Mapping[str, Any], log: Log) -> None:
    content = manifest.get("content", {})
    report = content.get("report") or {}
    tokens, unit = _abscissa(manifest, log)
    _draw_header(figure, manifest, tokens if unit == "tokens" else [])
    grid = figure.add_gridspec(
        *(2, 12), left=0.055, right=0.965, top=0.735, bottom=0.075, hspace=0.42, wspace=3.2
    )

    fvu = figure.add_subplot(grid[0, :6])
    values = _column(log, "fvu")
    _title(fvu, "Unexplained variance", "FVU, training batches" if log else "FVU")
    _curve(fvu, tokens, values, _BLUE)
    _level(fvu, _number(report.get("fvu")), "held out", _ORANGE, 4)
    _scale_fvu(fvu, [*values, _number(report.get("fvu"))])

    l0 = figure.add_subplot(grid[0, 6:9])
    _title(l0, "Latents per token", "L0")
    values, k = _column(log, "l0"), _number(content.get("k"))
    _curve(l0, tokens, values, _BLUE)
    at_inference = _number(report.get("l0"))
    above = (at_inference or 0) >= (k or 0)
    _level(l0, at_inference, "held out", _ORANGE, 3, below=not above)
    _level(l0, k, "k", _SOFT, 3, below=above)
    _from_zero(l0, [*values, k, at_inference])

    rate = figure.add_subplot(grid[0, 9:])
    _title(rate, "Learning rate", "Adam")
    values = _column(log, "lr")
    _curve(rate, tokens, values, _GREEN)
    if peak := max((v for v in values if v is not None), default=None):
        _title(rate, "Learning rate", f"Adam, peak {peak:.2g}")
    _from_zero(rate, values)

    two = grid[1, :4].subgridspec(2, 1, hspace=0.6)
    dead, auxk = figure.add_subplot(two[0]), figure.add_subplot(two[1])
    _title(dead, "Dead latents", "share of all")
    values = _column(log, "dead")
    _curve(dead, tokens, values, _ROSE)
    _from_zero(dead, values, percent=True)
    _title(auxk, "Aux-k loss", "what revives them")
    values = _column(log, "auxk")
    _curve(auxk, tokens, values, _ROSE)
    _from_zero(auxk, values)

    for axes in (fvu, l0, rate, dead, auxk):
        _tokens_axis(axes, tokens, unit, named=axes is not dead)
    _draw_density(figure.add_subplot(grid[1, 4:8]), report.get("density") or {})
    _draw_worst(figure.add_subplot(grid[1, 8:]), report.get("worst_columns") or [])


def _draw_header(figure: "Figure", manifest: Mapping[str, Any], tokens: Sequence[float]) -> None:
    """Write the title, the facts that decided the SAE, and the numbers that came out."""
    content, settings = manifest.get("content", {}), manifest.get("settings", {})
    report = content.get("report") or {}
    d_in, d_sae = content.get("d_in"), content.get("d_sae")
    figure.text(0.035, 0.95, "How the SAE was trained", size=17, weight="bold", va="center")
    facts = {
        "d_in": d_in,
        "d_sae": d_sae,
        "k": content.get("k"),
        "architecture": content.get("architecture", settings.get("architecture")),
        "units": content.get("normalize"),
        "tokens": max(tokens, default=None),
        "steps": content.get("steps"),
        "batch": settings.get("batch_size"),
        "seed": settings.get("seed"),
        "store": str(manifest.get("parents", {}).get("activations", ""))[:12] or None,
    }
    shown = [f"{name} {_fact(value)}" for name, value in facts.items() if value is not None]
    figure.text(0.035, 0.912, "   ·   ".join(shown), size=8.5, color=_SOFT, va="center")
    alive, l0_train = report.get("alive"), (report.get("train") or {}).get("l0")
    tiles = [
        ("FVU, held out", _shown(report.get("fvu"), 3), _other_units(report)),
        ("L0, held out", _shown(report.get("l0"), 2), _after("training", l0_train, 2)),
        ("cosine", _shown(report.get("cosine"), 3), "of row and reconstruction"),
        ("latents alive", _fact(alive), _share(alive, d_sae)),
        ("held-out tokens", _fact(report.get("n_rows")), ""),
    ]
    for i, (name, value, more) in enumerate(tiles):
        x = 0.035 + i * 0.188
        color = _INK if value != "undefined" else _SOFT
        figure.text(x, 0.868, name, size=8.5, color=_SOFT, va="center")
        figure.text(x, 0.836, value, size=17, color=color, va="center")
        figure.text(x, 0.805, more, size=8, color=_SOFT, va="center")


def _draw_density(axes: "Axes", density: Mapping[str, Any]) -> None:
    """Draw the number of latents in each decade of the firing rate; `never` stands apart."""
    _title(axes, "How often latents fire", "latents by share of the held-out tokens")
    decades = sorted(int(name[2:]) for name in density if name.startswith("1e"))
    if not decades:
        _say(axes, "not measured")
        return
    never, first = _number(density.get("never")) or 0, decades[0]
    counts = [_number(density[f"1e{d}"]) or 0 for d in decades]
    bars = [(d + 0.5, n, _BLUE) for d, n in zip(decades, counts, strict=True)]
    bars.append((first - 1.1, never, _ROSE))
    for x, n, color in bars:
        axes.bar(x, n, width=0.92, color=color, linewidth=0)
        axes.annotate(
            *(f"{n:,.0f}" if n else "", (x, n)),
            **{"xytext": (0, 3), "textcoords": "offset points", "ha": "center"},
            **{"size": 8, "color": _INK},
        )
    edges = [*decades, decades[-1] + 1]
    names = ["1" if d == 0 else f"10{d}".translate(_SUPERSCRIPTS) for d in edges]
    names = ["1" if d == 0 else "10" + str(d).translate(_SUPERSCRIPTS) for d in edges]
    axes.set_xticks([first - 1.1, *edges], ["never", *names])
    axes.set_xlim(first - 1.7, edges[-1] + 0.1)
    axes.set_ylim(0, max(1, never, *counts) * 1.12)
    axes.tick_params(axis="y", labelleft=False)
    axes.spines["left"].set_visible(False)


def _draw_worst(axes: "Axes", worst: Sequence[Mapping[str, Any]]) -> None:
    """Draw the columns of highest FVU, worst on top."""
    _title(axes, "Worst columns", "FVU of one column, held out")
    rows = [(_plain(row.get("column")), _number(row.get("fvu"))) for row in worst]
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    if not rows:
        _say(axes, "not measured")
        return
    places = range(len(rows))
    reach = max(1.0, *(value or 0.0 for _, value in rows))
    axes.barh(places, [reach] * len(rows), height=0.16, color=_FAINT, linewidth=0)
    axes.barh(places, [v or 0.0 for _, v in rows], height=0.16, color=_ORANGE, linewidth=0)
    for i, (name, value) in enumerate(rows):
        axes.annotate(name, (0, i), (0, 6), textcoords="offset points", size=8.5)
        axes.annotate(
            *(_shown(value, 3), (reach, i), (0, 6)),
            **{"textcoords": "offset points", "ha": "right", "size": 8.5, "color": _SOFT},
        )
    axes.set_yticks([])
    axes.set_xlim(0, reach)
    axes.set_ylim(max(len(rows), 5) - 0.6, -0.75)


def _title(axes: "Axes", title: str, unit: str) -> None:
    """Write a panel's title and, softer behind it, what is drawn."""
    for old in list(axes.texts):
        old.remove()
    bold = axes.annotate(
        *(title, (0, 1), (0, 9)),
        **{"xycoords": "axes fraction", "textcoords": "offset points"},
        **{"size": 9.5, "weight": "bold", "annotation_clip": False},
    )
    axes.annotate(
        *(unit, (1, 0), (6, 0)),
        **{"xycoords": bold, "textcoords": "offset points", "size": 8, "color": _SOFT},
        annotation_clip=False,
    )


def _curve(
    axes: "Axes", tokens: Sequence[float], values: Sequence[float | None], color: str
) -> None:
    if any(value is not None for value in values):
        axes.plot(tokens, [math.nan if v is None else v for v in values], color=color)
    else:
        _say(axes, "not logged")


def _level(
    axes: "Axes", value: float | None, name: str, color: str, digits: int, *, below: bool = False
) -> None:
    """Draw a line across a panel, with its name and value at the right end of it."""
    if value is None:
        return
    axes.axhline(value, color=color, linewidth=1.1, linestyle=(0, (5, 3)))
    axes.annotate(
        *(f"{name} {value:.{digits}g}", (1, value), (0, -4 if below else 4)),
        **{"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "color": color},
        **{"ha": "right", "va": "top" if below else "bottom", "size": 8.5},
    )


def _say(axes: "Axes", text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_SOFT)
    axes.set_yticks([])


def _scale_fvu(axes: "Axes", values: Sequence[float | None]) -> None:
    """Choose a logarithmic axis where the values span more than a factor of three."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    known = [value for value in values if value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if low <= 0 or high < 3 * low:
        _from_zero(axes, values)
        return
    axes.set_yscale("log")
    axes.set_ylim(low / 1.18, high * 1.12)
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    leads = (1, 2, 3, 5, 7) if high < 30 * low else (1, 3) if high < 1000 * low else (1,)
    ticks = [lead * 10.0**e for e in exponents for lead in leads]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _from_zero(axes: "Axes", values: Sequence[float | None], *, percent: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    known = [value for value in values if value is not None]
    if not known:
        return
    top = max(known) * 1.2
    axes.set_ylim(min(0.0, *known), top if top > 0 else 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(4 if axes.bbox.height > 200 else 2))
    form = "{:.3g} %".format if percent else "{:.6g}".format
    factor = 100.0 if percent else 1.0
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(factor * value)))


def _tokens_axis(axes: "Axes", tokens: Sequence[float], unit: str, *, named: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, max(tokens, default=0) or 1)
    narrow = axes.bbox.width < 450
    axes.xaxis.set_major_locator(MaxNLocator(3 if narrow else 6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _brief(value)))
    if not tokens:
        axes.set_xticks([])
    elif named:
        axes.set_xlabel(unit, loc="right", labelpad=1)
    else:
        axes.tick_params(axis="x", labelbottom=False)


def _abscissa(manifest: Mapping[str, Any], log: Log) -> tuple[list[float], str]:
    """Return how far each line of the log was, and the unit: tokens where they can be known."""
    steps = [_number(line.get("step")) or 0.0 for line in log]
    tokens = [_number(line.get("tokens")) for line in log]
    known = [value for value in tokens if value is not None]
    if len(known) == len(log):
        return known, "tokens"
    batch = _number(manifest.get("settings", {}).get("batch_size"))
    return ([step * batch for step in steps], "tokens") if batch else (steps, "steps")


def _column(log: Log, name: str) -> list[float | None]:
    return [_number(line.get(name)) for line in log]


def _number(value: Any) -> float | None:
    """Return a finite number, None for anything else."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _brief(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:g}"


def _fact(value: Any) -> str:
    number = _number(value)
    if number is not None:
        return f"{number:,.0f}" if number.is_integer() else f"{number:g}"
    return "undefined" if value is None else _plain(value)


def _shown(value: Any, decimals: int) -> str:
    number = _number(value)
    return "undefined" if number is None else f"{number:.{decimals}f}"


def _after(name: str, value: Any, decimals: int) -> str:
    return "" if _number(value) is None else f"{name} {_shown(value, decimals)}"


def _other_units(report: Mapping[str, Any]) -> str:
    parts = [_after(name, report.get(f"fvu_{name}"), 3) for name in ("raw", "effect")]
    return " · ".join(part for part in parts if part)


def _share(part: Any, whole: Any) -> str:
    n, total = _number(part), _number(whole)
    return f"of {total:,.0f}, {n / total:.1%}" if n is not None and total else ""


def _plain(text: Any) -> str:
    """Return text in one line of printable characters, its middle left out where it is long."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text)
    )
    half = (_NAME - 1) // 2
    return text if len(text) <= _NAME else f"{text[:half]}…{text[-half:]}"
