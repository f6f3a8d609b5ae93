"""Images with captions: scans of shards, tables and datasets, the held-out part, and batches."""

import base64
import gzip
import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import schemas
from reinforce.captioning.config import Data
from reinforce.captioning.feed import CaptionFeed, predicted_lengths
from reinforce.captioning.images import read_images
from reinforce.captioning.pairs import PAIRS_FILE, ImageLocation, Pairs, load_pairs
from reinforce.captioning.scan import scan
from reinforce.config import Augmentations, Limits, RandAugment
from reinforce.dataset.augment.records import replay
from reinforce.dataset.augment.sampling import sample_augmentation
from reinforce.errors import UserError
from reinforce.images.policy import decode
from teachers.open_clip.tokenizer import Tokenizer
from teachers.weights import cache_folder
from tests.helpers.captioning import captioned, captioner_config, equal, take, write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.helpers.tables import write_huggingface
from tests.helpers.tiny_coca import END
from tests.helpers.web import SECRET, redirecting_server

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


def test_samples_without_captions_are_left_out_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [(f"{i}.png", picture(i)) for i in range(30)]
    members += [("30.png", picture(30)), ("30.json", b'{"captions": []}'), ("31.txt", b"no image")]
    members += [member for i in range(40, 60) for member in ((f"{i}.png", picture(i)), (f"{i}.txt", b"c"))]
    data = Data(source=str(write_tar(tmp_path / "0.tar", members)))
    with caplog.at_level(logging.WARNING):
        table = scan(data.source, data, "data")
    assert table["key"].to_pylist() == [str(i) for i in range(40, 60)]
    assert "32 samples refused (31 no_text, 1 no_image), 20 images with captions kept" in caplog.text
    assert "refused 0: no_text (members other than the image: none)" in caplog.text


def keys(pairs: Pairs) -> list[str]:
    return [str(key) for key in pairs.table["key"].to_pylist()]


def test_pairs_hold_captions_and_image_locations_and_are_kept(tmp_path: Path) -> None:
    write_shards(tmp_path, 7, 5, captions=3)
    pairs = load_pairs(captioner_config(tmp_path))
    assert keys(pairs) == [f"{shard:03d}{i:04d}" for shard, size in enumerate((7, 5)) for i in range(size)]
    assert pairs.captions(8) == [f"thing 1 of shard 1, view {n}" for n in range(3)]
    assert read_images([pairs.location(i) for i in (8, 0)]) == [picture(1001), picture(0)]
    assert len(pairs.training()) + len(pairs.held_out()) == 12
    assert pairs.table.schema.equals(schemas.PAIRS)
    file = tmp_path / "out" / PAIRS_FILE
    written = file.stat().st_mtime_ns
    assert len(load_pairs(captioner_config(tmp_path))) == 12
    assert file.stat().st_mtime_ns == written, "scanned again only if the data has changed"
    write_shards(tmp_path, 15, 5)
    assert len(load_pairs(captioner_config(tmp_path))) == 20


def test_the_held_out_share_is_seeded_by_key_and_stored(tmp_path: Path) -> None:
    write_shards(tmp_path, 60)
    config = captioner_config(tmp_path)
    first = load_pairs(config)
    again = load_pairs(config.model_copy(update={"output": str(tmp_path / "other")}))
    other = load_pairs(config.model_copy(update={"output": str(tmp_path / "third"), "seed": 1}))
    assert keys(first.held_out()) == keys(again.held_out()) != keys(other.held_out())
    assert 6 < len(first.held_out()) < 30
    stored = pq.read_table(tmp_path / "out" / PAIRS_FILE)
    held_out = stored.filter(stored["held_out"])["key"].to_pylist()
    assert held_out == keys(first.held_out())
    assert not set(held_out) & set(keys(first.training()))
    order = keys(first.held_out().shuffled(0))  # a part of the held-out images is a seeded sample
    assert sorted(order) == held_out != order
    assert keys(first.held_out().shuffled(0).first(3)) == order[:3]
    assert keys(first.held_out().shuffled(1)) != order
    assert keys(first.held_out().first(None)) == held_out


