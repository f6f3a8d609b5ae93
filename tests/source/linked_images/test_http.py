"""Downloads of images that are slow, cut or endless: each ends in time, and an image is whole or refused."""

from __future__ import annotations

import contextlib
import itertools
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from reinforce.source.linked_images import http as web
from reinforce.source.linked_images.http import ImageRefusedByPlace, Unreachable, fetch
from tests.helpers.data import picture

IMAGE = picture(0)
SECONDS = 120.0  # for which the server goes on at most
OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"Content-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE
CUT = OK + b"Content-Length: 1000\r\n\r\n123"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def answers(path: str, attempt: int) -> Iterable[bytes | float]:
    """What is sent for a path: bytes, and seconds to wait."""
    drip = itertools.chain.from_iterable((b"a", 0.02) for _ in itertools.count())
    return {
        "/whole": [WHOLE],
        "/chunks": [OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(IMAGE), IMAGE, b"\r\n0\r\n\r\n"],
        "/unsized": [OK + b"\r\n" + IMAGE],
        "/late-100": [CONTINUE * 3, WHOLE],
        "/cut": [CUT],
        "/cut-once": [CUT if attempt == 1 else WHOLE],
        "/cut-chunk": [OK + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n123"],
        "/status": drip,
        "/header": itertools.chain([OK + b"X: "], drip),
        "/body": itertools.chain([OK + b"Content-Length: 1000000\r\n\r\n"], drip),
        "/continue": itertools.chain.from_iterable((CONTINUE, 0.02) for _ in itertools.count()),
        "/flood": itertools.repeat(CONTINUE * 1000),
        "/hop": [0.1, b"HTTP/1.1 302 Found\r\nLocation: /hop\r\nContent-Length: 0\r\n\r\n"],
    }.get(path, [SECONDS])


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Counter[str]]]:
    """A server's ``HOST:PORT``, and how often each path was asked for."""
    asked: Counter[str] = Counter()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            words = self.rfile.readline().split()  # of a handshake: anything
            path = words[1].decode() if words[:1] == [b"GET"] else ""
            asked[path] += 1
            end = time.monotonic() + SECONDS
            with contextlib.suppress(OSError):
                for part in answers(path, asked[path]):
                    if time.monotonic() > end:
                        return
                    time.sleep(part) if isinstance(part, float) else self.wfile.write(part)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_address[1]}", asked
        running.shutdown()


def fetched(server: tuple[str, Counter[str]], path: str, scheme: str = "http") -> bytes:
    return fetch(f"{scheme}://{server[0]}{path}", 2**20, lambda url: True)


def test_a_whole_image_is_returned_and_a_cut_one_asked_for_again_and_then_refused(
    server: tuple[str, Counter[str]],
) -> None:
    for path in ("/whole", "/chunks", "/unsized", "/late-100", "/cut-once"):
        assert fetched(server, path) == IMAGE
    for path, message in (("/cut", "ended after 3 of 1,000 bytes"), ("/cut-chunk", "IncompleteRead")):
        with pytest.raises(Unreachable, match=message):
            fetched(server, path)
        assert server[1][path] == 2


def test_an_attempt_ends_at_its_deadline_and_an_endless_head_before_it(
    server: tuple[str, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_DEADLINE", 0.3)
    for path in ("/silent", "/status", "/header", "/body", "/continue", "/hop", "/tls"):
        start = time.monotonic()
        with pytest.raises((Unreachable, ImageRefusedByPlace)) as caught:
            fetched(server, "/silent" if path == "/tls" else path, "https" if path == "/tls" else "http")
        assert time.monotonic() - start < SECONDS
        assert isinstance(caught.value, Unreachable), "redirects within their number"
    monkeypatch.undo()
    with pytest.raises(Unreachable, match="more than 1,048,576 bytes precede the image"):
        fetched(server, "/flood")
