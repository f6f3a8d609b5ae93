"""Published reinforcements become layers like any other, and what cannot be read is quarantined."""

from __future__ import annotations

import io
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import reinforce
from reinforce.config import parse_config
from reinforce.engine.messages import LayerFailure
from reinforce.engine.plan.plan import make_plan
from reinforce.errors import UserError
from reinforce.images.policy import PUBLISHED_POLICY, decode
from reinforce.source.config import Limits
from reinforce.student.config import Data
from reinforce.student.data.feed import StudentFeed
from tests.helpers.data import tree
from tests.helpers.images import encode, noise
from tests.helpers.in_loaders import letters, read
from tests.helpers.published import (
    ALL,
    COUNT,
    DIMS,
    SIZE,
    check_sample,
    config_of,
    npz,
    published_members,
    published_sample,
    quarantine,
    source_members,
    torchvision_replay,
    write_published,
)
from tests.helpers.reinforced import reinforce_here


@pytest.mark.parametrize("packed", ["npz", "pth.gz"])
def test_published_layers_hold_the_published_values_and_a_custom_teacher_is_added(tmp_path: Path, packed: str) -> None:
    write_published(tmp_path, [source_members(one) for one in ALL], [published_members(one, packed) for one in ALL])
    samples = list(reinforce.open(reinforce_here(config_of(tmp_path), group_rows=5)))
    assert len(samples) == 12
    for one, sample in zip(ALL, samples, strict=True):
        check_sample(one, sample, 1e-6 if packed == "npz" else 5e-3)
        np.testing.assert_allclose(np.linalg.norm(sample.images["one"], axis=1), 1, atol=1e-5)
    assert not (tmp_path / "out" / "quarantine").exists()
    # A custom teacher is added without the reinforcements.
    later = config_of(tmp_path, reinforcements=f"{tmp_path}/nowhere/{{00000..00000}}.tar")
    ours = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}, "logit_scale": 20.0}
    later["teachers"]["ours"] = ours
    assert [shard.reinforcements for shard in make_plan(parse_config(later)).pending] == [None]
    assert {sample.images["ours"].shape for sample in reinforce.open(reinforce_here(later))} == {(COUNT, 8)}
    scales = json.loads((tmp_path / "out" / "dataset.json").read_text())["teachers"]
    assert {name: entry["logit_scale"] for name, entry in scales.items()} == {"one": 70, "two": 60, "ours": 20}


def test_raygens_tars_give_captions_and_text_vectors_and_crops_are_drawn_here(tmp_path: Path) -> None:
    """RayGen writes images, captions and vectors into one tar, and no record of its crops."""
    members = []
    for number, one in enumerate(ALL[:4]):
        vectors = {name: value for name, value in one.vectors.items() if name != "image_emb"}
        packed = npz({**vectors, "image_emb{self.tag_suffix}": one.vectors["image_emb"]})
        stated = json.dumps({"sha256": f"{number:064x}"}).encode()
        others = {"paug.json": None, "npz": packed, "json": stated, "url.txt": b"https://example.org/%d" % number}
        members.append([*source_members(one)[:2], *published_members(one, **others)])
    write_published(tmp_path, members, [])
    config = config_of(tmp_path)
    tars = config["source"]
    own = {**config, "reinforcements": tars, "augmentations": {"count": 2, "size": 24, "own": True}}
    url = reinforce_here(own)
    samples = list(reinforce.open(url))
    plain = reinforce_here({"source": tars, "output": f"{tmp_path}/plain", "augmentations": {"count": 2, "size": 24}})
    for one, sample, alone in zip(ALL, samples, reinforce.open(plain), strict=False):
        assert sample.captions["coca"] == one.captions["syn_text"]
        assert sample.augmentations == alone.augmentations
        assert sample.images == {}
        np.testing.assert_allclose(sample.texts["one"]["coca"], one.vectors["text_emb"][1:, : DIMS[0]], atol=1e-3)
    assert len(samples) == 4
    manifest = json.loads(Path(url, "dataset.json").read_text())
    assert manifest["layers"]["samples"] == json.loads(Path(plain, "dataset.json").read_text())["layers"]["samples"]
    with pytest.raises(UserError, match=r"augmentations.own: used with"):
        parse_config({**own, "reinforcements": None, "captioners": {}, "teachers": {}})


