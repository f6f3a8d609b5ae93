"""Images over HTTP from the addresses that a table names: public ones only, bounded in bytes, time and redirects.

A table may be untrusted, and its URLs must not reach services of this machine or its network, such as those that give
out a cloud's credentials. The address that a name resolves to is checked, and the connection goes to that address, so
that a name cannot resolve to another one in between.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from reinforce.processes.attempts import DOWNLOADS
from reinforce.source.config import Input
from reinforce.source.references import MAX_URL_CHARS, ImageRoots
from reinforce.source.samples import Item, RawSample, Refusal, UnreadSample, make_sample
from reinforce.source.urls import FileReader, UnreadableFile, canonical, read_ahead
from schemas import Reason

_TIMEOUT = 10.0  # seconds without an answer
_DEADLINE = 60.0  # seconds for an image, from the first connection to the last byte
_MAX_HEAD_BYTES = 2**20  # of all that precedes the body, such as interim answers of status 100
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 2**16
_tls = functools.cache(ssl.create_default_context)
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {"User-Agent": "dataset-reinforcement", "Accept": "image/*,*/*;q=0.5"}
_EMBEDDED = ipaddress.ip_network("64:ff9b::/96")  # addresses that stand for IPv4 ones behind a gateway


class ImageRefusedByPlace(Exception):
    """There is no image at a URL, or it is not read from there; with the reason of quarantine."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class Unreachable(Exception):
    """A server does not answer, or answers with an error of its own."""


def fetch(url: str, limit: int, private: Callable[[str], bool]) -> bytes:
    """Return what is at an http or https URL. ``private`` returns whether a URL may have any address.

    Raises ImageRefusedByPlace, also for more than ``limit`` bytes, and Unreachable after two attempts, each of which
    ends after a minute whatever is sent. Names are resolved in the time that the system allows.
    """
    faults = (OSError, http.client.HTTPException, Unreachable)
    try:
        return DOWNLOADS.call(lambda: _follow(url, limit, private), lambda error: isinstance(error, faults))
    except faults as error:
        raise Unreachable(f"{type(error).__name__}: {error}") from error


def _follow(url: str, limit: int, private: Callable[[str], bool]) -> bytes:
    end = time.monotonic() + _DEADLINE
    for _ in range(_MAX_REDIRECTS + 1):
        found = _get(url, limit, private(url), end)
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise ImageRefusedByPlace(Reason.IMAGE_MISSING, f"more than {_MAX_REDIRECTS} redirects")


def _get(url: str, limit: int, private: bool, end: float) -> bytes | str:
    """The content at a URL, or the URL that it redirects to. ``end`` is a time of the monotonic clock."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ImageRefusedByPlace(Reason.IMAGE_PLACE, f"no valid URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise ImageRefusedByPlace(Reason.IMAGE_PLACE, "only http and https URLs without a user are read")
    connection = _connect(host, port, parts.scheme == "https", private, end)
    try:
        target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers=_HEADERS)
        with http.client.HTTPResponse(connection.sock, method="GET") as answer:
            answer.fp.close()
            timed = _TimedBytes(connection.sock, end)
            answer.fp = io.BufferedReader(timed)
            answer.begin()
            timed.head_left = None
            if answer.status in _REDIRECTS:
                return answer.headers.get("Location") or ""
            if answer.status >= 500 or answer.status == 429:
                raise Unreachable(f"HTTP status {answer.status}")
            if answer.status != 200:
                raise ImageRefusedByPlace(Reason.IMAGE_MISSING, f"HTTP status {answer.status}")
            data = bytearray()
            while part := answer.read1(_CHUNK_BYTES):
                data += part
                if len(data) > limit:
                    raise ImageRefusedByPlace(Reason.IMAGE_BYTES, f"more bytes than limits.image_bytes of {limit}")
            if answer.length:  # what Content-Length announced and did not come; http.client raises for chunks alone
                raise Unreachable(f"the answer ended after {len(data):,} of {len(data) + answer.length:,} bytes")
            return bytes(data)
    finally:
        connection.close()


class _TimedBytes(io.RawIOBase):
    """The bytes of a socket, each of which must come before ``end``; at most ``head_left``, if that is not None."""

    def __init__(self, sock: socket.socket, end: float) -> None:
        self._sock, self._end = sock, end
        self._file = sock.makefile("rb", buffering=0)
        self.head_left: int | None = _MAX_HEAD_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_seconds_left(self._end))
        count = self._file.readinto(buffer)
        if self.head_left is not None and count:
            self.head_left -= count
            if self.head_left < 0:
                raise Unreachable(f"more than {_MAX_HEAD_BYTES:,} bytes precede the image")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _seconds_left(end: float) -> float:
    """Timeout of the next operation of a socket. Raises Unreachable where the deadline is over."""
    left = end - time.monotonic()
    if left <= 0:
        raise Unreachable(f"not read after {_DEADLINE:.0f} seconds")
    return min(_TIMEOUT, left)


def _connect(host: str, port: int | None, secure: bool, private: bool, end: float) -> http.client.HTTPConnection:
    """A connection to the address that was checked."""
    place = f"http{'s' * secure}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}"
    port = port or (443 if secure else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise ImageRefusedByPlace(Reason.IMAGE_PLACE, f"no valid host: {error}") from error
    addresses = [str(entry[4][0]) for entry in found]
    if not private and (others := [address for address in addresses if not is_public_address(address)]):
        named = "" if host == others[0] else f"{host[:200]} is "
        detail = (
            f'{named}{others[0]}, an address that is not public; to allow it, set input.images_from: ["{place[:200]}"]'
        )
        raise ImageRefusedByPlace(Reason.IMAGE_PLACE, detail)
    connection = http.client.HTTPConnection(host, port)
    raw = socket.create_connection((addresses[0], port), timeout=_seconds_left(end))
    raw.settimeout(_seconds_left(end))  # for the handshake and the request
    connection.sock = _tls().wrap_socket(raw, server_hostname=host) if secure else raw
    return connection


def is_public_address(address: str) -> bool:
    """Whether an IP address belongs to no private, local or reserved network, also inside an IPv6 address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in _EMBEDDED:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public_address(str(inner))
    return found.is_global and not found.is_multicast


