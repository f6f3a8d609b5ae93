"""COCO's captions and Flickr's captions.txt: images in other folders, by their names, with several captions each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from reinforce.config import Input
from reinforce.engine.starter.starter import make_starter
from reinforce.settings import load_yaml
from reinforce.source.captions import captions_of
from reinforce.source.formats.base import Shard
from reinforce.source.formats.recognise import find_format, source_format
from reinforce.source.reading import read_samples
from reinforce.source.samples import RawSample, Refusal
from tests.helpers.data import picture


def write_coco(folder: Path, split: str = "val2017", count: int = 5) -> Path:
    """A part of COCO: images in ``FOLDER/<split>``, captions in ``FOLDER/annotations``."""
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "width": 4, "license": 1} for n in range(9, 9 + count)]
    annotations = [
        {"id": k, "image_id": one["id"], "caption": f"a {one['id']}\n {k} "} for k in (1, 2) for one in images
    ]
    path = folder / f"annotations/captions_{split}.json"
    for name in ("annotations", split):
        (folder / name).mkdir(exist_ok=True, parents=True)
    info = {"description": "COCO 2017 Dataset", "licenses": "x" * 600}
    path.write_text(json.dumps({"info": info, "images": images, "annotations": annotations}))
    for one in images:
        (folder / split / str(one["file_name"])).write_bytes(picture(one["id"]))
    return path


def write_flickr(folder: Path) -> Path:
    (folder / "Images").mkdir(parents=True)
    for n in range(3):
        (folder / f"Images/{n}.jpg").write_bytes(picture(n))
    lines = [f"{n}.jpg,a picture {n} {k} ." for n in range(3) for k in range(5)]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *lines, ""]))
    return folder / "captions.txt"


def read(path: Path, **spec: Any) -> list[RawSample | Refusal]:
    format_ = source_format([str(path)], None)
    return [*read_samples(Shard(str(path), "shard", format_.name), Input(**spec))]


def captions(item: RawSample | Refusal, most: int = 5) -> list[str]:
    assert isinstance(item, RawSample)
    return captions_of(item.all_sidecars, ["txt", "json:caption"], Input().limits, most)


def test_each_image_of_coco_is_a_sample_with_its_captions(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    items = read(path, images_from=str(tmp_path / "val2017"), captions_per_sample=5)
    assert [item.key for item in items] == ["9", "10", "11", "12", "13"]
    assert captions(items[1]) == ["a 10 1", "a 10 2"]
    assert isinstance(items[1], RawSample)
    assert (items[1].image, items[1].url) == (picture(10), f"{tmp_path}/val2017/000000000010.jpg")
    assert json.loads(items[1].sidecars["json"])["license"] == 1
    assert captions(read(path, images_from=str(tmp_path / "val2017"))[0], 1) == ["a 9 1"]
    format_ = find_format("coco")
    parts = [*format_.parts(str(path), 2)]
    assert [[item.key for item in format_.read(Shard(str(path), part=part), Input())] for part in parts] == [
        ["9", "10"], ["11", "12"], ["13"],
    ]  # fmt: skip
    assert [*format_.parts(str(path), 2, parts[1])] == parts[2:]


def test_images_of_flickr_are_in_the_folder_of_the_table_or_the_one_that_the_config_names(tmp_path: Path) -> None:
    path = write_flickr(tmp_path)
    items = read(path, images_from=str(tmp_path / "Images"), captions_per_sample=5)
    assert [captions(item)[4] for item in items] == ["a picture 0 4 .", "a picture 1 4 .", "a picture 2 4 ."]
    [missing, *_] = read(path)
    assert isinstance(missing, Refusal)
    assert missing.reason.value == "image_missing"
    (tmp_path / "0.jpg").write_bytes(picture(7))
    (tmp_path.parent / "out.jpg").write_bytes(picture(8))
    path.write_text("image,caption\n0.jpg,a\n1.jpg,b\n../../out.jpg,c\n")
    first, second, third = read(path, images_from=str(tmp_path / "Images"))
    assert isinstance(first, RawSample)
    assert isinstance(second, RawSample)
    assert (first.image, second.image) == (picture(7), picture(1))
    assert isinstance(third, Refusal)
    assert third.reason.value == "image_place"


def test_init_finds_captions_and_images(tmp_path: Path) -> None:
    train = write_coco(tmp_path / "coco", "train2014")
    flickr = write_flickr(tmp_path / "flickr")
    write_coco(tmp_path / "both", "train2014")
    val = write_coco(tmp_path / "both")
    for data, table, images in (
        (tmp_path / "coco", train, "coco/train2014"),
        (val, val, "both/val2017"),
        (tmp_path / "flickr", flickr, "flickr/Images"),
        (flickr, flickr, "flickr/Images"),
    ):
        config = load_yaml(make_starter(str(data), tmp_path / "x.yaml")[0])
        assert (config["source"], config["input"]["images_from"]) == (str(table), str(tmp_path / images))


def test_a_document_that_is_none_of_cocos_is_one_refusal_and_one_object_a_line_no_document(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    for content, message in {
        '{"info": {}, "images": [{"id": 1, "file_name": "a.jpg"}]': "COCO's captions, .*JSONDecodeError",
        '{"info": {}, "images": []}': "COCO's captions, .*KeyError: 'annotations'",
        '{"info": {}, "images": [{"file_name": 3}], "annotations": []}': "an image without id or file_name",
        '{"info": {}, "images": [], "annotations": [{"caption": "a"}]}': "KeyError: 'image_id'",
        '{"info": {}, "images": 3, "annotations": [[]]}': "AttributeError",
    }.items():
        path.write_text(content)
        item = read(path)[-1]
        assert isinstance(item, Refusal)
        assert item.key is None
        assert re.search(message, item.detail), item.detail
    for content in ('{"image": "a.jpg"}\n', '{"images": ["a.jpg"]}\n', '{"info": {}}\n{"info": {}}\n'):
        path.write_text(content)
        assert source_format([str(path)], None).name == "tar", "whose reading says what to set"
