"""The segmentation head and its metrics against plain computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reinforce.evaluation.kinds.masks import IGNORED, covering, random_crop, window_starts
from reinforce.evaluation.kinds.segmentation_head import (
    HeadSchedule,
    LinearHead,
    Segmenter,
    confusion,
    mean_iou,
    most_likely,
    pixel_loss,
    train_head,
)
from teachers.image_encoder import patches_of
from tests.helpers.segmentation import PatchColours, scene

CPU = torch.device("cpu")
SCHEDULE = HeadSchedule(60, 4, 4, 0.02, 1e-3, "cosine", 0.1)


def iou_by_sets(predicted: np.ndarray, true: np.ndarray, classes: int) -> tuple[float, float]:
    """The definition, pixel by pixel in Python sets."""
    counted = [index for index in range(true.size) if true.flat[index] != IGNORED]
    scores = []
    for one in range(classes):
        found = {index for index in counted if predicted.flat[index] == one}
        wanted = {index for index in counted if true.flat[index] == one}
        if found | wanted:
            scores.append(len(found & wanted) / len(found | wanted))
    hits = sum(predicted.flat[index] == true.flat[index] for index in counted)
    return sum(scores) / len(scores), hits / len(counted)


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_metrics_are_those_of_sets_of_pixels(seed: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    true = random.choice([*range(classes), IGNORED], (2, 5, 7)).astype(np.uint8)
    true[0, 0, 0] = 0
    predicted = random.integers(0, random.integers(1, classes + 1), (2, 5, 7))
    counts = sum(
        confusion(torch.from_numpy(found), torch.from_numpy(of_image), classes)
        for found, of_image in zip(predicted, true, strict=True)
    )
    assert isinstance(counts, torch.Tensor)
    assert mean_iou(counts) == pytest.approx(iou_by_sets(predicted, true, classes))


def test_the_most_likely_class_is_that_of_all_resized_logits() -> None:
    logits = torch.randn(37, 5, 6, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(logits[None], (23, 31), mode="bilinear")[0].argmax(0)
    assert torch.equal(most_likely(logits, (23, 31)), whole)


def test_ignored_pixels_cost_nothing() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels[0] = IGNORED
    expected = torch.nn.functional.cross_entropy(logits[1:], labels[1:].long())
    torch.testing.assert_close(pixel_loss(logits, labels), expected)
    nothing = pixel_loss(logits, torch.full_like(labels, IGNORED))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_rate_rises_then_falls_to_zero(decay: str) -> None:
    rates = [HeadSchedule(100, 4, 10, 0.5, 0, decay, 0).rate(step) for step in range(101)]  # type: ignore[arg-type]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10] == max(rates) == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)
    halfway = {"cosine": 0.25, "linear": 0.25}[decay]
    assert rates[55] == pytest.approx(halfway)
    assert rates[32 + 1] == pytest.approx(
        0.5 * (1 - 23 / 90 if decay == "linear" else (1 + math.cos(math.pi * 23 / 90)) / 2)
    )


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for step in range(steps):
        pixels, labels = zip(*(scene(4 * step + index, 32, 32) for index in range(4)), strict=True)
        found.append((torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(labels))))
    return found


def test_a_head_learns_the_classes_also_where_gradients_are_off_and_the_same_again() -> None:
    encoder = patches_of(PatchColours(), CPU)
    with torch.inference_mode():
        first = train_head(encoder, batches(60), 4, SCHEDULE, CPU, seed=3)
    torch.manual_seed(5)  # the global random state does not count
    second = train_head(encoder, batches(60), 4, SCHEDULE, CPU, seed=3)
    torch.testing.assert_close(first.state_dict(), second.state_dict())
    pixels, labels = scene(999, 32, 32)
    logits, _ = Segmenter(encoder, first, None, 8).logits(torch.from_numpy(pixels))
    predicted = most_likely(logits, labels.shape)
    assert mean_iou(confusion(predicted, torch.from_numpy(labels), 4))[0] > 0.8


def test_windows_that_overlap_are_averaged() -> None:
    encoder = patches_of(PatchColours(16), CPU)
    head = LinearHead(3, 5, 0.1, seed=0).eval()
    image = torch.from_numpy(scene(1, 16, 45)[0])
    found, features = Segmenter(encoder, head, 11, 2).logits(image)
    total, counts = torch.zeros(5, 16, 45), torch.zeros(16, 45)
    for left in (0, 11, 22, 29):
        window = image[None, :, left : left + 16].permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            logits = head(torch.nn.functional.avg_pool2d(window, 4).permute(0, 2, 3, 1))
        total[:, :, left : left + 16] += torch.nn.functional.interpolate(logits, (16, 16), mode="bilinear")[0]
        counts[:, left : left + 16] += 1
    torch.testing.assert_close(found, total / counts)
    assert features.shape == (4 * 16, 3)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_windows_cover_a_side(length: int, window: int, stride: int) -> None:
    window, stride = min(window, length), min(stride, window)
    covered = {pixel for start in window_starts(length, window, stride) for pixel in range(start, start + window)}
    assert covered == {*range(length)}


@given(st.integers(0, 2**32 - 1))
def test_a_crop_and_its_mask_show_the_same_place(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(20, 70, 2))
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 :, width // 4 :] = 1
    image = Image.fromarray(np.repeat(mask[:, :, None] * np.uint8(255), 3, 2))
    fill = np.array([9, 9, 9], np.uint8)
    pixels, labels = random_crop(image, mask, (24, 32), (0.5, 2.0), random.random(4), fill)
    assert pixels.shape == (24, 32, 3)
    outside = labels == IGNORED
    assert (pixels[outside] == 9).all()
    agree = (pixels[~outside][:, 0] > 127) == (labels[~outside] == 1)
    assert agree.mean() > 0.9  # but for the edge between the classes


def test_a_covering_image_keeps_its_shape() -> None:
    assert covering(Image.new("RGB", (100, 50)), (32, 32)).shape == (32, 64, 3)
    assert covering(Image.new("RGB", (5, 50)), (32, 16)).shape == (160, 16, 3)
