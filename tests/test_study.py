"""The file of a report: whole, or refused in one line."""

import json

import pytest

from lorascope.artifact import make_manifest
from lorascope.causal.study import open_report, seal
from lorascope.errors import ArtifactError


def test_a_changed_report_and_another_file_are_refused(tmp_path):
    report = {"faithfulness": {"kl": 0.25}}
    manifest = make_manifest(
        "evaluation", 1, settings={}, parents={}, layout=None, content={"sae_name": "s"}
    )
    path = tmp_path / "report.json"
    path.write_text(seal(manifest, report))
    assert open_report(path)["faithfulness"] == {"kl": 0.25}
    path.write_text(path.read_text().replace("0.25", "0.26"))
    with pytest.raises(ArtifactError, match="other numbers than its manifest says"):
        open_report(path)
    path.write_text(json.dumps(report))
    with pytest.raises(ArtifactError, match="is no report"):
        open_report(path)
