"""Web servers of this process."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator

SECRET = b"secret"


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Logs nothing."""

    def log_message(self, *_: object) -> None:
        pass

    def read_body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: object) -> None:
        """Send a body, unless it is not asked for, with headers whose names have ``_`` for ``-``."""
        self.send_response(status)
        for name, value in {"Content_Length": len(body) if length is None else length, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):  # the client reads no more of a long answer
                self.wfile.write(body)


@contextlib.contextmanager
def serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server that answers by a handler."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@contextlib.contextmanager
def redirecting_server() -> Iterator[tuple[str, list[str]]]:
    """Redirect every path to ``/secret``; yield the server's address, and the list of paths that are asked for."""
    asked: list[str] = []

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.answer(200 if self.path == "/secret" else 302, SECRET, Location="/secret")

        do_HEAD = do_GET

    with serving(Handler) as address:
        yield address, asked
