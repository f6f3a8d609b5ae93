"""Online teachers: their description and their targets. That they equal stored ones is in test_task.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reinforce.errors import UserError
from reinforce.student import online
from reinforce.student.distillation import IMAGES, TEXTS
from teachers.spec import TeacherSpec

SPECS = {
    "both": TeacherSpec.model_validate(
        {"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16}, "dtype": "float32"}
    ),
    "eyes": TeacherSpec.model_validate({"class": "tests.helpers.models:ImageOnly", "dtype": "float32"}),
    "ears": TeacherSpec.model_validate({"class": "tests.helpers.models:TextOnly", "dtype": "float32"}),
}


@pytest.fixture(scope="module")
def teachers() -> Any:
    return online.load_teachers(SPECS, "cpu")


def batch(size: int) -> dict[str, Any]:
    images = torch.randint(0, 256, (size, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    texts = ["word " * (1 + 7 * i % 5) + str(i) for i in range(size)]
    return {"image": images, "views": dict.fromkeys(SPECS, images), "texts": {"caption": texts}}


def test_a_loaded_teacher_is_described_by_its_sides_dimension_and_scale(teachers: Any) -> None:
    infos = {name: online.teacher_info(teacher, SPECS[name]) for name, teacher in teachers.items()}
    sides = {name: info.sides for name, info in infos.items()}
    assert sides == {"both": {IMAGES, TEXTS}, "eyes": {IMAGES}, "ears": {TEXTS}}
    assert {name: info.dim for name, info in infos.items()} == {"both": 8, "eyes": 5, "ears": 6}
    assert (infos["both"].logit_scale, infos["both"].scale_source) == (30.0, "model")
    scaled = SPECS["both"].model_copy(update={"logit_scale": 5.0})
    assert online.teacher_info(teachers["both"], scaled).scale_source == "config: loss.teachers"


def test_each_teacher_gives_targets_of_its_sides(teachers: Any) -> None:
    made = online.add_targets(batch(3), teachers)
    shapes = {name: {what: tuple(v.shape) for what, v in of.items()} for name, of in made["targets"].items()}
    assert shapes == {
        "both": {"image": (3, 8), "caption": (3, 8)},
        "eyes": {"image": (3, 5)},
        "ears": {"caption": (3, 6)},
    }


def test_targets_keep_their_rows_in_batches_of_any_size(teachers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = online.add_targets(batch(11), teachers)["targets"]
    monkeypatch.setattr(online, "_MAX_BATCH", 4)
    torch.testing.assert_close(online.add_targets(batch(11), teachers)["targets"], whole)
    each = torch.cat([teachers["both"].encode_texts([text]) for text in batch(11)["texts"]["caption"]])
    torch.testing.assert_close(whole["both"]["caption"], each)


def test_a_teacher_that_cannot_be_loaded_is_an_error_for_the_user() -> None:
    with pytest.raises(UserError, match="nowhere"):
        online.load_teachers({"x": TeacherSpec.model_validate({"class": "nowhere:Model"})}, "cpu")
