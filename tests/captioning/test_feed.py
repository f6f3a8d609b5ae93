from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.captioning.config import Data
from reinforce.captioning.feed import CaptionFeed
from reinforce.captioning.pairs import Pairs, find_pairs
from reinforce.config import Augmentations, Limits, RandAugment
from reinforce.dataset.augment import replay, sample_augmentation
from reinforce.errors import UserError
from reinforce.source.image import decode
from teachers.open_clip_tokens import Tokenizer
from teachers.weights import cache_folder
from tests.helpers.captioning import captioner_config, write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tiny_coca import END

SIZE = 16
tokenize = Tokenizer("coca_ViT-B-32")


def pairs_of(folder: Path, **data: Any) -> tuple[Pairs, Data]:
    config = captioner_config(folder, data={"source": f"{folder}/shards/*.tar", "threads": 2, **data})
    return find_pairs(config), config.data


def feed_of(pairs: Pairs, data: Data, seed: int = 0) -> CaptionFeed:
    return CaptionFeed(pairs, data, seed, SIZE, tokenize, END)


def take(feed: CaptionFeed, steps: int, rank: int = 0, ranks: int = 1, batch: int = 4, start: int = 0) -> list[Any]:
    batches = feed.batches(rank, ranks, batch, start)
    try:
        return list(itertools.islice(batches, steps))
    finally:
        batches.close()


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = all(torch.equal(a[name], b[name]) for name in ("image", "caption"))
    return tensors and a["key"] == b["key"] and a["length"] == b["length"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairs, Data]:
    folder = tmp_path_factory.mktemp("pairs")
    write_shards(folder, 7, 6, captions=3)
    return pairs_of(folder)


def test_a_batch_is_the_same_from_any_start_and_with_any_number_of_threads(made: tuple[Pairs, Data]) -> None:
    pairs, data = made
    whole = take(feed_of(pairs, data), 8)
    assert all(map(same, whole[5:], take(feed_of(pairs, data), 3, start=5)))
    alone = feed_of(pairs, data.model_copy(update={"threads": 1}))
    assert all(map(same, whole, take(alone, 8)))
    assert not same(whole[0], take(feed_of(pairs, data, seed=1), 1)[0])


def test_ranks_share_the_batch_of_one_rank(made: tuple[Pairs, Data]) -> None:
    pairs, data = made
    for step, whole in enumerate(take(feed_of(pairs, data), 5, batch=6)):
        parts = [take(feed_of(pairs, data), 1, rank, 3, 2, start=step)[0] for rank in range(3)]
        assert whole["key"] == [key for part in parts for key in part["key"]]
        assert torch.equal(whole["image"], torch.cat([part["image"] for part in parts]))


@settings(max_examples=30, deadline=None)
@given(epoch=st.integers(0, 1000), use=st.sampled_from(["one", "all"]), seed=st.integers(0, 9))
def test_every_epoch_has_every_example_once(made: tuple[Pairs, Data], epoch: int, use: str, seed: int) -> None:
    pairs, data = made
    feed = feed_of(pairs, data.model_copy(update={"use": use}), seed)
    assert feed.samples == (39 if use == "all" else 13)
    examples = [feed.example(epoch * feed.samples + place) for place in range(feed.samples)]
    images = [example.image for example in examples]
    if use == "all":
        assert {(e.image, e.caption) for e in examples} == set(itertools.product(range(13), range(3)))
    else:
        assert sorted(images) == list(range(13))
    assert len({(e.image, e.draw) for e in examples}) == feed.samples  # no crop comes twice


def test_captions_are_drawn_anew_in_every_epoch(made: tuple[Pairs, Data]) -> None:
    pairs, data = made
    feed = feed_of(pairs, data)
    drawn: dict[int, set[int]] = {}
    draws: dict[int, list[int]] = {}
    for position in range(20 * 13):
        example = feed.example(position)
        drawn.setdefault(example.image, set()).add(example.caption)
        draws.setdefault(example.image, []).append(example.draw)
    assert all(captions == {0, 1, 2} for captions in drawn.values())
    assert all(crops == list(range(20)) for crops in draws.values())


def test_an_image_is_cropped_as_open_clip_crops_and_told_by_its_caption(made: tuple[Pairs, Data]) -> None:
    pairs, data = made
    [batch] = take(feed_of(pairs, data), 1)
    assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (4, SIZE, SIZE, 3))
    policy = Augmentations(count=1, size=SIZE, scale=(0.9, 1.0), rand_augment=RandAugment(ops=0))
    for row, key in enumerate(batch["key"]):
        shard, number = int(key[:3]), int(key[3:])
        image = decode(picture(shard * 1000 + number), Limits())
        crop = replay(image, sample_augmentation(policy, 0, key, 0, *image.size))
        assert np.array_equal(batch["image"][row].numpy(), np.asarray(crop))
        texts = [f"thing {number} of shard {shard}, view {n}" for n in range(3)]
        assert any(torch.equal(batch["caption"][row], tokens) for tokens in tokenize(texts))
        assert batch["caption"][row, batch["length"][row]] == END


def test_another_image_stands_in_for_a_broken_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = {"2", "5"}
    members = []
    for i in range(20):
        data = picture(i)
        members += [(f"{i}.png", data[:99] if str(i) in broken else data), (f"{i}.txt", f"number {i}".encode())]
    write_tar(tmp_path / "shards" / "0.tar", members)
    pairs, data = pairs_of(tmp_path, captions=["txt"])
    feed = feed_of(pairs, data)
    with caplog.at_level(logging.WARNING):
        batches = take(feed, 20, batch=3)
    assert caplog.text.count("is left out, another one stands in for it: image_broken") == 2
    assert "2 images so far" in caplog.text
    seen = [key for batch in batches for key in batch["key"]]
    assert len(seen) == 60
    assert not broken & set(seen)
    assert all(same(a, b) for a, b in zip(batches[4:], take(feed_of(pairs, data), 16, batch=3, start=4), strict=True))


def test_nothing_but_broken_images_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "shards" / "0.tar", [m for i in range(20) for m in ((f"{i}.png", b"?"), (f"{i}.txt", b"t"))])
    pairs, data = pairs_of(tmp_path, captions=["txt"])
    with pytest.raises(UserError, match="images in a row cannot be decoded, the last: image_format"):
        take(feed_of(pairs, data), 1)


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_a_reinforced_dataset_gives_what_its_shards_give(
    tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))
    write_shards(tmp_path, 6, 6, captions=2)
    source = f"{tmp_path}/shards/*.tar"
    dataset = reinforce_here(
        {"source": source, "output": f"{tmp_path}/dataset", "images": images, "augmentations": {"size": 8}}
    )
    from_shards = take(feed_of(*pairs_of(tmp_path)), 4)
    pairs, data = pairs_of(tmp_path, source=dataset)
    assert pairs.counts().tolist() == [2] * 12  # the json member is kept as metadata
    assert all(map(same, from_shards, take(feed_of(pairs, data), 4)))
    assert len(list((cache_folder() / "images").glob("*.bin"))) == (2 if images == "embed" else 0)
