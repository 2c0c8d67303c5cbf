"""The picture of a training run: what it says, that nothing collides, and that it is the same."""

import copy
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from builders.stores import planted_rows
from PIL import Image

from lorascope.errors import ConfigError
from lorascope.sae.model import load_sae
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run
from lorascope.sae.training_report import draw_training

NAMES = [
    "$\\frac$ $x_{$ \\begin{x}",
    "</script><!-- --> &amp;",
    "😀 漢字 שלום مرحبا é\u0301",
    "W" * 300,
    "line\nbreak\ttab\x00\u202e\ud800 " + "$" * 300,
]
MANIFEST = {
    "parents": {"activations": "43166c221c84" + "0" * 52},
    "settings": {
        "batch_size": 1024,
        "epochs": 12,
        "warmup": 100,
        "dead_after": 100_000,
        "auxk_alpha": 0.03125,
        "precision": "float32",
        "seed": 42,
    },
    "content": {
        "architecture": "batchtopk",
        "d_in": 56,
        "d_sae": 224,
        "k": 5.0,
        "normalize": "std",
        "steps": 1410,
        "config": {"learning_rate": 0.00675, "adapter_types": ["gate_proj", "o_proj"]},
        "report": {
            "n_rows": 6491,
            "n_calibrated": 6871,
            "fvu": 0.1390,
            "fvu_raw": 0.1623,
            "fvu_effect": 0.1641,
            "cosine": 0.9324,
            "l0": 5.0014,
            "alive": 218,
            "never_fired": 6 / 224,
            "density": {"never": 6, "1e-6": 0, "1e-5": 0, "1e-4": 0, "1e-3": 21, "1e-2": 197},
            "worst_columns": [{"column": f"{i}.o_proj", "fvu": 0.3 - i / 40} for i in range(5)],
            "train": {"l0": 4.99999},
        },
    },
}


def log_of(n=200, fvu=0.14, l0=5.0):
    return [
        {
            "step": 7 * i,
            "fvu": fvu * (1 + 2 * math.exp(-9 * i / n)),
            "l0": l0,
            "auxk": 0.05 * (i % 50 == 0),
            "dead": 0.004 * (i % 40 == 0),
            "lr": 0.0067 * (1 - i / n),
        }
        for i in range(1, n + 1)
    ]


def altered(content=(), report=()):
    manifest = copy.deepcopy(MANIFEST)
    manifest["content"].update(content)
    manifest["content"]["report"].update(report)
    return manifest


HOSTILE = altered(
    {"architecture": NAMES[0], "roles": NAMES[:2], "config": {"adapter_types": NAMES}},
    {
        "worst_columns": [
            {"column": name, "fvu": fvu}
            for name, fvu in zip(NAMES, [1e12, 37.25, 1.0, None, math.nan], strict=True)
        ]
    },
)
UNMEASURED = altered({"k": None, "config": None}, dict.fromkeys(MANIFEST["content"]["report"]))
NOTHING_FIRES = altered(
    {"architecture": "topk", "d_sae": 4, "d_in": 2, "k": 0.5},
    {"alive": 0, "l0": 0.0, "n_rows": 1, "density": {"never": 4, "1e-1": 0}},
)
WIDE = altered(
    {
        "architecture": "jumprelu",
        "d_sae": 50_000,
        "d_in": 12_544,
        "k": 1234.0,
        "signed": True,
        "left_out": ["a"] * 17,
        "steps": 12_345_678,
        "stability": np.linspace(0, 1, 50_000).tolist(),
    },
    {
        "fvu": 0.0123,
        "l0": 1287.4,
        "alive": 41_234,
        "n_rows": 8_123_456,
        "density": {"never": 8766, **{f"1e-{i}": 12_345 - i for i in range(1, 7)}},
    },
)
STEEP = [line | {"fvu": 9.0 / i**1.1, "l0": 1200 + 2e4 / i} for i, line in enumerate(log_of(), 1)]
CASES = {
    "usual": (MANIFEST, log_of()),
    "several thousand points": (altered({"architecture": "matryoshka"}), log_of(5000)),
    "hostile text": (HOSTILE, log_of()),
    "unmeasured": (UNMEASURED, log_of()),
    "nothing fires": (NOTHING_FIRES, log_of(3)),
    "wide": (WIDE, STEEP),
    "no log": (MANIFEST, []),
    "one point": (MANIFEST, log_of(1)),
    "nothing at all": ({}, [{}]),
}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Return a function that draws, and returns the figure as it was saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )

    def draw(manifest, log=(), name="sae.png"):
        draw_training(manifest, log, tmp_path / name)
        return figures[-1]

    return draw


