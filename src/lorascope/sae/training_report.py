"""One page that shows how an SAE was trained and what came of it, as PNG or SVG.

A header with the SAE's name, the settings that made it and its numbers, then six panels: FVU, L0
and learning rate over the tokens trained on; dead latents with the loss that revives them; how
often latents fire; and the columns that are explained worst. What is blue was measured in
training, what is orange on held-out tokens. A value that is missing or undefined is left out or
named so, never drawn as zero. `docs/metrics.md` gives every formula.

The same input gives the same bytes: fonts are those that matplotlib ships, the user's matplotlib
settings do not count, and no date or version is written. Text is drawn as it is: a column's name
may hold `$`, `<` or a line break.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorascope.artifact import digest_of, replacing
from lorascope.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

Log = Sequence[Mapping[str, float | None]]

# Blue and orange after Okabe and Ito, which the colour-blind can tell apart; dark enough for text.
_TRAINING, _HELD_OUT = "#2f6f9f", "#b35a10"
_INK, _SOFT, _LINE, _FAINT = "#1d2630", "#5d6873", "#c3cad1", "#e9ecef"
_STYLE: dict[str, Any] = {
    "font.sans-serif": ["DejaVu Sans"],  # shipped with matplotlib, so everywhere the same
    "font.size": 8,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _FAINT,
    **{f"{axis}tick.color": _LINE for axis in "xy"},
    **{f"{axis}tick.labelcolor": _SOFT for axis in "xy"},
    "ytick.major.size": 0,
    "lines.markeredgewidth": 0,
    "svg.hashsalt": "lorascope",
}
_SIZE, _DPI = (1754, 1240), 150  # pixels; on paper A4 landscape
_LEFT, _RIGHT = 0.055, 0.965  # edges of everything but the labels of the y axes
_DROPPED: Mapping[str, Any] = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
_LONGEST = 120  # characters of a text; more never fit
_LOWEST = -6  # the decade of firing rates that also holds all below it (evaluate.py)
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_training(manifest: Mapping[str, Any], log: Log, path: Path) -> Path:
    """Draw an SAE's training run, and return the picture's path.

    `manifest` is the SAE's, `log` the lines of its training log in order of their step (none is
    allowed); the name of `path` without its end is shown as the SAE's. The end chooses the form:
    .png, 1754 x 1240 pixels, or .svg. Raises ConfigError at any other end.
    """
    if path.suffix not in _DROPPED:
        raise ConfigError(f"{path} ends in {path.suffix!r}, expected .png or .svg")
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing|Matplotlib currently does not")
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
        figure = Figure(figsize=(_SIZE[0] / _DPI, _SIZE[1] / _DPI), dpi=_DPI)
        FigureCanvasAgg(figure)  # measures text
        _draw_header(figure, manifest, path.stem)
        _draw_panels(figure, manifest, [line for line in log if _number(line.get("step"))])
        with replacing(path) as beside:
            figure.savefig(beside, format=path.suffix[1:], metadata=_DROPPED[path.suffix])
    return path


def _draw_header(figure: "Figure", manifest: Mapping[str, Any], name: str) -> None:
    """Write the SAE's name, the settings that decided it, and the numbers that came out."""
    content, settings = manifest.get("content", {}), manifest.get("settings", {})
    report, config = content.get("report") or {}, content.get("config") or {}
    digests = {"SAE": "", "store": manifest.get("parents", {}).get("activations")}
    with suppress(ValueError):  # a value that has no place in JSON, such as NaN
        digests["SAE"] = digest_of({**manifest, "files": {}})
    shown = [f"{word} {digest[:12]}" for word, digest in digests.items() if digest]
    figure.text(_RIGHT, 0.953, "   ".join(shown), color=_SOFT, ha="right", va="center")
    title = figure.text(_LEFT, 0.953, _plain(name), size=17, weight="bold", va="center")
    _fit(title, 0.65 * _SIZE[0])

    model = {
        **{key: content.get(key) for key in ("architecture", "d_sae", "d_in", "k", "normalize")},
        "signed": "yes" if content.get("signed") else None,
        "left out": len(content.get("left_out") or ()) or None,
        "roles": " ".join(content.get("roles") or ()) or None,
        "projections": " ".join(config.get("adapter_types") or ()) or None,
    }
    named = ("batch_size", "epochs", "warmup", "dead_after", "auxk_alpha", "precision", "seed")
    run = {
        "steps": content.get("steps"),
        "tokens": (content.get("steps") or 0) * (settings.get("batch_size") or 0) or None,
        "lr": config.get("learning_rate"),
        **{key: settings.get(key) for key in named},
    }
    for facts, y in ((model, 0.916), (run, 0.893)):
        words = [_named(key, value) for key, value in facts.items() if value is not None]
        _fit(figure.text(_LEFT, y, "  ·  ".join(words), color=_SOFT, va="center"))

    alive, d_sae = _number(report.get("alive")), _number(content.get("d_sae"))
    share = f"{alive / d_sae:.1%} of all" if alive is not None and d_sae else ""
    units = [_named(unit, report.get(f"fvu_{unit}")) for unit in ("raw", "effect")]
    trained = _named("training", (report.get("train") or {}).get("l0"))
    rest = _named("calibrated on", report.get("n_calibrated"))
    tiles = [
        ("FVU, held out", report.get("fvu"), " · ".join(filter(None, units))),
        ("L0, held out", report.get("l0"), trained),
        ("cosine, held out", report.get("cosine"), "of row and reconstruction"),
        ("latents alive", alive, share),
        ("held-out tokens", report.get("n_rows"), rest),
    ]
    stability = [v for v in map(_number, content.get("stability") or ()) if v is not None]
    if stability:
        low, middle, high = np.quantile(stability, [0.25, 0.5, 0.75]).tolist()
        tiles.append(("stability, median", middle, f"middle half {low:.2f} to {high:.2f}"))
    for i, (word, value, more) in enumerate(tiles):
        x = _LEFT + i * (_RIGHT - _LEFT) / 6
        figure.text(x, 0.852, word, color=_SOFT, va="center")
        figure.text(x, 0.821, _shown(value), size=17, va="center")
        figure.text(x, 0.790, more, color=_SOFT, va="center")


