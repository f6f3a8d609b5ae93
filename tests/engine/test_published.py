"""Published reinforcements become layers like any other: what was stored is there, and what cannot be read is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reinforce
from reinforce.config import load_config, parse_config
from reinforce.engine.outcome import LayerFailure
from reinforce.engine.plan import make_plan
from reinforce.engine.recipe import build_layers, describe_models
from reinforce.errors import UserError
from reinforce.source.urls import expand
from tests.helpers.data import tree
from tests.helpers.published import (
    ALL,
    CAPTIONS,
    COUNT,
    DIMS,
    check,
    config_of,
    image,
    published,
    quarantine,
    reinforcement,
    stored,
)
from tests.helpers.reinforced import reinforce_here

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("packed", ["npz", "pth.gz"])
def test_what_was_published_is_read(tmp_path: Path, packed: str) -> None:
    published(tmp_path, [image(one) for one in ALL], [reinforcement(one, packed) for one in ALL])
    samples = list(reinforce.open(reinforce_here(config_of(tmp_path), group_rows=5)))
    assert len(samples) == 12
    for one, sample in zip(ALL, samples, strict=True):
        check(one, sample, 1e-6 if packed == "npz" else 5e-3)
        np.testing.assert_allclose(np.linalg.norm(sample.images["one"], axis=1), 1, atol=1e-5)
    assert not (tmp_path / "out" / "quarantine").exists()


def test_samples_are_joined_by_key_or_uid_in_the_source_s_order(tmp_path: Path) -> None:
    source = [image(one, key=f"{9 - number:08d}") for number, one in enumerate(ALL[:9])]
    # Of the twelve, nine have images; one image has no reinforcements, one comes again under another name.
    source += [image(stored(77), "z1"), image(ALL[2], "z2")]
    published(tmp_path, source, [reinforcement(one) for one in reversed(ALL)])
    samples = list(reinforce.open(reinforce_here(config_of(tmp_path))))
    assert [sample.key for sample in samples] == [one.key for one in ALL[:9]]
    for one, sample in zip(ALL, samples, strict=False):
        check(one, sample)
    assert sorted(quarantine(tmp_path)) == sorted(
        [("z1", "not_reinforced"), (ALL[2].key, "duplicate_key"), *((one.key, "no_image") for one in ALL[9:])]
    )


def test_a_uid_goes_before_a_key_that_is_another_sample_s(tmp_path: Path) -> None:
    first, second, third = ALL[:3]
    source = [image(first, second.key), image(second, first.key), image(stored(77), third.key)]
    published(tmp_path, source, [reinforcement(one) for one in (first, second, third)])
    samples = list(reinforce.open(reinforce_here(config_of(tmp_path))))
    assert [(sample.key, sample.caption) for sample in samples] == [
        (first.key, f"true {first.key}"),
        (second.key, f"true {second.key}"),
    ]
    assert quarantine(tmp_path) == [(third.key, "not_reinforced"), (third.key, "no_image")]


def test_captions_are_text_whatever_was_published(tmp_path: Path) -> None:
    texts = json.dumps({"syn_text": ["one\ud800\0\n two ", "x" * 9000]}).encode()
    published(tmp_path, [image(ALL[0])], [reinforcement(ALL[0], **{"syn.json": texts})])
    [sample] = reinforce.open(reinforce_here(config_of(tmp_path)))
    assert sample.captions["coca"] == ["one\ufffd   two", "x" * 2000]


def test_images_and_reinforcements_may_lie_in_the_same_tars(tmp_path: Path) -> None:
    merged = [image(one) + [m for m in reinforcement(one) if not m[0].endswith("url.txt")] for one in ALL]
    published(tmp_path, merged, [])
    config = config_of(tmp_path, reinforcements=f"{tmp_path}/source/*.tar", images="reference")
    for one, sample in zip(ALL, reinforce.open(reinforce_here(config)), strict=True):
        check(one, sample)


def test_a_layer_that_is_added_later_equals_one_of_a_single_run(tmp_path: Path) -> None:
    published(tmp_path, [image(one) for one in ALL], [reinforcement(one) for one in reversed(ALL)])
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
    assert different == ["dataset.json"], "in which teachers stand in the order of their coming"
    for one, sample in zip(ALL, reinforce.open(f"{tmp_path}/out"), strict=True):
        assert sample.captions["tagged"] == one.captions["syn_text_tagged"]
        np.testing.assert_allclose(
            sample.texts["two"]["tagged"], one.vectors["syn_text_tagged_emb"][:, DIMS[0] :], atol=1e-6
        )
        assert sample.texts["ours"].keys() == {"caption", "coca", "tagged"}


def test_reinforcements_that_are_gone_later_leave_null_rows(tmp_path: Path) -> None:
    published(tmp_path, [image(one) for one in ALL], [reinforcement(one) for one in ALL])
    first = config_of(tmp_path)
    del first["teachers"]["two"]
    reinforce_here(first)
    published(tmp_path, [], [reinforcement(one) for one in ALL[1:]])
    reinforce_here(config_of(tmp_path))
    samples = list(reinforce.open(f"{tmp_path}/out"))
    assert np.isnan(samples[0].images["two"]).all()
    check(ALL[1], samples[1])
    assert quarantine(tmp_path, "embeddings/two/images") == [(ALL[0].key, "not_reinforced")]


def test_a_caption_that_is_not_there_has_no_vector(tmp_path: Path) -> None:
    source = [[m for m in image(ALL[0]) if not m[0].endswith("txt")], image(ALL[1])]
    published(tmp_path, source, [reinforcement(one) for one in ALL[:2]])
    samples = list(reinforce.open(reinforce_here(config_of(tmp_path))))
    assert np.isnan(samples[0].texts["one"]["caption"]).all()
    assert quarantine(tmp_path, "embeddings/one/caption") == [(ALL[0].key, "no_text")]
    check(ALL[1], samples[1])


def test_reinforcements_that_are_missing_cost_the_shard(tmp_path: Path) -> None:
    published(tmp_path, [image(one) for one in ALL], [])
    config = config_of(tmp_path, reinforcements=f"{tmp_path}/nowhere/00000.tar")
    with pytest.raises(UserError, match=r"has no shard that is complete"):
        list(reinforce.open(reinforce_here(config)))
    assert quarantine(tmp_path) == [(None, "shard_missing")]


def test_shards_are_paired_by_name_else_by_order(tmp_path: Path) -> None:
    def paired(*reinforcements: str) -> list[str]:
        urls = [f"dr/{name}.tar" for name in reinforcements]
        source = [f"source/{name}.tar.gz" for name in ("1/a", "1/b", "2/a")]
        pending = make_plan(parse_config(config_of(tmp_path, source=source, reinforcements=urls))).pending
        assert [one.url for one in pending] == source
        return [str(one.reinforcements).removeprefix("dr/").removesuffix(".tar") for one in pending]

    assert paired("2/a", "1/b", "1/a", "1/c") == ["1/a", "1/b", "2/a"]
    assert paired("x", "y", "z") == ["x", "y", "z"]
    with pytest.raises(UserError, match=r"2 shards for the 3 of `source`, and not all of these .* Name as many"):
        paired("1/a", "1/b")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"reinforcements": None}, "one, two, coca: family published is read from `reinforcements`"),
        (
            {
                "reinforcements": None,
                "captioners": {name: {"class": "tests.helpers.models:SeedCaptioner"} for name in ("one", "two")},
            },
            "one, two: family published is read from `reinforcements`",
        ),
        ({"augmentations": {"count": 3, "size": 24, "scale": [0.5, 1.0]}}, "augmentations.scale: .* not sampled"),
        ({"teachers": {"one": {"family": "published", "model": "ONE", "logit_scale": 1}}}, "`columns: .0, 768.`"),
        ({"teachers": {"one": {"family": "published", "model": "ONE", "columns": [0, 6]}}}, "needs `logit_scale`"),
        (
            {"teachers": {"one": {"family": "published", "model": "O", "columns": [6, 6], "logit_scale": 1}}},
            "first < end",
        ),
        ({"captioners": {"coca": {"family": "published", "model": "syn_text", "top_p": 0.5}}}, "top_p: not used with"),
        ({"teachers": {"one": {"model": "ViT-B-32", "columns": [0, 6]}}}, "require each other"),
    ],
)
def test_a_config_that_cannot_be_meant_is_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_config(config_of(tmp_path, **change))


def test_the_config_for_datacompdr_is_what_its_card_says() -> None:
    config = load_config(ROOT / "configs/datacompdr12m.yaml")
    layers = build_layers(config, describe_models(config))
    assert [(name, layer.count, layer.dim) for name, layer in layers.items() if layer.published] == [
        ("captions/coca", 5, None),
        *(
            (f"embeddings/{teacher}/{what}", count, 768)
            for teacher in ("openai", "datacomp-xl")
            for what, count in (("images", 30), ("caption", 1), ("coca", 5))
        ),
    ]
    assert len(expand(str(config.reinforcements))) == len(expand(config.source)) == 1024


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"augmentations": {"count": 4, "size": 24}},
            r"samples: .* first 3 samples .*: 3 augmentations in paug.json, want 4",
        ),
        (
            {"captioners": {"coca": {"family": "published", "model": "syn_txt", "captions": 2}}},
            r"captions/coca: .* no list 'syn_txt' of texts in syn.json, which has: syn_text, syn_text_tagged",
        ),
        (
            {"teachers": {"one": {"family": "published", "model": "O", "columns": [0, 11], "logit_scale": 1}}},
            r"embeddings/one/images: .* image_emb has 3 vectors of 10 numbers, want 3 with columns 0 to 11 for one",
        ),
        (
            {"teachers": {"one": {"family": "published", "model": "O", "columns": [0, 10], "logit_scale": 1}}},
            r"embeddings/one/images: .* norms of 1.41 to 1.41 in columns 0 to 10, want 1",
        ),
    ],
)
def test_a_config_for_other_reinforcements_ends_before_it_starts(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    published(tmp_path, [image(one) for one in ALL[:3]], [reinforcement(one) for one in ALL[:3]])
    with pytest.raises(UserError, match=told):
        reinforce.run(config_of(tmp_path, **change))


def test_reinforcements_that_are_missing_later_cost_the_layer(tmp_path: Path) -> None:
    published(tmp_path, [image(one) for one in ALL], [reinforcement(one) for one in ALL])
    first = config_of(tmp_path)
    del first["teachers"]["two"]
    reinforce_here(first)
    with pytest.raises(LayerFailure, match=r"embeddings/two/images: shard_missing: reinforcements: "):
        reinforce_here(config_of(tmp_path, reinforcements=f"{tmp_path}/nowhere/00000.tar"))


def test_a_teacher_of_ours_is_added_without_the_reinforcements(tmp_path: Path) -> None:
    published(tmp_path, [image(one) for one in ALL], [reinforcement(one) for one in ALL])
    reinforce_here(config_of(tmp_path))
    later = config_of(tmp_path, reinforcements=f"{tmp_path}/nowhere/{{00000..00000}}.tar")
    later["teachers"]["ours"] = {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16, "dim": 8}}
    assert [shard.reinforcements for shard in make_plan(parse_config(later)).pending] == [None]
    assert {sample.images["ours"].shape for sample in reinforce.open(reinforce_here(later))} == {(COUNT, 8)}


@pytest.mark.usefixtures("ray_session")
def test_a_run_on_ray_reads_them_and_adds_a_teacher_of_ours(tmp_path: Path) -> None:
    published(tmp_path, [image(one) for one in ALL], [reinforcement(one) for one in ALL])
    summary = reinforce.run(config_of(tmp_path))
    assert (summary.status, summary.samples, summary.shards) == (0, 12, 1)
    ours = config_of(tmp_path)
    ours["teachers"]["ours"] = {
        "class": "tests.helpers.models:ColorTeacher",
        "options": {"size": 16, "dim": 8},
        "logit_scale": 20.0,
    }
    again = reinforce.run(ours)
    assert (again.status, again.samples) == (0, 12)
    for one, sample in zip(ALL, reinforce.open(f"{tmp_path}/out"), strict=True):
        check(one, sample)
        assert sample.images["ours"].shape == (COUNT, 8)
        assert sample.texts["ours"]["coca"].shape == (CAPTIONS, 8)
    scales = json.loads((tmp_path / "out" / "dataset.json").read_text())["teachers"]
    assert {name: entry["logit_scale"] for name, entry in scales.items()} == {"one": 70, "two": 60, "ours": 20}
