"""Sets are found whole, or told what is wrong with them, before anything is judged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

from reinforce.config import Limits
from reinforce.errors import UserError
from reinforce.evaluation.classes import templates_of
from reinforce.evaluation.config import RetrievalSet, ZeroShotSet
from reinforce.evaluation.reading import Example, captions_of, label_of
from reinforce.evaluation.sets import Examples, ZeroShot, retrieval_set, zero_shot_set
from reinforce.source.shards import Refusal
from tests.helpers.evaluation import COLOURS, colour_folder, colour_shard, plain, shard

LIMITS = Limits()
NAMES = list(COLOURS)


def zero_shot(images: str | list[str], **config: Any) -> ZeroShot:
    return zero_shot_set("set", ZeroShotSet(images=images, **config), LIMITS)


def listed(examples: Examples) -> list[tuple[bytes, Any]]:
    return [(item.load(), item.target) for item in examples() if isinstance(item, Example)]


def test_shards_and_folders_give_the_same_examples(tmp_path: Path) -> None:
    folder = zero_shot(colour_folder(tmp_path / "folder"))
    url = colour_shard(tmp_path / "shard.tar")
    for form in (
        zero_shot(url, classes=NAMES),
        zero_shot([url], classes=NAMES),
        zero_shot(url, classes=NAMES, label="json:class"),
        zero_shot(url, label="json:class"),
    ):
        assert form.classes == folder.classes == NAMES
        assert listed(form.examples) == listed(folder.examples)
        assert form.images == folder.images == 12


def test_any_file_system_will_do(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(colour_folder(tmp_path / "folder"), "/val", recursive=True)
    memory.pipe("/names.txt", "\n".join(NAMES).encode() + b"\n\n")
    memory.pipe("/a.tar", Path(colour_shard(tmp_path / "a.tar")).read_bytes())
    folder = zero_shot("memory://val")
    shards = zero_shot("memory://a.tar", classes="memory://names.txt")
    assert listed(folder.examples) == listed(shards.examples)
    assert folder.classes == shards.classes == NAMES


def test_folders_are_searched_below_and_linked_ones_too(tmp_path: Path) -> None:
    for name in ("a/x/1.JPEG", "a/2.png", "b/3.webp", ".git/4.png", "b/.5.png", "b/notes.txt", "README.md"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "6.png").write_bytes(b"")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "c")
    found = zero_shot(str(tmp_path / "root"))
    assert found.classes == ["a", "b", "c"]
    assert [(item.key, item.target) for item in found.examples() if isinstance(item, Example)] == [
        ("a/2.png", 0), ("a/x/1.JPEG", 0), ("b/3.webp", 1), ("c/6.png", 2),
    ]  # fmt: skip


def test_a_limit_takes_the_first_of_shards_and_some_of_every_folder(tmp_path: Path) -> None:
    shards = zero_shot(colour_shard(tmp_path / "a.tar", each=3), classes=NAMES, limit=4)
    assert [target for _, target in listed(shards.examples)] == [0, 0, 0, 1]
    folders = zero_shot(colour_folder(tmp_path / "folder", each=3), limit=8)
    assert [target for _, target in listed(folders.examples)] == [0, 0, 1, 1, 2, 3, 4, 5]
    assert (shards.images, folders.images) == (4, 8)


def test_imagenets_folders_are_told_by_their_wordnet_ids(tmp_path: Path) -> None:
    for folder in ("n01440764", "n01443537", "n15075141"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.JPEG").write_bytes(b"")
    assert zero_shot(str(tmp_path), classes="imagenet").classes == ["tench", "goldfish", "toilet paper"]
    (tmp_path / "n15075141").rename(tmp_path / "paper")
    with pytest.raises(UserError, match=r"folder 'paper' is no class of ImageNet-1k.* \(1 of 3 folders are not\)"):
        zero_shot(str(tmp_path), classes="imagenet")
    url = shard(tmp_path / "a.tar", [("a", plain("red"), {"cls": "999"})])
    assert zero_shot(url, classes="imagenet").classes == list(IMAGENET_CLASSNAMES)


def test_templates_are_open_clips_or_ones_own(tmp_path: Path) -> None:
    def texts(templates: str | list[str]) -> list[str]:
        return [template("{cat}") for template in templates_of(templates, "set")]

    assert len(texts("openai")) == 80
    assert len(texts("simple")) == 7
    assert texts("openai")[0] == "a bad photo of a {cat}."
    assert texts("none") == ["{cat}"]
    assert texts(["a {} in {0.__class__}", "{c} and {}"]) == ["a {cat} in {0.__class__}", "{cat} and {cat}"]
    (tmp_path / "own.txt").write_text("photo of {}\n\ta {c}.\n")
    assert texts(str(tmp_path / "own.txt")) == ["photo of {cat}", "a {cat}."]


def test_groups_come_from_a_mapping_a_file_or_the_data(tmp_path: Path) -> None:
    mapping = dict.fromkeys(NAMES, "bright") | {"grey": "dull"}
    (tmp_path / "groups.json").write_text(json.dumps(mapping))
    url = colour_shard(tmp_path / "a.tar")
    expected = [mapping[name] for name in NAMES]
    for groups in (mapping, str(tmp_path / "groups.json"), "json:group"):
        assert zero_shot(url, classes=NAMES, groups=groups).groups == expected
    assert zero_shot(colour_folder(tmp_path / "folder"), groups=mapping).groups == expected
    some = zero_shot(url, classes=[*NAMES, "black"], groups="json:group").groups
    assert some == [*expected, None], "a class that no image has is of no group"


@pytest.mark.parametrize(
    ("sidecars", "field", "label"),
    [
        ({"cls": b"7\n"}, "cls", 7),
        ({"cls": b"red"}, "cls", "red"),
        ({"cls": b" "}, "cls", None),
        ({}, "cls", None),
        ({"json": b'{"class": 7}'}, "json:class", 7),
        ({"json": b'{"class": "7"}'}, "json:class", "7"),
        ({"json": b'{"class": true}'}, "json:class", None),
        ({"json": b'{"class": 7.0}'}, "json:class", None),
        ({"json": b'{"other": 7}'}, "json:class", None),
        ({"json": b"[7]"}, "json:class", None),
    ],
)
def test_a_label_is_an_index_or_a_name(sidecars: dict[str, bytes], field: str, label: int | str | None) -> None:
    assert label_of(sidecars, field) == label


@pytest.mark.parametrize(
    ("fields", "captions"),
    [
        (["txt"], ("a dog a cat  a dog",)),
        (["lines:txt"], ("a dog", "a cat")),
        (["json:texts"], ("one", "two")),
        (["json:text"], ("three",)),
        (["json:number", "absent", "lines:absent", "json:text"], ("three",)),
        (["json:number"], ()),
    ],
)
def test_an_image_has_one_or_several_captions(fields: list[str], captions: tuple[str, ...]) -> None:
    document = {"texts": ["one", " two\n", "one", "", 3], "text": "three", "number": 4}
    sidecars = {"txt": b"a dog\na cat\n\na dog\n", "json": json.dumps(document).encode()}
    assert captions_of(sidecars, fields, LIMITS) == captions


def test_images_without_a_caption_are_refused_by_name(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", [("a", plain("red"), {"txt": "red"}), ("b", plain("blue"), {"txt": " "})])
    found = retrieval_set("set", RetrievalSet(pairs=url), LIMITS)
    refused = [item for item in found.examples() if isinstance(item, Refusal)]
    assert [(item.key, item.reason.value) for item in refused] == [("b", "no_text")]
    assert found.images == 2


def faults(root: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    """What is asked for and what must be told, by the name of the fault."""
    url, folder = colour_shard(root / "a.tar"), colour_folder(root / "folder")
    (root / "bare").mkdir()
    colour_folder(root / "hole")
    (root / "hole" / "pink").mkdir()
    colour_folder(root / "loose")
    (root / "loose" / "a.png").write_bytes(b"")
    (root / "short.txt").write_text("blue\ngreen\n")
    (root / "gap.txt").write_text("blue\n\ngreen\n")
    (root / "empty.txt").write_text("\n")
    (root / "groups.json").write_text('{"blue": 1}')
    (root / "broken.json").write_text("{")
    (root / "bad.tar").write_bytes(Path(url).read_bytes()[:7000])
    two = shard(root / "two.tar", [(str(i), plain("red"), {"json": {"c": "red", "g": str(i)}}) for i in range(2)])
    unlabelled = shard(root / "no.tar", [("k1", plain("red"), {"txt": "red"})])
    nothing = shard(root / "nothing.tar", [])
    return {
        "missing folder": (lambda: zero_shot(f"{root}/none"), f"{root}/none: shard_missing"),
        "missing shard": (lambda: zero_shot(f"{root}/{{a,b}}.tar", classes=NAMES), f"{root}/b.tar: shard_missing"),
        "no match": (lambda: zero_shot(f"{root}/z*.tar"), "no file matches"),
        "damaged shard": (lambda: zero_shot(f"{root}/bad.tar", classes=NAMES), "bad.tar: shard_damaged"),
        "unknown driver": (lambda: zero_shot("nowhere://x"), "Check the part before `://`"),
        "no class folder": (lambda: zero_shot(f"{root}/bare"), f"to read shards in it write {root}/bare/*.tar"),
        "empty class folder": (lambda: zero_shot(f"{root}/hole"), "1 of 7 class folders in"),
        "images beside folders": (lambda: zero_shot(f"{root}/loose"), "1 images lie in"),
        "no image": (lambda: zero_shot(nothing, classes=NAMES), "no image in"),
        "fewer names than folders": (
            lambda: zero_shot(folder, classes=f"{root}/short.txt"),
            "classes has 2 names for 6 folders: give one name for each folder, sorted, from 'blue' to 'yellow'",
        ),
        "fewer names than labels": (
            lambda: zero_shot(url, classes=f"{root}/short.txt"),
            "label 5 is out of range: there are 2 classes, and labels count from 0. Give 6 names",
        ),
        "negative label": (
            lambda: zero_shot(shard(root / "neg.tar", [("a", plain("red"), {"cls": "-1"})]), classes=NAMES),
            "label -1 is out of range",
        ),
        "label of no class": (
            lambda: zero_shot(url, classes=NAMES[1:], label="json:class"),
            "1 labels are none of the 5 classes, such as 'blue'",
        ),
        "numbers without names": (lambda: zero_shot(url), "labels at cls are numbers, such as 0: give `classes`"),
        "no label": (lambda: zero_shot(unlabelled), "k1 has no label at cls (beside the image it has: txt)"),
        "no classes file": (lambda: zero_shot(url, classes=f"{root}/none.txt"), f"cannot read {root}/none.txt"),
        "empty classes file": (lambda: zero_shot(url, classes=f"{root}/empty.txt"), "empty.txt is empty"),
        "gap in the classes": (lambda: zero_shot(url, classes=f"{root}/gap.txt"), "line 2 of"),
        "empty classes": (lambda: zero_shot(url, classes=[]), "classes are an empty list"),
        "unknown templates": (lambda: zero_shot(folder, templates="open-ai"), "use openai, simple, none"),
        "template without a place": (lambda: zero_shot(folder, templates=["a {d}"]), "'a {d}' has no {}"),
        "no templates": (lambda: zero_shot(folder, templates=[]), "templates are an empty list"),
        "class without a group": (
            lambda: zero_shot(folder, groups={"blue": "bright"}),
            "no group for 5 of 6 classes, such as 'green'",
        ),
        "groups that are no names": (lambda: zero_shot(folder, groups=f"{root}/groups.json"), "must be a JSON object"),
        "groups that are no JSON": (lambda: zero_shot(folder, groups=f"{root}/broken.json"), "is not JSON"),
        "groups of folders in data": (lambda: zero_shot(folder, groups="json:group"), "need shards"),
        "no group in the data": (lambda: zero_shot(two, label="json:c", groups="json:h"), "no group at json:h"),
        "two groups of a class": (
            lambda: zero_shot(two, label="json:c", groups="json:g"),
            "class 'red' has two groups, '0' and (at 1) '1'",
        ),
        "retrieval from class folders": (
            lambda: retrieval_set("set", RetrievalSet(pairs=folder), LIMITS),
            f"for shards in it write {folder}/*.tar",
        ),
        "no captions": (
            lambda: retrieval_set("set", RetrievalSet(pairs=url, captions=["text"]), LIMITS),
            "none of 12 images in",
        ),
    }


FAULTS = [
    "missing folder", "missing shard", "no match", "damaged shard", "unknown driver", "no class folder",
    "empty class folder", "images beside folders", "no image", "fewer names than folders", "fewer names than labels",
    "negative label", "label of no class", "numbers without names", "no label", "no classes file",
    "empty classes file", "gap in the classes", "empty classes", "unknown templates", "template without a place",
    "no templates", "class without a group", "groups that are no names", "groups that are no JSON",
    "groups of folders in data", "no group in the data", "two groups of a class", "retrieval from class folders",
    "no captions",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_judged_by_is_told_with_its_place(tmp_path: Path, fault: str) -> None:
    ask, told = faults(tmp_path)[fault]
    with pytest.raises(UserError) as error:
        ask()
    assert told in str(error.value)


def test_no_fault_is_left_out(tmp_path: Path) -> None:
    assert list(faults(tmp_path)) == FAULTS