def _draw_panels(figure: "Figure", manifest: Mapping[str, Any], log: Log) -> None:
    """Draw the log and the report; two panels of four columns are twice as wide."""
    content, settings = manifest.get("content", {}), manifest.get("settings", {})
    report = content.get("report") or {}
    grid = figure.add_gridspec(
        *(2, 4), left=_LEFT, right=_RIGHT, top=0.692, bottom=0.075, hspace=0.5, wspace=0.24
    )
    small = grid[1, 0].subgridspec(2, 1, hspace=0.75)
    places = grid[0, :2], grid[0, 2], grid[0, 3], small[0], small[1], grid[1, 1:3], grid[1, 3]
    fvu, l0, rate, dead, auxk, density, worst = map(figure.add_subplot, places)

    batch = _number(settings.get("batch_size"))
    unit = "training tokens" if batch else "steps"
    at = [(_number(line["step"]) or 0.0) * (batch or 1.0) for line in log]
    held_out = ("╍ held out", report.get("fvu"), _HELD_OUT)
    _draw_course(fvu, "Unexplained variance", "FVU, share", at, _column(log, "fvu"), [held_out])
    levels = [("┈ k", content.get("k"), _SOFT), ("╍ held out", report.get("l0"), _HELD_OUT)]
    _draw_course(l0, "Latents a token", "L0", at, _column(log, "l0"), levels)
    values = _column(log, "lr")
    peak = max((value for value in values if value is not None), default=0.0)
    power = math.floor(math.log10(peak)) if peak > 0 else 0
    of_ten = f"× {_power(power)}, peak {peak / 10.0**power:.3g}" if peak > 0 else ""
    _draw_course(rate, "Learning rate", of_ten, at, values, factor=10.0**-power)
    _draw_course(dead, "Dead latents", "% of all", at, _column(log, "dead"), factor=100.0)
    _draw_course(auxk, "Aux-k loss", "share of variance", at, _column(log, "auxk"))
    for axes in (fvu, l0, rate, auxk):
        axes.set_xlabel(unit if at else "", loc="right", labelpad=1)
    dead.tick_params(axis="x", labelbottom=False)
    _draw_density(density, report, _number(content.get("d_sae")))
    _draw_worst(worst, report.get("worst_columns") or [])


