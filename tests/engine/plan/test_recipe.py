"""Fingerprints: what changes them, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reinforce.config import load_config, parse_config
from reinforce.engine.plan.recipe import build_layers, describe_models, version_notes
from reinforce.source.urls import expand
from tests.helpers.data import config_of

ROOT = Path(__file__).parents[3]


def layers_for(**changes: Any) -> dict[str, str]:
    config = parse_config(config_of("x/{0..1}.tar", "out", **changes))
    return {name: layer.fingerprint for name, layer in build_layers(config, describe_models(config)).items()}


def test_limits_added_later_change_fingerprints_only_if_they_are_set(shards: Callable[..., str]) -> None:
    def samples(**limits: int) -> str:
        config = parse_config({"source": shards(1), "output": "out", "input": {"limits": limits}})
        return build_layers(config, {})["samples"].fingerprint

    assert samples() == "9a59ea0ee9feb030", "the fingerprint of every dataset made with the defaults so far"
    assert samples(members=64) == samples()
    assert len({samples(), samples(members=65), samples(key_chars=10), samples(shard_samples=9)}) == 4


def test_a_setting_that_changes_no_stored_value_changes_no_fingerprint() -> None:
    config = config_of("x/{0..1}.tar", "out")
    before = layers_for()
    config["teachers"]["red"]["logit_scale"] = 99.0
    assert layers_for(teachers=config["teachers"], workers={"cpus": 4, "batch": 3, "recycle": 2}) == before


def test_a_change_reaches_the_layers_that_depend_on_it_and_no_others() -> None:
    before = layers_for()
    config = config_of("x/{0..1}.tar", "out")
    config["captioners"]["namer"] |= {"captions": 3, "options": {"captions": 3}}
    changed = {n for n, f in layers_for(captioners=config["captioners"]).items() if before[n] != f}
    assert changed == {"captions/namer", "embeddings/red/namer", "embeddings/blue/namer"}
    assert all(before[name] != fingerprint for name, fingerprint in layers_for(seed=1).items())
    config = config_of("x/{0..1}.tar", "out")
    config["teachers"]["blue"]["dtype"] = "float32"
    changed = {n for n, f in layers_for(teachers=config["teachers"]).items() if before[n] != f}
    assert changed == {"embeddings/blue/images", "embeddings/blue/caption", "embeddings/blue/namer"}


def test_the_config_for_datacompdr_has_the_layers_of_its_dataset_card() -> None:
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


def test_each_class_without_a_version_is_named_once() -> None:
    custom = "tests.helpers.custom_models"
    teachers = {name: {"class": f"{custom}:TextsOnly"} for name in ("one", "two")}
    teachers["versioned"] = {"class": f"{custom}:Radiology", "options": {"weights": "w"}}  # type: ignore[dict-item]
    config = parse_config(config_of("x.tar", "out", teachers=teachers))
    notes = version_notes(info.identity for info in describe_models(config).values())
    assert [note.partition(",")[0] for note in notes] == [
        "class tests.helpers.models:SeedCaptioner has no `version`",
        f"class {custom}:TextsOnly has no `version`",
    ]
    assert "part of the fingerprint" in notes[0]
