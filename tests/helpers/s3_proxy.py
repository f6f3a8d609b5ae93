"""A small HTTP proxy before an S3 that does harm to chosen requests, and counts them all."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    method: str
    key: str  # bucket/path
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def lists(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.query

    @property
    def prefix(self) -> str:
        """What is listed."""
        return parse_qs(self.query).get("prefix", [""])[0]

    @property
    def reads(self) -> bool:
        """Whether it asks for the bytes of an object."""
        return self.method == "GET" and "/" in self.key.strip("/") and not self.lists


@dataclass(frozen=True)
class Response:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


Harm = Callable[["Handler", Request], None]


def refuse(status: int, code: str, message: str = "as the test wants it") -> Harm:
    """An error of S3 instead of an answer."""

    def harm(handler: Handler, request: Request) -> None:
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        handler.send(Response(status, headers, body), whole=request.method != "HEAD")

    return harm


def cut(handler: Handler, request: Request) -> None:
    """The connection is lost in the middle of the body."""
    answer = handler.forward(request)
    handler.send(Response(answer.status, answer.headers, answer.body[: len(answer.body) // 2]))
    handler.close_connection = True


def slow(seconds: float, pieces: int = 4) -> Harm:
    """The body comes in pieces, with a pause before each."""

    def harm(handler: Handler, request: Request) -> None:
        answer = handler.forward(request)
        handler.send(Response(answer.status, answer.headers, b""))
        size = max(1, -(-len(answer.body) // pieces))
        for at in range(0, len(answer.body), size):
            time.sleep(seconds)
            handler.wfile.write(answer.body[at : at + size])
            handler.wfile.flush()

    return harm


def hold(handler: Handler, request: Request) -> None:
    """No answer, until the proxy is healed or closed."""
    handler.proxy.healed.wait()
    handler.close_connection = True


def after(action: Callable[[], Any]) -> Harm:
    """Something happens to the bucket just before the request comes through."""

    def harm(handler: Handler, request: Request) -> None:
        action()
        handler.send(handler.forward(request), whole=request.method != "HEAD")

    return harm


class Proxy:
    """Listens on ``port`` of this machine, for what listens on ``upstream``."""

    def __init__(self, port: int, upstream: int) -> None:
        self.upstream = upstream
        self.requests: list[Request] = []
        self.healed = threading.Event()
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), type("Bound", (Handler,), {"proxy": self}))
        self.url = "http://{}:{}".format(*self._server.server_address)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.healed.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def harm(self, harm: Harm, when: Callable[[Request], bool], times: int | None = None) -> Iterator[list[Request]]:
        """Do ``harm`` to the requests that ``when`` picks, at most ``times``, while the block runs; gives them."""
        rule = _Rule(harm, when, times)
        self.healed.clear()
        self._rules.append(rule)
        try:
            yield rule.done
        finally:
            self._rules.remove(rule)
            self.healed.set()

    def handle(self, handler: Handler, request: Request) -> None:
        with self._lock:
            self.requests.append(replace(request, body=b""))
            rule = next((r for r in self._rules if len(r.done) != r.times and r.when(request)), None)
            if rule is not None:
                rule.done.append(request)
        if rule is not None:
            rule.harm(handler, request)
        else:
            handler.send(handler.forward(request), whole=request.method != "HEAD")


@dataclass
class _Rule:
    harm: Harm
    when: Callable[[Request], bool]
    times: int | None
    done: list[Request] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asked was killed: nothing to tell."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        request = Request(self.command, unquote(parts.path).lstrip("/"), parts.query, dict(self.headers.items()), body)
        try:
            self.proxy.handle(self, request)
        except OSError:  # who asked is gone, or the S3 is
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def forward(self, request: Request) -> Response:
        """What the S3 itself answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream, timeout=60)
        try:
            headers = {k: v for k, v in request.headers.items() if k.lower() not in ("connection", "expect")}
            connection.request(request.method, self.path, request.body or None, headers)
            answer = connection.getresponse()
            dropped = ("connection", "transfer-encoding", "server", "date")
            headers_back = [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped]
            body = answer.read()
        finally:
            connection.close()
        if request.method != "HEAD" and all(k.lower() != "content-length" for k, _ in headers_back):
            headers_back.append(("Content-Length", str(len(body))))
        return Response(answer.status, headers_back, body)

    def send(self, response: Response, whole: bool = True) -> None:
        self.send_response(response.status)
        for name, value in response.headers:
            self.send_header(name, value)
        self.end_headers()
        if whole:
            self.wfile.write(response.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
