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
from reinforce.captioning.feed import CaptionFeed, predicted_lengths
from reinforce.captioning.pairs import Pairs, load_pairs
from reinforce.config import Augmentations, Limits, RandAugment
from reinforce.dataset.augment.records import replay, sample_augmentation
from reinforce.errors import UserError
from reinforce.images.policy import decode
from teachers.open_clip.tokenizer import Tokenizer
from teachers.weights import cache_folder
from tests.helpers.captioning import captioned, captioner_config, equal, take, write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tiny_coca import END

SIZE = 16
tokenize = Tokenizer("coca_ViT-B-32")


def make_pairs(folder: Path, **data: Any) -> tuple[Pairs, Data]:
    config = captioner_config(folder, data={"source": f"{folder}/shards/*.tar", "threads": 2, **data})
    return load_pairs(config), config.data


def make_feed(pairs: Pairs, data: Data, seed: int = 0) -> CaptionFeed:
    return CaptionFeed(pairs, data, seed, SIZE, tokenize, END)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairs, Data]:
    folder = tmp_path_factory.mktemp("pairs")
    write_shards(folder, 7, 6, captions=3)
    return make_pairs(folder)


def test_batches_do_not_depend_on_the_start_or_the_number_of_threads_or_ranks(source: tuple[Pairs, Data]) -> None:
    pairs, data = source
    whole = take(make_feed(pairs, data), 8)
    assert all(map(equal, whole[5:], take(make_feed(pairs, data), 3, start=5)))
    single = make_feed(pairs, data.model_copy(update={"threads": 1}))
    assert all(map(equal, whole, take(single, 8)))
    assert not equal(whole[0], take(make_feed(pairs, data, seed=1), 1)[0])
    for step, batch in enumerate(take(make_feed(pairs, data), 5, batch=6)):
        parts = [take(make_feed(pairs, data), 1, rank, 3, 2, start=step)[0] for rank in range(3)]
        assert batch["key"] == [key for part in parts for key in part["key"]]
        assert torch.equal(batch["image"], torch.cat([part["image"] for part in parts]))


@settings(max_examples=30)
@given(epoch=st.integers(0, 1000), use=st.sampled_from(["one", "all"]), seed=st.integers(0, 9))
def test_every_epoch_has_every_example_once(source: tuple[Pairs, Data], epoch: int, use: str, seed: int) -> None:
    pairs, data = source
    feed = make_feed(pairs, data.model_copy(update={"use": use}), seed)
    assert feed.samples == (39 if use == "all" else 13)
    examples = [feed.example(epoch * feed.samples + index) for index in range(feed.samples)]
    images = [example.image for example in examples]
    if use == "all":
        assert {(e.image, e.caption) for e in examples} == set(itertools.product(range(13), range(3)))
    else:
        assert sorted(images) == list(range(13))
    assert len({(e.image, e.draw) for e in examples}) == feed.samples  # no crop occurs twice


def test_captions_are_drawn_again_in_every_epoch(source: tuple[Pairs, Data]) -> None:
    pairs, data = source
    feed = make_feed(pairs, data)
    drawn: dict[int, set[int]] = {}
    draws: dict[int, list[int]] = {}
    for position in range(20 * 13):
        example = feed.example(position)
        drawn.setdefault(example.image, set()).add(example.caption)
        draws.setdefault(example.image, []).append(example.draw)
    assert all(captions == {0, 1, 2} for captions in drawn.values())
    assert all(crops == list(range(20)) for crops in draws.values())


def test_an_example_is_a_crop_by_policy_with_a_caption_of_its_image(source: tuple[Pairs, Data]) -> None:
    pairs, data = source
    [batch] = take(make_feed(pairs, data), 1)
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


