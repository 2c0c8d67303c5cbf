"""The data in the page, and the page as a file."""

import base64
import hashlib
import json
import logging
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.indexes import example, index_of, manifest_of, small_index
from builders.pages import block, bytes_of, column

from lorascope.artifact import digest_file, read_manifest
from lorascope.dashboard.facts import header
from lorascope.dashboard.packs import pack, to_half_bits, to_text
from lorascope.dashboard.payload import (
    BLOCK,
    FULL_SCALE,
    FULL_SHARE,
    Payload,
    escape_json,
    manifest_comment,
    to_scaled_int16,
)
from lorascope.dashboard.render import DashboardConfig, bundle, read_glossary, run
from lorascope.dashboard.reports import Reports
from lorascope.errors import ArtifactError
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import to_published


def many_features(n: int) -> FeatureIndex:
    """Feature i fires with value 1 + i on token `t{i}`, but every seventh is dead."""
    tokens = {i: f"t{i}".encode() for i in range(n)}
    features = [[example(1.0 + i, 5, [i, 0], 0)] if i % 7 else [] for i in range(n)]
    return index_of(features, tokens)


def make(tmp_path: Path, index: FeatureIndex, **options: Any) -> Path:
    index.save(tmp_path / "features.h5")
    return run(
        DashboardConfig(input=tmp_path / "features.h5", output=tmp_path / "page.html", **options)
    )


def test_the_core_has_the_statistics_of_every_feature():
    index = small_index()
    core = json.loads(Payload(index, "T").core())
    assert core["n_features"] == 4
    assert column(core, "n_examples") == [3, 0, 1, 2]
    assert column(core, "n_active") == [3, 0, 1, 2]
    np.testing.assert_array_equal(column(core, "max"), index.latent_max)
    top = [core["token_texts"][i] for i in column(core, "top_token")]
    assert [top[0], top[2], top[3]] == ["😀", "\n", "<|im_end|>"]


def test_a_block_has_the_exact_values_of_the_index():
    index = many_features(2 * BLOCK + 5)
    payload = Payload(index, "T")
    core = json.loads(payload.core())
    assert payload.n_blocks == 3
    data = block(core, payload.block(1))
    e = slice(int(index.example_offset[BLOCK]), int(index.example_offset[2 * BLOCK]))
    assert data["value"] == index.example_value[e].tolist()
    assert data["row"] == index.example_row[e].tolist()
    assert data["count"] == index.n_examples[BLOCK : 2 * BLOCK].tolist()
    texts = [core["token_texts"][i] for i in data["token"]]
    alive = [feature for feature in range(BLOCK, 2 * BLOCK) if feature % 7]
    assert texts == [text for feature in alive for text in (f"t{feature}", "t0")]
    assert len(block(core, payload.block(2))["count"]) == 5


def test_rounded_values_of_a_block_are_within_the_stated_error():
    index = small_index()
    payload = Payload(index, "T")
    core = json.loads(payload.core())
    data = block(core, payload.block(0))
    assert data["value"][:3] == [2.5, 1.25, 0.30000001192092896]
    assert data["count"] == [3, 0, 1, 2]
    assert data["sample_count"] == [2, 0, 0, 0]
    assert data["special_count"] == [1, 0, 0, 2]
    assert data["value"][6:] == [2.25, 0.25, 0.75, 1.75, 1.5]
    assert column(core, "special_max") == [0.75, 0, 0, 1.75]
    assert data["quantile"] == [4, 0]
    assert data["peak"] == []
    units = np.array(data["scale"])[np.repeat([0, 2, 3, 0, 3], [9, 1, 5, 5, 3])] / FULL_SCALE
    shown = np.array(data["activation"]) * units
    at = np.cumsum(data["length"]) - data["length"] + data["target"]
    assert not shown[at].any()
    shown[at] = data["value"]
    np.testing.assert_allclose(shown, index.window_activation, rtol=0, atol=units.max())
    assert np.array_equal(shown != 0, index.window_activation != 0)
    share = np.array(data["fingerprint"]).reshape(4, 2) * np.array(data["fingerprint_max"])[:, None]
    np.testing.assert_allclose(share / FULL_SHARE, index.latent_fingerprint, atol=0.75 / 62)
    assert data["similar"][:2] == [4, 3]
    assert data["similar"][2:4] == [0, 0]
    assert data["cosine"][0] == 0.5
    assert [core["token_texts"][i - 1] for i in data["mean"] if i] == ["é"] * 3
    assert data["by_role"][:2] == [1, 2]
    assert column(core, "main_role") == [0, 255, 0, 2]


def test_a_whole_rollout_has_its_tokens_and_their_codes():
    payload = Payload(small_index(), "T")
    core = json.loads(payload.core())
    core["block_columns"] = core["rollout_columns"]
    data = block(core, payload.rollout(0))
    assert [core["token_texts"][i] for i in data["token"]] == [" the", "é", "<|im_end|>"]
    assert data["role"] == [3, 3, 5]
    assert data["n_fired"] == [2, 1, 0]
    assert data["latent"] == [0, 3, 0]
    assert data["value"] == [0.5, 0.25, 1.0]