def _draw_course(
    axes: "Axes",
    title: str,
    unit: str,
    at: Sequence[float],
    values: Sequence[float | None],
    levels: Sequence[tuple[str, Any, str]] = (),
    *,
    factor: float = 1.0,
) -> None:
    """Draw a logged value over the tokens, and levels (sign and name, height, colour) across.

    The tick labels are `factor` times the value. Panels with levels become logarithmic where the
    values differ by a factor of four or more; all others begin at zero.
    """
    from matplotlib.ticker import EngFormatter

    axes.set_xlim(0, max(at, default=1.0))
    axes.locator_params(axis="x", nbins=6 if axes.bbox.width > 500 else 3, integer=True)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    known = [value for value in values if value is not None]
    keys = []
    if known:
        when = "training" if levels else "at the end"
        keys.append((_named(f"━ {when}", factor * known[-1]), _TRAINING))
        y = [math.nan if value is None else value for value in values]
        finite = [False, *map(math.isfinite, y), False]
        alone = [i for i in range(len(y)) if not (finite[i] or finite[i + 2])]
        look: dict[str, Any] = {"color": _TRAINING, "markersize": 4, "zorder": 3, "clip_on": False}
        axes.plot(at, y, marker="o", markevery=alone, **look)  # such points have no line
    else:
        _say(axes, "not logged")
    for name, level, color in levels:
        if (value := _number(level)) is not None:
            dash = (5, 3) if name[0] == "╍" else (1, 2)
            axes.axhline(value, color=color, linewidth=1.4, linestyle=(0, dash), zorder=4)
            keys.append((_named(name, value), color))
            known.append(value)

    low, high = min(known, default=0.0), max(known, default=0.0)
    if levels and high >= 4 * low > 0:
        unit += ", logarithmic"
        axes.set_yscale("log")
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        leads = (1, 2, 5) if high < 100 * low else (1,)
        decades = decades[:: len(decades) // 6 or 1]
        axes.set_yticks([lead * 10.0**decade for decade in decades for lead in leads])
        axes.minorticks_off()
        axes.set_ylim(low / 1.18, high * 1.12)
    else:
        axes.set_ylim(min(0.0, low), 1.1 * high if high > 0 else 1.0)
        axes.locator_params(axis="y", nbins=4 if axes.bbox.height > 200 else 2)
    axes.yaxis.set_major_formatter(lambda value, _: f"{factor * value:g}")
    _title(axes, title, unit, keys)


def _draw_density(axes: "Axes", report: Mapping[str, Any], d_sae: float | None) -> None:
    """Draw how many latents are in each decade of the firing rate; `never` stands apart.

    Left out are the decades that hold none because there are too few rows.
    """
    density, n_rows = report.get("density") or {}, _number(report.get("n_rows"))
    counts = {name: n for name in density if (n := _number(density[name])) is not None}
    keys = []
    if (never := counts.get("never")) is not None:
        share = f" of {d_sae:,.0f} ({never / d_sae:.1%})" if d_sae else ""
        keys.append((f"■ never fired: {never:,.0f}{share}", _SOFT))
    _title(axes, "How often latents fire", "latents in each decade, held out", keys)
    _bare(axes)
    if not counts:
        _say(axes, "not measured")
        return
    seen = [int(name[2:]) for name, n in counts.items() if n and name != "never"]
    rarest = math.floor(-math.log10(n_rows)) if n_rows else _LOWEST
    first = min(max(rarest, _LOWEST), -1, *seen)
    bars = [(d + 0.5, f"1e{d}", _HELD_OUT) for d in range(first, 0)]
    for x, name, color in [(first - 0.8, "never", _SOFT), *bars]:
        if (n := counts.get(name)) is not None:
            axes.bar(x, n, width=0.9, color=color, linewidth=0)
            axes.annotate(
                f"{n:,.0f}", (x, n), xytext=(0, 3), textcoords="offset points", ha="center"
            )
    names = ["0" if first == _LOWEST else _power(first), *map(_power, range(first + 1, 1))]
    axes.set_xticks([first - 0.8, *range(first, 1)], ["never", *names])
    axes.set_xlim(first - 1.4, 0.1)
    axes.set_ylim(0, 1.1 * max(1.0, *counts.values()))
    axes.set_xlabel("share of the held-out tokens in which a latent fires", loc="right", labelpad=1)


def _draw_worst(axes: "Axes", worst: Sequence[Mapping[str, Any]]) -> None:
    """Draw the columns of highest FVU, worst on top."""
    rows = [(_plain(row.get("column")), _number(row.get("fvu"))) for row in worst]
    reach = max([1.0, *(value for _, value in rows if value is not None)])
    keys = [(f"whole bar: FVU {_shown(reach)}", _SOFT)] if rows else []
    _title(axes, "Worst columns", "FVU, held out", keys)
    _bare(axes)
    if not rows:
        _say(axes, "not measured")
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.set_xlim(0, reach)
    axes.set_ylim(max(len(rows), 5) - 0.6, -0.75)
    for i, (name, value) in enumerate(rows):
        axes.barh(i, reach, height=0.16, color=_FAINT, linewidth=0)
        axes.barh(i, value or 0.0, height=0.16, color=_HELD_OUT, linewidth=0)
        above: dict[str, Any] = {"xytext": (0, 6), "textcoords": "offset points"}
        number = axes.annotate(_shown(value), (reach, i), ha="right", color=_SOFT, **above)
        room = axes.bbox.width - number.get_window_extent().width - 12
        _fit(axes.annotate(name, (0, i), **above), room)


def _title(axes: "Axes", title: str, unit: str, keys: Sequence[tuple[str, str]]) -> None:
    """Write a panel's title, softer behind it the unit, and below them keys in their colours."""
    for y, parts in ((22, [(title, _INK), (unit, _SOFT)]), (7, keys)):
        place: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, y)}
        for text, color in parts:
            look: dict[str, Any] = {"size": 9.5, "weight": "bold"} if text is title else {}
            look |= {"color": color, "va": "bottom", "textcoords": "offset points"}
            last = axes.annotate(text, **place, **look)
            place = {"xy": (1, 0), "xycoords": last, "xytext": (9, 0)}


