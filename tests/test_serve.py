"""`lorascope dashboard --serve`: a page for this machine only."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from builders.indexes import synthetic

from lorascope.dashboard.payload import BLOCK, Payload
from lorascope.dashboard.render import DashboardConfig, policy, run, server_of
from lorascope.dashboard.serve import PageServer
from lorascope.errors import ConfigError

POLICY = "default-src 'none'"


@contextmanager
def running(server: PageServer) -> Iterator[PageServer]:
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server() -> Iterator[PageServer]:
    packs = {"block-0": "first", "rollout-12": "twelfth"}
    with running(PageServer(b"<p>page", POLICY, packs.get)) as server:
        yield server


def ask(
    server: PageServer, path: str, method: str = "GET", host: str | None = None, **headers: str
) -> tuple[int, str, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"127.0.0.1:{server.server_port}" if host is None else host)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def test_the_page_and_its_packs_are_served(server: PageServer):
    assert ask(server, f"/{server.token}/")[:2] == (200, "<p>page")
    assert ask(server, f"/{server.token}/?x=1")[:2] == (200, "<p>page")
    assert ask(server, f"/{server.token}/block-0")[:2] == (200, "first")
    assert ask(server, f"/{server.token}/rollout-12")[:2] == (200, "twelfth")
    assert server.address == f"http://127.0.0.1:{server.server_port}/{server.token}/"


@pytest.mark.parametrize(
    "path",
    ["/", "", "/{token}", "/{token}/block-1", "/{token}/block-00", "/{token}/../../etc/passwd",
     "/wrong/", "/wrong/block-0", "/{token}x/", "/{token}/%2e%2e/block-0",
     "/{token}/block-0/", "/{token}/block--1", "/{token}/block-9999999999999999999999", "/é/"],
)  # fmt: skip
def test_any_other_path_is_not_found(server: PageServer, path: str):
    asked = path.format(token=server.token).encode().decode("latin-1") or "/"
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
    with connection:
        request = f"GET {asked} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode("latin-1"))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.0 404 ")
    assert b"page" not in answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"])
def test_only_get_is_supported(server: PageServer, method: str):
    status, text, headers = ask(server, f"/{server.token}/", method)
    assert status == 501
    assert "<p>page" not in text
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "host",
    ["evil.test", "evil.test:80", "127.0.0.1.evil.test", "localhost.evil.test", "", "[::1",
     "0.0.0.0", "192.168.0.1", "127.0.0.1@evil.test", "evil.test#127.0.0.1"],
)  # fmt: skip
def test_a_foreign_host_name_is_refused(server: PageServer, host: str):
    status, text, _ = ask(server, f"/{server.token}/", host=host)
    assert status == 403
    assert "<p>page" not in text


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "LOCALHOST:8000"])
def test_a_forwarded_port_is_accepted(server: PageServer, host: str):
    assert ask(server, f"/{server.token}/", host=host)[0] == 200


@pytest.mark.parametrize("path", ["/{token}/", "/{token}/block-0", "/nothing/"])
def test_no_other_origin_may_read_or_embed_it(server: PageServer, path: str):
    asked = path.format(token=server.token)
    _, _, headers = ask(server, asked, Origin="http://evil.test", Sec_Fetch_Site="cross-site")
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Content-Security-Policy"] == f"{POLICY}; frame-ancestors 'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_it_listens_only_on_the_loopback_address(server: PageServer):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(OSError, match=r"refused|unreachable|[Tt]imed out"):
        socket.create_connection(("127.0.0.2", server.server_port), timeout=5)


def test_a_port_in_use_is_an_error_with_its_number(server: PageServer):
    with pytest.raises(ConfigError, match=f"--port {server.server_port}"):
        PageServer(b"", POLICY, dict[str, str]().get, server.server_port)


def test_two_servers_have_two_tokens(server: PageServer):
    with PageServer(b"", POLICY, dict[str, str]().get) as other:
        assert other.token != server.token
        assert len(other.token) >= 20


@pytest.mark.slow
def test_the_served_page_shows_any_feature_and_rollout(browser: Any):
    index = synthetic(300, 5, 6, n_texts=5, n_rollouts=30, n_layers=4)
    last = int(np.flatnonzero(index.n_examples)[-1])
    complaints: list[str] = []
    requests: list[str] = []
    with (
        running(server_of(Payload(index, "T"), index.manifest)) as server,
        browser.new_context() as context,
    ):
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(server.address + f"#/feature/{last}", wait_until="domcontentloaded")
        tab.wait_for_selector(f"[data-testid=feature-view][data-feature='{last}']")
        tokens = tab.get_by_test_id("window").first.get_by_test_id("token")
        assert tokens.all_text_contents() == list(index[last].examples[0].tokens)
        tab.goto(server.address + f"#/rollout/{index.text_rollout[3]}")
        words = tab.get_by_test_id("rollout-text").get_by_test_id("token")
        words.first.wait_for()
        assert words.count() == index.text_offset[4] - index.text_offset[3]
        assert complaints == []
        assert all(url.startswith(server.address) for url in requests)
        asked = {url.removeprefix(server.address).partition("#")[0] for url in requests}
        assert {f"block-{last // BLOCK}", "rollout-3"} <= asked
        assert server.server_port
    assert "connect-src 'self'" in policy(served=True)
    assert "connect-src" not in policy()


@pytest.mark.slow
def test_a_served_page_says_that_its_server_has_stopped(browser: Any):
    index = synthetic(300, 2, 2, n_texts=0, n_rollouts=20, n_layers=1, dead=0)
    with browser.new_context() as context:
        tab = context.new_page()
        with running(server_of(Payload(index, "T"), index.manifest)) as server:
            tab.goto(server.address, wait_until="domcontentloaded")
            tab.wait_for_selector("html[data-ready=true]")
        tab.evaluate("location.hash = '#/feature/299'")
        message = tab.get_by_text("The command that serves this page has stopped. Start it again.")
        message.first.wait_for()


def test_served_packs_are_those_of_the_file():
    payload = Payload(synthetic(2 * BLOCK + 2, 2, 2, n_texts=2, n_rollouts=20, n_layers=1), "T")
    server = server_of(payload, payload.index.manifest)
    server.server_close()
    assert server.pack("block-2") == payload.block(2)
    assert server.pack("rollout-1") == payload.rollout(1)
    assert server.pack("block-3") is server.pack("rollout-2") is None


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0)])
def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path, stop: int, code: int):
    synthetic(10, 2, 2, n_texts=1, n_rollouts=20, n_layers=1).save(tmp_path / "features.h5")
    command = [sys.executable, "-m", "lorascope", "dashboard", "--input", "features.h5", "--serve"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    line = next(line for line in process.stderr if "http://127.0.0.1:" in line)
    address = line[line.index("http://") :].split()[0]
    with urlopen(address, timeout=10) as answer:
        assert b"<title>LoRA features</title>" in answer.read()
    process.send_signal(stop)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == "features.h5\n"
    assert "Traceback" not in err
    assert [file.name for file in tmp_path.iterdir()] == ["features.h5"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": 8000}, "--port needs --serve"),
        ({"port": 70000, "serve": True}, "--port is 70000, expected 1 to 65535"),
        ({"port": 0, "serve": True}, "--port is 0, expected 1 to 65535"),
    ],
)
def test_an_invalid_port_is_an_error(given: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        DashboardConfig(input=Path("features.h5"), **given)


@pytest.mark.slow
def test_a_block_that_is_there_only_in_part_is_waited_for(browser: Any, tmp_path: Path):
    """A parser hands over the text of a long element piece by piece."""
    index = synthetic(300, 10, 10)
    index.save(tmp_path / "features.h5")
    html = tmp_path / "page.html"
    run(DashboardConfig(input=tmp_path / "features.h5", output=html))
    data = html.read_bytes()
    start = data.rindex(b'id="block-')
    cut = (start + data.index(b"</script>", start)) // 2

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(data[:cut])
            self.wfile.flush()
            time.sleep(1.5)
            self.wfile.write(data[cut:])

        def log_message(self, *_: Any):
            pass

    last = int(np.flatnonzero(index.n_examples)[-1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/#/feature/{last}")
            tokens = page.get_by_test_id("window").first.get_by_test_id("token")
            tokens.first.wait_for(timeout=60_000)
            shown = tokens.all_text_contents()
        server.shutdown()
    assert shown == list(index[last].examples[0].tokens)
