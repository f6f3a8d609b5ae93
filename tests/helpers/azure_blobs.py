"""The part of Azure's Blob service that adlfs needs, in memory: put, get, list, delete, and conditional puts.

It follows https://learn.microsoft.com/rest/api/storageservices. Signatures are not checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_ACCOUNT = "devstoreaccount1"
_KEY = "a2V5"


class _Handler(BaseHTTPRequestHandler):
    """Answers requests at /ACCOUNT/CONTAINER/BLOB; ``blobs`` of its server holds the content by CONTAINER/BLOB."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _parts(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        return unquote(url.path).removeprefix(f"/{_ACCOUNT}/"), query

    def _answer(self, status: int, body: bytes = b"", code: str = "", **headers: str) -> None:
        self.send_response(status)
        sent = {"Content-Length": str(len(body)), "x-ms-version": "2021-12-02", **headers}
        for name, value in {**sent, **({"x-ms-error-code": code} if code else {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_PUT(self) -> None:
        name, _ = self._parts()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock_of_puts:
            if self.headers.get("If-None-Match") == "*" and name in self.server.blobs:
                self._answer(409, code="BlobAlreadyExists")
                return
            self.server.blobs[name] = data
        self._answer(201, **_properties(data))

    def do_DELETE(self) -> None:
        found = self.server.blobs.pop(self._parts()[0], None)
        self._answer(202) if found is not None else self._answer(404, code="BlobNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name, query = self._parts()
        if query.get("restype") == "container":
            listing = self._list(name, query) if query.get("comp") == "list" else b""
            self._answer(200, listing, Content_Type="application/xml", **_properties(b""))
            return
        data = self.server.blobs.get(name)
        if data is None:
            self._answer(404, code="BlobNotFound")
            return
        headers = {"x-ms-blob-type": "BlockBlob", "Content-Type": "application/octet-stream", **_properties(data)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("x-ms-range", self.headers.get("Range", "")))
        if self.command == "HEAD":
            self._answer(200, **{**headers, "Content-Length": str(len(data))})
        elif asked is None:
            self._answer(200, data, **headers)
        elif int(asked[1]) >= len(data):
            self._answer(416, code="InvalidRange")
        else:
            end = min(int(asked[2] or len(data)), len(data) - 1)
            part = data[int(asked[1]) : end + 1]
            self._answer(206, part, Content_Range=f"bytes {asked[1]}-{end}/{len(data)}", **headers)

    def _list(self, container: str, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = sorted(blob.partition("/")[2] for blob in self.server.blobs if blob.startswith(f"{container}/"))
        folders: dict[str, None] = {}
        entries = []
        for name in (name for name in names if name.startswith(prefix)):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
                continue
            data = self.server.blobs[f"{container}/{name}"]
            inner = {**_properties(data), "Content-Length": str(len(data)), "BlobType": "BlockBlob"}
            properties = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in inner.items())
            entries.append(f"<Blob><Name>{escape(name)}</Name><Properties>{properties}</Properties></Blob>")
        entries += [f"<BlobPrefix><Name>{escape(name)}</Name></BlobPrefix>" for name in folders]
        return (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="{container}">'
            f"<Prefix>{escape(prefix)}</Prefix><Blobs>{''.join(entries)}</Blobs><NextMarker/></EnumerationResults>"
        ).encode()


def _properties(data: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"', "Last-Modified": formatdate(0, usegmt=True)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.blobs: dict[str, bytes] = {}
        self.lock_of_puts = Lock()


@contextlib.contextmanager
def azure_blobs() -> Iterator[str]:
    """Serve the storage until the block ends; yields a connection string. Every container exists."""
    with _Server() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{_ACCOUNT}"
        yield f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={url};"
        server.shutdown()
