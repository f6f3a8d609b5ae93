"""References to images are followed only into folders that the reader has named."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from reinforce.errors import UserError
from reinforce.source.references import ImageRoots, LostImage, images_or_losses, referenced_images
from reinforce.source.samples import DamagedTar
from tests.helpers.web import redirecting_server

KEY = 'images_from=["{}"]'


def reference(url: str, offset: int = 0, length: int = 5) -> dict[str, object]:
    return {"url": url, "offset": offset, "length": length}


def test_images_are_read_below_a_named_folder_or_from_a_named_file(tmp_path: Path) -> None:
    path = tmp_path / "tars" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(b"0123456789")
    references = [reference(str(path)), reference(str(path), 5)]
    for named in (str(tmp_path), f"{tmp_path}/tars/", f"file://{tmp_path}", str(path), os.path.relpath(tmp_path)):
        assert [*referenced_images(references, ImageRoots.named(named, KEY))] == [b"01234", b"56789"]
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(IsADirectoryError):  # opening it would block
        [*referenced_images([reference(f"{tmp_path}/0.tar")], ImageRoots.named(str(tmp_path), KEY))]


def test_the_error_names_what_to_add() -> None:
    message = r'reference to s3://bucket/dfn5b/0\.tar, .* add images_from=\["s3://bucket/dfn5b"\]\.$'
    for roots in ((), ("s3://bucket/dfn5",), ("s3://other",), ("s3://bucket/dfn5b/1.tar",)):
        with pytest.raises(UserError, match=message):
            ImageRoots.named(roots, KEY).check("s3://bucket/dfn5b/0.tar")
    assert ImageRoots.named("s3://bucket/dfn5b", KEY).check("s3://bucket/dfn5b/0.tar")


@pytest.mark.parametrize(
    "url",
    [
        "reference://::/etc/passwd",
        "reference://",
        "simplecache::s3://bucket/0.tar",
        "zip://a::s3://bucket/0.tar",
        "memory://bucket/0.tar",
        "ftp://bucket/0.tar",
        "S3://bucket/0.tar",
        "file:///etc/passwd",
        "s3://bucket/../other/0.tar",
        "s3://user:password@bucket/0.tar",
        "http://bucket/0.tar?command=1",
        "http://bucket/%2e%2e/0.tar",
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/0.tar",
        "/data/../etc/passwd",
        "~/.ssh/id_rsa",
        "relative.tar",
        "s3://bucket/\x1b[2J",
        "s3://bucket/" + "a" * 5000,
    ],
)
def test_a_url_that_no_run_writes_is_refused_also_where_its_folder_is_named(url: str) -> None:
    roots = ("/data", "/etc", "http://169.254.169.254", *(f"{one}://bucket" for one in ("s3", "http", "memory", "ftp")))
    with pytest.raises(UserError, match=r"which is not followed: ") as raised:
        ImageRoots.named(roots, KEY).check(url)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, 0), (0, -5), (0, 2**40), (2**62, 5)])
def test_impossible_ranges_are_refused_before_anything_is_read(tmp_path: Path, offset: int, length: int) -> None:
    with pytest.raises(UserError, match="bytes of an image are read"):
        [*referenced_images([reference(f"{tmp_path}/0.tar", offset, length)], ImageRoots.named(str(tmp_path), KEY))]


def test_no_folder_allows_everything_and_a_shard_of_the_own_source_itself_alone() -> None:
    for url in ("/", "s3://", "https:///", "simplecache::s3://bucket"):
        with pytest.raises(UserError, match="is no folder"):
            ImageRoots.named(url, KEY)
    roots = ImageRoots.of_shard("simplecache::memory://bucket/0.tar", 100)
    assert roots.check("memory://bucket/0.tar")
    with pytest.raises(UserError, match="is not followed"):
        roots.check("memory://bucket/1.tar")
    with pytest.raises(UserError, match="in no folder that you have allowed"):
        roots.check("s3://bucket/0.tar")


class _Short(MemoryFileSystem):
    """Sends three bytes less of each file than it lists."""

    protocol = "short"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return f"/{path.rpartition('/')[2]}"

    def _open(self, path: str, *args: Any, **options: Any) -> Any:
        whole = super()._open(path, *args, **options).getvalue()
        file = io.BytesIO(whole[:-3])
        file.size = len(whole)  # type: ignore[attr-defined]
        return file


def test_less_than_there_is_is_an_error_of_the_storage_and_not_of_the_file() -> None:
    fsspec.register_implementation("short", _Short, clobber=True)
    fsspec.filesystem("short").pipe_file("/0.tar", b"0123456789")
    with pytest.raises(OSError, match=r"short://0\.tar: the storage sent 2 of 5 bytes at 5"):
        [*images_or_losses([("short://0.tar", 0, 5), ("short://0.tar", 5, 5)], [None, None])]
    [beyond] = images_or_losses([("short://0.tar", 8, 5)], [None])
    assert isinstance(beyond, LostImage)


def test_a_web_server_cannot_redirect_a_reference() -> None:
    with redirecting_server() as (address, asked):
        with pytest.raises(UserError, match="in no folder that you have allowed"):
            [*referenced_images([reference(f"{address}/tars/0.tar")], ImageRoots())]
        assert asked == []
        with pytest.raises((DamagedTar, OSError, ValueError)):
            [*referenced_images([reference(f"{address}/tars/0.tar", 0, 9)], ImageRoots.named(f"{address}/tars", KEY))]
        assert "/secret" not in asked
