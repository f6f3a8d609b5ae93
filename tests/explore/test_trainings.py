"""Trainings over a view: exactly its samples, the same batches after a resume, and no other view on resume."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reinforce
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.data import load_streams
from reinforce.errors import UserError
from reinforce.evaluation.reading import read_samples
from reinforce.settings import parse
from reinforce.source.config import Input
from reinforce.source.samples import RawSample
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from reinforce.training.task import Batch
from tests.helpers.captioning import take_keys
from tests.helpers.data import members_of, write_tar
from tests.helpers.evaluation import make_evaluator
from tests.helpers.in_loaders import letters
from tests.helpers.reinforced import small_dataset
from tests.helpers.views import make_view

KEPT = 7


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of several row groups with two views; of one row group, a view keeps nothing."""
    url = small_dataset(tmp_path_factory.mktemp("dataset"))
    some = [sample.key for sample in reinforce.open(url)][: 2 * KEPT : 2]
    keys = ", ".join(f"'{key}'" for key in some)
    for name, rule in (("some", {"where": f"key IN ({keys})"}), ("few", {"sample": KEPT})):
        make_view(url, rule, name=name)
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
    # A checkpoint states the view.
    [few, some, every] = [feed_of(url, view).data for view in ("few", "some", None)]
    assert few != some
    view = reinforce.open(url, view="few").view
    own = {name: value for name, value in few.items() if every.get(name) != value}
    assert own == {f"{url}: view few": view.fingerprint}


def test_the_file_of_a_shard_is_read_once_and_a_missing_view_fails_before_the_first_step(tmp_path: Path) -> None:
    other = small_dataset(tmp_path)
    with pytest.raises(UserError, match="has no view 'some'"):
        feed_of(other, "some")
    make_view(other, {"sample": KEPT})
    expected = [batch["key"] for batch in take(feed_of(other, "some"), 4)]
    batches = feed_of(other, "some").batches(0, 1, KEPT, 0)
    found = [next(batches)["key"]]
    for path in Path(other, "views/some").glob("rows-*/*"):
        path.unlink()
    assert [*found, *(next(batches)["key"] for _ in range(3))] == expected


def test_evaluation_sets_and_fine_tunings_read_the_samples_of_a_view(url: str, tmp_path: Path) -> None:
    samples = {sample.key: sample for sample in reinforce.open(url, view="some")}
    read = [item for item in read_samples(url, Input(view="some"), "set") if isinstance(item, RawSample)]
    assert [(item.key, item.image) for item in read] == [(key, sample.image) for key, sample in samples.items()]
    few = {one.key for one in reinforce.open(url, view="few")}
    streamed, held_out = load_streams(parse(CaptionerConfig, captioner_config(url, tmp_path, view="some")), 16)
    assert take_keys(streamed) == {*samples}
    assert {*held_out.keys} == few
    streamed, _ = load_streams(parse(CaptionerConfig, captioner_config(url, tmp_path, view="few")), 16)
    assert take_keys(streamed) == few


def captioner_config(source: str, output: Path, **data: Any) -> dict[str, Any]:
    return {
        **{"output": str(output), "captioner": {"model": "coca_ViT-B-32"}, "train": {"steps": 1, "batch": 2}},
        **{"data": {"source": source, **data}, "held_out": {"source": source, "view": "few"}},
    }


def test_a_view_of_what_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    tar = str(write_tar(tmp_path / "a.tar", members_of(0, 3)))
    captioner = parse(CaptionerConfig, captioner_config(tar, tmp_path, view="some"))
    readers: dict[str, Callable[[], object]] = {
        "retrieval/set": lambda: make_evaluator(retrieval={"set": {"pairs": tar, "view": "some"}}),
        "zero_shot/set": lambda: make_evaluator(zero_shot={"set": {"images": tar, "view": "some"}}),
        "data": lambda: load_streams(captioner, 16),
    }
    for key, read in readers.items():
        with pytest.raises(UserError, match=rf"{key}: a view is of one reinforced dataset, and .*a.tar is none"):
            read()
