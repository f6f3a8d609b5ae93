"""Trainings, fine-tunings and tunings that read from and write to an object store, as on a disk."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch

from reinforce import settings
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.data import HELD_OUT_FILE
from reinforce.captioning.finetune import finetune
from reinforce.student.config import Data
from reinforce.student.data.datasets import open_datasets
from reinforce.student.data.feed import StudentFeed
from reinforce.training.order import GroupChunk
from reinforce.training.task import Batch
from reinforce.tuning.command import tune
from reinforce.tuning.config import TuneConfig
from tests.helpers.captioning import captioner_config, write_shards
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.in_loaders import letters
from tests.helpers.reinforced import reinforce_here, small_dataset
from tests.helpers.students import student_folder

SIZES = (20, 12)
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


@pytest.fixture(scope="module")
def on_disk(urls: dict[str, str]) -> list[Batch]:
    return take(urls["disk"], 6)


@pytest.mark.parametrize(("images", "workers"), [("embed", 1), ("reference", 0)])
def test_batches_from_s3_equal_those_from_disk_and_a_row_group_takes_few_requests(
    urls: dict[str, str], on_disk: list[Batch], images: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for here, there in zip(on_disk, take(urls[images], 6, workers=workers), strict=True):
        assert here["key"] == there["key"]
        assert torch.equal(here["image"], there["image"])
        assert torch.equal(here["targets"]["blue"]["synthetic"], there["targets"]["blue"]["synthetic"])
    [dataset] = open_datasets(Data.model_validate({"datasets": urls[images], "images_from": SOURCE}), 0, None)
    asked = Counter[str]()
    original = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        asked[kwargs["Key"].split("/")[0] if method == "get_object" else method] += 1
        return await original(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    groups = [GroupChunk(group, 0, rows) for group, rows in enumerate(dataset.groups[:, 2].tolist())]
    examples = [row for chunk in groups for row in dataset.load(chunk, 0).rows]
    assert (len(groups), len(examples)) == (5, 32)
    files = len(groups) * 8  # layers
    # Per layer, one for the footer and one for its columns, if the first one does not have them; from the tar, one for
    # all images of the group.
    assert files <= asked[images] <= 2 * files
    assert asked["source"] == (len(groups) if images == "reference" else 0)


def make_config(folder: Path, source: str, output: str, steps: int = 4) -> CaptionerConfig:
    train = {**captioner_config(folder).train.model_dump(), "steps": steps}
    return captioner_config(folder, data={"source": source, "workers": 0}, output=output, train=train)


def read_losses(lines: bytes) -> list[float]:
    return [row["loss"] for row in map(json.loads, lines.splitlines()) if "loss" in row]


def read_rows(content: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(content)).to_pylist()
    return rows


@pytest.mark.usefixtures("no_pictures")
def test_an_object_store_gives_the_results_of_a_local_disk(s3: Any, tmp_path: Path) -> None:
    write_shards(tmp_path, 20, 20)
    s3.put(f"{tmp_path}/shards/", "bucket/pairs/", recursive=True)
    local = finetune(make_config(tmp_path, f"{tmp_path}/shards/*.tar", f"{tmp_path}/out"))
    remote = finetune(make_config(tmp_path, "s3://bucket/pairs/{00000..00001}.tar", "s3://bucket/out"))
    assert remote.metrics == pytest.approx(local.metrics)
    assert read_losses(s3.cat_file("bucket/out/log.jsonl")) == read_losses(
        (tmp_path / "out" / "log.jsonl").read_bytes()
    )
    weights = "captioner/open_clip_model.safetensors"
    assert s3.cat_file(f"bucket/out/{weights}") == (tmp_path / "out" / weights).read_bytes()
    name = HELD_OUT_FILE
    assert read_rows(s3.cat_file(f"bucket/out/{name}")) == read_rows((tmp_path / "out" / name).read_bytes())


STEPS = 3


@pytest.mark.slow
def test_trials_and_results_are_written_to_the_store(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    url = small_dataset(tmp_path, sizes=(13,))
    student: dict[str, Any] = {
        "output": str(tmp_path / "student"),
        "student": {"model": student_folder(tmp_path / "model")},
        "data": {"datasets": url, "teachers": ["red"], "workers": 0, "window": 16},
        "train": {"steps": STEPS, "batch": 8, "optimizer": {"warmup": 1}, "compute": {"cpus": 2}},
        "evaluate": {"retrieval": {"own": {"pairs": url}}},
    }
    config = settings.parse(
        TuneConfig,
        {
            "output": "s3://bucket/tuning",
            "student": student,
            "scales": {"red": [5.0, 50.0]},
            "seeds": [0],
            "early_stopping": False,
            "screening": {"batches": 1},
        },
    )
    first = tune(config)
    assert [row.state for row in first.rows] == ["finished", "finished"]
    assert json.loads(s3.cat("bucket/tuning/table.json"))["found"] == first.best
    assert s3.exists("bucket/tuning/scales.png")
    assert s3.exists("bucket/tuning/student.yaml")
    assert s3.find("bucket/tuning/.ray") == []
    before = {path: info["LastModified"] for path, info in s3.find("bucket/tuning/trials", detail=True).items()}
    assert tune(config).json() == first.json()
    assert {p: i["LastModified"] for p, i in s3.find("bucket/tuning/trials", detail=True).items()} == before
