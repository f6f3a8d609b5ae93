"""The examples of one stream of a dataset: read ahead, unusable rows, and damage that shows up when it is read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reinforce.errors import UserError
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.examples import Example
from reinforce.student.data.feed import StudentFeed
from reinforce.student.data.reader import DatasetReader, StreamedDataset
from reinforce.training.order import Chunk, Order
from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.reinforced import letters, reinforce_here, small_dataset

NO_CAPTION = ("00000003", "00000017")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 samples, two of them without a caption."""
    folder = tmp_path_factory.mktemp("dataset")
    dropped = {f"{key}.txt" for key in NO_CAPTION}
    emptied = {f"{key}.json" for key in NO_CAPTION}
    members = [(name, b"" if name in emptied else data) for name, data in members_of(0, 40) if name not in dropped]
    write_tar(folder / "0.tar", members)
    return reinforce_here(config_of(f"{folder}/0.tar", folder / "out", captioners={}))


@pytest.fixture
def dataset(url: str) -> StreamedDataset:
    return opened(url)


def opened(url: str, **data: Any) -> StreamedDataset:
    [dataset] = open_datasets(Data.model_validate({"datasets": url, **data}), 0, None)
    return dataset


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def order_of(dataset: StreamedDataset, window: int = 16) -> Order:
    return Order(dataset.groups[:, 2], 0, "d", 1, window)


def keys_in_order(dataset: StreamedDataset, order: Order, position: int, count: int) -> list[str]:
    """Keys by reading row groups one by one, with the unusable rows."""
    keys: list[str] = []
    for window in order.windows(0, position):
        rows = []
        for chunk in window.chunks:
            shard, place, _ = dataset.groups[chunk.group].tolist()
            with dataset.layers.open(dataset.shards[shard], whole=False) as layers:
                rows += layers.row_group(place).samples["key"].to_pylist()[chunk.first : chunk.stop]
        keys += [rows[row] for row in window.order[window.skip :]]
        if len(keys) >= count:
            return keys[:count]
    raise AssertionError


@pytest.mark.parametrize("position", [0, 7, 95])
def test_examples_come_in_the_order_and_unusable_rows_are_replaced(
    dataset: StreamedDataset, pool: ThreadPoolExecutor, position: int
) -> None:
    order = order_of(dataset)
    reader = DatasetReader(dataset, order, 0, position, pool)
    found = [example.key for example in itertools.islice(reader, 80)]
    expected = keys_in_order(dataset, order, position, 80)
    replaced = [(new, old) for new, old in zip(found, expected, strict=True) if new != old]
    assert {old for _, old in replaced} == set(NO_CAPTION)
    assert not {new for new, _ in replaced} & set(NO_CAPTION)
    assert reader.unusable["no caption"] >= 4


def test_at_most_a_window_and_a_row_group_are_read_ahead(dataset: StreamedDataset, pool: ThreadPoolExecutor) -> None:
    order = order_of(dataset)
    reader = DatasetReader(dataset, order, 0, 0, pool)
    largest = int(dataset.groups[:, 2].max())
    for _ in itertools.islice(reader, 100):
        assert 0 < reader._rows_held < order.window + largest


def test_a_window_without_a_usable_row_takes_one_from_later_epochs(
    dataset: StreamedDataset, pool: ThreadPoolExecutor
) -> None:
    order = Order(dataset.groups[:, 2], 0, "d", 40, 1)  # a stream has one row per epoch
    examples: list[Example] = []
    unusable = Counter[str]()
    for stream in range(40):
        reader = DatasetReader(dataset, order, stream, 0, pool)
        examples.append(next(iter(reader)))
        unusable.update(reader.unusable)
    assert unusable["no caption"] >= 2
    assert not {example.key for example in examples} & set(NO_CAPTION)


def test_a_file_that_changed_after_the_start_is_named(dataset: StreamedDataset) -> None:
    groups = dataset.groups.copy()
    groups[0, 2] += 1
    with pytest.raises(UserError, match=rf"samples/{dataset.shards[0]}\.parquet changed after the training started"):
        replace(dataset, groups=groups).load(Chunk(0, 0, 4), 0)


def feed_of(url: Path | str, **data: Any) -> StudentFeed:
    return StudentFeed(Data.model_validate({"datasets": str(url), "workers": 0, **data}), 0, 16, letters)


def read_epoch(feed: StudentFeed) -> None:
    for _ in itertools.islice(feed.batches(0, 1, 4, 0), feed.samples // 4):
        pass


def test_damage_inside_a_page_is_reported_when_it_is_read_also_by_a_loader_process(tmp_path: Path) -> None:
    dataset = Path(small_dataset(tmp_path))
    path = min((dataset / "captions/namer").glob("*.parquet"))
    data = bytearray(path.read_bytes())
    at = pq.read_metadata(path).row_group(1).column(1).data_page_offset
    data[at : at + 60] = b"\xff" * 60
    path.write_bytes(data)
    for workers in (0, 1):
        with pytest.raises(UserError, match=rf"^{path} cannot be read .*") as raised:
            read_epoch(feed_of(dataset, workers=workers))
        assert "Traceback" not in str(raised.value)


class TestReferences:
    """Images that stay in their tars."""

    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Path:
        return Path(small_dataset(tmp_path, (20,), images="reference"))

    def test_a_missing_tar_is_named(self, dataset: Path) -> None:
        tar = dataset.parent / "source" / "00000.tar"
        tar.rename(tar.with_suffix(".gone"))
        with pytest.raises(UserError, match=rf"stored by reference, and {tar} cannot be read: FileNotFoundError"):
            read_epoch(feed_of(dataset, images_from=str(dataset.parent / "source")))

    def test_changed_images_are_named_by_file_number_and_command(self, dataset: Path) -> None:
        tar = dataset.parent / "source" / "00000.tar"
        write_tar(tar, [(f"x{i}.png", picture(i, width=8, height=6)) for i in range(200)])
        with pytest.raises(UserError, match=rf"of \d+ images that were read .* {tar} .* drop {dataset} samples"):
            read_epoch(feed_of(dataset, images_from=str(dataset.parent / "source")))
