"""Layer files: committed whole or not at all, read back, listed, and read by ranges."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

import schemas
from benchmarks.scale.object_store import Content, counts, serve
from reinforce.config import Augmentations
from reinforce.dataset import store as listing
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layer_file import LayerFile, RefusedFile
from reinforce.dataset.layers import Layer
from reinforce.dataset.store import LayerWriter, Listing, RangeFile, Store, parse_footer
from reinforce.dataset.vectors import decode, encode
from reinforce.errors import StorageError, UserError
from reinforce.images.backends import sample_augmentation
from reinforce.images.records import to_records
from reinforce.source.parquet_file import WindowFile
from reinforce.source.urls import expand
from schemas import Reason
from tests.helpers.s3_proxy import Handler, Proxy, Request, Response, listening_on, refuse, s3_environment
from tests.hostile import parquet

LAYER = Layer("captions/c", KINDS["captions"], "f00d", needs=("samples",), model="c", count=1)


def table(*keys: str) -> pa.Table:
    return pa.table([list(keys), [[f"a {k}"] for k in keys]], schema=schemas.CAPTIONS_SCHEMA)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, and an object store."""
    return Store(str(tmp_path / "out") if request.param == "local" else f"memory://store-test{tmp_path}")


def test_a_committed_file_is_listed_and_records_its_origin_and_an_error_while_writing_leaves_none(
    store: Store, tmp_path: Path
) -> None:
    with LayerWriter(store, LAYER, schemas.CAPTIONS_SCHEMA, "s", "u") as writer:
        writer.write(table("a"))
        with pytest.raises(ValueError, match="schema"):
            writer.write(table("b").select(["key"]))
    assert store.shards("captions/c") == {}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with LayerWriter(store, LAYER, schemas.CAPTIONS_SCHEMA, "shard-1", "s3://b/1.tar") as writer:
        writer.write(table("a", "b"))
        writer.write(table("c"))
        assert store.shards("captions/c") == {}, "no file before the commit"
        writer.commit()
    assert store.shards("captions/c") == {"shard-1": writer.bytes}
    larger = writer.bytes + 9  # than the one that has replaced it since it was listed
    with store.open_layer("captions/c", "shard-1", "f00d", size=larger) as file:
        assert file.num_row_groups == 2
        assert file.read()["key"].to_pylist() == ["a", "b", "c"]
        assert parse_footer(file.metadata) == {
            "schema_version": "1", "layer": "captions/c", "fingerprint": "f00d", "source": "s3://b/1.tar", "rows": "3",
        }  # fmt: skip
    with store.fs.open(store.layer_path("captions/c", "shard-1")) as file:
        assert pq.read_schema(file).field("key").metadata[b"description"]


