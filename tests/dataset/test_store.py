"""Layer files: committed whole or not at all, and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import schemas
from reinforce.config import Augmentations
from reinforce.dataset.augment.records import sample_augmentation, to_records
from reinforce.dataset.files.store import Store, parse_footer
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer, SampleBytes
from reinforce.dataset.vectors import encode
from reinforce.errors import UserError
from schemas import Reason

LAYER = Layer("captions/c", KINDS["captions"], "f00d", needs=("samples",), model="c", count=1)


def table(*keys: str) -> pa.Table:
    return pa.table([list(keys), [[f"a {k}"] for k in keys]], schema=schemas.captions_schema())


@pytest.mark.parametrize("url", ["local", "memory://store-test/dataset"])
def test_a_committed_file_is_listed_and_records_its_origin(tmp_path: Path, url: str) -> None:
    store = Store(str(tmp_path / "out") if url == "local" else url)
    assert store.shards("captions/c") == {}
    with store.writer(LAYER, schemas.captions_schema(), "shard-1", "s3://b/1.tar") as writer:
        writer.write(table("a", "b"))
        writer.write(table("c"))
        assert store.shards("captions/c") == {}, "no file before the commit"
        writer.commit()
    assert store.shards("captions/c") == {"shard-1": writer.bytes}
    with store.open_layer("captions/c", "shard-1", "f00d") as file:
        assert file.num_row_groups == 2
        assert file.read()["key"].to_pylist() == ["a", "b", "c"]
        assert parse_footer(file.metadata) == {
            "schema_version": "1", "layer": "captions/c", "fingerprint": "f00d", "source": "s3://b/1.tar", "rows": "3",
        }  # fmt: skip
    with store.fs.open(store.layer_path("captions/c", "shard-1")) as file:
        assert pq.read_schema(file).field("key").metadata[b"description"]


@pytest.mark.parametrize("url", ["local", "memory://store-test/dropped"])
def test_an_error_while_writing_leaves_no_file(tmp_path: Path, url: str) -> None:
    store = Store(str(tmp_path / "out") if url == "local" else url)

    def write() -> None:
        with store.writer(LAYER, schemas.captions_schema(), "s", "u") as writer:
            writer.write(table("a"))
            writer.write(table("b").select(["key"]))

    with pytest.raises(ValueError, match="schema"):
        write()
    assert store.shards("captions/c") == {}
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def column_bytes(store: Store, layer: Layer, written: pa.Table) -> dict[str, float]:
    """Bytes per row of each column, by its path in Parquet."""
    with store.writer(layer, written.schema, "s", "u") as writer:
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
    sizes = column_bytes(Store(str(tmp_path)), LAYER, pa.table([keys, texts], schema=schemas.captions_schema()))
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
        layer.kind.row_bytes(layer, SampleBytes(0, 0, 0)), rel=0.05
    )


def test_another_fingerprint_is_an_error_that_names_both(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with store.writer(LAYER, schemas.captions_schema(), "s", "u") as writer:
        writer.commit()
    with pytest.raises(UserError, match=r"f00d.*beef"), store.open_layer("captions/c", "s", "beef"):
        pass


def test_a_file_of_a_newer_schema_is_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / "captions" / "c").mkdir(parents=True)
    newer = table("a").replace_schema_metadata({"reinforce.schema_version": str(schemas.SCHEMA_VERSION + 1)})
    pq.write_table(newer, tmp_path / "captions" / "c" / "s.parquet")
    with pytest.raises(UserError, match="newer version"), store.open_layer("captions/c", "s"):
        pass


def test_quarantine_rows_are_read_back(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.quarantine("samples", "s", [("k", Reason.IMAGE_BROKEN, "cut"), (None, Reason.SHARD_DAMAGED, "at byte 7")])
    assert store.quarantined("samples", "s") == [
        {"key": "k", "reason": "image_broken", "detail": "cut"},
        {"key": None, "reason": "shard_damaged", "detail": "at byte 7"},
    ]