def test_a_layer_added_later_equals_that_of_a_single_run(tmp_path: Path) -> None:
    write_published(tmp_path, [source_members(one) for one in ALL], [published_members(one) for one in reversed(ALL)])
    ours = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}}
    tagged = {"family": "published", "model": "syn_text_tagged", "captions": 1}
    whole = config_of(tmp_path, output=f"{tmp_path}/whole")
    whole["teachers"]["ours"] = ours
    whole["captioners"]["tagged"] = tagged
    reinforce_here(whole, group_rows=5)
    first = config_of(tmp_path)
    del first["teachers"]["two"]
    for config in (first, whole | {"output": first["output"]}):
        reinforce_here(config, group_rows=5)
    assert tree(tmp_path / "out").keys() == tree(tmp_path / "whole").keys()
    different = [name for name, data in tree(tmp_path / "whole").items() if tree(tmp_path / "out")[name] != data]
    assert different == ["dataset.json"], "which lists teachers in the order in which they were added"
    for one, sample in zip(ALL, reinforce.open(f"{tmp_path}/out"), strict=True):
        assert sample.captions["tagged"] == one.captions["syn_text_tagged"]
        tagged = one.vectors["syn_text_tagged_emb"][:, DIMS[0] :]
        np.testing.assert_allclose(sample.texts["two"]["tagged"], tagged, atol=1e-6)
        assert sample.texts["ours"].keys() == {"caption", "coca", "tagged"}


def test_removed_reinforcements_leave_null_rows_and_a_missing_shard_fails_the_layer(tmp_path: Path) -> None:
    write_published(tmp_path, [source_members(one) for one in ALL], [published_members(one) for one in ALL])
    first, nowhere = config_of(tmp_path), f"{tmp_path}/nowhere/00000.tar"
    del first["teachers"]["two"]
    with pytest.raises(UserError, match=r"has no shard that is complete"):
        list(reinforce.open(reinforce_here({**first, "reinforcements": nowhere, "output": f"{tmp_path}/bad/out"})))
    assert quarantine(tmp_path / "bad") == [(None, "shard_missing")]
    reinforce_here(first)
    with pytest.raises(LayerFailure, match=r"embeddings/two/images: shard_missing: reinforcements: "):
        reinforce_here(config_of(tmp_path, reinforcements=nowhere))
    write_published(tmp_path, [], [published_members(one) for one in ALL[1:]])
    reinforce_here(config_of(tmp_path))
    samples = list(reinforce.open(f"{tmp_path}/out"))
    assert np.isnan(samples[0].images["two"]).all()
    check_sample(ALL[1], samples[1])
    assert quarantine(tmp_path, "embeddings/two/images") == [(ALL[0].key, "not_reinforced")]


def test_captions_are_cleaned_and_cut_and_a_sample_without_a_true_one_has_no_vector_of_it(tmp_path: Path) -> None:
    source = [[m for m in source_members(ALL[0]) if not m[0].endswith("txt")], source_members(ALL[1])]
    texts = json.dumps({"syn_text": ["one\ud800\0\n two ", "x" * 9000]}).encode()
    write_published(tmp_path, source, [published_members(ALL[0], **{"syn.json": texts}), published_members(ALL[1])])
    first, second = reinforce.open(reinforce_here(config_of(tmp_path)))
    assert np.isnan(first.texts["one"]["caption"]).all()
    assert first.captions["coca"] == ["one\ufffd   two", "x" * 2000]
    assert quarantine(tmp_path, "embeddings/one/caption") == [(ALL[0].key, "no_text")]
    check_sample(ALL[1], second)


