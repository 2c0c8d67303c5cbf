"""The picture of a training run shows the log and the report, and the same input the same bytes."""

import copy
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from lorascope.sae.training_plot import draw_training

MANIFEST = {
    "settings": {"batch_size": 256},
    "content": {
        "architecture": "batchtopk",
        "d_sae": 224,
        "k": 5.0,
        "steps": 40,
        "report": {
            "fvu": 0.139,
            "l0": 5.25,
            "alive": 190,
            "n_rows": 1200,
            "density": {"1e-1": 3, "1e-2": 100, "1e-3": 87, "never": 34},
        },
    },
}
LOG = [{"step": i, "fvu": 1 / i, "l0": 5.0, "dead": i / 100} for i in range(1, 41)]


def figure_of(monkeypatch, tmp_path, manifest=MANIFEST, log=LOG, name="sae.png"):
    """Draw and return the figure."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *given, **named: (saved.append(f), save(f, *given, **named))
    )
    draw_training(manifest, log, tmp_path / name)
    return saved[0]


def test_curves_and_bars_are_the_logged_and_held_out_numbers(tmp_path, monkeypatch):
    figure = figure_of(monkeypatch, tmp_path)
    fvu, l0, dead, density = figure.axes
    for axes, name in ((fvu, "fvu"), (l0, "l0"), (dead, "dead")):
        assert list(axes.lines[0].get_xdata()) == [256 * line["step"] for line in LOG]
        assert list(axes.lines[0].get_ydata()) == [line[name] for line in LOG]
        assert axes.get_ylim()[0] == 0
    assert fvu.lines[1].get_ydata()[0] == 0.139
    assert [line.get_ydata()[0] for line in l0.lines[1:]] == [5.25, 5.0]
    assert [bar.get_height() for bar in density.patches] == [34, 87, 100, 3]
    assert density.get_xticklabels()[0].get_text() == "never"
    title = figure.get_suptitle()
    for fact in ("sae", "batchtopk", "224", "FVU 0.139", "L0 5.25", "190", "1,200"):
        assert fact in title


def test_what_is_undefined_or_missing_is_left_out(tmp_path, monkeypatch):
    manifest = copy.deepcopy(MANIFEST)
    manifest["content"]["report"]["fvu"] = None
    log = [*LOG[:3], {"step": 4, "fvu": None, "l0": float("nan")}, *LOG[4:]]
    figure = figure_of(monkeypatch, tmp_path, manifest, log)
    fvu, _, dead, _ = figure.axes
    assert len(fvu.lines) == 1
    for axes in (fvu, dead):
        assert axes.lines[0].get_ydata()[3] != axes.lines[0].get_ydata()[3]
    assert "FVU undefined" in figure.get_suptitle()


@pytest.mark.parametrize("log", [[], LOG[:1]])
@pytest.mark.parametrize("name", ["a$b^{.png", "line\nbreak.png", "x" * 200 + ".png"])
def test_short_logs_and_hostile_names_are_drawn(tmp_path, log, name):
    draw_training(MANIFEST, log, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes_whatever_the_users_settings(tmp_path):
    import matplotlib as mpl

    first = draw_training(MANIFEST, LOG, tmp_path / "sae.png").read_bytes()
    with mpl.rc_context({"font.size": 20, "axes.grid": False}):
        assert draw_training(MANIFEST, LOG, tmp_path / "sae.png").read_bytes() == first
        assert mpl.rcParams["font.size"] == 20


def test_training_is_imported_without_matplotlib():
    code = "import sys, lorascope.sae.train; sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