_FIRST_UNREACHABLE = 20  # unreachable images at the start of a shard after which the shard fails
_NOT_IN_PLACES = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_WEB = ("http://", "https://")


class Places:
    """Reads images at the places that a table names; ``table`` is the URL of a file in its folder.

    Paths are relative to the folder of the table and stay in it; what is not there is looked for in the folders that
    ``input.images_from`` names. Everything else is read only where it is in one of these, except http and https URLs of
    public addresses.
    """

    def __init__(self, table: str, spec: Input) -> None:
        self._limits = spec.limits
        self.folder = table.rpartition("/")[0]
        self._roots = ImageRoots.named(spec.images_from or (), 'input.images_from: ["{}"]')
        files = {root: FileReader(tuple) for root in self._roots.urls}
        self._files = {self.folder: FileReader(lambda: [table]), **files}
        self._reached = self._unreachable = 0

    def samples(self, items: Iterable[Item]) -> Iterator[RawSample | Refusal]:
        """Yield the items in order, those at places with their images, which are read ahead in threads.

        Raises the storage's errors, and ConnectionError if none of the first images can be reached.
        """
        return read_ahead(self._read, items, self.folder)

    def resolve(self, location: str) -> str:
        """The URL of a place. Raises ImageRefusedByPlace."""
        if len(location) > MAX_URL_CHARS or _NOT_IN_PLACES.search(location) or "::" in location:
            raise ImageRefusedByPlace(Reason.IMAGE_PLACE, "it is no plain path or URL")
        if location.lower().startswith(_WEB):
            return location
        parts = location.split("/")
        if "://" not in location and not location.startswith(("/", "~")) and ".." not in parts and "\\" not in location:
            return f"{self.folder}/{'/'.join(part for part in parts if part not in ('', '.'))}"
        url = location if "://" in location or location.startswith("/") else f"{self.folder}/{location}"
        url = canonical(url)
        if ".." in url.split("/") or not self._roots.holds(url):
            raise ImageRefusedByPlace(
                Reason.IMAGE_PLACE, "it is not in the folder of the table; allow it in input.images_from"
            )
        return url

    def _read(self, item: Item) -> RawSample | Refusal:
        if not isinstance(item, UnreadSample):
            return item
        location, places = item.location, []
        try:
            url = self.resolve(location)
            places.append(url)
            inside = url.startswith(f"{self.folder}/") and "://" not in location and not location.startswith("/")
            if inside and ".." not in location.split("/"):
                places += [f"{root}{url.removeprefix(self.folder)}" for root in self._roots.urls]
            return make_sample(item, self._content(url), self._limits, url)
        except ImageRefusedByPlace as error:
            refused = error
        if refused.reason is Reason.IMAGE_MISSING:
            for url in places[1:]:
                with contextlib.suppress(ImageRefusedByPlace):
                    return make_sample(item, self._content(url), self._limits, url)
        return Refusal(item.key, refused.reason, f"{location[:500]!r}: {refused.detail}")

    def _content(self, url: str) -> bytes:
        limit = self._limits.image_bytes
        if url.lower().startswith(_WEB):
            try:
                data = fetch(url, limit, self._is_allowed)
            except Unreachable as error:
                self._unreachable += 1
                if not self._reached and self._unreachable >= _FIRST_UNREACHABLE:
                    raise ConnectionError(
                        f"none of the first {self._unreachable} images can be reached: {error}"
                    ) from error
                raise ImageRefusedByPlace(Reason.IMAGE_MISSING, str(error)[:500]) from error
            self._reached += 1
            return data
        files = next(files for root, files in self._files.items() if url == root or url.startswith(f"{root}/"))
        try:
            data = files.read(url, limit)
        except UnreadableFile as error:
            raise ImageRefusedByPlace(Reason.IMAGE_MISSING, str(error)) from error
        if len(data) > limit:
            raise ImageRefusedByPlace(Reason.IMAGE_BYTES, f"more bytes than limits.image_bytes of {limit}")
        return data

    def _is_allowed(self, url: str) -> bool:
        """Whether the config names the folder of a URL, as one of images or by the table in it."""
        place = canonical(url)
        return ".." not in place.split("/") and (self._roots.holds(place) or place.startswith(f"{self.folder}/"))
