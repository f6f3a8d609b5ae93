"""A dataset in torch's DataLoader, over worker processes and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed
from torch.utils.data import DataLoader

import reinforce
from tests.helpers.reinforced import small_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> reinforce.Dataset:
    """Shards of 5, 3 and 4 samples."""
    return reinforce.open(small_dataset(tmp_path_factory.mktemp("dataset"), (5, 3, 4)))


def key_and_crop(sample: reinforce.Sample) -> tuple[str, torch.Tensor]:
    return sample.key, torch.tensor(list(sample.augmented(0, size=8).tobytes()))


def test_samples_come_in_the_order_of_the_dataset(data: reinforce.Dataset) -> None:
    keys = [sample.key for sample in data]
    assert [sample.key for sample in data.to_torch()] == keys
    assert [key for key, _ in data.to_torch(key_and_crop)] == keys
    assert isinstance(data.to_torch(), torch.utils.data.IterableDataset)


def test_spawned_workers_of_a_loader_read_every_sample_once(data: reinforce.Dataset) -> None:
    loader = DataLoader(data.to_torch(key_and_crop), batch_size=2, num_workers=2, multiprocessing_context="spawn")
    batches = list(loader)
    crops = {key: crop.tolist() for keys, made in batches for key, crop in zip(keys, made, strict=True)}
    assert crops == {key: crop.tolist() for key, crop in map(key_and_crop, data)}
    assert sum(len(keys) for keys, _ in batches) == 12


def test_ranks_read_every_sample_once_also_in_spawned_workers(
    data: reinforce.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    found = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        here = [sample.key for sample in data.to_torch()]
        loader = DataLoader(
            data.to_torch(key_and_crop), batch_size=None, num_workers=1, multiprocessing_context="spawn"
        )
        assert [key for key, _ in loader] == here, "a worker has the rank of its parent"
        found += here
    assert sorted(found) == sorted(sample.key for sample in data)


def test_more_readers_than_shards_leave_some_without_samples(data: reinforce.Dataset) -> None:
    loader = DataLoader(data[:1].to_torch(key_and_crop), batch_size=None, num_workers=2)
    assert len(list(loader)) == 5


def test_forked_workers_read_from_an_object_store(data: reinforce.Dataset, s3: Any) -> None:
    s3.put(data.store.root, "bucket/forked", recursive=True)
    stored = reinforce.open("s3://bucket/forked", teachers=["red"], captioners=[])
    here = [sample.key for sample in stored]
    loader = DataLoader(
        stored.to_torch(key_and_crop), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert sorted(key for key, _ in loader) == here