def test_an_activation_that_differs_from_the_value_is_stored_too():
    index = index_of([[example(1.0, 9, [1, 2], 0)]])
    index.window_activation[0] = 0.75
    data = block(json.loads(Payload(index, "T").core()), Payload(index, "T").block(0))
    assert (data["value"], data["peak"]) == ([1.0], [0.75])


def test_rounding_stays_within_its_bounds_and_never_hides_a_firing():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(10_000) * 10.0 ** rng.integers(-6, 6, 10_000)).astype(np.float32)
    back = (to_half_bits(values).astype("<u4") << 16).view("<f4")
    np.testing.assert_allclose(back, values, rtol=1 / 256)
    assert np.isnan((to_half_bits(np.array([np.nan], "<f4")).astype("<u4") << 16).view("<f4")[0])
    scale = np.array([np.abs(values).max()])
    parts = to_scaled_int16(values, scale)
    assert np.abs(parts * (scale / FULL_SCALE) - values).max() <= scale / FULL_SCALE
    assert (np.sign(parts) == np.sign(values)).all()
    assert to_scaled_int16(np.zeros(2), np.zeros(2)).tolist() == [0, 0]


def every_coding() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Columns of ugly sizes and values in every type and coding."""
    rng = np.random.default_rng(0)
    edges = [0, 191, 192, 447, 448, 14_527, 14_528, 65_535, 80_063, 473_279, 473_280, 2**32 - 1]
    halves = np.sort(rng.standard_normal(9))[::-1].astype("<f4").view("<u4") >> 16 << 16
    values = {
        "none": np.zeros(0),
        "one": np.array([7]),
        "signed": np.array([-128, 0, 127]),
        "doubles": np.array([0.1, np.nan, -np.inf, 2.0**53]),
        "floats": np.array([9.5, 9.25, 0, np.nan, 3e38], np.float32),
        "half": halves.view("<f4"),
        "zeros": np.zeros(17),
        "shares": rng.integers(0, 2, 1001) * rng.integers(-32767, 32767, 1001),
        "wide": np.array(edges),
        "small": np.array(edges[:8]),
        "no_entries": np.zeros(0),
    }
    types = [
        *("<f4 falls", "<u2", "|i1", "<f8", "<f4 falls", "<b2 falls", "|u1 sparse"),
        *("<i2 sparse", "<u4 entry", "<u2 entry", "<u2 entry"),
    ]
    return values, dict(zip(values, types, strict=True))


def test_columns_keep_their_values_in_every_coding():
    values, types = every_coding()
    found = block({"block_columns": list(types.items())}, pack(values, types))
    for name, wanted in values.items():
        np.testing.assert_array_equal(np.array(found[name], wanted.dtype), wanted, name)


@pytest.mark.parametrize("n", range(30))
def test_any_number_of_bytes_is_text_that_no_parser_changes(n: int):
    data = np.random.default_rng(n).bytes(n)
    text = to_text(data)
    assert bytes_of(text) == data
    assert not re.search(r"""[^ -~]|["&<\\]""", text)


@pytest.mark.slow
def test_a_browser_reads_every_coding_as_python_does(browser):
    values, types = every_coding()
    source = files("lorascope.dashboard").joinpath("assets", "unpack.js").read_text()
    source = re.sub("^import .*$", "const packText = async () => packed;", source, flags=re.M)
    source = re.sub("^export ", "", source, flags=re.M)
    with browser.new_context() as context:
        found = context.new_page().evaluate(
            "([packed, types]) => {" + source + "; return unpack('', types).then((columns) => "
            "Object.fromEntries(Object.entries(columns).map(([k, v]) => [k, Array.from(v)]))); }",
            [pack(values, types), list(types.items())],
        )
    for name, wanted in values.items():
        np.testing.assert_array_equal(np.array(found[name], wanted.dtype), wanted, name)


def test_rows_say_rollout_and_position_unless_they_cannot():
    index = many_features(100)
    payload = Payload(index, "T")
    assert len(payload._spans[0]) == 1
    data = block(json.loads(payload.core()), payload.block(0))
    assert data["rollout"] == data["position"] == []
    index.example_rollout[0] += 1  # two rollouts at one row
    payload = Payload(index, "T")
    data = block(json.loads(payload.core()), payload.block(0))
    assert data["rollout"] == index.example_rollout.tolist()
    assert data["position"] == index.example_position.tolist()


def test_the_first_block_is_that_of_the_first_feature_with_an_example():
    index = index_of([[]] * BLOCK + [[example(1.0, 3, [1], 0)]])
    payload = Payload(index, "T")
    assert payload.first_block == 1


