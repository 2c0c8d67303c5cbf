"""Pages with hostile text, with no features, with one, and with very many."""

import csv
import json
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from builders.hostile import HOSTILE, RAW, hostile_index
from builders.indexes import example, index_of, synthetic
from builders.tiny_tokenizers import TEXTS, byte_level, fast, sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.artifact import read_manifest
from lorascope.dashboard.payload import Payload
from lorascope.dashboard.render import DashboardConfig, page, run
from lorascope.features.index import FeatureIndex
from lorascope.features.published_json import write_published
from lorascope.texts.tokens import display_texts, token_bytes

if TYPE_CHECKING:
    from builders.browser import Shown


class Elements(HTMLParser):
    """The elements of a page, and the text of those that hold data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[Any, ...]]] = []
        self.data: list[str] = []
        self.comments = 0
        self._open = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if name != "content"}
        self.tags.append((tag, tuple(sorted(given.items()))))
        self._open = tag == "script" and "type" in given

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, data: str) -> None:
        if self._open:
            self.data.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments += 1


def written(index: FeatureIndex, title: str = "T") -> str:
    return "".join(page(Payload(index, title), index.manifest))


def plain_index(tokens: dict[int, bytes], **content: Any) -> FeatureIndex:
    return index_of([[example(1.0, 99, list(tokens), 0)]], tokens, **content)


@pytest.mark.slow
def test_hostile_texts_add_no_element_and_no_comment_to_the_page():
    index = hostile_index()
    plain = synthetic(70, 4, 5, n_texts=4, n_rollouts=20, n_layers=2, dead=0.1)
    text = written(index, "".join(HOSTILE))
    found, expected = Elements(text), Elements(written(plain))
    assert found.tags == expected.tags
    assert found.comments == expected.comments
    assert text.isascii()
    # Packs have ">", which ends nothing without "<".
    assert not any(set("<&") & set(data) for data in found.data)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.one_of(st.binary(), st.sampled_from(RAW)), min_size=1, max_size=8), st.text())
def test_no_text_adds_an_element(tokens: list[bytes], name: str):
    token_ids = dict(enumerate(tokens, start=1))
    found = Elements(written(plain_index(token_ids, dataset=name, base_model=name), name))
    expected = Elements(written(plain_index(dict.fromkeys(token_ids, b"a")), "T"))
    assert found.tags == expected.tags
    assert found.comments == expected.comments


def test_the_manifest_of_a_hostile_page_is_read_back(tmp_path: Path):
    index = hostile_index()
    index.save(tmp_path / "features.h5")
    config = DashboardConfig(
        input=tmp_path / "features.h5", output=tmp_path / "page.html", title="--><script>"
    )
    manifest = read_manifest(run(config))
    assert manifest is not None
    assert manifest.settings["title"] == "--><script>"
    assert manifest.layout == index.manifest.layout


@pytest.mark.parametrize("first", range(0, len(RAW), 9))
def test_hostile_tokens_are_shown_literally(show: Any, first: int):
    raw = {i + 1: token for i, token in enumerate(RAW[first : first + 9])}
    visit = show(plain_index(raw))
    tokens = visit.part("window").first.get_by_test_id("token").all_text_contents()
    assert tokens == [token.decode(errors="replace") for token in raw.values()]
    assert visit.page.locator("img, svg[onload], base, iframe, object, embed").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte level", "unigram", "bpe"])
def test_tokens_of_real_tokenizers_read_as_their_text(show: Any, kind: str):
    tokenizer = fast(byte_level() if kind == "byte level" else sentencepiece(kind, prefix=False))
    tokens = token_bytes(tokenizer)
    texts = [text + "<|end|>" for text in TEXTS]
    windows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    raw = {i: tokens[i] for window in windows for i in window}
    examples = [
        example(float(len(windows) - n), 1000 + n, window, 0) for n, window in enumerate(windows)
    ]
    visit = show(index_of([examples], raw))
    shown = visit.part("window").evaluate_all("nodes => nodes.map(node => node.textContent)")
    decoded = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in windows]
    assert shown == decoded
    if kind == "byte level":
        assert shown == texts


def test_hostile_names_and_titles_are_shown_literally(show: Any):
    title = "</title><script>window.hacked=1</script><!--\u2028\u202e"
    name = "--></script><img src=x onerror=window.hacked=1>]]>"
    visit = show(plain_index({1: b"a"}, dataset=name, base_model=name + "\u2028"), title=title)
    assert visit.part("title").text_content() == title
    assert name in (visit.part("facts").text_content() or "")
    assert name + "\u2028" in (visit.part("facts").text_content() or "")
    assert visit.page.title().startswith(title.replace("\u2028", " ")[:30])


@pytest.mark.slow
@pytest.mark.parametrize("title", ["\ud83d", "a\x00b", "", " ", "\u202e", "x" * 10_000])
def test_an_odd_title_still_gives_a_page(show: Any, title: str):
    visit = show(plain_index({1: b"a"}), title=title)
    assert visit.part("token").first.text_content() == "a"


@pytest.mark.slow
def test_a_page_in_which_everything_is_hostile_can_be_read_by_keyboard(show: Any):
    visit = show(hostile_index())
    shown = set()
    for _ in range(30):
        visit.page.keyboard.press("ArrowRight")
        heading = visit.part("heading").text_content()
        visit.page.wait_for_selector(
            f"[data-testid=feature-view][data-feature='{(heading or '').split()[-1]}']"
        )
        shown.add(heading)
        visit.part("token").first.hover()
    assert len(shown) == 30


ADDRESSES = [
    *(f"#/{view}/{word}" for view in ("feature", "rollout", "text") for word in (
        "%3Cimg%20src=x%20onerror=window.hacked=1%3E", "__proto__", "constructor", "-0", "1e3",
        "0x1", "%E2%80%AE", "%00", "NaN", "9" * 400,
    )),
    "#/map?in=__proto__&q=%3Cscript%3E&sort=constructor&role=99&layer=-1&projection=%00",
    "#/map?category=1,2" + ",3" * 5000,
    "#/feature/1?q=" + "%3C%2Fscript%3E" * 500 + "&dmin=1e999&dmax=NaN&amin=-&smin=%E2%80%AE",
    "#/feature?sort=__proto__&in=toString&mark=<b>&full=yes&dead",
    "#/rollout?token=-5&paint=__proto__,1,-1,99999999999999",
    "#/nowhere/<script>", "#javascript:window.hacked=1", "#%ff%fe", "#/feature/1?%ff=%",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ADDRESSES)))
def test_a_hostile_address_opens_the_page(show: Any, number: int):
    visit = show(hostile_index(), ADDRESSES[number])
    assert (visit.part("heading").text_content() or "").strip()
    visit.page.evaluate("location.hash = '#/feature/1'")
    visit.page.wait_for_selector("[data-testid=feature-view][data-feature='1']")


@pytest.mark.slow
def test_hostile_rollouts_are_shown_literally(show: Any):
    index = hostile_index()
    for text in range(len(index.text_rollout)):
        visit = show(index, f"#/rollout/{index.text_rollout[text]}")
        span = slice(*index.text_offset[text : text + 2].tolist())
        raw = [index.token_bytes(int(i)) for i in index.text_token_id[span]]
        tokens = visit.part("rollout-text").get_by_test_id("token")
        tokens.nth(len(raw) - 1).wait_for(state="attached")
        assert tokens.all_text_contents() == display_texts(raw)
    n_fired = np.diff(index.text_code_offset[span.start : span.stop + 1])
    for nth in np.flatnonzero(n_fired)[:20:4].tolist():
        tokens.nth(nth).click()
        assert visit.part("fired").count() == min(n_fired[nth], 40)
    assert HOSTILE[0] in (
        visit.part("rollout-text").text_content() or ""
    )  # it is the name of a role, too


@pytest.mark.slow
def test_hostile_text_can_be_searched(show: Any):
    visit = show(hostile_index())
    for text in HOSTILE[::3]:
        visit.part("search").fill(text.replace("\ud83d", "").replace("\udc00", ""))
        visit.page.wait_for_timeout(30)
    visit.part("search").fill("</script>")
    visit.page.wait_for_function("() => !document.querySelector('[data-testid=search]:invalid')")
    visit.part("row").first.wait_for()
    visit.part("search").fill("")
    visit.part("tab-rollout").click()
    visit.part("rollout-search").fill("</script><script>")
    visit.part("rollout-row").first.wait_for()


@pytest.mark.slow
def test_hostile_labels_and_notes_are_stored_and_exported_literally(show: Any, tmp_path: Path):
    visit = show(hostile_index())
    text = "=cmd()\"',</script><img src=x onerror=window.hacked=1>\u202e"
    visit.part("label").fill(text)
    visit.part("note-button").click()
    visit.part("note").fill(text)
    visit.part("heading").click()
    with visit.page.expect_download() as saved:
        visit.part("export-labels").click()
    labels = json.loads(Path(saved.value.path()).read_text("utf-8"))
    (said,) = labels["features"].values()
    assert said["label"] == said["note"] == text
    with visit.page.expect_download() as saved:
        visit.part("save-table").click()
    with Path(saved.value.path()).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["label"] == "'" + text  # so that a spreadsheet runs no formula
    assert not any(cell[:1] in "=+@\t" for row in rows for cell in row.values() if cell)
    visit.part("tab-map").click()
    visit.part("canvas").hover()
    with visit.page.expect_download() as saved:
        visit.part("save-map").click()
    assert Path(saved.value.path()).read_bytes().startswith(b"\x89PNG")
    for told in ('{"__proto__": 1}', "[]", "null", "\x00", '{"format": "lorascope labels 1"}'):
        (tmp_path / "labels.json").write_text(told, "utf-8")
        visit.part("labels-file").set_input_files(tmp_path / "labels.json")
        visit.page.wait_for_function(
            "() => document.querySelector('[data-testid=files-status]').textContent"
        )
    features = {
        "1": {"label": HOSTILE[0], "note": HOSTILE[2], "star": True}, "__proto__": {"label": "x"},
        "99999999": {"label": "x"}, "2": "words", "3": {"label": {"toString": 1}, "star": "yes"},
    }  # fmt: skip
    labels["features"] = features
    (tmp_path / "labels.json").write_text(json.dumps(labels), "utf-8")
    visit.part("labels-file").set_input_files(tmp_path / "labels.json")
    visit.page.evaluate("location.hash = '#/feature/1'")
    visit.page.wait_for_selector("[data-testid=feature-view][data-feature='1']")
    assert visit.part("label").input_value() == HOSTILE[0]
    assert visit.part("note").input_value() == HOSTILE[2]
    visit.page.evaluate("localStorage.clear()")


def test_hostile_text_of_a_json_of_any_tool_is_shown_literally(show: Any, tmp_path: Path):
    path = tmp_path / "features.json"
    index = plain_index(dict(enumerate(RAW, start=1)))
    write_published(index, path, index.manifest)
    visit = show(path)
    tokens = visit.part("window").first.get_by_test_id("token").all_text_contents()
    assert tokens == [raw.decode(errors="replace") for raw in RAW]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one token", "one token of one line", "many tokens"])
def test_a_megabyte_of_text_leaves_the_page_usable(show: Any, kind: str):
    long = {"one token": b"x" * 1_000_000, "one token of one line": b"\n" * 1_000_000}
    tokens = {1: long.get(kind, b"word "), 2: b"y"}
    window = [1] * (20_000 if kind == "many tokens" else 1) + [2]
    visit = show(index_of([[example(1.0, 99, window, len(window) - 1)]], tokens))
    assert visit.part("token").last.text_content() == "y"
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert visit.part("token").first.text_content() == (long.get(kind, b"word ")[:400].decode())


def test_a_script_that_ran_in_the_page_could_make_no_request(show: Any, tab: "Shown"):
    asked: list[str] = []

    class Ear(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Ear)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    show(plain_index({1: b"a"}))
    tab.page.context.set_offline(False)
    try:
        refused = tab.page.evaluate(
            """async (url) => {
              const seen = [];
              document.addEventListener("securitypolicyviolation",
                (event) => seen.push(event.effectiveDirective));
              const image = new Image();
              image.src = url + "image";
              document.body.append(image);
              const link = document.createElement("link");
              Object.assign(link, { rel: "stylesheet", href: url + "style" });
              document.head.append(link);
              const script = document.createElement("script");
              script.textContent = "window.hacked = 1";
              document.body.append(script);
              const button = document.createElement("button");
              button.setAttribute("onclick", "window.hacked = 1");
              document.body.append(button);
              button.click();
              const frame = document.createElement("iframe");
              frame.src = url + "frame";
              document.body.append(frame);
              await fetch(url + "fetch").catch(() => {});
              try { new WebSocket(url.replace("http", "ws")); } catch {}
              await new Promise((done) => setTimeout(done, 300));
              image.remove(); link.remove(); frame.remove();
              return [...new Set(seen)].sort();
            }""",
            f"http://127.0.0.1:{server.server_port}/",
        )
    finally:
        tab.page.context.set_offline(True)
        server.shutdown()
        server.server_close()
    assert asked == []
    for directive in ("connect-src", "frame-src", "img-src", "script-src-elem", "style-src-elem"):
        assert directive in refused
    assert "script-src-attr" in refused
    # The refusals are what this test asked for.
    words = ("Content Security Policy", "file://", f"//127.0.0.1:{server.server_port}/")
    assert all(any(word in text for word in words) for text in tab.complaints)
    tab.complaints.clear()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no features", "one feature", "all dead", "one dead"])
@pytest.mark.parametrize("word", ["", "#/feature/0", "#/feature/7", "#/no/such/place", "#%"])
def test_small_pages_open_at_any_address(show: Any, kind: str, word: str):
    one = [example(1.0, 2, [1], 0)]
    features = {"no features": [], "one feature": [one], "all dead": [[], [], []], "one dead": [[]]}
    visit = show(index_of(features[kind], {1: b"a"}), word)
    for key in ("ArrowRight", "ArrowLeft", "Enter", "Escape"):
        visit.page.keyboard.press(key)
    heading = (visit.part("heading").text_content() or "").strip()
    assert heading
    if word == "#/feature/7":
        visit.page.goto(visit.page.url.partition("#")[0] + "#/feature/8")
        assert "There is no feature 8" in (visit.part("message").text_content() or "")
    if kind == "no features" and not word:
        visit.page.goto(visit.page.url.partition("#")[0] + "#/feature")
        assert "no features" in (visit.part("message").text_content() or "")


def test_a_large_file_gives_a_warning_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    plain_index({1: b"a"}).save(tmp_path / "features.h5")
    for limit, warned in ((10**9, False), (1000, True)):
        monkeypatch.setattr("lorascope.dashboard.render._LARGE", limit)
        caplog.clear()
        run(DashboardConfig(input=tmp_path / "features.h5", output=tmp_path / f"{limit}.html"))
        said = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert bool(said) == warned
        assert all("1000.html is large" in text and "--serve" in text for text in said)


@pytest.mark.slow
def test_a_thousand_features_give_a_small_page(show: Any, tmp_path: Path):
    visit = show(synthetic(1000, 10, 10))
    assert (tmp_path / "page.html").stat().st_size < 4_000_000
    cdp = visit.page.context.new_cdp_session(visit.page)
    cdp.send("HeapProfiler.collectGarbage")
    assert cdp.send("Runtime.getHeapUsage")["usedSize"] < 100e6
    assert visit.page.locator("*").count() < 10_000


@pytest.mark.slow
def test_a_page_of_a_hundred_thousand_features_opens_at_any_of_them(show: Any):
    index = synthetic(100_000, 10, 10)
    last = int(np.flatnonzero(index.n_examples)[-1])
    visit = show(index, f"#/feature/{last}")
    assert visit.part("heading").text_content() == f"Feature {last}"
    shown = visit.part("window").first.get_by_test_id("token")
    shown.first.wait_for()  # the block with this feature is the last of the file
    assert shown.all_text_contents() == list(index[last].examples[0].tokens)
    assert visit.page.locator("*").count() < 20_000
    visit.page.keyboard.press("ArrowLeft")
    before = int(np.flatnonzero(index.n_examples)[-2])
    visit.page.wait_for_selector(f"[data-testid=feature-view][data-feature='{before}']")
