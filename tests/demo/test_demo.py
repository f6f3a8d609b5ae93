"""The demo's data and models."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reinforce.demo import icon_sets
from reinforce.demo.data import (
    CLASSES,
    GROUPS,
    SAMPLES_PER_SHARD,
    UNSEEN_PICTURES,
    UNSEEN_STYLE,
    shared_concepts,
    write_shards,
    write_tests,
)
from reinforce.demo.lessons import write_lessons
from reinforce.demo.models import MODELS, VOCABULARY, keep, write_blanks
from reinforce.demo.names import name_emoji, phrase
from reinforce.demo.styles import PIXELS
from reinforce.errors import UserError

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "configs/demo-models"
Samples = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("demo") / "shards")


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "tests"
    write_tests(folder)
    return folder


def read_samples(path: Path) -> Samples:
    samples: Samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return samples


def _all(shards: list[Path]) -> Samples:
    return {key: members for path in shards for key, members in read_samples(path).items()}


# --- data


def test_every_concept_is_in_exactly_one_shard_with_image_caption_and_sidecar(shards: list[Path]) -> None:
    keys = [key for path in shards for key in read_samples(path)]
    assert sorted(keys) == [concept.emoji.key for concept in shared_concepts()]
    assert len(set(keys)) > 1300
    for key, members in _all(shards).items():
        assert members.keys() == {"png", "txt", "json"}, key
        sidecar = json.loads(members["json"])
        assert sidecar["key"] == key
        assert sidecar["caption"] == members["txt"].decode()
        assert sidecar["sha256"] == hashlib.sha256(members["png"]).hexdigest()


def test_shards_are_of_one_size_and_mix_the_categories(shards: list[Path]) -> None:
    sizes = [len(read_samples(path)) for path in shards]
    assert max(sizes) <= SAMPLES_PER_SHARD
    assert max(sizes) - min(sizes) <= 1
    for path in shards:
        assert len({json.loads(members["json"])["category"] for members in read_samples(path).values()}) >= 8


def test_images_have_the_size_that_the_sidecar_says(shards: list[Path]) -> None:
    with tarfile.open(shards[0]) as tar:
        for member in tar:
            if member.name.endswith(".png"):
                with Image.open(tar.extractfile(member)) as image:
                    assert image.size == (PIXELS, PIXELS)


def test_captions_are_plain_english(shards: list[Path]) -> None:
    for key, members in _all(shards).items():
        caption = members["txt"].decode()
        assert caption.strip() == caption, key
        assert len(caption) >= 4, key
        assert "_" not in caption, key
        assert not re.search(r"\b[A-Z]{4,}\b", caption), f"{key} shouts: {caption}"
        assert "  " not in caption, key
        assert not re.search(r"\ba (?!one-)[aeio]|\ban [^aeiouAEIOUhSx]", caption), f"{key}: {caption}"


def test_skin_tones_are_left_out() -> None:
    assert [emoji.key for emoji in name_emoji(["1f44b", "1f44b-1f3fe", "1f3fe"])] == ["1f44b"]


def test_caption_templates_are_all_in_use(shards: list[Path]) -> None:
    starts = Counter(" ".join(members["txt"].decode().split()[:3]) for members in _all(shards).values())
    for start in ("an emoji of", "a picture of", "a small drawing"):
        assert starts[start] > 100


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
    assert phrase(name, short_name) == expected


def test_emoji_without_a_name_are_left_out() -> None:
    assert [emoji.key for emoji in name_emoji(["ffff", "1f34e"])] == ["1f34e"]


def test_shards_are_equal_bytes_in_another_folder(shards: list[Path], tmp_path: Path) -> None:
    again = write_shards(tmp_path)
    assert [path.name for path in again] == [path.name for path in shards]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(again, shards, strict=True))


def test_shards_that_are_whole_are_left_alone_and_a_damaged_one_is_mended(tmp_path: Path) -> None:
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


def test_drawings_fill_their_square(tests: Path) -> None:
    for members in _all(sorted((tests / UNSEEN_PICTURES).glob("*.tar"))).values():
        left, top, right, bottom = Image.open(io.BytesIO(members["png"])).convert("RGBA").getchannel("A").getbbox()
        assert max(right - left, bottom - top) >= PIXELS - 2


def test_a_quarter_of_the_concepts_is_kept_from_teachers_and_each_is_told_apart_by_name(
    shards: list[Path], tests: Path
) -> None:
    ours = _all(shards)
    seen, unseen = (_all(sorted((tests / name).glob("*.tar"))) for name in (UNSEEN_STYLE, UNSEEN_PICTURES))
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


def test_a_folder_that_cannot_be_made_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Give another --out"):
        write_shards(tmp_path / "file" / "shards")


# --- what teachers learn from


def _package(folder: Path, package: str, members: dict[str, object]) -> None:
    """An archive as `npm pack` leaves it."""
    name, _, version = package.lstrip("@").rpartition("@")
    with tarfile.open(folder / f"{name.replace('/', '-')}-{version}.tgz", "w:gz") as tar:
        for path, content in members.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def npm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What npm would bring, two emoji in each set: an apple and one of the concepts that are kept from teachers."""
    folder = tmp_path_factory.mktemp("npm")
    kept = next(concept for concept in shared_concepts() if concept.unseen)
    square = '<path fill="{}" d="M2 2h12v12H2z"/>'
    for style, icons in icon_sets.ICON_SETS.items():
        bodies = {"red-apple": {"body": square.format("red")}, "kept": {"body": square.format("blue")}}
        spelled = {"1f34e": "red-apple", kept.emoji.key: "kept", "1f44b-1f3fd": "red-apple"}
        members: dict[str, object] = {"icons.json": {"icons": bodies, "width": 16, "height": 16}}
        members["chars.json"] = spelled if style in ("noto", "fluent") else {}
        _package(folder, icons.package, members)
    entry = {"hexcode": "1F34E", "label": "red apple", "tags": ["fruit", "ripe"]}
    _package(folder, "emojibase-data@17.0.0", {"en/data.json": [entry]})
    return folder


