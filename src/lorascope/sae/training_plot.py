"""One picture of a training run: FVU, L0, dead latents, and how often latents fire.

Blue was measured in training, orange on held-out tokens. A missing or undefined value is left out,
never drawn as zero. `docs/metrics.md` defines every number. The same input gives the same bytes:
the fonts are matplotlib's own, the user's settings do not count, and no date is written.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorascope.artifact import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAINING, _HELD_OUT, _GREY = "#2f6f9f", "#b35a10", "#5d6873"
_STYLE: dict[str, Any] = {
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ecef",
    "legend.frameon": False,
}
_GRID = {"left": 0.06, "right": 0.98, "top": 0.84, "bottom": 0.08, "hspace": 0.38, "wspace": 0.14}
_LONGEST_NAME = 80


def draw_training(
    manifest: Mapping[str, Any], log: Sequence[Mapping[str, float | None]], path: Path
) -> Path:
    """Draw an SAE's training run as PNG, 1500 x 900 pixels, and return the picture's path.

    `manifest` is the SAE's; `log` has the lines of its training log, ordered by step.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    content, settings = manifest["content"], manifest["settings"]
    report = content["report"]
    with mpl.rc_context(), warnings.catch_warnings():
        # a character that the font lacks is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph .* missing|Matplotlib currently does not")
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)  # pyright: ignore[reportCallIssue, reportArgumentType]
        figure = Figure(figsize=(10, 6), dpi=150)
        FigureCanvasAgg(figure)
        figure.suptitle(_title(path.stem, content, report), size=9)
        fvu, l0, dead, density = figure.subplots(2, 2, gridspec_kw=_GRID).flat
        tokens = [(line["step"] or 0) * settings["batch_size"] for line in log]
        _draw_curve(fvu, "FVU", tokens, log, "fvu", held_out=report["fvu"])
        _draw_curve(l0, "L0", tokens, log, "l0", held_out=report["l0"], k=content["k"])
        _draw_curve(dead, "share of dead latents", tokens, log, "dead")
        _draw_density(density, report["density"])
        with replacing(path) as partial:
            figure.savefig(partial, format="png", metadata={"Software": None})
    return path


def _title(name: str, content: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    facts = [
        name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…",
        f"{content['architecture']}, {content['d_sae']:,} latents, k {content['k']:g}, "
        f"{content['steps']:,} steps",
        f"held out: FVU {_short(report['fvu'])}, L0 {_short(report['l0'])}, "
        f"{report['alive']:,} latents alive, {report['n_rows']:,} tokens",
    ]
    return "\n".join(facts)


def _draw_curve(
    axes: "Axes",
    title: str,
    tokens: Sequence[float],
    log: Sequence[Mapping[str, float | None]],
    name: str,
    *,
    held_out: float | None = None,
    k: float | None = None,
) -> None:
    """Draw a logged value over the tokens, and horizontal lines for the held-out value and `k`."""
    values = [_number(line.get(name)) for line in log]
    axes.plot(tokens, values, color=_TRAINING, label="training", marker="." if len(log) < 3 else "")
    if math.isfinite(level := _number(held_out)):
        axes.axhline(level, color=_HELD_OUT, linestyle="--", label=f"held out {_short(level)}")
    if k is not None:
        axes.axhline(k, color=_GREY, linestyle=":", label=f"k {k:g}")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel("training tokens")
    axes.legend()


def _draw_density(axes: "Axes", density: Mapping[str, int]) -> None:
    """Draw how many latents are in each decade of the firing rate; `never` is a bar of its own."""
    names = sorted(density, key=lambda name: -1.0 if name == "never" else float(name))
    bars = axes.bar(names, [density[name] for name in names], color=_HELD_OUT)
    axes.bar_label(bars, fmt="{:,.0f}")
    axes.set_title("latents by how often they fire, held out")
    axes.set_xlabel("share of tokens, by decade (1e-2: 1 to 10 %)")


def _number(value: Any) -> float:
    """Return a finite number, NaN for anything else: matplotlib leaves NaN out."""
    finite = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if finite else math.nan


def _short(value: float | None) -> str:
    return f"{value:.3g}" if math.isfinite(_number(value)) else "undefined"
