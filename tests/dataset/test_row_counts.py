"""Row counts from footers and from the node's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reinforce.dataset.files.store import Store
from reinforce.dataset.layers import SAMPLES
from reinforce.dataset.manifest.manifest import read_manifest
from reinforce.dataset.reading import row_counts
from reinforce.dataset.reading.row_counts import row_group_table
from reinforce.errors import UserError
from tests.helpers.reinforced import small_dataset

TABLE = [[0, 0, 8], [0, 1, 8], [0, 2, 5], [1, 0, 8], [1, 1, 1], [2, 0, 8], [2, 1, 6]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of 21, 9 and 14 samples in row groups of 8."""
    return small_dataset(tmp_path_factory.mktemp("dataset"), captioners={}, teachers={})


@pytest.fixture
def indexed(original: str, tmp_path: Path) -> Store:
    return Store(str(shutil.copytree(original, tmp_path / "copy")))


@pytest.fixture
def store(indexed: Store) -> Store:
    """A dataset of an earlier version, without an index."""
    shutil.rmtree(indexed.path("index"))
    return indexed


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Datasets of two shards and more use this cache."""
    monkeypatch.setattr(row_counts, "_CACHE_FROM", 2)
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


def read_table(store: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[list[int]]]:
    """The number of footers that were read, and the table."""
    footers: list[str] = []
    check = row_counts.check_footer
    fingerprint = read_manifest(store)["layers"][SAMPLES]["fingerprint"]
    with monkeypatch.context() as patch:
        patch.setattr(row_counts, "check_footer", lambda path, *rest: (footers.append(path), check(path, *rest)))
        table = row_group_table(store, fingerprint, dict(sorted(store.shards(SAMPLES).items())))
    return len(footers), table.tolist()


def test_row_groups_are_counted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_table(store, monkeypatch) == (3, TABLE)
    assert read_table(store, monkeypatch) == (3, TABLE), "a small dataset is not cached"
    assert row_group_table(store, "", {}).tolist() == []


def test_footers_are_read_once_per_node_and_again_for_changed_files(
    store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_table(store, monkeypatch) == (3, TABLE)
    assert read_table(store, monkeypatch) == (0, TABLE)
    path = store.layer_path(SAMPLES, sorted(store.shards(SAMPLES))[1])
    pq.write_table(pq.read_table(path), path, row_group_size=8, compression="none")
    assert read_table(store, monkeypatch) == (1, TABLE)


def test_a_broken_cache_is_replaced(store: Store, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_table(store, monkeypatch)
    [path] = cache.iterdir()
    path.write_bytes(b"PAR1 no")
    assert read_table(store, monkeypatch) == (3, TABLE)
    assert read_table(store, monkeypatch) == (0, TABLE)


def test_the_index_replaces_footers(indexed: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_table(indexed, monkeypatch) == (0, TABLE)
    path = indexed.layer_path(SAMPLES, sorted(indexed.shards(SAMPLES))[1])
    pq.write_table(pq.read_table(path), path, row_group_size=8, compression="none")
    assert read_table(indexed, monkeypatch) == (1, TABLE), "a file of another size"
    Path(indexed.path("index", "samples.parquet")).write_bytes(b"PAR1 no")
    assert read_table(indexed, monkeypatch) == (3, TABLE), "a damaged index"


def test_footers_longer_than_the_tail_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_counts, "TAIL_BYTES", 100)
    assert read_table(store, monkeypatch) == (3, TABLE)


def test_a_damaged_file_and_another_fingerprint_are_named(store: Store) -> None:
    shards = store.shards(SAMPLES)
    first = min(shards)
    with pytest.raises(UserError, match=rf"samples/{first}\.parquet has fingerprint .*, its layer has beef"):
        row_group_table(store, "beef", {first: shards[first]})
    Path(store.layer_path(SAMPLES, first)).write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match=rf"samples/{first}\.parquet cannot be read .* set it aside by reinforce drop "):
        row_group_table(store, "beef", {first: 8})