def test_the_content_of_a_local_file_reaches_the_disk_before_its_name_and_then_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves no torn file."""
    seen: list[int | str] = []
    replace, store = os.replace, Store(str(tmp_path))

    def publish(source: str, target: str) -> None:
        seen.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda number: seen.append(os.fstat(number).st_size))
    monkeypatch.setattr(os, "replace", publish)
    store.write_bytes(b"data", "a")
    with LayerWriter(store, LAYER, schemas.CAPTIONS_SCHEMA, "s", "u") as writer:
        writer.write(table("a"))
        writer.commit()
    assert (seen[:2], seen[3:5], len(seen)) == ([4, "a"], [writer.bytes, "s.parquet"], 6)


def column_bytes(store: Store, layer: Layer, written: pa.Table) -> dict[str, float]:
    """Bytes per row of each column, by its path in Parquet."""
    with LayerWriter(store, layer, written.schema, "s", "u") as writer:
        writer.write(written)
        writer.commit()
    with store.open_layer(layer.name, "s", layer.fingerprint) as file:
        assert file.read() == written
        group = file.metadata.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    return {column.path_in_schema: column.total_compressed_size / written.num_rows for column in columns}


def test_augmentation_records_and_captions_are_compressed(tmp_path: Path) -> None:
    policy, keys = Augmentations(count=10), [str(i) for i in range(200)]
    records = [to_records(sample_augmentation(policy, 0, key, i, 640, 480) for i in range(10)) for key in keys]
    rows = [
        {"key": key, "width": 640, "height": 480, "image": b"", "augmentations": augmentations}
        for key, augmentations in zip(keys, records, strict=True)
    ]
    samples = Layer("samples", KINDS["samples"], "f00d")
    sizes = column_bytes(Store(str(tmp_path)), samples, pa.Table.from_pylist(rows, schemas.samples_schema("embed")))
    record_bytes = sum(size for path, size in sizes.items() if path.startswith("augmentations.")) / 10
    assert record_bytes < 10, f"{record_bytes} bytes per record, which has 54 bytes of values"
    texts = [[f"a picture of a dog and {i} other animals by the sea" for i in range(5)] for _ in keys]
    sizes = column_bytes(Store(str(tmp_path)), LAYER, pa.table([keys, texts], schema=schemas.CAPTIONS_SCHEMA))
    assert sizes["captions.list.element"] < 50, "for 250 bytes of text"


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_a_component_of_a_vector_takes_the_bytes_of_its_type(tmp_path: Path, dtype: str, width: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(256, 3, 64)).astype(np.float32)
    schema = schemas.embeddings_schema(3, 64, dtype)
    columns = [[str(i) for i in range(256)], *encode(vectors, dtype, np.ones(256, bool))]
    layer = Layer("embeddings/t/images", KINDS["images"], "f00d", ("samples",), "t", count=3, dim=64, dtype=dtype)
    sizes = column_bytes(Store(str(tmp_path)), layer, pa.table(columns, schema=schema))
    assert sizes["embeddings.list.element"] == pytest.approx(3 * 64 * width, rel=0.06)
    assert sum(size for path, size in sizes.items() if path != "key") == pytest.approx(
        layer.kind.row_bytes(layer, 0), rel=0.05
    )


def read_vectors(store: Store) -> bytes:
    with store.open_layer("embeddings/t/images", "s", "f00d") as file:
        return decode(file.read(["key", "embeddings", "scales"])).tobytes() + decode(file.read()).tobytes()


def test_a_flipped_bit_in_a_footer_of_int8_vectors_is_refused_or_changes_no_value(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 2, 8)).astype(np.float32)
    columns = [[str(i) for i in range(6)], *encode(values, "int8", np.ones(6, bool))]
    layer = Layer("embeddings/t/images", KINDS["images"], "f00d", ("samples",), "t", count=2, dim=8, dtype="int8")
    store, written = Store(str(tmp_path)), pa.table(columns, schema=schemas.embeddings_schema(2, 8, "int8"))
    column_bytes(store, layer, written)
    path = Path(store.layer_path(layer.name, "s"))
    content, expected = path.read_bytes(), read_vectors(store)
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    refused = 0
    for place in range(footer, len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert read_vectors(store) == expected, f"byte {place - footer} of the footer"
        except (UserError, RefusedFile):
            refused += 1
    assert 100 < refused < len(content) - footer, "errors name the file; unused bytes change nothing"
    others = [
        (content.replace(name, b"S" + name[1:]), f"it has no column {name.decode()}")
        for name in (b"key", b"embeddings", b"scales")
    ]
    others += [
        (content.replace(b"key", b"a\x1by").replace(b"scales", b"scaleS"), "it has no column key, scales"),
        (parquet_of(pa.table({"key": ["a"], "value\x1b": [1]})), r"a column value\\x1b, which no layer has"),
        (parquet_of(written.drop_columns(["scales"])), "it has no column scales"),
        (parquet_of(written.drop_columns(["embeddings"])), None),
    ]
    for other, message in others:
        path.write_bytes(other)
        with pytest.raises(RefusedFile, match=message), store.open_layer(layer.name, "s") as file:
            file.read(["key", "embeddings"])


def parquet_of(written: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(written, buffer)
    return bytes(buffer.getvalue().to_pybytes())


def test_a_row_group_with_fewer_rows_in_the_footer_than_values_is_refused(tmp_path: Path) -> None:
    keys = parquet.Column([("key", parquet.REQUIRED)], [parquet.Page(parquet.text(b"a") + parquet.text(b"b"), 2)])
    (tmp_path / "captions/c").mkdir(parents=True)
    for rows, outcome in ((2, contextlib.nullcontext()), (1, pytest.raises(RefusedFile, match="2 values in 1 rows"))):
        (tmp_path / "captions/c/s.parquet").write_bytes(parquet.File([keys], rows).encoded())
        with outcome, Store(str(tmp_path)).open_layer("captions/c", "s") as file:
            assert file.read(["key"])["key"].to_pylist() == ["a", "b"]


def test_quarantine_rows_are_read_back_and_a_file_of_a_newer_schema_is_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.quarantine("samples", "s", [("k", Reason.IMAGE_BROKEN, "cut"), (None, Reason.SHARD_DAMAGED, "at byte 7")])
    rows = [
        {"key": "k", "reason": "image_broken", "detail": "cut"},
        {"key": None, "reason": "shard_damaged", "detail": "at byte 7"},
    ]
    assert store.quarantined("samples", "s") == rows
    listed = Listing.of([("removed", 9), ("s", 9)])
    assert [*store.quarantined_rows("samples", listed)] == [("removed", []), ("s", rows)], "by a run meanwhile"
    newer = table("a").replace_schema_metadata({"reinforce.schema_version": str(schemas.SCHEMA_VERSION + 1)})
    store.write_table(newer, "captions/c", "s.parquet")
    with pytest.raises(UserError, match="newer version"), store.open_layer("captions/c", "s"):
        pass


def test_the_end_of_a_file_and_keys_that_are_read_again_are_requested_once_and_a_pipe_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranges: list[tuple[int, int]] = []
    cat_file = LocalFileSystem.cat_file

    def recorded(self: Any, path: str, start: int, end: int) -> bytes:
        ranges.append((start, end))
        return bytes(cat_file(self, path, start, end))

    monkeypatch.setattr(LocalFileSystem, "cat_file", recorded)
    keys, path = [os.urandom(32).hex() for _ in range(4000)], tmp_path / "s.parquet"
    pq.write_table(table(*keys), path, row_group_size=2000, use_dictionary=False)
    size = path.stat().st_size
    for fs in (LocalFileSystem(), None):
        file = LayerFile(RangeFile(fs, str(path), size), size)
        assert file.stored_keys(0, 2**20) != file.stored_keys(1, 2**20)
        assert file.read_row_group(1, ["key"])["key"].to_pylist() == keys[2000:]
        assert file.stored_keys(0, 2**20) is not None
    starts = [file.metadata.row_group(group).column(0).data_page_offset for group in (0, 1)]
    assert [start for start, _ in ranges] == [size - 2**16, *starts, starts[0]], "only the last range is kept"
    ranges.clear()
    pq.write_table(table("a", "b"), path)
    size = path.stat().st_size
    small = LayerFile(RangeFile(LocalFileSystem(), str(path), size), size)
    assert small.read_row_group(0, ["key"])["key"].to_pylist() == ["a", "b"]
    assert ranges == [(0, size)], "the end is all of it"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Illegal seek"):
        RangeFile(None, str(tmp_path / "pipe"), 200).read(9)


SHARDS = [f"{number:06d}-0123456789" for number in range(2500)]
DONE = {"samples": 2500, "captions/c": 1000, "embeddings/t/images": 0}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 endpoint at which every request takes 50 ms."""
    with serve(Content(SHARDS, DONE, seconds=0.05)) as address:
        for name, value in s3_environment(address).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield address
        fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.parametrize("names_no_page", [False, True], ids=["expired token", "lost token"])
