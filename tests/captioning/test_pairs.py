"""Images with captions: how shards, tables and datasets are scanned, the held-out part, and reading of images."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import schemas
from reinforce.captioning.config import Data
from reinforce.captioning.images import read_images
from reinforce.captioning.pairs import PAIRS_FILE, ImageLocation, Pairs, load_pairs
from reinforce.captioning.scan import scan
from reinforce.errors import UserError
from teachers.weights import cache_folder
from tests.helpers.captioning import captioner_config, write_shards
from tests.helpers.data import picture, write_tar
from tests.helpers.tables import write_huggingface
from tests.helpers.web import SECRET, redirecting_server


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