def _fit(text: "Text", width: float = (_RIGHT - _LEFT) * _SIZE[0]) -> None:
    """Leave out the middle of a text that is wider than `width` pixels."""
    whole = text.get_text()
    half = len(whole) // 2
    while half > 1 and (found := text.get_window_extent().width) > width:
        half = max(min(half - 1, int(half * width / found)), 1)
        text.set_text(f"{whole[:half]}…{whole[-half:]}")


def _bare(axes: "Axes") -> None:
    """Take away the y axis: the numbers stand beside the bars."""
    axes.grid(visible=False)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _say(axes: "Axes", text: str) -> None:
    """Write why there is nothing to see."""
    where: dict[str, Any] = {"transform": axes.transAxes, "ha": "center", "va": "center"}
    axes.text(0.5, 0.5, text, color=_SOFT, bbox={"color": "white"}, zorder=5, **where)
    axes.set(xticks=[], yticks=[])


def _column(log: Log, name: str) -> list[float | None]:
    return [_number(line.get(name)) for line in log]


def _number(value: Any) -> float | None:
    """Return a finite number, None for anything else."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPTS) if exponent else "1"


def _shown(value: Any) -> str:
    """Return a number in three digits, or all of those before the point; text as it is."""
    number = _number(value)
    if number is None:
        return _plain(value) if isinstance(value, str) else "undefined"
    if number.is_integer() or 999.5 <= abs(number) < 1e6:
        return f"{number:,.0f}" if abs(number) < 1e9 else f"{number:.3g}"
    return f"{number:#.3g}"


def _named(name: str, value: Any) -> str:
    return "" if value is None else f"{name} {_shown(value)}"


def _plain(text: Any) -> str:
    """Return text in one line of printable characters, its middle left out where it is long."""
    half, text = _LONGEST // 2, str(text)
    text = text if len(text) <= _LONGEST else f"{text[:half]}…{text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
