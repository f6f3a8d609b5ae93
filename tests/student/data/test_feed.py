"""Batches from reinforced datasets: their content, and that they are the same however they are read."""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reinforce
import reinforce.student.data.feed
from reinforce.errors import UserError
from reinforce.images.policy import decode
from reinforce.images.records import replay
from reinforce.source.config import Limits
from reinforce.student.config import Data
from reinforce.student.data.feed import Assembler, StudentFeed
from reinforce.training.task import Batch
from tests.helpers.data import config_of, members_of, write_tar
from tests.helpers.in_loaders import letters, read
from tests.helpers.reinforced import reinforce_here, small_dataset
from tests.helpers.waiting import is_alive, wait_for

ROOT = Path(__file__).parents[3]


def feed_of(url: str | list[dict[str, Any]], size: int = 20, seed: int = 5, **data: Any) -> StudentFeed:
    options = {"datasets": url, "workers": 0, "window": 10, **data}
    return StudentFeed(Data.model_validate(options), seed=seed, size=size, tokenize=letters)


def take(feed: StudentFeed, count: int, batch: int, rank: int = 0, ranks: int = 1, start: int = 0) -> list[Batch]:
    return list(itertools.islice(feed.batches(rank, ranks, batch, start), count))


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    """All tensors of a batch by path."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            flat[name] = value
        elif isinstance(value, dict):
            flat |= {f"{name}/{inner}": tensor for inner, tensor in tensors(value).items()}
    return flat


def same(first: Batch, second: Batch) -> bool:
    one, two = tensors(first), tensors(second)
    equal = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    return equal and all(first.get(name) == second.get(name) for name in ("key", "texts", "records"))


def test_a_batch_has_the_documented_format(labelled: str) -> None:
    [batch] = take(feed_of(labelled), 1, 6)
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors(batch).items()}
    texts = dict.fromkeys(("caption", "synthetic"), (torch.int64, (6, 40)))
    vectors = {
        f"targets/{teacher}/{what}": (torch.float32, (6, dim))
        for teacher, dim in (("red", 8), ("blue", 12))
        for what in ("image", "caption", "synthetic")
    }
    assert shapes == {"image": (torch.uint8, (6, 20, 20, 3)), **texts, **vectors}
    assert len(set(batch["key"])) == 6
    assert all(tensor.is_contiguous() for tensor in tensors(batch).values())


def test_images_texts_and_vectors_belong_together_and_are_the_stored_ones(labelled: str) -> None:
    samples = {sample.key: sample for sample in reinforce.open(labelled)}
    for batch in take(feed_of(labelled, size=24), 7, 6):
        captions, synthetic = read(batch["caption"]), read(batch["synthetic"])
        for i, key in enumerate(batch["key"]):
            sample = samples[key]
            image = decode(sample.image, Limits())
            seen = [np.asarray(replay(image, record)) for record in sample.augmentations]
            crops = [k for k, pixels in enumerate(seen) if np.array_equal(pixels, batch["image"][i].numpy())]
            assert crops, "at the recorded size the image is what the teacher saw, pixel for pixel"
            texts = [n for n, text in enumerate(sample.captions["namer"] or []) if text[:40] == synthetic[i]]
            assert captions[i] == sample.caption
            for teacher, targets in batch["targets"].items():
                assert any(close(targets["image"][i], sample.images[teacher][k]) for k in crops)
                assert any(close(targets["synthetic"][i], sample.texts[teacher]["namer"][n]) for n in texts)
                assert close(targets["caption"][i], sample.texts[teacher]["caption"][0])


def close(found: torch.Tensor, stored: np.ndarray) -> bool:
    """Whether it is the stored vector, normalised."""
    return np.allclose(found.numpy(), stored / np.linalg.norm(stored), atol=1e-6)


def test_a_rank_that_is_not_the_first_lists_and_reads_nothing_before_its_first_batch(
    labelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = feed_of(labelled)
    shared = pickle.loads(pickle.dumps(first._datasets))
    monkeypatch.setattr(reinforce.student.data.feed, "share_from_first", lambda work: shared)
    monkeypatch.setattr(reinforce.student.data.feed, "open_datasets", None)
    assert same(take(feed_of(labelled), 1, batch=6, rank=1, ranks=2)[0], take(first, 1, batch=6, rank=1, ranks=2)[0])


def test_loader_processes_read_every_sample_once_and_resume_exactly_also_with_other_cores(labelled: str) -> None:
    feed = feed_of(labelled, workers=None)
    reading = feed.set_up(1, 4, loaders=2)
    assert (reading.loaders, reading.streams) == (2, 2)
    undisturbed = take(feed, 16, 4)
    epoch = [key for batch in undisturbed[:11] for key in batch["key"]]
    assert len(set(epoch)) == len(epoch) == 44
    assert all(map(same, take(feed_of(labelled, workers=2), 5, 4, start=9), undisturbed[9:]))
    # One process reads the same streams one after the other.
    assert all(map(same, take(feed_of(labelled, streams=2), 16, 4), undisturbed))
    resumed = feed_of(labelled, workers=None)
    assert resumed.set_up(1, 4, 1, reading.streams).loaders == 1
    assert all(map(same, take(resumed, 7, 4, start=9), undisturbed[9:]))


def test_rows_have_the_same_places_in_a_batch_with_any_number_of_loader_processes(labelled: str) -> None:
    """Batches of six samples of four streams."""
    options = {"datasets": labelled, "streams": 4, "window": 10}
    one, two = (
        StudentFeed(Data.model_validate({**options, "workers": workers}), 5, 20, letters, online=["red"])
        for workers in (0, 2)
    )
    whole = take(one, 12, 6)
    assert all(map(same, take(two, 3, 6, start=9), whole[9:]))


def test_a_process_that_is_ahead_does_not_overwrite_parts_that_are_being_assembled(
    labelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble = Assembler.assemble

    def slowly(*args: Any) -> Batch:
        time.sleep(0.05)  # meanwhile processes go as far ahead as they may
        return assemble(*args)

    monkeypatch.setattr(Assembler, "assemble", slowly)
    batches = take(feed_of(labelled, workers=1, prefetch=1), 20, 2)
    assert all(map(same, batches, take(feed_of(labelled), 20, 2)))


def test_with_fixed_streams_batches_are_the_same_for_any_number_of_ranks_that_divides_them(labelled: str) -> None:
    def steps(ranks: int) -> list[list[str]]:
        parts = [take(feed_of(labelled, streams=4), 7, 8 // ranks, rank, ranks) for rank in range(ranks)]
        return [sorted(key for part in parts for key in part[step]["key"]) for step in range(7)]

    assert steps(1) == steps(2) == steps(4)
    assert len({key for step in steps(1)[:5] for key in step}) == 40, "every sample once"
    with pytest.raises(UserError, match=r"data.streams \(3\) must be a multiple of ranks x data.workers \(2 x 1\)"):
        next(feed_of(labelled, streams=3).batches(0, 2, 4, 0))
    with pytest.raises(UserError, match=r"data.workers \(5\) must be at most the batch of a rank \(4\)"):
        next(feed_of(labelled, workers=5).batches(0, 1, 4, 0))


def test_sequential_picks_take_turns_and_random_ones_differ_between_epochs_and_seeds(labelled: str) -> None:
    feed = feed_of(labelled, pick="sequential", window=100)
    epochs = [{key: (i, t) for b in take(feed, 11, 4, start=11 * e) for key, i, t in parts_of(b)} for e in range(4)]
    for key in epochs[0]:
        images, texts = zip(*(epoch[key] for epoch in epochs), strict=True)
        assert len(set(images)) == len(set(texts)) == 2, "two augmentations and two captions in turns of two"
        assert (images[:2], texts[:2]) == (images[2:], texts[2:])
    assert len({images for images, _ in epochs[0].values()}) > 2
    first, second, other = (
        {key: image for b in take(one, 11, 4, start=11 * epoch) for key, image, _ in parts_of(b)}
        for one, epoch in ((feed_of(labelled), 0), (feed_of(labelled), 1), (feed_of(labelled, seed=0), 0))
    )
    changed = sum(first[key] != second[key] for key in first)
    assert 10 < changed < 34, "one of two augmentations, picked again"
    assert first != other


def parts_of(batch: Batch) -> list[tuple[str, bytes, str]]:
    images = [image.numpy().tobytes() for image in batch["image"]]
    return list(zip(batch["key"], images, read(batch["synthetic"]), strict=True))


def test_each_dataset_of_a_mixture_is_replayed_by_its_own_backend(tmp_path: Path) -> None:
    augmentations = {"count": 2, "size": 24}
    urls = [
        small_dataset(tmp_path / name, (12,), augmentations={**augmentations, "backend": name}, seed=seed)
        for seed, name in enumerate(("torchvision-pil-1", "fixed-point-1"))
    ]
    expected = {
        sample.augmented(k, size=20).tobytes(): sample.policies.augmentation
        for url in urls
        for sample in reinforce.open(url)
        for k in range(2)
    }
    feed = feed_of([{"url": url} for url in urls], workers=1)
    seen = [expected[image.numpy().tobytes()] for batch in take(feed, 6, 4) for image in batch["image"]]
    assert Counter(seen) == {"torchvision-pil-1": 12, "fixed-point-1": 12}


def test_only_the_needed_layers_and_columns_are_read(labelled: str) -> None:
    feed = feed_of(labelled, teachers=["blue"], captioners=[])
    [dataset] = feed._datasets
    assert dataset.layers.columns == {
        "samples": ("key", "augmentations", "image", "caption"),
        "embeddings/blue/images": ("key", "embeddings"),
        "embeddings/blue/caption": ("key", "embeddings"),
    }
    [batch] = take(feed, 1, 4)
    assert set(batch["targets"]) == {"blue"}
    assert "synthetic" not in batch


def test_unusable_rows_are_left_out_or_replaced_and_logged_by_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [m for m in members_of(0, 40) if m[0] not in ("00000003.txt", "00000017.txt")]
    members = [(n, b"thing 7 x" if n == "00000007.txt" else d) for n, d in members]
    members = [(n, b"" if n in ("00000003.json", "00000017.json") else d) for n, d in members]
    write_tar(tmp_path / "0.tar", members)
    config = config_of(f"{tmp_path}/0.tar", tmp_path / "out", captioners={})
    trouble = {"class": "tests.helpers.models:FailingTeacher", "options": {"trigger": "thing 7 x", "failure": "nan"}}
    config["teachers"] = {"ill": trouble, "red": config["teachers"]["red"]}
    url = reinforce_here(config)
    with caplog.at_level(logging.WARNING, "reinforce"):
        keys = [key for batch in take(feed_of(url), 9, 4) for key in batch["key"]]
    assert not {"00000003", "00000007", "00000017"} & set(keys)
    assert len(set(keys)) == 36
    [line] = [record.message for record in caplog.records]
    assert (
        line == f"{url}: 3 of 40 samples cannot be used and are left out: no caption: 2, no vectors of the caption: 1"
    )
    caplog.clear()
    monkeypatch.setattr("reinforce.student.data.datasets.COUNTED_SHARDS", 0)  # as a dataset of many shards
    feed = feed_of(url)
    with caplog.at_level(logging.WARNING, "reinforce"):
        batches = take(feed, 20, 4)
    first, second = ([key for batch in batches[e : e + 10] for key in batch["key"]] for e in (0, 10))
    for keys in (first, second):
        assert len(keys) == 40
        assert len(set(keys)) == 37
        assert not {"00000003", "00000007", "00000017"} & set(keys)
    assert all(torch.isfinite(t).all() for b in batches for t in tensors(b).values())
    lines = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    reasons = "rank 0: unusable rows that were replaced: no caption: 2, no vectors of the caption: 1"
    assert lines == [f"epoch {epoch}, {reasons}" for epoch in (1, 2)]
    assert same(take(feed, 1, 4, start=7)[0], batches[7])
    write_tar(tmp_path / "1.tar", [m for m in members_of(0, 20) if not m[0].endswith((".txt", ".json"))])
    feed = feed_of(reinforce_here(config_of(f"{tmp_path}/1.tar", tmp_path / "none")))
    with pytest.raises(UserError, match=r"none of 20 rows can be used \(no caption\)\. Set data\.captions to none "):
        take(feed, 1, 4)
    assert take(feed_of(f"{tmp_path}/none", teachers=[], captions="mixed", synthetic=1.0), 1, 4)


def test_a_stream_whose_rows_are_all_unusable_takes_those_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reinforce.student.data.datasets.COUNTED_SHARDS", 0)  # as a dataset of many shards
    usable = [f"{number:08}" for number in (1, 2, 3)]
    members = [m for m in members_of(0, 20) if not m[0].endswith((".txt", ".json")) or m[0].partition(".")[0] in usable]
    write_tar(tmp_path / "0.tar", members)
    feed = feed_of(reinforce_here(config_of(f"{tmp_path}/0.tar", tmp_path / "out")), streams=10)
    assert {key for batch in take(feed, 10, 20) for key in batch["key"]} == {*usable}


TRAINING = """
import sys, time
from multiprocessing import active_children, forkserver
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from tests.helpers.in_loaders import letters

