"""Layer files that were changed after they were committed, and the index by which they are found."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.dataset import index as layer_index
from reinforce.dataset.index import FileEntry, IndexWriter, find_damaged, prune_index, read_index
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import SAMPLES, Layer
from reinforce.dataset.manifest import read_manifest
from reinforce.dataset.status import read_status
from reinforce.dataset.store import Listing, Store
from reinforce.dataset.validate import validate
from reinforce.engine.plan.plan import make_plan
from reinforce.errors import StorageError, UserError
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.stream import DatasetReader
from reinforce.training.order import Order
from tests.helpers.data import tree
from tests.helpers.reinforced import config_for as config
from tests.helpers.reinforced import flip, reinforce_here

IMAGES = "embeddings/red/images"


def file_of(dataset: Path, layer: str, number: int = 0) -> Path:
    return sorted((dataset / layer).glob("*.parquet"))[number]


def damaged(dataset: Path) -> list[str]:
    store = Store(str(dataset))
    layers = read_manifest(store)["layers"]
    found = find_damaged(
        store, {name: store.shards(name) for name in layers}, {n: e["fingerprint"] for n, e in layers.items()}
    )
    return [f"{one.layer}/{one.shard}.parquet" for one in found]


@pytest.mark.parametrize(
    ("layer", "size"), [("samples", 0), ("samples", 4000), (IMAGES, 7), (IMAGES, -1), ("captions/namer", -1)]
)
def test_a_file_that_was_cut_is_missing_in_plan_status_open_and_training(
    made: Path, dataset: Path, layer: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of(dataset, layer)
    name, before = f"{layer}/{path.name}", tree(dataset)
    path.write_bytes(path.read_bytes()[: min(size, path.stat().st_size - 1)])
    fix = f"reinforce drop {dataset} {layer} --shard {path.stem} --yes"

    plan = make_plan(parse_config(config(made, dataset)))
    assert [(shard.name, shard.layers) for shard in plan.pending] == [(path.stem, (layer,))]
    status = read_status(str(dataset))
    assert (status["layers"][layer]["shards"], [one.line().split(":")[0] for one in status["damaged"]]) == (1, [name])
    with caplog.at_level(logging.WARNING):
        assert len(reinforce.open(str(dataset))) == 3
    assert fix in caplog.text
    assert f"{name}: it is" in caplog.text
    for read in (
        lambda: reinforce.open(str(dataset), strict=True),
        lambda: open_datasets(Data.model_validate({"datasets": [str(dataset)]}), 0, None),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert name in str(caught.value)
        assert fix in str(caught.value)

    reinforce_here(config(made, dataset))
    assert tree(dataset) == before
    [kept] = (dataset / "set-aside" / layer).iterdir()
    assert kept.name.startswith(f"{path.stem}.")
    assert len(reinforce.open(str(dataset), strict=True)) == 12


def test_a_dataset_without_an_index_and_checksums_is_complete_and_empty_files_are_still_found(
    made: Path, dataset: Path
) -> None:
    shutil.rmtree(dataset / "index")
    for path in [*dataset.glob("samples/*.parquet"), *dataset.glob("embeddings/**/*.parquet")]:
        table = pq.ParquetFile(path)
        with pq.ParquetWriter(path.with_suffix(".new"), table.schema_arrow, compression="none") as writer:
            for number in range(table.num_row_groups):
                writer.write_table(table.read_row_group(number))
        path.with_suffix(".new").replace(path)
    assert len(list(reinforce.open(str(dataset)))) == 12
    assert validate(str(dataset)).valid
    assert not damaged(dataset)
    assert not make_plan(parse_config(config(made, dataset))).pending
    path = file_of(dataset, IMAGES, 1)
    path.write_bytes(b"")
    assert damaged(dataset) == [f"{IMAGES}/{path.name}"]


def test_a_complete_file_of_another_size_counts_as_it_is(dataset: Path) -> None:
    path = file_of(dataset, IMAGES)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\0" * 64 + content[4:-8])  # a footer that points elsewhere
    assert damaged(dataset) == [f"{IMAGES}/{path.name}"]
    path.write_bytes(content)
    file = pq.ParquetFile(path)
    metadata = file.schema_arrow.metadata
    table = pq.read_table(path).replace_schema_metadata({**metadata, b"reinforce.rows": b"9"})
    pq.write_table(table, path, compression="none", row_group_size=8)
    assert path.stat().st_size != len(content)
    assert not damaged(dataset)


def test_a_damaged_file_of_a_shard_outside_the_source_stays_where_it_is(made: Path, dataset: Path) -> None:
    path = file_of(dataset, IMAGES, 1)
    path.write_bytes(b"PAR1PAR1")
    one = {**config(made, dataset), "source": f"{made.parent}/source/00000.tar"}
    plan = make_plan(parse_config(one))
    assert ([file.shard for file in plan.damaged], plan.recomputed) == ([path.stem], [])
    reinforce_here(one)
    assert path.read_bytes() == b"PAR1PAR1"


@pytest.mark.parametrize("how", ["gone", "emptied"])
def test_samples_that_are_lost_are_counted_where_no_other_layer_is_read(
    made: Path, dataset: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = file_of(dataset, "samples")
    path.write_bytes(b"") if how == "emptied" else path.unlink()
    with caplog.at_level(logging.WARNING):
        assert len(reinforce.open(str(dataset), teachers=[], captioners=[])) == 3
    assert f"1 of 2 shards are read, because samples lacks 1 of 2 shards ({path.stem})" in caplog.text
    if how == "gone":
        assert read_status(str(dataset))["lost"] == f"samples lacks 1 of 2 shards ({path.stem})"
    plain = Data.model_validate({"datasets": [str(dataset)], "captioners": {}})
    with pytest.raises(UserError, match="samples lacks 1 of 2 shards" if how == "gone" else "1 file is damaged"):
        open_datasets(plain, 0, {})
    reinforce_here(config(made, dataset))
    assert len(reinforce.open(str(dataset), teachers=[], captioners=[], strict=True)) == 12
    assert read_status(str(dataset))["lost"] == ""


def test_a_shard_that_was_removed_from_all_layers_is_named_and_forgotten_by_the_next_run(
    made: Path, dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = file_of(dataset, "samples", 1).name
    for path in dataset.rglob(name):
        path.unlink()
    with pytest.raises(UserError, match="samples lacks 1 of 2 shards"):
        reinforce.open(str(dataset), strict=True)
    one = {**config(made, dataset), "source": f"{made.parent}/source/00000.tar"}
    with caplog.at_level(logging.WARNING):
        assert reinforce.run(one).run is None, "nothing is computed"
    assert f"the samples of 1 shard, such as {Path(name).stem}, were deleted" in caplog.text
    assert len(reinforce.open(str(dataset), strict=True)) == 9


@pytest.mark.parametrize(("layer", "column"), [("samples", "image"), (IMAGES, "embeddings")])
def test_a_flipped_byte_is_named_by_every_reader_with_the_command_that_mends_it(
    dataset: Path, layer: str, column: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(dataset, layer)
    flip(path, column)
    fix = f"reinforce drop {dataset} {layer} --shard {path.stem} --yes"

    def train() -> None:
        [opened] = open_datasets(Data.model_validate({"datasets": [str(dataset)]}), 0, None)
        with ThreadPoolExecutor(1) as pool:
            next(iter(DatasetReader(opened, Order(opened.groups[:, 2], 0, "d", 1, 16), 0, 0, pool)))

    for read in (lambda: list(reinforce.open(str(dataset))), train):
        with pytest.raises(UserError) as caught:
            read()
        for part in (str(path), "a page does not have its checksum", fix):
            assert part in str(caught.value)


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


def test_entries_of_several_runs_are_merged_in_order_and_those_that_were_deleted_are_removed(store: Store) -> None:
    write(store, c=FileEntry(30, (3,)), a=FileEntry(10, (1, 2)))
    write(store, b=FileEntry(20, (2,)), c=FileEntry(31, (4,)))
    index = read_index(store, SAMPLES, "f0")
    stored = [(row["shard"], row["size"]) for row in index.table.to_pylist()]
    assert stored == [("a", 10), ("b", 20), ("c", 31)], "the last entry counts"
    assert index.table["rows"].to_pylist() == [3, 2, 4]
    assert index.differing(Listing.of([("a", 10), ("b", 19), ("d", 5)])) == ["b"]
    found = {shard: rows.tolist() for shard, rows in index.groups({"a": 10, "b": 19, "c": 31})}
    assert found == {"a": [1, 2], "c": [4]}
    assert prune_index(store, SAMPLES, "f0", Listing.of([("a", 10)]), ["c"]) == ["b"]
    assert dict(read_index(store, SAMPLES, "f0").listing().items()) == {"a": 10, "c": 31}
    before = Path(store.path("index", "samples.parquet")).stat().st_mtime_ns
    prune_index(store, SAMPLES, "f0", Listing.of([("a", 10), ("c", 31)]), [])
    assert Path(store.path("index", "samples.parquet")).stat().st_mtime_ns == before, "nothing to write"


def test_an_index_that_is_missing_damaged_or_of_another_layer_counts_as_empty(store: Store) -> None:
    def rows(layer: str = SAMPLES, fingerprint: str = "f0") -> int:
        return int(read_index(store, layer, fingerprint).table.num_rows)

    assert not rows()
    write(store, a=FileEntry(10, (1,)))
    assert not rows(fingerprint="f1"), "another fingerprint"
    path = Path(store.path("index", "samples.parquet"))
    path.rename(path.with_name("captions--a.parquet"))
    assert not rows("captions/a"), "another layer"
    path.write_bytes(b"PAR1 no")
    assert not rows()
    write(store, a=FileEntry(10, (-5,)), b=FileEntry(10, (2**30,)), c=FileEntry(10, (7,)))
    assert rows() == 3, "it is replaced"
    found = read_index(store, SAMPLES, "f0").groups({"a": 10, "b": 10, "c": 10})
    assert [shard for shard, _ in found] == ["c"], "no file can have the other row counts"
    write(store, **{"\x1b[31m": FileEntry(10, (1,))})
    assert not rows(), "no shard has this name"


def test_an_index_of_many_files_is_read_in_parts(store: Store) -> None:
    files = {f"{n:06d}": FileEntry(n, (n % 7, 1)) for n in range(20_000)}
    write(store, **files)
    index = read_index(store, SAMPLES, "f0")
    assert dict(index.listing().items()) == {name: entry.size for name, entry in files.items()}
    groups = dict(index.groups({name: entry.size for name, entry in files.items()}))
    assert {name: tuple(rows.tolist()) for name, rows in groups.items()} == {n: e.groups for n, e in files.items()}


def test_an_error_of_the_storage_hides_the_index_from_readers_and_loses_nothing_of_writers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, a=FileEntry(10, (1,)))
    with monkeypatch.context() as patch:
        patch.setattr(Store, "read_bytes", _raise)
        assert not read_index(store, SAMPLES, "f0").table.num_rows
        with pytest.raises(StorageError):
            write(store, b=FileEntry(20, (2,)))
        with pytest.raises(StorageError):
            prune_index(store, SAMPLES, "f0", Listing.of([]), [])
    writer = IndexWriter(store, LAYERS)
    writer.add("b", {SAMPLES: FileEntry(20, (2,)), "embeddings/a/images": FileEntry(5, (2,))})
    with monkeypatch.context() as patch:
        patch.setattr(layer_index, "write_index", _raise)
        with pytest.raises(StorageError):
            writer.flush()
        patch.setattr(writer, "seconds", -1.0)
        writer.flush_when_due()
    writer.flush()
    assert dict(read_index(store, SAMPLES, "f0").listing().items()) == {"a": 10, "b": 20}
    assert dict(read_index(store, "embeddings/a/images", "f1").listing().items()) == {"b": 5}


def _raise(*_: object, **__: object) -> None:
    raise StorageError("the storage is away")