def texts_of(figure):
    """Every text that is seen, tick labels included, with its box in pixels."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            found += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    found = [text for text in found if text.get_text() and text.get_visible()]
    return [(text.get_text(), text.get_window_extent()) for text in found]


def words_of(figure):
    return "\n".join(text for text, _ in texts_of(figure))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_text_leaves_the_page_or_covers_another(drawn, case):
    figure = drawn(*CASES[case])
    boxes = texts_of(figure)
    assert len(boxes) > 15
    for text, box in boxes:
        assert box.x0 > 20 and box.x1 < 1754 - 20, text
        assert box.y0 > 20 and box.y1 < 1240 - 20, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
        assert apart, (one, other)


def test_the_page_names_the_sae_its_settings_and_its_numbers(drawn):
    words = words_of(drawn(MANIFEST, log_of(), "sae_k5.png")).splitlines()
    assert "sae_k5" in words
    for text in [
        "architecture batchtopk  ·  d_sae 224  ·  d_in 56  ·  k 5  ·  normalize std",
        "steps 1,410  ·  tokens 1,443,840  ·  lr 0.00675  ·  batch_size 1,024  ·  epochs 12",
        "store 43166c221c84",
        "raw 0.162 · effect 0.164",
        "97.3% of all",
        "╍ held out 0.139",
        "┈ k 5",
        "╍ held out 5.00",
        "■ never fired: 6 of 224 (2.7%)",
        "training tokens",
        "0.300",
    ]:
        assert any(text in word for word in words), text
    assert "logarithmic" not in "".join(words)


def test_the_bars_are_the_counts_and_decades_too_rare_for_the_rows_are_left_out(drawn):
    density = next(a for a in drawn(MANIFEST).axes if a.get_xlabel().startswith("share"))
    assert [bar.get_height() for bar in density.patches] == [6, 0, 21, 197]
    names = [label.get_text() for label in density.get_xticklabels()]
    assert names == ["never", "10⁻⁴", "10⁻³", "10⁻²", "10⁻¹", "1"]


@pytest.mark.slow
def test_a_logarithmic_axis_is_said_to_be_one_and_every_other_begins_at_zero(drawn):
    fvu, l0, *others = drawn(WIDE, STEEP).axes
    for axes, unit in ((fvu, "FVU, share, logarithmic"), (l0, "L0, logarithmic")):
        assert axes.get_yscale() == "log"
        assert unit in [text.get_text() for text in axes.texts]
        assert len([at for at in axes.get_yticks() if at > axes.get_ylim()[0]]) >= 2
    assert [axes.get_ylim()[0] for axes in others[:4]] == [0.0] * 4
    assert [axes.get_ylim()[0] for axes in drawn(MANIFEST, log_of()).axes[:2]] == [0.0, 0.0]


@pytest.mark.slow
def test_the_labels_of_the_rate_and_of_dead_latents_are_the_values_in_their_units(drawn):
    """In powers of ten and in percent: a label times its unit is where its tick stands."""
    _, _, rate, dead, *_ = drawn(MANIFEST, log_of()).axes
    for axes, unit, text in ((rate, 1e-3, "× 10⁻³, peak 6.67"), (dead, 1e-2, "% of all")):
        assert text in [drawn.get_text() for drawn in axes.texts]
        labels = [float(label.get_text()) for label in axes.get_yticklabels()]
        assert np.allclose(np.array(labels) * unit, axes.get_yticks())
    assert "━ at the end 0.400" in [text.get_text() for text in dead.texts]


def test_names_of_columns_are_drawn_as_they_are_never_as_formulas(drawn):
    figure = drawn(HOSTILE, log_of(), "$x^2$ <b>.png")
    words = words_of(figure)
    for text in ["$x^2$ <b>", NAMES[0], NAMES[1], "WWW…WWW", "line\\nbreak"]:
        assert text in words
    assert "architecture $\\frac$" in words
    assert "\x00" not in words
    from matplotlib.text import Text

    assert not any(text.get_parse_math() or text.get_usetex() for text in figure.findobj(Text))


def test_what_was_not_measured_is_named_and_not_drawn_as_zero(drawn):
    figure = drawn(UNMEASURED, log_of())
    words = words_of(figure).splitlines()
    assert words.count("undefined") == 5
    assert words.count("not measured") == 2
    assert not any("held out " in word or "never fired" in word for word in words)
    assert not any(axes.patches for axes in figure.axes)
    assert [len(axes.lines) for axes in figure.axes[:2]] == [1, 1]
    undefined = {"fvu": math.nan, "l0": math.inf, "density": {"never": None, "1e-2": 3}}
    figure = drawn(altered(report=undefined), [])
    assert words_of(figure).splitlines().count("undefined") == 2
    density = next(a for a in figure.axes if a.get_xlabel().startswith("share"))
    assert [bar.get_height() for bar in density.patches] == [3]


def test_an_empty_log_says_so_and_still_shows_what_was_held_out(drawn):
    figure = drawn(MANIFEST, [])
    words = words_of(figure).splitlines()
    assert words.count("not logged") == 5
    assert "╍ held out 0.139" in words
    assert [line.get_ydata()[0] for line in figure.axes[0].lines] == [0.139]


@pytest.mark.slow
def test_points_without_neighbours_are_seen_and_gaps_stay_gaps(tmp_path, drawn):
    """One point, or one between two gaps, has no line to be seen by."""
    log = log_of(9)
    for i in (1, 3, 4):
        log[i]["fvu"] = None if i == 1 else math.nan
    line = drawn(MANIFEST, [*log, {"step": None, "fvu": 9.0}]).axes[0].lines[0]
    assert line.get_markevery() == [0, 2]
    assert np.isnan(line.get_ydata()).tolist() == [i in (1, 3, 4) for i in range(9)]
    box = drawn(MANIFEST, log_of(1)).axes[0].bbox
    pixels = np.asarray(Image.open(tmp_path / "sae.png").convert("RGB"))
    inside = pixels[round(1240 - box.y1) : round(1240 - box.y0), round(box.x0) : round(box.x1) + 9]
    assert (inside == (0x2F, 0x6F, 0x9F)).all(2).sum() > 10


@pytest.mark.slow
def test_stability_is_shown_by_its_quartiles_where_there_is_one(drawn):
    assert "stability" not in words_of(drawn(MANIFEST))
    words = words_of(drawn(altered({"stability": [0.5, None, 0.7, 0.9, 1.0, 0.8]})))
    assert "stability, median\n0.800\nmiddle half 0.70 to 0.90" in words


@pytest.mark.slow
@pytest.mark.parametrize("end", [".png", ".svg"])
def test_the_same_input_gives_the_same_bytes_whatever_the_users_settings(tmp_path, end):
    import matplotlib as mpl

    first = draw_training(HOSTILE, log_of(), tmp_path / f"sae{end}").read_bytes()
    users = {"font.size": 33, "text.usetex": True, "figure.dpi": 40, "savefig.bbox": "tight"}
    with mpl.rc_context(users):
        again = draw_training(HOSTILE, log_of(), tmp_path / f"sae{end}")
    assert again.read_bytes() == first
    assert draw_training(WIDE, STEEP, again).read_bytes() != first
    assert list(tmp_path.iterdir()) == [again]


def test_the_picture_is_a_png_of_the_stated_size_or_an_svg(tmp_path):
    with Image.open(draw_training(HOSTILE, log_of(), tmp_path / "sae.png")) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("PNG", (1754, 1240))
        assert "Software" not in picture.info
    root = ET.parse(draw_training(HOSTILE, log_of(), tmp_path / "sae.svg")).getroot()
    assert root.tag.endswith("svg")
    assert not [tag for tag in root.iter() if str(tag.tag).endswith("script")]


@pytest.mark.parametrize("name", ["sae.pdf", "sae", "sae.PNG"])
def test_another_end_is_refused_in_one_line_and_nothing_is_written(tmp_path, name):
    with pytest.raises(ConfigError, match=r"expected \.png or \.svg") as caught:
        draw_training(MANIFEST, [], tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_drawing_leaves_matplotlib_as_it_was_and_needs_no_pyplot(tmp_path):
    """In a process of its own: other tests may have imported pyplot or chosen a backend."""
    code = f"""
