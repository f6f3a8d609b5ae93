"""Images in files of their own: which places a table may name, and downloads that are slow, cut or endless."""

from __future__ import annotations

import contextlib
import csv
import itertools
import socketserver
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from reinforce.source import linked_images as places
from reinforce.source import linked_images as web
from reinforce.source.config import Limits
from reinforce.source.linked_images import ImageRefusedByPlace, Unreachable, fetch, is_public_address
from tests.helpers.data import picture
from tests.helpers.tables import outcomes, read_table

IMAGES = [picture(number) for number in range(3)]


def table(path: Path, places_: Sequence[str], column: str = "file_name") -> Path:
    """A csv file with these places, and the captions 0, 1, ..."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([column, "text"])
        rows.writerows([place, number] for number, place in enumerate(places_))
    return path


def read(path: Path, format_: str = "csv", **spec: Any) -> list[str]:
    """The reason and detail of each refusal, and the caption of each sample."""
    return list(outcomes(read_table(path, format_, **spec)).values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images in two folders."""
    for name in ("a.png", "deep/b.png", "outside/c.png"):
        path = tmp_path / ("data" if not name.startswith("outside") else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(IMAGES["abc".index(path.stem)])
    return tmp_path / "data"


def test_paths_of_a_table_are_relative_to_its_folder_and_stay_in_it(folder: Path) -> None:
    outside = f"{folder.parent}/outside"
    (folder / "folder.png").mkdir()
    (folder / "odd.jsonl").write_text('{"path": "\\ud800.png"}')
    assert read(folder / "odd.jsonl", "jsonl")[0].endswith("it is no plain path or URL")
    assert read(table(folder / "long.csv", ["a" * 300 + ".png"]))[0].endswith(".png': File name too long")
    named = ["a.png", "./deep//b.png", "none.png", "folder.png"]
    named += ["../outside/c.png", f"{outside}/c.png", f"file://{outside}/c.png"]
    named += ["s3://bucket/x.png", "deep/../a.png", "~/x.png", "a\tb.png", "x.zip::memory://y.png", "..\\c.png"]
    path = table(folder / "x.csv", named)
    found = read(path)
    missing = ["image_missing: 'none.png': No such file or directory", "image_missing: 'folder.png': a folder"]
    assert found[:4] == ["0", "1", *missing]
    assert all(refusal.startswith("image_place: ") for refusal in found[4:])
    assert found[4].endswith("it is not in the folder of the table; allow it in input.images_from")
    allowed = read(path, images_from=[outside])
    assert allowed[4:7] == ["4", "5", "6"]
    assert allowed[7:] == found[7:], "a folder that is allowed allows no other"
    [large] = read(table(folder / "y.csv", ["a.png"]), limits=Limits(image_bytes=100))
    assert large.startswith("image_bytes: 'a.png': more bytes than")


@pytest.mark.parametrize("named", [False, True])
def test_an_unreadable_image_of_a_table_costs_its_row_where_another_file_of_its_folder_can_be_read(
    folder: Path, tmp_path: Path, named: bool
) -> None:
    place = tmp_path / "outside" if named else folder
    (place / "self.png").symlink_to("self.png")
    (place / "memory.png").symlink_to("/proc/self/mem")
    good = ["c.png" if named else "a.png"] * 8
    start, options = (f"{place}/", {"images_from": str(place)}) if named else ("", {})
    *_, loop, memory = read(
        table(folder / "x.csv", [start + name for name in (*good, "self.png", "memory.png")]), **options
    )
    assert loop.startswith("image_missing: ")
    assert loop.endswith("Too many levels of symbolic links")
    assert memory.endswith("memory.png': Invalid argument")
    only = table(folder / "x.csv", [f"{start}memory.png"])
    if named:  # nothing of that folder was read, so that its storage may be what fails
        with pytest.raises(OSError, match="Invalid argument"):
            read(only, **options)
    else:
        assert read(only)[0].startswith("image_missing: ")


def test_urls_are_read_from_public_addresses_and_from_those_that_are_named(
    downloads: tuple[str, Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://{downloads[0]}"
    path = table(tmp_path / "x.csv", [f"{url}/{name}" for name in ("whole", "whole?width=9", "none", "500")], "URL")
    found = read(path)
    assert {refusal.partition(":")[0] for refusal in found} == {"image_place"}
    assert found[0].endswith(f'127.0.0.1, an address that is not public; to allow it, set input.images_from: ["{url}"]')
    expected = ["0", "1", "image_missing: ", "image_missing: "]
    named = read(path, images_from=url)
    assert [item if item in "01" else item[:15] for item in named] == expected
    assert ("HTTP status 404" in named[2], "HTTP status 500" in named[3]) == (True, True)
    with monkeypatch.context() as patch:
        patch.setattr(web, "is_public_address", lambda address: True)
        assert [item if item in "01" else item[:15] for item in read(path)] == expected
        small = read(path, limits=Limits(image_bytes=100))
    assert small[0].endswith("more bytes than limits.image_bytes of 100")
    others = [f"{url}/away", f"{url}/near", f"{url}/loop", "ftp://x/y.png", "http://u:p@x/y.png"]
    away, near, loop, *refused = read(table(tmp_path / "x.csv", others), images_from=url)
    assert near == "1"
    assert loop.endswith("more than 5 redirects")
    assert [refusal.partition(":")[0] for refusal in (away, *refused)] == ["image_place"] * 3
    monkeypatch.setattr(places, "_FIRST_UNREACHABLE", 3)
    path = table(tmp_path / "x.csv", [f"http://127.0.0.1:1/{number}.png" for number in range(5)])
    with pytest.raises(ConnectionError, match=r"none of the first . images can be reached: ConnectionRefusedError"):
        read(path, images_from="http://127.0.0.1:1")


PRIVATE = "127.0.0.1 10.1.2.3 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 ::1 fe80::1%eth0 fd00::1"
INSIDE_IPV6 = "::ffff:10.0.0.1 64:ff9b::a00:1 2002:a00:1::"


def test_addresses_of_private_networks_are_not_public() -> None:
    assert all(map(is_public_address, ("8.8.8.8", "2606:4700::1111")))
    assert not [*filter(is_public_address, f"{PRIVATE} {INSIDE_IPV6}".split())]


SECONDS = 120.0  # for which the server goes on at most
OK = b"HTTP/1.1 200 OK\r\n"
WHOLE = OK + b"Content-Length: %d\r\n\r\n" % len(IMAGES[0]) + IMAGES[0]
CUT = OK + b"Content-Length: 1000\r\n\r\n123"
FOUND = b"HTTP/1.1 302 Found\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def answers(path: str, attempt: int) -> Iterable[bytes | float]:
    """What is sent for a path: bytes, and seconds to wait."""
    drip = itertools.chain.from_iterable((b"a", 0.02) for _ in itertools.count())
    return {
        "/whole": [WHOLE],
        "/chunks": [OK + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(IMAGES[0]), IMAGES[0], b"\r\n0\r\n\r\n"],
        "/unsized": [OK + b"\r\n" + IMAGES[0]],
        "/late-100": [CONTINUE * 3, WHOLE],
        "/cut": [CUT],
        "/cut-once": [CUT if attempt == 1 else WHOLE],
        "/cut-chunk": [OK + b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n123"],
        "/status": drip,
        "/header": itertools.chain([OK + b"X: "], drip),
        "/body": itertools.chain([OK + b"Content-Length: 1000000\r\n\r\n"], drip),
        "/continue": itertools.chain.from_iterable((CONTINUE, 0.02) for _ in itertools.count()),
        "/flood": itertools.repeat(CONTINUE * 1000),
        "/hop": [0.1, FOUND % b"/hop"],
        "/loop": [FOUND % b"/loop"],
        "/near": [FOUND % b"/whole"],
        "/away": [FOUND % b"http://localhost:1/whole"],  # at an address that the config does not name
        "/whole?width=9": [WHOLE],
        "/none": [b"HTTP/1.1 404 Not Found\r\n\r\n"],
        "/500": [b"HTTP/1.1 500 Internal Server Error\r\n\r\n"],
    }.get(path, [SECONDS])


@pytest.fixture(scope="module")
def downloads() -> Iterator[tuple[str, Counter[str]]]:
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


def fetched(downloads: tuple[str, Counter[str]], path: str, scheme: str = "http") -> bytes:
    return fetch(f"{scheme}://{downloads[0]}{path}", 2**20, lambda url: True)


def test_a_whole_image_is_returned_and_a_cut_one_asked_for_again_and_then_refused(
    downloads: tuple[str, Counter[str]],
) -> None:
    for path in ("/whole", "/chunks", "/unsized", "/late-100", "/cut-once"):
        assert fetched(downloads, path) == IMAGES[0]
    for path, message in (("/cut", "ended after 3 of 1,000 bytes"), ("/cut-chunk", "IncompleteRead")):
        with pytest.raises(Unreachable, match=message):
            fetched(downloads, path)
        assert downloads[1][path] == 2


def test_an_attempt_ends_at_its_deadline_and_an_endless_head_before_it(
    downloads: tuple[str, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_DEADLINE", 0.3)
    for path in ("/silent", "/status", "/header", "/body", "/continue", "/hop", "/tls"):
        start = time.monotonic()
        with pytest.raises((Unreachable, ImageRefusedByPlace)) as caught:
            fetched(downloads, "/silent" if path == "/tls" else path, "https" if path == "/tls" else "http")
        assert time.monotonic() - start < SECONDS
        assert isinstance(caught.value, Unreachable), "redirects within their number"
    monkeypatch.undo()
    with pytest.raises(Unreachable, match="more than 1,048,576 bytes precede the image"):
        fetched(downloads, "/flood")