def test_a_split_character_has_entries_of_its_own_with_bytes():
    index = index_of([[example(1.0, 9, [3, 4, 1], 0), example(0.5, 20, [4, 1], 0)]])
    payload = Payload(index, "T")
    core = json.loads(payload.core())
    data = block(core, payload.block(0))
    assert [core["token_texts"][i] for i in data["token"]] == [
        "😀",
        "",
        " the",
        "\ufffd\ufffd",
        " the",
    ]
    whole, rest, *_ = data["token"]
    assert core["token_bytes"][str(whole)] == "f0 9f"
    assert core["token_bytes"][str(rest)] == "98 80"
    ids = column(core, "token_id")
    assert [ids[i] for i in data["token"]] == [3, 4, 1, 4, 1]


def test_facts_describe_the_index_and_leave_out_what_is_unknown():
    known = index_of([[]], adapter_name="my-lora", fvu=0.25, l0=None, n_tokens=12345)
    said = {fact.name: fact.value for fact in header(known, Reports(1))}
    assert said["Adapter"] == "my-lora"
    assert said["SAE"] == "c0ffeec0ffee"
    assert said["FVU"] == "0.25"
    assert said["Tokens"] == "12,345"
    assert said["Features"] == "0 of 1"
    assert "L0" not in said
    assert "Model" not in said


def test_escaped_json_and_comments_contain_no_markup_and_mean_the_same():
    value = {"<!--": "--></script>&amp;--!>", "-": [-1, "---"]}
    text = manifest_comment(replace(manifest_of(1), settings=value))
    assert not re.search("[<>&]|--", text)
    read = json.loads(text)
    assert read.pop("seal").startswith("lorascope-sha256:")
    assert read["settings"] == value
    assert json.loads(escape_json(json.dumps(value))) == value


def test_the_page_carries_its_manifest_and_its_parent(tmp_path: Path):
    page = make(tmp_path, small_index(), title="--> <x-title>")
    manifest = read_manifest(page)
    assert manifest is not None
    assert manifest.kind == "dashboard"
    assert manifest.settings == {"title": "--> <x-title>"}
    features = read_manifest(tmp_path / "features.h5")
    assert features is not None
    assert manifest.parents == {"features": features.digest}
    assert b"<x-title>" not in page.read_bytes()


def test_a_json_without_a_manifest_is_identified_by_its_bytes(tmp_path: Path):
    index = small_index()
    published = json.loads("".join(to_published(index, index.manifest)))
    del published["metadata"]["lorascope"]
    (tmp_path / "f.json").write_text(json.dumps(published))
    page = run(DashboardConfig(input=tmp_path / "f.json", output=tmp_path / "p.html"))
    manifest = read_manifest(page)
    assert manifest is not None
    assert manifest.parents == {"features": digest_file(tmp_path / "f.json")}


def test_the_same_input_gives_the_same_page_and_is_not_made_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    page = make(tmp_path, many_features(100))
    before = page.read_bytes()
    make(tmp_path, many_features(100))
    assert "already exists" in caplog.text
    page.unlink()
    assert make(tmp_path, many_features(100)).read_bytes() == before


def test_a_page_of_another_title_is_replaced_only_when_asked(tmp_path: Path):
    make(tmp_path, small_index())
    with pytest.raises(ArtifactError, match="other settings"):
        make(tmp_path, small_index(), title="B")
    page = make(tmp_path, small_index(), title="B", overwrite=True)
    assert b"<title>B</title>" in page.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.h5", "page.html"]


@pytest.mark.parametrize("name", ["missing.h5", "missing.json", "folder", "text.h5", "text.json"])
def test_an_input_that_is_not_a_feature_index_leaves_no_files(tmp_path: Path, name: str):
    (tmp_path / "folder").mkdir()
    for text in ("text.h5", "text.json"):
        (tmp_path / text).write_text("hello")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtifactError):
        run(DashboardConfig(input=tmp_path / name, output=tmp_path / "page.html"))
    assert sorted(tmp_path.iterdir()) == before


def test_the_policy_names_the_hashes_of_the_only_style_and_script(tmp_path: Path):
    text = make(tmp_path, small_index()).read_text(encoding="ascii")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy.group(1).startswith("default-src 'none'; ")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(scripts) == len(styles) == 1
    for source in (*scripts, *styles):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy.group(1)
    assert text.index("charset") < 1024
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"\son\w+\s*=|https?://", markup)


def test_the_glossary_in_docs_is_the_one_in_the_page():
    docs = Path(__file__).parent.parent / "docs"
    found = {}
    for line in (docs / "glossary.md").read_text(encoding="utf-8").splitlines():
        if entry := re.fullmatch(r"- \*\*(.+?)\*\*: (.+)", line):
            found[entry[1]] = entry[2]
        assert len(line) <= 120
    entries = {term: text for part in read_glossary().values() for term, text in part.items()}
    assert found == entries, "run python docs/make_glossary.py"


def test_the_script_never_runs_or_parses_text():
    script = bundle()
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bfetch\(|XMLHttp"
    assert not re.search(forbidden, script)
    assert not re.search(r"^(import|export) ", script, re.MULTILINE)
    assert "</script" not in script.lower()
    assert "<!--" not in script