def test_broken_images_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = {"2", "5"}
    images = {str(i): picture(i)[: 99 if str(i) in broken else None] for i in range(20)}
    write_tar(tmp_path / "shards" / "0.tar", captioned(images, "number KEY"))
    pairs, data = make_pairs(tmp_path, captions=["txt"])
    feed = make_feed(pairs, data)
    with caplog.at_level(logging.WARNING):
        batches = take(feed, 20, batch=3)
    assert caplog.text.count("cannot be decoded and is replaced by another one: image_broken") == 2
    assert "2 images so far" in caplog.text
    keys = [key for batch in batches for key in batch["key"]]
    assert len(keys) == 60
    assert not broken & set(keys)
    assert all(map(equal, batches[4:], take(make_feed(pairs, data), 16, batch=3, start=4)))


def test_broken_neighbours_are_replaced_by_different_images_of_other_batches_if_any_can_be_decoded(
    tmp_path: Path,
) -> None:
    images = {f"{i:02d}": picture(i)[: 99 if i < 10 else None] for i in range(40)}
    write_tar(tmp_path / "shards" / "0.tar", captioned(images, "number KEY"))
    feed = make_feed(*make_pairs(tmp_path, captions=["txt"]))
    batches = [batch["key"] for batch in take(feed, 12, batch=10)]
    assert all(len(set(keys)) == 10 for keys in batches)
    old = make_feed(*make_pairs(tmp_path, captions=["txt"]))
    old.set_up(ranks=1, batch=10, start=0, loaders=2, streams=None, order=1)
    keys = [key for batch in take(old, 4, batch=10) for key in batch["key"]]
    assert keys.count("10") == 11, "as before in a training of an earlier version"
    write_tar(tmp_path / "shards" / "0.tar", captioned({str(i): b"?" for i in range(20)}))
    with pytest.raises(UserError, match="images in a row cannot be decoded, the last: image_format"):
        take(make_feed(*make_pairs(tmp_path, captions=["txt"])), 1)


@pytest.mark.parametrize("images", ["embed", "reference"])
def test_a_reinforced_dataset_gives_the_batches_of_its_shards(tmp_path: Path, images: str) -> None:
    write_shards(tmp_path, 6, 6, captions=2)
    source = f"{tmp_path}/shards/*.tar"
    dataset = reinforce_here(
        {"source": source, "output": f"{tmp_path}/dataset", "images": images, "augmentations": {"size": 8}}
    )
    from_shards = take(make_feed(*make_pairs(tmp_path)), 4)
    pairs, data = make_pairs(tmp_path, source=dataset, images_from=[f"{tmp_path}/shards"])
    assert pairs.caption_counts().tolist() == [2] * 12  # the JSON member is stored as metadata
    assert all(map(equal, from_shards, take(make_feed(pairs, data), 4)))
    assert len(list((cache_folder() / "images").glob("*.bin"))) == (2 if images == "embed" else 0)


def test_predicted_tokens_end_with_the_first_end_token() -> None:
    tokens = tokenize(["", "fog", "a sign that says &!;", "<end_of_text> is text", "word " * 200])
    lengths = predicted_lengths(tokens, END)
    assert lengths[:2] == [1, 2]
    assert lengths[2] == tokens[2].tolist().index(END)
    assert lengths[3] > 4  # a special token within a caption is plain text
    assert lengths[4] == 75  # truncated to the context, with the end token last


def test_other_captions_or_images_are_other_data(tmp_path: Path) -> None:
    """A fine-tuning resumes only if ``data`` is equal."""

    def data() -> dict[str, Any]:
        return dict(make_feed(*make_pairs(tmp_path)).data)

    write_shards(tmp_path, 20)
    before = data()
    path = tmp_path / "shards" / "00000.tar"
    path.touch()
    assert data() == before
    assert before["data"].startswith(f"{make_feed(*make_pairs(tmp_path)).samples} images with ")
    path.write_bytes(path.read_bytes().replace(b"thing 3 of", b"thing 8 of"))
    after = data()
    assert after != before
    assert after["data"].partition(",")[0] == before["data"].partition(",")[0]
