"""Listings of layers: what they contain, how many requests they take, and what stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.scale.object_store import Content, counts, serve
from reinforce.dataset.files import listing
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store

SHARDS = [f"{number:06d}-0123456789" for number in range(2500)]
DONE = {"samples": 2500, "captions/c": 1000, "embeddings/t/images": 0}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 endpoint at which every request takes 50 ms."""
    with serve(Content(SHARDS, DONE, seconds=0.05)) as address:
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield address
        fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_layers_in_s3_are_listed_side_by_side_with_a_request_for_a_thousand_names(address: str) -> None:
    found = Store("s3://bucket/data").listings(DONE)
    assert {layer: len(listing) for layer, listing in found.items()} == DONE
    assert list(found["captions/c"].items()) == [(shard, 1000) for shard in SHARDS[:1000]]
    assert counts(address)["LIST"] == 5
    assert counts(address)["at once"] == 3


def test_listings_of_s3_are_not_kept_by_the_driver_nor_parsed_by_botocore(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.parsers import BaseXMLResponseParser

    parsed: list[int] = []
    parse = BaseXMLResponseParser._parse_xml_string_to_dom

    def counting(self: Any, text: bytes) -> Any:
        parsed.append(len(text))
        return parse(self, text)

    monkeypatch.setattr(BaseXMLResponseParser, "_parse_xml_string_to_dom", counting)
    store = Store("s3://bucket/data")
    store.listings(DONE)
    assert not dict(store.fs.dircache), "s3fs keeps 1,250 bytes for each file"
    assert max(parsed) < 1000, "an answer with 1,000 names takes botocore 0.1 s of CPU"
    assert len(store.fs.call_s3("list_objects_v2", Bucket="bucket", Prefix="data/samples/")["Contents"]) == 1000


def test_objects_that_are_no_layer_files_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.parquet", "b c.parquet", "b.parquet", "c.txt", "d.parquet\ne.parquet"]
    pages = [(names, [1, 2, 3, 4, 5]), ([], []), (["f.parquet"], [6])]
    monkeypatch.setattr(listing, "_s3_pages", lambda *_: iter(pages))
    assert dict(listing._list_s3(None, "", ("", None))) == {"a": 1, "b": 3, "f": 6}
    assert dict(listing._list_s3(None, "", ("a.parquet", "b.parquet"))) == {"b": 3}


def test_a_listing_of_another_driver_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: dropped.append(path))
    store = Store("memory://listing-test")
    for shard in ("b", "a"):
        store.fs.pipe_file(store.layer_path("samples", shard), b"12345")
    assert dict(store.shards("samples")) == {"a": 5, "b": 5}
    assert dropped == [store.path("samples")]


def test_local_files_that_are_no_layer_files_are_not_listed(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    (folder / "folder.parquet").mkdir(parents=True)
    for name in ("b.parquet", "a.parquet", ".hidden.parquet", "a name.parquet", "c.txt"):
        (folder / name).write_bytes(b"123")
    assert list(Store(str(tmp_path)).shards("samples").items()) == [("a", 3), ("b", 3)]
    assert len(Store(str(tmp_path)).shards("captions/c")) == 0


def test_a_listing_is_a_mapping_and_answers_for_many_names() -> None:
    listing = Listing.of((name, size) for size, name in enumerate(("c", "a", "b")))
    assert listing == {"a": 1, "b": 2, "c": 0}
    assert ("b" in listing, "aa" in listing, "d" in listing, 1 in listing) == (True, False, False, False)
    assert (listing["c"], list(listing), list(listing.values()), listing.total_bytes) == (
        0,
        ["a", "b", "c"],
        [1, 2, 0],
        3,
    )
    with pytest.raises(KeyError):
        listing["bb"]
    assert listing.has(pa.array(["z", "a"])).tolist() == [False, True]
    assert listing.within(pa.array(["z", "a"])).tolist() == [True, False, False]
    assert listing.only(listing.within(pa.array(["c"]))) == {"c": 0}
    assert listing.sizes_of(["c", "a"]).tolist() == [0, 1]
    assert Listing.union([listing, Listing.of([("0", 1)]), Listing.of([])]).to_pylist() == ["0", "a", "b", "c"]
    assert listing.nbytes < 100


@pytest.mark.parametrize("known", [SHARDS, SHARDS[::-7], ["0", "zz"] * 5])
def test_a_listing_in_ranges_is_the_same_whatever_is_known(
    address: str, known: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_MIN_RANGE", 2)
    found = Store("s3://bucket/data").listings(DONE, Listing.of((name, 1) for name in known))
    assert {layer: list(one) for layer, one in found.items()} == {
        layer: SHARDS[:count] for layer, count in DONE.items()
    }
    assert counts(address)["LIST"] <= 5 + 3 * 4
    assert counts(address)["at once"] > 3
