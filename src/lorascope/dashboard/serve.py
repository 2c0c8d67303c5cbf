"""Give a page and its data to browsers of this machine, and to nobody else.

1. The server listens on 127.0.0.1 alone, at a free port or a given one.
2. The address of the page has a random word in it, because other users of the machine reach its
   ports too. A request without the word finds nothing.
3. A request whose `Host` is not a name of this machine is refused: it comes from a page elsewhere
   whose name was made to point here (DNS rebinding). Any port of it is right, for forwarded ones.
4. There is GET and nothing else. No answer says that other origins may read it (CORS), and every
   one says that they may not embed it; the page's own policy is sent as a header as well.

The page asks for `block-12` and `text-3` beside itself when it shows what is in them.
"""

import logging
import re
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from lorascope.errors import ConfigError, Interrupted

log = logging.getLogger(__name__)

_HERE = "127.0.0.1"
_NAMES = (_HERE, "localhost")
_PATH = re.compile(r"/([\w-]+)/((?:block|text)-(?:0|[1-9][0-9]{0,8}))?(?:\?.*)?")


class PageServer(ThreadingHTTPServer):
    """A server of one page. `pack` gives the data of a name, or None where there is none."""

    daemon_threads = True

    def __init__(
        self, page: bytes, policy: str, pack: Callable[[str], str | None], port: int = 0
    ) -> None:
        self.page, self.policy, self.pack = page, policy, pack
        self.word = secrets.token_urlsafe(16)
        try:
            super().__init__((_HERE, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"--port {port} cannot be had ({error.strerror}); "
                "give another, or none for any that is free"
            ) from None

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{_HERE}:{self.server_port}/{self.word}/"


def serve(server: PageServer) -> None:
    """Answer until Ctrl-C, which is how it is meant to end."""
    log.warning("open %s in a browser of this machine; Ctrl-C ends it", server.address)
    with server:
        try:
            server.serve_forever()
        except (Interrupted, KeyboardInterrupt):
            log.info("stopped")


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "lorascope", ""
    timeout = 60  # seconds after which a silent connection is closed

    def do_GET(self) -> None:
        """Answer with the page or with a part of its data."""
        server = self.server
        assert isinstance(server, PageServer)
        if self._host() not in _NAMES:
            return self._answer(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        path = _PATH.fullmatch(self.path)
        if path is None or not secrets.compare_digest(path[1].encode(), server.word.encode()):
            return self._answer(HTTPStatus.NOT_FOUND, "there is nothing here")
        if path[2] is None:
            return self._answer(HTTPStatus.OK, server.page, "text/html")
        data = server.pack(path[2])
        if data is None:
            return self._answer(HTTPStatus.NOT_FOUND, f"there is no {path[2]}")
        return self._answer(HTTPStatus.OK, data)

    def _host(self) -> str | None:
        try:
            return urlsplit("//" + self.headers.get("Host", "")).hostname
        except ValueError:
            return None

    def _answer(self, status: HTTPStatus, body: str | bytes, kind: str = "text/plain") -> None:
        assert isinstance(self.server, PageServer)
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (
            ("Content-Type", f"{kind}; charset=utf-8"),
            ("Content-Length", str(len(data))),
            ("Content-Security-Policy", f"{self.server.policy}; frame-ancestors 'none'"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: the word in the address is a secret, and a log may not be."""