if __name__ == "__main__":
    data = Data.model_validate({"datasets": sys.argv[1], "workers": 2, "window": 10})
    batches = StudentFeed(data, seed=5, size=20, tokenize=letters).batches(0, 1, 4, 0)
    next(batches)
    print(*(child.pid for child in active_children()), forkserver._forkserver._forkserver_pid, flush=True)
    time.sleep(600)
"""


def test_loader_processes_and_their_fork_server_exit_when_the_training_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    url = small_dataset(tmp_path / "dataset")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, script, url], stdout=subprocess.PIPE, text=True, env=environment
    ) as training:
        assert training.stdout is not None
        pids = [int(pid) for pid in training.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_alive, pids))
        training.send_signal(signal.SIGKILL)
        try:
            wait_for(lambda: not any(map(is_alive, pids)))
        finally:
            for pid in filter(is_alive, pids):
                os.kill(pid, signal.SIGKILL)


def test_other_samples_in_as_many_rows_are_other_files(tmp_path: Path) -> None:
    """Fingerprints do not cover the source; a resume on other files is noted."""

    def made(seed: int) -> tuple[str | None, int, Any]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write_tar(tmp_path / "source" / "0.tar", members_of(seed, 9))
        feed = feed_of(reinforce_here(config_of(f"{tmp_path}/source/*.tar", tmp_path / "out")))
        return feed.set_up(1, 6, 1).files, feed.rows, feed.data

    first, again, other = made(0), made(0), made(5)
    assert again == first
    assert other[1:] == first[1:]
    assert other[0] != first[0]
