"""An HTTP proxy in front of an S3 server that records all requests and injects faults into chosen ones."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
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
    def is_list(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.query

    @property
    def prefix(self) -> str:
        """The prefix of a list request."""
        return parse_qs(self.query).get("prefix", [""])[0]

    @property
    def is_read(self) -> bool:
        """Whether it reads the bytes of an object."""
        return self.method == "GET" and "/" in self.key.strip("/") and not self.is_list


@dataclass(frozen=True)
class Response:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


_OF_BODY = ("content-length", "content-md5", "content-encoding", "transfer-encoding", "x-amz-decoded-content-length")
Fault = Callable[["Handler", Request], None]


def refuse(status: int, code: str, message: str = "injected by a test") -> Fault:
    """Answer with an S3 error."""

    def fault(handler: Handler, request: Request) -> None:
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        handler.send(Response(status, headers, body), whole=request.method != "HEAD")

    return fault


def cut(handler: Handler, request: Request) -> None:
    """Close the connection in the middle of the body."""
    answer = handler.forward(request)
    handler.send(Response(answer.status, answer.headers, answer.body[: len(answer.body) // 2]))
    handler.close_connection = True


def shorten(share: float) -> Fault:
    """Send the first part of the body, with a Content-Length that fits it and no checksum."""

    def fault(handler: Handler, request: Request) -> None:
        answer = handler.forward(request)
        body = answer.body[: int(share * len(answer.body))]
        kept = [(k, v) for k, v in answer.headers if k.lower() != "content-length" and "checksum" not in k.lower()]
        handler.send(Response(answer.status, [*kept, ("Content-Length", str(len(body)))], body))

    return fault


def slow(seconds: float, pieces: int = 4) -> Fault:
    """Send the body in pieces, with a pause before each."""

    def fault(handler: Handler, request: Request) -> None:
        answer = handler.forward(request)
        handler.send(Response(answer.status, answer.headers, b""))
        size = max(1, -(-len(answer.body) // pieces))
        for at in range(0, len(answer.body), size):
            time.sleep(seconds)
            handler.wfile.write(answer.body[at : at + size])
            handler.wfile.flush()

    return fault


def lose(handler: Handler, request: Request) -> None:
    """Answer a put, and write nothing."""
    handler.send(Response(200, [("ETag", '"0"'), ("Content-Length", "0")], b""))


def empty(handler: Handler, request: Request) -> None:
    """Store an object without its bytes."""
    kept = {k: v for k, v in request.headers.items() if k.lower() not in _OF_BODY and "checksum" not in k.lower()}
    handler.send(handler.forward(replace(request, headers={**kept, "Content-Length": "0"}, body=b"")))


def hold(handler: Handler, request: Request) -> None:
    """Do not answer until the fault is removed or the proxy is closed."""
    handler.proxy.released.wait()
    handler.close_connection = True


def run_first(action: Callable[[], Any]) -> Fault:
    """Call ``action`` before the request is forwarded."""

    def fault(handler: Handler, request: Request) -> None:
        action()
        handler.send(handler.forward(request), whole=request.method != "HEAD")

    return fault


class Proxy:
    """Listens on a port of this machine and answers with what ``upstream`` returns for a path and its request."""

    def __init__(self, port: int, upstream: Callable[[str, Request], Response], address: str = "127.0.0.1") -> None:
        self.upstream = upstream
        self.requests: list[Request] = []
        self.released = threading.Event()
        self._rules: list[_Rule] = []
        self._lock = threading.Lock()
        self._server = _Server((address, port), type("Bound", (Handler,), {"proxy": self}))
        self.url = "http://{}:{}".format(*self._server.server_address)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def inject(
        self, fault: Fault, when: Callable[[Request], bool], times: int | None = None
    ) -> Iterator[list[Request]]:
        """Inject ``fault`` into the requests that ``when`` selects, at most ``times``, while the block runs.

        Yields the list of affected requests, which grows.
        """
        rule = _Rule(fault, when, times)
        self.released.clear()
        self._rules.append(rule)
        try:
            yield rule.affected
        finally:
            self._rules.remove(rule)
            self.released.set()

    def handle(self, handler: Handler, request: Request) -> None:
        with self._lock:
            self.requests.append(replace(request, body=b""))
            rule = next((r for r in self._rules if len(r.affected) != r.times and r.when(request)), None)
            if rule is not None:
                rule.affected.append(request)
        if rule is not None:
            rule.fault(handler, request)
        else:
            handler.send(handler.forward(request), whole=request.method != "HEAD")


def listening_on(port: int) -> Callable[[str, Request], Response]:
    """What the HTTP server on a port of this machine answers."""

    def ask(path: str, request: Request) -> Response:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        try:
            connection.request(request.method, path, request.body or None, request.headers)
            answer = connection.getresponse()
            return Response(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()

    return ask


@contextmanager
def s3_behind_proxy(address: str = "127.0.0.1", port: int = 0) -> Iterator[Proxy]:
    """The proxy of a new S3 server: moto's application, whose own HTTP server would take a third more."""
    import botocore.session
    from moto import backends
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.test import create_environ, run_wsgi_app

    botocore.session.create_loader = cache(botocore.session.create_loader)  # else each client parses megabytes
    modules = [*backends.list_of_moto_modules()]  # listed for each request
    backends.list_of_moto_modules = lambda: modules
    app = DomainDispatcherApplication(create_backend_app)

    def ask(path: str, request: Request) -> Response:
        environ = create_environ(path, method=request.method, headers=request.headers, data=request.body)
        parts, status, headers = run_wsgi_app(app, environ, buffered=True)
        return Response(int(status.split()[0]), [*headers.items()], b"".join(parts))

    proxy = Proxy(port, ask, address)
    yield proxy
    proxy.close()


def s3_environment(endpoint: str) -> dict[str, str]:
    """Variables with which s3fs uses a server."""
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "k"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys, "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass
class _Rule:
    fault: Fault
    when: Callable[[Request], bool]
    times: int | None
    affected: list[Request] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not log an error if the client was killed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        request = Request(self.command, unquote(parts.path).lstrip("/"), parts.query, dict(self.headers.items()), body)
        try:
            self.proxy.handle(self, request)
        except OSError:  # the client or the S3 server is gone
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def forward(self, request: Request) -> Response:
        """The answer of the S3 server."""
        kept = {k: v for k, v in request.headers.items() if k.lower() not in ("connection", "expect")}
        answer = self.proxy.upstream(self.path, replace(request, headers=kept))
        dropped = ("connection", "transfer-encoding", "server", "date")
        headers = [(k, v) for k, v in answer.headers if k.lower() not in dropped]
        if request.method != "HEAD" and all(k.lower() != "content-length" for k, _ in headers):
            headers.append(("Content-Length", str(len(answer.body))))
        return Response(answer.status, headers, answer.body)

    def send(self, response: Response, whole: bool = True) -> None:
        self.send_response(response.status)
        for name, value in response.headers:
            self.send_header(name, value)
        self._headers_buffer += [b"\r\n", response.body if whole else b""]
        self.flush_headers()  # with the body in one packet

    def log_message(self, format: str, *args: Any) -> None:
        pass