def test_a_listing_whose_continuation_token_does_not_work_starts_again(
    address: str, monkeypatch: pytest.MonkeyPatch, names_no_page: bool
) -> None:
    if names_no_page:
        pytest.importorskip("s3fs", "2026.9", reason="earlier versions take a page without a token for the last one")

    def without_token(handler: Handler, request: Request) -> None:
        answer = handler.forward(request)
        body = re.sub(b"<NextContinuationToken>.*</NextContinuationToken>", b"", answer.body)
        kept = [(name, value) for name, value in answer.headers if name.lower() != "content-length"]
        handler.send(Response(answer.status, [*kept, ("Content-Length", str(len(body)))], body))

    proxy = Proxy(0, listening_on(int(address.rpartition(":")[2])))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    expired = refuse(400, "InvalidArgument", "The continuation token provided is incorrect")
    fault = without_token if names_no_page else expired
    with contextlib.closing(proxy):
        with proxy.inject(fault, lambda r: r.is_list and "continuation-token" in r.query, 1) as affected:
            assert list(Store("s3://bucket/data").listings(DONE)["samples"]) == SHARDS
        assert affected
        with proxy.inject(fault, lambda r: r.is_list and "continuation-token" in r.query, 1) as affected:
            assert len(expand("s3://bucket/data/samples/*.parquet")) == len(SHARDS)
        assert affected
        with proxy.inject(fault, lambda r: r.is_list and "continuation-token" in r.query) as affected:
            for read in (lambda store: store.listings(DONE), lambda store: store.names("samples")):
                with pytest.raises(StorageError, match="cannot be listed: OSError"):
                    read(Store("s3://bucket/data"))
            Store("s3://bucket/data").fs.invalidate_cache()
            with pytest.raises(UserError, match=r"samples/\*\.parquet: cannot be listed"):
                expand("s3://bucket/data/samples/*.parquet")
        assert affected


