# SPDX-License-Identifier: Apache-2.0
"""A few pages over HTTP, each made when it is asked for: on an address, or on a unix socket for root alone."""

from __future__ import annotations

import os
import socketserver
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, TypeAlias

from snapshotter.errors import ConfigError
from snapshotter.log import get_logger

# (content type, body); what is asked for beyond the path is ignored.
Page: TypeAlias = Callable[[], tuple[str, bytes]]

_UNIX: Final = "unix:"
_SECONDS: Final = 30.0  # for one request, whoever sends it however slowly
_POLL_SECONDS: Final = 0.1  # after which a close is noticed


class _Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class _Tcp(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name service for the host's full name.
        socketserver.TCPServer.server_bind(self)


class Web:
    """Serves until closed, by threads of its own."""

    def __init__(self, address: str, pages: Mapping[str, Page]) -> None:
        """`address`: "HOST:PORT", or "unix:PATH". Raises ConfigError."""
        handler = type("Handler", (_Handler,), {"pages": pages})
        self._path: Path | None = None
        try:
            if address.startswith(_UNIX):
                self._path = Path(address.removeprefix(_UNIX))
                self._server = _unix_server(self._path, handler)
            else:
                host, _, port = address.rpartition(":")
                self._server = _Tcp((host.strip("[]"), int(port)), handler)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(f"metrics.address {address!r}: {error}") from None
        serve = partial(self._server.serve_forever, _POLL_SECONDS)
        threading.Thread(target=serve, name="web", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()


def _unix_server(path: Path, handler: type[BaseHTTPRequestHandler]) -> socketserver.BaseServer:
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if path.is_socket():
        path.unlink()  # of a daemon that was killed: the root's lock says that no other one lives
    before = os.umask(0o177)
    try:
        return _Unix(str(path), handler)
    finally:
        os.umask(before)


class _Handler(BaseHTTPRequestHandler):
    pages: Mapping[str, Page]
    timeout = _SECONDS
    server_version, sys_version = "tardev-snapshotter", ""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        page = self.pages.get(self.path.partition("?")[0])
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            content_type, body = page()
        except Exception as error:
            get_logger().warning(
                "a page cannot be made", path=self.path[:100], error=f"{type(error).__name__}: {error}"
            )
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        with suppress(OSError):
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Scrapes are no events."""

    def address_string(self) -> str:
        return "client"