import sys, warnings
from pathlib import Path
from lorascope.sae.training_report import draw_training
assert "matplotlib" not in sys.modules
import matplotlib as mpl
def state():  # past RcParams, which would choose a backend when asked for it
    return {{key: dict.__getitem__(mpl.rcParams, key) for key in dict.keys(mpl.rcParams)}}
mpl.rcParams["lines.linewidth"] = 7.0
before, filters = state(), list(warnings.filters)
draw_training({{}}, [], Path({str(tmp_path / "sae.png")!r}))
assert state() == before and before["lines.linewidth"] == 7.0
assert warnings.filters == filters
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sae.png").exists()


@pytest.mark.slow
def test_training_is_imported_without_matplotlib():
    code = "import sys, lorascope.sae.train; sys.exit('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_training_run_leaves_the_picture_of_its_sae_beside_it(make_store, tmp_path, drawn):
    store = make_store(planted_rows(), n_rollouts=12, dtype="float16")
    config = TrainConfig(
        data_dir=store.path,
        output=tmp_path / "small.pt",
        expansion_factor=3,
        k=3,
        batch_size=64,
        epochs=2,
        device="cpu",
    )
    sae = load_sae(run(config))
    picture = tmp_path / "small.png"
    before = picture.read_bytes()
    words = words_of(drawn(sae.manifest, sae.manifest["content"]["log"], "small.png"))
    assert picture.read_bytes() == before
    assert f"SAE {sae.digest[:12]}   store " in words
    assert f"latents alive\n{sae.manifest['content']['report']['alive']}\n" in words
    run(replace(config, output=tmp_path / "two", seeds=2))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "small.png",
        "two_seed42.png",
        "two_seed43.png",
    ]
