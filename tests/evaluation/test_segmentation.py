"""Segmentation sets of users, in trainings, and as a suite."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reinforce import settings, terminal
from reinforce.errors import UserError
from reinforce.evaluation.command import EvaluationCommand, evaluate_models
from reinforce.evaluation.config import Evaluation
from reinforce.evaluation.encoding import EvaluatedModels
from reinforce.evaluation.evaluator import Evaluator, evaluate_set
from reinforce.evaluation.kinds import segmentation
from reinforce.evaluation.kinds.segmentation import SegmentationSet
from reinforce.evaluation.reading import ImageBatches
from reinforce.evaluation.suite import evaluate_suite
from reinforce.source.config import Limits
from teachers.image_encoder import ImageEncoder
from teachers.spec import ModelSpec
from tests.helpers.evaluation import CPU, ConstantEncoder, load_spec, load_teacher, make_evaluator
from tests.helpers.models import tiny_models
from tests.helpers.segmentation import PatchColours, scene, write_ade, write_voc

FAST = {"steps": 60, "batch": 4, "learning_rate": 0.02, "classes": 4}


def evaluate(model: Any, url: str, **config: Any) -> dict[str, float]:
    result = make_evaluator(segmentation={"set": {"images": url, **FAST, **config}}).evaluate(model, CPU)
    assert not result.failed, result.failed
    return {name.rpartition("/")[2]: score for name, score in result.metrics.items()}


@pytest.mark.parametrize("schedule", ["short", "published"])
def test_colours_are_found_in_both_layouts(tmp_path: Path, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "_PUBLISHED_CROP", 32)  # smaller than the images, which then take several windows
    ade = write_ade(tmp_path / "ade", {"training": 12, "validation": 6})
    voc = write_voc(tmp_path / "voc", {"train": 12, "val": 6})
    for url in (ade, voc):
        scores = evaluate(PatchColours(), url, schedule=schedule)
        assert scores["miou"] > 0.7
        assert scores["accuracy"] > 0.9


def test_a_training_evaluates_a_student_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    url = write_voc(tmp_path / "voc", {"train": 4, "val": 3})
    teacher = load_teacher(tiny_models.open_clip_model(tmp_path / "model"))
    clip = teacher._model.train()
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    state = torch.get_rng_state()
    evaluator = make_evaluator(segmentation={"voc": {"images": url, **FAST, "steps": 3}})
    results = [evaluator.evaluate_module(clip, load_spec(clip), None, CPU) for _ in range(2)]
    for result in results:
        assert [*result.metrics] == ["segmentation/voc/miou", "segmentation/voc/accuracy"]
    assert results[0].metrics == pytest.approx(results[1].metrics, abs=0.02)
    assert clip.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())


def test_an_image_that_cannot_be_decoded_is_left_out_of_either_part(tmp_path: Path) -> None:
    url = write_ade(tmp_path, {"training": 6, "validation": 4})
    for part in ("training", "validation"):
        (tmp_path / "images" / part / "ADE_00000001.jpg").write_bytes(b"no image")
    result = make_evaluator(segmentation={"set": {"images": url, **FAST}}).evaluate(PatchColours(), CPU)
    [outcome] = result.sets.values()
    assert sorted(str(refusal.key) for refusal in outcome.refused) == ["test/ADE_00000001", "train/ADE_00000001"]
    assert outcome.part == "8 of 10 images"
    assert result.metrics["segmentation/set/miou"] > 0.5


def test_a_part_of_broken_images_is_one_line(tmp_path: Path) -> None:
    url = write_ade(tmp_path, {"training": 2, "validation": 2})
    for file in (tmp_path / "images" / "training").iterdir():
        file.write_bytes(b"")
    result = make_evaluator(segmentation={"set": {"images": url, **FAST}}).evaluate(PatchColours(), CPU)
    assert (
        "every image of the training part is refused, the last (train/ADE_0000000" in result.failed["segmentation/set"]
    )
    assert not result.metrics


def open_set(url: str, **config: Any) -> Any:
    return make_evaluator(segmentation={"set": {"images": url, **FAST, **config}})


def test_masks_that_fit_no_class_or_image_are_named_before_a_model_is_evaluated(tmp_path: Path) -> None:
    url = write_ade(tmp_path, {"training": 3, "validation": 2})
    mask = tmp_path / "annotations" / "validation" / "ADE_00000001.png"
    labels = np.asarray(Image.open(mask))

    def refused(message: str, pixels: np.ndarray | None = None, url: str = url, **config: Any) -> None:
        if pixels is not None:
            Image.fromarray(pixels).save(mask)
        with pytest.raises(UserError, match=message):
            open_set(url, **config)

    refused(r"segmentation/set: the mask of ADE_0000000\d has the value \d, which none of 2 classes", classes=2)
    refused("the mask of ADE_00000001 has 56 x 39 pixels, and its image 56 x 40", labels[:-1])
    refused("the mask of ADE_00000001 cannot be used: its pixels are RGB, not indices", np.stack([labels] * 3, -1))
    mask.write_bytes(b"none")
    refused("the mask of ADE_00000001 cannot be used: cannot identify image file")
    mask.unlink()
    refused(r"1 of 2 files of the part 'validation' are missing in .*annotations/validation")
    refused("cannot be read: FileNotFoundError", test="testing")
    refused("has no folder ImageSets/Segmentation of voc2012 or annotations of ade20k", url=str(tmp_path / "images"))


def test_a_wrong_mask_that_is_found_late_fails_the_set_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write_voc(tmp_path, {"train": 4, "val": 3})
    mask = tmp_path / "SegmentationClass" / "2007_100002.png"
    Image.fromarray(np.full((40, 56), 77, np.uint8)).save(mask)
    monkeypatch.setattr(segmentation, "_CHECKED", 1)
    result = open_set(url).evaluate(PatchColours(), CPU)
    assert "the mask of 2007_100002 has the value 77, which none of 4 classes" in result.failed["segmentation/set"]
    assert not result.metrics


def test_a_model_without_patches_fails_with_the_reason(tmp_path: Path) -> None:
    url = write_ade(tmp_path, {"training": 3, "validation": 2})
    why = open_set(url).evaluate(ConstantEncoder(), CPU).failed["segmentation/set"]
    assert "ConstantEncoder has no patches: add a method `encode_patches(pixels)" in why
    vit = load_teacher(tiny_models.open_clip_model(tmp_path / "vit"))
    why = open_set(url, stage=9).evaluate(vit, CPU).failed["segmentation/set"]
    assert "CLIP, stage 9 gives no patches for images of 32 x 32 pixels" in why

    class Large(PatchColours):
        def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(pixels, 64).permute(0, 2, 3, 1)

    why = open_set(url).evaluate(Large(), CPU).failed["segmentation/set"]
    assert "Large gives no patches for images of 32 x 32 pixels" in why


def test_features_that_are_not_finite_fail_the_set(tmp_path: Path) -> None:
    class Broken(PatchColours):
        def encode_patches(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode_patches(pixels) * torch.nan

    url = write_ade(tmp_path, {"training": 3, "validation": 2})
    result = open_set(url).evaluate(Broken(), CPU)
    assert "128 of 128 patch embeddings are not finite" in result.failed["segmentation/set"]
    assert not result.metrics


def test_trainaug_has_masks_of_its_own(tmp_path: Path) -> None:
    url = write_voc(tmp_path, {"train": 2, "val": 2})
    write_voc(tmp_path, {"trainaug": 5}, masks="SegmentationClassAug")
    evaluator = open_set(url, train="trainaug")
    assert evaluator.images == 7


def suite_command(**config: Any) -> EvaluationCommand:
    return settings.parse(EvaluationCommand, config)


def test_the_suite_keeps_results_of_sets_in_their_folders_and_shows_the_steps_of_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "sets"
    write_voc(root / "VOCdevkit" / "VOC2012", {"train": 3, "val": 2})
    monkeypatch.setattr(segmentation, "_STEPS", {"published": (2, 1), "short": (1, 0)})
    monkeypatch.setattr(segmentation, "_PUBLISHED_CROP", 48)
    name = tiny_models.open_clip_model(tmp_path / "model")
    config = suite_command(suite="dense", data=str(root), sets=["voc2012"])
    reports = []
    for seconds in (0.0, 10.0):
        monkeypatch.setattr(terminal, "_LOG_SECONDS", seconds)
        reports.append(evaluate_suite({"model": ModelSpec(model=name)}, config, str(tmp_path / "out"), device="cpu"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert [line.partition("  ")[0] for line in lines] == [
        f"Pascal VOC 2012, head for model: {step} of 2 steps" for step in (1, 2)
    ]
    assert lines[1].endswith("steps/s  ETA 0:00:00")
    for report in reports:
        assert not report.failed
        [line] = report.results["model"].values()
        assert 0 <= line["metrics"]["main_metric"] == line["metrics"]["miou"] <= 1
        assert line["notes"] == ["5 samples (published: 2,913): not comparable"]
    assert reports[0].results == reports[1].results
    (root / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000000.png").write_bytes(b"other")
    report = evaluate_suite({"model": ModelSpec(model=name)}, config, str(tmp_path / "out"), device="cpu")
    assert "the mask of 2007_000000 cannot be used" in report.failed["voc2012"]
    missing = suite_command(suite="dense", data=str(root))
    assert (
        "VOCdevkit"
        not in evaluate_suite({"other": ModelSpec(model=name)}, missing, str(tmp_path / "out2"), device="cpu").absent[
            "ade20k"
        ]
    )


def test_a_training_takes_the_short_schedule_of_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", {"train": 3, "val": 2})
    monkeypatch.setattr(segmentation, "_STEPS", {"published": (0, 0), "short": (2, 0)})
    evaluator = Evaluator(settings.parse(Evaluation, {"suite": "dense", "data": str(tmp_path), "sets": ["voc2012"]}))
    clip = load_teacher(tiny_models.open_clip_model(tmp_path / "model"))._model
    result = evaluator.evaluate(ImageEncoder(clip, load_spec(clip), CPU, clip.encode_image), CPU)
    assert [*result.metrics] == ["dense/voc2012/miou"]


def test_a_page_shows_the_segmentations_of_all_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_voc(tmp_path / "voc", {"train": 3, "val": 2})
    names = {f"<{seed}>": tiny_models.open_clip_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)}
    specs = {name: ModelSpec(model=model) for name, model in names.items()}
    masks = {"images": str(tmp_path / "voc"), **FAST, "steps": 2}
    report = evaluate_models(
        specs, suite_command(segmentation={"voc": masks}), "cpu", "fp32", str(tmp_path / "page.html")
    )
    assert "step" not in capsys.readouterr().out, "a short training leaves no line in a log"
    for result in report.results.values():
        [outcome] = result.sets.values()
        [shown] = outcome.segmented.values()
        assert [one.key for one in shown] == ["2007_100000", "2007_100001"]
        pixels, labels = scene(1000)
        true = np.asarray(Image.open(io.BytesIO(shown[0].true)), np.int16)
        assert true.shape == pixels.shape
        ground, ignored = labels == 0, np.zeros_like(labels, bool)
        ground[:, :4], ignored[:, :1] = False, True  # the border of the mask is ignored
        assert np.abs(true[ignored] - pixels[ignored]).mean() < 12
        assert true[ground].mean() < 0.6 * pixels[ground].mean()
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/webp;base64,") == 2 * (2 + 2)
    assert "&lt;1&gt;" in page
    assert "<1>" not in page
    with pytest.raises(UserError, match="--page shows segmentations, and no set has masks"):
        evaluate_models(specs, suite_command(), "cpu", "fp32", str(tmp_path / "page.html"))


def test_one_model_without_patches_costs_the_others_nothing(tmp_path: Path) -> None:
    write_voc(tmp_path, {"train": 3, "val": 2})
    masks = SegmentationSet(images=str(tmp_path), **{**FAST, "steps": 2})
    assert segmentation.KIND.open_own is not None
    opened = segmentation.KIND.open_own(masks, "set", Limits(), ())
    models = EvaluatedModels({"good": PatchColours(), "bad": ConstantEncoder()}, CPU, 4, 2)
    outcome = evaluate_set(opened, ImageBatches(opened.examples, policy=opened.policy), models)
    assert {*outcome.metrics} == {"good"}
    assert {*outcome.failed} == {"bad"}