def test_faults_of_the_data_are_user_errors(tmp_path: Path) -> None:
    config = captioner_config(tmp_path)

    def fault(**data: object) -> str:
        with pytest.raises(UserError) as caught:
            load_pairs(config.model_copy(update={"data": config.data.model_copy(update=data)}))
        return str(caught.value)

    assert "no file matches" in fault()
    assert "0.tar does not exist" in fault(source=f"{tmp_path}/0.tar")
    write_shards(tmp_path, 20)
    assert "none of 20 samples has an image and a caption at json:text" in fault(captions=["json:text"])
    few, big = config.held_out.model_copy(update={"share": 1e-9}), config.train.model_copy(update={"batch": 64})
    with pytest.raises(UserError, match="0 of 20 images are held out"):
        load_pairs(config.model_copy(update={"held_out": few}))
    with pytest.raises(UserError, match=r"fewer than train\.batch \(64\)"):
        load_pairs(config.model_copy(update={"train": big}))
    shard = tmp_path / "shards" / "00000.tar"
    packed = shard.with_name("packed.tar.gz")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    assert "which a compressed tar does not allow" in fault(source=str(packed))
    shard.write_bytes(shard.read_bytes()[:5000])
    assert "shard_damaged" in fault()
    shard.write_bytes(b"no tar" * 200)
    assert "shard_unreadable" in fault()


def test_url_options_are_used_for_reading_and_not_stored(tmp_path: Path) -> None:
    import fsspec

    write_shards(tmp_path, 12)
    fsspec.filesystem("memory").pipe("/secret/0.tar", (tmp_path / "shards" / "00000.tar").read_bytes())
    source = "simplecache::memory://secret/0.tar"
    config = captioner_config(tmp_path, data={"source": source, "threads": 1})
    pairs = load_pairs(config)
    assert pairs.location(3).url == source
    assert set(pairs.table["url"].to_pylist()) == {"memory://secret/0.tar"}
    assert read_images([pairs.location(3)]) == [picture(3)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "folder", "csv"])
def test_pairs_of_tables_and_folders_have_their_images(tmp_path: Path, kind: str) -> None:
    images = [picture(number, 9, 9) for number in range(40)]
    captions = [None if number == 3 else f"caption {number}" for number in range(40)]
    folder = tmp_path / "source"
    folder.mkdir()
    for number, image in enumerate(images):
        (folder / f"{number:02d}.png").write_bytes(image)
        if captions[number]:
            (folder / f"{number:02d}.txt").write_text(f"caption {number}")
    rows = [f"{number:02d}.png,{text or ''}\n" for number, text in enumerate(captions)]
    encoded = [{"image": base64.b64encode(i).decode(), "text": t} for i, t in zip(images, captions, strict=True)]
    sources = {"folder": folder, "csv": folder / "x.csv", "jsonl": tmp_path / "x.jsonl", "parquet": tmp_path / "x.pq"}
    if kind == "csv":
        sources["csv"].write_text("file_name,text\n" + "".join(rows))
    sources["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in encoded))
    write_huggingface(sources["parquet"], images, {"text": captions})
    config = captioner_config(tmp_path)
    data = config.data.model_copy(update={"source": str(sources[kind]), "captions": ["txt"]})
    pairs = load_pairs(config.model_copy(update={"data": data}))
    assert [pairs.captions(i) for i in range(39)] == [[text] for text in captions if text]
    expected = [image for number, image in enumerate(images) if number != 3]
    assert read_images([pairs.location(i) for i in (10, 0, 3)]) == [expected[i] for i in (10, 0, 3)]
    assert read_images([pairs.training().location(0)])[0] in expected
    again = load_pairs(config.model_copy(update={"data": data}))
    assert again.table == pairs.table


def test_pairs_are_not_read_from_web_addresses(tmp_path: Path) -> None:
    with redirecting_server() as (address, _):
        (tmp_path / "x.csv").write_text(f"url,text\n{address}/0.png,a thing\n")
        config = captioner_config(tmp_path)
        data = {"source": f"{tmp_path}/x.csv", "captions": ["txt"], "images_from": [address]}
        with pytest.raises(UserError, match="names images at web addresses"):
            load_pairs(config.model_copy(update={"data": config.data.model_copy(update=data)}))


def test_images_of_parquet_files_are_read_from_a_local_copy(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    table = pa.table({"key": ["x", "y", "z"], "image": [b"first", b"second", b"third"]})
    pq.write_table(table, path, row_group_size=2)
    locations = [ImageLocation(str(path), offset, length) for offset, length in ((11, 5), (0, 5), (5, 6))]
    assert read_images(locations) == [b"third", b"first", b"second"]
    [copy] = (cache_folder() / "images").glob("*.bin")
    assert copy.read_bytes() == b"firstsecondthird"
    os.truncate(path, 0)  # not read again
    assert read_images(locations[:1]) == [b"third"]


def test_a_web_server_can_redirect_shards_of_the_config_but_no_reference() -> None:
    with redirecting_server() as (address, asked):
        own = ImageLocation(f"{address}/0.tar", 0, len(SECRET))
        assert read_images([own]) == [SECRET]
        assert "/secret" in asked
        asked.clear()
        read_images([own._replace(referenced=True)])
        assert {*asked} == {"/0.tar"}
