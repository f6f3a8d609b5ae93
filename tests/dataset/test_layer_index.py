"""The index of a layer: written by runs, merged, and never more than a cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from reinforce.dataset.files import index as layer_index
from reinforce.dataset.files.index import FileEntry, IndexWriter, prune_index, read_index, write_index
from reinforce.dataset.files.listing import Listing
from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.dataset.manifest.manifest import read_manifest
from reinforce.errors import StorageError
from tests.helpers.reinforced import small_dataset

LAYERS = {
    SAMPLES: Layer(SAMPLES, KINDS["samples"], "f0"),
    "embeddings/a/images": Layer("embeddings/a/images", KINDS["images"], "f1"),
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def write(store: Store, **files: FileEntry) -> None:
    writer = IndexWriter(store, LAYERS)
    for shard, entry in files.items():
        writer.add(shard, {SAMPLES: entry})
    writer.flush()


def test_a_run_writes_the_size_and_rows_of_each_committed_file(tmp_path: Path) -> None:
    store = Store(small_dataset(tmp_path, (9, 3)))
    for layer, entry in read_manifest(store)["layers"].items():
        index = read_index(store, layer, entry["fingerprint"])
        assert dict(index.listing().items()) == store.shards(layer)
        assert index.table["rows"].to_pylist() == [9, 3]
        groups = index.table["groups"].to_pylist()
        assert groups == ([[8, 1], [3]] if layer == SAMPLES else [None, None])


def test_entries_of_several_runs_are_merged_in_order_and_the_last_one_counts(store: Store) -> None:
    write(store, c=FileEntry(30, (3,)), a=FileEntry(10, (1, 2)))
    write(store, b=FileEntry(20, (2,)), c=FileEntry(31, (4,)))
    index = read_index(store, SAMPLES, "f0")
    stored = [(row["shard"], row["size"]) for row in index.table.to_pylist()]
    assert stored == [("a", 10), ("b", 20), ("c", 31)]
    assert index.table["rows"].to_pylist() == [3, 2, 4]
    assert index.differing(Listing.of([("a", 10), ("b", 19), ("d", 5)])) == ["b"]
    found = {shard: rows.tolist() for shard, rows in index.groups({"a": 10, "b": 19, "c": 31})}
    assert found == {"a": [1, 2], "c": [4]}


def test_an_index_that_is_missing_damaged_or_of_another_layer_counts_as_empty(store: Store) -> None:
    assert not read_index(store, SAMPLES, "f0").table.num_rows
    write(store, a=FileEntry(10, (1,)))
    assert not read_index(store, SAMPLES, "f1").table.num_rows, "another fingerprint"
    path = Path(store.path("index", "samples.parquet"))
    path.rename(path.with_name("captions--a.parquet"))
    assert not read_index(store, "captions/a", "f0").table.num_rows, "another layer"
    path.write_bytes(b"PAR1 no")
    assert not read_index(store, SAMPLES, "f0").table.num_rows
    write(store, a=FileEntry(10, (1,)))
    assert read_index(store, SAMPLES, "f0").table.num_rows == 1, "it is replaced"


def test_an_index_with_names_that_no_shard_has_counts_as_empty(store: Store) -> None:
    write(store, **{"a": FileEntry(10, (1,)), "\x1b[31m": FileEntry(10, (1,))})
    assert not read_index(store, SAMPLES, "f0").table.num_rows


def test_row_counts_that_no_file_can_have_are_not_used(store: Store) -> None:
    write(store, a=FileEntry(10, (-5,)), b=FileEntry(10, (2**30,)), c=FileEntry(10, (7,)))
    index = read_index(store, SAMPLES, "f0")
    assert [shard for shard, _ in index.groups({"a": 10, "b": 10, "c": 10})] == ["c"]


def test_an_index_of_many_files_is_read_in_parts(store: Store) -> None:
    files = {f"{n:06d}": FileEntry(n, (n % 7, 1)) for n in range(20_000)}
    write(store, **files)
    index = read_index(store, SAMPLES, "f0")
    assert dict(index.listing().items()) == {name: entry.size for name, entry in files.items()}
    groups = dict(index.groups({name: entry.size for name, entry in files.items()}))
    assert {name: tuple(rows.tolist()) for name, rows in groups.items()} == {n: e.groups for n, e in files.items()}


def test_files_that_were_deleted_are_removed_from_the_index(store: Store) -> None:
    write(store, a=FileEntry(10, (1,)), b=FileEntry(20, (2,)), c=FileEntry(30, (3,)))
    assert prune_index(store, SAMPLES, "f0", Listing.of([("a", 10)]), ["c"]) == ["b"]
    assert dict(read_index(store, SAMPLES, "f0").listing().items()) == {"a": 10, "c": 30}
    before = Path(store.path("index", "samples.parquet")).stat().st_mtime_ns
    prune_index(store, SAMPLES, "f0", Listing.of([("a", 10), ("c", 30)]), [])
    assert Path(store.path("index", "samples.parquet")).stat().st_mtime_ns == before, "nothing to write"


def test_a_reader_without_the_right_to_read_the_index_has_none_and_a_writer_replaces_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, a=FileEntry(10, (1,)))
    monkeypatch.setattr(Store, "read_bytes", _raise)
    assert not read_index(store, SAMPLES, "f0").table.num_rows
    with pytest.raises(StorageError):
        write(store, b=FileEntry(20, (2,)))
    with pytest.raises(StorageError):
        prune_index(store, SAMPLES, "f0", Listing.of([]), [])


def test_an_error_of_the_storage_is_raised_and_nothing_is_lost(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, a=FileEntry(10, (1,)))
    writer = IndexWriter(store, LAYERS)
    writer.add("b", {SAMPLES: FileEntry(20, (2,)), "embeddings/a/images": FileEntry(5, (2,))})
    with monkeypatch.context() as patch:
        patch.setattr(layer_index, "write_index", _raise)
        with pytest.raises(StorageError):
            writer.flush()
        patch.setattr(layer_index, "_WRITE_SECONDS", -1.0)
        writer.flush_when_due()
    writer.flush()
    assert dict(read_index(store, SAMPLES, "f0").listing().items()) == {"a": 10, "b": 20}
    assert dict(read_index(store, "embeddings/a/images", "f1").listing().items()) == {"b": 5}
    writer.flush()
    write_index(store, SAMPLES, "f0", read_index(store, SAMPLES, "f0"))


def _raise(*_: object, **__: object) -> None:
    raise StorageError("the storage is away")
