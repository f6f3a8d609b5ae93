"""Layers read together: alignment by key and errors that name the file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from reinforce.dataset.files.store import Store
from reinforce.dataset.kinds.registry import KINDS
from reinforce.dataset.layers import Layer
from reinforce.dataset.reading.aligned import AlignedLayers, read_errors
from reinforce.errors import UserError

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.int64())])
GROUPS = [["a", "b"], ["c"]]


def write(store: Store, name: str, groups: list[list[str]], fingerprint: str = "f00d") -> None:
    with store.writer(Layer(name, KINDS["captions"], fingerprint), SCHEMA, "s", "s.tar") as writer:
        for keys in groups:
            writer.write(pa.table([keys, [len(name)] * len(keys)], schema=SCHEMA))
        writer.commit()


def open_(store: Store, **columns: list[str]) -> AlignedLayers:
    return AlignedLayers(store, {"samples": "f00d", "other": "f00d"}, columns)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path))
    write(store, "samples", GROUPS)
    return store


def test_every_layer_of_a_row_group_is_read(store: Store) -> None:
    write(store, "other", GROUPS)
    with open_(store).open("s") as shard:
        assert (shard.row_groups, shard.layers) == (2, ("samples", "other"))
        tables = [shard.read(number) for number in range(2)]
    assert [table["other"]["key"].to_pylist() for table in tables] == GROUPS
    assert [table["other"]["value"].to_pylist() for table in tables] == [[5, 5], [5]]
    assert [table["samples"]["value"].to_pylist() for table in tables] == [[7, 7], [7]]


@pytest.mark.parametrize("whole", [True, False])
def test_layers_of_a_row_group_are_read_on_request(store: Store, whole: bool) -> None:
    write(store, "other", [["a", "b"], ["changed"]])
    with open_(store, other=["key"]).open("s", whole=whole) as shard:
        group = shard.row_group(0)
        assert group.samples["key"].to_pylist() == ["a", "b"]
        assert group.read("samples") is group.samples
        assert group.read("other").column_names == ["key"]
        later = shard.row_group(1)
        with pytest.raises(UserError, match=r"other/s\.parquet does not have the keys of samples/s\.parquet"):
            later.read("other")


def test_another_number_of_row_groups_is_an_error(store: Store) -> None:
    write(store, "other", [["a", "b", "c"]])
    with pytest.raises(UserError, match=r"other/s\.parquet does not have the keys"), open_(store).open("s"):
        pass


def test_a_missing_file_and_another_fingerprint_are_errors(store: Store) -> None:
    with pytest.raises(UserError, match=r"other/s\.parquet is missing\. `reinforce run`"), open_(store).open("s"):
        pass
    write(store, "other", GROUPS, fingerprint="beef")
    with pytest.raises(UserError, match="has fingerprint beef, its layer has f00d"), open_(store).open("s"):
        pass


def test_any_error_of_a_reader_names_the_file_and_a_user_error_is_kept() -> None:
    with pytest.raises(UserError, match=r"^x\.parquet cannot be read \(ZeroDivisionError"), read_errors("x.parquet"):
        _ = 1 // 0
    with pytest.raises(UserError, match=r"^as it is$"), read_errors("x.parquet"):
        raise UserError("as it is")
