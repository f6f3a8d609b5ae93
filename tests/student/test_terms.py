"""The config and the job of a student, which teachers are distilled and how, and the targets of online teachers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce import settings
from reinforce.errors import UserError
from reinforce.student import online
from reinforce.student.config import Data, Loss, StudentConfig
from reinforce.student.teachers import IMAGES, TEXTS, TeacherInfo, stored_teachers
from reinforce.student.terms.base import TargetModels
from reinforce.student.terms.registry import Terms, make_terms
from reinforce.student.train import student_job
from teachers.registry import teacher_spec
from tests.helpers.models import ColorTeacher
from tests.helpers.tuning import trial_student

TWO = TeacherInfo(8, frozenset([IMAGES, TEXTS]), 70.0, "dataset: config")
UNSCALED = TeacherInfo(8, frozenset([IMAGES, TEXTS]), None, "dataset: model")
EYES = TeacherInfo(5, frozenset([IMAGES]), None, "dataset: model")


def loss(**keys: Any) -> Loss:
    return settings.parse(Loss, keys)


def terms(loss: Loss, **teachers: TeacherInfo) -> Terms:
    return make_terms(loss, TargetModels(teachers))


def config(*urls: str, loss: dict[str, Any] | None = None, **data: Any) -> StudentConfig:
    made = trial_student("out", 1, {"datasets": list(urls), **data})
    return made.model_copy(update={"loss": settings.parse(Loss, loss or {})})


def manifest(*layers: str, scale: float | None = 70.0, dim: int = 8, captioners: tuple[str, ...] = ("coca",)) -> Any:
    teachers = {name.split("/")[0] for name in layers}
    entry = {"logit_scale": scale, "logit_scale_from": "config", "dim": dim}
    return {
        "teachers": dict.fromkeys(sorted(teachers), entry),
        "captioners": {name: {} for name in captioners},
        "layers": {f"embeddings/{name}": {} for name in layers},
    }


BOTH = ("vit/images", "vit/caption", "vit/coca")


def test_feature_targets_are_all_teachers_or_none_and_a_scale_of_the_config_replaces_that_of_the_dataset() -> None:
    note = "teacher vit: similarities, logit scale 70 (dataset: config)"
    for features, approached, use in (
        ("all", ["vit", "dino"], "vectors of images, 5 dimensions"),
        ("none", [], "unused"),
    ):
        made = terms(loss(features=features), vit=TWO, dino=EYES)
        assert {name.split("/")[0] for name in made.merged(lambda term: term.heads(4))} == set(approached)
        assert made.models == {"teachers": ["vit", *approached[1:]]}
        assert made.notes[0] == note + "; vectors of images and texts, 8 dimensions" * (features == "all")
        assert made.notes[1].startswith(f"teacher dino: {use}")
    made = terms(loss(logit_scales={"vit": 55.0}), vit=TWO)
    assert made.merged(lambda term: term.recorded) == {"loss.logit_scales.vit": 55.0}
    assert "55 (config: loss.logit_scales.vit, instead of 70 of the dataset: config)" in made.notes[0]
    assert terms(loss(logit_scales={"vit": 5.0}), vit=UNSCALED).merged(lambda term: term.recorded) == {
        "loss.logit_scales.vit": 5.0
    }


def test_teachers_without_a_scale_of_unknown_names_or_with_one_side_are_refused_where_nothing_else_is_learnt() -> None:
    refused: list[tuple[dict[str, Any], dict[str, TeacherInfo], str]] = [
        ({}, {"vit": UNSCALED}, r"teacher vit has no logit scale.*Set loss\.logit_scales\.vit"),
        ({"form": "sigmoid", "logit_scales": {"vid": 5.0}}, {"vit": TWO}, "there is no teacher 'vid'; there are: vit"),
        ({"form": "sigmoid", "logit_biases": {"vid": 5.0}}, {"vit": TWO}, "there is no teacher 'vid'; there are: vit"),
        ({}, {"dino": EYES}, r"loss\.lambda is 1 and no teacher has vectors of both"),
        ({"lambda": 0.5}, {}, r"loss\.lambda is 0\.5 and no teacher"),
    ]
    for keys, teachers, message in refused:
        with pytest.raises(UserError, match=message):
            terms(loss(**keys), **teachers)
    assert terms(loss(**{"lambda": 0.0}), vit=UNSCALED, dino=EYES).models == {"teachers": []}
    assert terms(loss(**{"lambda": 0.5}), dino=EYES).merged(lambda term: term.recorded) == {}


def test_teachers_are_described_by_dataset_json_and_need_vectors_of_the_texts_that_are_read() -> None:
    found = stored_teachers(config("a"), {"a": manifest(*BOTH, "dino/images")})
    assert found["vit"] == TeacherInfo(8, frozenset([IMAGES, TEXTS]), 70.0, "dataset: config")
    assert found["dino"].sides == {IMAGES}
    two = manifest(*BOTH, captioners=("coca", "blip"))
    with pytest.raises(UserError, match="a: teacher vit has vectors of caption, coca, not of blip"):
        stored_teachers(config("a"), {"a": two})
    assert stored_teachers(config("a", captioners=["coca"]), {"a": two})["vit"].sides == {IMAGES, TEXTS}


def test_data_teachers_selects_the_teachers_on_which_datasets_must_agree() -> None:
    manifests = {"a": manifest(*BOTH, "dino/images"), "b": manifest(*BOTH)}
    assert list(stored_teachers(config("a", "b", teachers=["vit"]), manifests)) == ["vit"]
    with pytest.raises(UserError, match="b has no teacher 'dino'; it has: vit"):
        stored_teachers(config("a", "b", teachers=["dino"]), manifests)
    with pytest.raises(UserError, match=r"different teachers: a has dino, vit, b has vit\. Name the teachers"):
        stored_teachers(config("a", "b"), manifests)
    with pytest.raises(UserError, match=r"vit differs between the datasets: a has 8 dimensions .* b has 9"):
        stored_teachers(config("a", "b"), {"a": manifest(*BOTH), "b": manifest(*BOTH, dim=9)})
    manifests = {"a": manifest(*BOTH), "b": manifest(*BOTH, scale=60.0)}
    with pytest.raises(UserError, match=r"logit scale 70.0 in a and 60.0 in b\. Set loss\.logit_scales\.vit"):
        stored_teachers(config("a", "b"), manifests)
    assert stored_teachers(config("a", "b", loss={"logit_scales": {"vit": 65.0}}), manifests).keys() == {"vit"}


SPECS = {
    "both": teacher_spec(**{"class": "tests.helpers.models:ColorTeacher", "options": {"size": 16}, "codec": "float32"}),
    "eyes": teacher_spec(**{"class": "tests.helpers.models:ImageOnly", "codec": "float32"}),
    "ears": teacher_spec(**{"class": "tests.helpers.models:TextOnly", "codec": "float32"}),
}


@pytest.fixture(scope="module")
def teachers() -> Any:
    return online.load_teachers(SPECS, "cpu")


def batch(size: int) -> dict[str, Any]:
    images = torch.randint(0, 256, (size, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    texts = ["word " * (1 + 7 * i % 5) + str(i) for i in range(size)]
    return {"image": images, "crops": dict.fromkeys(SPECS, images), "texts": {"caption": texts}}


def test_a_loaded_teacher_is_described_by_its_sides_dimension_and_scale(teachers: Any) -> None:
    infos = {name: online.teacher_info(teacher, SPECS[name]) for name, teacher in teachers.items()}
    sides = {name: info.sides for name, info in infos.items()}
    assert sides == {"both": {IMAGES, TEXTS}, "eyes": {IMAGES}, "ears": {TEXTS}}
    assert {name: info.dim for name, info in infos.items()} == {"both": 8, "eyes": 5, "ears": 6}
    assert (infos["both"].logit_scale, infos["both"].scale_source) == (30.0, "model")
    scaled = SPECS["both"].model_copy(update={"logit_scale": 5.0})
    assert online.teacher_info(teachers["both"], scaled).scale_source == "config: loss.teachers"


def test_targets_keep_their_rows_in_batches_of_any_size(teachers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = online.add_targets(batch(11), teachers)["targets"]
    shapes = {name: {what: tuple(v.shape) for what, v in of.items()} for name, of in whole.items()}
    assert shapes == {
        "both": {"image": (11, 8), "caption": (11, 8)},
        "eyes": {"image": (11, 5)},
        "ears": {"caption": (11, 6)},
    }
    monkeypatch.setattr(online, "_MAX_BATCH", 4)
    torch.testing.assert_close(online.add_targets(batch(11), teachers)["targets"], whole)
    each = torch.cat([teachers["both"].encode_texts([text]) for text in batch(11)["texts"]["caption"]])
    torch.testing.assert_close(whole["both"]["caption"], each)


def test_targets_do_not_change_when_a_teacher_reuses_the_memory_of_its_output(
    teachers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reusing(ColorTeacher):
        buffer = torch.empty(4, 8)

        def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.buffer[: len(pixels)].copy_(super().encode_images(pixels))

        def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
            return self.buffer[: len(texts)].copy_(super().encode_texts(texts))

    monkeypatch.setattr(online, "_MAX_BATCH", 4)
    found = online.add_targets(batch(11), {"both": Reusing(torch.device("cpu"))})["targets"]
    torch.testing.assert_close(found["both"], online.add_targets(batch(11), teachers)["targets"]["both"])


def test_datasets_are_urls_or_sections_and_captioners_names_or_weights() -> None:
    for datasets in ("a", ["a"], {"url": "a"}, [{"url": "a"}]):
        data = settings.parse(Data, {"datasets": datasets})
        assert [(source.url, source.weight) for source in data.datasets] == [("a", 1.0)]
    for captioners, weights in ((["a", "b"], {"a": 1.0, "b": 1.0}), ({"a": 3}, {"a": 3.0}), ([], {}), (None, None)):
        assert settings.parse(Data, {"datasets": "a", "captioners": captioners}).captioners == weights


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"logit_biases": {"a": -10.0}}, "`logit_biases` needs `form: sigmoid`"),
        ({"learn_scales": True, "form": "sigmoid"}, "learn_scales` needs `form: softmax`"),
        ({"learn_scales": True, "lambda": 0.0}, "a lambda above 0"),
        (
            {"features": {"balance": "phi-s", "head": "none"}},
            "balanced by `phi-s` are no longer of the teacher's space",
        ),
        ({"features": {"balance": "dispersion", "distance": "similarities"}}, "is for the distances cosine and l2"),
        *(
            ({"weights": weights}, r"weights: must be confidence, or weights above 0 by teacher, such as {dino: 2.0}")
            for weights in ({"a": 0}, {"a": 1.0, "b": -1}, {"a": float("nan")}, {"a": True}, "certainty", [1.0], 2)
        ),
        ({"lambda": 1.5}, "less than or equal to 1"),
        ({"lamda": 0.5}, "unknown key"),
    ],
)
def test_losses_that_contradict_themselves_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.parse(Loss, keys)


def test_a_config_needs_an_output_a_student_data_and_a_length() -> None:
    with pytest.raises(UserError, match=r"(?s)output: .*student: .*data: .*train: "):
        settings.parse(StudentConfig, {})


CONFIG: dict[str, Any] = {
    "output": "out",
    "seed": 7,
    "student": {"model": "MobileCLIP2-S0"},
    "data": {"datasets": "a", "workers": 3},
    "train": {"steps": 5},
    "evaluate": {"every": 2},
}


def test_the_job_has_the_config_of_a_model_in_a_folder(tmp_path: Path) -> None:
    settings_of_model = {"model_cfg": {"vision_cfg": {"image_size": 48}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings_of_model))
    name = f"local-dir:{tmp_path}"
    config = settings.parse(StudentConfig, {**CONFIG, "student": {"model": name}})
    assert student_job(config).model_config == {f"{name}/open_clip_config.json: model_cfg.vision_cfg.image_size": 48}
    (tmp_path / "open_clip_config.json").unlink()
    assert student_job(config).model_config is None
    assert student_job(settings.parse(StudentConfig, CONFIG)).model_config is None


def test_keys_that_change_what_is_learnt_may_not_change_on_resume() -> None:
    job = student_job(settings.parse(StudentConfig, CONFIG))
    assert (job.output, job.seed, job.evaluate_every, job.export) == ("out", 7, 2, "student")
    fixed = job.fixed_config
    assert {"seed", "student.model", "data.window", "data.streams", "loss.lambda", "train.batch"} <= fixed.keys()
    mutable = {"output", "data.workers", "data.prefetch", "train.steps", "train.compute.ranks"}
    assert not mutable & fixed.keys()
    assert not any(key.startswith("evaluate") for key in fixed)
