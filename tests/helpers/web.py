"""Web servers of this process."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator

SECRET = b"secret"


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """A handler that logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


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
            self.send_response(200 if self.path == "/secret" else 302)
            self.send_header("Location", "/secret")
            self.send_header("Content-Length", str(len(SECRET)))
            self.end_headers()
            self.wfile.write(SECRET)

        do_HEAD = do_GET

    with serving(Handler) as address:
        yield address, asked
