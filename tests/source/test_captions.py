"""The caption policy: one or several captions and the metadata of any bytes, and those that each format gives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce.config import Config
from reinforce.engine.plan.source_shards import source_shards
from reinforce.engine.starter import make_starter
from reinforce.settings import load_yaml
from reinforce.source.config import Input, Limits
from reinforce.source.formats.base import Shard, find_format, read_samples, source_format
from reinforce.source.samples import RawSample, Refusal, caption_of, metadata_of
from tests.helpers.data import picture, write_tar
from tests.helpers.tables import write_columns, write_huggingface

LIMITS = Limits()
FIELDS = Input().captions


def caption(data: bytes, limits: Limits = LIMITS) -> str | None:
    return caption_of({"txt": data}, ["txt"], limits)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"  a  cat\t\r\n", "a  cat"),
        (b"a\ncat\x00\x1b\x7f on\xc2\x85mats", "a cat    on mats"),
        ("\ufeffein Käse 🧀".encode(), "ein Käse 🧀"),
        (b"\xfe\xff" + "Käse".encode("utf-16-be"), "Käse"),
        ("a\u3000b\u3000".encode(), "a\u3000b"),
        (b"\xef\xbb\xbf", None),
    ],
)
def test_captions_are_cleaned(data, text):
    assert caption(data) == text


def test_long_captions_are_cut_and_trimmed_and_lone_surrogates_replaced():
    assert caption("ä".encode() * 3000) == "ä" * 2000
    assert caption(b"  abc  def", Limits(caption_chars=4)) == "abc"
    data = rb'{"caption": "\ud83d\ude00 \ud83d x"}'
    assert caption_of({"json": data}, FIELDS, LIMITS) == "😀 \ufffd x"


def test_the_first_field_with_text_is_used():
    sidecars = {"txt": b" ", "json": b'{"caption": "from json", "alt": 5}', "en.txt": b"english"}
    assert caption_of(sidecars, FIELDS, LIMITS) == "from json"
    assert caption_of(sidecars | {"txt": b"from txt"}, FIELDS, LIMITS) == "from txt"
    assert caption_of(sidecars, ["json:alt", "json:none", "cls", "en.txt"], LIMITS) == "english"
    assert caption_of({}, FIELDS, LIMITS) is None


def test_json_of_900_levels_is_used_with_every_python():
    deep = {levels: b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}" for levels in (900, 901)}
    assert metadata_of({"json": deep[900]}, "all") == deep[900].decode()
    assert metadata_of({"json": deep[901]}, "all") is None
    wide = b'{"a":[' + b",".join([b"[]"] * 2000) + b"]}"
    assert metadata_of({"json": wide}, "all") == wide.decode()


def test_metadata_is_compact_json_in_the_original_order():
    data = {"json": '{"b": 1, "a": {"z": [1, 2.50]}, "big": 1180591620717411303424, "ü": "日"}'.encode()}
    assert metadata_of(data, "all") == '{"b":1,"a":{"z":[1,2.5]},"big":1180591620717411303424,"ü":"日"}'
    assert metadata_of(data, ["a", "b", "absent"]) == '{"a":{"z":[1,2.5]},"b":1}'
    assert metadata_of(data, ["absent"]) is None
    assert metadata_of(data, "none") is None
    assert metadata_of({}, "all") is None


TEXTS = st.text(st.characters())  # surrogates included


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=10,
)


@given(st.dictionaries(TEXTS, JSON, max_size=4), st.booleans())
def test_any_json_object_becomes_valid_json_with_the_same_values(document, ascii_only):
    data = json.dumps(document, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    text = metadata_of({"json": data}, "all")
    assert text is not None
    text.encode("utf-8")
    again = json.loads(text, parse_constant=pytest.fail)
    if "\\u" not in json.dumps(document) and not re.search("NaN|Infinity", json.dumps(document)):
        assert again == document


@pytest.mark.parametrize(
    ("sidecars", "members", "expected"),
    [
        ({"json": b"{}"}, ["png", "json"], ".txt, json:caption (no such field); the sample has .json, .png"),
        ({"txt": b" "}, ["png", "txt"], ".txt (empty), json:caption; the sample has .png, .txt"),
        ({"json": b"["}, ["png", "json"], ".txt, json:caption (not a JSON object); the sample has .json, .png"),
        ({"json": b'{"caption": 5}'}, ["json"], ".txt, json:caption (empty, or not a text); the sample has .json"),
        ({}, ["png", "txt"], ".txt (not read), json:caption; the sample has .png, .txt"),
        ({}, ["caption", "png"], ".txt, json:caption; the sample has .caption, .png"),
    ],
)
def test_a_missing_caption_is_explained_by_where_it_was_looked_for_and_what_is_there(sidecars, members, expected):
    assert caption_of(sidecars, FIELDS, LIMITS) is None
    sample = RawSample("k", b"", 0, 0, sidecars, members=tuple(members))
    assert sample.why_no_caption(FIELDS) == f"no caption: looked for {expected}"


FIVE = ["a cat", "a cat on a mat", "one cat", "cat", "the cat"]
PNG = picture(1)
SEVERAL = Input(captions_per_sample=5)
FLICKR = "image,caption\n" + "".join(f'{name}.png,"{text}, {name}"\n' for name in "ab" for text in FIVE)
FIVE_OF = {name: [f"{text}, {name}" for text in FIVE] for name in "ab"}


def captions(path: Path, format_: str, **spec: Any) -> dict[str, list[str]]:
    """The captions of each sample of a file by key."""
    read = Input(format=format_, **spec)
    return {item.key: item.captions(read) for item in read_samples(Shard(str(path), "s", format_), read)}


def pictures(folder: Path) -> Path:
    for name in "ab":
        (folder / f"{name}.png").write_bytes(picture(ord(name)))
    return folder


def test_members_of_a_tar_have_lists_lines_and_texts(tmp_path: Path) -> None:
    members = [
        ("lines.png", PNG), ("lines.txt", "\n".join(["", *FIVE, FIVE[0], " "]).encode()),
        ("list.png", PNG), ("list.txt", json.dumps(FIVE).encode()),
        ("json.png", PNG), ("json.json", json.dumps({"caption": [*FIVE, None, "  "]}).encode()),
        ("both.png", PNG), ("both.txt", b"a cat"), ("both.json", b'{"caption": "a cat on a mat"}'),
        ("odd.png", PNG), ("odd.txt", b"[a cat], seen from above"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    assert captions(path, "tar", captions_per_sample=5) == {
        **dict.fromkeys(("lines", "list", "json"), FIVE),
        "both": FIVE[:2],
        "odd": ["[a cat], seen from above"],
    }
    assert captions(path, "tar", captions_per_sample=2)["lines"] == FIVE[:2]
    one = captions(path, "tar")
    assert one["both"] == ["a cat"]
    assert one["json"] == [], "as before, a list in JSON is no text"


def test_columns_of_tables_have_lists_and_several_columns_are_read_together(tmp_path: Path) -> None:
    table = write_huggingface(
        tmp_path / "a.parquet", [PNG, picture(2)], {"caption": [FIVE, ["x\ny"]], "alt": ["A", "B"]}
    )
    both = {"captions": ["caption", "alt"]}
    assert [*captions(Path(table), "parquet", **both, captions_per_sample=9).values()] == [[*FIVE, "A"], ["x y", "B"]]
    assert [*captions(Path(table), "parquet", **both).values()] == [["a cat"], ["x y"]]
    assert [*captions(Path(table), "parquet", captions_per_sample=5).values()] == [FIVE, ["x y"]]


def test_rows_with_one_image_are_one_sample_and_a_part_of_a_table_counts_its_rows(tmp_path: Path) -> None:
    (pictures(tmp_path) / "captions.txt").write_text(FLICKR)
    assert captions(tmp_path / "captions.txt", "csv", captions_per_sample=5) == {
        "s-00000000": FIVE_OF["a"],
        "s-00000005": FIVE_OF["b"],
    }
    assert len(captions(tmp_path / "captions.txt", "csv")) == 10, "without it, each row is a sample"
    columns = {"image": [PNG, PNG, picture(2)], "text": ["a", "b", "c"], "key": ["1", "2", "3"]}
    table = write_columns(tmp_path / "a.parquet", columns)
    assert captions(table, "parquet", captions_per_sample=5) == {"1": ["a", "b"], "3": ["c"]}
    (tmp_path / "a.jsonl").write_text(
        '{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png", "text": ["b", "a"]}\n'
        '{"file_name": "b.png", "text": "c"}\nno JSON\n'
    )
    one, broken, other = read_samples(Shard(f"{tmp_path}/a.jsonl", "s", "jsonl"), spec := Input(captions_per_sample=5))
    assert [item.captions(spec) for item in (one, other)] == [["a", "b"], ["c"]]
    assert broken.key == "s-00000003", "rows keep their numbers"
    (tmp_path / "a.csv").write_text(FLICKR)
    parts = [*find_format("csv").parts(f"{tmp_path}/a.csv", 5)]
    read = [[*read_samples(Shard(f"{tmp_path}/a.csv", "s", "csv", part=part), spec)] for part in parts]
    assert [[item.captions(spec) for item in of] for of in read] == [[FIVE_OF["a"]], [FIVE_OF["b"]]]


JOINED = [("a", "one"), ("a", "two"), (None, "no image"), ("a", "three"), ("b", "four"), (None, ""), ("b", "five")]


@pytest.mark.parametrize("several", [5, 2, None])
@pytest.mark.parametrize("format_", ["csv", "jsonl", "parquet"])
def test_rows_of_one_image_with_broken_rows_between_them_are_one_sample_in_every_format_that_joins_rows(
    tmp_path: Path, format_: str, several: int | None
) -> None:
    """A row without an image is between rows of a, a fault of the format between those of b."""
    path = pictures(tmp_path) / f"x.{format_}"
    names, texts = [f"{name}.png" if name else None for name, _ in JOINED], [text for _, text in JOINED]
    if format_ == "csv":
        rows = [
            f"{name or ''},{text}" if text else "b.png,more,values" for name, text in zip(names, texts, strict=True)
        ]
        path.write_text("\n".join(["file_name,text", *rows, ""]))
    elif format_ == "jsonl":
        found = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, texts, strict=True)]
        found[2], found[5] = '{"text": "no image"}', "no JSON"
        path.write_text("\n".join([*found, ""]))
    else:
        names[5], texts[5] = "c.png", "of a row group that is damaged"
        write_columns(path, {"file_name": names, "text": texts}, row_group_size=1, compression="none",
                      use_dictionary=False, write_page_checksum=True)  # fmt: skip
        flip_group(path, 5)
    spec = Input(captions_per_sample=several)
    items = [*read_samples(Shard(str(path), "s", format_), spec)]
    refused = {item.key: item.reason.value for item in items if isinstance(item, Refusal)}
    fault = {None: "shard_damaged"} if format_ == "parquet" else {"s-00000005": "row_broken"}
    assert refused == {"s-00000002": "image_missing" if format_ == "csv" else "no_image", **fault}
    captions = {item.key: item.captions(spec) for item in items if isinstance(item, RawSample)}
    if several is None:
        assert [*captions.values()] == [["one"], ["two"], ["three"], ["four"], ["five"]]
    else:
        joined = {"s-00000000": ["one", "two", "three"], "s-00000004": ["four", "five"]}
        assert captions == {key: of[:several] for key, of in joined.items()}


def flip_group(path: Path, number: int) -> None:
    """Change a bit in the texts of a row group."""
    leaf = pq.read_metadata(path).row_group(number).column(1)
    content = bytearray(path.read_bytes())
    content[leaf.data_page_offset + leaf.total_compressed_size - 3] ^= 0x10
    path.write_bytes(content)


def test_captions_in_a_column_that_the_first_row_of_an_image_lacks_are_read(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png"}, {"file_name": "a.png", "text": "one"}, {"text": "two", "file_name": "a.png"}]
    (pictures(tmp_path) / "x.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert captions(tmp_path / "x.jsonl", "jsonl", captions_per_sample=5) == {"s-00000000": ["one", "two"]}


def test_rows_of_metadata_with_one_file_are_one_sample(tmp_path: Path) -> None:
    rows = FLICKR.replace("image,caption", "file_name,text")
    (pictures(tmp_path) / "metadata.csv").write_text(rows)
    for several, found in ((5, [*FIVE_OF.values()]), (None, [of[:1] for of in FIVE_OF.values()])):
        spec = Input(captions_per_sample=several)
        shards = source_shards(Config(source=str(tmp_path), output="out", input=spec))
        [(name, listing)] = shards.lists.items()
        items = read_samples(Shard(shards.urls[0], name, "folder", listing), spec)
        assert [item.captions(spec) for item in items] == found


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


def read_found(path: Path, **spec: Any) -> list[RawSample | Refusal]:
    format_ = source_format([str(path)], None)
    return [*read_samples(Shard(str(path), "shard", format_.name), Input(**spec))]


def test_each_image_of_coco_is_a_sample_with_its_captions(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    items = read_found(path, images_from=str(tmp_path / "val2017"), captions_per_sample=5)
    assert [item.key for item in items] == ["9", "10", "11", "12", "13"]
    assert items[1].captions(SEVERAL) == ["a 10 1", "a 10 2"]
    assert (items[1].image, items[1].url) == (picture(10), f"{tmp_path}/val2017/000000000010.jpg")
    assert json.loads(items[1].sidecars["json"])["license"] == 1
    assert read_found(path, images_from=str(tmp_path / "val2017"))[0].captions(SEVERAL) == ["a 9 1"]
    format_ = find_format("coco")
    parts = [*format_.parts(str(path), 2)]
    assert [[item.key for item in format_.read(Shard(str(path), part=part), Input())] for part in parts] == [
        ["9", "10"], ["11", "12"], ["13"],
    ]  # fmt: skip
    assert [*format_.parts(str(path), 2, parts[1])] == parts[2:]


def test_images_of_flickr_are_in_the_folder_of_the_table_or_the_one_that_the_config_names(tmp_path: Path) -> None:
    path = write_flickr(tmp_path)
    items = read_found(path, images_from=str(tmp_path / "Images"), captions_per_sample=5)
    assert [item.captions(SEVERAL)[4] for item in items] == [f"a picture {n} 4 ." for n in range(3)]
    assert read_found(path)[0].reason.value == "image_missing"
    (tmp_path / "0.jpg").write_bytes(picture(7))
    (tmp_path.parent / "out.jpg").write_bytes(picture(8))
    path.write_text("image,caption\n0.jpg,a\n1.jpg,b\n../../out.jpg,c\n")
    first, second, third = read_found(path, images_from=str(tmp_path / "Images"))
    assert (first.image, second.image, third.reason.value) == (picture(7), picture(1), "image_place")


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
        item = read_found(path)[-1]
        assert item.key is None
        assert re.search(message, item.detail), item.detail
    for content in ('{"image": "a.jpg"}\n', '{"images": ["a.jpg"]}\n', '{"info": {}}\n{"info": {}}\n'):
        path.write_text(content)
        assert source_format([str(path)], None).name == "tar", "whose reading says what to set"
