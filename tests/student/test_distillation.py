"""Which teachers are distilled, and how; errors name the key to set."""

from __future__ import annotations

from typing import Any

import pytest

from reinforce import settings
from reinforce.errors import UserError
from reinforce.student.config import Loss, StudentConfig
from reinforce.student.distillation import IMAGES, TEXTS, TeacherInfo, plan_distillation, stored_teachers

TWO = TeacherInfo(8, frozenset([IMAGES, TEXTS]), 70.0, "dataset: config")
UNSCALED = TeacherInfo(8, frozenset([IMAGES, TEXTS]), None, "dataset: model")
EYES = TeacherInfo(5, frozenset([IMAGES]), None, "dataset: model")


def loss(**keys: Any) -> Loss:
    return settings.parse(Loss, keys)


def config(*urls: str, loss: dict[str, Any] | None = None, **data: Any) -> StudentConfig:
    return settings.parse(
        StudentConfig,
        {
            "output": "out",
            "student": {"model": "MobileCLIP2-S0"},
            "data": {"datasets": list(urls), **data},
            "loss": loss or {},
            "train": {"steps": 1},
        },
    )


def manifest(*layers: str, scale: float | None = 70.0, dim: int = 8, captioners: tuple[str, ...] = ("coca",)) -> Any:
    teachers = {name.split("/")[0] for name in layers}
    entry = {"logit_scale": scale, "logit_scale_from": "config", "dim": dim}
    return {
        "teachers": dict.fromkeys(sorted(teachers), entry),
        "captioners": {name: {} for name in captioners},
        "layers": {f"embeddings/{name}": {} for name in layers},
    }


BOTH = ("vit/images", "vit/caption", "vit/coca")


def test_two_sided_teachers_are_distilled_and_one_sided_ones_are_feature_targets() -> None:
    plan = plan_distillation(loss(), {"vit": TWO, "dino": EYES})
    assert plan.scales == {"vit": 70.0}
    assert plan.features == {"dino": EYES}
    assert plan.teachers == ["vit", "dino"]
    assert plan.notes == [
        "teacher vit: similarities, logit scale 70 (dataset: config)",
        "teacher dino: vectors of images, 5 dimensions",
    ]


@pytest.mark.parametrize(("features", "approached"), [("all", ["vit", "dino"]), ("none", [])])
def test_feature_targets_are_all_teachers_or_none(features: str, approached: list[str]) -> None:
    plan = plan_distillation(loss(features=features), {"vit": TWO, "dino": EYES})
    assert list(plan.features) == approached
    assert plan.teachers == ["vit", *approached[1:]]
    assert ("unused" in plan.notes[1]) == (features == "none")


def test_lambda_0_uses_no_teacher() -> None:
    plan = plan_distillation(loss(**{"lambda": 0.0}), {"vit": UNSCALED, "dino": EYES})
    assert plan.teachers == []


def test_a_logit_scale_in_the_config_replaces_that_of_the_dataset() -> None:
    plan = plan_distillation(loss(logit_scales={"vit": 55.0}), {"vit": TWO})
    assert plan.scales == {"vit": 55.0}
    assert "55 (config: loss.logit_scales.vit, instead of 70 of the dataset: config)" in plan.notes[0]
    assert plan_distillation(loss(logit_scales={"vit": 5.0}), {"vit": UNSCALED}).scales == {"vit": 5.0}


def test_a_teacher_without_a_scale_is_refused_with_the_key_to_set() -> None:
    with pytest.raises(UserError, match=r"teacher vit has no logit scale.*Set loss\.logit_scales\.vit"):
        plan_distillation(loss(), {"vit": UNSCALED})


@pytest.mark.parametrize("key", ["logit_scales", "logit_biases"])
def test_a_scale_of_an_unknown_teacher_is_refused(key: str) -> None:
    with pytest.raises(UserError, match="there is no teacher 'vid'; there are: vit"):
        plan_distillation(loss(form="sigmoid", **{key: {"vid": 5.0}}), {"vit": TWO})


def test_some_loss_must_align_images_and_texts() -> None:
    with pytest.raises(UserError, match=r"loss\.lambda is 1 and no teacher has vectors of both"):
        plan_distillation(loss(), {"dino": EYES})
    with pytest.raises(UserError, match=r"loss\.lambda is 0\.5 and no teacher"):
        plan_distillation(loss(**{"lambda": 0.5}), {})
    assert plan_distillation(loss(**{"lambda": 0.5}), {"dino": EYES}).scales == {}


def test_teachers_are_described_by_dataset_json() -> None:
    found = stored_teachers(config("a"), {"a": manifest(*BOTH, "dino/images")})
    assert found["vit"] == TeacherInfo(8, frozenset([IMAGES, TEXTS]), 70.0, "dataset: config")
    assert found["dino"].sides == {IMAGES}


def test_only_the_texts_that_are_read_need_vectors() -> None:
    two = manifest(*BOTH, captioners=("coca", "blip"))
    with pytest.raises(UserError, match="a: teacher vit has vectors of caption, coca, not of blip"):
        stored_teachers(config("a"), {"a": two})
    assert stored_teachers(config("a", captioners=["coca"]), {"a": two})["vit"].sides == {IMAGES, TEXTS}


def test_data_teachers_selects_the_teachers() -> None:
    manifests = {"a": manifest(*BOTH, "dino/images"), "b": manifest(*BOTH)}
    assert list(stored_teachers(config("a", "b", teachers=["vit"]), manifests)) == ["vit"]
    with pytest.raises(UserError, match="b has no teacher 'dino'; it has: vit"):
        stored_teachers(config("a", "b", teachers=["dino"]), manifests)
    with pytest.raises(UserError, match=r"different teachers: a has dino, vit, b has vit\. Name the teachers"):
        stored_teachers(config("a", "b"), manifests)


def test_datasets_must_agree_on_a_teacher() -> None:
    with pytest.raises(UserError, match=r"vit differs between the datasets: a has 8 dimensions .* b has 9"):
        stored_teachers(config("a", "b"), {"a": manifest(*BOTH), "b": manifest(*BOTH, dim=9)})
    manifests = {"a": manifest(*BOTH), "b": manifest(*BOTH, scale=60.0)}
    with pytest.raises(UserError, match=r"logit scale 70.0 in a and 60.0 in b\. Set loss\.logit_scales\.vit"):
        stored_teachers(config("a", "b"), manifests)
    assert stored_teachers(config("a", "b", loss={"logit_scales": {"vit": 65.0}}), manifests).keys() == {"vit"}
