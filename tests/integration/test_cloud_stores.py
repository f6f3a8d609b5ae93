"""Google Cloud Storage and Azure Blob Storage: a dataset equals one on disk, is resumed, read and listed."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

import reinforce
from reinforce.dataset.store import Store
from reinforce.source.urls import filesystem
from tests.helpers.commands import run_command
from tests.helpers.data import config_of, members_of, tree, write_tar
from tests.helpers.reinforced import fresh_dataset
from tests.helpers.web import QuietHandler, serving

#: Azure's Blob service, as far as adlfs needs it, in memory: put, get, list, delete, and conditional puts.
#: It follows https://learn.microsoft.com/rest/api/storageservices. Signatures are not checked.
_ACCOUNT = "devstoreaccount1"
_KEY = "a2V5"


class _Azure(QuietHandler):
    """Answers requests at /ACCOUNT/CONTAINER/BLOB; ``blobs`` holds the content by CONTAINER/BLOB."""

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes]
    lock_of_puts = Lock()

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: object) -> None:
        super().answer(status, body, length, x_ms_version="2021-12-02", **headers)

    def _parts(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        return unquote(url.path).removeprefix(f"/{_ACCOUNT}/"), query

    def _fail(self, status: int, code: str) -> None:
        self.answer(status, x_ms_error_code=code)

    def do_PUT(self) -> None:
        name, _ = self._parts()
        data = self.read_body()
        with self.lock_of_puts:
            if self.headers.get("If-None-Match") == "*" and name in self.blobs:
                return self._fail(409, "BlobAlreadyExists")
            self.blobs[name] = data
        return self.answer(201, **_properties(data))

    def do_DELETE(self) -> None:
        found = self.blobs.pop(self._parts()[0], None)
        self.answer(202) if found is not None else self._fail(404, "BlobNotFound")

    def do_GET(self) -> None:
        name, query = self._parts()
        if query.get("restype") == "container":
            listing = self._list(name, query) if query.get("comp") == "list" else b""
            return self.answer(200, listing, Content_Type="application/xml", **_properties(b""))
        data = self.blobs.get(name)
        if data is None:
            return self._fail(404, "BlobNotFound")
        headers = {"x-ms-blob-type": "BlockBlob", "Content-Type": "application/octet-stream", **_properties(data)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("x-ms-range", self.headers.get("Range", "")))
        if asked is None or self.command == "HEAD":
            return self.answer(200, data, **headers)
        if int(asked[1]) >= len(data):
            return self._fail(416, "InvalidRange")
        end = min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {asked[1]}-{end}/{len(data)}"
        return self.answer(206, data[int(asked[1]) : end + 1], **headers)

    do_HEAD = do_GET

    def _list(self, container: str, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = sorted(blob.partition("/")[2] for blob in self.blobs if blob.startswith(f"{container}/"))
        folders: dict[str, None] = {}
        entries = []
        for name in (name for name in names if name.startswith(prefix)):
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
                continue
            data = self.blobs[f"{container}/{name}"]
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


@contextlib.contextmanager
def azure_blobs() -> Iterator[str]:
    """Serve the storage until the block ends; yields a connection string. Every container exists."""
    with serving(type("Bound", (_Azure,), {"blobs": {}})) as url:
        account = f"AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={url}/{_ACCOUNT}"
        yield f"DefaultEndpointsProtocol=http;{account};"


pytestmark = pytest.mark.slow


@pytest.fixture(params=["gs", "abfs"])
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "gs":
        driver = pytest.importorskip("gcsfs", reason="the extra gcs is not installed").GCSFileSystem
        emulator = pytest.importorskip("gcp_storage_emulator.server", reason="no emulator is installed")
        server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
        server.start()
        host, port = server._api._httpd.server_address
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        yield "gs://bucket"
        driver.clear_instance_cache()
        server.stop()
        return
    driver = pytest.importorskip("adlfs", reason="the extra azure is not installed").AzureBlobFileSystem
    with azure_blobs() as connection:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        yield "abfs://bucket"
        driver.clear_instance_cache()


def test_a_dataset_equals_one_on_disk_and_is_resumed(
    bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        tar = write_tar(tmp_path / "source" / f"{number}.tar", members_of(number, 4))
        fs, path = filesystem(f"{bucket}/source/{number}.tar")
        fs.put_file(str(tar), path)
    source = f"{bucket}/source/*.tar"
    config = config_of(source, tmp_path / "local", captioners={})
    fresh_dataset(config)
    remote = {**config, "output": f"{bucket}/out"}
    fresh_dataset({**remote, "teachers": {"red": config["teachers"]["red"]}})
    fresh_dataset(remote)
    assert reinforce.run(remote).message.startswith("nothing to do: 2 shards")
    names = [name.partition("bucket/out/")[2] for name in fs.find("bucket/out")]
    kept = [name for name in names if not name.startswith(("runs/", "index/"))]
    assert {name: fs.cat_file(f"bucket/out/{name}") for name in kept} == tree(tmp_path / "local")
    assert len(list(reinforce.open(f"{bucket}/out"))) == 8
    status, out, err = run_command(capfd, "status", f"{bucket}/out")
    assert (status, out.count("2/2")) == (0, 5), err
    status, out, err = run_command(capfd, "init", f"{bucket}/source", str(tmp_path / "my.yaml"))
    assert (status, "source: 2 shards (tar" in out) == (0, True), err


def test_a_file_is_created_once_and_can_be_replaced_and_removed(bucket: str) -> None:
    store = Store(f"{bucket}/out")
    store.check_writable()
    assert store.create(b"mine", "claim")
    if bucket.startswith("abfs"):  # the emulator of GCS ignores the condition
        assert not store.create(b"theirs", "claim")
    store.write_bytes(b"replaced", "claim")
    assert store.read_bytes("claim", limit=9) == b"replaced"
    store.remove("claim")
    with pytest.raises(FileNotFoundError):
        store.read_bytes("claim", limit=9)
    assert store.read_json("claim") is None
