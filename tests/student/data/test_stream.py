"""The stream of a rank: parts by step, its state, and mixing datasets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.parts import Part, PartMaker
from reinforce.student.data.reader import StreamedDataset
from reinforce.student.data.stream import RankStream, StreamPlan, StreamReader, make_orders
from tests.helpers.reinforced import letters, small_dataset

SEED = 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StreamedDataset:
    url = small_dataset(tmp_path_factory.mktemp("dataset"))
    [dataset] = open_datasets(Data.model_validate({"datasets": url}), SEED, None)
    return dataset


def stream_of(dataset: StreamedDataset, rank: int = 0, ranks: int = 1, batch: int = 6, **options: Any) -> RankStream:
    width = sum(dim for _, dim in dataset.targets)
    plan = StreamPlan([dataset], PartMaker(20, width, letters), SEED, streams=2, window=10)
    return RankStream(plan, rank, ranks, batch, **options)


def keys(parts: Sequence[Part]) -> list[list[str]]:
    return [part.keys for part in parts]


def test_the_state_dict_lets_a_stateful_loader_resume_exactly(dataset: StreamedDataset) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(
            stream_of(dataset),
            batch_size=None,
            num_workers=2,
            collate_fn=_identity,
            multiprocessing_context="forkserver",
        )

    parts = list(itertools.islice(loader(), 12))
    interrupted = loader()
    reading = iter(interrupted)
    for part in itertools.islice(reading, 5):
        last = part
    state = interrupted.state_dict()
    again = loader()
    again.load_state_dict(state)
    assert last.keys == parts[4].keys
    resumed = list(itertools.islice(again, 7))
    assert keys(resumed) == keys(parts[5:])
    assert all(torch.equal(part.buffers.image, old.buffers.image) for part, old in zip(resumed, parts[5:], strict=True))


def _identity(part: Any) -> Any:
    return part


def test_a_stream_starts_at_any_step_and_counts_on(dataset: StreamedDataset) -> None:
    undisturbed = list(itertools.islice(stream_of(dataset), 10))
    stream = stream_of(dataset, step=4)
    assert keys(list(itertools.islice(stream, 6))) == keys(undisturbed[4:])
    assert stream.state_dict() == {"step": 10}


def test_ranks_read_their_share_of_the_streams(dataset: StreamedDataset) -> None:
    one = keys(list(itertools.islice(stream_of(dataset), 8)))
    of_ranks = [keys(list(itertools.islice(stream_of(dataset, rank, 2, 3), 8))) for rank in range(2)]
    assert one == [first + second for first, second in zip(*of_ranks, strict=True)]


def test_parts_are_made_in_the_given_buffers_by_turns(dataset: StreamedDataset) -> None:
    stream = stream_of(dataset)
    buffers = stream.buffers = stream.plan.maker.allocate(1, 3, 6)
    for step, part in enumerate(itertools.islice(stream, 5)):
        assert part.buffers is not None
        assert part.buffers.image.data_ptr() == buffers.image[0, step % 3].data_ptr()


def test_the_window_is_divided_by_weight(dataset: StreamedDataset) -> None:
    orders = make_orders([replace(dataset, weight=3.0), dataset, replace(dataset, weight=0.01)], SEED, 2, 100)
    assert [order.window for order in orders] == [75, 25, 1]
    assert [order.name for order in orders] == ["dataset 0", "dataset 1", "dataset 2"]


def test_a_reader_draws_from_the_datasets_by_weight_and_from_any_position(
    dataset: StreamedDataset, tmp_path: Path
) -> None:
    [other] = open_datasets(Data.model_validate({"datasets": small_dataset(tmp_path, (12, 4))}), SEED, None)
    datasets = [replace(dataset, weight=3.0), replace(other, weight=1.0)]
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
