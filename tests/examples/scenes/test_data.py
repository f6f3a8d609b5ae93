"""Scenes, whose masks follow the emoji that are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from examples.demo.data import shared_concepts
from examples.scenes.__main__ import student
from examples.scenes.data import SIDE, Drawer, write_scenes
from examples.scenes.teacher import Enlarged
from reinforce.evaluation.evaluator import Evaluator
from reinforce.student.model import build_student
from tests.helpers.data import tree


def test_a_scene_is_the_same_again_and_its_mask_has_what_is_drawn() -> None:
    drawer = Drawer(shared_concepts()[::20])
    one, again, other = (drawer.draw("training", number, 3) for number in (1, 1, 2))
    assert np.array_equal(np.asarray(one.image), np.asarray(again.image))
    assert np.array_equal(one.labels, again.labels)
    assert not np.array_equal(one.labels, other.labels)
    assert one.labels.shape == (SIDE, SIDE)
    assert 0 < (one.labels > 0).mean() < 0.9
    assert one.labels.max() < drawer.classes
    named = set(one.caption.split(", "))
    assert 3 <= len(named) <= 5


def test_scenes_are_a_set_of_the_student_and_patches_have_its_grid(tmp_path: Path) -> None:
    drawer = Drawer(shared_concepts()[::20])
    classes = write_scenes(tmp_path, train=2, masks=3, drawer=drawer)
    before = tree(tmp_path)
    assert write_scenes(tmp_path, train=2, masks=3, drawer=drawer) == classes
    assert tree(tmp_path) == before
    mask = np.asarray(Image.open(tmp_path / "scenes" / "annotations" / "training" / "000001.png"))
    assert np.array_equal(mask, drawer.draw("training", 1).labels + 1)
    config = student(tmp_path, "dataset", "float16", 0, 10, classes, 5)
    assert Evaluator(config.evaluate).images == 4
    assert config.loss.dense is not None
    grid = build_student(config.student, seed=0).clip.visual
    with torch.no_grad():
        found = grid.forward_intermediates(torch.zeros(1, 3, SIDE, SIDE), intermediates_only=True)
    teacher = Enlarged(torch.device("cpu"), "local-dir:configs/demo-models/conv-64", 2 * SIDE)
    patches = teacher.encode_patches(torch.zeros(1, 3, 2 * SIDE, 2 * SIDE))
    assert found["image_intermediates"][config.loss.dense.stage].shape[2:] == patches.shape[1:3] == (6, 6)
