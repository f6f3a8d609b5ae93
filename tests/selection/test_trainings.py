"""Trainings over a view: exactly its samples, the same batches after a resume, and no other view on resume."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import reinforce
from reinforce.errors import UserError
from reinforce.selection.config import SelectConfig
from reinforce.selection.select import select
from reinforce.settings import parse
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from reinforce.training.task import Batch
from tests.helpers.reinforced import letters, small_dataset

KEPT = 7


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of several row groups with two views; of one row group, a view keeps nothing."""
    url = small_dataset(tmp_path_factory.mktemp("dataset"))
    some = [sample.key for sample in reinforce.open(url)][: 2 * KEPT : 2]
    keys = ", ".join(f"'{key}'" for key in some)
    for name, rule in (("some", {"where": f"key IN ({keys})"}), ("few", {"sample": KEPT})):
        select(parse(SelectConfig, {"dataset": url, "name": name, "rules": [rule]}))
    return url


def feed_of(url: str, view: str | None, workers: int = 0) -> StudentFeed:
    source: dict[str, Any] = {"url": url, **({"view": view} if view else {})}
    data = Data.model_validate({"datasets": source, "workers": workers, "window": 4, "streams": 1})
    return StudentFeed(data, seed=5, size=20, tokenize=letters)


def take(feed: StudentFeed, count: int, start: int = 0) -> list[Batch]:
    return list(itertools.islice(feed.batches(0, 1, KEPT, start), count))


@pytest.mark.parametrize("view", ["some", "few"])
def test_an_epoch_has_each_sample_of_the_view_once_with_its_own_vectors(url: str, view: str) -> None:
    feed = feed_of(url, view)
    assert feed.rows == KEPT
    samples = {sample.key: sample for sample in reinforce.open(url, view=view)}
    for batch in take(feed, 2):
        assert Counter(batch["key"]) == Counter([*samples])
        for key, vector in zip(batch["key"], batch["targets"]["red"]["caption"], strict=True):
            expected = torch.from_numpy(samples[key].texts["red"]["caption"][0])
            torch.testing.assert_close(vector, expected, atol=1e-3, rtol=0)


def test_batches_over_a_view_are_the_same_after_a_resume_and_in_loader_processes(url: str) -> None:
    whole = take(feed_of(url, "few"), 4)
    for others in (take(feed_of(url, "few"), 2, start=2), take(feed_of(url, "few", workers=1), 4)[2:]):
        for one, other in zip(whole[2:], others, strict=True):
            assert one["key"] == other["key"]
            assert torch.equal(one["image"], other["image"])


def test_a_checkpoint_states_the_view_and_one_without_is_as_before(url: str) -> None:
    [few, some, every] = [feed_of(url, view).data for view in ("few", "some", None)]
    assert few != some
    view = reinforce.open(url, view="few").view
    assert view is not None
    assert {name: value for name, value in few.items() if every.get(name) != value} == {
        f"{url}: view few": view.fingerprint
    }
    dumped = Data.model_validate({"datasets": url}).model_dump(mode="json")
    assert dumped["datasets"] == [{"url": url, "weight": 1.0}], "as in checkpoints of earlier versions"


def test_the_file_of_a_shard_is_read_once_in_a_process(tmp_path: Path) -> None:
    url = small_dataset(tmp_path)
    select(parse(SelectConfig, {"dataset": url, "name": "few", "rules": [{"sample": KEPT}]}))
    expected = [batch["key"] for batch in take(feed_of(url, "few"), 4)]
    feed = feed_of(url, "few")
    batches = feed.batches(0, 1, KEPT, 0)
    found = [next(batches)["key"]]
    for path in Path(url, "views/few").glob("rows-*/*"):
        path.unlink()
    assert [*found, *(next(batches)["key"] for _ in range(3))] == expected


def test_a_view_of_other_rows_fails_before_the_first_step(url: str, tmp_path: Path) -> None:
    other = small_dataset(tmp_path)
    with pytest.raises(UserError, match="has no view 'some'"):
        feed_of(other, "some")
    select(parse(SelectConfig, {"dataset": other, "name": "some", "rules": [{"sample": KEPT}]}))
    shards = Path(other, "views/some/shards.parquet")
    table = pq.read_table(shards)
    kept = [[*counts, 0] for counts in table["kept"].to_pylist()]
    pq.write_table(table.set_column(2, table.schema.field(2), pa.array(kept, pa.list_(pa.int32()))), shards)
    with pytest.raises(UserError, match="view some is of other samples"):
        feed_of(other, "some")
