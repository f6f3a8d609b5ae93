"""The demo's captions, shards and test sets: names, drawings, icon sets, symbols, teachers' data and wrong captions."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from examples.demo import glyphs, teacher_data
from examples.demo.data import (
    CLASSES,
    GROUPS,
    SAMPLES_PER_SHARD,
    UNSEEN_PICTURES,
    UNSEEN_STYLE,
    shared_concepts,
    write_shards,
    write_wrong_captions,
)
from examples.demo.names import Concept, make_phrase, name_emoji, select_concepts
from examples.demo.styles import PIXELS, render_cropped
from examples.demo.teacher_data import write_teacher_data
from reinforce.errors import UserError
from tests.helpers.data import members_of, write_tar
from tests.helpers.demo import read_samples, read_shards


def test_each_concept_is_one_sample_in_shards_of_equal_size_and_mixed_categories(shards: list[Path]) -> None:
    read = [read_samples(path) for path in shards]
    assert SAMPLES_PER_SHARD >= max(map(len, read)) <= 1 + min(map(len, read))
    for samples in read:
        assert len({json.loads(members["json"])["category"] for members in samples.values()}) >= 8
    keys = [key for samples in read for key in samples]
    assert sorted(keys) == [concept.emoji.key for concept in shared_concepts()]
    assert len(set(keys)) > 1300
    for key, members in read_shards(shards).items():
        assert members.keys() == {"png", "txt", "json"}, key
        sidecar = json.loads(members["json"])
        assert sidecar["key"] == key
        assert sidecar["caption"] == members["txt"].decode()
        assert sidecar["sha256"] == hashlib.sha256(members["png"]).hexdigest()
        with Image.open(io.BytesIO(members["png"])) as image:
            assert image.size == (72, 72)
    credits = shards[0].with_name("CREDITS.txt").read_text()
    assert "Twitter" in credits
    assert "CC-BY 4.0" in credits


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
    credits = (tests / UNSEEN_STYLE / "CREDITS.txt").read_text()
    assert "OpenMoji" in credits
    assert "CC BY-SA 4.0" in credits


def test_svg_is_cropped_to_what_is_drawn() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 40"><path fill="red" d="M10 15h20v10h-20z"/></svg>'
    image = Image.open(io.BytesIO(render_cropped(svg))).convert("RGBA")
    assert image.size == (PIXELS, PIXELS)
    assert image.getchannel("A").getbbox() == (0, PIXELS // 4, PIXELS, 3 * PIXELS // 4)


def test_symbols_are_black_and_have_the_name_of_a_concept() -> None:
    concepts = [concept for concept in shared_concepts() if concept.name in ("anchor", "camera", "mouse", "cat face")]
    found = [(style, concept.name, png) for style, concept, png in glyphs.read_symbols(concepts)]
    assert [(style, name) for style, name, _ in found] == [
        ("material", "anchor"), ("material", "camera"), ("fontawesome", "anchor"), ("fontawesome", "camera"),
    ]  # fmt: skip  # the symbol `mouse` is a computer mouse
    for _, _, png in found:
        with Image.open(io.BytesIO(png)) as image:
            assert (image.size, image.mode) == ((PIXELS, PIXELS), "RGBA")
            assert image.convert("RGB").getextrema() == ((0, 0),) * 3
            left, top, right, bottom = image.getchannel("A").point(lambda alpha: 255 * (alpha > 99)).getbbox() or ()
            assert max(right - left, bottom - top) >= PIXELS - 2  # without margins
    assert "SIL OFL" in glyphs.credits_text()


def test_what_is_missing_or_cannot_be_written_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"")])
    with pytest.raises(UserError, match="has no captions to exchange"):
        write_wrong_captions(f"{tmp_path}/*.tar", tmp_path / "wrong", share=0.4)
    with pytest.raises(UserError, match="Give another --out"):
        write_shards(tmp_path / "0.tar" / "shards")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm, which is not installed"):
        teacher_data.fetch_packages(tmp_path / "npm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"qtawesome.*pip install -e"):
        next(glyphs.read_symbols([]))


def test_drawings_and_keywords_are_read_by_code_points(npm: Path) -> None:
    teacher_data.fetch_packages(npm)  # downloads nothing again
    drawings = teacher_data.read_drawings(npm, "noto")
    assert "1f34e" in drawings
    assert len(drawings) == 2
    assert Image.open(io.BytesIO(drawings["1f34e"]())).convert("RGB").getpixel((36, 36)) == (255, 0, 0)
    assert teacher_data.read_drawings(npm, "fxemoji").keys() == drawings.keys()  # whose names have no hyphens
    assert teacher_data.read_keywords(npm) == {"1f34e": ["fruit", "ripe"]}
    assert "Apache-2.0" in teacher_data.credits_of("noto")


def test_teacher_data_excludes_openmoji_pictures_of_unseen_concepts(
    npm: Path, tmp_path: Path, few_concepts: Sequence[Concept]
) -> None:
    write_teacher_data(tmp_path, npm)
    unseen = {concept.emoji.key for concept in few_concepts if concept.unseen}
    assert len(unseen) > 5
    folders = {path.name: read_shards(sorted(path.glob("*.tar"))) for path in tmp_path.iterdir()}
    assert folders.keys() == {"twemoji", "openmoji", *teacher_data.ICON_SETS}
    assert not {key.removesuffix("-openmoji") for key in folders["openmoji"]} & unseen
    assert {key.removesuffix("-twemoji") for key in folders["twemoji"]} > unseen
    assert "1f34e-openmoji" in folders["openmoji"]
    for style in teacher_data.ICON_SETS:
        assert len(folders[style]) == 2
        members = folders[style][f"1f34e-{style}"]
        with Image.open(io.BytesIO(members["png"])) as image:
            assert image.convert("RGB").getpixel((36, 36)) == (255, 0, 0)
        assert "red apple" in members["txt"].decode()
        assert json.loads(members["json"])["phrase"] == "a red apple"
        assert teacher_data.ICON_SETS[style].licence in (tmp_path / style / "CREDITS.txt").read_text()


def test_share_of_captions_is_exchanged_and_the_rest_is_unchanged(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", members_of(shard, 25))
    made = write_wrong_captions(f"{tmp_path}/*.tar", tmp_path / "wrong", share=0.4)
    before, after = read_shards(sorted(tmp_path.glob("*.tar"))), read_shards(made)
    assert list(before) == list(after)
    wrong = {key for key in before if before[key]["txt"] != after[key]["txt"]}
    assert len(wrong) == 20
    assert sorted(after[key]["txt"] for key in wrong) == sorted(before[key]["txt"] for key in wrong)
    for key, members in before.items():
        if key in wrong:
            metadata = {**json.loads(members["json"]), "caption": after[key]["txt"].decode()}
            assert json.loads(after[key]["json"]) == metadata
            assert after[key]["png"] == members["png"]
        else:
            assert after[key] == members
    again = write_wrong_captions(f"{tmp_path}/*.tar", tmp_path / "again", share=0.4)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in made]


def test_captions_are_plain_english_of_all_templates(shards: list[Path]) -> None:
    captions = {key: members["txt"].decode() for key, members in read_shards(shards).items()}
    starts = Counter(" ".join(caption.split()[:3]) for caption in captions.values())
    assert all(starts[start] > 100 for start in ("an emoji of", "a picture of", "a small drawing"))
    for key, caption in captions.items():
        assert caption.strip() == caption, key
        assert len(caption) >= 4, key
        assert "_" not in caption, key
        assert not re.search(r"\b[A-Z]{4,}\b", caption), f"{key} has upper-case words: {caption}"
        assert "  " not in caption, key
        assert not re.search(r"\ba (?!one-)[aeio]|\ban [^aeiouAEIOUhSx]", caption), f"{key}: {caption}"


@pytest.mark.parametrize(
    ("name", "short_name", "expected"),
    [
        ("RED APPLE", "apple", "a red apple"),
        ("Western Sahara Flag", "flag-eh", "the flag of Western Sahara"),
        ("Netherlands Flag", "flag-nl", "the flag of the Netherlands"),
        ("WHITE MEDIUM STAR", "star", "a medium star"),
        ("BLACK CAT", "black_cat", "a black cat"),
        ("FAMILY: MAN, WOMAN, GIRL", "man-woman-girl", "a family of a man, a woman and a girl"),
        ("CLOCK FACE ONE OCLOCK", "clock1", "a clock showing one o'clock"),
        ("SQUARED CJK UNIFIED IDEOGRAPH-5272", "u5272", "a square sign with the Japanese character 割"),
        ("NEGATIVE SQUARED AB", "ab", "a square sign that says AB"),
        ("GRAPES", "grapes", "grapes"),
        ("HOURGLASS", "hourglass", "an hourglass"),
        ("UNICORN FACE", "unicorn_face", "a unicorn face"),
    ],
)
def test_unicode_names_become_phrases(name: str, short_name: str, expected: str) -> None:
    assert make_phrase(name, short_name) == expected


def test_skin_tones_flags_letters_families_and_gendered_variants_are_excluded() -> None:
    assert [emoji.key for emoji in name_emoji(["1f44b", "1f44b-1f3fe", "1f3fe", "ffff"])] == ["1f44b"]
    excluded = ["1f1f5-1f1ea", "1f170", "39-20e3", "1f468-1f469-1f467", "1f468-1f680", "1f3c3-2642", "1f44b-1f3fd"]
    assert [concept.emoji.key for concept in select_concepts([*excluded, "1f34e", "1f3c3"])] == ["1f34e", "1f3c3"]


def test_unseen_concepts_depend_only_on_the_key() -> None:
    keys = ["1f34e", "1f600", "1f438", "1f6b2"]
    alone = {key: select_concepts([key])[0].unseen for key in keys}
    assert {concept.emoji.key: concept.unseen for concept in select_concepts(keys)} == alone
    assert set(alone.values()) == {True, False}
