"""The demo's training shards and test sets."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from reinforce.demo.data import (
    CLASSES,
    GROUPS,
    SAMPLES_PER_SHARD,
    UNSEEN_PICTURES,
    UNSEEN_STYLE,
    shared_concepts,
    write_shards,
)
from reinforce.demo.styles import PIXELS
from reinforce.errors import UserError
from tests.helpers.demo import read_samples, read_shards


def test_each_concept_is_one_sample_with_image_caption_and_sidecar(shards: list[Path]) -> None:
    keys = [key for path in shards for key in read_samples(path)]
    assert sorted(keys) == [concept.emoji.key for concept in shared_concepts()]
    assert len(set(keys)) > 1300
    for key, members in read_shards(shards).items():
        assert members.keys() == {"png", "txt", "json"}, key
        sidecar = json.loads(members["json"])
        assert sidecar["key"] == key
        assert sidecar["caption"] == members["txt"].decode()
        assert sidecar["sha256"] == hashlib.sha256(members["png"]).hexdigest()


def test_shards_have_equal_size_and_mixed_categories(shards: list[Path]) -> None:
    sizes = [len(read_samples(path)) for path in shards]
    assert max(sizes) <= SAMPLES_PER_SHARD
    assert max(sizes) - min(sizes) <= 1
    for path in shards:
        assert len({json.loads(members["json"])["category"] for members in read_samples(path).values()}) >= 8


def test_images_are_72_pixels_square(shards: list[Path]) -> None:
    with tarfile.open(shards[0]) as tar:
        for member in tar:
            if member.name.endswith(".png"):
                with Image.open(tar.extractfile(member)) as image:
                    assert image.size == (PIXELS, PIXELS)


def test_complete_shards_are_not_rewritten_and_a_damaged_one_is_repaired(tmp_path: Path) -> None:
    first, second, *_ = write_shards(tmp_path)
    whole, before = second.read_bytes(), first.stat().st_mtime_ns
    second.write_bytes(whole[:1000])
    write_shards(tmp_path)
    assert first.stat().st_mtime_ns == before
    assert second.read_bytes() == whole


def test_credits_name_the_artists_and_the_licence(shards: list[Path]) -> None:
    text = shards[0].with_name("CREDITS.txt").read_text()
    assert "Twitter" in text
    assert "CC-BY 4.0" in text


def test_test_sets_have_a_quarter_of_unseen_concepts_and_unique_class_names(shards: list[Path], tests: Path) -> None:
    ours = read_shards(shards)
    seen, unseen = (read_shards(sorted((tests / name).glob("*.tar"))) for name in (UNSEEN_STYLE, UNSEEN_PICTURES))
    theirs = seen | unseen
    assert ours.keys() == theirs.keys()
    assert not seen.keys() & unseen.keys()
    assert 0.2 < len(unseen) / len(ours) < 0.3
    for key, members in ours.items():
        assert members["txt"] == theirs[key]["txt"]
        assert members["png"] != theirs[key]["png"]
    for drawn in (ours, theirs):
        assert len({members["png"] for members in drawn.values()}) == len(drawn)
    classes = [json.loads(members["json"])["class"] for members in theirs.values()]
    assert len(set(classes)) == len(classes)
    assert sorted(classes) == sorted((tests / CLASSES).read_text().splitlines())
    groups = json.loads((tests / GROUPS).read_text())
    assert groups == {
        sample["class"]: sample["group"] for sample in map(json.loads, (m["json"] for m in theirs.values()))
    }
    apple = json.loads(theirs["1f34e"]["json"])
    assert (apple["class"], apple["group"]) == ("red apple", "food-fruit")
    assert "OpenMoji" in (tests / UNSEEN_STYLE / "CREDITS.txt").read_text()


def test_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Give another --out"):
        write_shards(tmp_path / "file" / "shards")
