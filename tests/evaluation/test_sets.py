"""Evaluation sets: their examples, labels, captions and class names, and faults that are reported at the start."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from reinforce.errors import UserError
from reinforce.evaluation.classes import load_class_names, load_templates
from reinforce.evaluation.command import build_evaluation
from reinforce.evaluation.config import RetrievalSet, ZeroShotSet
from reinforce.evaluation.kinds.base import Labelled, read_labels
from reinforce.evaluation.reading import (
    LabelledImage,
    SetReader,
    make_loader,
    read_captions,
    read_label,
    read_samples,
)
from reinforce.source.config import Input, Limits
from tests.helpers.evaluation import (
    COLOURS,
    open_retrieval,
    solid_image,
    write_colour_folder,
    write_colour_shard,
    write_shard,
)
from tests.helpers.reinforced import small_dataset
from tests.helpers.tables import write_huggingface

LIMITS = Limits()
NAMES = list(COLOURS)


def zero_shot(images: str | list[str], **config: Any) -> Labelled:
    own = ZeroShotSet(images=images, **config)
    load_templates(own.templates, "set")
    return read_labels(own, "set", LIMITS, (), own.groups)


def list_examples(examples: SetReader) -> list[tuple[bytes, Any]]:
    return [(item.load(), item.target) for item in examples() if isinstance(item, LabelledImage)]


def test_shards_and_folders_in_any_file_system_give_the_same_examples(tmp_path: Path) -> None:
    folder = zero_shot(write_colour_folder(tmp_path / "folder"))
    url = write_colour_shard(tmp_path / "shard.tar")
    for form in (
        zero_shot(url, classes=NAMES),
        zero_shot([url], classes=NAMES),
        zero_shot(url, classes=NAMES, label="json:class"),
        zero_shot(url, label="json:class"),
    ):
        assert form.classes == folder.classes == NAMES
        assert list_examples(form.examples) == list_examples(folder.examples)
        assert form.images == folder.images == 12
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "folder"), "/val", recursive=True)
    memory.pipe({"/names.txt": "\n".join(NAMES).encode() + b"\n\n", "/a.tar": Path(url).read_bytes()})
    for form in (zero_shot("memory://val"), zero_shot("memory://a.tar", classes="memory://names.txt")):
        assert list_examples(form.examples) == list_examples(folder.examples)
        assert form.classes == NAMES


def test_parquet_and_csv_give_the_examples_of_shards(tmp_path: Path) -> None:
    url = write_colour_shard(tmp_path / "shard.tar")
    of_shard = zero_shot(url, classes=NAMES)
    images = [image for image, _ in list_examples(of_shard.examples)]
    labels = [label for _, label in list_examples(of_shard.examples)]
    parquet = write_huggingface(tmp_path / "set.parquet", images, {"label": labels, "name": [NAMES[i] for i in labels]})
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(image)
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    (tmp_path / "set.csv").write_text(f"file_name,cls\n{rows}")
    for form in (
        zero_shot(parquet, classes=NAMES),
        zero_shot(parquet, label="name"),
        zero_shot(f"{tmp_path}/set.csv", classes=NAMES, label="cls"),
    ):
        assert list_examples(form.examples) == list_examples(of_shard.examples)
        assert (form.classes, form.images) == (NAMES, 12)
    with pytest.raises(UserError, match=r"no label at no \(its columns: image, label, name\): set `label` to a column"):
        zero_shot(parquet, classes=NAMES, label="no")


def test_pairs_are_read_from_a_folder_a_table_and_a_list_of_captions(tmp_path: Path) -> None:
    images = [solid_image(colour) for colour in NAMES[:2]]
    for name, image in zip("ab", images, strict=True):
        (tmp_path / f"{name}.png").write_bytes(image)
        (tmp_path / f"{name}.txt").write_text(f"one {name}")
    rows = {"captions": [["one a"], ["one b", "two b"]]}
    parquet = write_huggingface(tmp_path / "parquet" / "x.parquet", images, rows)
    captions = RetrievalSet(pairs=parquet, captions=["json:captions"])
    found = open_retrieval(captions)
    assert list_examples(found.examples) == [(images[0], ("one a",)), (images[1], ("one b", "two b"))]
    folder = open_retrieval(RetrievalSet(pairs=str(tmp_path)))
    assert list_examples(folder.examples) == [(images[0], ("one a",)), (images[1], ("one b",))]


def test_subfolders_and_linked_folders_are_searched(tmp_path: Path) -> None:
    for name in ("a/x/1.JPEG", "a/2.png", "b/3.webp", ".git/4.png", "b/.5.png", "b/notes.txt", "README.md"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "6.png").write_bytes(b"")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "c")
    image_set = zero_shot(str(tmp_path / "root"))
    assert image_set.classes == ["a", "b", "c"]
    assert [(item.key, item.target) for item in image_set.examples() if isinstance(item, LabelledImage)] == [
        ("a/2.png", 0), ("a/x/1.JPEG", 0), ("b/3.webp", 1), ("c/6.png", 2),
    ]  # fmt: skip


def test_a_limit_takes_the_first_images_of_shards_and_some_of_every_folder(tmp_path: Path) -> None:
    shards = zero_shot(write_colour_shard(tmp_path / "a.tar", each=3), classes=NAMES, limit=4)
    assert [target for _, target in list_examples(shards.examples)] == [0, 0, 0, 1]
    folders = zero_shot(write_colour_folder(tmp_path / "folder", each=3), limit=8)
    assert [target for _, target in list_examples(folders.examples)] == [0, 0, 1, 1, 2, 3, 4, 5]
    assert (shards.images, folders.images) == (4, 8)


def test_imagenet_folders_are_named_by_wordnet_ids(tmp_path: Path) -> None:
    for folder in ("n01440764", "n01443537", "n15075141"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.JPEG").write_bytes(b"")
    assert zero_shot(str(tmp_path), classes="imagenet").classes == ["tench", "goldfish", "toilet paper"]
    (tmp_path / "n15075141").rename(tmp_path / "paper")
    with pytest.raises(UserError, match=r"folder 'paper' is no class of ImageNet-1k.* \(1 of 3 folders are not\)"):
        zero_shot(str(tmp_path), classes="imagenet")
    url = write_shard(tmp_path / "a.tar", [("a", solid_image("red"), {"cls": "999"})])
    assert zero_shot(url, classes="imagenet").classes == list(IMAGENET_CLASSNAMES)


def test_groups_come_from_a_mapping_a_file_or_the_data(tmp_path: Path) -> None:
    mapping = dict.fromkeys(NAMES, "bright") | {"grey": "dull"}
    (tmp_path / "groups.json").write_text(json.dumps(mapping))
    url = write_colour_shard(tmp_path / "a.tar")
    expected = [mapping[name] for name in NAMES]
    for groups in (mapping, str(tmp_path / "groups.json"), "json:group"):
        assert zero_shot(url, classes=NAMES, groups=groups).groups == expected
    assert zero_shot(write_colour_folder(tmp_path / "folder"), groups=mapping).groups == expected
    some = zero_shot(url, classes=[*NAMES, "black"], groups="json:group").groups
    assert some == [*expected, None], "a class without images has no group"


def test_broken_json_among_labels_is_refused_like_a_broken_image(tmp_path: Path) -> None:
    samples = [(key, solid_image("red"), {"json": text}) for key, text in (
        ("a", '{"class": "red"}'), ("b", '{"class": "re'), ("c", '{"class": "blue"}'), ("d", "[]"),
    )]  # fmt: skip
    image_set = zero_shot(write_shard(tmp_path / "a.tar", samples), label="json:class")
    assert (image_set.classes, image_set.images) == (["blue", "red"], 4)
    found = [
        item.target if isinstance(item, LabelledImage) else (item.key, item.reason.value)
        for item in image_set.examples()
    ]
    assert found == [1, ("b", "sidecar_broken"), 0, ("d", "sidecar_broken")]
    with pytest.raises(UserError, match=r"every image in .* is refused, the last \(d\): \.json: not a JSON object"):
        zero_shot(write_shard(tmp_path / "b.tar", samples[1::2]), label="json:class")


#: The images of a faulty set, its other keys, and a part of the error; {root} is a folder with the files of ``write``.
FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("{root}/{a,b}.tar", {"classes": NAMES}, "b.tar: shard_missing"),
    ("{root}/bad.tar", {"classes": NAMES}, "bad.tar: shard_damaged"),
    ("{root}/bare", {}, "to read shards in it write {root}/bare/*.tar"),
    ("{root}/hole", {}, "1 of 7 class folders in"),
    ("{root}/loose", {}, "1 image directly in"),
    ("{root}/nothing.tar", {"classes": NAMES}, "no image in"),
    ("{root}/folder", {"classes": "{root}/short.txt"}, "classes has 2 names for 6 folders: give one name for each"),
    ("{root}/a.tar", {"classes": "{root}/short.txt"}, "4 labels without a class among 2, such as 2: add classes"),
    ("{root}/minus.tar", {"classes": NAMES}, "1 label without a class among 6, such as -1"),
    ("{root}/a.tar", {"classes": NAMES[1:], "label": "json:class"}, "1 label without a class among 5, such as 'blue'"),
    ("{root}/a.tar", {}, "labels at cls are numbers, such as 0: give `classes`"),
    ("{root}/no.tar", {}, "k1 has no label at cls (its other members: txt)"),
    ("{root}/a.tar", {"classes": "{root}/none.txt"}, "{root}/none.txt cannot be read: FileNotFoundError"),
    ("{root}/a.tar", {"classes": "{root}/empty.txt"}, "empty.txt is empty"),
    ("{root}/a.tar", {"classes": "{root}/gap.txt"}, "line 2 of"),
    ("{root}/a.tar", {"classes": []}, "classes are an empty list"),
    ("{root}/folder", {"templates": "open-ai"}, "use openai, simple, none"),
    ("{root}/folder", {"templates": ["a {d}"]}, "'a {d}' has no {}"),
    ("{root}/folder", {"templates": []}, "templates are an empty list"),
    ("{root}/folder", {"groups": {"blue": "bright"}}, "no group for 5 of 6 classes, such as 'green'"),
    ("{root}/folder", {"groups": "{root}/groups.json"}, "must be a JSON object"),
    ("{root}/folder", {"groups": "{root}/broken.json"}, "is not JSON"),
    ("{root}/folder", {"groups": "json:group"}, "need shards"),
    ("{root}/two.tar", {"label": "json:c", "groups": "json:h"}, "no group at json:h"),
    ("{root}/two.tar", {"label": "json:c", "groups": "json:g"}, "class 'red' has two groups, '0' and (at 1) '1'"),
]


def write_faulty(root: Path) -> None:
    url, red = write_colour_shard(root / "a.tar"), solid_image("red")
    for name in ("folder", "hole", "loose"):
        write_colour_folder(root / name)
    for name in ("bare", "hole/pink"):
        (root / name).mkdir()
    texts = {"short.txt": "blue\ngreen\n", "gap.txt": "blue\n\ngreen\n", "empty.txt": "\n", "loose/a.png": ""}
    for name, text in {**texts, "groups.json": '{"blue": 1}', "broken.json": "{"}.items():
        (root / name).write_text(text)
    (root / "bad.tar").write_bytes(Path(url).read_bytes()[:7000])
    write_shard(root / "two.tar", [(str(i), red, {"json": {"c": "red", "g": str(i)}}) for i in range(2)])
    write_shard(root / "no.tar", [("k1", red, {"txt": "red"})])
    write_shard(root / "minus.tar", [("a", red, {"cls": "-1"})])
    write_shard(root / "nothing.tar", [])


def test_a_faulty_set_is_reported(tmp_path: Path) -> None:
    def placed(value: Any) -> Any:
        return value.replace("{root}", str(tmp_path)) if isinstance(value, str) else value

    write_faulty(tmp_path)
    for images, keys, message in FAULTS:
        with pytest.raises(UserError) as error:
            zero_shot(placed(images), **{key: placed(value) for key, value in keys.items()})
        assert placed(message) in str(error.value), (images, keys)
    for pairs, captions in (("folder", "txt"), ("a.tar", "text")):
        with pytest.raises(UserError, match=rf"none of 12 images in \S+ has a caption at {captions}: set"):
            open_retrieval(RetrievalSet(pairs=f"{tmp_path}/{pairs}", captions=[captions]))


def test_templates_and_class_names_are_built_in_given_or_in_a_file(tmp_path: Path) -> None:
    def texts(templates: str | list[str]) -> list[str]:
        return [template("{cat}") for template in load_templates(templates, "set")]

    assert len(texts("openai")) == 80
    assert len(texts("simple")) == 7
    assert texts("openai")[0] == "a bad photo of a {cat}."
    assert texts("none") == ["{cat}"]
    assert texts(["a {} in {0.__class__}", "{c} and {}"]) == ["a {cat} in {0.__class__}", "{cat} and {cat}"]
    (tmp_path / "own.txt").write_text("photo of {}\n\ta {c}.\n")
    assert texts(str(tmp_path / "own.txt")) == ["photo of {cat}", "a {cat}."]
    (tmp_path / "names.txt").write_bytes("\ufeffred\r\n dark blue \r\n\r\n".encode())
    assert load_class_names(["red", "blue"], "set") == ["red", "blue"]
    assert load_class_names(str(tmp_path / "names.txt"), "set") == ["red", "dark blue"]
    assert load_class_names("imagenet", "set") == list(IMAGENET_CLASSNAMES)
    with pytest.raises(UserError, match=r"none\.png cannot be read: FileNotFoundError"):
        make_loader(str(tmp_path))(f"{tmp_path}/none.png")


def test_images_by_reference_are_read_from_named_folders(tmp_path: Path) -> None:
    url = small_dataset(tmp_path, (2,), images="reference")
    message = rf'add evaluate\.images_from: \["{tmp_path}/source"\], or --set images_from="{tmp_path}/source"'
    with pytest.raises(UserError, match=message):
        list(read_samples(url, Input(), "set"))
    assert len(list(read_samples(url, Input(images_from=[f"{tmp_path}/source"]), "set"))) == 2
    evaluation = build_evaluation(None, retrieval=[f"pairs={url}"], overrides=[f"images_from={tmp_path}/source"])
    assert evaluation.images_from == [f"{tmp_path}/source"]


def test_label_is_an_index_or_a_name() -> None:
    for text, label in ((b"7\n", 7), (b"red", "red"), (b" ", None)):
        assert read_label({"cls": text}, "cls") == label
    assert read_label({}, "cls") is None
    texts = ('{"class": 7}', '{"class": "7"}', '{"class": true}', '{"class": 7.0}', '{"other": 7}', "[7]")
    labels = [read_label({"json": text.encode()}, "json:class") for text in texts]
    assert labels == [7, "7", None, None, None, None]


CAPTIONS: list[tuple[list[str], tuple[str, ...]]] = [
    (["txt"], ("a dog a cat  a dog",)),
    (["lines:txt"], ("a dog", "a cat")),
    (["json:texts"], ("one", "two")),
    (["json:text"], ("three",)),
    (["json:number", "absent", "lines:absent", "json:text"], ("three",)),
    (["json:number"], ()),
    (["jmespath:regions[?size > `1`].phrase"], ("four", "five")),
    (["jmespath:join(', ', [text, regions[0].phrase][?@])"], ("three, four",)),
    (["jmespath:join(', ', number)", "jmespath:nothing.there", "jmespath:number", "json:text"], ("three",)),
]


def test_captions_come_from_the_first_field_that_has_any() -> None:
    regions = [{"phrase": "four", "size": 2}, {"phrase": "six", "size": 1}, {"phrase": "five", "size": 3}]
    document = {"texts": ["one", " two\n", "one", "", 3], "text": "three", "number": 4, "regions": regions}
    sidecars = {"txt": b"a dog\na cat\n\na dog\n", "json": json.dumps(document).encode()}
    for fields, captions in CAPTIONS:
        assert read_captions(sidecars, fields, Limits()) == captions


def test_two_folders_of_one_class_by_their_names_are_refused_unless_their_classes_are_named(tmp_path: Path) -> None:
    for folder in ("red_thing", "red thing", "Blue"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(solid_image("red"))
    with pytest.raises(
        UserError, match="folders 'red thing' and 'red_thing' are one class, 'red thing', to every text"
    ):
        zero_shot(str(tmp_path))
    names = ["sky", "apple", "rose"]
    assert zero_shot(str(tmp_path), classes=names).classes == names
