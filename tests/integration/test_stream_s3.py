"""Streaming from S3 (a moto server): the same batches as from a disk, in few requests."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import s3fs
import torch

from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from reinforce.training.order import Chunk
from reinforce.training.task import Batch
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.reinforced import letters, reinforce_here

SIZES = (40, 25)
SOURCE = "s3://bucket/source"


@pytest.fixture(scope="module")
def urls(s3: s3fs.S3FileSystem, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same dataset on disk, with images embedded, and in S3, with images embedded and by reference."""
    folder = tmp_path_factory.mktemp("dataset")
    for number, size in enumerate(SIZES):
        write_tar(folder / "source" / f"{number:05d}.tar", members_of(number, size))
    s3.put(f"{folder}/source/", "bucket/source/", recursive=True)
    source = "s3://bucket/source/{00000..00001}.tar"
    made = {"disk": reinforce_here(config_of(source, folder / "out"))}
    for images in ("embed", "reference"):
        made[images] = reinforce_here(config_of(source, f"s3://bucket/{images}", images=images))
    return made


def take(url: str, count: int, **data: Any) -> list[Batch]:
    config = {"datasets": url, "images_from": SOURCE, "workers": 0, "window": 16, **data}
    feed = StudentFeed(Data.model_validate(config), 0, 16, letters)
    assert feed.samples == sum(SIZES)
    return list(itertools.islice(feed.batches(0, 1, 6, 0), count))


@pytest.mark.parametrize(("images", "workers"), [("embed", 1), ("reference", 0)])
def test_batches_from_s3_equal_those_from_disk(urls: dict[str, str], images: str, workers: int) -> None:
    for here, there in zip(take(urls["disk"], 12), take(urls[images], 12, workers=workers), strict=True):
        assert here["key"] == there["key"]
        assert torch.equal(here["image"], there["image"])
        assert torch.equal(here["targets"]["blue"]["synthetic"], there["targets"]["blue"]["synthetic"])


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_a_row_group_takes_few_requests(urls: dict[str, str], images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = StudentFeed(
        Data.model_validate({"datasets": urls[images], "images_from": SOURCE, "workers": 0}), 0, 16, letters
    )
    [dataset] = feed._datasets
    asked = Counter[str]()
    original = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        asked[kwargs["Key"].split("/")[0] if method == "get_object" else method] += 1
        return await original(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    groups = [Chunk(group, 0, rows) for group, rows in enumerate(dataset.groups[:, 2].tolist())]
    examples = [row for chunk in groups for row in dataset.load(chunk, 0).rows]
    assert (len(groups), len(examples)) == (9, 65)
    layers = 8
    # Per layer, one for the footer and one for its columns; from the tar, one for all images of the group.
    assert asked[images] == len(groups) * layers * 2
    assert asked["source"] == (len(groups) if images == "reference" else 0)
