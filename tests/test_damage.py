"""A small run of `benchmarks/damage.py`: all damage is found, and nothing ends the process."""

import importlib.util
from pathlib import Path

import pytest
from builders.effect_reports import ablation, write
from builders.indexes import full_index
from builders.labels import label_of, save_labels
from builders.saes import make_sae
from builders.stores import write_published_store, write_store

from lorascope.artifact import Identity, read_manifest, sealed_json
from lorascope.dashboard.render import DashboardConfig
from lorascope.dashboard.render import run as render
from lorascope.dashboard.sections import Document, Section
from lorascope.features.export import ExportConfig
from lorascope.features.export import run as export
from lorascope.inspection import artifacts_in, verify
from lorascope.labels.published_study import Estimate, GroupShare, KindShares, StudyReport
from lorascope.record_json import to_json
from lorascope.sites import PROJECTIONS
from lorascope.stage import building

_FILE = Path(__file__).parent.parent / "benchmarks" / "damage.py"
N_CASES = 5
SEAL = "lorascope-sha256:" + 64 * "0"  # as a text of a corpus may have it
SECTION = Section(SEAL, [SEAL, "What it is."], [((SEAL, "b"), [("1", SEAL)])])


@pytest.fixture(scope="module")
def damage():
    spec = importlib.util.spec_from_file_location("damage", _FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_export(folder):
    make_index(folder)
    return export(ExportConfig(input=folder / "features.h5", output=folder / "features.json"))


def make_index(folder):
    full_index().save(folder / "features.h5")
    return folder / "features.h5"


def make_page(folder):
    return render(DashboardConfig(input=make_index(folder), output=folder / "page.html"))


def make_edit(folder):
    identity = Identity(kind="edit", schema=1, settings={}, parents={})
    with building(folder / "edit", identity, overwrite=False) as build:
        for name in ("report.json", "patch.safetensors"):
            (build.path / name).write_text(name * 20)
        manifest = identity.manifest(None, {})
        return build.publish_directory(manifest, ["report.json", "patch.safetensors"])


def make_study(folder):
    def of(value):
        return Estimate(value, value, value)

    names = "monosemantic broad polysemantic unclear balanced_accuracy below_features".split()
    kind = KindShares(
        n_all=9,
        n_drawn=9,
        n_scored=9,
        density=0.1,
        shuffled=0.0,
        shuffled_accuracy=0.5,
        **dict.fromkeys(names, of(0.5)),
    )
    group = GroupShare(name="words", features=(0, 2), firings=of(1.0), effect=None)
    report = StudyReport(
        n_rollouts_scoring=3, n_tokens_scoring=90, features=kind, columns=kind, groups=(group,)
    )
    identity = Identity(kind="study", schema=1, settings={}, parents={})
    path = folder / "study.json"
    path.write_text(sealed_json(identity.manifest(None, {}), to_json(report)), encoding="utf-8")
    return path


def make_sections(folder, suffix):
    manifest = Identity(kind="audit", schema=2, settings={}, parents={}).manifest(None, {})
    Document("A", [SECTION]).write(folder / "audit.json", manifest)
    return folder / f"audit{suffix}"


def make_sae_file(folder, name):
    make_sae(folder / name)
    return folder / name


KINDS = {
    "store": lambda folder: write_store(folder / "store").path,
    "SAE folder": lambda folder: make_sae_file(folder, "sae"),
    "SAE .pt": lambda folder: make_sae_file(folder, "sae.pt"),
    "features.h5": make_index,
    "features JSON": make_export,
    "report": lambda folder: write(
        folder / "ablation.json", "ablation", full_index(), ablation(full_index())
    ),
    "labels": lambda folder: save_labels(make_index(folder), {0: label_of("a"), 2: label_of("b")}),
    "edit": make_edit,
    "study": make_study,
    "page": make_page,
    "page of a report": lambda folder: make_sections(folder, ".html"),
    "Markdown of a report": lambda folder: make_sections(folder, ".md"),
    "published store": lambda folder: write_published_store(folder / "store", PROJECTIONS[:3]),
}


def test_text_of_a_report_that_lost_its_header_is_not_passed_over(tmp_path):
    file = make_sections(tmp_path, ".html")
    assert artifacts_in(tmp_path) == [file, file.with_suffix(".md")]
    file.write_text(file.read_text().replace("<!-- lorascope", "<!-- Lorascope"))
    assert "its header is damaged" in verify(file)[0]
    assert artifacts_in(tmp_path) == [file, file.with_suffix(".md")]


FAST = ("store", "SAE .pt", "features.h5", "report", "page", "published store")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in KINDS]
)
def test_verify_finds_all_damage_and_nothing_crashes(damage, kind, tmp_path):
    source = KINDS[kind](tmp_path)
    is_ours = read_manifest(source) is not None
    assert is_ours == (kind != "published store")
    if is_ours:
        assert verify(source) == []
    (tmp_path / "copy").mkdir()
    for seed in range(N_CASES):
        seen = damage.check(source, source, tmp_path / "copy", seed)
        assert seen == {"found": int(is_ours), "crashes": 0}, f"seed {seed}"