def test_teachers_never_see_the_openmoji_pictures_that_are_kept_from_them(npm: Path, tmp_path: Path) -> None:
    write_lessons(tmp_path, npm)
    unseen = {concept.emoji.key for concept in shared_concepts() if concept.unseen}
    folders = {path.name: _all(sorted(path.glob("*.tar"))) for path in tmp_path.iterdir()}
    assert folders.keys() == {"twemoji", "openmoji", *icon_sets.ICON_SETS}
    assert not {key.removesuffix("-openmoji") for key in folders["openmoji"]} & unseen
    assert {key.removesuffix("-twemoji") for key in folders["twemoji"]} > unseen
    assert "1f34e-openmoji" in folders["openmoji"]
    for style in icon_sets.ICON_SETS:
        assert len(folders[style]) == 2
        members = folders[style][f"1f34e-{style}"]
        with Image.open(io.BytesIO(members["png"])) as image:
            assert image.convert("RGB").getpixel((36, 36)) == (255, 0, 0)
        assert "red apple" in members["txt"].decode()
        assert json.loads(members["json"])["phrase"] == "a red apple"
        assert icon_sets.ICON_SETS[style].licence in (tmp_path / style / "CREDITS.txt").read_text()


def test_npm_that_cannot_fetch_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="npm, which is not installed"):
        icon_sets.fetch(tmp_path / "npm")


# --- models


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory, shards: list[Path], tests: Path) -> Path:
    """Shards with enough words for a vocabulary."""
    folder = tmp_path_factory.mktemp("lessons")
    for name, paths in {"twemoji": shards, "openmoji": sorted((tests / UNSEEN_STYLE).glob("*.tar"))}.items():
        (folder / name).mkdir()
        for path in paths:
            shutil.copyfile(path, folder / name / path.name)
    return folder


@pytest.fixture(scope="module")
def blanks(tmp_path_factory: pytest.TempPathFactory, lessons: Path) -> Path:
    folder = tmp_path_factory.mktemp("blanks")
    write_blanks(folder, lessons)
    return folder


def test_the_committed_models_are_small_and_of_the_shapes_that_the_recipe_starts_from() -> None:
    sizes = 0
    for name, config in MODELS.items():
        written = json.loads((COMMITTED / name / "open_clip_config.json").read_text())
        assert written["model_cfg"] == json.loads(json.dumps(config))["model_cfg"]
        weights = COMMITTED / name / "open_clip_model.safetensors"
        assert all(v.dtype == torch.float16 for v in load_file(weights).values() if v.is_floating_point())
        sizes += weights.stat().st_size
    assert sizes < 12e6


@pytest.mark.parametrize("name", MODELS)
def test_a_committed_model_knows_an_apple(name: str, shards: list[Path]) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{COMMITTED / name}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{COMMITTED / name}")
    names = ["a red apple", "a bicycle", "a grinning face", "a dog"]
    with Image.open(io.BytesIO(_all(shards)["1f34e"]["png"])) as drawn:
        rgba = drawn.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    with torch.no_grad():
        seen = model.eval().encode_image(preprocess(image)[None], normalize=True)
        texts = model.encode_text(tokenizer(names), normalize=True)
    assert seen.shape == (1, MODELS[name]["model_cfg"]["embed_dim"])
    assert names[(seen @ texts.T).argmax()] == "a red apple"


def test_a_model_starts_with_every_parameter_set_and_with_bytes_that_its_seed_decides(
    blanks: Path, lessons: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        write_blanks(tmp_path / "same", lessons)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), state)
    write_blanks(tmp_path / "other", lessons, seed=1)
    for path in blanks.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "same" / path.relative_to(blanks)).read_bytes()
    weights = {
        folder: load_file(folder / "coca-64/open_clip_model.safetensors") for folder in (blanks, tmp_path / "other")
    }
    assert all(torch.isfinite(value).all() for value in weights[blanks].values())
    assert not torch.equal(*(found["text_decoder.text_projection"] for found in weights.values()))


def test_the_models_own_vocabulary_writes_every_text_and_ends_with_its_highest_token(blanks: Path) -> None:
    tokenizer = open_clip.get_tokenizer(f"local-dir:{blanks / 'conv-64'}")
    tokens = tokenizer(["A red Apple", "Ünïcode ☃, zzz"])
    assert tokens.shape == (2, 24)
    assert (tokens.max(dim=1).values == VOCABULARY - 1).all()
    assert [tokenizer.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens] == [
        "a red apple",
        "ünïcode ☃, zzz",
    ]


def test_keeping_a_model_halves_its_weights_and_copies_what_belongs_to_it(blanks: Path, tmp_path: Path) -> None:
    size = keep(blanks / "coca-64", tmp_path / "kept")
    assert size == (tmp_path / "kept/open_clip_model.safetensors").stat().st_size
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {
        path.name for path in (blanks / "coca-64").iterdir()
    }
    half, whole = (load_file(f / "open_clip_model.safetensors") for f in (tmp_path / "kept", blanks / "coca-64"))
    assert all(torch.equal(half[name], value.half()) for name, value in whole.items())
    with pytest.raises(UserError, match="finish its training first"):
        keep(tmp_path, tmp_path / "kept")
