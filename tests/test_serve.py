"""`lorascope dashboard --serve`: the page, for this machine only."""

import http.client
import socket
import threading
from collections.abc import Iterator

import pytest

from lorascope.dashboard.serve import PageServer
from lorascope.errors import ConfigError

POLICY = "default-src 'none'"


@pytest.fixture
def server() -> Iterator[PageServer]:
    packs = {"block-0": "first", "text-12": "twelfth"}
    with PageServer(b"<p>page", POLICY, packs.get) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


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


def test_the_page_and_its_data_are_given(server: PageServer):
    assert ask(server, f"/{server.word}/")[:2] == (200, "<p>page")
    assert ask(server, f"/{server.word}/?x=1")[:2] == (200, "<p>page")
    assert ask(server, f"/{server.word}/block-0")[:2] == (200, "first")
    assert ask(server, f"/{server.word}/text-12")[:2] == (200, "twelfth")
    assert server.address == f"http://127.0.0.1:{server.server_port}/{server.word}/"


@pytest.mark.parametrize(
    "path",
    ["/", "", "/{word}", "/{word}/block-1", "/{word}/block-00", "/{word}/../../etc/passwd",
     "/wrong/", "/wrong/block-0", "/{word}x/", "/{word}/%2e%2e/block-0",
     "/{word}/block-0/", "/{word}/block--1", "/{word}/block-9999999999999999999999", "/é/"],
)  # fmt: skip
def test_any_other_path_finds_nothing(server: PageServer, path: str):
    asked = path.format(word=server.word).encode().decode("latin-1") or "/"
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=10)
    with connection:
        request = f"GET {asked} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode("latin-1"))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"page" not in answer.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"])
def test_there_is_get_and_nothing_else(server: PageServer, method: str):
    status, text, headers = ask(server, f"/{server.word}/", method)
    assert status == 501
    assert "<p>page" not in text
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "host",
    ["evil.test", "evil.test:80", "127.0.0.1.evil.test", "localhost.evil.test", "", "[::1",
     "0.0.0.0", "192.168.0.1", "127.0.0.1@evil.test", "evil.test#127.0.0.1"],
)  # fmt: skip
def test_a_name_that_was_made_to_point_here_is_refused(server: PageServer, host: str):
    status, text, _ = ask(server, f"/{server.word}/", host=host)
    assert status == 403
    assert "<p>page" not in text


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost", "LOCALHOST:8000"])
def test_a_forwarded_port_is_let_in(server: PageServer, host: str):
    assert ask(server, f"/{server.word}/", host=host)[0] == 200


@pytest.mark.parametrize("path", ["/{word}/", "/{word}/block-0", "/nothing/"])
def test_no_other_origin_may_read_or_embed_it(server: PageServer, path: str):
    asked = path.format(word=server.word)
    _, _, headers = ask(server, asked, Origin="http://evil.test", Sec_Fetch_Site="cross-site")
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Content-Security-Policy"] == f"{POLICY}; frame-ancestors 'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_it_listens_on_the_loopback_address_alone(server: PageServer):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(OSError, match=r"refused|unreachable|[Tt]imed out"):
        socket.create_connection(("127.0.0.2", server.server_port), timeout=5)


def test_a_port_that_is_taken_is_one_line(server: PageServer):
    with pytest.raises(ConfigError, match=f"--port {server.server_port} cannot be had"):
        PageServer(b"", POLICY, dict[str, str]().get, server.server_port)


def test_two_servers_have_two_words(server: PageServer):
    with PageServer(b"", POLICY, dict[str, str]().get) as other:
        assert other.word != server.word
        assert len(other.word) >= 20
