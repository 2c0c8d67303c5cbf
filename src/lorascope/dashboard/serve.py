"""Serve a page and its data to browsers on this machine only.

1. The server listens on 127.0.0.1, at a free port or a given one.
2. The page's address contains a random token, because other users of the machine can reach its
   ports too. A request without the token gets 404.
3. A request whose `Host` is not this machine is refused, because it may come from another site
   whose name resolves to this address (DNS rebinding). Any port is accepted: it may be forwarded.
4. Only GET is supported. No response allows other origins to read it (CORS) or to embed it, and
   every response has the page's policy as a header too.

The page requests packs such as `block-12` and `rollout-3` from the same address when it needs them.
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

_ADDRESS = "127.0.0.1"
_HOSTS = (_ADDRESS, "localhost")
_PATH = re.compile(r"/([\w-]+)/((?:block|rollout)-(?:0|[1-9][0-9]{0,8}))?(?:\?.*)?")


class PageServer(ThreadingHTTPServer):
    """A server of one page. `pack` returns the data of a name, or None if there is none."""

    daemon_threads = True

    def __init__(
        self, page: bytes, policy: str, pack: Callable[[str], str | None], port: int = 0
    ) -> None:
        self.page, self.policy, self.pack = page, policy, pack
        self.token = secrets.token_urlsafe(16)
        try:
            super().__init__((_ADDRESS, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on --port {port} ({error.strerror}); "
                "give another port, or leave it out to use any free one"
            ) from None

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{_ADDRESS}:{self.server_port}/{self.token}/"


def serve(server: PageServer) -> None:
    """Serve until Ctrl-C, which ends it without an error."""
    log.warning("open %s in a browser on this machine; Ctrl-C stops it", server.address)
    with server:
        try:
            server.serve_forever()
        except (Interrupted, KeyboardInterrupt):
            log.info("stopped")


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "lorascope", ""
    timeout = 60  # seconds until an idle connection is closed

    def do_GET(self) -> None:
        """Send the page or one of its packs."""
        server = self.server
        assert isinstance(server, PageServer)
        if self._host() not in _HOSTS:
            return self._send(HTTPStatus.FORBIDDEN, "this page is only for this machine")
        path = _PATH.fullmatch(self.path)
        if path is None or not secrets.compare_digest(path[1].encode(), server.token.encode()):
            return self._send(HTTPStatus.NOT_FOUND, "not found")
        if path[2] is None:
            return self._send(HTTPStatus.OK, server.page, "text/html")
        data = server.pack(path[2])
        if data is None:
            return self._send(HTTPStatus.NOT_FOUND, f"{path[2]} not found")
        return self._send(HTTPStatus.OK, data)

    def _host(self) -> str | None:
        try:
            return urlsplit("//" + self.headers.get("Host", "")).hostname
        except ValueError:
            return None

    def _send(self, status: HTTPStatus, body: str | bytes, kind: str = "text/plain") -> None:
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
        """Log nothing: the address contains a secret, and logs may be shared."""
