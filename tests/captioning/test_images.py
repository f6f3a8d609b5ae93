from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.captioning.images import read_images
from reinforce.captioning.pairs import ImageLocation
from teachers.weights import cache_folder
from tests.helpers.web import SECRET, redirecting_server


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))


def test_ranges_of_several_files_are_returned_in_the_given_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(f"0123456789{name}".encode())
    locations = [("b", 8, 3), ("a", 0, 2), ("b", 0, 1), ("a", 10, 1)]
    images = read_images([ImageLocation(f"{tmp_path}/{name}.tar", start, length) for name, start, length in locations])
    assert images == [b"89b", b"01", b"0", b"a"]


def test_images_of_parquet_files_are_read_from_a_local_copy(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    table = pa.table({"key": ["x", "y", "z"], "image": [b"first", b"second", b"third"]})
    pq.write_table(table, path, row_group_size=2)
    locations = [ImageLocation(str(path), offset, length) for offset, length in ((11, 5), (0, 5), (5, 6))]
    assert read_images(locations) == [b"third", b"first", b"second"]
    [copy] = (cache_folder() / "images").glob("*.bin")
    assert copy.read_bytes() == b"firstsecondthird"
    os.truncate(path, 0)  # not read again
    assert read_images(locations[:1]) == [b"third"]


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_images([ImageLocation(f"{tmp_path}/none.tar", 0, 1)])


def test_a_web_server_can_redirect_shards_of_the_config_but_no_reference() -> None:
    with redirecting_server() as (address, asked):
        own = ImageLocation(f"{address}/0.tar", 0, len(SECRET))
        assert read_images([own]) == [SECRET]
        assert "/secret" in asked
        asked.clear()
        read_images([own._replace(referenced=True)])
        assert {*asked} == {"/0.tar"}
