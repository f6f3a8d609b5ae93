"""One stream of a dataset, the stream of a rank, and how many processes read them."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from reinforce.dataset.aligned import AlignedShard, RowGroup
from reinforce.dataset.sample import KeptGroups
from reinforce.errors import UserError
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.feed import Streams, StudentFeed, plan_reading
from reinforce.student.data.stream import (
    BatchPart,
    DatasetReader,
    PartMaker,
    RankStream,
    StreamedDataset,
    StreamPlan,
    StreamReader,
    make_orders,
)
from reinforce.training.order import GroupChunk, Order
from tests.helpers.data import config_of, members_of, picture, write_tar
from tests.helpers.in_loaders import letters, unchanged
from tests.helpers.reinforced import reinforce_here, small_dataset

NO_CAPTION = ("00000003", "00000017")


def with_nulls(folder: Path, count: int, without: Sequence[str]) -> str:
    """A dataset of ``count`` samples in row groups of eight, some of them without a caption."""
    dropped, emptied = {f"{key}.txt" for key in without}, {f"{key}.json" for key in without}
    members = [(name, b"" if name in emptied else data) for name, data in members_of(0, count) if name not in dropped]
    write_tar(folder / "0.tar", members)
    return reinforce_here(config_of(f"{folder}/0.tar", folder / "out", captioners={}))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 samples, two of them without a caption."""
    return with_nulls(tmp_path_factory.mktemp("dataset"), 40, NO_CAPTION)


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


