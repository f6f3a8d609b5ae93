"""A web server that redirects everything to one path."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator

SECRET = b"secret"


@contextlib.contextmanager
def redirecting_server() -> Iterator[tuple[str, list[str]]]:
    """Redirect every path to ``/secret``; yield the server's address, and the list of paths that are asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/secret" else 302)
            self.send_header("Location", "/secret")
            self.send_header("Content-Length", str(len(SECRET)))
            self.end_headers()
            self.wfile.write(SECRET)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