CLASS = {"class": "tests.helpers.models:SeedCaptioner"}
CONTRADICTORY: list[tuple[dict[str, Any], str]] = [
    ({"reinforcements": None}, "one, two, coca: family published is read from `reinforcements`"),
    ({"reinforcements": None, "captioners": {"one": CLASS}}, "one, two: family published is read from"),
    ({"augmentations": {"count": 3, "size": 24, "scale": [0.5, 1.0]}}, "augmentations.scale: .* not sampled"),
    ({"teachers": {"one": {"family": "published", "model": "ONE", "logit_scale": 1}}}, "`columns: .0, 768.`"),
    ({"teachers": {"one": {"family": "published", "model": "ONE", "columns": [0, 6]}}}, "needs `logit_scale`"),
    ({"teachers": {"one": {"family": "published", "model": "O", "columns": [6, 6], "logit_scale": 1}}}, "first < end"),
    ({"captioners": {"coca": {"family": "published", "model": "syn_text", "top_p": 0.5}}}, "top_p: not used with"),
    ({"teachers": {"one": {"model": "ViT-B-32", "columns": [0, 6]}}}, "columns: used only with family published"),
    ({"teachers": {"one": {"family": "published", "class": "a:B"}}}, "class: not used with family published"),
    ({"captioners": {"one": {"family": "openai", "class": "a:B"}}}, "class: not used with family openai"),
    ({"teachers": {"one": {"family": "opneai", "class": "a:B"}}}, "teachers.one.family: Input should be"),
]


@pytest.mark.parametrize(("change", "message"), CONTRADICTORY)
def test_a_contradictory_config_is_rejected(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(config_of(tmp_path, **change))


def test_a_config_that_does_not_fit_the_reinforcements_is_rejected_before_the_run_starts(tmp_path: Path) -> None:
    write_published(tmp_path, [source_members(one) for one in ALL[:3]], [published_members(one) for one in ALL[:3]])
    one = {"family": "published", "model": "O", "logit_scale": 1}
    texts = {"family": "published", "model": "syn_txt", "captions": 2}
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"augmentations": {"count": 4, "size": 24}},
            r"samples: .* first 3 samples .*: 3 augmentations .*, expected 4",
        ),
        ({"captioners": {"coca": texts}}, r"captions/coca: .* no list 'syn_txt' .*, which has: syn_text, syn_text_tag"),
        (
            {"teachers": {"one": {**one, "columns": [0, 11]}}},
            r"image_emb has 3 vectors of 10 .* columns 0 to 11 for one",
        ),
        ({"teachers": {"one": {**one, "columns": [0, 10]}}}, r"columns 0 to 10: norms of 1.41 to 1.41, expected 1"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            reinforce.run(config_of(tmp_path, **change))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("transparent", [False, True])
def test_the_published_image_policy_is_pillows_conversion_alone(mode: str, transparent: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = noise().convert("L").convert("I;16") if mode == "I;16" else noise().convert(mode)
    options = {"transparency": bytes(range(0, 256, 2)) if mode == "P" else 7} if transparent and mode in "LP" else {}
    if transparent and mode in ("LA", "RGBA"):
        picture.putalpha(noise().convert("L"))
    data = encode(picture, "PNG", exif=exif, **options)
    made = decode(data, Limits(), policy=PUBLISHED_POLICY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert made.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
    assert made.size == (40, 30), "not rotated by EXIF"


def test_a_student_sees_the_pixels_of_the_published_trainer(tmp_path: Path) -> None:
    """Compared with torchvision, for an image that EXIF rotates and that has colored transparent pixels."""
    one = published_sample(5)
    pixels = np.random.default_rng(1).integers(0, 255, (30, 40, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encode(Image.fromarray(pixels, "RGBA"), "PNG", exif=exif)
    source = source_members(one)
    write_published(tmp_path, [[(source[0][0], image), *source[1:]]], [published_members(one)])
    url = reinforce_here(config_of(tmp_path))
    feed = StudentFeed(Data.model_validate({"datasets": url, "workers": 0, "window": 1}), 0, SIZE, letters)
    expected = [torchvision_replay(image, record, SIZE) for record in one.records]
    [sample] = reinforce.open(url)
    np.testing.assert_array_equal([sample.augmented(k) for k in range(COUNT)], expected)
    seen: set[int] = set()
    for batch in itertools.islice(feed.batches(0, 1, 1, 0), 12):
        matches = [k for k in range(COUNT) if np.array_equal(batch["image"][0].numpy(), expected[k])]
        assert len(matches) == 1
        assert read(batch["caption"]) == [f"true {one.key}"]
        assert read(batch["synthetic"])[0] in one.captions["syn_text"]
        seen.update(matches)
    assert seen == set(range(COUNT))