def test_listings_of_s3_are_made_side_by_side_and_not_kept_by_the_driver_nor_parsed_by_botocore(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.parsers import BaseXMLResponseParser

    store, parse = Store("s3://bucket/data"), BaseXMLResponseParser._parse_xml_string_to_dom
    with mock.patch.object(
        BaseXMLResponseParser, "_parse_xml_string_to_dom", autospec=True, side_effect=parse
    ) as parsing:
        found = store.listings(DONE)
    assert {layer: len(listing) for layer, listing in found.items()} == DONE
    assert list(found["captions/c"].items()) == [(shard, 1000) for shard in SHARDS[:1000]]
    assert (counts(address)["LIST"], counts(address)["at once"]) == (5, 3), "a request for a thousand names"
    assert not dict(store.fs.dircache), "s3fs keeps 1,250 bytes for each file"
    longest = max(len(call.args[1]) for call in parsing.call_args_list)
    assert longest < 1000, "an answer with 1,000 names takes botocore 0.1 s of CPU"
    assert len(store.fs.call_s3("list_objects_v2", Bucket="bucket", Prefix="data/samples/")["Contents"]) == 1000


def test_objects_that_are_no_layer_files_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.parquet", "b c.parquet", "b.parquet", "c.txt", "d.parquet\ne.parquet"]
    pages = [(names, [1, 2, 3, 4, 5]), ([], []), (["f.parquet"], [6])]
    monkeypatch.setattr(listing, "_s3_pages", lambda *_: iter(pages))
    assert dict(listing._list_s3(None, "", ("", None))) == {"a": 1, "b": 3, "f": 6}
    assert dict(listing._list_s3(None, "", ("a.parquet", "b.parquet"))) == {"b": 3}


def test_local_files_that_are_no_layer_files_are_not_listed_and_listings_of_other_drivers_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda self, path=None: dropped.append(path))
    memory, local = Store("memory://listing-test"), Store(str(tmp_path))
    (tmp_path / "samples" / "folder.parquet").mkdir(parents=True)
    for name in ("b.parquet", "a.parquet", ".hidden.parquet", "a name.parquet", "c.txt"):
        for store in (memory, local):
            store.fs.pipe_file(store.path("samples", name), b"123")
    for store in (memory, local):
        assert list(store.shards("samples").items()) == [("a", 3), ("b", 3)]
    assert dropped == [memory.path("samples")]
    assert len(local.shards("captions/c")) == 0
    found = [*os.scandir(tmp_path / "samples")]
    (tmp_path / "samples/a.parquet").unlink()
    monkeypatch.setattr(os, "scandir", lambda _: contextlib.nullcontext(found))
    assert local.shards("samples") == {"b": 3}, "another process removes one while they are listed"


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


def test_a_listing_in_ranges_is_the_same_whatever_is_known(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_MIN_RANGE", 2)
    for times, known in enumerate((SHARDS, SHARDS[::-7], ["0", "zz"] * 5), start=1):
        found = Store("s3://bucket/data").listings(DONE, Listing.of((name, 1) for name in known))
        assert {layer: list(one) for layer, one in found.items()} == {
            layer: SHARDS[:count] for layer, count in DONE.items()
        }
        assert counts(address)["LIST"] <= times * (5 + 3 * 4)
        assert counts(address)["at once"] > 3


def test_rows_are_decoded_by_the_thread_that_reads_them_so_that_none_outlives_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of Arrow may still hold bytes of a file when Python ends, which aborts the program (status 134)."""
    seen: list[int] = []
    read = WindowFile.read

    def recorded(self: WindowFile, count: int = -1) -> Any:
        seen.append(threading.get_ident())
        return read(self, count)

    monkeypatch.setattr(WindowFile, "read", recorded)
    path = tmp_path / "s.parquet"
    pq.write_table(table(*map(str, range(4000))), path, row_group_size=1000, use_dictionary=False)
    size = path.stat().st_size
    assert LayerFile(RangeFile(LocalFileSystem(), str(path), size), size).read().num_rows == 4000
    assert {*seen} == {threading.get_ident()}
    assert len(seen) >= 8, "of each column of each row group"
