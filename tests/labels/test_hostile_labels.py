"""Labels that cost much to read: a row group is read once, whether it is refused or fills the cache, and a plan reads
no values."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reinforce.config import parse_config
from reinforce.dataset.files.layer_file import LayerFile
from reinforce.engine.plan.plan import Plan, make_plan
from reinforce.engine.preflight.check_source import check_source
from reinforce.labels import rows
from reinforce.labels.interface import RowLabels, Wanted
from reinforce.labels.rows import open_labels
from reinforce.source.samples import Refusal
from schemas import Reason
from tests.helpers.data import picture, write_tar
from tests.labels.test_taking import publish, samples_of, taking

COUNT = 16


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Labels of 16 images in two row groups, and a copy of the images."""
    members = samples_of(range(COUNT))
    write_tar(tmp_path / "copy" / "0.tar", members)
    return Path(publish(tmp_path, members))


def plan_of(labels: Path) -> Plan:
    return make_plan(parse_config(taking(labels.parent, str(labels))))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Any, int]]:
    """How often each row group of a file was read."""
    counted: Counter[tuple[Any, int]] = Counter()
    read: Callable[..., pa.Table] = LayerFile.read_row_group

    def counting(self: LayerFile, number: int, *args: Any, **options: Any) -> pa.Table:
        counted[self._name, number] += 1
        return read(self, number, *args, **options)

    monkeypatch.setattr(LayerFile, "read_row_group", counting)
    return counted


def find(plan: Plan) -> tuple[list[RowLabels], dict[str, int]]:
    """The labels of the copy, in two batches."""
    stated = [{"uid": f"uid{n}", "url": f"https://example.org/{n}"} for n in range(COUNT)]
    wanted = [Wanted(f"own{n}", one, picture(n)) for n, one in enumerate(stated)]
    with contextlib.closing(open_labels(plan.config, plan.layers.values())) as reader:
        found = [one for part in (wanted[::2], wanted[1::2]) for [one] in reader.find(part)]
        return found, reader.counts


def rewrite(path: Path, column: str, values: pa.Array | None = None, rows: int = COUNT) -> None:
    """Write some ``rows`` of a file again, with other values of a column."""
    with pq.ParquetFile(path) as file:
        table, metadata = file.read(), file.metadata.metadata
    if values is not None:
        table = table.set_column(table.schema.get_field_index(column), pa.field(column, values.type), values)
    table = table.slice(0, rows).replace_schema_metadata(None)
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "store_schema": False}
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=8)
        writer.add_key_value_metadata(metadata)


def damage(path: Path, column: str) -> None:
    """Damage the pages of a column of text."""
    rewrite(path, column, rows=COUNT)
    metadata, content = pq.read_metadata(path), bytearray(path.read_bytes())
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        leaf = next(one for one in map(group.column, range(group.num_columns)) if one.path_in_schema == column)
        content[leaf.data_page_offset + leaf.total_compressed_size - 20] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("column", ["url", "caption"])
def test_a_refused_group_of_samples_is_read_once(labels: Path, reads: Counter[tuple[Any, int]], column: str) -> None:
    [path] = labels.glob("samples/*.parquet")
    damage(path, column)
    plan = plan_of(labels)
    reads.clear()
    found, counts = find(plan)
    assert sum(counts.values()) == COUNT
    assert [reads[("samples", path.stem), group] for group in range(2)] == [1, 1]
    values = [value for one in found for value in one.values.values()]
    broken = [isinstance(value, Refusal) and value.reason is Reason.REINFORCEMENT_BROKEN for value in values]
    assert all(broken) if column == "url" else any(broken)


def test_refused_row_groups_of_a_layer_are_read_once_and_cost_it(labels: Path, reads: Counter[tuple[Any, int]]) -> None:
    [path] = labels.glob("embeddings/red/images/*.parquet")
    rewrite(path, "embeddings", pa.array([np.zeros(1000, np.float16)] * COUNT))
    plan = plan_of(labels)
    reads.clear()
    found, counts = find(plan)
    assert counts == {"labels.lab.uid": COUNT}
    assert [reads[("embeddings/red/images", path.stem), group] for group in range(2)] == [1, 1]
    for one in found:
        assert "not every vector" in one.values["embeddings/red/images"].detail
        assert isinstance(one.values["embeddings/blue/images"], np.ndarray)


def test_row_groups_that_fill_the_cache_are_read_once_a_batch(
    labels: Path, reads: Counter[tuple[Any, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_CACHED_BYTES", 1)
    plan = plan_of(labels)
    reads.clear()
    find(plan)
    [stem] = (path.stem for path in labels.glob("samples/*.parquet"))
    layers = [name for name in plan.layers if name != "samples"]
    most = {name: max(count for (file, _), count in reads.items() if file == (name, stem)) for name in layers}
    assert most == dict.fromkeys(layers, 2)  # batches


def test_rows_that_a_file_lacks_are_broken_labels(labels: Path) -> None:
    [path] = labels.glob("samples/*.parquet")
    rewrite(path, "key", rows=5)
    _, counts = find(plan_of(labels))
    assert counts == {"labels.lab.uid": 5, "labels.lab.broken": 11}


#: Lives as long as the process: tables of this pool that are freed after it end the process.
DEFAULT = pa.default_memory_pool()
POOL = pa.proxy_memory_pool(DEFAULT)


def test_a_plan_reads_no_captions(labels: Path) -> None:
    for path, column, type_ in (
        (*labels.glob("samples/*.parquet"), "caption", pa.string()),
        (*labels.glob("captions/namer/*.parquet"), "captions", pa.list_(pa.string())),
    ):
        text = "x" * 10_000_000
        rewrite(path, column, pa.array([text if column == "caption" else [text] * 2] * COUNT, type_))
    plan = plan_of(labels)
    pa.set_memory_pool(POOL)
    try:
        _, notes = check_source(plan)
    finally:
        pa.set_memory_pool(DEFAULT)
    assert any(f"{COUNT} by uid" in note for note in notes)
    assert 0 < POOL.max_memory() < 5_000_000
