"""Stand-ins for an accelerator and its models."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from benchmarks.pipeline.stand_ins import FixedTimeTeacher, StandInAccelerator


def test_teacher_returns_unit_vectors() -> None:
    teacher = FixedTimeTeacher(torch.device("cpu"))
    vectors = teacher.encode_images(torch.zeros(3, 3, 4, 4))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    assert teacher.encode_texts(["a", "b"]).shape == (2, teacher.dim)


def test_teacher_takes_time_for_each_image_and_no_cpu() -> None:
    teacher = FixedTimeTeacher(torch.device("cpu"), 0.02)
    start, cpu = time.perf_counter(), time.thread_time()
    teacher.encode_images(torch.zeros(5, 3, 4, 4))
    teacher.encode_images(torch.zeros(5, 3, 4, 4))
    assert time.perf_counter() - start >= teacher.last - teacher.first >= teacher.busy == pytest.approx(0.2)
    assert time.thread_time() - cpu < 0.1
    teacher.reset(0.0)
    assert teacher.busy == 0


def test_stand_in_accelerator_keeps_shapes_and_copies_nothing() -> None:
    parts = [np.zeros((count, 2, 8, 8, 3), np.uint8) for count in (3, 1)]
    tensor = StandInAccelerator().put_parts(parts)
    assert tensor.shape == (4, 2, 8, 8, 3)
    assert tensor.flatten(0, 1).shape == (8, 8, 8, 3)
    assert tensor.untyped_storage().nbytes() == 1
