"""An object store with the shards of a large dataset, for s3fs: it answers each request after a given time.

Listings are computed, 1,000 names a page. Every shard has the files of one small dataset, so that hundreds of thousands
of shards take no memory. Objects that are written are kept in memory.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 1000
_HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'
_ENTRY = (
    "<Contents><Key>{}</Key><LastModified>2026-11-26T00:00:00.000Z</LastModified>"
    "<ETag>&quot;d41d8cd98f00b204e9800998ecf8427e&quot;</ETag><Size>{}</Size><StorageClass>STANDARD</StorageClass>"
    "</Contents>"
)


@dataclass(frozen=True)
class Content:
    """What the store holds in its bucket ``bucket``.

    ``shards`` are names in order, and ``done`` maps a layer to the number of them that it has, the first ones.
    ``files`` has the bytes of every file of a layer, ``objects`` single objects by key. ``root`` is the folder of the
    dataset and ``seconds`` the time that a request takes.
    """

    shards: Sequence[str]
    done: Mapping[str, int]
    files: Mapping[str, bytes] = field(default_factory=dict)
    objects: Mapping[str, bytes] = field(default_factory=dict)
    root: str = "data"
    seconds: float = 0.1


@contextlib.contextmanager
def serve(content: Content) -> Iterator[str]:
    """Serve the content from a process; yields its address. ``counts`` returns its requests."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(content, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()  # after SIGTERM, asyncio of Python 3.12 would wait for clients to close their connections
        process.join()


def counts(address: str) -> Counter[str]:
    """The requests so far, by kind, and the most that were in work at once (``at once``)."""
    import urllib.request

    with urllib.request.urlopen(f"{address}/-counts") as answer:  # noqa: S310 - the server above
        return Counter(json.load(answer))


def _serve(content: Content, parent: multiprocessing.connection.Connection) -> None:
    async def run() -> None:
        store = _Store(content)
        server = await asyncio.start_server(store.connected, "127.0.0.1", 0, limit=2**20)
        parent.send(server.sockets[0].getsockname()[1])
        async with server:
            await server.serve_forever()

    asyncio.run(run())


class _Store:
    def __init__(self, content: Content) -> None:
        self._content = content
        self._objects = dict(content.objects)
        self._shards = frozenset(content.shards)
        self._counts: Counter[str] = Counter()
        self._in_work = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while line := await reader.readline():
                method, target, _ = line.decode().split()
                headers = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                writer.write(await self._answer(method, target, headers, body))
                await writer.drain()
        writer.close()

    async def _answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> bytes:
        address = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        if address.path == "/-counts":
            return _response(200, json.dumps(self._counts).encode())
        key = unquote(address.path).lstrip("/").partition("/")[2]
        listing = method == "GET" and "list-type" in query
        self._counts["LIST" if listing else method] += 1
        self._in_work += 1
        self._counts["at once"] = max(self._counts["at once"], self._in_work)
        await asyncio.sleep(self._content.seconds)
        self._in_work -= 1
        if listing:
            return _response(200, self._list(query).encode())
        if method == "PUT":
            self._objects[key] = body
            return _response(200, b"")
        if method == "DELETE":
            self._objects.pop(key, None)
            return _response(204, b"")
        return self._get(key, headers, head=method == "HEAD")

    def _get(self, key: str, headers: Mapping[str, str], head: bool) -> bytes:
        data = self._find(key)
        if data is None:
            return _response(404, b"" if head else f"{_HEAD}<Error><Code>NoSuchKey</Code></Error>".encode())
        if not (wanted := headers.get("range", "").removeprefix("bytes=")):
            return _response(200, data, head=head)
        first, _, last = wanted.partition("-")
        start, stop = (int(first), int(last or len(data)) + 1) if first else (max(0, len(data) - int(last)), len(data))
        return _response(206, data[start:stop], f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}", head)

    def _find(self, key: str) -> bytes | None:
        if key in self._objects:
            return self._objects[key]
        folder, name = posixpath.split(key.removeprefix(f"{self._content.root}/"))
        return self._content.files.get(folder) if name.removesuffix(".parquet") in self._shards else None

    def _list(self, query: Mapping[str, str]) -> str:
        prefix = query.get("prefix", "")
        layer = prefix.removeprefix(f"{self._content.root}/").rstrip("/")
        folders: list[str] = []
        after = posixpath.basename(query.get("start-after", "")).removesuffix(".parquet")
        start = bisect.bisect_right(self._content.shards, after) if after else 0
        first, most = int(query.get("continuation-token", start)), min(PAGE, int(query.get("max-keys", PAGE)))
        if layer in self._content.done:
            total, size = self._content.done[layer], len(self._content.files.get(layer, b"")) or 1000
            names = self._content.shards[first : min(first + most, total)]
            found = [(f"{prefix}{name}.parquet", size) for name in names]
        else:
            matching = sorted(key for key in self._objects if key.startswith(prefix))
            deep = [key for key in matching if "/" in key[len(prefix) :]] if query.get("delimiter") else []
            folders = sorted({prefix + key[len(prefix) :].partition("/")[0] + "/" for key in deep})
            matching = [key for key in matching if key not in deep]
            total = len(matching)
            found = [(key, len(self._objects[key])) for key in matching[first : first + most]]
        more = first + len(found) < total
        prefixes = "".join(f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in folders)
        token = f"<NextContinuationToken>{first + len(found)}</NextContinuationToken>" if more else ""
        return (
            f'{_HEAD}<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>'
            f"<Prefix>{prefix}</Prefix><KeyCount>{len(found)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
            f"{''.join(_ENTRY.format(*entry) for entry in found)}{prefixes}</ListBucketResult>"
        )


def _response(status: int, body: bytes, content_range: str = "", head: bool = False) -> bytes:
    lines = [
        f"HTTP/1.1 {status} Status",
        f"Content-Length: {len(body)}",
        'ETag: "d41d8cd98f00b204e9800998ecf8427e"',
        "Last-Modified: Thu, 26 Nov 2026 00:00:00 GMT",
        "Accept-Ranges: bytes",
        *([f"Content-Range: {content_range}"] if content_range else []),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if head else body)
