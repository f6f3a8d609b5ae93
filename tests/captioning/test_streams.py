"""Pairs in streams: order, ranks, resumption, examples, what is counted and replaced, and a training."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import reinforce
from reinforce.captioning import finetune as finetuning
from reinforce.captioning.config import CaptionerConfig
from reinforce.captioning.data import GROUPS_FILE, CaptionStreams, load_streams, predicted_lengths
from reinforce.captioning.finetune import build, finetune
from reinforce.config import Augmentations, RandAugment
from reinforce.errors import UserError
from reinforce.images.backends import sample_augmentation
from reinforce.images.policy import decode
from reinforce.images.records import replay
from reinforce.source.config import Limits
from reinforce.training import log
from reinforce.training.task import Feed, Task
from teachers.open_clip.text import Tokenizer
from teachers.runtime.accelerator import Accelerator
from tests.helpers.captioning import captioned, captioner_config, equal, take, write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.models.tiny_coca import END, coca_model
from tests.helpers.ranks import served_store, start_ranks, under_torchrun
from tests.helpers.reinforced import reinforce_here
from tests.helpers.trainings import before_batches, curve
from tests.helpers.views import make_view

SIZE = 16
tokenize = Tokenizer("coca_ViT-B-32")


def streams_config(folder: Path, **data: Any) -> CaptionerConfig:
    source = {"source": f"{folder}/shards/*.tar", "workers": 0, "streams": 2, "window": 8}
    changes = {key: data.pop(key) for key in ("held_out", "seed", "output", "train", "evaluate") if key in data}
    return captioner_config(folder, data={**source, **data}, **changes)


def feed_of(config: CaptionerConfig) -> CaptionStreams:
    return CaptionStreams(load_streams(config, SIZE)[0], tokenize, END)


def keys_of(batches: list[Any]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    write_shards(folder, 12, 20, 16, captions=2)
    return folder


def test_batches_do_not_depend_on_the_start_or_on_loader_processes(folder: Path) -> None:
    config = streams_config(folder, output=f"{folder}/ranks", streams=4)
    whole = take(feed_of(config), 12)
    assert all(map(equal, whole[9:], take(feed_of(config), 3, start=9)))
    processes = config.model_copy(update={"data": config.data.model_copy(update={"workers": 2})})
    feed = feed_of(processes)
    feed.set_up(1, 4, 2)
    assert all(map(equal, whole[3:5], take(feed, 2, start=3)))
    assert not equal(whole[0], take(feed_of(streams_config(folder, output=f"{folder}/other", seed=1)), 1)[0])


def test_every_caption_is_an_example_of_an_epoch_where_all_are_used(folder: Path) -> None:
    feed = feed_of(streams_config(folder, output=f"{folder}/all", use="all"))
    assert feed.samples == 66
    batches = take(feed, 66, batch=1)
    assert len({(batch["key"][0], tuple(batch["caption"][0].tolist())) for batch in batches}) == 66


def test_captions_are_drawn_again_in_every_epoch(folder: Path) -> None:
    feed = feed_of(streams_config(folder, output=f"{folder}/drawn"))
    assert feed.samples == 33
    epochs = [take(feed, 33, batch=1, start=33 * epoch) for epoch in range(8)]
    seen = [{batch["key"][0]: tuple(batch["caption"][0].tolist()) for batch in epoch} for epoch in epochs]
    assert all(len(epoch) == 33 for epoch in seen), "each image once"
    assert all(len({epoch[key] for epoch in seen}) == 2 for key in [*seen[0]][:5])


def test_an_example_is_a_crop_by_policy_with_a_caption_of_its_image(folder: Path) -> None:
    [batch] = take(feed_of(streams_config(folder, output=f"{folder}/crop")), 1)
    assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (4, SIZE, SIZE, 3))
    policy = Augmentations(count=1, size=SIZE, scale=(0.9, 1.0), rand_augment=RandAugment(ops=0))
    for row, key in enumerate(batch["key"]):
        shard, number = int(key[:3]), int(key[3:])
        image = decode(picture(shard * 1000 + number), Limits())
        crop = replay(image, sample_augmentation(policy, 0, key, 0, *image.size))
        assert np.array_equal(batch["image"][row].numpy(), np.asarray(crop))
        texts = [f"thing {number} of shard {shard}, view {n}" for n in range(2)]
        assert any(torch.equal(batch["caption"][row], tokens) for tokens in tokenize(texts))
        assert batch["caption"][row, batch["length"][row]] == END


def test_predicted_tokens_end_with_the_first_end_token() -> None:
    tokens = tokenize(["", "fog", "a sign that says &!;", "<end_of_text> is text", "word " * 200])
    lengths = predicted_lengths(tokens, END)
    assert lengths[:2] == [1, 2]
    assert lengths[2] == tokens[2].tolist().index(END)
    assert lengths[3] > 4  # a special token within a caption is plain text
    assert lengths[4] == 75  # truncated to the context, with the end token last


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "folder", "dataset", "view"])
def test_sources_of_every_format_are_streamed(folder: Path, tmp_path: Path, kind: str) -> None:
    images = {f"{i:03d}": picture(i) for i in range(24)}
    data: dict[str, Any] = {"captions": ["txt"]}
    if kind == "parquet":
        rows = [{"key": key, "image": image, "text": f"thing {key}"} for key, image in images.items()]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet", row_group_size=10)
        data |= {"source": f"{tmp_path}/0.parquet", "captions": ["text", "txt"]}
    else:
        (tmp_path / "images").mkdir()
        for key, image in images.items():
            (tmp_path / "images" / f"{key}.png").write_bytes(image)
            (tmp_path / "images" / f"{key}.txt").write_text(f"thing {key}")
        data["source"] = f"{tmp_path}/images"
    if kind == "jsonl":
        lines = [json.dumps({"key": key, "file_name": f"images/{key}.png", "text": f"thing {key}"}) for key in images]
        (tmp_path / "0.jsonl").write_text("\n".join(lines))
        data |= {"source": f"{tmp_path}/0.jsonl", "captions": ["text", "txt"], "images_from": str(tmp_path)}
    if kind in ("dataset", "view"):
        run = {"source": f"{tmp_path}/images", "output": f"{tmp_path}/dataset", "augmentations": {"size": 8}}
        data["source"] = reinforce_here(run)
    if kind == "view":
        make_view(tmp_path / "dataset", {"sample": 9})
        data["view"] = "some"
        images = {sample.key: b"" for sample in reinforce.open(f"{tmp_path}/dataset", [], [], view="some")}
        assert len(images) == 9
    config = streams_config(tmp_path, held_out={"source": f"{folder}/shards/*.tar"}, **data)
    feed = feed_of(config)
    batches = take(feed, feed.samples, batch=1)
    assert sorted(keys_of(batches)) == sorted(images)
    texts = {batch["key"][0]: batch["caption"][0] for batch in batches}
    assert all(torch.equal(tokens, tokenize([f"thing {key}"])[0]) for key, tokens in texts.items())


def test_sizes_beside_tars_save_counting_and_surplus_ones_are_replaced(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path, 8, 8)
    sizes = tmp_path / "shards" / "sizes.json"
    config = streams_config(tmp_path, held_out={"source": f"{folder}/shards/*.tar"})
    sizes.write_text(json.dumps({"00000.tar": 8, "00001.tar": 12}))
    feed = feed_of(config)
    assert feed.samples == 20
    assert not Path(config.output, GROUPS_FILE).exists()
    with caplog.at_level(logging.WARNING):
        assert len({*keys_of(take(feed, 11))}) == 16
    assert "unusable rows that were replaced: fewer samples than were counted: 4" in caplog.text
    for wrong in (-5, True, 10**30, 8.0):
        sizes.write_text(json.dumps({"00000.tar": wrong, "00001.tar": 8}))
        assert feed_of(config).samples == 16, "a number that no shard has is not believed"


def test_broken_images_are_replaced_by_others_counted_and_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = {f"{i:03d}": picture(i) for i in range(16)}
    broken = {f"broken-{n}": b"no image" for n in range(4)}
    write_tar(tmp_path / "shards" / "0.tar", [*captioned({**images, **broken}), ("silent.png", picture(1))])
    config = streams_config(tmp_path, held_out={"source": f"{folder}/shards/*.tar"}, captions=["txt"])
    with caplog.at_level(logging.WARNING):
        feed = feed_of(config)
        batches = take(feed, 9)
    assert feed.samples == 20, "the one without a caption is not counted"
    assert "data: samples that are left out: no_text: 1" in caplog.text
    assert not {*broken} & {*keys_of(batches)}
    assert all(len({*batch["key"]}) == 4 for batch in batches[:4])
    assert f"{tmp_path}/shards/0.tar, key broken-0 is replaced by another example: image_format" in caplog.text
    assert "epoch 1, rank 0: unusable rows that were replaced: image_format: 4" in caplog.text, "each once"
    assert all(map(equal, batches[4:], take(feed_of(config), 5, start=4)))
    caplog.clear()
    for rank in range(2):
        take(feed_of(config), 6, rank, 2, 2)
    counts = [int(count) for count in re.findall(r"epoch 1, rank .: .*image_format: (\d)", caplog.text)]
    assert sum(counts) == 4, "each by the rank that reads it"


def test_bad_configs_and_damaged_sources_are_reported(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shards", tmp_path / "damaged")
    path = tmp_path / "damaged" / "00001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    refused: list[tuple[dict[str, Any], str]] = [
        ({"source": f"{folder}/shards/none-*.tar"}, "none-"),
        ({"source": f"{folder}/none.parquet"}, r"data: .*none\.parquet cannot be read: FileNotFoundError"),
        ({"captions": ["md"]}, "0 examples are left for training"),
        ({"view": "some"}, "a view is of one reinforced dataset"),
        ({"source": f"{tmp_path}/damaged/*.tar"}, r"data: .*00001\.tar: shard_damaged"),
    ]
    for changes, error in refused:
        with pytest.raises(UserError, match=error):
            load_streams(streams_config(folder, output=str(tmp_path), **changes), SIZE)
    write_tar(tmp_path / "shards" / "0.tar", captioned({f"{i:03d}": b"no image" for i in range(8)}))
    config = streams_config(tmp_path, held_out={"source": f"{folder}/shards/*.tar"}, captions=["txt"])
    with pytest.raises(UserError, match="100 images in a row cannot be decoded"):
        take(feed_of(config), 1)


STEPS, EPOCH = 4, 3  # of the training; an epoch has 12 examples
TRAININGS = [("two", STEPS), ("resumed", EPOCH - 1), ("resumed", STEPS)]  # output and steps of each on two ranks


def training_config(folder: Path, output: str, steps: int = STEPS) -> CaptionerConfig:
    optimizer = {"lr": 0.01, "warmup": 0, "hold": STEPS}
    train = {"steps": steps, "batch": 4, "optimizer": optimizer, "checkpoints": {"every": 100}, "log_every": 1}
    changes = {"train": train, "evaluate": {"captioned": 0, "batch": 4, "images": 4}, "source": f"{folder}/small/*.tar"}
    held_out = {"source": f"{folder}/shards/*.tar"}
    return streams_config(folder, output=f"{folder}/{output}", held_out=held_out, captions=["txt"], **changes)


def train_on_two_ranks(rank: int, folder: Path, ports: list[int]) -> None:
    """Train as torchrun would, once to the end and once with a restart inside an epoch."""
    log.draw_curves = lambda *_: None  # half a second for each training
    models: list[torch.nn.Module] = []
    seen: list[list[str]] = []

    def noting(config: CaptionerConfig, accelerator: Accelerator, data: Any) -> tuple[Task, Feed]:
        task, feed = build(config, accelerator, data)
        models.append(task.model)
        seen.append([])
        return task, before_batches(feed, lambda rank, step, batch: seen[-1].extend(batch["key"]))

    finetuning.build = noting
    counted = finetuning.load_streams
    loads: list[int] = []
    finetuning.load_streams = lambda *arguments: loads.append(rank) or counted(*arguments)
    for port, (output, steps) in zip(ports, TRAININGS, strict=True):
        under_torchrun(rank, 2, port)
        finetune(training_config(folder, output, steps))
    torch.save((seen, loads, [model.state_dict() for model in models]), folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> list[tuple[list[list[str]], list[int], list[dict[str, torch.Tensor]]]]:
    """Of each rank: the keys of each training's start, the ranks that read the counts, and the weights at the end."""
    for number in range(12):  # captions of other lengths: the mean over tokens is that of both ranks
        members = captioned({f"{number:02d}": picture(number)}, "thing " * (1 + number**2 // 3))
        write_tar(folder / f"small/{number:02d}.tar", members)
    coca_model(folder / "model")
    stores = [served_store() for _ in TRAININGS]
    start_ranks(train_on_two_ranks, 2, folder, [store.port for store in stores])
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.usefixtures("no_pictures")
def test_two_ranks_have_the_curve_of_one_equal_weights_also_resumed_and_each_sample_of_an_epoch_once(
    folder: Path, two_ranks: list[Any]
) -> None:
    finetune(training_config(folder, "one"))
    assert curve(folder / "two") == pytest.approx(curve(folder / "one"), rel=1e-5)
    (first, loads, weights), (second, no_loads, others) = two_ranks
    epoch = [*first[0][: 2 * EPOCH], *second[0][: 2 * EPOCH]]
    assert sorted(epoch) == [f"{number:02d}" for number in range(12)]
    assert (loads, no_loads) == ([0, 0, 0], []), "one rank counts for both"
    assert all(torch.equal(others[0][name], tensor) for name, tensor in weights[0].items())
    for seen, _, (whole, _, resumed) in two_ranks:  # one was resumed inside an epoch
        assert [len(keys) for keys in seen] == [2 * STEPS, 2 * (EPOCH - 1), 2 * (STEPS - EPOCH + 1)]
        assert seen[1] + seen[2] == seen[0]
        assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items()), "bit for bit"