def test_at_most_a_window_or_an_epoch_of_the_stream_and_a_row_group_are_read_ahead(
    dataset: StreamedDataset, pool: ThreadPoolExecutor
) -> None:
    for streams, window in ((1, 16), (4, 4096), (16, 4096)):
        order = Order(dataset.groups[:, 2], 0, "d", streams, window)
        reader = DatasetReader(dataset, order, 0, 0, pool)
        assert reader._rows_held == len(next(order.windows(0)).order), "the first window is not delayed by later ones"
        most = min(window, 40 // streams + 1) + int(dataset.groups[:, 2].max())
        for _ in itertools.islice(reader, 100):
            assert 0 < reader._rows_held < most


@pytest.mark.parametrize("streams", [1, 4, 16])
def test_streams_of_a_small_dataset_do_not_each_read_the_row_groups_that_they_share(
    url: str, monkeypatch: pytest.MonkeyPatch, streams: int
) -> None:
    read, row_group = [], AlignedShard.row_group

    def noting(shard: AlignedShard, number: int) -> RowGroup:
        read.append(number)
        return row_group(shard, number)

    feed = feed_of(url, streams=streams, captions="none")  # two batches of 20 rows
    monkeypatch.setattr(AlignedShard, "row_group", noting)
    batches = feed.batches(0, 1, 20, 0)
    keys = [next(batches)["key"]]
    assert 5 <= len(read) <= 10, "an epoch and what is read ahead, of 5 row groups of 8 rows"
    keys += [next(batches)["key"] for _ in range(7)]
    assert len(read) <= 25, "four epochs and what is read ahead"
    batches.close()
    monkeypatch.setattr("reinforce.dataset.sample._KEPT_BYTES", 1)
    again = feed_of(url, streams=streams, captions="none").batches(0, 1, 20, 3)
    assert [next(again)["key"] for _ in range(5)] == keys[3:], "whatever is kept"


def test_the_row_groups_that_were_used_last_are_kept_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reinforce.dataset.sample._KEPT_BYTES", 20_000)
    read, kept = [], KeptGroups()

    def get(place: int) -> None:
        def reading() -> dict[str, pa.Table]:
            read.append(place)
            return {"samples": pa.table({"key": np.zeros(1000)})}  # 8,000 bytes

        kept.get(("shard", place), reading)

    for place in (0, 1, 0, 2, 0, 1):
        get(place)
    assert read == [0, 1, 2, 1], "1 made room for 2"

    def fail() -> dict[str, pa.Table]:
        raise UserError("damaged")

    for _ in range(2):
        with pytest.raises(UserError, match="damaged"):
            kept.get(("shard", 3), fail)
    get(3)
    assert read[4:] == [3], "a group that could not be read is read again"
    assert pickle.loads(pickle.dumps(kept))._groups == {}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 samples, half of them without a caption: the first two row groups, and more than every third of the rest."""
    lacking = [n for n in range(64) if n < 16 or n % 3 == 0]
    return with_nulls(tmp_path_factory.mktemp("half"), 64, [f"{n:08d}" for n in lacking])


@pytest.fixture
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat datasets as those of which unusable rows are not found before they are read."""
    monkeypatch.setattr("reinforce.student.data.datasets.COUNTED_SHARDS", 0)


@pytest.mark.parametrize(("streams", "batch"), [(1, 16), (2, 16), (4, 8), (8, 32), (4, 20), (3, 7)])
def test_unusable_rows_are_left_out_and_no_batch_has_an_example_twice(half: str, streams: int, batch: int) -> None:
    feed, steps = feed_of(half, streams=streams), 32 // batch
    assert feed.samples == feed.rows == 32
    batches = [taken["key"] for taken in itertools.islice(feed.batches(0, 1, batch, 0), 20 * steps)]
    for epoch in range(20):
        keys = [key for one in batches[epoch * steps : (epoch + 1) * steps] for key in one]
        assert len(set(keys)) == len(keys) == batch * steps
    assert len({key for one in batches for key in one}) == 32
    again = feed_of(half, streams=streams).batches(0, 1, batch, 5)
    assert [next(again)["key"] for _ in range(5)] == batches[5:10]


def test_a_batch_of_more_rows_than_can_be_used_is_noted(half: str) -> None:
    feed = feed_of(half)
    assert feed.set_up(2, 16, 1).notes == ()
    notes = feed.set_up(2, 17, 1).notes
    assert notes == ("a batch of 34 has samples more than once: 32 can be used. Lower train.batch.",)


def test_ranks_share_the_usable_rows_of_a_batch(half: str) -> None:
    readers = [feed_of(half, streams=4).batches(rank, 2, 14, 0) for rank in range(2)]
    for _ in range(10):
        assert len({key for reader in readers for key in next(reader)["key"]}) == 28


@pytest.mark.usefixtures("many_shards")
@pytest.mark.parametrize(("streams", "batch"), [(1, 16), (2, 16), (4, 8)])
def test_a_batch_has_no_example_twice_although_half_of_the_rows_are_null(half: str, streams: int, batch: int) -> None:
    steps = 4 * 64 // batch
    batches = [
        taken["key"]
        for taken in itertools.islice(feed_of(half, streams=streams, window=32).batches(0, 1, batch, 0), steps)
    ]
    assert [keys for keys in batches if len(set(keys)) < batch] == []
    counts = Counter(key for keys in batches for key in keys)
    assert len(counts) == 32
    assert max(counts.values()) <= 12, "about twice in each of four epochs"


def test_windows_without_a_usable_row_take_distinct_ones_of_later_epochs_from_any_position(
    half: str, dataset: StreamedDataset, pool: ThreadPoolExecutor
) -> None:
    order = Order(dataset.groups[:, 2], 0, "d", 40, 1)  # a stream has one row per epoch
    readers = [DatasetReader(dataset, order, stream, 0, pool) for stream in range(40)]
    assert not {next(iter(reader)).key for reader in readers} & set(NO_CAPTION)
    assert sum((reader.unusable for reader in readers), Counter())["no caption"] >= 2
    lacking = opened(half)
    order = order_of(lacking, 8)  # a window is a row group

    def read(position: int, count: int) -> list[str]:
        reader = DatasetReader(lacking, order, 0, position, pool, apart=4)
        return [example.key for example in itertools.islice(reader, count)]

    keys = read(0, 128)
    assert all(len(set(keys[start : start + 4])) == 4 for start in range(0, 128, 4))
    assert all(read(position, 9) == keys[position : position + 9] for position in (1, 8, 37, 100))


@pytest.mark.usefixtures("many_shards")
def test_unusable_rows_have_frozen_replacements(half: str) -> None:
    """These keys must stay: trainings resume after an upgrade."""
    [batch] = itertools.islice(feed_of(half, streams=2, window=8).batches(0, 1, 16, 1), 1)
    assert [int(key) for key in batch["key"]] == [61, 58, 56, 62, 59, 49, 50, 52, 35, 34, 37, 32, 38, 56, 58, 59]


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


def test_references_to_a_missing_tar_and_files_and_images_that_changed_are_named(
    tmp_path: Path, dataset: StreamedDataset
) -> None:
    groups = dataset.groups.copy()
    groups[0, 2] += 1
    with pytest.raises(UserError, match=rf"samples/{dataset.shards[0]}\.parquet changed after the training started"):
        replace(dataset, groups=groups).load(GroupChunk(0, 0, 4), 0)
    url = Path(small_dataset(tmp_path, (20,), images="reference"))
    tar = tmp_path / "source" / "00000.tar"
    tar.rename(tar.with_suffix(".gone"))
    with pytest.raises(UserError, match=rf"stored by reference, and {tar} cannot be read: FileNotFoundError"):
        read_epoch(feed_of(url, images_from=str(tar.parent)))
    write_tar(tar, [(f"x{i}.png", picture(i, width=8, height=6)) for i in range(200)])
    with pytest.raises(UserError, match=rf"of \d+ images that were read .* {tar} .* drop {url} samples"):
        read_epoch(feed_of(url, images_from=str(tar.parent)))


SEED = 5


@pytest.fixture
def streamed(labelled: str) -> StreamedDataset:
    [dataset] = open_datasets(Data.model_validate({"datasets": labelled}), SEED, None)
    return dataset


def stream_of(dataset: StreamedDataset, rank: int = 0, ranks: int = 1, batch: int = 6, **options: Any) -> RankStream:
    plan = StreamPlan([dataset], PartMaker(20, dataset.targets, letters), SEED, streams=2, window=10)
    return RankStream(plan, rank, ranks, batch, **options)


def keys(parts: Sequence[BatchPart]) -> list[list[str]]:
    return [part.keys for part in parts]


def test_the_state_dict_lets_a_stateful_loader_resume_exactly(streamed: StreamedDataset) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(
            stream_of(streamed),
            batch_size=None,
            num_workers=2,
            collate_fn=unchanged,
            multiprocessing_context="forkserver",
        )

    interrupted = loader()
    reading = iter(interrupted)
    for _ in range(5):
        next(reading)
    state = interrupted.state_dict()
    undisturbed = list(itertools.islice(reading, 7))
    again = loader()
    again.load_state_dict(state)
    resumed = list(itertools.islice(again, 7))
    assert keys(resumed) == keys(undisturbed)
    pairs = zip(resumed, undisturbed, strict=True)
    assert all(torch.equal(part.buffers.image, old.buffers.image) for part, old in pairs)


def test_a_reader_draws_from_the_datasets_by_weight_and_from_any_position(
    streamed: StreamedDataset, tmp_path: Path
) -> None:
    orders = make_orders([replace(streamed, weight=3.0), streamed, replace(streamed, weight=0.01)], SEED, 2, 100)
    assert [(order.name, order.window) for order in orders] == [("dataset 0", 75), ("dataset 1", 25), ("dataset 2", 1)]
    [other] = open_datasets(Data.model_validate({"datasets": small_dataset(tmp_path, (12, 4))}), SEED, None)
    datasets = [replace(streamed, weight=3.0), replace(other, weight=1.0)]
    orders = make_orders(datasets, SEED, 1, 16)

    def read(position: int, count: int) -> list[tuple[str, str]]:
        with ThreadPoolExecutor(1) as pool:
            reader = StreamReader(datasets, orders, SEED, 0, position, pool)
            examples = [next(reader) for _ in range(count)]
            assert reader.take_unusable() == {}
            return [(example.file.path, example.key) for example in examples]

    whole = read(0, 200)
    assert read(150, 50) == whole[150:]
    counts = Counter(path.startswith(str(tmp_path)) for path, _ in whole)
    assert counts[True] / 200 == pytest.approx(0.25, abs=0.1)


def plan(
    ranks: int = 1, batch: int = 64, loaders: int = 8, recorded: int | None = None, **data: Any
) -> tuple[int, int | None, bool]:
    """Loader processes, streams, and whether there is a note."""
    reading = plan_reading(Streams(**data), ranks, batch, loaders, recorded)
    return reading.loaders, reading.streams, bool(reading.notes)


def test_a_training_has_the_processes_that_suit_the_machine_and_a_stream_for_each() -> None:
    cases: list[tuple[dict[str, Any], tuple[int, int, bool]]] = [
        ({"loaders": 1}, (1, 1, False)),
        ({"ranks": 2}, (8, 16, False)),
        ({"batch": 3}, (3, 3, False)),  # a process needs a sample of each batch
        # given numbers are used unchanged
        ({"ranks": 2, "workers": 3}, (3, 6, False)),
        ({"ranks": 2, "workers": 0}, (0, 2, False)),
        ({"ranks": 2, "workers": 3, "streams": 12}, (3, 12, False)),
        # processes divide the streams
        ({"ranks": 2, "streams": 12}, (6, 12, False)),
        ({"ranks": 2, "streams": 10, "loaders": 4}, (1, 10, False)),
        ({"ranks": 2, "streams": 4}, (2, 4, False)),
        # a resumed training keeps its streams on another machine, and another order is reported
        *(({"recorded": 8, "loaders": n}, (w, 8, False)) for n, w in ((1, 1), (2, 2), (3, 2), (8, 8))),
        ({"recorded": 8, "workers": 4}, (4, 8, False)),
        ({"recorded": 8, "workers": 3}, (3, 3, True)),
        ({"ranks": 3, "recorded": 8, "loaders": 2}, (2, 6, True)),
    ]
    for options, expected in cases:
        assert plan(**options) == expected, options
